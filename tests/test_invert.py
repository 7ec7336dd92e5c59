"""`shardmerge invert`: real tensors go there and back bit for bit, the inverse of the inverse is the mapping again."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.inverse.inversion import invert_spec
from shardmerge.mapping.dropping import find_dropped
from shardmerge.mapping.preset_files import list_presets, load_preset, with_preset
from shardmerge.mapping.reader import load_spec, parse_spec
from shardmerge.mapping.resolve import resolve
from shardmerge.mapping.variables import Variables
from shardmerge.plan.shard import entry_json
from tests.conftest import shardmerge

# What a mapping may hold: rules, and the shapes of the source tensors they use.
BLOCKS = {
    "rename": ('"ren.{i}.{rest...}": "src:old.{i:int}.{rest...}"', {"old.0.a.b": (2, 3), "old.11.c": (4,)}),
    "choice": ('"ch.{w}.x": "src:choose.{w:up|down}.x"', {"choose.up.x": (2,), "choose.down.x": (2,)}),
    "shift": ('"sh.{i + 16}.x": "src:shift.{i}.x"', {"shift.0.x": (2,), "shift.3.x": (1,)}),
    "braces": ('"br.{{x}}": "src:braces.{{y}}"', {"braces.{y}": (3,)}),
    "transpose": ('tr: {op: transpose, of: "src:transpose"}', {"transpose": (2, 3)}),
    "permute": ('pe: {op: permute, of: "src:permute", dims: [2, 0, 1]}', {"permute": (2, 3, 4)}),
    "reshape": ('re: {op: reshape, of: "src:reshape", shape: [1, 1, -1], was: [n * 3]}', {"reshape": (6,)}),
    "squeeze": ('sq: {op: squeeze, of: "src:squeeze", dim: 1}', {"squeeze": (2, 1, 3)}),
    "unsqueeze": ('un: {op: unsqueeze, of: "src:unsqueeze", dim: 0}', {"unsqueeze": (3,)}),
    "split": (
        "\n  ".join(
            f'"{p}.{{i}}": {{op: split, of: "src:qkv.{{i}}", dim: 0, sizes: [n * 2, n, n], take: {k}}}'
            for k, p in enumerate("qkv")
        ),
        {"qkv.0": (8, 3), "qkv.1": (8, 3)},
    ),
    "chunk": (
        "\n  ".join(
            f'{p}: {{op: chunk, of: "src:gate_up", dim: 1, chunks: 2, take: {k}}}'
            for k, p in enumerate(("up", "gate"))
        ),
        {"gate_up": (3, 4)},
    ),
    "chunk for": (
        '"cf.{r}.x": {op: chunk, of: "src:counted.x", dim: 0, chunks: 4, take: r, for: {r: 4}}',
        {"counted.x": (8, 2)},
    ),
    "concat": (
        'co: {op: concat, of: ["src:c1", "src:c2"], dim: 1, sizes: [1, 3]}',
        {"c1": (2, 1), "c2": (2, 3)},
    ),
    "concat all": (
        '"ca.{i}": {op: concat, of: "src:ranks.{r*}.{i}", dim: 0, chunks: 3}',
        {f"ranks.{r}.{i}": (2, 2) for r in range(3) for i in range(2)},
    ),
    "grouped": (
        "\n  ".join(
            f'g{p}: {{op: grouped_split, of: "src:grouped", groups: n, sizes: [4, 2, 2], take: {k}}}'
            for k, p in enumerate("qkv")
        ),
        {"grouped": (16, 3)},
    ),
    "merged": (
        'gm: {op: grouped_merge, of: ["src:mq", "src:mk", "src:mv"], groups: 2, sizes: [4, 2, 2]}',
        {"mq": (8, 3), "mk": (4, 3), "mv": (4, 3)},
    ),
    "chain": (
        'rq: {op: rotary_permute, heads: 2, of: {op: split, of: "src:chain", dim: 0, sizes: [8, 4, 4], take: 0}}\n'
        '  rk: {op: rotary_permute, heads: 1, of: {op: split, of: "src:chain", dim: 0, sizes: [8, 4, 4], take: 1}}\n'
        '  rv: {op: split, of: "src:chain", dim: 0, sizes: [8, 4, 4], take: 2}',
        {"chain": (16, 3)},
    ),
    "split of a split": (
        's0: {op: split, of: {op: chunk, of: "src:nested", chunks: 2, take: 0}, sizes: [1, 2], take: 0}\n'
        '  s1: {op: split, of: {op: chunk, of: "src:nested", chunks: 2, take: 0}, sizes: [1, 2], take: 1}\n'
        '  s2: {op: chunk, of: "src:nested", chunks: 2, take: 1}',
        {"nested": (6, 2)},
    ),
    "concat of turned": (
        'ct: {op: concat, dim: 0, sizes: [3, 2], of: [{op: transpose, of: "src:t1"}, "src:t2"]}',
        {"t1": (4, 3), "t2": (2, 4)},
    ),
}  # fmt: skip

HEAD = "shardmerge: 1\nsources: {src: model.safetensors}\noutput: {path: there}\nlet: {n: 2}\ntensors:\n  "


def mapping_of(names) -> str:
    rules = "\n  ".join(BLOCKS[name][0] for name in names)
    head = HEAD if re.search(r"\bn\b", rules) else HEAD.replace("let: {n: 2}\n", "")
    return f"{head}{rules}\n"


def tensors_of(names) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn(shape) for block in names for name, shape in BLOCKS[block][1].items()}


def there_and_back(folder: Path, mapping: str, source: str = "") -> dict[str, torch.Tensor]:
    (folder / "there.yaml").write_text(mapping, "utf-8")
    sm.run(folder / "there.yaml")
    (folder / "back.yaml").write_text(api.invert(folder / "there.yaml", source), "utf-8")
    return load_file(sm.run(folder / "back.yaml").path / "model.safetensors")


@pytest.mark.parametrize("block", BLOCKS)
def test_every_tensor_is_back_bit_for_bit(block: str, tmp_path: Path) -> None:
    before = tensors_of([block])
    save_file(before, tmp_path / "model.safetensors")
    after = there_and_back(tmp_path, mapping_of([block]))
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_was_unstacked_is_stacked_again(tmp_path: Path) -> None:
    """And no further: how many tensors `stack` joins is not known."""
    before = {"stacked": torch.randn(2, 3, 4)}
    save_file(before, tmp_path / "model.safetensors")
    rules = "\n  ".join(f'un.{k}: {{op: unstack, of: "src:stacked", dim: 1, count: 3, take: {k}}}' for k in range(3))
    head = "shardmerge: 1\nsources: {src: model.safetensors}\noutput: {path: there}\ntensors:\n  "
    after = there_and_back(tmp_path, f"{head}{rules}\n")
    assert torch.equal(after["stacked"], before["stacked"])
    with pytest.raises(sm.ShardmergeError, match="`unstack` takes a part, and no rule says part 2 of it"):
        api.invert(_written(tmp_path / "two.yaml", head + rules.rpartition("\n")[0] + "\n"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_all_at_once(tmp_path: Path) -> None:
    before = tensors_of(BLOCKS)
    save_file(before, tmp_path / "model.safetensors")
    after = there_and_back(tmp_path, mapping_of(BLOCKS))
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    path = tmp_path_factory.mktemp("all") / "model.safetensors"
    save_file(tensors_of(BLOCKS), path)
    return sm.inspect(path)


def assignments(spec, catalogs):
    variables = Variables(catalogs, lambda extent: b"", spec.variables)
    found = resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, user_file="m", variables=variables)
    return {name: without_source(entry_json(one.entry)) for name, one in found.assignments.items()}


def without_source(node):
    if "of" in node:
        return {"op": node["op"], "of": [without_source(one) for one in node["of"]]}
    return {"tensor": node["tensor"], "shape": node["shape"]}


@given(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, unique=True))
def test_the_inverse_of_the_inverse_is_the_mapping(catalog, names) -> None:
    spec = parse_spec(mapping_of(names), "m.yaml")
    again = parse_spec(invert_spec(parse_spec(invert_spec(spec), "back.yaml")), "again.yaml")
    wanted = {tensor for name in names for tensor in BLOCKS[name][1]}
    part = type(catalog)(catalog.path, catalog.kind, {n: e for n, e in catalog.entries.items() if n in wanted})
    assert assignments(again, {"made": part}) == assignments(spec, {"src": part})


def test_sources_overlaid(tmp_path: Path) -> None:
    """What another source gave goes by name; the first candidate of the source says the name."""
    trained = {"module.a": torch.randn(2), "module.b": torch.randn(3)}
    save_file(trained, tmp_path / "trained.safetensors")
    save_file({"c": torch.randn(4)}, tmp_path / "base.safetensors")
    mapping = (
        "shardmerge: 1\nsources: {t: trained.safetensors, base: base.safetensors}\noutput: {path: there}\ntensors:\n"
        '  "enc.{x}": "base:{x}"\n  "head.{x}": ["t:module.{x}", "base:nothing.{x}"]\n'
    )
    after = there_and_back(tmp_path, mapping)
    assert sorted(after) == sorted(trained)
    assert all(torch.equal(after[name], tensor) for name, tensor in trained.items())
    text = (tmp_path / "back.yaml").read_text("utf-8")
    assert '- "made:enc.{x}"  # comes from base' in text
    with pytest.raises(sm.UsageError, match="there is no source `bsae`"):
        api.invert(tmp_path / "there.yaml", "bsae")


def test_joined_of_two_sources(tmp_path: Path) -> None:
    ours = {"x": torch.randn(2, 3)}
    save_file(ours, tmp_path / "ours.safetensors")
    save_file({"y": torch.randn(1, 3), "z": torch.randn(4, 3)}, tmp_path / "theirs.safetensors")
    mapping = (
        "shardmerge: 1\nsources: {a: ours.safetensors, b: theirs.safetensors}\noutput: {path: there}\ntensors:\n"
        '  xy: {op: concat, of: ["a:x", "b:y"], sizes: [2, 1]}\n'
        '  z0: {op: chunk, of: "b:z", chunks: 2, take: 0}\n  z1: {op: chunk, of: "b:z", chunks: 2, take: 1}\n'
    )
    after = there_and_back(tmp_path, mapping)
    assert list(after) == ["x"]
    assert torch.equal(after["x"], ours["x"])


def test_a_lossy_first_candidate_is_not_passed_over() -> None:
    text = (
        "shardmerge: 1\nsources: {delta: d, base: b}\ntensors:\n"
        '  "{x}": [{op: add_top_left, base: "base:{x}", of: "delta:{x}"}, "delta:{x}"]\n'
    )
    with pytest.raises(sm.ShardmergeError, match="`add_top_left` is lossy") as raised:
        invert_spec(parse_spec(text, "m.yaml"))
    assert raised.value.code == "no-inverse"


@pytest.mark.parametrize("room", ["base.config", "config", "model_config"])
def test_numbers_of_a_config_stay_with_it(tmp_path: Path, room: str) -> None:
    """Whoever has it: a room without a source is that of the first that answers."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model_config.yaml"):
        (tmp_path / "base" / name).write_text('{"hidden": 4}', "utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "base" / "model.safetensors")
    before = {"two": torch.randn(6, 2)}
    save_file(before, tmp_path / "model.safetensors")
    mapping = (
        "shardmerge: 1\nsources: {src: model.safetensors, base: base}\noutput: {path: there}\n"
        f"let: {{h: {room}.hidden, rest: h - 2}}\ntensors:\n"
        '  a: {op: split, of: "src:two", sizes: [h, rest], take: 0}\n'
        '  b: {op: split, of: "src:two", sizes: [h, rest], take: 1}\n  spare: base:x\n'
    )
    after = there_and_back(tmp_path, mapping)
    assert torch.equal(after["two"], before["two"])
    assert list(after) == ["two"]


# --- no way back ---

NONE = {
    "slice": ('a: {op: slice, of: "src:x", dim: 0, stop: 2}', "what was cut off is gone"),
    "cast": ('a: {op: cast, of: "src:x", dtype: bfloat16}', "forgets bits"),
    "stack": ('a: {op: stack, of: "src:x.{e*}"}', "how many tensors were stacked"),
    "a part lacks": ('a: {op: split, of: "src:x", sizes: [1, 2, 3], take: 1}', "part 0, 2 of it"),
    "sizes unknown": ('a: {op: concat, of: ["src:x", "src:y"]}', "the sizes of what `concat` joins"),
    "number unknown": ('a: {op: chunk, of: "src:x", chunks: n, take: 0}', "how many parts there are"),
    "shape unknown": ('a: {op: reshape, of: "src:x", shape: [1, -1]}', "the shape to go back to is not known"),
    "formula": ('"a.{i + s * 4}": "src:s{s}.{i}"', "computed of several numbers"),
    "zeros": ('"a.{i:02}": "src:x.{i:int}"', "leading zeros"),
    "one for many": ('"a.{i}": {op: concat, of: ["src:x.{i}", "src:y"], sizes: [1, 2]}', "by {i}"),
    "some of all": ('"a.{r}": {op: chunk, of: "src:x", chunks: 4, take: r, for: {r: 2}}', "need not be all parts"),
}


@pytest.mark.parametrize("case", NONE)
def test_no_inverse_says_why(case: str) -> None:
    rule, why = NONE[case]
    with pytest.raises(sm.ShardmergeError) as raised:
        invert_spec(parse_spec(HEAD.replace("\n  ", "\n") + "  " + rule + "\n", "m.yaml"))
    for error in raised.value.each():
        assert error.code == "no-inverse"
        assert error.where == "m.yaml:6:3"
    assert why in str(raised.value)


def test_all_rules_without_an_inverse_are_named_at_once() -> None:
    text = HEAD + NONE["slice"][0] + "\n  b" + NONE["cast"][0][1:] + "\n"
    with pytest.raises(sm.Problems) as raised:
        invert_spec(parse_spec(text, "m.yaml"))
    assert [error.where for error in raised.value.each()] == ["m.yaml:6:3", "m.yaml:7:3"]


def test_the_other_side_of_one_source_used_twice() -> None:
    text = invert_spec(parse_spec(HEAD + "embed: src:x\n  head: src:x\n", "m.yaml"))
    spec = parse_spec(text, "back.yaml")
    assert [(str(r.target), str(r.candidates[0].template)) for r in spec.rules] == [("x", "embed")]
    assert [str(d.template) for d in spec.drops] == ["head"]


# --- presets and examples ---


@pytest.mark.parametrize("name", list_presets())
def test_presets_have_an_inverse_that_reads_or_say_why_not(name: str) -> None:
    preset = load_preset(name)
    sources = "".join(f"  {role}: {role}.pth\n" for role in preset.roles)
    spec = with_preset(parse_spec(f"shardmerge: 1\nsources:\n{sources}use: {name}\n", "m.yaml"), preset)
    with contextlib.suppress(sm.ShardmergeError):
        assert parse_spec(invert_spec(spec), "back.yaml").rules
        return
    with pytest.raises(sm.ShardmergeError) as raised:
        invert_spec(spec)
    assert {one.code for one in raised.value.each()} == {"no-inverse"}


# Their sources are not here, and only those tell which of several candidates made a tensor.
OPEN = ("two-sources", "own-rules", "rest", "special-then-rest")


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "docs" / "examples").glob("*.yaml")), ids=str)
def test_examples_have_an_inverse_or_say_why_not(path: Path) -> None:
    """Those that only move tensors have one; a merge, a sum or an adapter forgets what it was made of."""
    merges = ("linear", "slerp", "ties", "dare", "task_arithmetic", "breadcrumbs", "della", "arcee_fusion", "karcher")
    lossy = (*merges, "multislerp", "nearswap", "nuslerp", "ram", "sce", "model_stock", "stack")
    forgets = any(f"op: {word}" in path.read_text() for word in lossy)
    if not load_spec(path).rules:
        return
    if forgets or load_spec(path).adapters or path.stem in OPEN:
        with pytest.raises(sm.ShardmergeError) as caught:
            api.invert(path)
        assert {one.code for one in caught.value.each()} == {"no-inverse"}
        assert ("sources at hand" in str(caught.value)) == (path.stem in OPEN)
        return
    assert parse_spec(api.invert(path), "back.yaml").rules


def test_xtuner_there_and_back(golden: Path, tmp_path: Path) -> None:
    """Every tensor of a real run comes back under XTuner's name."""
    xtuner = golden / "xtuner"
    run = xtuner / "frozen_z2" / "work_dirs" / "iter_2.pth"
    mapping = (
        f"shardmerge: 1\nsources:\n  trained: {run}\n  llm: {xtuner}/base_llm\n  vision: {xtuner}/base_clip\n"
        "output: {path: there, dtype: float32}\nuse: xtuner/llava-to-hf\n"
    )
    (tmp_path / "there.yaml").write_text(mapping, "utf-8")
    made = sm.run(tmp_path / "there.yaml")
    back = api.invert(tmp_path / "there.yaml")
    (tmp_path / "back.yaml").write_text(back, "utf-8")
    after = load_file(sm.run(tmp_path / "back.yaml").path / "model.safetensors")
    before = sm.open_checkpoint(run)
    assert made.plan.target == "hf/llava"
    assert "# Not to be had back, since it was dropped: vision:text_projection.weight" in back
    for name, tensor in before.items():
        rows = tensor.shape[0]  # the vocabulary was padded
        assert torch.equal(after[name][:rows], tensor.torch().float()), name


def test_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(mapping_of(["rename"]), "utf-8")
    printed = shardmerge("invert", path).stdout
    assert printed == api.invert(path)
    shardmerge("invert", path, "-o", tmp_path / "back.yaml")
    assert (tmp_path / "back.yaml").read_text("utf-8") == printed
    assert "[output-exists]" in shardmerge("invert", path, "-o", tmp_path / "back.yaml", code=1).stderr
    path.write_text(HEAD + NONE["slice"][0] + "\n", "utf-8")
    assert "[no-inverse]" in shardmerge("invert", path, "--source", "src", code=1).stderr
