"""A Hugging Face LLaVA in the making: what was read of its bases and decided on names, wiring, tokens and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.targets.expectation import Request
from shardmerge.targets.llava import official_config
from shardmerge.targets.llava.bases import (
    Players,
    TextBase,
    VisionBase,
    check_context,
    check_encoder,
    find_players,
    missing_sources,
    read_both,
)
from shardmerge.targets.llava.kinds import LlavaKind, kind_of
from shardmerge.targets.llava.names import GENERATIONS, LlavaNames, names_of
from shardmerge.targets.llava.official_tower import cut_tower
from shardmerge.targets.llava.tokens import llava_tokens
from shardmerge.targets.llava.training_run import RunSettings, read_run_settings, tokenizer_source
from shardmerge.targets.llava.wiring import Wiring, wire
from shardmerge.targets.options import choice
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.targets.vision_tower import TOWERS
from shardmerge.targets.vocabulary import VocabularyRows, check_ids, rows

# XTuner rounds a vocabulary up to this many rows when its new tokens do not fit (`to_huggingface_llava`).
_ROW_MULTIPLE = 64

OPTIONS = {
    "names": "`legacy` (what every transformers from 4.36 on loads), `4.52` or `5.6`: the names that a model has "
    "in memory from that version on, which earlier ones do not load",
    "vocabulary": "`extend`: `<image>` and `<pad>` are added where the tokenizer lacks them; `keep`: the text source "
    "is a Hugging Face LLaVA, whose tokens and rows stay as they are",
}


@dataclass(frozen=True, slots=True)
class LlavaModel:
    """All that was read and decided: what the directory will describe."""

    kind: LlavaKind
    names: LlavaNames
    players: Players
    text: TextBase
    vision: VisionBase
    wiring: Wiring
    tokens: TokenizerFiles
    pad_id: int | None
    rows: VocabularyRows
    settings: RunSettings
    left_out: Mapping[str, str]


def read_llava(request: Request, kind: LlavaKind) -> LlavaModel:
    """Reads the bases and decides on names, wiring, tokens and rows.

    Raises
    ------
    TargetError
        As ``llava.expect``.
    """
    names = names_of(choice(request, "names", GENERATIONS), kind.table)
    players = find_players(request, names.name("language_model."), names.name("vision_tower."))
    missing = missing_sources((players.text, players.vision), request.catalogs)
    if missing:
        raise_all([*_two_layers(wire(players.facts, players.trained, {}), players), *missing])
    text, vision = read_both(players, request)
    check_context(players.model, text)
    check_encoder(players.model, vision)
    kind = _kind(request, kind, text)
    settings = read_run_settings(request, text)
    tower = vision.architecture.model_type
    official_config.check_images(settings.config, kind, tower=tower, where=settings.where)
    class_token = TOWERS[tower].class_token
    wiring = wire(players.facts, players.trained, settings.config, settings.where, class_token=class_token)
    raise_all(_two_layers(wiring, players))
    vision, wiring, left_out = cut_tower(vision, wiring, players.trained, names.name)
    tokens, pad_id = llava_tokens(request, text, tokenizer_source(settings, text), kind)
    counted = rows(request, text.architecture.vocab_size, tokens.ids.values(), multiple=_ROW_MULTIPLE)
    check_ids({**tokens.ids, "pad_token_id": pad_id}, counted.count, text.where)
    return LlavaModel(kind, names, players, text, vision, wiring, tokens, pad_id, counted, settings, left_out)


def _kind(request: Request, kind: LlavaKind, text: TextBase) -> LlavaKind:
    """Returns the kind of the result: a base that is a LLaVA-NeXT makes no LLaVA 1.5, and the other way round."""
    if not isinstance(text.whole.get("text_config"), dict):
        return kind
    own = kind_of(text.whole, text.where)
    if own is kind or choice(request, "vocabulary", ("extend", "keep")) == "keep":
        return own
    raise TargetError(
        "unsupported-architecture",
        f"the text source is a {own.model_type}, which cannot be the base of a {kind.model_type}",
        where=text.where,
        found=f"model_type {own.model_type!r}",
        expected=f"a language model, or a LLaVA of model_type {kind.model_type!r}",
    )


def _two_layers(wiring: Wiring, players: Players) -> list[ShardmergeError]:
    if wiring.depth == 2:
        return []
    problem = TargetError(
        "projector-depth",
        "the projector does not fit: a Hugging Face LLaVA has exactly two linear layers",
        where=players.trained.path if players.trained else "",
        found=wiring.told,
        expected="projector_depth 2",
        hint="name a target that holds a projector of any depth: `official/llava` or `xtuner/llava`",
    )
    return [problem]
