"""`--check transformers`: what its own loading says of a plan, before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.errors import ShardmergeError, UsageError
from shardmerge.prepare import load_check, loading
from shardmerge.prepare.loading import ask
from tests.conftest import shardmerge
from tests.families import made
from tests.load_environments import VERSIONS, interpreter, ready

transformers = pytest.importorskip("transformers")

CHECK = sm.Options(check="transformers", sync=False)


@pytest.fixture
def mamba(tmp_path: Path) -> Path:
    """A family of which config and tensors alone say little: only transformers knows what belongs to it."""
    made("MambaForCausalLM").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's work is done in this process, which has imported transformers: a child takes seconds to."""
    monkeypatch.setattr(loading, "child", lambda folder, given, python: load_check.answer(folder, given))


def edit(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; None takes a key away."""
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    left = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(left), "utf-8")


def change(folder: Path, *, drop: str = "-", **more: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(drop)}
    save_file({**kept, **more}, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, **options: Any) -> ShardmergeError:
    """Returns the error of a checked conversion, which has written nothing."""
    out = folder.parent / "out"
    with pytest.raises(ShardmergeError) as caught:
        sm.convert(folder, out, options=sm.Options(check="transformers", **options))
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]
    return caught.value


# ---- what is right


def test_the_answer_is_in_the_summary_and_in_json(mamba: Path, tmp_path: Path) -> None:
    says = f"transformers {transformers.__version__} loads it as MambaForCausalLM: 0 keys missing"
    done = shardmerge("convert", mamba, tmp_path / "out", "--check", "transformers", "--no-sync")
    assert f"checked: {says}" in done.stdout
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        "shardmerge: 1\noutput: two\nsources: {m: model}\ntarget: {name: hf/model, text: m}\n"
        'tensors: {"{n...}": "m:{n...}"}\n'
    )
    answer = json.loads(shardmerge("run", mapping, "--check", "transformers", "--json").stdout)
    assert answer["checks"][0].startswith(says)


@pytest.mark.usefixtures("here")
def test_the_check_changes_nothing_of_the_result(mamba: Path, tmp_path: Path) -> None:
    for name, options in (("plain", sm.Options(sync=False)), ("checked", CHECK)):
        sm.convert(mamba, tmp_path / name, options=options)
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "checked" / path.name).read_bytes()


def test_this_process_loads_neither_torch_nor_transformers(mamba: Path, tmp_path: Path) -> None:
    code = (
        "import sys, shardmerge as sm\n"
        f"sm.convert({str(mamba)!r}, {str(tmp_path / 'out')!r}, options=sm.Options(check='transformers'))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what is wrong


@pytest.mark.usefixtures("here")
def test_a_missing_tensor(mamba: Path, tmp_path: Path) -> None:
    change(mamba, drop="backbone.norm_f.")
    error = refused(mamba)
    assert error.code == "incomplete-model"
    assert "backbone.norm_f.weight" in error.what
    assert "--partial" in error.hint
    result = sm.convert(mamba, tmp_path / "out", options=sm.Options(check="transformers", partial=True, sync=False))
    assert any("backbone.norm_f.weight" in warning for warning in result.plan.warnings)
    assert result.plan.checks == ()


@pytest.mark.usefixtures("here")
def test_another_size(mamba: Path) -> None:
    edit(mamba, vocab_size=51)
    error = refused(mamba)
    assert error.code == "config-disagrees"
    assert "backbone.embeddings.weight [50, 24] for [51, 24]" in error.what


@pytest.mark.usefixtures("here")
def test_a_tensor_too_many_is_dropped_as_the_hint_says(mamba: Path, tmp_path: Path) -> None:
    change(mamba, **{"v_head.weight": torch.ones(1, 24)})
    error = refused(mamba)
    assert error.code == "config-disagrees"
    assert "drop: [SOURCE:v_head.weight, ...]" in error.hint
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        "shardmerge: 1\noutput: out\nsources: {m: model}\ntarget: {name: hf/model, text: m}\n"
        'drop: [m:v_head.weight]\ntensors: {"{n...}": "m:{n...}"}\n'
    )
    assert sm.run(mapping, options=CHECK).plan.checks


@pytest.mark.usefixtures("here")
def test_all_that_is_wrong_is_said_at_once(mamba: Path) -> None:
    change(mamba, drop="backbone.norm_f.", **{"v_head.weight": torch.ones(1, 24)})
    edit(mamba, vocab_size=51)
    assert [one.code for one in refused(mamba).each()] == ["incomplete-model", "config-disagrees", "config-disagrees"]


@pytest.mark.usefixtures("here")
def test_experts_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    """transformers 5 stacks experts on loading; where some are missing it raises, and the reason is only in its log."""
    made("OlmoeForCausalLM").save_pretrained(tmp_path / "model")
    for expert in (2, 3):
        change(tmp_path / "model", drop=f"model.layers.1.mlp.experts.{expert}.gate_proj.")
    error = refused(tmp_path / "model")
    assert error.code == "does-not-load"
    assert "model.layers.1.mlp.experts.gate_up_proj" in error.found


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "unheard_of"}, "unheard_of"),
        ({"architectures": ["MambaForChess"]}, "has no class MambaForChess"),
        ({"hidden_act": 5}, "hidden_act"),
        ({"model_type": None}, "Unrecognized model in config.json"),
    ],
)
def test_a_config_that_transformers_refuses(mamba: Path, changes: dict[str, Any], found: str) -> None:
    edit(mamba, **changes)
    error = refused(mamba)
    assert error.code == "does-not-load"
    assert found in error.found
    assert len(error.found) < 1000


# ---- what is not checked


@pytest.mark.usefixtures("here")
def test_code_of_the_checkpoint_is_not_executed(mamba: Path, tmp_path: Path) -> None:
    edit(mamba, model_type="mine", architectures=["Mine"], auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (mamba / "modeling_mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    result = sm.convert(mamba, tmp_path / "out", options=CHECK)
    assert result.plan.checks == ()
    assert any("Mine is code of the checkpoint" in warning for warning in result.plan.warnings)
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("here")
def test_a_class_of_the_library_is_asked_although_there_is_code(mamba: Path, tmp_path: Path) -> None:
    edit(mamba, auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    (mamba / "modeling_mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    assert sm.convert(mamba, tmp_path / "out", options=CHECK).plan.checks
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("here")
def test_quantized_weights_are_not_checked(mamba: Path, tmp_path: Path) -> None:
    edit(mamba, quantization_config={"quant_method": "gptq", "bits": 4})
    change(mamba, **{"backbone.layers.0.mixer.in_proj.qweight": torch.ones(4, 4, dtype=torch.int32)})
    result = sm.convert(mamba, tmp_path / "out", options=CHECK)
    assert any("quantized weights are not checked" in warning for warning in result.plan.warnings)


@pytest.mark.usefixtures("here")
def test_a_class_that_cannot_be_loaded_without_values(tmp_path: Path) -> None:
    """transformers puts the n-gram embedding of this family together on the CPU, whatever device the model is on."""
    sizes = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        "num_experts_per_tok": 2, "num_experts": 4, "hc_lowrank": 4, "ple_embed_dim": 32, "ngram_vocab_size_base": 100,
        "split_ngram_parts": 2, "max_position_embeddings": 64, "heads_per_ngram": 2, "ple_layer_ids": [1],
        "make_ngram_vocab_size_divisible_by": 4, "layer_types": ["linear_attention"] * 2, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model("qwen4_exp_text", **sizes)
    transformers.Qwen4ExpForCausalLM(config).save_pretrained(tmp_path / "model")
    error = refused(tmp_path / "model")
    assert (error.code, error.exit_code) == ("cannot-check", 2)
    assert "verify OUT --load" in error.hint
    sm.convert(tmp_path / "model", tmp_path / "out", options=sm.Options(sync=False))  # as the hint says
    assert "0 missing" in sm.verify(tmp_path / "out", load=True).checks[-1]


@pytest.mark.usefixtures("here")
def test_without_a_config_there_is_nothing_to_ask(mamba: Path) -> None:
    (mamba / "config.json").unlink()
    error = refused(mamba)
    assert (error.code, error.exit_code) == ("no-effect", 2)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("gone", "hint"), [("accelerate", "pip install 'shardmerge[transformers]'"), ("timm", "install it beside")]
)
def test_each_package_that_is_not_there_is_named(
    gone: str, hint: str, mamba: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gone == "timm":  # a class that is the library's and needs another one
        edit(mamba, model_type="timm_wrapper", architectures=["TimmWrapperModel"])
    monkeypatch.setitem(sys.modules, gone, None)
    error = refused(mamba)
    assert (error.code, error.exit_code) == ("no-transformers", 2)
    assert gone in error.found
    assert hint in error.hint


def test_without_transformers_it_says_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    with pytest.raises(UsageError) as caught:
        ask(given=json.dumps({"config": {}, "tensors": {}}), python=str(tmp_path / "bare" / "bin" / "python"))
    assert caught.value.code == "no-transformers"
    assert "pip install 'shardmerge[transformers]'" in caught.value.hint


# ---- other versions


@pytest.mark.load
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_is_asked_in_its_own_way(version: str, mamba: Path) -> None:
    if not ready(version):
        pytest.skip(f"transformers {version} could not be installed")
    catalog = sm.inspect(mamba)
    tensors = {name: ["float32", list(catalog[name].shape)] for name in catalog.names()}
    config = json.loads((mamba / "config.json").read_text("utf-8"))
    del tensors["backbone.norm_f.weight"]
    tensors |= {"v_head.weight": ["float32", [1, 24]], "backbone.embeddings.weight": ["float32", [49, 24]]}
    found = ask(given=json.dumps({"config": config, "tensors": tensors}), python=str(interpreter(version)))
    assert found.says() == f"transformers {version} loads it as MambaForCausalLM"
    keys = found.keys
    assert keys.missing == ("backbone.norm_f.weight",)
    assert keys.unexpected == ("v_head.weight",)
    assert [key.split()[0] for key in keys.mismatched] == ["backbone.embeddings.weight"]
