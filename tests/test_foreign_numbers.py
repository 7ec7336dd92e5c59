"""Numbers in files that other tools wrote: what must be finite is, a size is an integer in range, or it is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge import api
from shardmerge.adapters.settings import read_adapter_settings
from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.formulas import Formula
from shardmerge.mapping.reader import parse_spec
from shardmerge.targets.adapter_config import read_adapter_config
from shardmerge.targets.stated_numbers import odd_numbers
from shardmerge.tensors import Catalog
from tests.attacks.seeds import CONFIG, WEIGHTS
from tests.conftest import GOLDEN
from tests.test_adapter_tools import GOLDEN as ADAPTERS
from tests.test_adapter_tools import TOOLS, mapping

NOT_FINITE = ("NaN", "Infinity", "-Infinity", "1e400", "1e308", "1" + "0" * 400)
NOT_REAL = (*NOT_FINITE, "true", '"8"', "[]", "{}")
NOT_POSITIVE = (*NOT_REAL, "0", "-1")
NO_SIZE = (*NOT_POSITIVE, "1.5", str(1 << 63))

# A key of a config, as a source of a preset has it; what it may not be; where it stands in the file.
KEYS = [
    ("layouts/meta_llama2_tp2_gqa/source", "llama/meta-to-hf", "params.json", "n_kv_heads", NO_SIZE),
    ("layouts/meta_llama2_tp2_gqa/source", "llama/meta-to-hf", "params.json", "norm_eps", ("NaN", "0", "-1")),
    ("layouts/meta_llama2_tp2_gqa/source", "llama/meta-to-hf", "params.json", "ffn_dim_multiplier", NOT_POSITIVE),
    ("layouts/litgpt_llama_gqa/source", "llama/litgpt-to-hf", "model_config.yaml", "n_head", ("true", "1.5", ".inf")),
    ("layouts/litgpt_llama_gqa/source", "llama/litgpt-to-hf", "model_config.yaml", "rope_base", (".nan", "0", "-1")),
    ("layouts/open_clip_trained/source", "clip/open-clip-to-hf", "open_clip_config.json", "mlp_ratio", NOT_POSITIVE),
    ("layouts/open_clip_trained/source", "clip/open-clip-to-hf", "open_clip_config.json", "width", ("true", "1e308")),
    ("layouts/internvl_qwen2/source", "internvl/original-to-hf", "config.json", "downsample_ratio", ("NaN", "5e-324")),
    ("layouts/internvl_qwen2/source", "internvl/original-to-hf", "config.json", "rms_norm_eps", ("NaN", "true")),
    ("xtuner/base_llm", "llama/hf-to-hf", "config.json", "rope_theta", ("-Infinity", "1e308", '"8"', "0")),
    ("xtuner/base_llm", "llama/hf-to-hf", "config.json", "num_key_value_heads", ("true", "1.5")),
    ("xtuner/base_llm", "llama/hf-to-hf", "config.json", "attention_dropout", ("NaN", "1e400")),
]


@pytest.mark.parametrize(("source", "use", "file", "key", "values"), KEYS, ids=[f"{row[1]} {row[3]}" for row in KEYS])
def test_a_number_that_is_none_is_refused_with_its_file_and_key(source, use, file, key, values, tmp_path):
    shutil.copytree(GOLDEN / source, tmp_path / "source")
    path = tmp_path / "source" / file
    text = path.read_text("utf-8")
    options = sm.Options(sync=False)
    for value in values:
        changed, count = re.subn(rf'("?{key}"?: )[-.\w]+', rf"\g<1>{value}", text)
        assert count, key
        path.write_text(changed, "utf-8")
        with pytest.raises(ShardmergeError) as caught:
            api.prepare_conversion(tmp_path / "source", use=use, options=options)
        assert {error.code for error in caught.value.each()} == {"odd-config"}, value
        assert any(file in error.where and key in error.what for error in caught.value.each()), value


@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "hidden_size"])
def test_a_config_that_is_copied_has_no_such_number_either(key, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    for value in ("NaN", "1e400", '"8"', "true", "1.5", "-1"):
        text = json.dumps({**CONFIG, "architectures": ["Other"], "model_type": "other", key: 0})
        (tmp_path / "config.json").write_text(text.replace(f'"{key}": 0', f'"{key}": {value}'))
        with pytest.raises(ShardmergeError) as caught:
            api.prepare_conversion(tmp_path, options=sm.Options(sync=False))
        assert [error.code for error in caught.value.each()] == ["odd-config"]
        assert (caught.value.what, caught.value.where) == (
            f"`{key}` in the config cannot be used",
            str(tmp_path / "config.json"),
        )


def test_what_real_configs_have_passes():
    """Mamba 2's time step has no upper limit; musicflamingo's positions are a float; a list has a size a layer."""
    config = {
        "time_step_limit": [0.0, float("inf")], "max_position_embeddings": 1200.0, "num_key_value_heads": [2, 4],
        "vocab_size": None, "text_config": {"head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000},
    }  # fmt: skip
    assert odd_numbers(config, "config.json") == ()
    for found in GOLDEN.glob("**/config.json"):
        assert odd_numbers(json.loads(found.read_bytes()), "config.json") == ()


NUMBERS = {
    "lora_alpha": NOT_REAL, "r": (*NOT_POSITIVE, "1.5", str(1 << 63)),
    "alpha_pattern.q_proj": NOT_REAL, "rank_pattern.q_proj": (*NOT_POSITIVE, "1.5"),
    "layers_to_transform": ("NaN", "true", '"8"', "1.5"),
    "layer_replication": ("[[0, NaN]]", "[[1, 0]]", "[[true, 2]]"),
    "trainable_token_indices": ("[NaN]", "[-1]", "[true]", "1"), "use_rslora": ("NaN", "2", '"yes"'),
}  # fmt: skip


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_of_an_adapter_config(key):
    outer, _, inner = key.partition(".")
    for value in NUMBERS[key]:
        said = json.loads(value)
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, outer: {inner: said} if inner else said}
        with pytest.raises(ShardmergeError) as caught:
            read_adapter_config(config, "DIR/adapter_config.json")
        assert caught.value.where == "DIR/adapter_config.json"
        assert key in caught.value.what, value


def _spec(said=""):
    """An adapter of a mapping."""
    text = (
        "shardmerge: 1\nsources: {b: b, l: l}\noutput: {path: out}\n"
        f"adapters: [{{from: l, onto: b{said}}}]\ntensors: {{'{{rest...}}': 'b:{{rest...}}'}}\n"
    )
    return parse_spec(text, "mapping.yaml").adapters[0]


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_number_beside_a_lora_of_verl(key):
    for value in (float("nan"), float("inf"), 1e308, True):
        facts = {"lora_r": 8, "lora_alpha": 16, f"lora_{key.removeprefix('lora_')}": value}
        with pytest.raises(ShardmergeError) as caught:
            read_adapter_settings(_spec(), Catalog("DIR", "verl", {}, facts=facts), lambda extent: b"")
        assert (caught.value.where, key in caught.value.what) == ("DIR/lora_train_meta.json", True)


OF_A_MAPPING = {
    "let: {n: .nan}": "bad-formula", "let: {n: 1e400}": "bad-formula", "let: {n: .inf}": "bad-formula",
    "let: {n: true}": "unknown-value", "vocabulary: {rows: -1}": "wrong-kind",
    "vocabulary: {multiple: 1.5}": "wrong-kind", "vocabulary: {seed: .inf}": "wrong-kind",
}  # fmt: skip


@pytest.mark.parametrize("line", OF_A_MAPPING)
def test_a_number_of_a_mapping(line, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(WEIGHTS)
    path = tmp_path / "mapping.yaml"
    rule = "{op: scale, of: s:w, factor: n}" if line.startswith("let") else "s:w"
    head = "shardmerge: 1\nsources: {s: s.safetensors}\noutput: {path: out}\n"
    path.write_text(f"{head}tensors:\n  w: {rule}\n{line}\n")
    with pytest.raises(ShardmergeError) as caught:
        api.prepare_mapping(path, sm.Options())
    assert OF_A_MAPPING[line] in {error.code for error in caught.value.each()}
    assert any("mapping.yaml" in error.where for error in caught.value.each())


@pytest.mark.parametrize("said", ["weight: .nan", "weight: 1e400", "alpha: 1e400", "alpha: -1", "r: 0", "r: nan"])
def test_a_number_that_a_mapping_says_of_an_adapter(said):
    with pytest.raises(ShardmergeError) as caught:
        read_adapter_settings(_spec(f", {said}"), Catalog("DIR", "peft", {}), lambda extent: b"")
    assert (caught.value.code, caught.value.where) == ("odd-setting", "mapping.yaml:4:12")
    assert said.partition(":")[0] in caught.value.what


def test_a_switch_is_no_number_of_a_formula():
    for text in ("x + 1", "-x", "x // 2"):
        with pytest.raises(MappingError):
            Formula.parse(text).value(lambda name: True)


def test_a_scale_that_is_a_tensor_and_not_finite_is_reported(tmp_path):
    """It is applied, as its own tool applies it, and every number that it spoils is counted; a zero gives zeros."""
    folder = shutil.copytree(GOLDEN / "quantized" / "compressed-tensors-fp8_block", tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("weight_scale"))
    weight = name.removesuffix("_scale")
    for value, spoiled in ((float("nan"), True), (float("inf"), True), (0.0, False)):
        tensors[name].view(-1)[0] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        options = sm.Options(sync=False, dtype="bfloat16", overwrite=True)
        result = sm.convert(folder, tmp_path / "out", options=options)
        assert (weight in result.outcome.overflows) is spoiled
        assert bool(torch.isfinite(load_file(result.path / "model.safetensors")[weight]).all()) is not spoiled


def test_an_alpha_that_is_a_tensor_and_not_finite_is_reported(tmp_path):
    base, adapter, prefix = TOOLS["kohya unet"]
    path = mapping(tmp_path, "kohya unet", base, adapter, prefix)
    tensors = load_file(ADAPTERS / "kohya" / adapter)
    name = next(name for name in tensors if name.startswith("lora_unet") and name.endswith(".alpha"))
    tensors[name] = torch.tensor(float("nan"), dtype=tensors[name].dtype)
    save_file(tensors, tmp_path / "lora.safetensors")
    path.write_text(path.read_text().replace(str(ADAPTERS / "kohya" / adapter), str(tmp_path / "lora.safetensors")))
    assert len(sm.run(path, options=sm.Options(sync=False)).outcome.overflows) == 1
