"""How many rows embedding and head get, and how the new ones are made.

Weights, config and tokenizer change together: a vocabulary that was resized in one place only is the most reported
defect of converted models.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets import tokenizer
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.expectation import Request, Resize
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.tensors import Extent


@dataclass(frozen=True, slots=True)
class VocabularyRows:
    """The rows of embedding and head.

    Attributes
    ----------
    count
        In the finished directory.
    resize
        What happens to a source with another number, ``None`` where it must have exactly these.
    """

    count: int
    resize: Resize | None

    def resized(self, names: Iterable[str]) -> dict[str, Resize]:
        """Returns ``Expectation.resized`` for the tensors whose rows these are."""
        return dict.fromkeys(names, self.resize) if self.resize else {}


def rows(request: Request, vocab_size: int, ids: Iterable[int] = (), *, multiple: int = 1) -> VocabularyRows:
    """Returns the rows for a vocabulary of ``vocab_size`` rows and the ids that must fit.

    Parameters
    ----------
    vocab_size
        As the text model's config says.
    ids
        Of the tokens that were added.
    multiple
        What is rounded up to where the ids do not fit and the mapping does not say.

    Raises
    ------
    TargetError
        ``vocabulary-rows``: more ids than rows, or fewer rows than the model has without ``trim``.
    """
    wanted = request.vocabulary
    needed = max(ids, default=-1) + 1
    if wanted is None:
        count = vocab_size if needed <= vocab_size else _round_up(needed, multiple)
        return VocabularyRows(count, Resize() if count != vocab_size else None)
    if wanted.rows is not None:
        count = _round_up(wanted.rows, wanted.multiple)
    elif needed > vocab_size and wanted.multiple == 1:
        count = _round_up(needed, multiple)
    else:
        count = _round_up(max(needed, vocab_size), wanted.multiple)
    _check(request, count, needed, vocab_size)
    return VocabularyRows(count, Resize(wanted.new, wanted.row, wanted.seed, wanted.trim))


def check_ids(ids: Mapping[str, int | None], count: int, where: str, hint: str = "") -> None:
    """Checks that tokens have rows; ``None`` and negative numbers stand for no token.

    Parameters
    ----------
    ids
        By the name of the token, or of the key that states it.
    count
        Rows of embedding and head.
    where
        The file that states them.
    hint
        What to do where the target makes no rows.

    Raises
    ------
    TargetError
        ``token-id``.
    """
    beyond = {name: number for name, number in ids.items() if number is not None and number >= count}
    if beyond:
        raise TargetError(
            "token-id",
            "a token's id is beyond the last row of the vocabulary",
            where=where,
            found=", ".join(f"{name} {number}" for name, number in beyond.items()),
            expected=f"ids below {count}",
            hint=hint or f"vocabulary: {{rows: {max(beyond.values()) + 1}}}",
        )


def id_warnings(config: Mapping[str, object], count: int, where: str) -> tuple[str, ...]:
    """Checks the ids that a config states: a padding token has a row, and of the others it is said where they do not.

    ``torch.nn.Embedding`` refuses a padding id beyond its rows; a model whose texts begin or end with one loads.

    Raises
    ------
    TargetError
        ``token-id``.
    """
    pad = config.get("pad_token_id")
    check_ids({"pad_token_id": pad if isinstance(pad, int) else None}, count, where)
    beyond = [f"{key} {config[key]}" for key in ("bos_token_id", "eos_token_id") if _is_beyond(config.get(key), count)]
    if not beyond:
        return ()
    return (f"{', '.join(beyond)} in config.json: beyond the {count} rows of the vocabulary",)


def _is_beyond(stated: object, count: int) -> bool:
    every = stated if isinstance(stated, list) else [stated]
    return any(isinstance(number, int) and number >= count for number in every)


def tokenizer_files(request: Request, side_files: Mapping[str, Extent], text: Architecture) -> TokenizerFiles:
    """Returns a language model's tokenizer as it is, or with the tokens that the mapping adds.

    Raises
    ------
    TargetError
        ``bad-tokenizer-json``, ``bad-json``, ``side-file-too-large``.
    """
    wanted = request.vocabulary
    if wanted is None or not wanted.tokens:
        return TokenizerFiles({}, tokenizer.copies(side_files))
    return tokenizer.add_tokens(
        side_files,
        request.read,
        wanted.tokens,
        pad_token=wanted.pad,
        vocab_size=text.vocab_size,
        default_class=text.tokenizer_class,
    )


def _round_up(count: int, multiple: int) -> int:
    return -(-count // max(multiple, 1)) * max(multiple, 1)


def _check(request: Request, count: int, needed: int, vocab_size: int) -> None:
    if count < needed:
        raise TargetError(
            "vocabulary-rows",
            "the vocabulary has fewer rows than its tokens need",
            where=request.where,
            found=f"{count} rows, and a token with the id {needed - 1}",
            expected=f"at least {needed} rows",
            hint=f"vocabulary: {{rows: {needed}}}",
        )
    if count < vocab_size and request.vocabulary and not request.vocabulary.trim:
        raise TargetError(
            "vocabulary-rows",
            "the vocabulary would lose rows, and the mapping does not allow it",
            where=request.where,
            found=f"{count} rows, where the text model's config says {vocab_size}",
            expected="`trim: true` where the last rows are padding",
            hint=f"vocabulary: {{rows: {count}, trim: true}}",
        )
