"""Targets of language models and CLIPs: their configs against the tools' own, their names against the models."""

import json
from pathlib import Path

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ShardmergeError
from shardmerge.targets import any_model, clip_model, foreign_configs, internvl, language_model, meta_llama
from shardmerge.targets.expectation import Request, Resize, Vocabulary
from shardmerge.targets.llava import hf as llava
from tests.target_files import catalog, content, read, save_tokenizer, side_file, written

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safe_open = pytest.importorskip("safetensors").safe_open

LAYOUTS = Path(__file__).parent / "golden" / "layouts"

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 112, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def request(catalogs, dtype=None, vocabulary=None, roles=None, **options):
    return Request(roles or {}, options, catalogs, read, dtype, vocabulary)


def truth(case):
    """The tensors that the tool's own conversion made, and its config.json."""
    with safe_open(LAYOUTS / case / "truth" / "model.safetensors", "pt") as file:
        names = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return names, LAYOUTS / case / "truth"


def source(case, tensors=(), facts=None):
    return catalog(LAYOUTS / case / "source", tensors, facts)


def model_names(kind, folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind(config).state_dict().items()}


def saved_names(folder, out):
    """What transformers saves of the model of a config: experts have other names there than in memory."""
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(out)
    with safe_open(out / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# Fields that only tell of the run that wrote the config, or of how it was read.
OWN = dict.fromkeys(("_name_or_path", "transformers_version", "dtype", "architectures"))


def assert_same_config(ours, theirs):
    """Both as transformers reads them, so that defaults and old spellings do not matter."""
    ours = transformers.AutoConfig.from_pretrained(ours).to_dict()
    theirs = transformers.AutoConfig.from_pretrained(theirs).to_dict()
    assert ours | OWN == theirs | OWN


# ---- hf/llama

META = [path.name for path in sorted(LAYOUTS.glob("meta_*"))]
LITGPT = [path.name for path in sorted(LAYOUTS.glob("litgpt_*"))]


def meta_tensors(case):
    """Rows of Meta's matrices over the vocabulary, as in the golden files."""
    sizes = json.loads((LAYOUTS / case / "case.json").read_text())["sizes"]
    ranks, vocabulary = sizes["tensor_parallel"], sizes["vocab"]
    tensors = {f"{rank:02}.output.weight": (vocabulary // ranks, sizes["hidden"]) for rank in range(ranks)}
    return tensors | {f"{rank:02}.tok_embeddings.weight": (1, 1) for rank in range(ranks)}, sizes


@pytest.mark.parametrize("case", META)
def test_from_metas_params(tmp_path, case):
    tensors, sizes = meta_tensors(case)
    meta = source(case, tensors, {"embedding_dim": sizes["embedding_split_dim"]})
    expectation = language_model.expect(request({"meta": meta}, roles={"text": "meta"}))
    names, theirs = truth(case)
    assert expectation.tensors == names
    assert_same_config(written(expectation, tmp_path / "out"), theirs)


@pytest.mark.parametrize("case", LITGPT)
def test_from_litgpts_model_config(tmp_path, case):
    expectation = language_model.expect(request({"lit": source(case)}, roles={"text": "lit"}))
    names, theirs = truth(case)
    assert expectation.tensors == names
    assert_same_config(written(expectation, tmp_path / "out"), theirs)


def test_from_a_phi_3(tmp_path):
    """The judge is the model: split by hand, the weights load into the LLaMA of our config."""
    names, theirs = truth("torchtune_phi3_gqa")
    expectation = language_model.expect_llama(request({"phi": catalog(theirs)}, roles={"text": "phi"}))
    folder = written(expectation, tmp_path / "out")
    assert expectation.tensors == model_names(transformers.LlamaForCausalLM, folder)
    config = side_file(expectation, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"embd_pdrop", "resid_pdrop", "auto_map", "sliding_window"} & config.keys()
    assert not expectation.warnings
    kept = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.o_proj.weight")
    assert {name: names[name] for name in kept} == {name: expectation.tensors[name] for name in kept}


def test_a_phi_3_that_looks_back_a_little(tmp_path):
    base = json.loads((LAYOUTS / "torchtune_phi3_gqa" / "truth" / "config.json").read_text())
    phi = catalog(tmp_path / "phi", config=base | {"sliding_window": 2047})
    (warning,) = language_model.expect_llama(request({"text": phi})).warnings
    assert "2047 tokens" in warning
    partial = catalog(tmp_path / "partial", config=base | {"partial_rotary_factor": 0.75})
    with pytest.raises(ShardmergeError) as caught:
        language_model.expect_llama(request({"text": partial}))
    assert caught.value.code == "unsupported-architecture"


MEGATRON = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "group_query_attention": True,
    "ffn_hidden_size": 96, "rotary_base": 500000, "norm_epsilon": 1e-5, "padded_vocab_size": 128, "kv_channels": 8,
    "untie_embeddings_and_output_weights": True, "normalization": "RMSNorm", "max_position_embeddings": 256,
    "swiglu": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"vocab_size": 112}, {"vocab_size": 112}),
        ({"untie_embeddings_and_output_weights": False}, {"tie_word_embeddings": True}),
        ({"group_query_attention": False}, {"num_key_value_heads": 4}),
        ({"add_qkv_bias": True}, {"model_type": "qwen2"}),
        ({"kv_channels": 16}, {"head_dim": 16}),
        ({"qk_layernorm": True}, {"model_type": "qwen3"}),
        ({"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 3},
         {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 24, "num_experts_per_tok": 3}),
        ({"num_experts": 4, "moe_ffn_hidden_size": None}, {"model_type": "mixtral", "intermediate_size": 96}),
        ({"num_experts": 4, "qk_layernorm": True, "moe_ffn_hidden_size": 24},
         {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": True}),
    ],
)  # fmt: skip
def test_from_megatrons_arguments(tmp_path, changes, expected):
    megatron = catalog(tmp_path / "megatron", facts=MEGATRON | changes)
    # `base` is not there, and the checkpoint is the only source that describes itself.
    expectation = language_model.expect(request({"megatron": megatron}, DTYPES["BF16"], roles={"text": "base"}))
    config = side_file(expectation, "config.json")
    wanted = {"hidden_size": 32, "num_key_value_heads": 2, "rope_theta": 500000.0, "vocab_size": 128,
              "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
    for key, value in (wanted | expected).items():
        assert config[key] == value
    if config["tie_word_embeddings"]:
        assert expectation.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert expectation.tensors == saved_names(written(expectation, tmp_path / "out"), tmp_path / "oracle")


@pytest.mark.parametrize(
    ("facts", "base", "said"),
    [
        ({"make_vocab_size_divisible_by": 64, "tensor_model_parallel_size": 2}, 112, "rows 112 to 127"),
        ({"make_vocab_size_divisible_by": 32, "tensor_model_parallel_size": 1}, 90, "padded 90 tokens to 96"),
        ({}, 112, "rows 112 to 127"),
        ({"vocab_size": 112}, None, "rows 112 to 127"),
        ({}, None, "keeps its 128 rows"),
        ({"vocab_size": 128}, None, ""),
        ({}, 128, ""),
    ],
)
def test_what_is_said_of_megatrons_padding(tmp_path, facts, base, said):
    catalogs = {"megatron": catalog(tmp_path / "megatron", facts=MEGATRON | {"rotary_base": 10000} | facts)}
    if base:
        catalogs["base"] = catalog(tmp_path / "base", config=LLAMA | {"vocab_size": base})
    warnings = language_model.expect(request(catalogs, roles={"text": "base"})).warnings
    assert [text for text in warnings if said and said in text] == list(warnings)
    assert bool(warnings) == bool(said)
    trimmed = language_model.expect(request(catalogs, None, Vocabulary(rows=100, trim=True), {"text": "base"}))
    assert trimmed.warnings == ()
    assert trimmed.tensors["model.embed_tokens.weight"] == (100, 32)


@pytest.mark.parametrize(
    ("params", "rows", "expected"),
    [
        ({"n_layers": 32, "dim": 4096, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}, 32000,
         {"intermediate_size": 11008, "max_position_embeddings": 2048, "num_key_value_heads": 32}),  # LLaMA 7B
        ({"n_layers": 80, "dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3,
          "norm_eps": 1e-5, "vocab_size": -1}, 32000,
         {"intermediate_size": 28672, "max_position_embeddings": 4096, "eos_token_id": 2}),  # Llama 2 70B
        ({"n_layers": 32, "dim": 4096, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 1024, "ffn_dim_multiplier": 1.3,
          "norm_eps": 1e-5, "rope_theta": 5e5, "vocab_size": 128256}, 0,
         {"intermediate_size": 14336, "max_position_embeddings": 8192, "bos_token_id": 128000}),  # Llama 3 8B
        ({"n_layers": 16, "dim": 2048, "n_heads": 32, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.5,
          "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True, "vocab_size": 128256}, 0,
         {"intermediate_size": 8192, "max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192}}),  # Llama 3.2 1B
        ({"n_layers": 48, "dim": 8192, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
          "norm_eps": 1e-5, "rope_theta": 1e6, "vocab_size": 32016}, 0,
         {"intermediate_size": 22016, "max_position_embeddings": 16384}),  # Code Llama 34B
    ],
    ids=["1-7B", "2-70B", "3-8B", "3.2-1B", "code-34B"],
)  # fmt: skip
def test_params_of_published_models(params, rows, expected):
    """The numbers of the config.json that each has on the hub."""
    config = foreign_configs.from_params(params, rows, tied=False, where="params.json")
    assert {key: config[key] for key in expected} == expected


def test_tokenizer_and_vocabulary(tmp_path):
    save_tokenizer(tmp_path / "tok", 110)
    catalogs = {"text": catalog(tmp_path / "text", config=LLAMA), "tokenizer": catalog(tmp_path / "tok")}
    plain = language_model.expect(request(catalogs))
    assert plain.resized == {}
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in plain.side_files}
    vocabulary = Vocabulary(multiple=64, new="normal", seed=3, tokens=("<a>", "<b>", "<c>"), pad="<c>")
    expectation = language_model.expect(request(catalogs, vocabulary=vocabulary))
    resize = Resize("normal", 0, 3)
    assert expectation.resized == {"model.embed_tokens.weight": resize, "lm_head.weight": resize}
    assert expectation.tensors["lm_head.weight"] == (128, 32)
    folder = written(expectation, tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(folder).vocab_size == 128
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>"]) == [110, 111, 112]
    assert tokenizer.pad_token == "<c>"


def test_a_tiktoken_file_is_not_copied(tmp_path):
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    meta = catalog(folder, params={"dim": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 112, "norm_eps": 1e-5})
    expectation = language_model.expect(request({"text": meta}, context="999"))
    assert "tokenizer.model" not in {file.name for file in expectation.side_files}
    assert "not copied" in expectation.warnings[0]
    assert side_file(expectation, "config.json")["max_position_embeddings"] == 999


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({}, "missing-source"),
        ({"config": LLAMA | {"model_type": "gpt2"}}, "unsupported-architecture"),
        ({"params": {"dim": 0}}, "odd-config"),
    ],
)
def test_no_description(tmp_path, files, code):
    with pytest.raises(ShardmergeError) as caught:
        language_model.expect(request({"text": catalog(tmp_path / "t", **files)}))
    assert caught.value.code == code


@pytest.mark.parametrize(
    "text", ["- a\n", "a: [", "!!python/object/apply:os.system [true]", "norm_class_name: LayerNorm"]
)
def test_a_bad_model_config(tmp_path, text):
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit" / "model_config.yaml").write_text(text)
    with pytest.raises(ShardmergeError) as caught:
        language_model.expect(request({"text": catalog(tmp_path / "lit")}))
    assert caught.value.code in ("bad-yaml", "unsupported-architecture")


# ---- meta/llama


@pytest.mark.parametrize("case", META)
def test_metas_files(case):
    """Our cut of the truth is the source that it was made of."""
    load = pytest.importorskip("torch").load
    sizes = json.loads((LAYOUTS / case / "case.json").read_text())["sizes"]
    options = {"ranks": str(sizes["tensor_parallel"]), "embedding_dim": str(sizes["embedding_split_dim"])}
    _, theirs = truth(case)
    expectation = meta_llama.expect(request({"text": catalog(theirs)}, **options))
    files = sorted((LAYOUTS / case / "source").glob("*.pth"))
    oracle = {
        f"{path.stem[-2:]}.{name}": tuple(tensor.shape)
        for path in files
        for name, tensor in load(path, weights_only=True).items()
        if name != "rope.freqs"
    }
    assert expectation.tensors == oracle
    groups = [(group.prefix, group.stem + group.suffix, group.sharded) for group in expectation.groups]
    assert groups == [(f"{path.stem[-2:]}.", path.name, False) for path in files]
    ours = side_file(expectation, "params.json")
    source_params = json.loads((LAYOUTS / case / "source" / "params.json").read_text())
    for key in ("dim", "n_heads", "n_layers", "norm_eps"):
        assert ours[key] == source_params[key]
    assert foreign_configs.intermediate_size(ours, sizes["hidden"], "") == sizes["intermediate"]


@pytest.mark.parametrize(
    ("hidden", "inner"),
    [(4096, 11008), (4096, 14336), (8192, 28672), (2048, 8192), (3072, 8192), (16384, 53248), (48, 77)],
)
def test_the_feed_forward_width_survives(tmp_path, hidden, inner):
    config = LLAMA | {"hidden_size": hidden, "intermediate_size": inner, "rope_theta": 5e5}
    params = side_file(meta_llama.expect(request({"text": catalog(tmp_path / "t", config=config)})), "params.json")
    assert foreign_configs.intermediate_size(params, hidden, "") == inner
    assert params["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({}, {"ranks": "4"}, "odd-ranks"),
        ({}, {"ranks": "zero"}, "bad-option"),
        ({}, {"embedding_dim": "2"}, "bad-option"),
        ({"attention_bias": True}, {}, "unsupported-architecture"),
        ({"head_dim": 16}, {}, "unsupported-architecture"),
        ({"model_type": "qwen3", "head_dim": 8}, {}, "unsupported-architecture"),
        ({"model_type": "mixtral", "num_local_experts": 2}, {}, "unsupported-architecture"),
    ],
)
def test_what_meta_cannot_hold(tmp_path, changes, options, code):
    with pytest.raises(ShardmergeError) as caught:
        meta_llama.expect(request({"text": catalog(tmp_path / "t", config=LLAMA | changes)}, **options))
    assert caught.value.code == code


# ---- hf/clip and hf/clip-vision


@pytest.mark.parametrize("case", ["open_clip_published", "open_clip_trained"])
def test_from_open_clip(tmp_path, case):
    expectation = clip_model.expect_model(request({"clip": source(case)}, roles={"config": "clip"}))
    names, theirs = truth(case)
    assert expectation.tensors == names
    folder = written(expectation, tmp_path / "out")
    ours = transformers.AutoConfig.from_pretrained(folder)
    oracle = transformers.AutoConfig.from_pretrained(theirs)
    for part in ("text_config", "vision_config"):
        wanted = getattr(oracle, part).to_dict() | OWN
        assert {key: wanted[key] for key in getattr(ours, part).to_dict()} == getattr(ours, part).to_dict() | OWN
    assert ours.projection_dim == oracle.projection_dim
    processor = side_file(expectation, "preprocessor_config.json")
    assert (processor["size"], processor["resample"]) == ({"shortest_edge": 28}, 3)


def test_a_whole_clip_and_its_vision_tower(tmp_path):
    names, theirs = truth("open_clip_published")
    whole = clip_model.expect_model(request({"config": catalog(theirs)}, DTYPES["F16"]))
    assert whole.tensors == names
    tower = clip_model.expect_vision(request({"vision": catalog(theirs)}, DTYPES["F16"]))
    assert tower.tensors == {name: shape for name, shape in names.items() if name.startswith("vision_model.")}
    config = transformers.CLIPVisionConfig.from_pretrained(written(tower, tmp_path / "out"))
    assert (config.hidden_size, config.hidden_act, config.architectures) == (32, "quick_gelu", ["CLIPVisionModel"])
    assert "no preprocessor_config.json" in tower.warnings[0]


@pytest.mark.parametrize(
    "change", [{"timm_model_name": "vit"}, {"layers": [3, 4, 6, 3]}, {"ls_init_value": 0.1}, {"patch_size": 0}]
)
def test_another_model_of_open_clip(tmp_path, change):
    config = json.loads((LAYOUTS / "open_clip_published" / "source" / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= change
    with pytest.raises(ShardmergeError) as caught:
        clip_model.expect_model(request({"config": catalog(tmp_path / "c", open_clip_config=config)}))
    assert caught.value.code in ("unsupported-architecture", "odd-config")


def test_no_clip(tmp_path):
    with pytest.raises(ShardmergeError) as caught:
        clip_model.expect_model(request({"config": catalog(tmp_path / "c")}))
    assert caught.value.code == "missing-source"
    with pytest.raises(ShardmergeError) as caught:
        clip_model.expect_model(
            request({"config": catalog(tmp_path / "c", config={"model_type": "clip_vision_model"})})
        )
    assert caught.value.code == "unsupported-architecture"


# ---- hf/model


def test_any_other_model(tmp_path):
    save_tokenizer(tmp_path / "m", 90)
    config = {"model_type": "gpt_neox", "vocab_size": 96, "hidden_size": 8, "dtype": "float32"}
    tensors = {"gpt_neox.embed_in.weight": (96, 8), "embed_out.weight": (96, 8), "gpt_neox.layers.0.x.weight": (96, 8)}
    base = catalog(tmp_path / "m", tensors, config=config)
    plain = any_model.expect(request({"text": base}))
    assert plain.open
    assert plain.tensors == plain.resized == {}
    assert content(plain.side_files[0]) == (tmp_path / "m" / "config.json").read_bytes()
    cast = any_model.expect(request({"text": base}, DTYPES["BF16"]))
    assert side_file(cast, "config.json") == config | {"dtype": "bfloat16"}
    wider = any_model.expect(request({"text": base}, vocabulary=Vocabulary(multiple=64, tokens=("<x>",))))
    assert wider.tensors == {"gpt_neox.embed_in.weight": (128, 8), "embed_out.weight": (128, 8)}
    assert side_file(wider, "config.json")["vocab_size"] == 128
    assert side_file(wider, "tokenizer.json")["added_tokens"][-1]["id"] == 90
    names = [file.name for file in wider.side_files]
    assert len(names) == len(set(names))


# ---- hf/llava-next

NEXT_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 36, "intermediate_size": 53, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 28, "patch_size": 14,
}  # fmt: skip


@pytest.mark.parametrize("names", ["legacy", "4.52", "5.6"])
def test_llava_next_loads_and_runs(tmp_path, names):
    pillow = pytest.importorskip("PIL.Image")
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_tokenizer(tmp_path / "llava", 110)
    official = LLAMA | {
        "model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[28, 56], [56, 28]], "mm_vision_select_layer": -2,
    }  # fmt: skip
    catalogs = {
        "llava": catalog(tmp_path / "llava", config=official),
        "vision": catalog(tmp_path / "vision", config=NEXT_VISION),
    }
    roles = {"trained": "llava", "text": "llava", "vision": "vision"}
    expectation = llava.NEXT_TARGET.expect(request(catalogs, DTYPES["F32"], roles=roles, names=names))
    newline = "image_newline" if names == "legacy" else "model.image_newline"
    assert expectation.tensors[newline] == (32,)
    folder = written(expectation, tmp_path / "out")
    weights = {name: torch.full(shape, 0.01) for name, shape in expectation.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = transformers.LlavaNextForConditionalGeneration
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "LlavaNextProcessor"
    batch = processor(images=pillow.new("RGB", (50, 30)), text="t5 <image> t6", return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.shape[-1] == 112
    assert model.config.image_grid_pinpoints == [[28, 56], [56, 28]]


# ---- hf/internvl

VIT = {
    "model_type": "intern_vit_6b", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 28, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
    "norm_type": "layer_norm", "use_flash_attn": True, "drop_path_rate": 0.1,
}  # fmt: skip
# Names in memory from 4.52 on, and in the files of every version; first match wins.
INTERNVL = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)


@pytest.mark.parametrize(
    ("text", "vit"),
    [
        (LLAMA | {"model_type": "qwen2"}, {}),
        (LLAMA | {"model_type": "internlm2", "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, {}),
        (LLAMA | {"model_type": "internlm2", "bias": False}, {"qkv_bias": False, "norm_type": "rms_norm"}),
        (LLAMA, {"qk_normalization": True}),
    ],
    ids=["qwen2", "internlm2", "6B", "qk"],
)
def test_internvl(tmp_path, text, vit):
    save_file = pytest.importorskip("safetensors.torch").save_file
    whole = {"model_type": "internvl_chat", "llm_config": text, "vision_config": VIT | vit, "downsample_ratio": 0.5,
             "force_image_size": 28, "select_layer": -1, "torch_dtype": "bfloat16"}  # fmt: skip
    base = catalog(tmp_path / "internvl", config=whole)
    expectation = internvl.expect(request({"config": base}, DTYPES["F32"], image_token_id="99"))
    folder = written(expectation, tmp_path / "out")
    oracle = {}
    for name, shape in model_names(transformers.InternVLForConditionalGeneration, folder).items():
        runtime, stored = next(pair for pair in INTERNVL if name.startswith(pair[0]))
        oracle[stored + name.removeprefix(runtime)] = shape
    assert expectation.tensors == oracle
    weights = {name: torch.full(shape, 0.01) for name, shape in expectation.tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = transformers.InternVLForConditionalGeneration
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (model.config.image_token_id, model.config.image_seq_length) == (99, 1)


def test_no_internvl(tmp_path):
    with pytest.raises(ShardmergeError) as caught:
        internvl.expect(request({"config": catalog(tmp_path / "c", config=LLAMA)}))
    assert caught.value.code == "unsupported-architecture"
