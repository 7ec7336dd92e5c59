"""The mapping does what it says: drops hold, the narrower rule wins whatever the order, `rest` takes what is left.

Inputs are made here with safetensors, torch and peft; what is right is computed with torch.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.mapping.dropping import find_dropped, without
from shardmerge.mapping.narrower import alike, covers, is_narrower
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.resolve import resolve
from shardmerge.tensors import Catalog
from tests.test_resolve import catalog, only, run, taken

Tensors = dict[str, torch.Tensor]


def written(folder: Path, **sources: Tensors) -> None:
    for name, tensors in sources.items():
        save_file(tensors, folder / f"{name}.safetensors")


def mapped(folder: Path, text: str) -> Path:
    sources = ", ".join(f"{file.stem}: {file.name}" for file in sorted(folder.glob("*.safetensors")))
    path = folder / "mapping.yaml"
    path.write_text(f"shardmerge: 1\nsources: {{{sources}}}\noutput: out\n{text}", "utf-8")
    return path


def made(folder: Path, text: str) -> Tensors:
    return load_file(sm.run(mapped(folder, text)).path / "model.safetensors")


def refused(folder: Path, text: str) -> list[sm.ShardmergeError]:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(mapped(folder, text))
    return list(caught.value.each())


def two(seed: int, *names: str) -> Tensors:
    torch.manual_seed(seed)
    return {name: torch.randn(4, 3) for name in names}


# --- drop ---

ROADS = {
    "reference": '"{n...}": ["b:{n...}", "a:{n...}"]',
    "operand": '"{n...}": [{op: linear, of: ["a:{n...}", "b:{n...}"]}, "a:{n...}"]',
    "first operand": '"{n...}": [{op: linear, of: ["b:{n...}", "a:{n...}"]}, "a:{n...}"]',
    "tensor parameter": '"{n...}": [{op: add_top_left, base: "b:{n...}", of: "a:{n...}"}, "a:{n...}"]',
    "inner op": '"{n...}": [{op: reshape, shape: [4, 3], of: {op: linear, of: ["a:{n...}", "b:{n...}"]}}, "a:{n...}"]',
    "slerp": '"{n...}": [{op: slerp, t: 0.5, of: ["a:{n...}", "b:{n...}"]}, "a:{n...}"]',
    "ties": '"{n...}": [{op: ties, base: "a:{n...}", of: ["b:{n...}"], density: 1.0}, "a:{n...}"]',
}  # fmt: skip


@pytest.mark.parametrize("road", ROADS)
def test_a_dropped_tensor_is_gone_on_every_road(road: str, tmp_path: Path) -> None:
    a, b = two(1, "head.w", "body.w"), two(2, "head.w", "body.w")
    written(tmp_path, a=a, b=b)
    text = f"tensors:\n  {ROADS[road]}\ndrop: [b:head.w]\n"
    after = made(tmp_path, text)
    assert torch.equal(after["head.w"], a["head.w"])
    assert not torch.equal(after["body.w"], a["body.w"])


def test_a_dropped_member_is_not_collected(tmp_path: Path) -> None:
    a = two(1, *(f"experts.{e}.w" for e in range(3)))
    written(tmp_path, a=a)
    after = made(tmp_path, 'tensors: {all: {op: stack, of: "a:experts.{e*}.w"}}\ndrop: [a:experts.1.w]\n')
    assert torch.equal(after["all"], torch.stack([a["experts.0.w"], a["experts.2.w"]]))


def test_a_dropped_operand_without_another_candidate_is_told_with_its_line(tmp_path: Path) -> None:
    written(tmp_path, a=two(1, "head.w"), b=two(2, "head.w", "x"))
    text = 'tensors:\n  "{n...}": {op: linear, of: ["a:{n...}", "b:{n...}"]}\n  x: b:x\ndrop: [b:head.w]\n'
    (error,) = refused(tmp_path, text)
    assert error.code == "missing-operand"
    assert "b:head.w is dropped by `b:head.w` at" in error.what
    assert "mapping.yaml:7:8" in error.what
    assert "take that line out of `drop`" in error.hint


def test_a_dropped_name_of_a_tied_tensor_leaves_the_other() -> None:
    entry = catalog("embed").entries["embed"]
    tied = Catalog("t", "torch zip", {"embed": entry}, {"head": "embed", "third": "embed"})
    assert list(without(tied, {"head"}).names()) == ["embed", "third"]
    left = without(tied, {"embed"})
    assert (list(left.names()), left["third"].name, left["head"].pieces) == (["head", "third"], "head", entry.pieces)
    assert list(without(tied, {"embed", "head"}).names()) == ["third"]
    assert list(without(tied, {"embed", "head", "third"}).names()) == []


def test_an_adapter_without_its_dropped_pairs(tmp_path: Path) -> None:
    """A pair that is dropped is not merged; half of a pair is an error, and so is a base tensor that is gone."""
    base = {"q.weight": torch.randn(4, 4), "k.weight": torch.randn(4, 4)}
    names = [f"base_model.model.{m}.lora_{ab}.weight" for m in "qk" for ab in "AB"]
    lora = {name: torch.randn(2, 4) if "_A" in name else torch.randn(4, 2) for name in names}
    written(tmp_path, base=base, lora=lora)
    head = 'adapters: [{from: lora, onto: base, alpha: 2}]\ntensors: {"{n...}": "base:{n...}"}\n'
    after = made(tmp_path, head + 'drop: ["lora:base_model.model.k.{r...}"]\n')
    assert torch.equal(after["k.weight"], base["k.weight"])
    assert torch.allclose(after["q.weight"], base["q.weight"] + lora[names[1]] @ lora[names[0]], atol=1e-6)
    (half,) = refused(tmp_path, head + "drop: [lora:base_model.model.k.lora_B.weight]\n")
    assert half.code == "adapter-incomplete"
    (gone,) = refused(tmp_path, head + "drop: [base:k.weight]\n")
    assert gone.code == "adapter-without-base"
    assert "base:k.weight is dropped by" in gone.found
    assert "drop the adapter's tensors of this module too" in gone.hint
    (tmp_path / "out").rename(tmp_path / "first")
    assert list(made(tmp_path, head + 'drop: [base:k.weight, "lora:base_model.model.k.{r...}"]\n')) == ["q.weight"]


def test_an_adapter_target_does_not_ask_for_what_is_dropped(tmp_path: Path) -> None:
    root = "base_model.model."
    pair = {f"{root}q.lora_A.weight": torch.randn(2, 4), f"{root}q.lora_B.weight": torch.randn(4, 2)}
    written(tmp_path, trained=pair | {f"{root}projector.0.weight": torch.randn(4, 4)})
    head = 'use: peft/export\ntarget: {name: peft/adapter, trained: trained, alpha: "8"}\n'
    whole = sm.plan(mapped(tmp_path, head))
    assert f"{root}projector.0.weight" in [tensor.name for tensor in whole.tensors()]
    after = sm.run(mapped(tmp_path, f"{head}drop: [trained:{root}projector.0.weight]\n"))
    assert sorted(load_file(after.path / "adapter_model.safetensors")) == sorted(pair)
    assert '"modules_to_save": null' in (after.path / "adapter_config.json").read_text()


def test_half_of_a_pair_is_no_adapter(tmp_path: Path) -> None:
    root = "base_model.model."
    shapes = {f"{root}{m}.lora_{ab}.weight": (2, 4) if ab == "A" else (4, 2) for m in "qk" for ab in "AB"}
    written(tmp_path, trained={name: torch.randn(shape) for name, shape in shapes.items()})
    head = 'use: peft/export\ntarget: {name: peft/adapter, trained: trained, alpha: "8"}\n'
    for half in "AB":
        (error,) = refused(tmp_path, f"{head}drop: [trained:{root}q.lora_{half}.weight]\n")
        assert error.code == "adapter-incomplete"
    assert len(list(sm.plan(mapped(tmp_path, f'{head}drop: ["trained:{root}q.{{r...}}"]\n')).tensors())) == 2


def test_a_target_that_cannot_do_without_a_dropped_tensor_names_the_line(golden: Path, tmp_path: Path) -> None:
    xtuner = golden / "xtuner"
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources:\n  trained: {xtuner}/frozen_z2/work_dirs/iter_2.pth\n  llm: {xtuner}/base_llm\n"
        f"  vision: {xtuner}/base_clip\noutput: out\nuse: xtuner/llava-to-hf\n"
        "drop: [vision:vision_model.post_layernorm.weight]\n"
    )
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.plan(tmp_path / "m.yaml")
    assert caught.value.code == "missing-tensor"
    assert "dropped by `vision:vision_model.post_layernorm.weight`" in caught.value.found
    assert "take that line out of `drop`" in caught.value.hint


def test_a_dropped_head_still_has_the_vocabulary_rows_when_another_source_gives_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    torch.manual_seed(0)
    base = {"model.embed_tokens.weight": torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"vocab_size": 8, "model_type": "x"}')
    save_file({"head": torch.randn(8, 4)}, tmp_path / "tuned.safetensors")
    text = (
        "shardmerge: 1\nsources: {base: base, tuned: tuned.safetensors}\noutput: out\n"
        "target: {name: hf/model, text: base}\nvocabulary: {rows: 12}\n"
        'tensors: {lm_head.weight: tuned:head}\nrest: {"{n...}": "base:{n...}"}\ndrop: [base:lm_head.weight]\n'
    )
    (tmp_path / "m.yaml").write_text(text)
    after = load_file(sm.run(tmp_path / "m.yaml").path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == dict.fromkeys(base, (12, 4))
    alone = text.replace(", tuned: tuned.safetensors", "").replace("tensors: {lm_head.weight: tuned:head}\n", "")
    (tmp_path / "m.yaml").write_text(alone)  # nobody gives a head, and a directory of any architecture needs none
    assert [one.name for one in sm.plan(tmp_path / "m.yaml").tensors()] == ["model.embed_tokens.weight"]


# --- the narrower rule ---

NARROWER = [
    ("thinker.{r...}", "{r...}"),
    ("a.b", "{r...}"),
    ("a.b", "a.{x}"),
    ("a.{x}", "a.{r...}"),
    ("a.{i:int}.w", "a.{x}.w"),
    ("a.7.w", "a.{i:int}.w"),
    ("a.w1", "a.w{x}"),
    ("a.w{i:int}", "a.w{x}"),
    ("a.{x:q|k}", "a.{x:q|k|v}"),
    ("a.{x:1|12}", "a.{i:int}"),
    ("a.{i:02}", "a.{i:int}"),
    ("a.20.w", "a.{i + 16}.w"),
    ("a.{r...}.w", "a.{r...}"),
    ("a.{r...}.w", "{r...}.w"),
    ("{x}.{y}", "{r...}"),
    ("{x}.{x}", "{x}.{y}"),
    ("{r...}.b.w", "{r...}.w"),
]
NEITHER = [
    ("a.{r...}", "{r...}.w"),
    ("{x}.w", "a.{y}"),
    ("{x:a|b}.w", "{x:b|c}.w"),
    ("{r...}", "{all...}"),
    ("a.{i + 16}", "a.{i:02}"),
    ("a.{i + 16}.w", "a.{i:int}.w"),
    ("a.{i + n}.w", "{r...}"),
    ("a.b", "a.c"),
    ("{x}", "{x}.{y}"),
    ("a.3.w", "a.{i + 16}.w"),
]


@pytest.mark.parametrize(("one", "other"), NARROWER)
def test_narrower(one: str, other: str) -> None:
    assert is_narrower(Template.parse(one), Template.parse(other))
    assert not is_narrower(Template.parse(other), Template.parse(one))


@pytest.mark.parametrize(("one", "other"), NEITHER)
def test_neither_is_narrower(one: str, other: str) -> None:
    assert not is_narrower(Template.parse(one), Template.parse(other))
    assert not is_narrower(Template.parse(other), Template.parse(one))


def test_alike_whatever_captures_are_called() -> None:
    assert alike(Template.parse("a.{x}.{r...}"), Template.parse("a.{y}.{q...}"))
    assert not alike(Template.parse("a.{x}"), Template.parse("a.{x:int}"))


SEGMENTS = ["a", "1", "17", "w2", "{x}", "{i:int}", "{k:a|1}", "w{y}", "w{z:int}", "{j:02}", "{n + 16}", "{r...}"]
TEXTS = ["a", "b", "1", "2", "17", "07", "w2", "wx"]
templates = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3, unique=True).map(".".join).map(Template.parse)


@given(templates, templates)
def test_covers_agrees_with_all_short_names(general: Template, narrow: Template) -> None:
    """Checked against every name of one to four segments out of eight."""
    names = (".".join(parts) for size in (1, 2, 3, 4) for parts in itertools.product(TEXTS, repeat=size))
    missed = any(general.match(name) is None for name in names if narrow.match(name) is not None)
    if covers(general, narrow):
        assert not missed


def test_the_narrower_rule_wins_and_the_plan_says_so(tmp_path: Path) -> None:
    """Two rules: these from the tuned part, the rest as it is."""
    whole = two(1, "thinker.head.w", "thinker.body.w", "talker.w")
    tuned = two(2, "head.w", "body.w")
    written(tmp_path, base=whole, sft=tuned)
    text = 'tensors:\n  "{n...}": "base:{n...}"\n  "thinker.{n...}": "sft:{n...}"\n'
    after = made(tmp_path, text)
    assert torch.equal(after["talker.w"], whole["talker.w"])
    assert torch.equal(after["thinker.head.w"], tuned["head.w"])
    unused = sm.plan(mapped(tmp_path, text)).unused
    assert {(one.name, one.reason.split(":")[0]) for one in unused} == {
        ("thinker.head.w", "a narrower rule wins"),
        ("thinker.body.w", "a narrower rule wins"),
    }


RULES = [
    '"{n...}": "a:{n...}"',
    '"x.{n...}": "b:{n...}"',
    '"x.{i:int}.{p}": "c:{i:int}.{p}"',
    "x.1.w: a:special",
    '"y.{n...}": ["d:{n...}", "b:{n...}"]',
    '"{n...}.b": "d:{n...}.q"',
]


@given(st.permutations(RULES), st.lists(st.sampled_from(RULES), unique=True))
def test_the_order_of_rules_never_matters(order: list[str], left: list[str]) -> None:
    catalogs = {
        "a": catalog("x.0.w", "x.1.w", "z.w", "special"),
        "b": catalog("0.w", "1.w", "2.w"),
        "c": catalog("0.w", "1.w"),
        "d": catalog("0.w", "3.q"),
    }
    rules = [rule for rule in order if rule not in left] or order

    def outcome(rules: list[str]) -> object:
        text = "tensors:\n" + "".join(f"  {rule}\n" for rule in rules)
        try:
            found = run(text, catalogs)
        except sm.ShardmergeError as error:
            return sorted(one.code for one in error.each())
        return taken(found), {(one.source, one.name) for one in found.shadowed}

    assert outcome(rules) == outcome(sorted(rules))


def test_a_wide_rule_makes_what_the_narrower_one_has_not() -> None:
    found = run(
        'tensors:\n  "x.{n}": "b:{n}"\n  "{n...}": "a:{n...}"\n', {"a": catalog("x.0", "x.1", "y"), "b": catalog("1")}
    )
    assert taken(found) == {"x.0": "a:x.0", "x.1": "b:1", "y": "a:y"}


def test_stacked_layers_that_meet_are_no_narrower_rule() -> None:
    text = 'tensors:\n  "x.{i}": "a:{i:int}"\n  "x.{i + 2}": "b:{i}"\n'
    assert only(text, {"a": catalog("0", "1", "2"), "b": catalog("0", "1")}).code == "double-claim"
    assert len(taken(run(text, {"a": catalog("0", "1"), "b": catalog("0", "1")}))) == 4


def test_a_target_is_as_narrow_as_its_sources() -> None:
    text = 'tensors:\n  "x.{i}": "a:{i:int}"\n  "x.{i:int}": "b:{i:int}"\n'
    assert only(text, {"a": catalog("0"), "b": catalog("0")}).code == "double-claim"


def test_two_rules_of_which_neither_is_narrower_and_the_hint_leads_on() -> None:
    catalogs = {"a": catalog("x.w", "x.v"), "b": catalog("x.w", "y.w")}
    one, other = '"x.{p}": "a:x.{p}"', '"{m}.w": "b:{m}.w"'
    error = only(f"tensors:\n  {one}\n  {other}\n", catalogs)
    assert error.code == "double-claim"
    assert "move one of the two under `rest:`" in error.hint
    assert taken(run(f"tensors:\n  {one}\nrest:\n  {other}\n", catalogs))["x.w"] == "a:x.w"
    assert taken(run(f"tensors:\n  {other}\nrest:\n  {one}\n", catalogs))["x.w"] == "b:x.w"


# --- rest ---


def test_rest_takes_what_no_rule_uses() -> None:
    catalogs = {"a": catalog("lm_head.w", "norm.w", "x.0"), "b": catalog("x.0")}
    text = 'tensors:\n  "x.{i}": "b:x.{i}"\n  head.w: a:lm_head.w\nrest:\n  "{n...}": "a:{n...}"\n'
    found = run(text, catalogs)
    assert taken(found) == {"x.0": "b:x.0", "head.w": "a:lm_head.w", "norm.w": "a:norm.w"}
    assert [(one.source, one.name) for one in found.shadowed] == [("a", "x.0")]


def test_rest_does_not_take_what_an_earlier_candidate_shadowed() -> None:
    catalogs = {"a": catalog("t.0"), "b": catalog("base.0", "base.1", "other")}
    text = 'tensors:\n  "x.{i}": ["a:t.{i}", "b:base.{i}"]\nrest:\n  "{n...}": "b:{n...}"\n'
    assert taken(run(text, catalogs)) == {"x.0": "a:t.0", "x.1": "b:base.1", "other": "b:other"}


def test_an_op_under_rest(tmp_path: Path) -> None:
    a, b = two(1, "q", "k", "head"), two(2, "q", "k", "head")
    written(tmp_path, a=a, b=b)
    after = made(
        tmp_path,
        'tensors: {lm: a:head}\nrest: {"{n...}": {op: linear, of: ["a:{n...}", "b:{n...}"]}}\ndrop: [b:head]\n',
    )
    assert sorted(after) == ["k", "lm", "q"]
    assert torch.equal(after["lm"], a["head"])


def test_a_rest_that_matches_nothing_is_an_error_and_an_empty_one_is_not() -> None:
    catalogs = {"a": catalog("x.w")}
    error = only("tensors:\n  x.w: a:x.w\nrest:\n  y.{n}: a:y.{n}\n", catalogs)
    assert error.code == "rule-matches-nothing"
    assert taken(run('tensors:\n  y.w: a:x.w\nrest:\n  "{n...}": "a:{n...}"\n', catalogs)) == {"y.w": "a:x.w"}


def test_own_rules_beside_the_catch_all_of_a_preset(tmp_path: Path) -> None:
    """`peft/merge` takes all of the base; a narrower rule just works, and one for the same names replaces it."""
    (tmp_path / "base").mkdir()
    base = {"q.weight": torch.randn(4, 4), "lm_head.weight": torch.randn(8, 4)}
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "x"}')
    lora = {
        "base_model.model.q.lora_A.weight": torch.randn(2, 4),
        "base_model.model.q.lora_B.weight": torch.randn(4, 2),
    }
    written(tmp_path, lora=lora, new={"head": torch.randn(8, 4)})
    head = (
        "shardmerge: 1\nsources: {base: base, adapter: lora.safetensors, new: new.safetensors}\noutput: out\n"
        "use: peft/merge\nadapters: [{from: adapter, onto: base, alpha: 2}]\n"
    )
    path = tmp_path / "m.yaml"
    path.write_text(head + "tensors: {lm_head.weight: new:head}\n")
    after = load_file(sm.run(path).path / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], load_file(tmp_path / "new.safetensors")["head"])
    assert sorted(after) == sorted(base)
    path.write_text(head + 'tensors: {"{all...}": ["new:{all...}", "base:{all...}"]}\n')
    assert {tensor.name for tensor in sm.plan(path).tensors()} == {*base, "head"}


# --- written twice ---


def test_a_tensor_that_is_written_twice_is_a_warning(tmp_path: Path) -> None:
    written(tmp_path, a=two(1, "head", "body"))
    plan = sm.plan(mapped(tmp_path, 'tensors:\n  lm_head: a:head\n  "{n...}": "a:{n...}"\n'))
    assert list(plan.warnings) == ["a: head is written 2 times: lm_head, head"]
    assert not sm.plan(mapped(tmp_path, 'tensors: {lm_head: a:head}\nrest: {"{n...}": "a:{n...}"}\n')).warnings


def test_a_tensor_written_again_in_another_type_or_turned_is_told_too(tmp_path: Path) -> None:
    written(tmp_path, a=two(1, "head", "body"))
    text = 'tensors:\n  x: {op: cast, of: {op: transpose, of: a:head}, dtype: bfloat16}\n  "{n...}": "a:{n...}"\n'
    assert list(sm.plan(mapped(tmp_path, text)).warnings) == ["a: head is written 2 times: x, head"]
    text = 'tensors:\n  x: {op: chunk, of: a:head, chunks: 2, take: 0}\n  "{n...}": "a:{n...}"\n'
    assert not sm.plan(mapped(tmp_path, text)).warnings


def test_tied_names_are_a_note(tmp_path: Path) -> None:
    tied = torch.randn(4, 2)
    torch.save({"embed": tied, "head": tied, "body": torch.zeros(1)}, tmp_path / "a.pth")
    (tmp_path / "m.yaml").write_text(
        'shardmerge: 1\nsources: {a: a.pth}\noutput: out\ntensors: {"{n...}": "a:{n...}"}\n'
    )
    plan = sm.plan(tmp_path / "m.yaml")
    assert not plan.warnings
    assert "embed is written 2 times: embed, head" in plan.sources[0].notes


def test_every_tensor_is_used_shadowed_or_dropped() -> None:
    """Whatever rules do, the three parts are the whole, and they do not overlap."""
    catalogs = {"a": catalog("x.0", "x.1", "y", "z"), "b": catalog("0", "1")}
    text = 'tensors:\n  "x.{i}": "b:{i}"\n  "{n...}": "a:{n...}"\nrest:\n  "old.{n...}": "a:{n...}"\ndrop: [a:z, b:1]\n'
    spec = parse_spec(f"shardmerge: 1\nsources: {{a: a, b: b}}\n{text}", "m.yaml")
    found = resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, user_file="m.yaml")
    used = {(one.source, one.name) for one in found.assignments.values()}
    shadowed = {(one.source, one.name) for one in found.shadowed}
    everything = {(source, name) for source, one in catalogs.items() for name in one.names()}
    assert used | shadowed | set(found.dropped) == everything
    assert not used & shadowed
    assert not used & set(found.dropped)
