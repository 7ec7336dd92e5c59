"""No architecture by default: what a config says of the arithmetic is understood, or refused by its name.

Small models of transformers are the judge. A LLaVA over Gemma has the names and shapes of one over LLaMA, and computes
something else; so has a config with a multiplier that the class to be written does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

import shardmerge as sm
from shardmerge.errors import ShardmergeError, TargetError
from shardmerge.targets import clip_model, internvl, language_model, meta_llama
from shardmerge.targets.expectation import Request, Vocabulary
from shardmerge.targets.llava import hf as llava
from shardmerge.targets.llava import official as llava_official
from shardmerge.targets.llava import xtuner as llava_xtuner
from shardmerge.targets.llava.official_config import language_part
from shardmerge.targets.settings import refuse_unknown
from tests.conftest import GOLDEN
from tests.target_files import catalog, read, save_tokenizer, side_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

LAYOUTS = GOLDEN / "layouts"

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
EYE = {
    "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
LLAMA = SIZES | {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
OFFICIAL = LLAMA | {
    "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "some/clip",
    "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 24, "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}  # fmt: skip
NEXT = OFFICIAL | {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres"}


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved, so that no two are alike and no norm is one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def write(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> Path:
    folder.mkdir()
    safetensors.save_file(
        {name: one.contiguous().clone() for name, one in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return folder


def projector() -> dict[str, torch.Tensor]:
    shapes = {"0.weight": (32, 24), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    generator = torch.Generator().manual_seed(2)
    return {f"model.mm_projector.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def official_over(folder: Path, model: torch.nn.Module, **changes: object) -> Path:
    """A LLaVA of LLaVA's own code over a language model."""
    mm = {key: value for key, value in OFFICIAL.items() if key.startswith("mm_")}
    made = write(folder, model.state_dict() | projector(), model.config.to_dict() | mm | changes)
    save_tokenizer(made, 60)
    return made


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eye") / "clip"
    torch.manual_seed(0)
    shaken(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**EYE))).save_pretrained(folder)
    return folder


def refusal(call: object) -> str:
    """The text of the refusal of a call that takes no arguments."""
    with pytest.raises(ShardmergeError) as caught:
        call()  # type: ignore[operator]
    (problem,) = caught.value.each()
    assert problem.code in ("unsupported-architecture", "odd-config", "projector-depth"), problem
    return str(problem)


# ---- the language model inside of a LLaVA

# Qwen2 is `qwen` to LLaVA's own code.
KNOWN = {
    family: f"llava_{family.lower()}" for family in ("Llama", "Mistral", "Gemma", "Granite", "Olmo2", "Phi3", "Qwen3")
} | {"Qwen2": "llava_qwen"}
CLASSES = {family: f"Llava{family}ForCausalLM" for family in KNOWN} | {"Qwen2": "LlavaQwenForCausalLM"}
# Names and shapes of a LLaMA, wholly or nearly.
RELATIVES = ("Cohere", "StableLm", "Starcoder2", "Helium", "Arcee", "SmolLM3")


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("named", ["model_type", "architectures"])
def test_a_known_family_computes_what_it_did(family: str, named: str, clip: Path, tmp_path: Path) -> None:
    """``llava`` is what XTuner and LLaVA-NeXT write over any language model: then the class tells."""
    torch.manual_seed(0)
    model = shaken(
        getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, rope_theta=5e4))
    )
    stated = {"model_type": KNOWN[family] if named == "model_type" else "llava", "architectures": [CLASSES[family]]}
    source = official_over(tmp_path / "llava", model, **stated)
    out = sm.convert(source, tmp_path / "out", use="llava/official-to-hf", bases={"vision": str(clip)}).path
    made = transformers.LlavaForConditionalGeneration.from_pretrained(out).eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.allclose(made(input_ids=ids).logits[..., :64], model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", RELATIVES)
@pytest.mark.parametrize("spelt", ["llava_{}", "llava", "llava_llama", "{}"])
def test_any_other_family_is_refused_by_its_name(family: str, spelt: str) -> None:
    """Whatever `model_type` says, the class that is named has to agree with it."""
    config = getattr(transformers, f"{family}Config")().to_dict()
    config |= {key: value for key, value in OFFICIAL.items() if key.startswith("mm_")}
    config |= {"model_type": spelt.format(family.lower()), "architectures": [f"Llava{family}ForCausalLM"]}
    assert family.lower() in refusal(lambda: language_part(config, "config.json")).lower()


@pytest.mark.parametrize("family", [one for one in KNOWN if one != "Llama"])
def test_a_class_of_another_family_than_the_model_type_of_llava(family: str) -> None:
    config = getattr(transformers, f"{family}Config")().to_dict()
    config |= {"model_type": "llava_llama", "architectures": [CLASSES[family]], "mm_vision_tower": "x"}
    assert CLASSES[family] in refusal(lambda: language_part(config, "config.json"))


@pytest.mark.parametrize("config", [{"model_type": "llava"}, {"mm_vision_tower": "x"}, {"model_type": ["llava_llama"]}])
def test_who_says_nothing_is_no_llama(config: dict[str, object]) -> None:
    assert "model_type" in refusal(lambda: language_part(SIZES | {"mm_hidden_size": 1} | config, "config.json"))


def test_the_hint_for_a_silent_config_leads_on() -> None:
    silent = OFFICIAL | {"model_type": "llava", "architectures": None}
    told = refusal(lambda: language_part(silent, "config.json")).partition("add to config.json: ")[2]
    said = json.loads("{" + told.partition(", or")[0] + "}")
    assert language_part(silent | said, "config.json")["model_type"] == "llama"


# Settings of relatives, as their published configs have them.
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.0078125, "residual_multiplier": 0.22, "logits_scaling": 8.0,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
    "logit_scale": 0.0625, "use_qk_norm": True, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
    "num_local_experts": 8, "partial_rotary_factor": 0.5, "clip_qkv": 8.0, "no_rope_layers": [1, 1, 0],
    "parallel_attn": True,
}  # fmt: skip


@pytest.mark.parametrize("key", MULTIPLIERS)
def test_a_setting_that_the_class_does_not_know_is_refused_by_its_name(key: str) -> None:
    odd = OFFICIAL | {key: MULTIPLIERS[key]}
    said = refusal(lambda: language_part(odd, "config.json"))
    assert f"`{key}`" in said
    # The hint, followed: without the setting it is a plain model.
    assert language_part({name: odd[name] for name in odd if name != key}, "config.json")["model_type"] == "llama"


@pytest.mark.parametrize("value", [None, False, 0, 1.0, "", [], {}, "a note"])
def test_an_idle_setting_is_no_matter(value: object) -> None:
    assert language_part(OFFICIAL | {"embedding_multiplier": value}, "config.json")


@pytest.mark.parametrize("family", KNOWN)
def test_all_that_transformers_writes_is_known(family: str) -> None:
    """With every key at a value that counts, or the test would not see one that is missing."""
    config = dict.fromkeys(getattr(transformers, f"{family}Config")(**SIZES).to_dict(), 7)
    refuse_unknown(config, family.lower(), (), "config.json")


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("llama", "GraniteForCausalLM"), ("mistral", "MixtralForCausalLM"), ("qwen2", "Qwen2MoeForCausalLM")],
)
def test_a_class_of_another_family_than_the_model_type(model_type: str, named: str, tmp_path: Path) -> None:
    text = catalog(tmp_path / "m", config=LLAMA | {"model_type": model_type, "architectures": [named]})
    assert named in refusal(lambda: language_model.expect(Request({}, {}, {"text": text}, read)))


# ---- between image and language model


def expect_llava(tmp_path: Path, config: Mapping[str, object], target: object = llava.TARGET, **options: str) -> object:
    catalogs = {"llm": catalog(tmp_path / "llm", config=config), "vision": catalog(tmp_path / "vision", config=EYE)}
    return target.expect(Request({}, options, catalogs, read))  # type: ignore[attr-defined]


WIRINGS = {
    "mm_projector_type": "mlp2x_silu", "mm_vision_select_feature": "slicefour_patch", "mm_vision_select_layer": "-2",
    "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "mm_resampler_type": "spatial_pool",
    "mm_vision_tower": "google/siglip-so400m-patch14-384", "s2": True, "mm_dense_connector_type": "dci",
    "use_mm_proj": False,
}  # fmt: skip


@pytest.mark.parametrize("key", WIRINGS)
def test_a_wiring_that_a_llava_1_5_has_not_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    assert expect_llava(tmp_path / "plain", OFFICIAL) if (tmp_path / "plain").mkdir() is None else None
    said = refusal(lambda: expect_llava(tmp_path, OFFICIAL | {key: WIRINGS[key]}))
    assert key in said
    assert str(WIRINGS[key]) in said


@pytest.mark.parametrize(
    "tower", ["EVA02-CLIP-L", "OpenGVLab/InternViT-300M-448px", "facebook/dinov2-large", "a/convnext/"]
)
def test_an_encoder_that_is_no_clip(tower: str, tmp_path: Path) -> None:
    assert tower in refusal(lambda: expect_llava(tmp_path, OFFICIAL | {"mm_vision_tower": tower}))


def test_the_layer_that_nobody_says_is_said(tmp_path: Path) -> None:
    silent = {key: value for key, value in OFFICIAL.items() if key != "mm_vision_select_layer"}
    assert any("mm_vision_select_layer" in one for one in expect_llava(tmp_path, silent).warnings)  # type: ignore[attr-defined]


def test_another_published_clip_than_the_one_of_the_training_is_said(tmp_path: Path) -> None:
    other = OFFICIAL | {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    assert any("clip-vit-large-patch14-336" in one for one in expect_llava(tmp_path, other).warnings)  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", ["projector_hidden_act", "multimodal_projector_bias"])
def test_llavas_own_code_has_one_kind_of_projector(key: str, tmp_path: Path) -> None:
    whole = {"model_type": "llava", "text_config": LLAMA, "vision_config": EYE, "image_token_index": 63}
    whole |= {key: "relu" if key == "projector_hidden_act" else False}
    source = catalog(tmp_path / "hf", config=whole)
    roles = {"trained": "hf", "text": "hf", "vision": "hf"}
    with pytest.raises(TargetError) as caught:
        llava_official.expect(Request(roles, {"tower": "true"}, {"hf": source}, read))
    assert (caught.value.code, key in caught.value.found) == ("projector-kind", True)


# ---- LLaVA-NeXT and the other LLaVAs of transformers


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlavaNextConfig(
        text_config=LLAMA, vision_config=EYE, image_token_index=61, image_grid_pinpoints=[[28, 56], [56, 28]]
    )
    folder = tmp_path_factory.mktemp("next") / "next"
    shaken(transformers.LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    save_tokenizer(folder, 61)
    return folder


def next_logits(folder: Path) -> torch.Tensor:
    kind = transformers.LlavaNextForConditionalGeneration
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    # One base tile and two more, of 4 patches each, with a newline behind each row of the unpadded ones.
    sizes, pixels = torch.tensor([[28, 56]]), torch.randn(1, 3, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, *[61] * (4 + 2 * (4 + 1)), 2]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels, image_sizes=sizes).logits


@pytest.mark.parametrize("names", ["4.51", "4.52", "5.6"])
def test_a_renamed_llava_next_is_one(names: str, next_model: Path, tmp_path: Path) -> None:
    out = sm.convert(next_model, tmp_path / "out", use=f"hf/to-{names}").path
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["image_grid_pinpoints"]) == ("llava_next", [[28, 56], [56, 28]])
    assert torch.equal(next_logits(out), next_logits(next_model))


@pytest.mark.parametrize("dropped", ["hf:image_newline", "hf:model.image_newline"])
def test_without_its_newline_it_is_refused_as_a_llava_next(dropped: str, next_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        f"shardmerge: 1\nsources: {{hf: {next_model}}}\noutput: {tmp_path / 'out'}\nuse: hf/to-4.51\n"
        f"drop: [{dropped}]\n"
    )
    names = safetensors.load_file(next_model / "model.safetensors")
    if dropped.removeprefix("hf:") in names:
        with pytest.raises(ShardmergeError, match="image_newline") as caught:
            sm.run(tmp_path / "m.yaml")
        assert caught.value.code == "incomplete-model"


def test_a_llava_next_is_no_llava_1_5(next_model: Path, clip: Path, tmp_path: Path) -> None:
    there = sm.convert(next_model, tmp_path / "there", use="llava/hf-to-official").path
    bases = {"vision": str(clip)}
    with pytest.raises(ShardmergeError, match="llava_next") as caught:
        sm.convert(there, tmp_path / "out", use="llava/official-to-hf", bases=bases)
    hint = caught.value.hint.partition("`use: ")[2].rstrip("`")
    back = sm.convert(there, tmp_path / "back", use=hint, bases=bases).path
    assert json.loads((back / "config.json").read_text())["model_type"] == "llava_next"


OTHERS = (
    "VipLlava",
    "VideoLlava",
    "LlavaNextVideo",
    "PaliGemma",
    "Mistral3",
    "AyaVision",
    "InternVL",
)
RENAMES = ("hf/to-4.51", "hf/to-4.52", "hf/to-5.6", "llava/hf-to-official")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_llavas_are_refused_by_their_name(kind: str, tmp_path: Path) -> None:
    whole = getattr(transformers, f"{kind}Config")().to_dict()
    whole |= {"text_config": LLAMA, "vision_config": EYE, "image_token_index": 63}
    source = catalog(tmp_path / "hf", config=whole)
    roles = {"trained": "hf", "text": "hf", "vision": "hf"}
    for target in (llava.TARGET, llava_official):
        said = refusal(lambda target=target: target.expect(Request(roles, {}, {"hf": source}, read)))
        assert repr(whole["model_type"]) in said
    keep = Request(roles, {"vocabulary": "keep"}, {"hf": source}, read)
    assert repr(whole["model_type"]) in refusal(lambda: llava.TARGET.expect(keep))


def test_a_setting_of_a_llava_that_would_be_lost(tmp_path: Path) -> None:
    whole = {"model_type": "llava", "text_config": LLAMA, "vision_config": EYE, "spatial_merge_size": 2}
    source = catalog(tmp_path / "hf", config=whole)
    roles = {"trained": "hf", "text": "hf", "vision": "hf"}
    assert "spatial_merge_size" in refusal(lambda: llava.TARGET.expect(Request(roles, {}, {"hf": source}, read)))


# ---- ids


def kept(tmp_path: Path, index: int, rows: int = 64, vocabulary: Vocabulary | None = None) -> object:
    save_tokenizer(tmp_path / "hf", 60, added=("<unk>", "<s>", "</s>", "<image>"))
    whole = {"model_type": "llava", "text_config": LLAMA | {"vocab_size": rows}, "vision_config": EYE}
    source = catalog(tmp_path / "hf", config=whole | {"image_token_index": index})
    roles = {"trained": "hf", "text": "hf", "vision": "hf"}
    return llava.TARGET.expect(Request(roles, {"vocabulary": "keep"}, {"hf": source}, read, vocabulary=vocabulary))


def test_the_image_token_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    assert side_file(kept(tmp_path / "a", 60) if (tmp_path / "a").mkdir() is None else None, "config.json")
    with pytest.raises(TargetError) as caught:
        kept(tmp_path, 59)
    assert (caught.value.code, caught.value.expected) == ("token-id", "60, as the tokenizer has it")


def test_an_id_beyond_the_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        kept(tmp_path, 60, rows=60)
    assert caught.value.code == "token-id"
    # The hint, followed.
    assert caught.value.hint == "vocabulary: {rows: 61}"
    again = tmp_path / "again"
    again.mkdir()
    assert kept(again, 60, rows=60, vocabulary=Vocabulary(rows=61))


@pytest.mark.parametrize(("pad", "refused"), [(0, False), (-1, False), (None, False), (63, False), (64, True)])
def test_a_padding_id_has_a_row(pad: int | None, refused: bool, tmp_path: Path) -> None:
    text = catalog(tmp_path / "m", config=LLAMA | {"pad_token_id": pad})
    wanted = Request({}, {}, {"text": text}, read)
    if refused:
        with pytest.raises(TargetError) as caught:
            language_model.expect(wanted)
        assert caught.value.code == "token-id"
    else:
        assert language_model.expect(wanted).tensors


# ---- InternVL

VIT = {
    "model_type": "intern_vit_6b", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 3, "image_size": 28, "patch_size": 14, "qkv_bias": True, "qk_normalization": False,
    "norm_type": "layer_norm",
}  # fmt: skip
CHAT = {
    "model_type": "internvl_chat", "architectures": ["InternVLChatModel"],
    "llm_config": LLAMA | {"model_type": "qwen2"},
    "vision_config": VIT, "downsample_ratio": 0.5, "select_layer": -1, "ps_version": "v2", "template": "internvl2_5",
}  # fmt: skip


def expect_internvl(folder: Path, whole: Mapping[str, object], **options: str) -> object:
    return internvl.expect(Request({}, options, {"config": catalog(folder, config=whole)}, read))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "ps_version", "v1"), ("", "downsample_ratio", 0.3), ("", "select_layer", "last"),
        ("", "mlp_checkpoint_scale", 2.0), ("", "architectures", ["NVLM_D"]), ("", "model_type", "h2ovl_chat"),
        ("vision_config", "norm_type", "batch_norm"), ("vision_config", "model_type", "siglip_vision_model"),
        ("llm_config", "model_type", "gemma2"), ("llm_config", "model_type", "phi3"),
        ("llm_config", "architectures", ["GraniteForCausalLM"]),
    ],
)  # fmt: skip
def test_another_internvl_is_refused_by_name(part: str, key: str, value: object, tmp_path: Path) -> None:
    changed = {key: value} if not part else {part: {**CHAT[part], key: value}}  # type: ignore[dict-item]
    said = refusal(lambda: expect_internvl(tmp_path / "c", CHAT | changed))
    assert key in said
    assert str(value) in said


def test_settings_of_internlm2_that_a_llama_does_not_know(tmp_path: Path) -> None:
    llm = LLAMA | {"model_type": "internlm2", "bias": False, "logits_scaling": 8.0}
    assert "logits_scaling" in refusal(lambda: expect_internvl(tmp_path / "c", CHAT | {"llm_config": llm}))


def with_token(folder: Path) -> Path:
    save_tokenizer(folder, 60, added=("<unk>", "<s>", "</s>", "<img>", "<IMG_CONTEXT>"))
    return folder


def test_the_image_token_of_an_internvl_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    made = expect_internvl(with_token(tmp_path / "c"), CHAT)
    assert side_file(made, "config.json")["image_token_id"] == 61
    assert not any("image_token_id" in one for one in made.warnings)  # type: ignore[attr-defined]
    with pytest.raises(TargetError) as caught:
        expect_internvl(with_token(tmp_path / "d"), CHAT, image_token_id="7")
    assert (caught.value.code, caught.value.expected[:2]) == ("bad-option", "61")


def test_an_internvl_whose_tokenizer_lacks_the_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "c", 60)
    with pytest.raises(TargetError) as caught:
        expect_internvl(tmp_path / "c", CHAT)
    assert (caught.value.code, "image_token_id" in caught.value.hint) == ("token-id", True)
    assert expect_internvl(tmp_path / "c", CHAT, image_token_id="7")
    with pytest.raises(TargetError) as caught:
        expect_internvl(tmp_path / "c", CHAT, image_token_id="64")
    assert caught.value.code == "token-id"


def test_an_internvl_without_a_tokenizer_says_what_is_assumed(tmp_path: Path) -> None:
    warnings = expect_internvl(tmp_path / "c", CHAT).warnings  # type: ignore[attr-defined]
    assert any("image_token_id 151667" in one and "beyond the 64 rows" in one for one in warnings)


def test_the_shuffle_that_nobody_says_is_said(tmp_path: Path) -> None:
    silent = {key: value for key, value in CHAT.items() if key != "ps_version"}
    assert any("ps_version" in one for one in expect_internvl(with_token(tmp_path / "c"), silent).warnings)  # type: ignore[attr-defined]


def test_the_numbers_of_tiles_are_the_configs(tmp_path: Path) -> None:
    made = expect_internvl(with_token(tmp_path / "c"), CHAT | {"max_dynamic_patch": 6, "min_dynamic_patch": 2})
    images = side_file(made, "preprocessor_config.json")
    assert (images["max_patches"], images["min_patches"]) == (6, 2)


# ---- the configs of other tools

PARAMS = {"dim": 32, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 64, "multiple_of": 32}


@pytest.mark.parametrize(
    "key", ["moe", "vision_chunk_size", "use_qk_norm", "head_dim", "hidden_dim", "lora_args", "quantization_args"]
)
def test_a_params_json_of_another_model(key: str, tmp_path: Path) -> None:
    """LLaMA 4 and the vision models, and Mistral's own file of that name."""
    value = {"a": 1} if key in ("moe", "lora_args", "quantization_args") else 8
    meta = catalog(tmp_path / "m", params=PARAMS | {key: value})
    assert key in refusal(lambda: language_model.expect(Request({}, {}, {"text": meta}, read)))


LITGPT = {
    "parallel_residual": True, "rotary_percentage": 0.25, "norm_class_name": "LayerNorm", "mlp_class_name": "GemmaMLP",
    "scale_embeddings": True, "attention_scores_scalar": 256, "final_logit_softcapping": 30.0, "n_expert": 8,
    "attention_logit_softcapping": 50.0, "post_attention_norm": True, "post_mlp_norm": True, "norm_1": False,
    "shared_attention_norm": True, "rope_local_base_freq": 10000, "rope_adjustments": {"factor": 8.0},
    "norm_qk": True, "lm_head_bias": True, "a_new_multiplier": 2.5, "name": "Gemma-2b", "rope_interleave": True,
}  # fmt: skip


def litgpt(folder: Path, changes: Mapping[str, object], without: str = "") -> object:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((LAYOUTS / "litgpt_llama_gqa" / "source" / "model_config.yaml").read_text()) | changes
    config.pop(without, None)
    folder.mkdir()
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return language_model.expect(Request({}, {}, {"text": catalog(folder)}, read))


@pytest.mark.parametrize("key", LITGPT)
def test_a_model_config_of_another_model(key: str, tmp_path: Path) -> None:
    assert key in refusal(lambda: litgpt(tmp_path / "lit", {key: LITGPT[key]}))


@pytest.mark.parametrize("key", ["parallel_residual", "rotary_percentage", "norm_class_name", "mlp_class_name"])
def test_litgpts_own_defaults_are_not_llamas(key: str, tmp_path: Path) -> None:
    assert key in refusal(lambda: litgpt(tmp_path / "lit", {}, without=key))


def test_litgpts_window_is_mistrals(tmp_path: Path) -> None:
    every = {"sliding_window_size": 16, "sliding_window_indices": [1, 1]}
    config = side_file(litgpt(tmp_path / "all", every), "config.json")
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 16)
    none = side_file(litgpt(tmp_path / "none", every | {"sliding_window_indices": None}), "config.json")
    assert none["model_type"] == "llama"
    assert "16" in refusal(lambda: litgpt(tmp_path / "some", every | {"sliding_window_indices": [1, 0]}))


MEGATRON = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
    "padded_vocab_size": 64, "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope",
    "rotary_base": 10000, "norm_epsilon": 1e-5,
}  # fmt: skip
MEGATRON_OTHERS = {
    "normalization": "LayerNorm", "swiglu": False, "position_embedding_type": "learned_absolute", "rotary_percent": 0.5,
    "rotary_interleaved": True, "apply_layernorm_1p": True, "multi_latent_attention": True, "add_bias_linear": True,
    "rotary_seq_len_interpolation_factor": 4,
}  # fmt: skip
# Mixtral's experts, and Qwen3's, are chosen in one way.
MEGATRON_EXPERTS = {
    "moe_router_pre_softmax": True, "moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True, "moe_router_num_groups": 8, "moe_shared_expert_intermediate_size": 48,
    "moe_layer_freq": 2, "moe_apply_probs_on_input": True, "moe_latent_size": 16, "add_qkv_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("key", MEGATRON_OTHERS)
def test_megatrons_args_of_another_model(key: str, tmp_path: Path) -> None:
    """With a base as well: its config.json says nothing of what the training did."""
    facts = MEGATRON | {key: MEGATRON_OTHERS[key]}
    base = catalog(tmp_path / "base", config=LLAMA)
    for catalogs in ({}, {"text": base}):
        megatron = catalog(tmp_path / "m", facts=facts)
        said = refusal(
            lambda catalogs=catalogs, megatron=megatron: language_model.expect(
                Request({}, {}, {"megatron": megatron, **catalogs}, read)
            )
        )
        assert key in said


@pytest.mark.parametrize("key", MEGATRON_EXPERTS)
def test_megatrons_args_of_other_experts(key: str, tmp_path: Path) -> None:
    for kind in ({}, {"qk_layernorm": True}):
        facts = MEGATRON | kind | {"num_experts": 8, key: MEGATRON_EXPERTS[key]}
        megatron = catalog(tmp_path / "m", facts=facts)
        assert key in refusal(lambda megatron=megatron: language_model.expect(Request({}, {}, {"m": megatron}, read)))


def test_a_base_that_stretches_what_the_training_did_not(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    base = catalog(tmp_path / "base", config=LLAMA | {"rope_scaling": scaling})
    for stretched in (False, True):
        facts = MEGATRON | {"use_rope_scaling": stretched}
        request = Request({}, {}, {"megatron": catalog(tmp_path / "m", facts=facts), "text": base}, read)
        if stretched:
            assert language_model.expect(request).tensors
        else:
            with pytest.raises(TargetError) as caught:
                language_model.expect(request)
            assert caught.value.code == "contradiction"
            assert "rope_scaling" in caught.value.found


def test_megatrons_args_that_do_not_say_how_large_the_model_is(tmp_path: Path) -> None:
    for key in ("num_attention_heads", "hidden_size", "ffn_hidden_size"):
        facts = {name: value for name, value in MEGATRON.items() if name != key}
        megatron = catalog(tmp_path / "m", facts=facts)
        with pytest.raises(TargetError) as caught:
            language_model.expect(Request({}, {}, {"megatron": megatron}, read))
        assert caught.value.code == "odd-config"
        assert caught.value.found == f"no {key}"
        base = catalog(tmp_path / "base", config=LLAMA)  # which says it
        assert language_model.expect(Request({}, {}, {"megatron": megatron, "text": base}, read)).tensors


def test_megatrons_args_of_no_model_of_transformers(tmp_path: Path) -> None:
    """Qwen3 has no bias, and Qwen2 no norm of queries and keys."""
    megatron = catalog(tmp_path / "m", facts=MEGATRON | {"qk_layernorm": True, "add_qkv_bias": True})
    assert "add_qkv_bias" in refusal(lambda: language_model.expect(Request({}, {}, {"megatron": megatron}, read)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", 500000), ("norm_epsilon", 1e-6), ("num_attention_heads", 8), ("num_query_groups", 4),
        ("kv_channels", 16), ("add_qkv_bias", True), ("qk_layernorm", True), ("num_experts", 8),
        ("use_rope_scaling", True),
    ],
)  # fmt: skip
def test_a_base_that_is_not_the_one_of_the_training(key: str, value: float, tmp_path: Path) -> None:
    catalogs = {
        "megatron": catalog(tmp_path / "m", facts=MEGATRON | {key: value}),
        "text": catalog(tmp_path / "base", config=LLAMA),
    }
    with pytest.raises(TargetError) as caught:
        language_model.expect(Request({}, {}, catalogs, read))
    assert caught.value.code == "contradiction"
    del catalogs["text"]  # the hint: leave it out
    assert language_model.expect(Request({}, {}, catalogs, read)).tensors


OPEN_CLIP = {
    "vision_cfg": {
        "timm_model_name": "vit", "ls_init_value": 0.1, "pool_type": "avg", "pos_embed_type": "sin_cos_2d",
        "final_ln_after_pool": True, "act_kwargs": {"approximate": "tanh"}, "attentional_pool": True, "no_ln_pre": True,
        "norm_kwargs": {"bias": False},
    },
    "text_cfg": {
        "hf_model_name": "roberta-base", "pool_type": "last", "proj_bias": True, "no_causal_mask": True,
        "embed_cls": True, "proj_type": "none", "act_kwargs": {"approximate": "tanh"},
    },
    "": {"init_logit_bias": -10, "multimodal_cfg": {"width": 8}, "nonscalar_logit_scale": True},
}  # fmt: skip


def open_clip(folder: Path, part: str, changes: Mapping[str, object]) -> object:
    config = json.loads((LAYOUTS / "open_clip_published" / "source" / "open_clip_config.json").read_text())
    (config["model_cfg"][part] if part else config["model_cfg"]).update(changes)
    return clip_model.expect_model(Request({}, {}, {"config": catalog(folder, open_clip_config=config)}, read))


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in OPEN_CLIP.items() for key in keys])
def test_another_model_of_open_clip(part: str, key: str, tmp_path: Path) -> None:
    assert key in refusal(lambda: open_clip(tmp_path / "c", part, {key: OPEN_CLIP[part][key]}))


def test_the_epsilon_of_an_open_clip_is_its_own(tmp_path: Path) -> None:
    config = side_file(open_clip(tmp_path / "c", "vision_cfg", {"norm_kwargs": {"eps": 1e-6}}), "config.json")
    assert (config["vision_config"]["layer_norm_eps"], config["text_config"]["layer_norm_eps"]) == (1e-6, 1e-5)


@pytest.mark.parametrize("kind", ["AltCLIP", "CLIPSeg", "ChineseCLIP", "Siglip", "XCLIP"])
def test_relatives_of_clip(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")().to_dict()
    config["vision_config"] = EYE
    said = refusal(
        lambda: clip_model.expect_model(Request({}, {}, {"config": catalog(tmp_path / "c", config=config)}, read))
    )
    assert config["model_type"] in said


def test_a_clip_with_another_text_encoder(tmp_path: Path) -> None:
    config = {"model_type": "clip", "vision_config": EYE, "text_config": {"model_type": "roberta", "hidden_size": 24}}
    wanted = Request({}, {}, {"config": catalog(tmp_path / "c", config=config)}, read)
    assert "roberta" in refusal(lambda: clip_model.expect_model(wanted))


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"hidden_act": "gelu"},
    ],
)
def test_what_metas_code_has_no_place_for(changes: dict[str, object], tmp_path: Path) -> None:
    text = catalog(tmp_path / "m", config=LLAMA | changes)
    assert next(iter(changes)) in refusal(lambda: meta_llama.expect(Request({}, {}, {"text": text}, read)))


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_a_phi_3_of_long_texts_is_a_llama_of_long_texts(kind: str, tmp_path: Path) -> None:
    """Phi-3's code reads all three names as longrope, and LLaMA's has another yarn."""
    rope = {"type": "longrope", "short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    sizes = SIZES | {"original_max_position_embeddings": 8, "rope_scaling": dict(rope), "sliding_window": None}
    torch.manual_seed(0)
    phi = shaken(transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, eos_token_id=2)))
    config = phi.config.to_dict()
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10000.0, "rope_scaling": rope | {"type": kind}}
    source = write(tmp_path / "phi", phi.state_dict(), config)
    out = sm.convert(source, tmp_path / "out", use="llama/phi3-to-llama").path
    made = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    for length in (6, 30):  # below and above the length of the short factors
        ids = torch.arange(length)[None] * 7 % 64
        with torch.no_grad():
            assert torch.allclose(made(ids).logits, phi(ids).logits, atol=1e-5)


@pytest.mark.parametrize("preset", ["llama/hf-to-torchtune", "llama/hf-to-litgpt"])
@pytest.mark.parametrize("family", ["Granite", "Helium"])
def test_a_preset_without_a_target_has_its_families(preset: str, family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SIZES)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    source = write(tmp_path / "m", model.state_dict(), config.to_dict())
    assert family.lower() in refusal(lambda: sm.convert(source, tmp_path / "out", use=preset))


# ---- what is published, whose configs have a great deal that does not matter

_LLAMA_7B = {
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_length": 4096, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_LLAVA_15 = _LLAMA_7B | {
    "_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "llava", "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False, "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
}  # fmt: skip
_TILES = {
    "image_aspect_ratio": "anyres", "image_crop_resolution": 224, "image_split_resolution": 224,
    "mm_projector_lr": None,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "mm_patch_merge_type": "spatial_unpad", "mm_vision_tower_lr": 2e-06, "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True,
}  # fmt: skip
_LLAMA_3_NEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "mm_spatial_pool_mode": "bilinear", "pos_skipping_range": 4096,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "model_type": "llava_llama",
    "rope_theta": 500000.0, "use_pos_skipping": False, "vision_tower_pretrained": None, "delay_load": True,
}  # fmt: skip
PUBLISHED = {
    "llava-v1.5-7b": (_LLAVA_15, llava.TARGET),
    "llava-v1-0719": (
        _LLAVA_15
        | {"mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": "./mm_projector.bin", "sep_image_conv_front": False},
        llava.TARGET,
    ),
    "llava-v1.6-vicuna-7b": (_LLAVA_15 | _TILES, llava.NEXT_TARGET),
    "llava-v1.6-mistral-7b": (
        _LLAVA_15
        | _TILES
        | {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral", "sliding_window": None},
        llava.NEXT_TARGET,
    ),
    "llama3-llava-next-8b": (_LLAVA_15 | _TILES | _LLAMA_3_NEXT, llava.NEXT_TARGET),
}
_EYE_336 = EYE | {"hidden_size": 1024, "num_hidden_layers": 24, "image_size": 336, "num_attention_heads": 16}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_understood(name: str, tmp_path: Path) -> None:
    config, target = PUBLISHED[name]
    catalogs = {"llm": catalog(tmp_path / "llm", config=config), "vision": catalog(tmp_path / "v", config=_EYE_336)}
    warnings = target.expect(Request({}, {}, catalogs, read)).warnings
    assert not any("mm_" in one or "is another" in one for one in warnings)


def test_a_published_internvl_is_understood(tmp_path: Path) -> None:
    llm = LLAMA | {
        "_name_or_path": "internlm/internlm2_5-7b-chat", "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "flash_attention_2", "auto_map": {"AutoConfig": "x"}, "bias": False, "bos_token_id": 1,
        "hidden_act": "silu", "initializer_range": 0.02, "max_length": 20, "min_length": 0, "model_type": "internlm2",
        "repetition_penalty": 1.0, "return_dict": True, "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "temperature": 1.0, "top_k": 50, "torch_dtype": "bfloat16", "transformers_version": "4.37.2",
        "use_bfloat16": True, "use_cache": True, "moe_config": None,
    }  # fmt: skip
    vit = VIT | {
        "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.0, "dropout": 0.0,
        "hidden_act": "gelu", "initializer_factor": 1.0, "initializer_range": 0.02, "layer_norm_eps": 1e-06,
        "num_channels": 3, "use_flash_attn": True,
    }  # fmt: skip
    whole = CHAT | {
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}, "dynamic_image_size": True,
        "force_image_size": 28, "hidden_size": 4096, "image_fold": None, "llm_config": llm, "max_dynamic_patch": 12,
        "min_dynamic_patch": 1, "output_attentions": False, "pad2square": False, "system_message": None,
        "transformers_version": None, "use_backbone_lora": 0, "use_llm_lora": 0, "use_thumbnail": True,
        "vision_config": vit, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    assert expect_internvl(with_token(tmp_path / "c"), whole)


# ---- XTuner's training config


TRAINED = {
    f"projector.model.{index}.{leaf}": (32,) * (2 if leaf == "weight" else 1)
    for index in (0, 2)
    for leaf in ("weight", "bias")
}
CONFIG = "model = dict(type='xtuner.model.LLaVAModel', freeze_llm=True, {})"


def trained_with(tmp_path: Path, text: str, context: int = 64) -> dict[str, object]:
    return {
        "trained": catalog(tmp_path / "t", TRAINED, training_config=text),
        "llm": catalog(tmp_path / "llm", config=LLAMA | {"max_position_embeddings": context}),
        "vision": catalog(tmp_path / "vision", config=EYE),
    }


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model = dict(type='xtuner.model.InternVL_V1_5')", "InternVL_V1_5"),
        ("model = dict(type='xtuner.model.SupervisedFinetune')", "SupervisedFinetune"),
        (
            CONFIG.format("visual_encoder=dict(type='transformers.Blip2VisionModel.from_pretrained')"),
            "Blip2VisionModel",
        ),
        (CONFIG.format("token_merge_ratio=4"), "token_merge_ratio"),
        (CONFIG.format("visual_select_layer=[-2, -5]"), "visual_select_layer"),
        (CONFIG.format("projector_depth=1 + 1"), "projector_depth"),
    ],
)
@pytest.mark.parametrize("target", [llava.TARGET, llava_official, llava_xtuner], ids=["hf", "official", "xtuner"])
def test_another_training_is_refused_by_name(target: object, text: str, named: str, tmp_path: Path) -> None:
    wanted = Request({}, {}, trained_with(tmp_path, text), read)  # type: ignore[arg-type]
    assert named in refusal(lambda: target.expect(wanted))  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", [llava.TARGET, llava_official], ids=["hf", "official"])
def test_another_encoder_than_that_of_the_training(target: object, tmp_path: Path) -> None:
    text = CONFIG.format("visual_encoder=dict(type='transformers.SiglipVisionModel.from_pretrained')")
    with pytest.raises(TargetError) as caught:
        target.expect(Request({}, {}, trained_with(tmp_path, text), read))  # type: ignore[attr-defined, arg-type]
    assert (caught.value.code, caught.value.found) == ("contradiction", "CLIPVisionModel")
    assert "SiglipVisionModel" in caught.value.expected


def test_a_training_of_longer_texts(tmp_path: Path) -> None:
    text = CONFIG.format("max_position_embeddings=200")
    with pytest.raises(TargetError) as caught:
        llava.TARGET.expect(Request({}, {}, trained_with(tmp_path, text), read))  # type: ignore[arg-type]
    assert caught.value.code == "contradiction"
    said = json.loads("{" + caught.value.hint.partition(": ")[2] + "}")
    assert said["rope_scaling"] == {"type": "linear", "factor": 4.0}
    again = trained_with(tmp_path, text) | {"llm": catalog(tmp_path / "llm", config=LLAMA | said)}
    assert llava.TARGET.expect(Request({}, {}, again, read)).tensors  # type: ignore[arg-type]


def test_a_training_config_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    made = llava.TARGET.expect(Request({}, {}, trained_with(tmp_path, "model = build()"), read))  # type: ignore[arg-type]
    assert any("visual_select_layer" in one for one in made.warnings)
