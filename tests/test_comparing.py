"""Comparisons: what torch and numpy say of the same files, for every type, with NaN, infinities and signed zeros."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.publish.closeness import Closeness, Distance
from tests.conftest import GOLDEN, shardmerge
from tests.terminal import in_terminal, plain

DOCS = Path(__file__).parent.parent / "docs"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
WIDE = (torch.uint64, torch.uint32, torch.uint16)
# Values that meet their own kind, and others; those that no type holds are what torch makes of them.
ODD = [0.0, -0.0, 1.0, -1.0, 1.001, 1.01, 3e-5, 448.0, float("nan"), float("inf"), float("-inf"), 2.0**-126, 250.0]
TOLERANCES = [(0.0, 0.0), (1e-3, 0.0), (0.0, 1e-3), (1e-2, 1e-1), (0.0, 2.0)]


def by_torch(a: torch.Tensor, b: torch.Tensor, rtol: float, atol: float) -> torch.Tensor:
    """Returns where two tensors are close; both in float64, where torch's own arithmetic rounds nothing away."""
    return torch.isclose(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)


def differing(tmp_path: Path, a: torch.Tensor, b: torch.Tensor, how: sm.Closeness) -> sm.Comparison:
    for name, tensor in (("a", a), ("b", b)):
        save_file({"w": tensor}, tmp_path / f"{name}.safetensors")
    return sm.diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", how=how)


@pytest.mark.parametrize(("rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_are_close_where_torch_says_so(tmp_path: Path, dtype: torch.dtype, rtol: float, atol: float) -> None:
    pairs = torch.tensor(list(product(ODD, ODD)), dtype=torch.float64).to(dtype)
    a, b = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    close = by_torch(a, b, rtol, atol)
    (one,) = differing(tmp_path, a, b, sm.Closeness(rtol=rtol, atol=atol))
    assert one.distance is not None
    assert one.distance.beyond == int((~close).sum())
    assert one.distance.elements == len(a)
    gap = (a.double() - b.double()).abs()
    finite = gap.isfinite()
    assert one.distance.max_abs == float(gap[finite].max())
    nonzero = finite & (b.double() != 0)
    assert one.distance.max_rel == float((gap / b.double().abs())[nonzero].max())
    assert one.distance.nonfinite == int((~finite & ~by_torch(a, b, 0, 0)).sum())


@pytest.mark.parametrize(("rtol", "atol"), TOLERANCES)
@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_integers_and_booleans_are_close_where_torch_says_so(
    tmp_path: Path, dtype: torch.dtype, rtol: float, atol: float
) -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(0, 2 if dtype is torch.bool else 120, (2000,)).to(dtype) for _ in range(2))
    found = differing(tmp_path, a, b, sm.Closeness(rtol=rtol, atol=atol))
    beyond = int((~by_torch(a, b, rtol, atol)).sum())
    assert sum(one.distance.beyond for one in found if one.distance) == beyond
    assert (len(found), found.close) == ((1, 0) if beyond else (0, 1))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_the_rest_of_the_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    a = torch.tensor([0, 5, 60_000], dtype=torch.int64).to(dtype)
    b = torch.tensor([1, 5, 50_000], dtype=torch.int64).to(dtype)
    (one,) = differing(tmp_path, a, b, sm.Closeness())
    assert one.distance is not None
    assert (one.distance.beyond, one.distance.max_abs) == (2, 10_000.0)


def test_integers_of_64_bits_are_compared_exactly(tmp_path: Path) -> None:
    a, b = torch.tensor([2**62 + 1, -(2**63)]), torch.tensor([2**62, 2**63 - 1])
    (one,) = differing(tmp_path, a, b, sm.Closeness())
    assert one.distance is not None
    assert (one.distance.beyond, one.distance.max_abs) == (2, 2.0**64)
    assert torch.isclose(a.double(), b.double())[0]  # what float64 would have said of the first


def test_complex_numbers(tmp_path: Path) -> None:
    a, b = torch.tensor([1 + 1j, 2 + 0j]), torch.tensor([1 + 1j, 2 + 3j])
    (one,) = differing(tmp_path, a, b, sm.Closeness())
    assert one.distance is not None
    assert (one.distance.beyond, one.distance.max_abs) == (1, 3.0)
    assert not differing(tmp_path, a, b, sm.Closeness(atol=3.0))


NUMBERS = st.lists(st.tuples(*[st.floats(width=32) | st.sampled_from(ODD)] * 2), min_size=1, max_size=40)


@given(NUMBERS, st.floats(0, 2), st.floats(0, 2))
def test_any_floats_are_close_where_numpy_says_so(pairs: list[tuple[float, float]], rtol: float, atol: float) -> None:
    a, b = np.array(pairs, np.float32).T.copy()
    with np.errstate(all="ignore"):
        close = np.isclose(a.astype(np.float64), b.astype(np.float64), rtol, atol, equal_nan=True)
    for cut in (len(a), 7):
        found = Distance()
        for start in range(0, len(a), cut):
            found.add(a[start : start + cut], b[start : start + cut], Closeness(rtol, atol))
        assert found.beyond == np.count_nonzero(~close)


@pytest.mark.parametrize("narrow", FLOATS[2:], ids=str)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["a-wide", "b-wide"])
def test_a_copy_that_torch_cast_is_equal_after_that_cast(
    tmp_path: Path, narrow: torch.dtype, order: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    wide = torch.cat([torch.randn(3000), torch.tensor(ODD)])
    both = (wide, wide.to(narrow))
    found = differing(tmp_path, both[order[0]], both[order[1]], sm.Closeness())
    (one,) = found
    assert (one.what, DTYPES[one.after_cast].torch) == ("dtype", str(narrow).removeprefix("torch."))
    assert found.summary == "1 equal after a cast"
    assert not differing(tmp_path, both[order[0]], both[order[1]], sm.Closeness(cast=one.after_cast))
    other = both[1].clone()
    other[5] = 3.0
    both = (wide, other)
    assert [one.what for one in differing(tmp_path, both[order[0]], both[order[1]], sm.Closeness())] == [
        "dtype",
        "values",
    ]


def test_half_and_bfloat16_have_no_type_in_common_unless_it_is_asked_for(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 2.5])
    (one,) = differing(tmp_path, a.half(), a.bfloat16(), sm.Closeness())
    assert one.detail == "F16 and BF16, equal after a cast to BF16"
    (one,) = differing(tmp_path, a.to(torch.int32), torch.tensor([1, 2]), sm.Closeness())
    assert one.detail == "I32 and I64, equal values"
    assert not differing(tmp_path, a.half(), a.bfloat16(), sm.Closeness(cast="float32"))
    assert [one.what for one in differing(tmp_path, a.to(torch.int32), torch.tensor([1, 2]), sm.Closeness(cast="bf16"))]


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two models that differ in every way."""
    torch.manual_seed(2)
    a = {f"layers.{i}.w": torch.randn(64, 8) for i in range(5)} | {"same": torch.arange(3), "old": torch.ones(1)}
    b = {name: tensor.clone() for name, tensor in a.items() if name != "old"} | {"new": torch.ones(1)}
    b["layers.0.w"][3, 3] += 0.5
    b["layers.1.w"][:, 0] += 2.0
    b["layers.2.w"][0, 0] = float("nan")
    b["layers.3.w"] = b["layers.3.w"].bfloat16()
    b["layers.4.w"] = torch.ones(8, 64)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_the_worst_first_and_a_summary(two: tuple[Path, Path]) -> None:
    lines = shardmerge("diff", *two, code=3).stdout.splitlines()
    assert lines == [
        "old: only in A: F32 [1]",
        "new: only in B: F32 [1]",
        "layers.4.w: shape: [64, 8] and [8, 64]",
        "layers.2.w: values: 1 of 512 elements (0.195 %), 1 of them NaN or infinite on one side",
        lines[4],
        lines[5],
        "layers.3.w: dtype: F32 and BF16, equal after a cast to BF16",
        "1 equal, 1 equal after a cast, 4 differ, 1 only in A, 1 only in B",
    ]
    assert lines[4].startswith("layers.1.w: values: 64 of 512 elements (12.5 %), by at most 2 (relative ")
    assert lines[5].startswith("layers.0.w: values: 1 of 512 elements (0.195 %), by at most 0.5 (relative ")
    few = shardmerge("diff", *two, "--limit", "2", code=3).stdout.splitlines()
    assert few == [*lines[:2], "... and 5 more; --all shows them", lines[-1]]
    assert shardmerge("diff", *two, "--all", code=3).stdout.splitlines() == lines


def test_json_keeps_its_fields_and_has_the_numbers(two: tuple[Path, Path]) -> None:
    found = json.loads(shardmerge("diff", *two, "--json", code=3).stdout)
    assert found["equal"] is False
    assert found["counts"] == {
        "equal": 1, "within_tolerance": 0, "equal_after_a_cast": 1, "differ": 4, "only_in_a": 1, "only_in_b": 1
    }  # fmt: skip
    rows = {row["name"]: row for row in found["differences"]}
    assert all({"name", "what", "detail"} <= set(row) for row in rows.values())
    assert rows["layers.1.w"]["max_abs"] == pytest.approx(2.0)
    assert (rows["layers.1.w"]["beyond"], rows["layers.1.w"]["elements"]) == (64, 512)
    assert rows["layers.3.w"]["after_cast"] == "BF16"


def test_only_headers_read_no_data(two: tuple[Path, Path], tmp_path: Path) -> None:
    found = sm.diff(*two, how=sm.Closeness(headers=True))
    assert [(one.name, one.what) for one in found] == [
        ("old", "only in A"), ("new", "only in B"), ("layers.4.w", "shape"), ("layers.3.w", "dtype")
    ]  # fmt: skip
    assert found.equal == 4
    seen: list[int] = []
    sm.diff(*two, seen.append, how=sm.Closeness(headers=True))
    assert seen == []


def test_a_mapping_is_compared_and_never_written(tmp_path: Path) -> None:
    case = GOLDEN / "zero" / "llama_z3_w2_bf16" / "ckpt"
    text = f"shardmerge: 1\nsources: {{s: {case}}}\noutput: {{path: out, dtype: bfloat16}}\n"
    text += "tensors: {'m.{rest...}': 's:{rest...}'}\n"
    (tmp_path / "mapping.yaml").write_text(text)
    made = sm.run(tmp_path / "mapping.yaml", tmp_path / "made").path
    before = sorted(tmp_path.rglob("*"))
    assert shardmerge("diff", made, tmp_path / "mapping.yaml").stdout == "21 equal\n"
    assert shardmerge("diff", tmp_path / "mapping.yaml", made).stdout == "21 equal\n"
    assert "ok  equal to" in shardmerge("verify", made, "--reference", tmp_path / "mapping.yaml").stdout
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mapping.yaml").write_text(text.replace("bfloat16", "float32"))
    assert "21 equal after a cast" in shardmerge("diff", made, tmp_path / "mapping.yaml", code=3).stdout
    assert shardmerge("diff", made, tmp_path / "mapping.yaml", "--cast", "bfloat16").stdout == "21 equal\n"


def test_verify_has_the_same_measure_and_its_hint_lists_all(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = {f"w{i}": torch.randn(10) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    save_file({name: one + 1e-4 for name, one in tensors.items()}, tmp_path / "near.safetensors")
    sm.convert(tmp_path / "model.safetensors", tmp_path / "out")
    verify = ("verify", tmp_path / "out", "--reference", tmp_path / "near.safetensors")
    done = shardmerge(*verify, "--rtol", "1e-9", code=3)
    assert "8 differ" in done.stderr
    command = done.stderr.split("`")[1].split()
    assert command[:2] == ["shardmerge", "diff"]
    assert len(shardmerge(*command[1:], code=3).stdout.splitlines()) == 9
    within = shardmerge(*verify, "--atol", "1e-3").stdout
    assert "near.safetensors, within rtol 0 and atol 0.001 (8 within tolerance)\n" in within
    assert "in names, types and shapes" in shardmerge(*verify, "--headers").stdout
    assert "[no-effect]" in shardmerge("verify", tmp_path / "out", "--atol", "1", code=2).stderr


@pytest.mark.parametrize(
    ("code", "options"),
    [
        ("bad-tolerance", ("--rtol", "-1")), ("bad-tolerance", ("--atol", "nan")), ("bad-tolerance", ("--atol", "inf")),
        ("unknown-dtype", ("--cast", "int8")), ("no-effect", ("--headers", "--rtol", "1")),
        ("no-effect", ("--headers", "--cast", "bf16")), ("no-effect", ("--all", "--limit", "3")),
        ("no-effect", ("--json", "--all")),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(two: tuple[Path, Path], code: str, options: tuple[str, ...]) -> None:
    assert f"[{code}]" in shardmerge("diff", *two, *options, code=2).stderr
    if options[0] == "--headers":  # as the hint says: one or the other
        shardmerge("diff", *two, options[0], code=3)
        shardmerge("diff", *two, *options[1:], code=3)


# Runs the command line, and then says the most memory that the process ever had, in KiB.
DRIVER = """
import sys
from shardmerge.cli.main import main
try:
    main()
except SystemExit:
    print(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1])
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """Two tensors of 256 MiB in all that differ everywhere, in less than half of that with the interpreter."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_file({"w": torch.full((1 << 25,), value)}, tmp_path / f"{name}.safetensors")
    both = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    done = subprocess.run([sys.executable, "-c", DRIVER, "diff", *both], capture_output=True, text=True, check=True)
    first, _, peak = done.stdout.splitlines()
    assert first == "w: values: 33,554,432 of 33,554,432 elements (100 %), by at most 1 (relative 0.5)"
    assert int(peak) < 112 << 10


def test_the_pages_show_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    a = {f"t{i}": torch.ones(4) for i in range(27)} | {"lm_head.weight": torch.randn(9)}
    a |= {f"model.layers.{i}.mlp.up_proj.weight": torch.full((77, 48), value) for i, value in ((0, 0.0015), (1, 0.516))}
    b = {name: one.clone() for name, one in a.items()}
    a["model.norm.bias"] = torch.ones(48)
    b["lm_head.weight"] = b["lm_head.weight"].bfloat16()
    b["model.layers.0.mlp.up_proj.weight"][0] += 0.001
    b["model.layers.1.mlp.up_proj.weight"][0, :12] -= 0.5
    for name, tensors in (("out", a), ("reference", b)):
        (tmp_path / name / "model").mkdir(parents=True)
        save_file(tensors, tmp_path / name / "model" / "model.safetensors")
    command = "shardmerge diff out/model reference/model"
    printed = shardmerge(*command.split()[1:], code=3, env={**os.environ, "PYTHONPATH": str(DOCS.parent)}).stdout
    assert f"$ {command}\n{printed}```" in (DOCS / "reference" / "commands.md").read_text("utf-8")


def test_a_terminal_breaks_lines_at_blanks(tmp_path: Path) -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    for side, values in (("a", torch.ones(40)), ("b", torch.full((40,), 1.0625).double())):
        save_file({name: values}, tmp_path / f"{side}.safetensors")
    shown = plain(in_terminal("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", code=3)).splitlines()
    said = " ".join(" ".join(shown).split())
    assert f"{name}: values: 40 of 40 elements (100 %), by at most 0.0625 (relative 0.059)" in said
    assert all(len(line) <= 80 for line in shown)
