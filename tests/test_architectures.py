"""Names and shapes computed from a config, against the models that transformers builds from it."""

import json
import re
import shutil
from math import prod
from pathlib import Path

import pytest
import yaml

from shardmerge.errors import TargetError
from shardmerge.targets import tables, vision_tower
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.text_config import read_part, text_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safe_open = pytest.importorskip("safetensors").safe_open

TEXTS = {
    "llama": {},
    "llama, grouped queries": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "llama, one head of keys": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "llama, head_dim of its own": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "llama, attention bias": {"attention_bias": True},
    "llama, mlp bias": {"mlp_bias": True},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_attention_heads": 16},
    "mistral, no grouping": {"model_type": "mistral", "num_attention_heads": 8, "num_key_value_heads": 8},
    "mistral, head_dim of its own": {"model_type": "mistral", "num_key_value_heads": 4, "head_dim": 20},
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 32},
    "qwen2, grouped and tied": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 32},
    "qwen3, attention bias": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "attention_bias": True},
    "mixtral": {"model_type": "mixtral", "num_attention_heads": 8},
    "mixtral, three experts": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 3},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 3, "moe_intermediate_size": 12},
    "qwen3_moe, one dense layer": {"model_type": "qwen3_moe", "num_experts": 2, "mlp_only_layers": [0]},
    "qwen3_moe, every other layer": {"model_type": "qwen3_moe", "num_experts": 2, "decoder_sparse_step": 2},
    "qwen3_moe, as 5.24 saves it": {"model_type": "qwen3_moe", "num_local_experts": 2, "head_dim": 24},
}
SMALL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 131,
}  # fmt: skip
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
}


def shapes_of(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def text_model(config):
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[config["model_type"]])
    with torch.device("meta"):
        return model_class(config_class(**config))


def saved(model, folder):
    """Names and shapes in the file that transformers saves: experts have other names there than in memory."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def expected(config, rows=None):
    text = read_architecture(config, "config.json")
    return text.changed(vocab_size=rows or text.vocab_size).tensors()


@pytest.mark.parametrize("case", TEXTS)
def test_text_models(case, tmp_path):
    config = SMALL | TEXTS[case]
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[config["model_type"]])
    assert expected(config) == saved(model_class(config_class(**config)), tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_null_means_no_grouping(model_type):
    config = SMALL | {"model_type": model_type, "num_key_value_heads": None}
    text = read_architecture(config, "config.json")
    assert text.kv_heads == 4
    assert text_config(config, text, 131, "", "config.json")["num_key_value_heads"] == 4


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_defaults_are_those_of_transformers(model_type):
    """A nested config lists only what differs from the defaults."""
    assert expected({"model_type": model_type}) == shapes_of(text_model({"model_type": model_type}))


def test_more_rows():
    names = expected(SMALL, rows=192)
    assert names["model.embed_tokens.weight"] == names["lm_head.weight"] == (192, 64)


VISIONS = {
    "defaults": {},
    "large, 336": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 336, "patch_size": 14,
    },
    "a patch that does not divide the image": {"image_size": 30, "patch_size": 14, "num_hidden_layers": 1},
    "one channel": {"num_channels": 1, "num_hidden_layers": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", VISIONS)
def test_vision_encoder(case):
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISIONS[case]))
    # Transformers 5.6 dropped this level from its own names, and still reads and expects it in files.
    oracle = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in shapes_of(model).items()}
    vision = vision_tower.read_vision({"model_type": "clip_vision_model"} | VISIONS[case], "config.json")
    assert vision.tensors() == oracle


def test_clip_large_by_the_numbers():
    vision = vision_tower.read_vision({"model_type": "clip_vision_model"} | VISIONS["large, 336"], "config.json")
    names = vision.tensors()
    assert (len(names), sum(prod(shape) for shape in names.values())) == (391, 303_507_456)
    assert names["vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert vision.patches == 576


def test_a_full_clip_is_unwrapped():
    nested = {"hidden_size": 1024, "patch_size": 14}
    assert vision_tower.unwrap({"model_type": "clip", "vision_config": nested}) == nested | {
        "model_type": "clip_vision_model"
    }
    assert vision_tower.unwrap({"model_type": "llava", "vision_config": {"model_type": "siglip"}}) == {
        "model_type": "siglip"
    }
    legacy = {"model_type": "clip", "vision_config": {"hidden_size": 768}, "vision_config_dict": nested}
    assert vision_tower.unwrap(legacy)["hidden_size"] == 1024
    assert (
        vision_tower.unwrap({"model_type": "clip", "vision_config": nested, "vision_config_dict": None})["patch_size"]
        == 14
    )


@pytest.mark.parametrize("model_type", ["phi", "siglip2_vision_model", None, 7, ["llama"]])
def test_unknown_architectures_are_named(model_type):
    for read, known in ((read_part, "qwen2"), (vision_tower.read_vision, "clip_vision_model")):
        with pytest.raises(TargetError) as caught:
            read({"model_type": model_type}, "models/base/config.json")
        assert caught.value.code == "unsupported-architecture"
        assert caught.value.where == "models/base/config.json"
        assert repr(model_type) in caught.value.found
        assert known in caught.value.expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"), ("hidden_size", 0), ("hidden_size", -1), ("hidden_size", 64.0), ("hidden_size", True),
        ("hidden_size", 1 << 40), ("num_hidden_layers", 10**9), ("num_attention_heads", []), ("vocab_size", {}),
        ("head_dim", "x"), ("tie_word_embeddings", "false"), ("attention_bias", 2), ("num_attention_heads", 65),
    ],
)  # fmt: skip
def test_sizes_that_are_no_sizes(key, value):
    with pytest.raises(TargetError) as caught:
        read_architecture(SMALL | {key: value}, "config.json")
    assert caught.value.code == "odd-config"


def test_an_image_smaller_than_a_patch():
    with pytest.raises(TargetError) as caught:
        vision_tower.read_vision({"model_type": "clip_vision_model", "image_size": 8, "patch_size": 14}, "config.json")
    assert caught.value.code == "odd-config"


LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("stored", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 500000.0}, 500000.0, None),
        ({"rope_theta": 500000.0, "rope_scaling": None}, 500000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}, 500000.0, None),
        ({"rope_parameters": {"rope_theta": 500000.0}}, 500000.0, None),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}}, 5e5, LLAMA3_ROPE),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, 5e5, LLAMA3_ROPE),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            5e5,
            {"type": "linear", "factor": 2.0},
        ),
    ],
)
def test_rope_is_written_as_4x_reads_it_and_means_the_same_to_5x(stored, theta, scaling):
    config = SMALL | stored
    text = read_architecture(config, "config.json")
    written = text_config(config, text, 131, "bfloat16", "config.json")
    assert (written["rope_theta"], written.get("rope_scaling")) == (theta, scaling)
    assert "rope_parameters" not in written
    theirs = [rope_of(transformers.LlamaConfig(**each)) for each in (config, written)]
    assert theirs[0] == theirs[1]
    assert theirs[1]["rope_theta"] == theta


def rope_of(config):
    """The rotary embedding as the installed transformers understands it, 4.x or 5.x."""
    named = getattr(config, "rope_parameters", None)
    return named or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}


@pytest.mark.parametrize("rope", [[1], "yarn", {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {}}])
def test_rope_of_another_kind_is_refused(rope):
    text = read_architecture(SMALL, "config.json")
    with pytest.raises(TargetError) as caught:
        text_config(SMALL | {"rope_parameters": rope}, text, 131, "", "config.json")
    assert caught.value.code == "odd-config"


def test_the_text_config_carries_no_traces_of_its_directory():
    config = SMALL | {
        "_name_or_path": "somewhere", "architectures": ["LlamaForCausalLM"], "transformers_version": "5.0.0",
        "dtype": "float32", "torch_dtype": "float32", "auto_map": {}, "quantization_config": {"bits": 4},
        "rms_norm_eps": 1e-5, "eos_token_id": [1, 2],
    }  # fmt: skip
    text = read_architecture(config, "config.json")
    assert text_config(config, text, 192, "float16", "config.json") == SMALL | {
        "eos_token_id": [1, 2], "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 192,
    }  # fmt: skip


# ---- the tables as files

GUIDE = Path(__file__).parent.parent / "docs" / "examples" / "architectures"


@pytest.mark.parametrize("path", [*tables.FOLDER.glob("*.yaml"), *GUIDE.glob("*.yaml")], ids=lambda path: path.stem)
def test_a_file_says_each_key_once_and_speaks_of_what_it_has(path):
    table = tables.read_table(path)
    assert table.model_type == path.stem
    keys = [line.split(":")[0] for line in path.read_text("utf-8").splitlines() if re.match(r"\w+:", line)]
    assert len(set(keys)) == len(keys)
    for prefix, names in doubled(yaml.compose(path.read_text("utf-8"))):
        assert names == [], prefix
    known = {*table.fields, *table.sizes, *table.lengths, *table.numbers, "num_labels", "in_memory"}
    known |= {f"{key}.hidden_size" for key in table.parts}
    nodes = [*table.tensors, *(node for more in table.classes.values() for node in more)]
    formulas = [*table.must, *table.sizes.values(), *table.numbers.values(), *of_nodes(nodes)]
    assert {name for formula in formulas for name in formula.names} <= known
    assert {*table.null_fields, *table.zero, *table.square} <= set(table.fields)
    assert not set(table.fields) & table.other_fields
    assert table.bare <= set(table.classes)


def doubled(node, prefix=""):
    """Yields what stands twice in a table; PyYAML lets the last one win without a word."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        yield prefix, [name for name in names if names.count(name) > 1]
        for key, value in node.value:
            yield from doubled(value, f"{prefix}.{key.value}")


def of_nodes(nodes):
    for node in nodes:
        yield from (node.condition,) if node.condition else ()
        yield from node.shape or ()
        yield from of_nodes(node.inside)


@pytest.mark.parametrize("change", [{}, {"tie_word_embeddings": False, "use_bias": False}, {"num_key_value_heads": 4}])
def test_the_table_of_the_guide_is_right(change, monkeypatch, tmp_path):
    """A file in the folder is all that a new architecture takes."""
    folder = tmp_path / "architectures"
    shutil.copytree(tables.FOLDER, folder)
    shutil.copy(GUIDE / "starcoder2.yaml", folder)
    monkeypatch.setattr(tables, "FOLDER", folder)
    config = transformers.Starcoder2Config(**SMALL | {"model_type": "starcoder2"} | change)
    stated = json.loads(config.to_json_string(use_diff=False))
    model = transformers.Starcoder2ForCausalLM(config)
    assert read_architecture(stated, "config.json").tensors() == saved(model, tmp_path)
    assert read_architecture({"model_type": "starcoder2"}, "c").values["num_hidden_layers"] == 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64, num_attention_heads 5"),
        ({"mlp_only_layers": "0"}, "'0'"),
        ({"mlp_only_layers": [0.5]}, "[0.5]"),
        ({"decoder_sparse_step": 0}, "0"),
        ({"num_experts": 1 << 13}, "8192"),
        ({"num_hidden_layers": 5000}, "5000"),
    ],
)
def test_what_is_said_of_a_field_that_cannot_be_used(change, said):
    with pytest.raises(TargetError) as caught:
        read_architecture(SMALL | {"model_type": "qwen3_moe"} | change, "models/config.json")
    assert (caught.value.code, caught.value.where) == ("odd-config", "models/config.json")
    assert said in caught.value.found
