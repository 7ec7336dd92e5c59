"""Every pair of a language model and a visual encoder that a Hugging Face LLaVA can have, by transformers."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import shardmerge as sm
from tests.load_environments import VERSIONS, interpreter, ready
from tests.target_files import save_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.load

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_theta": 50000.0,
}  # fmt: skip
TEXTS: dict[str, dict[str, object]] = {
    "llama": {}, "mistral": {"sliding_window": 32}, "qwen2": {"tie_word_embeddings": True}, "phi3": {}, "olmo2": {},
    "mixtral": {"num_local_experts": 4}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8}, "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "num_hidden_layers": 3, "sliding_window_pattern": 3, "rope_local_base_freq": 1e3},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 4.0, "attention_multiplier": 0.5},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "internlm2": {"bias": True},
    "deepseek_v3": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "num_key_value_heads": 4,
    },
}  # fmt: skip
IMAGE = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "hidden_size": 16}
VISIONS: dict[str, dict[str, object]] = {
    "clip_vision_model": {"intermediate_size": 24},
    "siglip_vision_model": {"intermediate_size": 24},
    "dinov2": {"mlp_ratio": 2},
}
PAIRS = [f"{text}+{vision}" for text in TEXTS for vision in VISIONS]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def text_settings(name: str) -> dict[str, object]:
    return {"model_type": name, **SIZES, **TEXTS[name]}


def vision_settings(name: str) -> dict[str, object]:
    return {"model_type": name, **IMAGE, **VISIONS[name]}


def fused(llama: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LLaMA under InternLM2's names: its queries, keys and values group by group in one matrix."""
    from tests.llava_pairs import INTERNLM2

    found = {}
    for name, value in llama.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            parts = [llama[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            grouped = [part.view(2, -1, 8, *part.shape[1:]) for part in parts]
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(grouped, 1).reshape(
                -1, *value.shape[1:]
            )
            continue
        place = name
        for own, other in INTERNLM2:
            place = place.replace(other, own)
        found[place] = value
    return found


def make_text(folder: Path, name: str) -> Path:
    settings = text_settings(name)
    if name == "internlm2":
        plain = {key: value for key, value in settings.items() if key not in ("model_type", "bias")}
        model = shaken(transformers.LlamaForCausalLM(transformers.LlamaConfig(**plain, attention_bias=True)))
        folder.mkdir()
        safetensors.save_file(fused(model.state_dict()), folder / "model.safetensors")
        code = {
            "architectures": ["InternLM2ForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        }
        (folder / "config.json").write_text(json.dumps(settings | code))
    else:
        config = transformers.AutoConfig.for_model(**settings)
        shaken(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    save_tokenizer(folder, 60)
    return folder


def make_vision(folder: Path, name: str) -> Path:
    config = transformers.AutoConfig.for_model(**vision_settings(name))
    shaken(transformers.AutoModel.from_config(config)).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Official:
    """A LLaVA of LLaVA's own code: its preset, its parts, and what its config says."""

    preset: str
    text: str
    vision: str
    named: str
    settings: dict[str, object]
    tower: str = "left out"


TILES = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]], "mm_patch_merge_type": "spatial_unpad"}
# A SigLIP of LLaVA's code has lost its last layer and its head; it takes all that is left, whatever the setting says.
OFFICIAL = {
    "gemma over siglip": Official("llava/official-to-hf", "gemma", "siglip_vision_model", "LlavaGemmaForCausalLM", {}),
    "qwen2 over siglip, whole": Official(
        "llava/official-to-hf", "qwen2", "siglip_vision_model", "LlavaQwenForCausalLM", {"mm_vision_select_layer": -1},
        "whole",
    ),
    "mixtral over clip": Official("llava/official-to-hf", "mixtral", "clip_vision_model", "LlavaMixtralForCausalLM",
                                  {"mm_vision_select_feature": "cls_patch"}, "whole"),
    "next, mistral over clip": Official(
        "llava/official-to-hf-next", "mistral", "clip_vision_model", "LlavaMistralForCausalLM",
        TILES | {"image_aspect_ratio": "anyres"},
    ),
    "next, qwen2 over siglip": Official(
        "llava/official-to-hf-next", "qwen2", "siglip_vision_model", "LlavaQwenForCausalLM",
        TILES | {"image_aspect_ratio": "anyres"}, "cut",
    ),
    "onevision": Official(
        "llava/official-to-hf-onevision", "qwen2", "siglip_vision_model", "LlavaQwenForCausalLM",
        TILES | {"image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "(1x1),...,(3x3)"}, "cut",
    ),
    "onevision, frozen": Official(
        "llava/official-to-hf-onevision", "qwen3", "siglip_vision_model", "LlavaQwen3ForCausalLM",
        TILES | {"image_aspect_ratio": "anyres_max_9"},
    ),
}  # fmt: skip


def make_official(folder: Path, text: Path, vision: Path, own: dict[str, torch.Tensor], made: Official) -> Path:
    """As LLaVA's code saves it: one directory, the encoder in it or only named."""
    tensors = safetensors.load_file(text / "model.safetensors")
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        for leaf in ("weight", "bias"):
            tensors[f"model.mm_projector.{number}.{leaf}"] = own[f"{layer}.{leaf}"].clone()
    if "mm_patch_merge_type" in made.settings:
        tensors["model.image_newline"] = own["image_newline"]
    for name, one in safetensors.load_file(vision / "model.safetensors").items() if made.tower != "left out" else ():
        own_name = name.removeprefix("vision_model.")
        if made.tower == "whole" or not own_name.startswith(("head.", "encoder.layers.2.")):
            tensors[f"model.vision_tower.vision_tower.vision_model.{own_name}"] = one
    folder.mkdir()
    safetensors.save_file(tensors, folder / "model.safetensors")
    config = json.loads((text / "config.json").read_text())
    usual = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
             "mm_vision_tower": "google/siglip-tiny" if "siglip" in made.vision else "openai/clip-tiny"}  # fmt: skip
    config |= usual | made.settings | {"model_type": "llava", "architectures": [made.named], "mm_hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, 60)
    return folder


class Workshop:
    """All parts, and the cases that were made of them."""

    def __init__(self, home: Path) -> None:
        torch.manual_seed(0)
        self.home = home
        self.cases: list[dict[str, object]] = []
        self.texts = {name: make_text(home / name, name) for name in TEXTS}
        self.visions = {name: make_vision(home / name, name) for name in VISIONS}
        shapes = {"linear_1.weight": (32, 16), "linear_1.bias": (32,), "linear_2.weight": (32, 32)}
        shapes |= {"linear_2.bias": (32,), "image_newline": (32,)}
        self.own = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
        safetensors.save_file(self.own, home / "own.safetensors")
        names = {"linear_1": "projector.model.0", "linear_2": "projector.model.2"}
        trained = {name.replace(layer, other): one for layer, other in names.items() for name, one in self.own.items()
                   if name.startswith(layer)}  # fmt: skip
        torch.save({"state_dict": trained}, home / "iter_1.pth")

    def add(self, name: str, text: str, vision: str, out: Path, kind: str = "Llava", **around: object) -> None:
        strategy = "full" if vision == "siglip_vision_model" else "default"
        usual = {"image_token_index": 60, "vision_feature_layer": -2, "vision_feature_select_strategy": strategy}
        cut = around.pop("cut", False)
        less = {"num_hidden_layers": 2, "vision_use_head": False} if cut else {}
        self.cases.append({
            "name": name, "out": str(out), "class": f"{kind}ForConditionalGeneration", "text": str(self.texts[text]),
            "text_settings": text_settings(text), "vision": str(self.visions[vision]), "cut": cut,
            "vision_settings": vision_settings(vision) | less, "around": usual | around,
            "own": str(self.home / "own.safetensors"),
        })  # fmt: skip

    def pair(self, text: str, vision: str) -> None:
        name = f"{text}+{vision}"
        bases = {"llm": str(self.texts[text]), "vision": str(self.visions[vision])}
        made = sm.convert(self.home / "iter_1.pth", self.home / name, use="xtuner/llava-to-hf", bases=bases)
        self.add(name, text, vision, made.path)

    def official(self, name: str, made: Official) -> None:
        text, vision = self.texts[made.text], self.visions[made.vision]
        source = make_official(self.home / f"{name} source", text, vision, self.own, made)
        out = sm.convert(source, self.home / name, use=made.preset, bases={"vision": str(vision)}).path
        kind = {"next": "LlavaNext", "onevision": "LlavaOnevision"}.get(made.preset.rsplit("-", 1)[-1], "Llava")
        around: dict[str, object] = {"cut": made.tower == "cut"}
        if made.tower == "cut" or "mm_vision_select_layer" in made.settings:
            around["vision_feature_layer"] = -1
        if "mm_vision_select_feature" in made.settings:
            around["vision_feature_select_strategy"] = "full"
        if kind != "Llava":
            every = [[28 * high, 28 * wide] for high in (1, 2, 3) for wide in (1, 2, 3)]
            stated = made.settings["image_grid_pinpoints"]
            around["image_grid_pinpoints"] = every if isinstance(stated, str) else stated
        if kind == "LlavaOnevision":
            around["video_token_index"] = 61
        self.add(name, made.text, made.vision, out, kind, **around)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pairs by the preset for XTuner, some by those for LLaVA's code, of parts that this environment saved."""
    shop = Workshop(tmp_path_factory.mktemp("pairs"))
    for text in TEXTS:
        for vision in VISIONS:
            shop.pair(text, vision)
    for name, made in OFFICIAL.items():
        shop.official(name, made)
    (shop.home / "cases.json").write_text(json.dumps(shop.cases))
    return shop.home / "cases.json"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_pair_is_the_model_of_its_parts(cases: Path, version: str) -> None:
    """0 missing, 0 unexpected; logits on a text and on an image equal to the last bit, the processor's tokens fit."""
    if not ready(version):
        pytest.skip(f"transformers {version} could not be installed here: `python tests/load_environments.py` says why")
    command = [str(interpreter(version)), str(Path(__file__).with_name("llava_pairs.py")), str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = {found.pop("case"): found for found in map(json.loads, done.stdout.splitlines())}
    assert set(answers) == {*PAIRS, *OFFICIAL}
    right = {"version": version, "missing": [], "unexpected": [], "mismatched": [], "equal": [True, True]}
    wrong = {name: found for name, found in answers.items() if found | right != found}
    assert not wrong, "\n".join(f"{name}: {found}" for name, found in wrong.items())[:6000]
    assert {answers[pair]["image_tokens"] for pair in PAIRS} == {16}
