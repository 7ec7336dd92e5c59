"""The target ``official/llava``: a directory for LLaVA's own code, as XTuner's ``--save-format official`` writes it.

Names follow haotian-liu/LLaVA (``llava_arch.py``, ``multimodal_projector/builder.py``). The encoder is left out where
it was not trained: LLaVA then loads it from ``mm_vision_tower``. No token is added and no row.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.targets import vision_tower
from shardmerge.targets.config_numbers import JsonObject, dump, is_size, stored_dtype
from shardmerge.targets.expectation import Component, Expectation, Request, Target
from shardmerge.targets.generation_config import generation_config
from shardmerge.targets.llava import official_config
from shardmerge.targets.llava.bases import (
    ROLES,
    Players,
    TextBase,
    VisionBase,
    check_context,
    check_encoder,
    find_players,
    missing_sources,
    read_text,
    read_vision,
)
from shardmerge.targets.llava.wiring import Wiring, wire
from shardmerge.targets.options import choice
from shardmerge.targets.text_config import text_config
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.targets.vocabulary import VocabularyRows, rows, tokenizer_files
from shardmerge.tensors import Shape, SideFile

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
_NEWLINE = "model.image_newline"

# The classes of LLaVA's code by the language model they wrap, with the model_type that each registers.
_CLASSES = {
    "gemma": ("LlavaGemmaForCausalLM", "llava_gemma"),
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "mixtral": ("LlavaMixtralForCausalLM", "llava_mixtral"),
    "qwen2": ("LlavaQwenForCausalLM", "llava_qwen"),
}

# A SigLIP of LLaVA's code lacks its last layer.
_TOWERS = ("clip_vision_model",)

# LLaVA-NeXT's fields, kept where the text base is one.
_KEPT = ("image_aspect_ratio", "image_crop_resolution", "image_grid_pinpoints", "image_split_resolution",
         "mm_patch_merge_type")  # fmt: skip

_NEXT: JsonObject = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}


@dataclass(frozen=True, slots=True)
class _Model:
    players: Players
    text: TextBase
    vision: VisionBase | None
    wiring: Wiring
    depth: int
    columns: int
    tower: bool
    tower_name: str
    tokens: TokenizerFiles
    rows: VocabularyRows


def expect(request: Request) -> Expectation:
    """Returns what the finished directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``projector-kind``, ``unsupported-architecture``, ``odd-config``, ``bad-option``,
        ``vocabulary-rows``; all of one stage together.
    """
    model = _read_model(request)
    tied = model.text.architecture.tied
    files, file_warnings = _processor(model, request)
    return Expectation(
        tensors=_tensors(model),
        resized=model.rows.resized([EMBEDDING] if tied else [EMBEDDING, HEAD]),
        tied={HEAD: EMBEDDING} if tied else {},
        left_out={} if model.tower else {TOWER: "LLaVA loads a frozen encoder by the name in config.json"},
        side_files=(
            SideFile("config.json", (dump(_config(model, request)),)),
            *generation_config(model.text.catalog, model.text.config, request.read),
            *model.tokens.files,
            *files,
        ),
        beside=model.text.catalog.side_files,
        components=_components(model),
        warnings=(*model.wiring.warnings, *file_warnings, *_tower_warnings(model)),
    )


# ---- reading


def _read_model(request: Request) -> _Model:
    players = find_players(request, "model.", TOWER)
    tower = _with_tower(request, players)
    described = players.vision.source in request.catalogs
    parts = (players.text, players.vision) if tower or described else (players.text,)
    raise_all(missing_sources(parts, request.catalogs))
    text = read_text(request.catalogs[players.text.source], request.read, _CLASSES)
    vision = read_vision(players.vision, request, _TOWERS) if tower or described else None
    check_context(players.model, text)
    if vision is not None:
        check_encoder(players.model, vision)
    official_config.check_images(text.whole, None, tower=_TOWERS[0], where=text.where)
    wiring = wire(players.facts, players.trained, text.whole, text.where)
    raise_all(_odd_projector(wiring, players))
    tokens = tokenizer_files(request, text.catalog.side_files, text.architecture)
    return _Model(
        players=players,
        text=text,
        vision=vision,
        wiring=wiring,
        depth=wiring.depth or 2,
        columns=_columns(players, text, vision) * wiring.layers,
        tower=tower,
        tower_name=_tower_name(request, players, vision),
        tokens=tokens,
        rows=rows(request, text.architecture.vocab_size, tokens.ids.values()),
    )


def _with_tower(request: Request, players: Players) -> bool:
    """Whether the encoder is part of the directory: XTuner's ``need_visual_encoder``."""
    asked = choice(request, "tower", ("auto", "true", "false"))
    if asked != "auto":
        return asked == "true"
    facts = players.facts
    if facts.visual_encoder_lora or facts.freeze_visual_encoder is False:
        return True
    names = players.trained.names() if players.trained else ()
    return any(name.startswith(("visual_encoder.", TOWER, "vision_tower.")) for name in names)


def _odd_projector(wiring: Wiring, players: Players) -> list[ShardmergeError]:
    plain = wiring.activation == "gelu" and wiring.bias
    if wiring.depth is not None and wiring.layers == 1 and plain:
        return []
    found = f"the output of encoder layers {wiring.layer} side by side" if wiring.layers > 1 else wiring.told
    problem = TargetError(
        "projector-kind",
        "LLaVA's code cannot build this projector",
        where=players.trained.path if players.trained else "",
        found=found
        if plain
        else f"projector_hidden_act {wiring.activation!r}, multimodal_projector_bias {wiring.bias}",
        expected="linear layers with a bias and a GELU between them, after one layer of the encoder",
    )
    return [problem]


def _columns(players: Players, text: TextBase, vision: VisionBase | None) -> int:
    """Returns the width of the encoder: as its config says, else as the trained projector takes it in."""
    if vision is not None:
        return vision.architecture.hidden_size
    for name in ("projector.model.0.weight", f"{PROJECTOR}0.weight", f"{PROJECTOR}weight"):
        if players.trained is not None and name in players.trained and len(players.trained[name].shape) == 2:
            return players.trained[name].shape[1]
    stated = text.whole.get("mm_hidden_size")
    if is_size(stated):
        return stated
    raise TargetError(
        "missing-source",
        "encoder hidden size unknown",
        expected=f"a source named `{players.vision.source}`, or the trained projector",
        hint=players.vision.line,
    )


def _tower_name(request: Request, players: Players, vision: VisionBase | None) -> str:
    stated = request.options.get("vision_tower", players.vision.path)
    return stated or (vision.catalog.path if vision else "")


def _tower_warnings(model: _Model) -> tuple[str, ...]:
    if model.vision is not None and model.tower_name == model.vision.catalog.path:
        warning = (
            f"config.json names {model.tower_name} as `mm_vision_tower`, where LLaVA looks for the visual encoder. "
            "Set the target's option `vision_tower` to a hub id if the directory is meant for another machine"
        )
        return (warning,)
    return ()


# ---- names and shapes


def _tensors(model: _Model) -> dict[str, Shape]:
    tensors = model.text.architecture.changed(vocab_size=model.rows.count).tensors()
    tensors |= _projector(model)
    if model.tower and model.vision is not None:
        tensors |= {f"{TOWER}{name}": shape for name, shape in model.vision.architecture.tensors().items()}
    if _is_next(model.text) or "unpad" in str(model.text.whole.get("mm_patch_merge_type", "")):
        tensors[_NEWLINE] = (model.text.architecture.hidden_size,)
    return tensors


def _projector(model: _Model) -> dict[str, Shape]:
    hidden = model.text.architecture.hidden_size
    if _is_linear(model):
        return {f"{PROJECTOR}weight": (hidden, model.columns), f"{PROJECTOR}bias": (hidden,)}
    return official_config.projector_tensors(PROJECTOR, model.depth, model.columns, hidden)


def _is_linear(model: _Model) -> bool:
    """One layer has two spellings: ``linear``, and XTuner's ``mlp1x_gelu``, a chain of one."""
    from_xtuner = model.players.trained is not None and "projector.model.0.weight" in model.players.trained
    return model.depth == 1 and not from_xtuner


def _components(model: _Model) -> tuple[Component, ...]:
    players = model.players
    remedy = f"name the checkpoint of the training as `{players.trained_name}`: it always has the projector"
    return (Component(PROJECTOR, "", remedy), players.vision.component, players.text.component)


# ---- files


def _config(model: _Model, request: Request) -> JsonObject:
    """Returns config.json: the language model's, and the fields that XTuner's ``to_official_llava`` sets."""
    text = model.text
    dtype = request.dtype.torch if request.dtype else stored_dtype(text.config)
    plain = text_config(text.config, text.architecture, model.rows.count, dtype, text.where)
    kept = {key: text.whole[key] for key in _KEPT if key in text.whole}
    architecture, model_type = _CLASSES[text.architecture.model_type]
    fields: JsonObject = {
        "architectures": [architecture],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": model.columns,
        "mm_projector_type": "linear" if _is_linear(model) else f"mlp{model.depth}x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch" if model.wiring.strategy == "full" else "patch",
        "mm_vision_select_layer": model.wiring.layer,
        "mm_vision_tower": model.tower_name,
        # `LlavaConfig.model_type`, under which LLaVA registers its config; transformers has a model `llava` of its own.
        "model_type": model_type,
        "unfreeze_mm_vision_tower": model.tower,
        "use_cache": True,
        "use_mm_proj": True,
    }
    return plain | fields | (_NEXT if _is_next(text) else {}) | kept


def _is_next(text: TextBase) -> bool:
    """Whether the text base is a Hugging Face LLaVA-NeXT."""
    return text.whole.get("model_type") == "llava_next"


def _processor(model: _Model, request: Request) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    if model.vision is None:
        return (), ()
    side_files = model.vision.catalog.side_files
    images, warnings = vision_tower.image_processor(side_files, request.read, model.vision.architecture)
    return (SideFile("preprocessor_config.json", (dump(images),)),), warnings


TARGET = Target(
    name="official/llava",
    about="A LLaVA for LLaVA's own code: LlavaLlamaForCausalLM with its config.",
    roles=ROLES | {"vision": f"{ROLES['vision']}; needed only where the encoder is part of the directory"},
    options={
        "tower": "`auto`, `true` or `false`: whether the encoder's tensors are part of the directory; auto: if trained",
        "vision_tower": "what config.json names as `mm_vision_tower`: a hub id or path, where LLaVA's code looks",
    },
    expect=expect,
)
