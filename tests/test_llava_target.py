"""The target hf/llava as a whole, with transformers as the judge of what it writes."""

import json
from math import prod

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ShardmergeError, TargetError
from shardmerge.targets.expectation import Request, Resize, Vocabulary
from shardmerge.targets.llava import hf as llava
from shardmerge.tensors import Catalog, TensorEntry
from tests.target_files import catalog, read, save_tokenizer, side_file, written

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
ROLES = {"text": "llm", "vision": "vision", "trained": "trained"}

# Meta-Llama-3-8B-Instruct and the vision part of clip-vit-large-patch14-336, as their config.json say.
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128009, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
CLIP_L_336 = {
    "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05,
    "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
# As openai published it in 2022: the vision part nested, no word of image_processor_type, bare sizes.
FULL_CLIP = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768, "text_config": {"hidden_size": 768},
    "text_config_dict": None, "vision_config": CLIP_L_336, "vision_config_dict": None, "transformers_version": "4.21.3",
}  # fmt: skip
PREPROCESSOR_2022 = {
    "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 336,
}  # fmt: skip
SMALL_TEXT = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 77, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 500000.0,
    "torch_dtype": "float16",
}  # fmt: skip
SMALL_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 28, "patch_size": 14, "projection_dim": 16,
}  # fmt: skip

FROZEN_ENCODER = """\
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(pretrained_model_name_or_path='meta-llama/Meta-Llama-3-8B-Instruct'),
    visual_encoder=dict(pretrained_model_name_or_path='openai/clip-vit-large-patch14-336'))
"""


def expect(roles, catalogs, read, dtype, **more):
    return llava.TARGET.expect(Request(roles, more.pop("options", {}), catalogs, read, dtype, **more))


def trained(text="", names=()):
    entries = {name: TensorEntry(name, DTYPES["BF16"], (1,), ()) for name in names}
    return Catalog("work_dirs/iter_2.pth", "torch zip", entries, training_config=text)


@pytest.fixture
def small(tmp_path):
    """A tiny but complete pair of bases, and a checkpoint that says nothing."""
    save_tokenizer(tmp_path / "llm", 131)
    return {
        "llm": catalog(
            tmp_path / "llm", config=SMALL_TEXT, generation_config={"temperature": 0.6, "eos_token_id": [2]}
        ),
        "vision": catalog(tmp_path / "vision", config=SMALL_VISION),
        "trained": trained(),
    }


def problems(catalogs, roles=ROLES):
    with pytest.raises(ShardmergeError) as caught:
        expect(roles, catalogs, read, None)
    return caught.value.each()


# Runtime names of transformers 4.51 (the layout itself), 4.52 to 5.5 and 5.6 or later, by hand; first match wins.
RUNTIME_NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


def on_disk(name):
    for runtime, stored in RUNTIME_NAMES:
        if name.startswith(runtime):
            return stored + name.removeprefix(runtime)
    return name


def from_4_52(name):
    """The name in memory from 5.6 on of what 4.52 called so; older names have no such prefix."""
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def model_of(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    return {on_disk(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# ---- names, shapes, numbers


def test_llama_3_8b_with_clip_large_by_the_numbers(tmp_path):
    save_tokenizer(tmp_path / "llm", 128256)
    catalogs = {
        "llm": catalog(tmp_path / "llm", config=LLAMA_3_8B),
        "vision": catalog(tmp_path / "vision", config=FULL_CLIP, preprocessor_config=PREPROCESSOR_2022),
        "trained": trained(FROZEN_ENCODER),
    }
    expectation = expect(ROLES, catalogs, read, DTYPES["BF16"])
    names = expectation.tensors
    assert len(names) == 686
    assert sum(2 * prod(shape) for shape in names.values()) == 16_710_545_408
    assert names[EMBEDDING] == names[HEAD] == (128320, 4096)
    assert names["multi_modal_projector.linear_1.weight"] == (4096, 1024)
    assert names["multi_modal_projector.linear_2.weight"] == (4096, 4096)
    assert expectation.resized == {EMBEDDING: Resize(), HEAD: Resize()}
    config = side_file(expectation, "config.json")
    assert (config["image_token_index"], config["pad_token_id"]) == (128256, 128257)
    assert config["text_config"]["vocab_size"] == 128320
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (576, -2)
    assert not expectation.warnings
    assert model_of(written(expectation, tmp_path / "out")) == names


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 20},
        {"model_type": "mistral"},
        {"model_type": "qwen2", "tie_word_embeddings": True},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_the_model_it_describes(tmp_path, small, text):
    small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | text)
    expectation = expect(ROLES, small, read, None)
    oracle = model_of(written(expectation, tmp_path / "out"))
    if "tie_word_embeddings" in text:
        assert oracle.pop(HEAD) == oracle[EMBEDDING]
    assert expectation.tensors == oracle


def test_tied(tmp_path, small):
    small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | {"tie_word_embeddings": True})
    expectation = expect(ROLES, small, read, None)
    assert expectation.tied == {HEAD: EMBEDDING}
    assert set(expectation.resized) == {EMBEDDING}
    config = side_file(expectation, "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True


def test_untied(small):
    expectation = expect(ROLES, small, read, None)
    assert expectation.tied == {}
    config = side_file(expectation, "config.json")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def rows_of_xtuner(vocab_size, pad_id):
    """xtuner/model/llava.py, to_huggingface_llava: `pad_shape = 64`, and one less than the highest id needs."""
    added = pad_id - vocab_size
    return -(-(vocab_size + added) // 64) * 64 if added > 0 else vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "tokens", "rows"),
    [
        (32000, 32000, 32064),  # Vicuna
        (32064, 32011, 32064),  # Phi-3: the vocabulary is padded, and the new ids fit
        (32012, 32011, 32064),  # only <image> fits
        (32013, 32011, 32013),  # both just fit
        (32062, 32062, 32064),
        (32063, 32063, 32128),  # <pad> is 32064: XTuner's 32064 rows would be one short
        (131, 131, 192),
    ],
)
def test_rows_are_xtuners_where_those_suffice(tmp_path, small, vocab_size, tokens, rows):
    save_tokenizer(tmp_path / "llm", tokens)
    small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | {"vocab_size": vocab_size})
    expectation = expect(ROLES, small, read, None)
    config = side_file(expectation, "config.json")
    assert (config["image_token_index"], config["pad_token_id"]) == (tokens, tokens + 1)
    assert expectation.tensors[EMBEDDING][0] == config["text_config"]["vocab_size"] == rows
    assert bool(expectation.resized) == (rows != vocab_size)
    theirs = rows_of_xtuner(vocab_size, tokens + 1)
    assert rows == theirs or theirs <= tokens + 1


def test_a_tokenizer_that_has_the_tokens(tmp_path, small):
    save_tokenizer(tmp_path / "llm", 129, added=["<pad>", "<image>"])
    small["llm"] = catalog(tmp_path / "llm")
    expectation = expect(ROLES, small, read, None)
    config = side_file(expectation, "config.json")
    assert (config["pad_token_id"], config["image_token_index"]) == (129, 130)
    assert expectation.resized == {}
    assert expectation.tensors[EMBEDDING] == (131, 48)


# ---- the other names, another LLaVA as a base, a vocabulary of one's own


@pytest.mark.parametrize("names", ["4.52", "5.6"])
def test_names_in_memory(tmp_path, small, names):
    expectation = expect(ROLES, small, read, DTYPES["F32"], options={"names": names})
    folder = written(expectation, tmp_path / "out")
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.AutoConfig.from_pretrained(folder))
    assert {from_4_52(name) for name in expectation.tensors} == set(model.state_dict())
    assert any("vision_model" in name for name in expectation.tensors) == (names == "4.52")
    assert set(expectation.resized) == {"model.language_model.embed_tokens.weight", "lm_head.weight"}
    for component in expectation.components:
        assert any(name.startswith(component.prefix) for name in expectation.tensors)


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ("legacy", "vision_tower.vision_model."),
        ("4.52", "model.vision_tower.vision_model."),
        ("5.6", "model.vision_tower."),
    ],
)
def test_what_a_shorter_siglip_leaves_out(tmp_path, small, names, prefix):
    """LLaVA's own code takes off the last layer and the head, and nothing is written in their place."""
    sizes = {key: SMALL_VISION[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")}
    siglip = transformers.SiglipVisionConfig(num_hidden_layers=3, image_size=28, patch_size=14, **sizes)
    small["vision"] = catalog(tmp_path / "siglip", config=siglip.to_dict())
    own = "model.vision_tower.vision_tower.vision_model.encoder.layers"
    small["trained"] = trained(names=[f"{own}.{index}.layer_norm1.weight" for index in range(2)])
    expectation = expect(ROLES, small, read, None, options={"names": names})
    with torch.device("meta"):
        whole = {name.removeprefix("vision_model.") for name in transformers.SiglipVisionModel(siglip).state_dict()}
    gone = {name for name in whole if name.startswith(("encoder.layers.2.", "head."))}
    assert {name for name in whole if (prefix + name).startswith(tuple(expectation.left_out))} == gone
    assert {prefix + name for name in whole - gone} <= set(expectation.tensors)
    assert not any(name.startswith(tuple(expectation.left_out)) for name in expectation.tensors)


@pytest.mark.parametrize("names", ["legacy", "4.52", "5.6"])
def test_each_layout_loads(tmp_path, small, names):
    save_file = pytest.importorskip("safetensors.torch").save_file
    expectation = expect(ROLES, small, read, DTYPES["F32"], options={"names": names})
    folder = written(expectation, tmp_path / "out")
    weights = {name: torch.full(shape, 0.01) for name, shape in expectation.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _, report = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_an_unknown_layout(small):
    with pytest.raises(TargetError) as caught:
        expect(ROLES, small, read, None, options={"names": "5.7"}, where="m.yaml:3:1")
    assert (caught.value.code, caught.value.where) == ("bad-option", "m.yaml:3:1")


OFFICIAL = SMALL_TEXT | {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_hidden_size": 36, "use_mm_proj": True,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -1,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "image_aspect_ratio": "pad",
}  # fmt: skip


def test_an_official_llava_is_a_text_base(tmp_path, small):
    plain = expect(ROLES, small, read, None)
    small["llm"] = catalog(tmp_path / "llm", config=OFFICIAL)
    expectation = expect(ROLES, small, read, None)
    assert expectation.tensors == plain.tensors
    config = side_file(expectation, "config.json")
    assert config["vision_feature_layer"] == -1
    assert config["text_config"] == side_file(plain, "config.json")["text_config"]


def test_an_official_llava_names_the_encoder_that_is_missing(tmp_path, small):
    base = catalog(tmp_path / "llm", config=OFFICIAL)
    for catalogs in ({"llm": base}, {"llm": base, "vision": base}):
        (problem,) = problems(catalogs)
        assert (problem.code, problem.hint) == ("missing-source", "vision: openai/clip-vit-large-patch14-336")


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu", "ldpnetv2"])
def test_another_projector_of_an_official_llava(tmp_path, small, kind):
    small["llm"] = catalog(tmp_path / "llm", config=OFFICIAL | {"mm_projector_type": kind})
    (problem,) = problems(small)
    assert (problem.code, problem.found) == ("projector-depth", f"mm_projector_type {kind!r}")


@pytest.mark.parametrize(
    ("vocabulary", "rows"),
    [
        (Vocabulary(rows=150), 150),
        (Vocabulary(multiple=100), 200),
        (Vocabulary(new="zeros"), 192),
        (Vocabulary(rows=134, new="copy", row=7, tokens=("<extra>",)), 134),
    ],
)
def test_rows_as_the_mapping_says(small, vocabulary, rows):
    expectation = expect(ROLES, small, read, None, vocabulary=vocabulary)
    assert expectation.tensors[EMBEDDING][0] == expectation.tensors[HEAD][0] == rows
    assert side_file(expectation, "config.json")["text_config"]["vocab_size"] == rows
    assert expectation.resized[HEAD] == Resize(vocabulary.new, vocabulary.row)


def test_tokens_of_the_mapping_come_first(small):
    vocabulary = Vocabulary(tokens=("<a>", "<image>"), pad="</s>")
    expectation = expect(ROLES, small, read, None, vocabulary=vocabulary)
    config = side_file(expectation, "config.json")
    assert (config["image_token_index"], config["pad_token_id"]) == (132, 2)
    added = side_file(expectation, "tokenizer.json")["added_tokens"]
    assert [token["content"] for token in added][-2:] == ["<a>", "<image>"]


@pytest.mark.parametrize("vocabulary", [Vocabulary(rows=132), Vocabulary(rows=133, trim=True)])
def test_rows_that_do_not_do(tmp_path, small, vocabulary):
    if vocabulary.trim:
        small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | {"vocab_size": 200})
        assert expect(ROLES, small, read, None, vocabulary=vocabulary).tensors[EMBEDDING] == (133, 48)
        vocabulary = Vocabulary(rows=133)
    with pytest.raises(TargetError) as caught:
        expect(ROLES, small, read, None, vocabulary=vocabulary)
    assert caught.value.code == "vocabulary-rows"
    assert caught.value.hint.startswith("vocabulary: {rows: 133")


@pytest.mark.parametrize("names", ["legacy", "4.52", "5.6"])
def test_a_llava_that_is_only_renamed_keeps_its_vocabulary(tmp_path, small, names):
    first = written(expect(ROLES, small, read, DTYPES["F32"]), tmp_path / "first")
    hf = catalog(first)
    roles = {"text": "hf", "vision": "hf", "trained": "hf"}
    again = expect(roles, {"hf": hf}, read, None, options={"names": names, "vocabulary": "keep"})
    assert again.resized == {}
    assert len(again.tensors) == len(expect(ROLES, small, read, None).tensors)
    folder = written(again, tmp_path / "again")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "preprocessor_config.json", "processor_config.json"):  # fmt: skip
        assert (folder / file).read_bytes() == (first / file).read_bytes(), file


def test_only_a_llava_has_a_vocabulary_to_keep(small):
    with pytest.raises(TargetError) as caught:
        expect(ROLES, small, read, None, options={"vocabulary": "keep"})
    assert caught.value.code == "bad-option"


# ---- config.json


def test_config_json(small):
    config = side_file(expect(ROLES, small, read, DTYPES["BF16"]), "config.json")
    text, vision = config.pop("text_config"), config.pop("vision_config")
    assert config == {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": 4,
        "image_token_index": 131,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "pad_token_id": 132,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    assert text == SMALL_TEXT | {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 192}
    assert vision == SMALL_VISION | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_without_a_cast_the_dtype_is_the_text_models(tmp_path, small, key):
    base = {name: value for name, value in SMALL_TEXT.items() if name != "torch_dtype"}
    small["llm"] = catalog(tmp_path / "llm", config=base | {key: "torch.float16"})
    config = side_file(expect(ROLES, small, read, None), "config.json")
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float16"
    assert "torch_dtype" not in config["vision_config"]


def test_the_feature_layer_of_the_training(small):
    small["trained"] = trained("model = dict(visual_select_layer=-1)")
    assert side_file(expect(ROLES, small, read, None), "config.json")["vision_feature_layer"] == -1


def test_json_is_the_same_every_time(tmp_path, small):
    first = expect(ROLES, small, read, None)
    assert first == expect(ROLES, small, read, None)
    text = (written(first, tmp_path / "out") / "config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_transformers_reads_the_config_as_it_is_meant(tmp_path, small):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    base = {name: value for name, value in SMALL_TEXT.items() if name != "rope_theta"}
    small["llm"] = catalog(tmp_path / "llm", config=base | {"rope_parameters": rope})
    folder = written(expect(ROLES, small, read, DTYPES["F16"]), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert isinstance(config, transformers.LlavaConfig)
    text = config.text_config
    named = getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta, **text.rope_scaling}
    assert named == rope
    assert (config.image_token_index, config.image_seq_length, text.vocab_size) == (131, 4, 192)
    assert (config.vision_config.hidden_size, config.vision_config.hidden_act) == (36, "quick_gelu")


def test_another_llava_serves_as_a_base(tmp_path, small):
    plain = expect(ROLES, small, read, None)
    whole = {"model_type": "llava", "text_config": SMALL_TEXT, "vision_config": SMALL_VISION}
    base = catalog(tmp_path / "llm", config=whole)
    assert expect(ROLES, small | {"llm": base, "vision": base}, read, None).tensors == plain.tensors


def test_roles_name_the_sources(small):
    roles = {"text": "base", "vision": "tower", "trained": "mine"}
    renamed = {"base": small["llm"], "tower": small["vision"], "mine": trained(FROZEN_ENCODER)}
    assert expect(roles, renamed, read, None).components[1].remedy == "Add `tower: openai/clip-vit-large-patch14-336`"


def test_nothing_is_said_of_how_a_base_was_quantized(tmp_path, small):
    """Only numbers come out of it: tests/test_quantized.py."""
    small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | {"quantization_config": {"bits": 4}})
    expectation = expect(ROLES, small, read, None)
    assert "quantization_config" not in side_file(expectation, "config.json")["text_config"]


# ---- the other files


def test_files_of_the_directory(tmp_path, small):
    for name in ("README.md", "modeling_x.py", "model.gguf", "model.safetensors.index.json", "tekken.json"):
        (tmp_path / "llm" / name).write_text("{}")
    (tmp_path / "llm" / "chat_template.jinja").write_text("{{ messages }}")
    small["llm"] = catalog(tmp_path / "llm")
    names = {file.name for file in expect(ROLES, small, read, None).side_files}
    assert names - {"special_tokens_map.json"} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "preprocessor_config.json", "processor_config.json",
    }  # fmt: skip


def test_generation_config(tmp_path, small):
    generation = side_file(expect(ROLES, small, read, None), "generation_config.json")
    assert generation == {"eos_token_id": [2], "pad_token_id": 132, "temperature": 0.6}
    (tmp_path / "llm" / "generation_config.json").unlink()
    small["llm"] = catalog(tmp_path / "llm")
    generation = side_file(expect(ROLES, small, read, None), "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 132}


def test_no_tokenizer_is_a_warning(tmp_path, small):
    small["llm"] = catalog(tmp_path / "bare", config=SMALL_TEXT)
    expectation = expect(ROLES, small, read, None)
    config = side_file(expectation, "config.json")
    assert (config["image_token_index"], config["pad_token_id"]) == (131, 132)
    (warning, *_) = expectation.warnings
    assert "`<image>` as 131 and `<pad>` as 132" in warning
    assert not any("token" in file.name for file in expectation.side_files)


def test_a_tokenizer_without_tokenizer_json_is_a_warning(tmp_path, small):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(b"\x0a\x05\x0a\x03<s>" * 100)
    small["llm"] = catalog(tmp_path / "slow", config=SMALL_TEXT)
    expectation = expect(ROLES, small, read, None)
    assert "no tokenizer.json" in expectation.warnings[0]
    config = side_file(expectation, "config.json")
    assert (config["image_token_index"], config["pad_token_id"]) == (100, 101)
    assert expectation.resized == {}


PROCESSORS = {
    "none": ({}, True),
    "2022": ({"preprocessor_config": PREPROCESSOR_2022 | {"size": 28, "crop_size": 28}}, False),
    "fast": (
        {
            "preprocessor_config": {
                "image_processor_type": "CLIPImageProcessorFast",
                "size": {"shortest_edge": 28},
                "crop_size": {"height": 28, "width": 28},
            }
        },
        False,
    ),
    "inside, as transformers 5 saves it": (
        {
            "processor_config": {
                "processor_class": "CLIPProcessor",
                "image_processor": {
                    "image_processor_type": "CLIPImageProcessor",
                    "size": {"shortest_edge": 28},
                    "crop_size": {"height": 28, "width": 28},
                },
            }
        },
        False,
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_transformers_processes_text_and_image(tmp_path, small, case):
    pillow = pytest.importorskip("PIL.Image")
    files, warned = PROCESSORS[case]
    small["vision"] = catalog(tmp_path / "vision", **files)
    expectation = expect(ROLES, small, read, None)
    assert bool(expectation.warnings) is warned
    folder = written(expectation, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaProcessor"
    assert type(processor.image_processor).__name__.startswith("CLIPImageProcessor")
    batch = processor(images=pillow.new("RGB", (50, 40)), text="t5 <image> t6", return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert batch["input_ids"].tolist() == [[5, 131, 131, 131, 131, 6]]
    assert processor.tokenizer.pad_token_id == 132


def test_the_written_directory_runs(tmp_path, small):
    """Random weights under the expected names load without a missing or unexpected key, and the model answers."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    expectation = expect(ROLES, small, read, DTYPES["F32"])
    folder = written(expectation, tmp_path / "out")
    weights = {name: torch.full(shape, 0.01) for name, shape in expectation.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    ids = torch.tensor([[5, 131, 131, 131, 131, 6]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 28, 28)).logits
    assert logits.shape == (1, 6, 192)


# ---- what it refuses, and how it says so


def test_a_frozen_encoder_without_a_source(small):
    (problem,) = problems({"llm": small["llm"], "trained": trained(FROZEN_ENCODER)})
    assert isinstance(problem, TargetError)
    assert problem.code == "missing-source"
    assert problem.what == (
        "391 tensors of vision_tower.* have no source: the checkpoint was trained with the visual encoder frozen. "
        "Add `vision: openai/clip-vit-large-patch14-336`"
    )
    assert problem.hint == "vision: openai/clip-vit-large-patch14-336"


def test_a_source_without_config(tmp_path, small):
    small["vision"] = catalog(tmp_path / "weights only")
    (problem,) = problems(small)
    assert (problem.code, problem.where) == ("missing-source", str(tmp_path / "weights only"))
    assert "`vision` has no config.json" in problem.what
    assert problem.hint.startswith("vision: <")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("/data/models/clip-336", "vision: /data/models/clip-336"),
        ("./clip", "vision: ./clip"),
        (r"D:\models\clip", r'vision: "D:\\models\\clip"'),
        ("a: b # c\n- d", r'vision: "a: b # c\n- d"'),
    ],
)
def test_the_line_to_paste_is_yaml(small, path, line):
    yaml = pytest.importorskip("yaml")
    text = f"model = dict(visual_encoder=dict(pretrained_model_name_or_path={path!r}))"
    (problem,) = problems({"llm": small["llm"], "trained": trained(text)})
    assert problem.hint == line
    assert yaml.safe_load(line) == {"vision": path}


def test_everything_that_is_wrong_is_said_at_once():
    text = FROZEN_ENCODER.replace("freeze_llm=False", "llm_lora=dict(r=64), projector_depth=3")
    found = problems({"trained": trained(text)})
    assert [problem.code for problem in found] == ["projector-depth", "missing-source", "missing-source"]
    assert found[0].where == "work_dirs/iter_2.pth"
    assert "projector_depth 3" in found[0].found


def test_both_configs_are_looked_at(tmp_path, small):
    small["llm"] = catalog(tmp_path / "llm", config=SMALL_TEXT | {"model_type": "phi"})
    small["vision"] = catalog(tmp_path / "vision", config=SMALL_VISION | {"model_type": "siglip2_vision_model"})
    assert [problem.where for problem in problems(small)] == [
        str(tmp_path / "llm" / "config.json"),
        str(tmp_path / "vision" / "config.json"),
    ]


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", '{"a": ' + "[" * 100_000, '"\ud800"'], ids=range(6))
def test_a_config_that_is_no_config(tmp_path, small, text):
    (tmp_path / "llm" / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    small["llm"] = catalog(tmp_path / "llm")
    (problem,) = problems(small)
    assert (problem.code, problem.where) == ("bad-json", str(tmp_path / "llm" / "config.json"))


def test_components_say_why_tensors_are_missing(small):
    language, vision, projector = expect(ROLES, small | {"trained": trained(FROZEN_ENCODER)}, read, None).components
    assert (vision.prefix, vision.reason, vision.remedy) == (
        "vision_tower.",
        "the checkpoint was trained with the visual encoder frozen",
        "Add `vision: openai/clip-vit-large-patch14-336`",
    )
    assert (language.reason, language.remedy) == ("", "Add `llm: meta-llama/Meta-Llama-3-8B-Instruct`")
    assert "`trained`" in projector.remedy


def test_components_without_a_training_config(small):
    del small["trained"]
    language, vision, _ = expect(ROLES, small, read, None).components
    assert language.remedy == "Add `llm: <directory or hub id of the pretrained language model>`"
    assert vision.reason == ""
