"""Every op as it stands in a plan: read back it is the same op, to the last bit of its numbers."""

from __future__ import annotations

import ast
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

import shardmerge
from shardmerge.dtypes import DTYPES
from shardmerge.ops.arrays import numpy_dtype
from shardmerge.ops.contract import Arithmetic, Op
from shardmerge.ops.registry import OPS
from shardmerge.ops.written import _HOMES, op_class, op_of, op_row
from shardmerge.plan.marks import Marks
from shardmerge.tensors import Made, Piece, TensorEntry
from tests.small_plans import Store
from tests.test_op_laws import CASES, build

NUMBERS = (0.1 + 0.2, 0.3, -0.0, 0.0, 1e-300, 5e-324, 1 / 3, -1.5, 2.0**53 + 2, 1e308, math.inf, -math.inf, 7)
TEXTS = ("", "x.weight", 'a "quoted" \\ one\n', "\udcff\x00", "größe", "nan", "1.0")
WHOLE = (0, 1, -1, 7, 2**31, 2**53 + 1, -(2**62))
INIT = ("mean", "normal", "copy", "zeros")


def drawn(kind: str, rng: random.Random) -> object:
    """Returns a value of a field, by its annotation; one that is not known here is an error."""
    one: dict[str, Callable[[], object]] = {
        "int": lambda: rng.choice(WHOLE),
        "float": lambda: rng.choice((*NUMBERS, rng.uniform(-1, 1))),
        "bool": lambda: rng.random() < 0.5,
        "str": lambda: rng.choice(TEXTS),
        "DType": lambda: rng.choice(list(DTYPES.values())),
        "RowInit": lambda: rng.choice(INIT),
        "int | None": lambda: rng.choice((None, *WHOLE)),
        "Shape | None": lambda: rng.choice((None, drawn("Shape", rng))),
        "Shape": lambda: tuple(rng.choice(WHOLE) for _ in range(rng.randint(0, 4))),
        "tuple[int, ...]": lambda: drawn("Shape", rng),
        "tuple[float, ...]": lambda: tuple(drawn("float", rng) for _ in range(rng.randint(0, 4))),
    }
    return one[kind]()


def random_op(name: str, rng: random.Random) -> Op:
    kind = op_class(name)
    return kind(**{field.name: drawn(str(field.type), rng) for field in fields(kind)})


def through_text(op: Op) -> Op:
    return op_of(json.loads(json.dumps(op_row(op))))


def bits(value: object) -> object:
    """Returns a value so that equal ones have equal bits: -0.0 is not 0.0, and nan is nan."""
    if isinstance(value, tuple):
        return tuple(bits(one) for one in value)
    return struct.pack("<d", value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def test_every_op_has_a_home_in_the_plan() -> None:
    """What defines an op is found by its name: those that mappings name, and those that only the planner makes."""
    built = {type(build(OPS[kind], cases(4)[0].params)).__name__ for kind, cases in CASES.items()}
    defined = set()
    for path in Path(shardmerge.__file__).parent.glob("ops/*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(isinstance(line, ast.FunctionDef) for line in node.body):
                defined.add(node.name)
    ops = {name for name in defined & set(_HOMES) if issubclass(op_class(name), Op)}
    assert built <= set(_HOMES)
    assert set(_HOMES) == ops | {"Widen"}  # which is a Cast and defines nothing
    assert len(_HOMES) >= 28


@pytest.mark.parametrize("name", _HOMES)
def test_an_op_comes_back_to_the_last_bit(name: str) -> None:
    rng = random.Random(name)
    for _ in range(60):
        op = random_op(name, rng)
        found = through_text(op)
        assert found == op
        assert type(found) is type(op)
        for field in fields(op):
            value = getattr(op, field.name)
            if "float" in str(field.type):
                assert bits(getattr(found, field.name)) == bits(value if isinstance(value, tuple) else float(value))
            else:
                assert repr(getattr(found, field.name)) == repr(value)


@pytest.mark.parametrize("value", [math.nan, -math.nan, *NUMBERS])
def test_a_fill_comes_back_with_its_bits(value: float) -> None:
    """``nan`` is never equal, and has a sign."""
    op = op_class("Fill")((2, 3), DTYPES["F32"], value)
    found = through_text(op)
    assert struct.pack("<d", found.value) == struct.pack("<d", value)


def test_numbers_are_written_as_they_are_and_not_as_they_are_shown() -> None:
    rows = [json.dumps(op_row(op_class("Lora")(scale))) for scale in (0.3, 0.1 + 0.2, math.nextafter(0.3, 1))]
    assert len(set(rows)) == 2  # 0.1 + 0.2 is the one after 0.3
    assert rows[1] == '{"op": "Lora", "scale": 0.30000000000000004}'
    assert op_row(op_class("Lora")(2)) == op_row(op_class("Lora")(2.0))


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"op": None},
        {"op": "Lora"},
        {"op": "Lora", "scale": 1.0, "more": 1},
        {"op": "Lora", "scale": "much"},
        {"op": "Op"},
        {"op": "lora", "scale": 1.0},
        {"op": "__class__"},
        {"op": "Cast", "source": "F32", "target": "F33"},
    ],
)
def test_what_is_no_op_is_refused(row: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"op|type|convert"):
        op_of(row)


# ---- each parameter is part of the id


def others(value: object, kind: str) -> list[object]:
    """Returns values that differ from one as little as can be."""
    if isinstance(value, bool):
        return [not value]
    if kind == "float" and isinstance(value, (int, float)):
        return [math.nextafter(value, math.inf), -value, value + 1]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, str):
        return [one for one in INIT if one != value] if kind == "RowInit" else [value + "x"]
    if isinstance(value, tuple):
        inner = "float" if "float" in kind else "int"
        changed = [(*value[:i], one, *value[i + 1 :]) for i in range(len(value)) for one in others(value[i], inner)]
        return [*changed, (*value, 1), value[1:] if value else (2, 2)]
    return [row for row in DTYPES.values() if row != value]


ARITHMETIC = [name for name in _HOMES if issubclass(op_class(name), Arithmetic)]


def example(name: str, folder: Path) -> tuple[Op, tuple[TensorEntry, ...]]:
    """Returns an op as the table of laws has it, and its inputs."""
    store, rng = Store(folder), np.random.default_rng(0)
    for kind, cases in CASES.items():
        case = cases(4)[0]
        op = build(OPS[kind], case.params)
        if type(op).__name__ == name:
            types = [DTYPES[one] for one in case.dtypes] or [DTYPES["F32"]] * len(case.shapes)
            arrays = [rng.standard_normal(s).astype(numpy_dtype(d)) for s, d in zip(case.shapes, types, strict=True)]
            return op, tuple(store.put(array) for array in arrays)
    array = rng.standard_normal((4, 4)).astype(np.float32)
    made, count = {
        "Widen": ((DTYPES["F32"], DTYPES["F64"]), 1),
        "DoraOnto": ((0.5,), 4),
        "LoHa": ((0.5,), 5),
        "LoKr": ((0.5,), 3),
        "ScaleBy": ((), 2),
        "Residual": (("pissa", 2, 0.5), 1),
    }[name]
    return op_class(name)(*made), tuple(store.put(array) for _ in range(count))


def entry(op: Op, bases: tuple[TensorEntry, ...]) -> TensorEntry:
    return TensorEntry("", DTYPES["F32"], (4, 4), (Piece(0, 16, Made(bases, op)),))


@pytest.mark.parametrize("name", ARITHMETIC)
def test_a_parameter_changes_the_id(name: str, tmp_path: Path) -> None:
    """By as little as can be; and so does another input, or their order."""
    op, bases = example(name, tmp_path)
    marks = Marks(str)
    ops = [op]
    for field in fields(op):
        ops += [replace(op, **{field.name: one}) for one in others(getattr(op, field.name), str(field.type))]
    distinct = {repr(one) for one in ops}
    inputs = {bases, bases[1:], bases[::-1], tuple(Store(tmp_path).put(np.ones((4, 4), np.float32)) for _ in bases)}
    found = {marks.of(entry(one, bases)) for one in ops} | {marks.of(entry(op, one)) for one in inputs if one}
    assert len(found) == len(distinct) + len({one for one in inputs if one} - {bases})


def test_the_class_of_an_op_changes_the_id(tmp_path: Path) -> None:
    array = np.ones((4, 4), np.float32)
    bases = tuple(Store(tmp_path).put(array) for _ in range(4))
    ops = [op_class(name)(0.5) for name in ("Dora", "DoraOnto", "Lora", "Slerp")]
    assert len({Marks(str).of(entry(one, bases)) for one in ops}) == len(ops)
    names = ("Cast", "Widen")  # which do the same
    casts = [op_class(name)(DTYPES["BF16"], DTYPES["F32"]) for name in names]
    assert len({Marks(str).of(entry(one, bases[:1])) for one in casts}) == 1
