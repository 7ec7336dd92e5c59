"""The pretrained parts that a LLaVA is made of: who plays them, what the training says of them, what their configs say.

A part's source is the model the training started from, or another LLaVA, of Hugging Face's kind or of its own code's,
whose config holds the part.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.targets import rewritten_configs, vision_tower
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.config_numbers import JsonObject, is_real, is_whole, load_object
from shardmerge.targets.expectation import Component, Request
from shardmerge.targets.llava import kinds, official_config
from shardmerge.targets.llava.trained_model import ModelFacts, read_model_facts
from shardmerge.targets.text_config import read_part
from shardmerge.targets.training_config import TrainingFacts, read_training_config
from shardmerge.tensors import Catalog, ReadSideFile

ROLES = {
    "text": "the pretrained language model, or a LLaVA that holds one: config.json and tokenizer files",
    "vision": "the pretrained encoder, or a Hugging Face LLaVA with one: config.json and preprocessor_config.json",
    "trained": "the checkpoint; its training config says what was frozen and how the projector is wired",
}

# What a training config may name as its encoder's class; the source `vision` says of what kind it is.
_ENCODERS = ("", "AutoModel", "CLIPVisionModel", "SiglipVisionModel", "Dinov2Model")

_SOURCES = {"text": "llm", "vision": "vision", "trained": "trained"}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PretrainedPart:
    """A pretrained part of the model, and what the training config says of it.

    Attributes
    ----------
    title
        For people: ``visual encoder``.
    prefix
        Of its target names.
    source
        The name of the source that plays it.
    path
        What the training started from, ``""`` where nobody says.
    frozen
        Whether the training left it alone, ``None`` where nobody says.
    line
        What names its source: a line of mapping.yaml, or an option.
    """

    title: str
    prefix: str
    source: str
    path: str
    frozen: bool | None
    line: str

    @property
    def reason(self) -> str:
        """Why the checkpoint may lack the part, or ``""``."""
        return f"the checkpoint was trained with the {self.title} frozen" if self.frozen else ""

    @property
    def component(self) -> Component:
        """What to say when its tensors are missing."""
        return Component(self.prefix, self.reason, f"Add `{self.line}`")


@dataclass(frozen=True, slots=True)
class TextBase:
    """A language model's directory, read. ``whole`` is its config.json, ``config`` the language model's part."""

    catalog: Catalog
    whole: JsonObject
    config: JsonObject
    architecture: Architecture
    where: str


@dataclass(frozen=True, slots=True)
class VisionBase:
    """A visual encoder's directory, read. ``whole`` is its config.json, ``config`` the encoder's part."""

    catalog: Catalog
    whole: JsonObject
    config: JsonObject
    architecture: Architecture


@dataclass(frozen=True, slots=True)
class Players:
    """Which source plays which part, and what the training config says.

    Attributes
    ----------
    trained
        The checkpoint; ``None`` where no source plays it.
    trained_name
        The name of its source.
    facts, model
        Of its training config.
    text, vision
        The parts.
    """

    trained: Catalog | None
    trained_name: str
    facts: TrainingFacts
    model: ModelFacts
    text: PretrainedPart
    vision: PretrainedPart


def find_players(request: Request, text_prefix: str, vision_prefix: str) -> Players:
    """Returns who plays what; the sources are `llm`, `vision` and `trained` where the mapping does not say.

    Parameters
    ----------
    text_prefix, vision_prefix
        Of the parts' target names.

    Raises
    ------
    TargetError
        ``unsupported-architecture``: XTuner trained another model than a LLaVA, or with unknown settings.
    """
    names = {**_SOURCES, **request.roles}
    trained = request.catalogs.get(names["trained"])
    config = trained.training_config if trained else ""
    facts, model = read_training_config(config), read_model_facts(config)
    _check_training(model, trained)
    tower = facts.vision_path or _named_tower(request.catalogs.get(names["text"]), request.read)

    def part(title: str, prefix: str, source: str, path: str, frozen: bool | None) -> PretrainedPart:
        line = request.naming(source, path or f"<directory or hub id of the pretrained {title}>")
        return PretrainedPart(title, prefix, source, path, frozen, line)

    return Players(
        trained=trained,
        trained_name=names["trained"],
        facts=facts,
        model=model,
        text=part("language model", text_prefix, names["text"], facts.llm_path, facts.freeze_llm),
        vision=part("visual encoder", vision_prefix, names["vision"], tower, facts.freeze_visual_encoder),
    )


def _check_training(model: ModelFacts, trained: Catalog | None) -> None:
    found = [f"the model {model.name}"] if model.name not in ("", "LLaVAModel") else []
    found += [f"the encoder {model.vision}"] if model.vision not in _ENCODERS else []
    found += [f"the model's setting {name}" for name in model.odd]
    if found:
        raise TargetError(
            "unsupported-architecture",
            "the training config describes another model than XTuner's LLaVA",
            where=trained.path if trained else "",
            found=", ".join(found)[:200],
            expected=f"LLaVAModel, the encoder {' or '.join(filter(None, _ENCODERS))}, and settings that are known",
        )


def check_context(model: ModelFacts, text: TextBase) -> None:
    """Checks that the text base is stretched as far as the training stretched it.

    XTuner does it in memory (``_prepare_for_long_context_training``), and no file says so but the training config.

    Raises
    ------
    TargetError
        ``contradiction``.
    """
    wanted, own = model.max_position_embeddings, text.config.get("max_position_embeddings")
    rope = text.config.get("rope_scaling") or text.config.get("rope_parameters")
    factor = rope.get("factor", 1) if isinstance(rope, dict) else 1
    if wanted is None or not is_whole(own) or not is_real(factor) or wanted <= own * factor:
        return
    stretch = float(-(-wanted // max(int(own * factor), 1)))
    raise TargetError(
        "contradiction",
        "the training stretched the rotary embedding, and the language model's config.json does not",
        where=text.where,
        found=f"max_position_embeddings {own}, a factor of {factor}",
        expected=f"max_position_embeddings {wanted}, as the training config says",
        hint=f'write into a copy of it: "rope_scaling": {{"type": "linear", "factor": {stretch}}}',
    )


def check_encoder(model: ModelFacts, vision: VisionBase) -> None:
    """Checks that the source of the encoder is of the class that the training config names.

    Raises
    ------
    TargetError
        ``contradiction``.
    """
    found = vision.architecture.table.main_class
    if model.vision not in ("", "AutoModel", found):
        raise TargetError(
            "contradiction",
            "the training used another kind of visual encoder than the source",
            where=vision.catalog.path,
            found=found,
            expected=f"{model.vision}, as the training config says",
            hint="name the encoder that the training started from",
        )


def _named_tower(catalog: Catalog | None, read: ReadSideFile) -> str:
    """Returns the encoder that an official LLaVA's config names, or ``""``. A damaged config is reported elsewhere."""
    if catalog is None or "config.json" not in catalog.side_files:
        return ""
    try:
        tower = load_object(catalog.side_files["config.json"], read).get("mm_vision_tower")
    except ShardmergeError:
        return ""
    return tower if isinstance(tower, str) else ""


# ---- sources that are not there


def missing_sources(parts: Iterable[PretrainedPart], catalogs: Mapping[str, Catalog]) -> list[ShardmergeError]:
    """Returns a ``missing-source`` error for each part that no source with a config.json plays."""
    return [problem for part in parts if (problem := _missing_source(part, catalogs.get(part.source))) is not None]


def _missing_source(part: PretrainedPart, catalog: Catalog | None) -> ShardmergeError | None:
    if catalog is not None and "config.json" in catalog.side_files:
        return None
    if catalog is None:
        count = vision_tower.published_tensor_count(part.path)
        if count and part.frozen:
            what = f"{count} tensors of {part.prefix}* have no source: {part.reason}. Add `{part.line}`"
        else:
            what = f"there is no source for the {part.title}{_because(part)}"
        return TargetError("missing-source", what, expected=f"a source named `{part.source}`", hint=part.line)
    return TargetError(
        "missing-source",
        f"the source `{part.source}` has no config.json to describe the {part.title}{_because(part)}",
        where=catalog.path,
        expected="a directory with config.json beside the weights",
        hint=part.line,
    )


def _because(part: PretrainedPart) -> str:
    if part.frozen:
        return f": {part.reason}" + (f", from {part.path!r}" if part.path else "")
    return f": the training started from {part.path!r}" if part.path else ""


# ---- reading


def read_both(players: Players, request: Request) -> tuple[TextBase, VisionBase]:
    """Reads both configs; what is wrong with one does not hide what is wrong with the other.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, ``odd-config``, ``bad-json``, ``missing-source``.
    """
    problems: list[ShardmergeError] = []
    text = _attempt(lambda: read_text(request.catalogs[players.text.source], request.read), problems)
    vision = _attempt(lambda: read_vision(players.vision, request), problems)
    raise_all(problems)
    if text is None or vision is None:
        raise AssertionError("a part without a problem was read")
    return text, vision


def _attempt(reads: Callable[[], _T], problems: list[ShardmergeError]) -> _T | None:
    try:
        return reads()
    except ShardmergeError as error:
        problems += error.each()
        return None


def read_text(catalog: Catalog, read: ReadSideFile, known: Collection[str] = ()) -> TextBase:
    """Reads the config of the part ``text``: a language model's own, or a LLaVA's.

    Parameters
    ----------
    known
        The model types that the target has names for; empty for those that transformers has, and InternLM2, which is a
        LLaMA once its fused attention is split.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, ``odd-config``, ``bad-json``.
    """
    extent = catalog.side_files["config.json"]
    whole = load_object(extent, read)
    nested = whole.get("text_config")
    config = nested if isinstance(nested, dict) else whole
    if official_config.is_official(whole):
        config = official_config.language_part(whole, extent.file)
    if config.get("model_type") == "internlm2" and not known:
        config = rewritten_configs.from_internlm2(config, extent.file)
    architecture = read_part(config, extent.file, known)
    if isinstance(nested, dict):
        kinds.kind_of(whole, extent.file)
    return TextBase(catalog, whole, config, architecture, extent.file)


def read_vision(part: PretrainedPart, request: Request, known: Collection[str] = ()) -> VisionBase:
    """Reads the config of the part ``vision``: an encoder's, that of a pair it is part of, or a Hugging Face LLaVA's.

    Parameters
    ----------
    known
        The model types that the target has names for; empty for all that a Hugging Face LLaVA takes.

    Raises
    ------
    TargetError
        ``unsupported-architecture``, ``odd-config``, ``bad-json``; ``missing-source`` for an official LLaVA, whose
        config only names its encoder.
    """
    catalog = request.catalogs[part.source]
    extent = catalog.side_files["config.json"]
    whole = load_object(extent, request.read)
    if official_config.is_official(whole):
        tower = whole.get("mm_vision_tower")
        name = tower if isinstance(tower, str) else "<directory or hub id of its visual encoder>"
        raise TargetError(
            "missing-source",
            f"the source `{part.source}` is a LLaVA whose config.json only names its visual encoder",
            where=extent.file,
            found=f"mm_vision_tower {tower!r}"[:120],
            expected=f"a source named `{part.source}` with the encoder's own config.json",
            hint=request.naming(part.source, name),
        )
    config = vision_tower.unwrap(whole)
    return VisionBase(
        catalog, whole, config, vision_tower.read_vision(config, extent.file, known or vision_tower.TOWERS)
    )
