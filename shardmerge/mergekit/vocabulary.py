"""Embeddings of models whose tokenizers differ, row by row: mergekit's ``tokenizer`` and ``tokenizer_source``.

As ``mergekit/tokenizer/embed.py`` has it: every model keeps the row of a token that it has. In the others a token that
one model alone has gets that model's row, one that the base has the base's, one of several models without the base
their mean. The section ``tokens`` says otherwise for single tokens. Then all models have the same rows, and are merged
as any tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.mergekit.config import not_sayable
from shardmerge.mergekit.terms import Written

# More pieces than this are another vocabulary, not a vocabulary with new tokens: a rule could not be read.
_MOST_PIECES = 256


@dataclass(frozen=True, slots=True)
class ModelVocabulary:
    """A model's tokens with their ids, and its tensors over them.

    Attributes
    ----------
    rows
        Of its embedding; a token without a row is none.
    """

    model: str
    ids: Mapping[str, int]
    rows: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    def row(self, token: str) -> int | None:
        """Returns the row of a token, None where there is none."""
        found = self.ids.get(token)
        return found if found is not None and found < self.rows else None


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """What ``tokens`` says of a token: a row of a model, or zeros; with ``force`` for models that have it, too."""

    model: str = ""
    row: int | None = None
    token: str = ""
    force: bool = False


# TokenRows of one model, the mean of single rows of several, or so many rows of zeros.
TokenRows: TypeAlias = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class JointVocabulary:
    """The tokens of the result, by row, and all models.

    Attributes
    ----------
    new
        Tokens that the tokenizer of ``origin`` lacks.
    pad
        Rows behind those of the tokens, the mean of which each model has there.
    """

    origin: str
    tokens: Sequence[str]
    new: Sequence[str]
    models: Mapping[str, ModelVocabulary]
    base: str
    choices: Mapping[str, TokenChoice] = field(default_factory=dict)
    pad: int = 0
    mark: Mark = field(default_factory=lambda: Mark("", 1, 1))

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return len(self.tokens) + self.pad

    @property
    def changes(self) -> bool:
        """Whether any model's rows are not those of the result."""
        own = self.models[self.origin]
        same = all(one.ids == own.ids and one.rows == len(self.tokens) for one in self.models.values())
        return bool(self.new or self.choices or self.pad) or not same

    def embedding(self, model: str, name: str, source: Mapping[str, str]) -> Written:
        """Returns a tensor of a model with the rows of the result.

        Parameters
        ----------
        source
            The names of the sources by model.
        """
        runs = list(_runs([self._rows(model, token) for token in self.tokens]))
        if len(runs) > _MOST_PIECES:
            what = f"tokenizers with little in common: {model} would be put together of {len(runs)} pieces"
            raise not_sayable(what, self.mark)
        wide = self.pad > 0 or any(len(rows) > 1 for rows, _ in runs)
        parts = [self._piece(rows, count, name, source, wide=wide) for rows, count in runs]
        if not self.pad and runs == [(((model, 0),), self.models[model].rows)]:
            return f"{source[model]}:{name}"
        body: Written = parts[0] if len(parts) == 1 else {"op": "concat", "of": parts}
        if not self.pad:
            return body
        mean: Written = {"op": "new_rows", "of": body, "rows": str(self.pad)}
        return {"op": "concat", "of": [*parts, {"op": "cast", "of": mean, "dtype": "float32"}]}

    def _piece(self, rows: TokenRows, count: int, name: str, source: Mapping[str, str], *, wide: bool) -> Written:
        dtype, shape = self.models[self.origin].tensors[name]
        if not rows:
            return {"op": "fill", "shape": [str(count), *map(str, shape[1:])], "dtype": "float32" if wide else dtype}
        slices: list[Written] = [
            {"op": "slice", "of": f"{source[model]}:{name}", "start": str(row), "stop": str(row + count)}
            for model, row in rows
        ]
        if len(slices) > 1:
            return {"op": "linear", "of": slices}
        return {"op": "cast", "of": slices[0], "dtype": "float32"} if wide else slices[0]

    def _rows(self, model: str, token: str) -> TokenRows:
        """Returns which rows a model's row of a token is made of."""
        choice = self.choices.get(token)
        own = self.models[model].row(token)
        if own is not None and not (choice and choice.force):
            return ((model, own),)
        if choice is not None:
            return self._chosen(choice, token)
        having = tuple((name, row) for name, one in self.models.items() if (row := one.row(token)) is not None)
        base = next((pair for pair in having if pair[0] == self.base), None)
        return (base,) if base is not None else having

    def _chosen(self, choice: TokenChoice, token: str) -> TokenRows:
        if not choice.model:
            return ()
        other = self.models[choice.model]
        row = choice.row if choice.row is not None else other.row(choice.token or token)
        if row is None or row >= other.rows:
            what = f"{(choice.token or token)!r} of {choice.model}, which has no such token"
            raise not_sayable(what, self.mark, "name a model that has it")
        return ((choice.model, row),)


def _runs(rows: Sequence[TokenRows]) -> Iterator[tuple[TokenRows, int]]:
    """Yields rows that follow each other, and how many: of one model, of the same models, or of zeros."""
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and rows[stop] == _further(rows[start], stop - start):
            stop += 1
        yield rows[start], stop - start
        start = stop


def _further(rows: TokenRows, by: int) -> TokenRows:
    return tuple((model, row + by) for model, row in rows)
