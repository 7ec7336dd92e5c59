"""A mapping that makes another model writes the config of that model: transformers loads it and computes the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import shardmerge as sm
from shardmerge.errors import ShardmergeError, VerificationError
from shardmerge.publish.verify import verify_directory
from shardmerge.targets.config_edits import PART_CLASSES
from tests.receipts import receipt_of, write_receipt
from tests.test_docs import EXAMPLES

transformers = pytest.importorskip("transformers")

_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_EYE = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
IDS = torch.arange(1, 9)[None]


def saved(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder)
    return model.eval()


def llama(folder: Path, **changes: object) -> torch.nn.Module:
    values = {**_TEXT, "tie_word_embeddings": False, **changes}
    return saved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)), folder)


def loaded(folder: Path) -> torch.nn.Module:
    """Loads a directory as its config.json says, with nothing missing, unexpected or of another shape."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def run(folder: Path, text: str) -> sm.Result:
    mapping = folder / "mapping.yaml"
    mapping.write_text("shardmerge: 1\noutput: out\n" + text)
    return sm.run(mapping)


def written_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "out" / "config.json").read_text())


def example(name: str, folder: Path) -> sm.Result:
    """Carries out a mapping of the guides, whose checkpoints lie below ``models``."""
    shutil.copy(EXAMPLES / name, folder)
    return sm.run(folder / name)


def test_the_text_model_of_a_vlm_is_taken_out(tmp_path: Path) -> None:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT}, vision_config={"model_type": "clip_vision_model", **_EYE},
        image_token_index=63, tie_word_embeddings=False,
    )  # fmt: skip
    whole = saved(transformers.LlavaForConditionalGeneration(config), tmp_path / "models" / "llava")
    model = loaded(example("text-model.yaml", tmp_path).path)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, whole(input_ids=IDS).logits)


def test_the_layers_of_the_guide(tmp_path: Path) -> None:
    llama(tmp_path / "models" / "base")
    assert len(loaded(example("fewer-layers.yaml", tmp_path).path).model.layers) == 3


def test_the_text_encoder_of_a_clip_is_taken_out(tmp_path: Path) -> None:
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 16,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=_EYE, projection_dim=12)
    whole = saved(transformers.CLIPModel(config), tmp_path / "clip")
    result = run(
        tmp_path,
        "sources: {clip: clip}\ntarget: {name: hf/model, text: clip}\nconfig: {take: text_config}\n"
        'tensors: {"text_model.{rest...}": "clip:text_model.{rest...}"}\n'
        'drop: ["clip:vision_model.{rest...}", "clip:{x:text_projection|visual_projection}.weight"'
        ', "clip:logit_scale"]\n',
    )
    model = loaded(result.path)
    assert type(model).__name__ == "CLIPTextModel"
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).last_hidden_state, whole.text_model(input_ids=IDS).last_hidden_state
    assert torch.equal(ours, theirs)


STACK = """sources: {a: a}
target: {name: hf/model, text: a}
tensors:
  "model.layers.{i:0|1}.{rest...}": "a:model.layers.{i}.{rest...}"
  "model.layers.2.{rest...}": "a:model.layers.3.{rest...}"
  "model.{t:embed_tokens|norm}.weight": "a:model.{t}.weight"
  lm_head.weight: "a:lm_head.weight"
drop: ["a:model.layers.2.{rest...}"]
"""


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma"])
def test_a_stack_of_layers_is_counted(family: str, tmp_path: Path) -> None:
    """Qwen's config lists a type for each layer, which transformers compares with their number."""
    config = getattr(transformers, f"{family}Config")(**_TEXT, head_dim=8, tie_word_embeddings=False)
    saved(getattr(transformers, f"{family}ForCausalLM")(config), tmp_path / "a")
    result = run(tmp_path, STACK)
    assert written_config(tmp_path)["num_hidden_layers"] == 3
    assert any("num_hidden_layers is 3" in warning and "4" in warning for warning in result.plan.warnings)
    assert len(loaded(result.path).model.layers) == 3


def test_rows_that_rules_add_are_counted(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    row = '{op: concat, of: ["a:NAME", {op: new_rows, of: "a:NAME", rows: 8}]}'
    rows = "".join(
        f"  {name}: {row.replace('NAME', name)}\n" for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    result = run(
        tmp_path,
        "sources: {a: a}\ntarget: {name: hf/model, text: a}\ntensors:\n"
        '  "model.layers.{rest...}": "a:model.layers.{rest...}"\n  model.norm.weight: "a:model.norm.weight"\n' + rows,
    )
    assert written_config(tmp_path)["vocab_size"] == 72
    assert loaded(result.path).lm_head.out_features == 72


def test_a_number_that_the_mapping_sets_is_compared_and_not_changed(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    with pytest.raises(ShardmergeError) as refused:
        run(tmp_path, STACK + "config: {set: {num_hidden_layers: 5}}\n")
    assert "num_hidden_layers" in str(refused.value)
    run(tmp_path, STACK + "config: {set: {num_hidden_layers: 3, rope_theta: 5e5, note: 'true', nested.deep: [1, x]}}\n")
    config = written_config(tmp_path)
    assert config["num_hidden_layers"] == 3
    assert config["rope_theta"] == 500000.0
    assert config["note"] == "true"
    assert config["nested"] == {"deep": [1, "x"]}


def test_an_incomplete_source_is_no_smaller_model(tmp_path: Path) -> None:
    """The same three layers, but it is the checkpoint that lacks one: nothing is filled in."""
    llama(tmp_path / "a")
    config = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a" / "config.json").write_text(config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(ShardmergeError) as refused:
        run(tmp_path, 'sources: {a: a}\ntarget: {name: hf/model, text: a}\ntensors: {"{rest...}": "a:{rest...}"}\n')
    assert "incomplete-model" in str(refused.value)


def test_keys_are_removed(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    run(tmp_path, STACK + "config: {remove: [rope_parameters.rope_type, initializer_range]}\n")
    config = written_config(tmp_path)
    assert "initializer_range" not in config
    assert "rope_type" not in config["rope_parameters"]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("config: {take: text_config}", "no-such-key"),
        ("config: {take: model_type}", "no-such-key"),
        ("config: {remove: [nothing]}", "no-such-key"),
        ("config: {remove: [model_type.deep]}", "no-such-key"),
        ("config: {set: {model_type.deep: 1}}", "no-such-key"),
        ("config: {sett: {a: 1}}", "unknown-key"),
        ("config: text_config", "wrong-kind"),
        ("config: {set: [a]}", "wrong-kind"),
    ],
)
def test_edits_of_what_is_not_there(line: str, code: str, tmp_path: Path) -> None:
    llama(tmp_path / "a")
    with pytest.raises(ShardmergeError) as refused:
        run(tmp_path, STACK + line + "\n")
    assert code in {error.code for error in refused.value.each()}
    assert not (tmp_path / "out").exists()


def test_edits_need_a_config_and_the_hint_leads_to_one(tmp_path: Path) -> None:
    llama(tmp_path / "a")
    rest = "config: {set: {use_cache: false}}\n"
    with pytest.raises(ShardmergeError) as refused:
        run(tmp_path, STACK.replace("target: {name: hf/model, text: a}\n", "") + rest)
    assert refused.value.code == "no-config"
    assert "target: {name: hf/model, text: SOURCE}" in refused.value.hint
    run(tmp_path, STACK + rest)
    assert written_config(tmp_path)["use_cache"] is False


def test_classes_of_parts_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    for model_type, name in PART_CLASSES.items():
        assert hasattr(transformers, name)
        assert CAUSAL.get(model_type, name) == name


def test_verify_sees_a_config_of_another_model(tmp_path: Path) -> None:
    """Receipt and digests are right: the directory was made by a version that did not compare, or edited with them."""
    llama(tmp_path / "a")
    out = sm.convert(tmp_path / "a", tmp_path / "out").path
    verify_directory(out)
    text = (out / "config.json").read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    (out / "config.json").write_text(text)
    receipt = receipt_of(out)
    receipt["side_files"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()
    write_receipt(out, receipt)
    with pytest.raises(VerificationError) as differs:
        verify_directory(out)
    assert differs.value.code == "incomplete-model"
    assert "num_hidden_layers 5" in differs.value.expected
