"""Quantized sources before any rule sees them: scaled float8 weights become numbers where somebody needs numbers.

All of a source's weights or none: its config speaks of them all. Where a cast, an op, an adapter or a target needs
numbers, each weight of the catalog becomes ``op: dequantize`` of its codes and scales, the scales are part of it from
then on, scales of activations are dropped, and the config loses its word about quantization. Everywhere else the codes
are copied as they are, scales and config with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.compose import compose
from shardmerge.errors import CheckpointError, MappingError, ShardmergeError, raise_all
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.suggest import drop_lines, ticked
from shardmerge.prepare.needs import Needs
from shardmerge.targets.quantization_config import QUANTIZATION_FILES, Stated, read_stated
from shardmerge.tensors import Catalog, ReadSideFile, TensorEntry, leaves, of_source
from shardmerge.tensors.packed import (
    ACTIVATION_SCALES,
    FLOAT8,
    FP8,
    Packed,
    fp8_weights,
    is_wide,
    packed_weights,
    titles,
    unscaled,
)


@dataclass(frozen=True, slots=True)
class Dequantized:
    """The outcome.

    Attributes
    ----------
    catalogs
        By source name, weights dequantized where somebody needs numbers, and then without any scales.
    used
        (source, name) of the scales that are part of weights now.
    dropped
        (source, name) of scales of activations, which mean nothing beside numbers.
    skipped
        By source name, the modules that its config says are not quantized.
    said
        By name of the sources that were dequantized, what to tell of it.
    """

    catalogs: dict[str, Catalog]
    used: frozenset[tuple[str, str]]
    dropped: frozenset[tuple[str, str]]
    skipped: Mapping[str, tuple[str, ...]]
    said: Mapping[str, str]

    def told(self, catalogs: Mapping[str, Catalog], entries: Iterable[TensorEntry]) -> dict[str, Catalog]:
        """Returns catalogs with a warning for each whose dequantized weights some of the entries are made of."""
        used = {leaf.source for one in entries if self.said for leaf in leaves(one) if leaf.dtype.name in FLOAT8}
        texts = {name: text for name, text in self.said.items() if name in used}
        return {
            name: replace(catalog, warnings=(*catalog.warnings, texts[name])) if name in texts else catalog
            for name, catalog in catalogs.items()
        }


def dequantized(catalogs: Mapping[str, Catalog], needs: Needs, read: ReadSideFile) -> Dequantized:
    """Returns the catalogs with numbers where they are needed.

    Raises
    ------
    CheckpointError
        All problems at once. ``odd-scales``: scales that do not fit their weights. ``missing-scales``: float8 weights
        without any beside others that have them, or under a config that says so. ``scales-beside-numbers``: block
        scales beside weights of 16 bits.
    """
    found, said = dict[str, Catalog](), dict[str, str]()
    used, dropped = set[tuple[str, str]](), set[tuple[str, str]]()
    problems: list[ShardmergeError] = []
    stated = {name: read_stated(catalog, read) for name, catalog in catalogs.items()}
    for name, catalog in catalogs.items():
        try:
            work = _QuantizedSource(name, catalog, stated[name], needs)
            found[name] = work.settled()
        except ShardmergeError as error:
            problems += error.each()
            continue
        used |= {(name, scale) for scale in work.used}
        dropped |= {(name, scale) for scale in work.dropped}
        said |= {name: work.said} if work.said else {}
    raise_all(problems)
    skipped = {name: one.skipped for name, one in stated.items()}
    return Dequantized(found, frozenset(used), frozenset(dropped), skipped, said)


@dataclass(slots=True)
class _QuantizedSource:
    """One source."""

    name: str
    catalog: Catalog
    stated: Stated
    needs: Needs
    used: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    said: str = ""

    def settled(self) -> Catalog:
        """Returns the catalog as the rules shall see it."""
        catalog = replace(self.catalog, quantized=self.stated.method)
        packed = packed_weights(catalog)
        published = self.name in self.needs.published
        purpose = self.needs.purposes.get(self.name, "")
        if purpose or published:
            raise_all(self._multiplied_or_not())
        if not packed:
            return self._numbers_already(catalog) if (purpose or published) and self.stated.method else catalog
        weights = fp8_weights(catalog)
        if published and not self.stated.method:
            catalog = replace(catalog, warnings=(*catalog.warnings, *self._unstated(packed)))
            purpose = purpose or "its config.json, which does not say that they are scaled"
        return self._dequantized(catalog, weights, purpose) if purpose and weights else catalog

    def _multiplied_or_not(self) -> Iterator[CheckpointError]:
        """Weights of 16 bits beside block scales: somebody cast the codes, or dequantized them and left the scales."""
        scales = [name for name in self._names() if name.endswith("_scale_inv")]
        weights = {name: name.removesuffix("_scale_inv") for name in scales}
        odd = [name for name in scales if weights[name] in self.catalog and is_wide(self.catalog[weights[name]])]
        if odd:
            first = weights[odd[0]]
            yield CheckpointError(
                "scales-beside-numbers",
                f"{count(len(odd), 'weight')} of {self.name} of {self.catalog[first].dtype} with scales beside them: "
                f"codes that were cast, or values that were multiplied already: {listed(odd, 3)}",
                where=self.catalog.path,
                expected=f"{first} of a float8 type, or no {odd[0]}",
                hint="fetch the float8 checkpoint again; if the weights are multiplied by now, write a mapping that "
                f"says under `drop:` {self._lines(odd)}",
            )

    def _lines(self, names: list[str]) -> str:
        kept = set(self.catalog.names()) - set(names)
        return ticked(drop_lines(self.name, names, kept))

    def _names(self) -> Iterator[str]:
        return (name for name in self.catalog.names() if (self.name, name) not in self.needs.dropped)

    def _numbers_already(self, catalog: Catalog) -> Catalog:
        """A config that speaks of codes beside weights that are numbers is wrong, and loaders believe it."""
        if lost := unscaled(catalog):
            raise self._missing(lost)
        stored = all(entry.dtype.kind != "float" or entry.dtype.itemsize > 1 for entry in catalog.entries.values())
        scaled = any("scale" in name.rpartition(".")[2] for name in self._names())
        if not self.stated.whole or not stored or scaled:
            return catalog
        text = f"config.json says {self.stated.method}, and all weights are numbers: quantization_config is left out"
        said = (text,) if self.name in self.needs.published else ()
        return as_plain(replace(catalog, warnings=(*catalog.warnings, *said)))

    def _unstated(self, packed: Mapping[str, Packed]) -> Iterator[str]:
        others = [name for name, one in packed.items() if one.title != FP8]
        if others and "config.json" in self.catalog.side_files:
            yield (
                f"{count(len(others), 'tensor')} quantized ({titles(packed, others)}), and config.json does not say "
                "so: loaders will not find these weights without the `quantization_config` of whoever made them"
            )

    def _dequantized(self, catalog: Catalog, weights: Mapping[str, str], purpose: str) -> Catalog:
        if lost := unscaled(catalog):
            raise self._missing(lost)
        entries = dict(catalog.entries)
        problems: list[ShardmergeError] = []
        for name, scale in weights.items():
            if (self.name, name) in self.needs.by_rule:
                continue
            try:
                entries[name] = self._made(name, scale)
            except MappingError as error:
                problems.append(self._odd(name, error))
            self.used.add(scale)
        raise_all(problems[:1])  # the same for every weight
        own = {name for name in catalog.names() if name.rpartition(".")[2] in ACTIVATION_SCALES}
        self.dropped |= {name for name in own | self._of_activations(weights) if name not in self.used}
        text = (
            f"{count(len(weights), 'float8 weight')} dequantized (codes times scales), {self.stated.dtype} where no "
            f"other type is asked for, for {purpose}; nothing says any more that they are quantized"
        )
        self.said = text
        return as_plain(self._without(replace(catalog, entries=entries)))

    def _without(self, catalog: Catalog) -> Catalog:
        """Leaves out the scales, which are part of weights or mean nothing now."""
        gone = self.used | self.dropped
        entries = {name: entry for name, entry in catalog.entries.items() if name not in gone}
        aliases = {alias: name for alias, name in catalog.aliases.items() if alias not in gone and name in entries}
        return replace(catalog, entries=entries, aliases=aliases)

    def _of_activations(self, weights: Mapping[str, str]) -> set[str]:
        """Scales of the activations of experts that are one tensor are named after it."""
        names = (f"{name}{ending}" for name in weights for ending in ("_activation_scale", "_input_scale"))
        return {name for name in names if name in self.catalog}

    def _made(self, name: str, scale: str) -> TensorEntry:
        from shardmerge.ops.dequantize import Dequantize

        inputs = [of_source(self.catalog[each], self.name) for each in (name, scale)]
        made = compose(Dequantize(self._block(inputs), self.stated.dtype), inputs)
        return TensorEntry(name, made.dtype, made.shape, made.pieces, "dequantized", self.name)

    def _block(self, inputs: list[TensorEntry]) -> tuple[int, ...]:
        """The config's blocks are those of the weights that have so many scales; other weights tell by their shape."""
        weight, scale = (entry.shape[-2:] for entry in inputs)
        said = self.stated.block
        fits = len(said) == len(weight) == len(scale) == 2 and all(
            parts in (1, -(-size // length)) for size, parts, length in zip(weight, scale, said, strict=True)
        )
        return said if fits else ()

    def _odd(self, name: str, error: MappingError) -> CheckpointError:
        return CheckpointError(
            "odd-scales",
            f"{name} of {self.name}: {error.what}",
            where=self.catalog.path,
            found=error.found,
            expected=error.expected,
            hint="fetch the checkpoint again: weights and scales are from different downloads",
        )

    def _missing(self, names: list[str]) -> CheckpointError:
        return CheckpointError(
            "missing-scales",
            f"{count(len(names), 'float8 weight')} of {self.name} without a scale: {listed(names, 3)}",
            where=self.catalog.path,
            found=f"config.json says {self.stated.method}" if self.stated.method else "scales beside other weights",
            expected=f"{names[0]}_scale_inv or {names[0]}_scale",
            hint="fetch the checkpoint again: all files with scales belong to it",
        )


def as_plain(catalog: Catalog) -> Catalog:
    """Takes away what says that weights are quantized; ``dequantized`` lets targets write the config without it."""
    sides = {name: extent for name, extent in catalog.side_files.items() if name not in QUANTIZATION_FILES}
    return replace(catalog, side_files=sides, quantized="", dequantized=True)
