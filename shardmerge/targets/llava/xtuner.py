"""The target ``xtuner/llava``: the tree that XTuner's ``--save-format xtuner`` writes, one directory for each part.

What was trained is there and nothing else: the language model at the top or ``llm_adapter/``, ``visual_encoder/`` or
``visual_encoder_adapter/``, and always ``projector/``. Which, is read from the names in the checkpoint. A target name
has the part's directory in front: ``projector/model.0.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.targets import peft_adapter, vision_tower
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import dump, stored_dtype
from shardmerge.targets.expectation import Component, Expectation, FileGroup, Request, Resize, Target
from shardmerge.targets.generation_config import generation_config
from shardmerge.targets.llava.bases import (
    ROLES,
    Players,
    check_context,
    check_encoder,
    find_players,
    missing_sources,
    read_text,
    read_vision,
)
from shardmerge.targets.llava.projector import projector_folder
from shardmerge.targets.options import choice, positive_number
from shardmerge.targets.peft_adapter import holds_adapter
from shardmerge.targets.text_config import parts, text_config
from shardmerge.targets.vocabulary import rows, tokenizer_files
from shardmerge.tensors import Catalog, Shape, SideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

LLM_ADAPTER, ENCODER, ENCODER_ADAPTER, PROJECTOR = (
    "llm_adapter",
    "visual_encoder",
    "visual_encoder_adapter",
    "projector",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


_Form: TypeAlias = Literal["whole", "adapter", "absent"]


@dataclass(frozen=True, slots=True)
class _Branch:
    """A directory of the tree: its tensors under their target names, its files, its place among the groups."""

    folder: str
    tensors: dict[str, Shape]
    files: tuple[SideFile, ...]
    stem: str = "model"
    resized: tuple[tuple[str, Resize], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def group(self) -> FileGroup:
        prefix = f"{self.folder}/" if self.folder else ""
        return FileGroup(prefix, self.folder, self.stem, sharded=self.stem == "model")


def expect(request: Request) -> Expectation:
    """Returns what the finished tree must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``no-projector``, ``adapter-alpha``, ``unsupported-architecture``, ``odd-config``,
        ``bad-option``, ``vocabulary-rows``; all of one stage together.
    """
    players = find_players(request, "", f"{ENCODER}/")
    trained = players.trained
    if trained is None:
        raise TargetError(
            "missing-source",
            "the mapping has no source for the checkpoint of the training",
            where=request.where,
            expected=f"a source named `{players.trained_name}`",
        )
    forms = _forms(request, trained)
    raise_all(_missing(players, request, forms))
    branches = [
        *_encoder(request, players, trained, forms[1]),
        _projector(request, players, trained),
        # Last, because the prefix of a language model at the top is the empty one.
        *_language_model(request, players, trained, forms[0]),
    ]
    return _joined(branches, players)


def _forms(request: Request, trained: Catalog) -> tuple[_Form, _Form]:
    if choice(request, "parts", ("auto", "all")) == "all":
        return "whole", "whole"
    return _form(trained, "llm."), _form(trained, "visual_encoder.")


def _form(trained: Catalog, prefix: str) -> _Form:
    names = [name for name in trained.names() if name.startswith(prefix)]
    if not names:
        return "absent"
    return "adapter" if holds_adapter(names) else "whole"


def _missing(players: Players, request: Request, forms: tuple[_Form, _Form]) -> list[ShardmergeError]:
    parts = zip((players.text, players.vision), forms, strict=True)
    return missing_sources([part for part, form in parts if form == "whole"], request.catalogs)


def _joined(branches: list[_Branch], players: Players) -> Expectation:
    prefixed = [(f"{branch.folder}/" if branch.folder else "", branch) for branch in branches]
    remedy = f"name the checkpoint of the training as `{players.trained_name}`, and leave `parts: all` out"
    return Expectation(
        tensors={prefix + name: shape for prefix, branch in prefixed for name, shape in branch.tensors.items()},
        resized={name: resize for branch in branches for name, resize in branch.resized},
        tied={name: owner for branch in branches for name, owner in branch.tied},
        side_files=tuple(
            SideFile(prefix + file.name, file.parts) for prefix, branch in prefixed for file in branch.files
        ),
        components=tuple(Component(branch.group.prefix, "", remedy) for branch in branches),
        warnings=tuple(warning for branch in branches for warning in branch.warnings),
        groups=tuple(branch.group for branch in branches),
    )


# ---- whole parts


def _language_model(request: Request, players: Players, trained: Catalog, form: _Form) -> Iterator[_Branch]:
    if form == "adapter":
        yield _adapter(request, players, trained, LLM_ADAPTER)
    if form != "whole":
        return
    text = read_text(request.catalogs[players.text.source], request.read, parts())
    check_context(players.model, text)
    tokens = tokenizer_files(request, text.catalog.side_files, text.architecture)
    counted = rows(request, text.architecture.vocab_size, tokens.ids.values())
    dtype = request.dtype.torch if request.dtype else stored_dtype(text.config)
    config = text_config(text.config, text.architecture, counted.count, dtype, text.where)
    config |= {"architectures": [text.architecture.table.main_class]}
    tied = text.architecture.tied
    generation = generation_config(text.catalog, text.config, request.read)
    yield _Branch(
        "",
        text.architecture.changed(vocab_size=counted.count).tensors(),
        (SideFile("config.json", (dump(config),)), *generation, *tokens.files),
        resized=tuple(counted.resized([EMBEDDING] if tied else [EMBEDDING, HEAD]).items()),
        tied=((HEAD, EMBEDDING),) if tied else (),
    )


def _encoder(request: Request, players: Players, trained: Catalog, form: _Form) -> Iterator[_Branch]:
    if form == "adapter":
        yield _adapter(request, players, trained, ENCODER_ADAPTER)
    if form != "whole":
        return
    vision = read_vision(players.vision, request)
    check_encoder(players.model, vision)
    dtype = request.dtype.torch if request.dtype else stored_dtype(vision.config)
    config = vision_tower.vision_config(vision.config, vision.architecture, dtype)
    config |= {"architectures": [vision.architecture.table.main_class]}
    images, warnings = vision_tower.image_processor(vision.catalog.side_files, request.read, vision.architecture)
    files = (SideFile("config.json", (dump(config),)), SideFile("preprocessor_config.json", (dump(images),)))
    yield _Branch(ENCODER, vision.architecture.tensors(), files, warnings=warnings)


# ---- adapters and the projector


def _adapter(request: Request, players: Players, trained: Catalog, folder: str) -> _Branch:
    part, lora, option, task, prefix = (
        (players.text, players.facts.llm_lora, "llm_alpha", "CAUSAL_LM", "llm.")
        if folder == LLM_ADAPTER
        else (players.vision, players.facts.visual_encoder_lora, "vision_alpha", "", "visual_encoder.")
    )
    tensors = peft_adapter.adapter_tensors(trained, prefix, request.gone("trained"))
    stated = positive_number(request, option)
    known = lora or AdapterConfig()
    facts = replace(known, alpha=known.alpha if stated is None else stated, task=task, base=part.path)
    config = peft_adapter.adapter_config(tensors, facts, trained.path)
    return _Branch(folder, tensors, (SideFile(ADAPTER_CONFIG, (dump(config),)),), peft_adapter.STEM)


def _projector(request: Request, players: Players, trained: Catalog) -> _Branch:
    tensors, files = projector_folder(players.facts, trained, request.dtype.torch if request.dtype else "")
    return _Branch(PROJECTOR, tensors, files)


TARGET = Target(
    name="xtuner/llava",
    about="XTuner's own directory layout: the trained language model, encoder (or their adapters), and projector.",
    roles=ROLES
    | {
        "text": f"{ROLES['text']}; needed only where the language model was trained whole",
        "vision": f"{ROLES['vision']}; needed only where the encoder was trained whole",
    },
    options={
        "parts": "`auto`: those that the checkpoint has; `all`: language model and encoder whole, whatever was trained",
        "llm_alpha": "`lora_alpha` of the language model's adapter, where the training config does not say it",
        "vision_alpha": "`lora_alpha` of the encoder's adapter, where the training config does not say it",
    },
    expect=expect,
)
