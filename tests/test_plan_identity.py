"""Two plans have one id exactly when their results have the same bytes, as far as nobody needs to compute to tell.

Results are made and compared, file by file; the receipt, which names the sources, is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.dtypes import DTYPES
from shardmerge.plan.value import Plan
from shardmerge.tensors import Extent, FileStamp, SideFile
from tests.small_plans import TIME, Store, contents, planned, result

Bytes = dict[str, bytes]


def numbers(*shape: int, first: float = 0) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + first).reshape(shape)


TENSORS = {
    "w": numbers(8, 6), "v": numbers(8, 6, first=-20), "half": numbers(8, 6, first=0.5).half(), "up": numbers(4, 8),
    "down": numbers(2, 6, first=1), "rank": numbers(8, 2, first=1), "norm": numbers(8, first=3), "one": numbers(1),
    "codes": numbers(8, 6, first=-24).to(torch.float8_e4m3fn), "scale": numbers(2, 2, first=1), "ids": torch.arange(6),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models of equal headers, sizes and times, and other numbers; and a torch file."""
    for name, first in (("a", 0), ("b", 1)):
        (tmp_path / name).mkdir()
        tensors = {key: (one.float() + first).to(one.dtype).contiguous() for key, one in TENSORS.items()}
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        for file, text in (("config.json", '{"model_type": "none"}'), ("README.md", "# none"), ("notes.txt", "none")):
            (tmp_path / name / file).write_text(text)
    torch.save({"turned": numbers(6, 8).T, "x": numbers(3)}, tmp_path / "c.pt")
    for path in tmp_path.rglob("*"):
        os.utime(path, ns=(TIME, TIME))
    return tmp_path


def mapping(
    folder: Path, rules: str, output: str = "", sources: str = "{a: a, b: b, c: c.pt}", name: str = "m"
) -> Path:
    """Writes a mapping of which the rules make ``x``; what it does not use is dropped by name."""
    path = folder / f"{name}.yaml"
    used = set(re.findall(r"\b([abc]:[\w.]+)", rules))
    held = {f"{source}:{key}" for source in "ab" for key in TENSORS} | {"c:turned", "c:x"}
    named = {one for one in held if re.search(rf"\b{one[0]}: ", sources)}
    drop = "".join(f'  - "{one}"\n' for one in sorted(named - used))
    tensors = rules if rules.startswith("x") else f"x: {rules}"
    path.write_text(
        f"shardmerge: 1\nsources: {sources}\noutput: {{path: out{', ' if output else ''}{output}}}\n"
        f"tensors:\n  {tensors}\n" + (f"drop:\n{drop}" if drop else ""),
        "utf-8",
    )
    return path


def made(folder: Path, path: Path, **options: object) -> tuple[str, Bytes]:
    """Returns the id of a mapping's plan, and the bytes of what it makes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    done = sm.run(path, options=sm.Options(sync=False, **options))
    return done.plan.id, contents(done.path, "shardmerge.json")


def one_id(results: Iterable[tuple[str, Bytes]]) -> bool:
    """Tells whether all have one id; it is an error if bytes and ids say different things."""
    ids, files = zip(*results, strict=True)
    equal = [one == files[0] for one in files]
    assert [one == ids[0] for one in ids] == equal
    return all(equal)


# ---- the same moves in other words

SAME = {
    "all of it": [
        "a:w",
        '{op: slice, of: "a:w", dim: 0, start: 0, stop: 8}',
        '{op: slice, of: "a:w", dim: -1, start: -6}',
        '{op: concat, dim: 0, of: ["a:w"]}',
        '{op: transpose, of: {op: transpose, of: "a:w"}}',
        '{op: permute, dims: [1, 0], of: {op: transpose, of: "a:w"}}',
        '{op: permute, dims: [0, 1], of: "a:w"}',
        '{op: reshape, shape: [8, 6], of: {op: reshape, shape: [3, -1], of: "a:w"}}',
        '{op: squeeze, dim: 0, of: {op: unsqueeze, dim: 0, of: "a:w"}}',
        '{op: squeeze, dim: 1, of: {op: stack, dim: 1, of: ["a:w"]}}',
        '{op: concat, dim: 0, of: [{op: chunk, of: "a:w", chunks: 2, take: 0}, '
        '{op: split, of: "a:w", sizes: [4, 4], take: 1}]}',
        '{op: concat, dim: 1, of: [{op: slice, of: "a:w", dim: 1, stop: 1}, {op: slice, of: "a:w", dim: 1, start: 1}]}',
        '{op: concat, dim: 1, of: [{op: concat, dim: 1, of: [{op: slice, of: "a:w", dim: 1, stop: 1}, '
        '{op: slice, of: "a:w", dim: 1, start: 1, stop: 3}]}, {op: slice, of: "a:w", dim: 1, start: 3}]}',
        '{op: rotary_unpermute, heads: 2, of: {op: rotary_permute, heads: 2, of: "a:w"}}',
        '{op: transpose, of: {op: concat, dim: 1, of: [{op: transpose, of: {op: slice, of: "a:w", stop: 3}}, '
        '{op: transpose, of: {op: slice, of: "a:w", start: 3}}]}}',
        '{op: grouped_merge, groups: 2, sizes: [2, 2], of: [{op: grouped_split, of: "a:w", groups: 2, sizes: [2, 2], '
        'take: 0}, {op: grouped_split, of: "a:w", groups: 2, sizes: [2, 2], take: 1}]}',
    ],
    "a part of it": [
        '{op: slice, of: "a:w", dim: 0, start: 2, stop: 4}',
        '{op: split, of: "a:w", sizes: [2, 2, 4], take: 1}',
        '{op: chunk, of: "a:w", chunks: 4, take: 1}',
        '{op: chunk, chunks: 2, take: 1, of: {op: chunk, of: "a:w", chunks: 2, take: 0}}',
        '{op: slice, stop: 2, of: {op: slice, of: "a:w", start: 2, stop: 7}}',
        '{op: slice, start: 2, stop: 4, of: {op: concat, of: [{op: slice, of: "a:w", stop: 3}, '
        '{op: slice, of: "a:w", start: 3}]}}',
    ],
    "turned": [
        '{op: transpose, of: "a:w"}',
        '{op: permute, of: "a:w", dims: [1, 0]}',
        '{op: transpose, of: "a:w", dim0: 0, dim1: 1}',
        '{op: concat, dim: 1, of: [{op: transpose, of: {op: slice, of: "a:w", stop: 3}}, '
        '{op: transpose, of: {op: slice, of: "a:w", start: 3}}]}',
        '{op: stack, dim: 1, of: [' + ", ".join(
            f'{{op: reshape, shape: [6], of: {{op: slice, of: "a:w", start: {i}, stop: {i + 1}}}}}' for i in range(8)
        ) + "]}",
    ],
    "as a torch file has it": [
        "c:turned",
        '{op: transpose, of: {op: transpose, of: "c:turned"}}',
        '{op: concat, dim: 0, of: [{op: chunk, of: "c:turned", chunks: 2, take: 0}, '
        '{op: chunk, of: "c:turned", chunks: 2, take: 1}]}',
    ],
    "cast": [
        '{op: cast, of: {op: transpose, of: "a:w"}, dtype: float16}',
        '{op: transpose, of: {op: cast, of: "a:w", dtype: float16}}',
        '{op: concat, dim: 1, of: '
        '[{op: cast, of: {op: transpose, of: {op: slice, of: "a:w", stop: 3}}, dtype: float16}, '
        '{op: transpose, of: {op: slice, start: 3, of: {op: cast, of: "a:w", dtype: float16}}}]}',
    ],
    "beside another type": [
        '{op: concat, dim: 0, of: ["a:w", "a:half"]}',
        '{op: concat, dim: 0, of: ["a:w", {op: cast, of: "a:half", dtype: float32}]}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("about", SAME)
def test_the_same_moves_in_other_words_are_one_plan(about: str, folder: Path) -> None:
    found = [made(folder, mapping(folder, rule)) for rule in SAME[about]]
    assert one_id(found)


# ---- one parameter

LORA = '{{op: lora, a: "a:down", b: "a:rank", of: "a:w", scale: {}}}'
DARE = '{{op: dare, base: "a:w", of: ["b:w", "a:v"], density: {}, seed: {}, sign_consensus: {}}}'
DEQUANTIZE = '{{op: dequantize, of: ["a:codes", "a:scale"], block: {}}}'

# Each rule differs from the first in one thing.
DIFFERENT = {
    "sources": ["a:w", "b:w", "a:v", "c:turned"],
    "moves": [
        '{op: slice, of: "a:w", start: 2, stop: 4}', '{op: slice, of: "a:w", start: 2, stop: 5}',
        '{op: slice, of: "a:w", start: 3, stop: 5}', '{op: slice, of: "a:w", dim: 1, start: 2, stop: 4}',
        '{op: chunk, of: "a:w", chunks: 2, take: 0}', '{op: chunk, of: "a:w", chunks: 2, take: 1}',
        '{op: transpose, of: "a:w"}', '{op: reshape, of: "a:w", shape: [6, 8]}',
        '{op: rotary_permute, heads: 2, of: "a:w"}', '{op: rotary_permute, heads: 1, of: "a:w"}',
        '{op: rotary_unpermute, heads: 1, of: "a:w"}', '{op: stack, of: ["a:w", "a:v"]}',
        '{op: stack, of: ["a:v", "a:w"]}', '{op: stack, dim: 2, of: ["a:w", "a:v"]}',
        '{op: concat, dim: 0, of: ["a:w", "a:v"]}', '{op: concat, dim: 1, of: ["a:w", "a:v"]}',
    ],
    "casts": [
        f'{{op: cast, of: "a:w", dtype: {dtype}}}' for dtype in ("float16", "bfloat16", "float64", "float8_e4m3fn")
    ],
    "scales": [f'{{op: scale, of: "a:w", factor: {factor}}}' for factor in (0.5, -0.5, 0.25, 3)],
    "lora": [LORA.format(scale) for scale in (0.3, 0.25, -0.3)],
    "linear": [
        f'{{op: linear, of: ["a:w", "{other}"], weights: {weights}}}'
        for other, weights in (("a:v", [0.25, 0.5]), ("a:v", [0.5, 0.25]), ("b:w", [0.25, 0.5]), ("a:v", [0.25, 0.75]))
    ],
    "dare": [DARE.format(*one) for one in ((0.5, 1, "false"), (0.5, 2, "false"), (0.25, 1, "false"), (0.5, 1, "true"))],
    "ties": [
        f'{{op: ties, base: "a:w", of: ["b:w", "a:v"], density: {density}, scale: {scale}}}'
        for density, scale in ((0.5, 1), (0.2, 1), (0.5, 2))
    ],
    "slerp": [f'{{op: slerp, of: ["a:w", "a:v"], t: {t}}}' for t in (0.25, 0.5)],
    "new rows": [
        f'{{op: new_rows, of: "a:w", rows: {rows}, new: {how}, row: {row}, seed: {seed}}}'.replace(drop, "")
        for rows, how, row, seed, drop in (
            (4, "copy", 1, 0, ", seed: 0"), (4, "copy", 2, 0, ", seed: 0"), (5, "copy", 1, 0, ", seed: 0"),
            (4, "mean", 1, 0, ", row: 1, seed: 0"), (4, "zeros", 1, 0, ", row: 1, seed: 0"),
            (4, "normal", 1, 0, ", row: 1"), (4, "normal", 1, 1, ", row: 1"),
        )
    ],
    "fill": [
        f"{{op: fill, shape: {shape}, value: {value}, dtype: {dtype}}}"
        for shape, value, dtype in (
            ([2, 3], 0.3, "float32"), ([3, 2], 0.3, "float32"), ([2, 3], 0.3001, "float32"),
            ([2, 3], 0.3, "bfloat16"), ([2, 3], 0.0, "float32"), ([2, 3], "-0.0", "float32"),
        )
    ],
    "arange": ["{op: arange, shape: [6]}", "{op: arange, shape: [7]}", "{op: arange, shape: [1, 6]}"],
    "dequantize": [DEQUANTIZE.format(block) for block in ("[4, 3]", "[4, 4]", "[7, 3]")],
    "corner": [
        '{op: add_top_left, base: "a:down", of: "a:w"}', '{op: add_top_left, base: "b:down", of: "a:w"}',
        '{op: add, of: ["a:w", "a:v"]}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("about", DIFFERENT)
def test_one_parameter_makes_another_plan(about: str, folder: Path) -> None:
    found = [made(folder, mapping(folder, rule)) for rule in DIFFERENT[about]]
    assert len({name for name, _ in found}) == len(found)
    for place, (_, files) in enumerate(found):
        assert all(files != other for _, other in found[:place]), DIFFERENT[about][place]


# Computed in other words, or by numbers that differ in a bit that the result does not show: two ids for the same bytes.
AS_WRITTEN = {
    "a last bit": [LORA.format("0.3"), LORA.format("0.30000000000000004")],
    "other words": ['{op: scale, of: "a:w", factor: 2}', '{op: add, of: ["a:w", "a:w"]}'],
    "an order": ['{op: add, of: ["a:w", "a:v"]}', '{op: add, of: ["a:v", "a:w"]}'],
    "a comparison": ["a:w", '{op: assert_equal, of: ["a:w", "a:w"]}'],
    "a move around it": [
        '{op: scale, factor: 2, of: {op: transpose, of: "a:w"}}',
        '{op: transpose, of: {op: scale, factor: 2, of: "a:w"}}',
    ],
    "a cast there and back": ["a:w", '{op: cast, dtype: float32, of: {op: cast, of: "a:w", dtype: float16}}'],
}  # fmt: skip


@pytest.mark.parametrize("about", AS_WRITTEN)
def test_what_is_computed_is_compared_as_it_is_written(about: str, folder: Path) -> None:
    """The exception that ``plan.identity`` states."""
    (first, before), (second, after) = (made(folder, mapping(folder, rule)) for rule in AS_WRITTEN[about])
    assert before == after
    assert first != second


def test_equal_ids_are_equal_bytes_among_all_of_these(folder: Path) -> None:
    """Over one set of sources, two of which nobody can tell apart without reading their data."""
    rules = [rule for table in (SAME, DIFFERENT, AS_WRITTEN) for some in table.values() for rule in some]
    files = defaultdict(set)
    for rule in dict.fromkeys(rules):
        name, found = made(folder, mapping(folder, rule))
        files[name].add(tuple(sorted(found.items())))
    assert len(files) > 50
    assert all(len(found) == 1 for found in files.values())


# ---- the output

OUTPUTS = {
    "types": ["", "dtype: float16", "dtype: bfloat16"],
    "some types": ["dtype: float16", "dtype: float16, keep: [x.v]", "dtype: float16, dtypes: {x.v: bfloat16}"],
    "sizes": ["shard_size: 1MB", "shard_size: 300"],
    "formats": ["", "format: bin", "format: dcp", "format: dcp, root: app.model", 'format: dcp, root: ""'],
    "side files": ["files: all", "files: {include: [notes.txt], exclude: [README.md]}"],
}


@pytest.mark.parametrize("about", OUTPUTS)
def test_what_is_said_of_the_output_makes_another_plan(about: str, folder: Path) -> None:
    rules = 'x.w: "a:w"\n  x.v: "a:v"\n  x.half: "a:half"'
    head = "target: {name: hf/model, text: a}\n"
    found = []
    for output in OUTPUTS[about]:
        path = mapping(folder, rules, output)
        path.write_text(head + path.read_text("utf-8"), "utf-8")
        found.append(made(folder, path, partial=True))
    assert len({name for name, _ in found}) == len(found)
    assert all(before != after for (_, before), (_, after) in pairwise(found))


def test_a_side_file_is_its_bytes_wherever_they_come_from(folder: Path) -> None:
    entry = Store(folder).put(np.ones((4, 4), np.float32))
    data = b'{"model_type": "none"}'
    path = folder / "a" / "config.json"
    stamp = FileStamp.of(str(path), path.stat())
    digest = hashlib.sha256(data).hexdigest()
    whole = Extent(str(path), 0, len(data))

    def plan(*parts: bytes | Extent) -> Plan:
        copies = {part: digest for part in parts if isinstance(part, Extent)}
        made = planned({"x": entry}, (SideFile("config.json", parts),))
        return replace(made, copies=copies, side_sources=(stamp,) if copies else ())

    same = [plan(data), plan(whole), plan(data[:5], data[5:]), plan(b"", data), plan(b"", whole, b"")]
    other = [plan(data[:-1] + b" "), plan(data + b"\n"), plan(data[:-1])]
    results = [(one.id, result(one, folder / f"out{n}")) for n, one in enumerate([*same, *other])]
    assert one_id(results[: len(same)])
    assert len({name for name, _ in results}) == 1 + len(other)
    assert planned({"x": entry}, (SideFile("config2.json", (data,)),)).id not in {name for name, _ in results}


# ---- the files


def test_a_file_is_its_size_header_and_time(folder: Path) -> None:
    path, model = mapping(folder, "a:w"), folder / "a" / "model.safetensors"
    first = sm.plan(path).id
    os.utime(model, ns=(TIME + 1, TIME + 1))
    later = sm.plan(path).id
    os.utime(model, ns=(TIME, TIME))
    assert sm.plan(path).id == first != later
    data = model.read_bytes()
    model.write_bytes(data.replace(b'"format":"pt"', b'"format":"tp"'))  # another header of the same size
    os.utime(model, ns=(TIME, TIME))
    assert sm.plan(path).id not in {first, later}


def test_a_twin_put_in_its_place_is_another_plan_unless_it_keeps_the_time(folder: Path) -> None:
    """Equal size and header: nobody reads the data to tell."""
    path, model = mapping(folder, "a:w", sources="{a: a}"), folder / "a" / "model.safetensors"
    before, files = made(folder, path)
    shutil.copy(folder / "b" / "model.safetensors", model)
    after, others = made(folder, path)
    assert before != after
    assert files != others
    os.utime(model, ns=(TIME, TIME))
    assert sm.plan(path).id == before  # the stated exception: what keeps the time is taken to be the same file


@pytest.mark.parametrize("time", [0, 1_700_000_000 * 10**9])
def test_files_with_times_of_whole_seconds_are_told_apart_by_their_paths(time: int, folder: Path) -> None:
    """As archives and object stores give them to all files of all checkpoints alike."""
    for path in folder.rglob("*"):
        os.utime(path, ns=(time, time))
    found = [made(folder, mapping(folder, "a:w", sources=f"{{a: {name}}}")) for name in "ab"]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_twins_in_one_plan_are_told_apart(folder: Path) -> None:
    """Which of two that look alike, and in which order."""
    sources = "{a: a, b: b}"
    rules = ['{op: concat, of: ["a:w", "b:w"]}', '{op: concat, of: ["b:w", "a:w"]}', '{op: concat, of: ["a:w", "a:w"]}']
    found = [made(folder, mapping(folder, rule, sources=sources)) for rule in [*rules, "a:w", "b:w"]]
    assert len({name for name, _ in found}) == 5


# ---- what does not change a byte


def test_words_and_places_are_no_part_of_the_id(folder: Path) -> None:
    rule = 'x.w: {op: scale, of: "a:w", factor: 0.5}\n  x.v: "a:v"'
    path = mapping(folder, rule, sources="{a: a}")
    first = made(folder, path)
    plan = sm.plan(path)
    text = path.read_text("utf-8")
    renamed = re.sub(r"\ba:", "other:", text).replace("{other: a}", "{other: ./a/../a}")
    variants = {
        "comments": "# a comment\n\n" + text.replace("tensors:", "tensors:  # here\n\n"),
        "another name of the source": renamed,
        "an absolute path": text.replace("{a: a}", f"{{a: {folder / 'a'}}}"),
        "the file itself": text.replace("{a: a}", "{a: a/model.safetensors}"),
        "other quotes": text.replace('"a:v"', "'a:v'"),
        "rules in another order": text.replace(rule, "\n  ".join(rule.split("\n  ")[::-1])),
        "a pattern": text.replace('x.v: "a:v"', '"x.{n:v|none}": "a:{n:v|none}"'),
    }
    for about, variant in variants.items():
        path.write_text(variant, "utf-8")
        assert variant != text, about
        assert made(folder, path) == first, about
    moved = shutil.copytree(folder / "a", folder / "elsewhere" / "model")  # keeps the times
    path.write_text(text.replace("{a: a}", "{a: elsewhere/model}"), "utf-8")
    assert made(folder, path) == first
    assert moved.is_dir()
    assert plan.id == first[0]
    assert replace(plan, warnings=("w",), unused=(), left_behind=(), checks=("c",), target="t").id == first[0]


@pytest.mark.parametrize(
    "options",
    [
        {"workers": 1},
        {"workers": 2},
        {"memory": 64 << 20},
        {"io": "mmap"},
        {"io": "pread"},
        {"sync": True},
        {"recheck": True},
    ],
)
def test_how_it_is_carried_out_is_no_part_of_the_id(options: dict[str, object], folder: Path) -> None:
    path = mapping(folder, 'x.w: {op: cast, of: {op: transpose, of: "a:w"}, dtype: float16}\n  x.v: "a:v"')
    first = made(folder, path)
    shutil.rmtree(folder / "out")
    done = sm.run(path, options=sm.Options(**{"sync": False, **options}))
    assert (done.plan.id, contents(done.path, "shardmerge.json")) == first


def test_the_id_of_a_plan_is_that_of_what_was_read(folder: Path) -> None:
    """And another process finds the same, whatever its hashes begin with."""
    path = mapping(folder, LORA.format(0.3))
    plan = sm.plan(path)
    api.write_plan(api.prepare_mapping(path, sm.Options()), folder / "plan.json")
    read = api.prepare(folder / "plan.json", sm.Options()).plan
    assert read.id == plan.id
    assert replace(read, warnings=("so that it is made anew",)).id == plan.id
    for seed in ("1", "2"):
        done = _plan_json(path, seed)
        assert done == plan.id


def _plan_json(path: Path, seed: str) -> str:
    from tests.conftest import shardmerge

    done = shardmerge("plan", path, "--json", env={**os.environ, "PYTHONHASHSEED": seed})
    return str(json.loads(done.stdout)["id"])


def test_element_types_that_have_one_size_are_told_apart(folder: Path) -> None:
    """The same bytes under another type are another header."""
    store = Store(folder)
    entry = store.put(np.arange(12, dtype=np.float32).reshape(3, 4))
    plans = [planned({"x": replace(entry, dtype=DTYPES[name])}) for name in ("F32", "I32", "U32")]
    plans += [planned({"x": replace(entry, shape=shape)}) for shape in ((4, 3), (12,))]
    plans += [planned({"y": entry}), planned({"x": entry}, form="bin"), planned({"x": entry, "z": entry})]
    results = [(plan.id, result(plan, folder / f"out{n}")) for n, plan in enumerate(plans)]
    assert len({name for name, _ in results}) == len(plans)
    assert len({tuple(sorted(files.items())) for _, files in results}) == len(plans)


@pytest.mark.parametrize("way", Store.WAYS)
def test_every_kind_of_pieces_makes_one_plan_of_a_move(way: str, folder: Path) -> None:
    """Cut and put together again it is itself; and where its bytes begin at another place, it is not."""
    from tests.test_plan_marks import joins, numbered

    entry = Store(folder).put(numbered((4, 6)), way)
    plans = [planned({"x": one}) for one in (entry, *joins(entry)) if one.shape == (4, 6)]
    results = [(plan.id, result(plan, folder / f"out{n}")) for n, plan in enumerate(plans)]
    by_id = defaultdict(list)
    for name, files in results:
        by_id[name].append(files)
    assert all(one == files[0] for files in by_id.values() for one in files)
    assert len(by_id) == len({tuple(sorted(files.items())) for _, files in results}) < len(plans)
