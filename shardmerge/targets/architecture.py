"""What a table and one config.json make together: the sizes of a model, its names and their shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from shardmerge.errors import MappingError, TargetError
from shardmerge.formulas import Formula, FormulaValue
from shardmerge.shown import shown
from shardmerge.targets.tables import ArchitectureTable, NameNode
from shardmerge.tensors import Shape

_Values = Mapping[str, FormulaValue]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model that a config describes.

    Attributes
    ----------
    table
        Of its model type.
    values
        Fields and sizes by name.
    parts
        The models inside of it, by the key of their configs.
    where
        The config's file, for messages.
    """

    table: ArchitectureTable
    values: _Values
    parts: Mapping[str, Architecture] = field(default_factory=dict)
    where: str = field(default="", compare=False)

    @property
    def model_type(self) -> str:
        """As configs name it."""
        return self.table.model_type

    @property
    def tokenizer_class(self) -> str:
        """What transformers takes for this model type where tokenizer_config.json names no class."""
        return self.table.tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.size("vocab_size")

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return self.size("hidden_size")

    @property
    def intermediate_size(self) -> int:
        """Rows of a feed-forward layer."""
        return self.size("intermediate_size")

    @property
    def num_layers(self) -> int:
        """Layers of the one stack that it has."""
        return self.size("num_hidden_layers")

    @property
    def heads(self) -> int:
        """Heads of the queries."""
        return self.size("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; all heads where the config has no word for it."""
        return self.size("num_key_value_heads" if "num_key_value_heads" in self.values else "num_attention_heads")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.size("head_dim")

    @property
    def image_size(self) -> int:
        """Pixels along a side of the image."""
        return self.size("image_size")

    @property
    def patch_size(self) -> int:
        """Pixels along a side of a patch."""
        return self.size("patch_size")

    @property
    def patches(self) -> int:
        """Patches of one image, which is also the number of its tokens in the text."""
        return self.size("patches")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.values.get("tie_word_embeddings"))

    @property
    def all_ties(self) -> dict[str, str]:
        """The names that are another tensor's where the model is tied, with those."""
        inside = self._inside(lambda part: part.all_ties)
        return {name: prefix + owner for prefix, name, owner in inside} | dict(self.table.tied)

    @property
    def ties(self) -> dict[str, str]:
        """Those that are not there because the model is tied."""
        inside = self._inside(lambda part: part.ties)
        return self.all_ties if self.tied else {name: prefix + owner for prefix, name, owner in inside}

    def unread(self, names: Collection[str]) -> tuple[str, ...]:
        """Returns what those names begin with that files may have and no version of transformers loads."""
        numbered = [
            (f"{prefix}{index}.", sign)
            for prefix, first, count, sign in self.table.unread
            for index in range(*self._span(first, count))
        ]
        return tuple(prefix for prefix, sign in numbered if prefix + sign in names)

    def _span(self, first: Formula, count: Formula) -> tuple[int, int]:
        start, number = self.value(first), self.value(count)
        return (start, start + number) if isinstance(start, int) and isinstance(number, int) else (0, 0)

    def size(self, key: str) -> int:
        """Returns a field or size that is a number."""
        return self.whole(Formula.parse(key))

    def count(self, number: str) -> int:
        """Returns how many numbers of a kind names have, ``layer`` or ``expert``; 0 where they have none."""
        counted = self.table.numbers.get(number)
        return self.whole(counted) if counted else 0

    def changed(self, **values: int | bool) -> Architecture:
        """Returns the model with other fields: ``vocab_size``, ``tie_word_embeddings``."""
        return replace(self, values={**self.values, **values})

    def tensors(self, kind: str = "") -> dict[str, Shape]:
        """Returns names and shapes as the files of a class have them; of the one that loads the config by default.

        A tied head is not among them: no file needs it.

        Raises
        ------
        TargetError
            ``odd-config``: a size that is no size.
        """
        return {name: shape for name, shape in self.files(kind).items() if name not in self.ties}

    def files(self, kind: str = "") -> dict[str, Shape]:
        """Returns the same with a head that is tied."""
        kind = kind or self.table.main_class
        prefix = self.table.prefix if kind in self.table.bare else ""
        return {name.removeprefix(prefix): shape for name, shape in self.every(kind).items()}

    def every(self, kind: str) -> dict[str, Shape]:
        """Returns the same with the prefix that all classes but the bare ones have."""
        found = {name: shape for _, name, shape in self._inside(lambda part: part.files())}
        return found | dict(self._expanded((*self.table.tensors, *self.table.classes[kind]), "", self.values))

    def _inside(self, of: Callable[[Architecture], Mapping[str, _T]]) -> Iterator[tuple[str, str, _T]]:
        """Yields a part's prefix, a name of it here, and what it has under that name."""
        for key, part in self.parts.items():
            prefix = self.table.parts[key].prefix
            yield from ((prefix, prefix + name, value) for name, value in of(part).items())

    def _expanded(self, nodes: Collection[NameNode], prefix: str, values: _Values) -> Iterator[tuple[str, Shape]]:
        for node in nodes:
            for name, here in self._numbered(node, values):
                if node.condition is not None and not self.value(node.condition, here):
                    continue
                if node.shape is None:
                    yield from self._expanded(node.inside, f"{prefix}{name}.", here)
                else:
                    yield prefix + name, tuple(self.whole(size, here) for size in node.shape)

    def _numbered(self, node: NameNode, values: _Values) -> Iterator[tuple[str, _Values]]:
        if not node.number:
            yield node.name, values
            return
        for index in range(self.count(node.number)):
            yield node.name.replace(f"{{{node.number}}}", str(index)), {**values, node.number: index}

    # ---- formulas

    def value(self, formula: Formula, values: _Values | None = None) -> FormulaValue:
        """Returns what a formula of the table comes to, with these values or the model's own.

        Raises
        ------
        TargetError
            ``odd-config``: it comes to nothing.
        """
        known = self.values if values is None else values

        def lookup(name: str) -> FormulaValue:
            part, _, key = name.rpartition(".")
            return self.parts[part].values[key] if part else known[name]

        try:
            return formula.value(lookup)
        except MappingError as error:
            raise self.odd(formula, error.what) from error

    def whole(self, formula: Formula, values: _Values | None = None) -> int:
        """Returns the size that a formula comes to.

        Raises
        ------
        TargetError
            ``odd-config``: it is not a whole number, or not above 0.
        """
        value = self.value(formula, values)
        if isinstance(value, int | float) and value == int(value) and value > 0:
            return int(value)
        raise self.odd(formula, f"`{formula.text.strip()}` is no size")

    def odd(self, formula: Formula, what: str) -> TargetError:
        """Returns the error about a formula, with the fields that it is made of."""
        stated = {name: self.values[name] for name in formula.names if name in self.values}
        return TargetError(
            "odd-config",
            f"{what} with the sizes in config.json",
            where=self.where,
            found=", ".join(f"{name} {shown(value)}" for name, value in stated.items()),
            hint=f"correct the one that does not describe these weights in {self.where}",
        )
