"""Absent is absent: what an ungathered save of ZeRO-3 leaves is no data in any format, and really empty tensors are."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.dtypes import DTYPES
from shardmerge.sources.placeholders import placeholders
from shardmerge.tensors import Shape, TensorEntry
from tests.conftest import GOLDEN, read_all, shardmerge

State = dict[str, torch.Tensor]


def names_of(**shapes: Shape) -> frozenset[str]:
    return found({name.replace("__", "."): shape for name, shape in shapes.items()})


def found(shapes: dict[str, Shape], dtype: str = "F32") -> frozenset[str]:
    return placeholders({name: TensorEntry(name, DTYPES[dtype], shape, ()) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def whole() -> State:
    """The state dict of a small LLaMA."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    return {name: tensor.clone() for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}


def ungathered(state: State, part: str = "") -> State:
    """Every matrix whose name has the part in it becomes what DeepSpeed leaves of it."""
    return {n: torch.empty(0) if part in n and t.dim() == 2 else t for n, t in state.items()}


# --- what is a placeholder ---


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 4)])
def test_a_tensor_that_has_elements_in_another_layer(shape: Shape) -> None:
    shapes = {f"m.layers.{layer}.mlp.up.weight": (8, 4) for layer in range(3)}
    assert found(shapes | {"m.layers.1.mlp.up.weight": shape}) == {"m.layers.1.mlp.up.weight"}


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "h.0.attn.c_attn.weight", "x.q_proj.lora_A.default.weight"]
)
@pytest.mark.parametrize("shape", [(0,), (1,)])
def test_a_matrix_by_its_name(name: str, shape: Shape) -> None:
    assert found({name: shape}) == {name}


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_a_weight_of_any_type(dtype: str) -> None:
    """That of a quantized matrix is one too."""
    assert found({"layers.0.q_proj.weight": (0,)}, dtype) == {"layers.0.q_proj.weight"}


@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ({"empty": (0, 4)}, "F32"),
        ({"scale": (1,), "one": (1,), "logit_scale": ()}, "F32"),
        ({"head.weight": (0, 4), "head.bias": (0,)}, "F32"),
        ({"layers.0.attn._extra_state": (0,), "layers.0.attn.weight": (2, 2)}, "U8"),
        ({"layers.0.q_proj.g_idx": (0,), "layers.1.q_proj.g_idx": (8,)}, "I32"),
        ({"body.0.weight": (4, 3, 3, 3), "body.1.weight": (1,), "body.2.weight": (4, 4, 3, 3)}, "F32"),  # PReLU
        ({f"layers.{i}.q_proj.weight_scale": (1,) if i else (8, 1) for i in range(3)}, "F32"),
        ({"score.0.weight": (8, 8), "score.0.bias": (8,), "score.2.weight": (1, 8), "score.2.bias": (1,)}, "F32"),
        ({"layers.0.norm.weight": (1,), "layers.1.norm.weight": (1,)}, "F32"),
    ],
)
def test_what_really_has_none_or_one(shapes: dict[str, Shape], dtype: str) -> None:
    assert found(shapes, dtype) == frozenset()


def test_what_torch_makes_of_empty_layers_converts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        layer = torch.nn.Linear(5, 0)
    state = {**layer.state_dict(), "scale": torch.ones(1), "s": torch.tensor(2.0)}
    for name, save in (("x.safetensors", save_file), ("x.bin", torch.save)):
        save(state, tmp_path / name)
        sm.convert(tmp_path / name, tmp_path / f"out-{name}")
        result = load_file(tmp_path / f"out-{name}" / "model.safetensors")
        assert {n: t.shape for n, t in result.items()} == {n: t.shape for n, t in state.items()}


# --- one rule for all formats ---


def write_safetensors(folder: Path, state: State) -> None:
    save_file(state, folder / "model.safetensors")


def write_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_pth(folder: Path, state: State) -> None:
    torch.save({"state_dict": state, "meta": {}}, folder / "iter_3.pth")


def write_shards(folder: Path, state: State) -> None:
    """Placeholder and siblings lie in different shards: neither shard knows alone."""
    place = {n: f"model-0000{1 + ('layers.1' in n)}-of-00002.safetensors" for n in state}
    for shard in sorted(set(place.values())):
        save_file({n: t for n, t in state.items() if place[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))


WRITERS = [write_safetensors, write_bin, write_pth, write_shards]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("part", ["", "layers.1.mlp"])
def test_a_conversion_is_refused(write: Callable[..., None], part: str, whole: State, tmp_path: Path) -> None:
    (source := tmp_path / "m").mkdir()
    write(source, ungathered(whole, part))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(source, tmp_path / "out")
    error = caught.value
    assert error.code == "placeholder"
    assert "layers.1.mlp.down_proj.weight" in error.what if part else "lm_head.weight" in error.what
    assert str(source) in error.where
    assert "gather" in error.hint
    assert not (tmp_path / "out").exists()


def test_layers_that_lack_elements_in_one_place_alone(whole: State, tmp_path: Path) -> None:
    state = whole | {"model.layers.1.mlp.up_proj.weight": torch.empty(0, 8)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(sm.ShardmergeError, match="without data"):
        sm.convert(tmp_path / "x.safetensors", tmp_path / "out")


def test_all_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    names = [f"base_model.model.layers.0.q_proj.lora_{side}.weight" for side in "AB"]
    torch.save({name: torch.empty(0) for name in names}, tmp_path / "adapter_model.bin")
    catalog = sm.inspect(tmp_path)
    assert (set(catalog.entries), catalog.absent) == (set(), set(names))
    assert "placeholders" in catalog.warnings[0]


def test_the_tag_directory_beside_is_named_and_leads_on(tmp_path: Path) -> None:
    """A Trainer's checkpoint with a model that was not gathered: its tag has the data."""
    source = tmp_path / "checkpoint-3"
    tag = next(GOLDEN.glob("zero/*llama_z3*"))
    shutil.copytree(tag, source, ignore=shutil.ignore_patterns("*.safetensors", "*.json"))
    (source / "latest").unlink(missing_ok=True)
    inside = next(path.parent for path in source.rglob("*_model_states.pt"))
    state = {name: torch.empty(0) for name in sm.inspect(inside).entries}
    torch.save(state, source / "pytorch_model.bin")
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(source / "pytorch_model.bin", tmp_path / "out")
    path = caught.value.hint.split("pass ")[1].split(" ")[0]
    sm.convert(path, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(state)


@pytest.mark.parametrize("number", [errno.ELOOP, errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
def test_what_is_wrong_beside_it_is_not_wrong_with_it(
    number: int, whole: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory beside it would only be named in a hint."""
    (tmp_path / "mine").mkdir()
    write_bin(tmp_path / "mine", ungathered(whole, "layers.1.mlp"))
    expected = sm.inspect(tmp_path / "mine").absent
    beside = tmp_path / "checkpoint-3"
    beside.mkdir()
    if number == errno.ELOOP:
        (beside / "model.safetensors").symlink_to("model.safetensors")
    else:
        listdir = os.listdir

        def refuse(folder: Path) -> list[str]:
            if Path(folder) == beside:
                raise OSError(number, os.strerror(number), str(beside))
            return listdir(folder)

        monkeypatch.setattr(os, "listdir", refuse)
    assert sm.inspect(tmp_path / "mine").absent == expected


def test_quiet_runs_say_it_too(whole: State, tmp_path: Path) -> None:
    write_bin(tmp_path, ungathered(whole, "layers.1.mlp"))
    assert "[placeholder]" in shardmerge("convert", tmp_path, tmp_path / "out", "-q", code=1).stderr


# --- in a mapping ---


def planned(folder: Path, tensors: str, more: str = "") -> sm.Plan:
    path = folder / "m.yaml"
    path.write_text(f"shardmerge: 1\nsources: {{a: a.bin, b: b.safetensors}}\n{more}\ntensors:\n{tensors}")
    return sm.plan(path)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """``a`` lacks the second of two experts and has the rest; ``b`` has everything."""
    state = {f"layers.0.experts.{i}.w1.weight": torch.full((2, 2), float(i)) for i in range(2)} | {"x": torch.ones(2)}
    save_file(state, tmp_path / "b.safetensors")
    torch.save(state | {"layers.0.experts.1.w1.weight": torch.empty(0)}, tmp_path / "a.bin")
    return tmp_path


def test_another_candidate_stands_in_and_the_placeholder_is_listed(two: Path) -> None:
    plan = planned(two, '  "{rest...}": ["a:{rest...}", "b:{rest...}"]\n')
    sources = {tensor.name: tensor.entry.source for tensor in plan.tensors()}
    assert sources == {"layers.0.experts.0.w1.weight": "a", "layers.0.experts.1.w1.weight": "b", "x": "a"}
    assert ("a", "layers.0.experts.1.w1.weight", "a placeholder without data") in [
        (one.source, one.name, one.reason) for one in plan.unused
    ]
    assert any("placeholders" in text for text in plan.warnings)


@pytest.mark.parametrize(
    "tensors",
    [
        '  "{rest...}": a:{rest...}\n',
        '  y: {op: stack, of: "a:layers.0.experts.{e*}.w1.weight", dim: 0}\n  x: a:x\n',  # would stack one of two
        "  y: {op: scale, of: a:layers.0.experts.1.w1.weight, factor: 2}\n  x: a:x\n",
        "  y: {op: linear, of: [a:layers.0.experts.1.w1.weight, b:layers.0.experts.1.w1.weight]}\n  x: a:x\n",
        '  "y.{i}": {op: scale, of: "a:layers.0.experts.{i}.w1.weight", factor: 2}\n  x: a:x\n',
    ],
)
def test_rules_that_need_one_are_refused(two: Path, tensors: str) -> None:
    with pytest.raises(sm.ShardmergeError) as caught:
        planned(two, tensors, "drop: [b:x]")
    errors = [error for error in caught.value.each() if error.code == "placeholder"]
    assert errors, str(caught.value)
    assert "layers.0.experts.1.w1.weight" in errors[0].what
    assert "a.bin" in errors[0].where


def test_an_op_gives_way_to_a_later_candidate(two: Path) -> None:
    text = "  y: [{op: scale, of: a:layers.0.experts.1.w1.weight, factor: 2}, b:layers.0.experts.1.w1.weight]\n"
    plan = planned(
        two, text + "  x: a:x\n", "drop: [a:layers.0.experts.0.w1.weight, 'b:layers.0.experts.0.{r...}', b:x]"
    )
    assert {tensor.name: tensor.entry.source for tensor in plan.tensors()} == {"y": "b", "x": "a"}


def test_the_line_of_the_hint_leads_on(two: Path) -> None:
    with pytest.raises(sm.ShardmergeError) as caught:
        planned(two, '  "{rest...}": a:{rest...}\n', "drop: ['b:{rest...}']")
    line = caught.value.hint.split("`drop:` `- ")[1].split("`")[0]
    plan = planned(two, '  "{rest...}": a:{rest...}\n', f"drop: ['b:{{rest...}}', {line}]")
    assert {tensor.name for tensor in plan.tensors()} == {"layers.0.experts.0.w1.weight", "x"}


def test_a_target_that_lacks_one_says_where_the_data_are(whole: State, tmp_path: Path) -> None:
    write_bin(tmp_path, ungathered(whole, "layers.1.mlp.up"))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, "hidden_size": 8}
    config |= {"intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.convert(tmp_path, tmp_path / "out", use="llama/hf-to-hf")
    (error,) = caught.value.each()
    assert error.code in ("missing-tensor", "placeholder")
    assert "placeholders without data" in error.found
    assert "gather" in error.hint


def test_golden_checkpoints_have_no_placeholder_that_their_own_tables_know_better() -> None:
    """Parameters of one element and of none at all, in checkpoints that DeepSpeed wrote."""
    for truth in GOLDEN.glob("zero/*bag*/truth*.safetensors"):
        tag = next(path.parent for path in truth.parent.rglob("*_model_states.pt"))
        assert set(read_all(sm.inspect(tag))) >= set(load_file(truth))
