"""The ids that new tokens get, as the tokenizers library gives them (``added_vocabulary.rs``).

A token that the model knows keeps its id; any other gets the next one after the model's vocabulary and all tokens
added before. When a file is loaded its tokens are added again in order by that rule, whatever ids the file states, and
so are they here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.targets.config_numbers import JsonObject


@dataclass(frozen=True, slots=True)
class TokenVocabulary:
    """What the scan keeps of a model's vocabulary: its size, and the ids of the tokens asked for."""

    size: int
    ids: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AddedTokens:
    """The added tokens of a tokenizer after loading: their ids, and which of them are new."""

    ids: Mapping[str, int]
    new: tuple[str, ...]


def add_in_order(present: Sequence[str], vocabulary: TokenVocabulary, tokens: Sequence[str]) -> AddedTokens:
    """Numbers the tokens of a fast tokenizer in the order in which the library adds them."""
    return add_after(numbered(present, vocabulary, {}), vocabulary, tokens)


def add_after(stated: Mapping[str, int], vocabulary: TokenVocabulary, tokens: Sequence[str]) -> AddedTokens:
    """Numbers tokens behind those whose ids are stated."""
    return AddedTokens(numbered(tokens, vocabulary, stated), tuple(token for token in tokens if token not in stated))


def numbered(tokens: Iterable[str], vocabulary: TokenVocabulary, before: Mapping[str, int]) -> dict[str, int]:
    """Returns the ids of some tokens, with those of the ones added before them."""
    ids = dict(before)
    following = max(vocabulary.size, max(ids.values(), default=-1) + 1)
    for token in tokens:
        if token and token not in ids:
            ids[token] = vocabulary.ids.get(token, following)
            following = max(following, ids[token] + 1)
    return ids


def special_flags() -> JsonObject:
    """The flags that XTuner gives ``<image>`` and ``<pad>``, in the order of the tokenizers library."""
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
