"""Ways back are right or refused: every preset on real checkpoints, every op, and no mapping that ends in a bug.

There with the mapping, back with what `invert` wrote: each tensor of the source that was used has its bits again, and
there is no other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.inverse.inversion import invert_spec
from shardmerge.mapping.preset_files import list_presets
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.spec import Spec
from shardmerge.ops.contract import OpKind, Param
from shardmerge.ops.registry import OPS
from shardmerge.plan.value import Plan
from shardmerge.tensors import leaves
from tests.conftest import GOLDEN
from tests.presets_in_use import LAYOUTS, compare_bits
from tests.test_layouts import layout_of, sources_of

XTUNER = GOLDEN / "xtuner"
FROZEN = {
    "trained": XTUNER / "frozen_z2" / "work_dirs" / "iter_2.pth",
    "llm": XTUNER / "base_llm",
    "vision": XTUNER / "base_clip",
}


def truth(case: str) -> Path:
    return LAYOUTS / case / "truth"


def of_case(case: str) -> tuple[dict[str, Path], dict[str, object]]:
    layout = layout_of(case)
    more: dict[str, object] = {**(layout.more or {}), **({"let": dict(layout.let)} if layout.let else {})}
    return sources_of(case), more


def back_to(case: str) -> dict[str, Path]:
    return {"hf": truth(case), "original": LAYOUTS / case / "source"}


# preset, sources, what else the mapping says, the source that is wanted back
BACK = [
    *(
        (layout_of(case).preset, *of_case(case), "")
        for case in (
            "internvl_internlm2", "internvl_qwen2", "litgpt_llama_gqa", "litgpt_old_llama_gqa", "llava15_official",
            "llava_names_l2", "llava_names_l3", "llava_names_l4", "llava_next_official", "open_clip_published",
            "open_clip_trained", "phi3_to_llama_gqa", "torchtune_llama3_gqa", "torchtune_phi3_gqa",
        )
    ),
    ("llama/hf-to-litgpt", {"hf": truth("litgpt_llama_gqa")}, {}, ""),
    ("llama/hf-to-torchtune", {"hf": truth("torchtune_llama3_gqa")}, {}, ""),
    ("llama/hf-to-torchtune-phi3", {"hf": truth("torchtune_phi3_gqa")}, {}, ""),
    ("clip/hf-to-open-clip", {"hf": truth("open_clip_published")}, {}, ""),
    ("clip/hf-to-vision", {"clip": truth("open_clip_published")}, {}, ""),
    ("llama/hf-to-hf", {"hf": truth("litgpt_llama_gqa")}, {}, ""),
    ("hf/to-4.52", {"hf": truth("llava_names_l2")}, {}, ""),
    ("hf/to-5.0", {"hf": truth("llava_names_l2")}, {}, ""),
    ("hf/to-5.6", {"hf": truth("llava_names_l2")}, {}, ""),
    ("internvl/hf-to-original", back_to("internvl_qwen2"), {}, "hf"),
    ("internvl/hf-to-original-internlm2", back_to("internvl_internlm2"), {}, "hf"),
    ("llava/hf-to-official", {"hf": truth("llava15_official")}, {}, ""),
    ("xtuner/llava-to-hf", FROZEN, {}, "trained"),
    ("xtuner/llava-to-hf", FROZEN, {}, "vision"),
    ("xtuner/llava-to-official", FROZEN, {}, "trained"),
]  # fmt: skip

# Why a preset has no way back on a real checkpoint.
NO_WAY = {
    "llama/megatron-to-hf": ("megatron_tp2_pp1_mha", "`slice` is lossy"),
    "llama/megatron-dist-to-hf": ("torch_dist_llama_tp2_pp2", "`slice` is lossy"),
    "llama/megatron-dist-to-hf-qwen3-moe": ("torch_dist_qwen3_moe_ep2", "`slice` is lossy"),
    "llama/meta-to-hf": ("meta_llama3_tp2_gqa", "the sizes of what `concat` joins are not known"),
    "llama/torchtune-lora-to-hf": ("torchtune_llama3_lora", "`lora` is lossy"),
}
NO_WAY_OTHERS = {
    "llama/hf-to-meta",
    "llama/apply-delta",
    "peft/merge",
    "peft/export",
    "peft/extract",
    "xtuner/llava-to-xtuner",
}


def write_mapping(folder: Path, preset: str, sources: dict[str, Path], more: dict[str, object]) -> Path:
    mapping = {
        "shardmerge": 1,
        "sources": {name: str(path) for name, path in sources.items()},
        "output": str(folder / "there"),
        "use": preset,
        **more,
    }
    path = folder / "there.yaml"
    path.write_text(json.dumps(mapping), "utf-8")
    return path


def used(plan: Plan, source: str) -> set[str]:
    """The tensors of a source that a plan reads."""
    return {leaf.name for one in plan.tensors() for leaf in leaves(one.entry) if leaf.source == source}


@pytest.mark.parametrize(("preset", "sources", "more", "source"), BACK, ids=[f"{r[0]}-{r[3]}" for r in BACK])
def test_every_tensor_that_was_used_comes_back(
    preset: str, sources: dict[str, Path], more: dict[str, object], source: str, tmp_path: Path
) -> None:
    mapping = write_mapping(tmp_path, preset, sources, more)
    source = source or next(iter(sources))
    text = api.invert(mapping, source)
    plan = sm.run(mapping).plan
    (tmp_path / "back.yaml").write_text(text, "utf-8")
    after = sm.open_checkpoint(sm.run(tmp_path / "back.yaml").path)
    before = sm.open_checkpoint(sources[source])
    assert set(after) == used(plan, source)
    assert set(after) <= {name.removeprefix("module.") for name in before}
    found = {name: after[name].torch() for name in after}
    compare_bits(found, {n: (before[n] if n in before else before[f"module.{n}"]).torch() for n in found})


@pytest.mark.parametrize("preset", NO_WAY)
def test_a_preset_without_a_way_back_says_why(preset: str, tmp_path: Path) -> None:
    case, why = NO_WAY[preset]
    with pytest.raises(sm.ShardmergeError, match=why) as caught:
        api.invert(write_mapping(tmp_path, preset, *of_case(case)))
    assert {one.code for one in caught.value.each()} == {"no-inverse"}


def test_no_preset_is_forgotten() -> None:
    # A OneVision has no checkpoint among the golden ones; its rules are those of LLaVA-NeXT.
    without = {"llava/official-to-hf-onevision"}
    assert {row[0] for row in BACK} | set(NO_WAY) | NO_WAY_OTHERS | without == set(list_presets())


def test_meta_ranks_and_several_directories_have_no_way_back(tmp_path: Path) -> None:
    meta = write_mapping(tmp_path, "llama/hf-to-meta", {"hf": truth("meta_llama3_tp2_gqa")}, {"let": {"ranks": 2}})
    with pytest.raises(sm.ShardmergeError) as caught:
        api.invert(meta)
    assert {one.code for one in caught.value.each()} == {"no-inverse"}
    tree = write_mapping(tmp_path, "xtuner/llava-to-xtuner", FROZEN, {})
    with pytest.raises(sm.ShardmergeError, match="several directories"):
        api.invert(tree, "trained")


def test_a_merged_adapter_does_not_come_out_again(tmp_path: Path) -> None:
    """A preset may merge one; whether there was one, only the sources tell."""
    base = {"model.layers.0.q.weight": torch.randn(4, 4)}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    root = "base_model.model.model.layers.0.q.lora_"
    save_file({f"{root}A.weight": torch.randn(2, 4), f"{root}B.weight": torch.randn(4, 2)}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2, "r": 2, "peft_type": "LORA"}')
    sources = {"base": tmp_path / "base", "adapter": tmp_path / "a.safetensors"}
    with pytest.raises(sm.ShardmergeError, match="cannot be taken out again"):
        api.invert(write_mapping(tmp_path, "peft/merge", sources, {}), "base")


# --- candidates, narrower rules and rest ---


def there_and_back(folder: Path, text: str, source: str = "") -> dict[str, torch.Tensor]:
    sources = ", ".join(f"{file.stem}: {file.name}" for file in sorted(folder.glob("?.safetensors")))
    (folder / "there.yaml").write_text(f"shardmerge: 1\nsources: {{{sources}}}\noutput: there\n{text}", "utf-8")
    back = api.invert(folder / "there.yaml", source)
    sm.run(folder / "there.yaml")
    (folder / "back.yaml").write_text(back, "utf-8")
    return load_file(sm.run(folder / "back.yaml").path / "model.safetensors")


OVERLAID = {
    "alternatives": ('tensors: {"t.{n}": ["a:{n}", "b:{n}"]}\n', {"a": ["x", "y"], "b": ["z"]}),
    "narrower": (
        'tensors: {"{n...}": "b:{n...}", "x.{n}": "a:{n}"}\n',
        {"a": ["1"], "b": ["x.2", "y"]},
    ),
    "rest": ('tensors: {head: b:lm}\nrest: {"{n...}": "b:{n...}", "a.{n}": "a:{n}"}\n', {"a": ["1"], "b": ["lm", "y"]}),
    "twice": ('tensors: {head: b:lm, "{n...}": "b:{n...}", "a.{n}": "a:{n}"}\n', {"a": ["1"], "b": ["lm", "y"]}),
    "renamed into each other": ('tensors: {x: b:y, y: b:x, z: a:z}\n', {"a": ["z"], "b": ["x", "y"]}),
}  # fmt: skip


@pytest.mark.parametrize("source", ["a", "b"])
@pytest.mark.parametrize("case", OVERLAID)
def test_only_what_a_source_gave_comes_back_to_it(case: str, source: str, tmp_path: Path) -> None:
    text, names = OVERLAID[case]
    torch.manual_seed(3)
    tensors = {one: {name: torch.randn(3) for name in found} for one, found in names.items()}
    tensors["b"]["shadowed"] = torch.randn(3)
    for one, found in tensors.items():
        save_file(found, tmp_path / f"{one}.safetensors")
    after = there_and_back(tmp_path, f"{text}drop: [b:shadowed]\n", source)
    assert sorted(after) == sorted(names[source])
    assert all(torch.equal(tensor, tensors[source][name]) for name, tensor in after.items())


def test_what_a_way_back_would_bring_wrong_is_refused(tmp_path: Path) -> None:
    """`x` and `y` both come to `t`, by two candidates of one rule: no template tells them apart again."""
    save_file({"old.1": torch.zeros(1), "new.2": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(sm.ShardmergeError) as caught:
        there_and_back(tmp_path, 'tensors: {"t.{n}": ["a:new.{n}", "a:old.{n}"]}\n')
    assert {one.code for one in caught.value.each()} == {"no-inverse"}


CHECKED = {
    "was": ("{op: reshape, of: a:x, shape: [6], was: [3, 2]}", "`was` is not the tensor's shape"),
    "chunks": ('{op: concat, of: ["a:x", "a:y"], chunks: 2}', "are not those chunks"),
    "number of chunks": ('{op: concat, of: ["a:x", "a:x"], chunks: 3}', "are not those chunks"),
    "sizes": ('{op: concat, of: ["a:x", "a:y"], sizes: [2, 2]}', "the sizes are not those given"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_what_an_op_says_for_its_way_back_is_checked(case: str, tmp_path: Path) -> None:
    rule, why = CHECKED[case]
    save_file({"x": torch.zeros(2, 3), "y": torch.zeros(1, 3)}, tmp_path / "a.safetensors")
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{a: a.safetensors}}\noutput: o\ntensors:\n  t: {rule}\nrest:\n  '{{n}}': 'a:{{n}}'\n"
    )
    with pytest.raises(sm.ShardmergeError, match=why) as caught:
        sm.plan(tmp_path / "m.yaml")
    assert caught.value.each()[0].code == "op-shape"


# --- whatever can be read ---

NUMBERS = ["0", "1", "2", "-1", "n", "n + 1", "n // 2 * 3", "a.config.hidden", "x or 3", "9" * 15]
NAMES = ["a:x", '"a:x.{i}"', '"b:y.{i}"', '"a:e.{e*}"', '"a:e.{i}.{e*}"', "b:z"]


def parameter(param: Param) -> st.SearchStrategy[str]:
    number = st.sampled_from(NUMBERS)
    if param.choices:
        return st.sampled_from(param.choices)
    if param.kind == "flag":
        return st.sampled_from(["true", "false"])
    if param.kind == "dtype":
        return st.sampled_from(["bfloat16", "float32"])
    if param.kind in ("ints", "numbers"):
        return number | st.lists(number, max_size=4).map(lambda items: f"[{', '.join(items)}]")
    return number


@st.composite
def op(draw: st.DrawFn, kind: OpKind, of: st.SearchStrategy[str]) -> str:
    fields = [f"op: {kind.name}"]
    if kind.takes_of:
        several = st.lists(of, min_size=1, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        fields.append(f"of: {draw(of | several if kind.many else of)}")
    fields += [f"{name}: {draw(of)}" for name in kind.terms]
    needed = [param for param in kind.params if param.default is None and not param.optional]
    more = draw(st.lists(st.sampled_from(kind.params), unique=True)) if kind.params else []
    fields += [f"{p.name}: {draw(parameter(p))}" for p in dict.fromkeys((*needed, *more))]
    return "{" + ", ".join(fields) + "}"


TERMS = st.recursive(
    st.sampled_from(NAMES), lambda inner: st.sampled_from(list(OPS.values())).flatmap(lambda kind: op(kind, inner))
)
TARGETS = ["t", "t.{i}", "t.{i:int}", "{r:02}.t", "t.{i + 16}", "t.{i + n}", "{r...}"]


def outcome(spec: Spec, source: str) -> tuple[set[str], str]:
    """The codes of the refusal, or the way back."""
    try:
        return set(), invert_spec(spec, source)
    except sm.ShardmergeError as error:
        return {one.code for one in error.each()}, ""


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from(TARGETS), TERMS), min_size=1, max_size=4), st.sampled_from(["a", "b", ""]))
def test_no_mapping_that_reads_ends_in_a_bug(rules: list[tuple[str, str]], source: str) -> None:
    """A text comes out, which is a mapping again, or an error by name."""
    lines = "".join(f'  "{target}": {term}\n' for target, term in dict(rules).items())
    text = f"shardmerge: 1\nsources: {{a: a, b: b}}\noutput: o\nlet: {{n: 2}}\ntensors:\n{lines}"
    try:
        spec = parse_spec(text, "m.yaml")
    except sm.ShardmergeError:
        return
    codes, back = outcome(spec, source)
    assert codes == {"no-inverse"} or parse_spec(back, "back.yaml").rules


def test_a_formula_in_the_dims_of_a_permutation_is_no_bug() -> None:
    head = "shardmerge: 1\nsources: {a: a}\nlet: {n: 1}\ntensors:\n"
    with pytest.raises(sm.ShardmergeError, match="the dims to go back to is not known") as caught:
        invert_spec(parse_spec(head + "  t: {op: permute, of: a:x, dims: [n, 0]}\n", "m.yaml"))
    assert caught.value.each()[0].code == "no-inverse"
    turned = parse_spec(head.replace("let: {n: 1}\n", "") + "  t: {op: permute, of: a:x, dims: [-1, 0, 1]}\n", "m.yaml")
    assert "dims: [1, 2, 0]" in invert_spec(turned)
