"""Adapters: merged into their bases before any rule sees the bases.

A base's catalog comes back with the merged tensors under the base's own names, so rules need not know of adapters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardmerge.adapters.base import Base
from shardmerge.adapters.checks import incomplete, unweighable
from shardmerge.adapters.homeless import idle_renames, without_base
from shardmerge.adapters.jobs import jobs
from shardmerge.adapters.makes import translated
from shardmerge.adapters.modules import ModuleMerge, whole_modules
from shardmerge.adapters.names import Places
from shardmerge.adapters.parts import AdapterTensors, sort_adapter
from shardmerge.adapters.refusals import packed_base, refuse_no_adapter, refuse_own_adapter
from shardmerge.adapters.replication import replicated
from shardmerge.adapters.settings import AdapterSettings, has_own_config, read_adapter_settings
from shardmerge.errors import ShardmergeError, raise_all
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.tensors import Catalog, ReadSideFile, TensorEntry


@dataclass(frozen=True, slots=True)
class Merged:
    """The outcome.

    Attributes
    ----------
    catalogs
        All of them, the bases with the merged tensors in place of their own.
    used
        (source, name) of every adapter tensor that is part of a base now.
    configs
        By the name of a base: what its config.json has to say otherwise.
    """

    catalogs: dict[str, Catalog]
    used: frozenset[tuple[str, str]]
    configs: Mapping[str, dict[str, object]] = field(default_factory=dict)


def merge_adapters(
    specs: Sequence[AdapterSpec], catalogs: Mapping[str, Catalog], read: ReadSideFile, *, typed: bool = False
) -> Merged:
    """Returns the catalogs with every adapter merged into its base.

    Parameters
    ----------
    specs, catalogs
        Of the mapping; catalogs by source.
    read
        Reads a side file.
    typed
        Whether all floats of the output get a type of the user's: what was trained keeps its own until then.

    Raises
    ------
    MappingError
        All problems at once: ``not-an-adapter``, ``adapter-without-base``, ``adapter-incomplete``, ``unknown-alpha``,
        ``adapter-rank``, ``adapter-shape``, ``adapters-clash``, ``packed-weights``, ``op-shape``, ``tied-embeddings``,
        ``base-with-adapter``,
        ``unknown-layer``, ``adapter-vocabulary``, and those of ``read_adapter_settings`` and ``sort_adapter``.
    """
    bases: dict[str, Base] = {}
    used = set[tuple[str, str]]()
    problems: list[ShardmergeError] = []
    for job in jobs(specs, catalogs, read, problems, typed=typed):
        spec, adapter, held = job.spec, job.adapter, job.held
        name = spec.onto.source
        base = catalogs[name]
        try:
            if name not in bases and adapter.path != base.path:
                refuse_own_adapter(spec, base)
            before = bases[name] if name in bases else Base.of(name, held or base, read)
            work = _AdapterMerge(spec, adapter, before, read, own=held is not None, typed=typed)
            bases[name] = work.merged()
            used |= {(spec.source.source, one) for one in _taken(spec, adapter, work.parts, held)}
            used |= job.also
        except ShardmergeError as error:
            problems += error.each()
    raise_all(problems)
    found = dict(catalogs) | {name: base.catalog for name, base in bases.items()}
    for source, onto in {} if typed else {spec.source.source: spec.onto.source for spec in specs}.items():
        if source not in bases and source in found and onto in bases:
            found[source] = bases[onto].beside(found[source], {name for owner, name in used if owner == source})
    return Merged(found, frozenset(used), {name: base.changes for name, base in bases.items() if base.changes})


def _taken(spec: AdapterSpec, adapter: Catalog, parts: AdapterTensors, held: Catalog | None) -> Collection[str]:
    """Returns the names of an adapter's source that are part of the base now; of one that holds it, all others are."""
    if held is None:
        return parts.used
    return parts.used - set(held.names()) if spec.source.source == spec.onto.source else set(adapter.names())


@dataclass(slots=True)
class _AdapterMerge:
    """One adapter on its way into its base, which is its ``own`` where its checkpoint holds it."""

    spec: AdapterSpec
    adapter: Catalog
    base: Base
    read: ReadSideFile
    own: bool = False
    typed: bool = False
    parts: AdapterTensors = field(default_factory=AdapterTensors)
    settings: AdapterSettings = field(default_factory=AdapterSettings)

    def merged(self) -> Base:
        """Returns the base with the adapter in it, as it is where there is nothing to merge and that is allowed."""
        if has_own_config(self.adapter):  # its kind explains names that no LoRA has
            self.settings = read_adapter_settings(self.spec, self.adapter, self.read)
        found = translated(self.spec, self.adapter, self.base.catalog)
        self.parts = sort_adapter(self.spec, found.catalog)
        self.parts = replace(self.parts, used={found.names.get(name, name) for name in self.parts.used})
        self.parts = self.parts.trained_alone() if self.own else self.parts
        if not self.parts.modules and not self.parts.whole:
            refuse_no_adapter(self.spec, self.adapter, self.parts)
            return self.base  # a checkpoint that may hold an adapter or not
        self.settings = read_adapter_settings(self.spec, self.adapter, self.read, alpha_is_rank=found.alpha_is_rank)
        raise_all(unweighable(self.settings.weight, self.parts, self.spec))
        base = self.base.with_files(self.adapter, self.spec.source.source, self.read)
        if self.settings.config.replication:
            base = replicated(base, self.settings.config.replication, self.spec)
        places = Places.of(self.spec, base.catalog, self._of_weights(), base.config)
        base = base.untied(self._trained_places(places), self.settings.config, places)
        base = base.with_head(self.parts.whole, self.settings.config, places)
        places = replace(places, base=base.catalog)
        problems: list[ShardmergeError] = list(
            incomplete(self.settings.config, self.parts, base, places, self.adapter.path)
        )
        problems += idle_renames(self.spec, self.parts)
        homeless: list[str] = []
        entries = dict(self._made(base, places, problems, homeless))
        raise_all([*problems, *without_base(self.spec, homeless, places, self.parts, self.settings.config.saved)])
        rows = [f"{module}.weight" for module, parts in self.parts.modules.items() if "tokens" in parts]
        whole = frozenset(entries) & {place for name in (*self.parts.whole, *rows) if (place := places.find(name))}
        base = base.changed(entries, whole, source=self.spec.source.source)
        return base.with_words(self._notes(places), self._warnings())

    def _weights(self) -> Iterator[str]:
        """Yields the names of the weights that get a product or new rows, as the adapter has them."""
        return (f"{module}.weight" for module in whole_modules(self.parts.modules, self.settings.config))

    def _of_weights(self) -> AdapterTensors:
        return replace(self.parts, modules=whole_modules(self.parts.modules, self.settings.config))

    def _trained_places(self, places: Places) -> frozenset[str]:
        low_rank = (f"{name}.weight" for name, parts in self.parts.modules.items() if set(parts) != {"tokens"})
        return frozenset(places.name(name) for name in (*low_rank, *self.parts.trained))

    def _notes(self, places: Places) -> Iterator[str]:
        done = count(len(self.parts.modules) + len(self.parts.whole), "module")
        alpha = self.settings.config.alpha
        said = f", alpha {alpha:g} from {self.settings.said_by}" if alpha is not None else ""
        said += f", weight {self.settings.weight:g}" if self.settings.weight != 1 else ""
        yield f"{done} merged from {self.spec.source.source}{said}"
        yield from places.notes()

    def _warnings(self) -> Iterator[str]:
        source = self.spec.source.source
        if (alpha := self.settings.config.alpha) is not None and alpha <= 0 and self.parts.modules:
            effect = "is taken off" if alpha else "changes nothing"
            yield f"{source}: lora_alpha is {alpha:g}: the adapter {effect}"
        if not self.settings.weight:
            yield f"{source}: its weight is 0: it changes nothing"
        if self.parts.left_out:
            yield (
                f"{count(len(self.parts.left_out), 'frozen tensor')} of {source} without numbers (placeholders or "
                f"packed): the base's are taken, e.g. for {listed(self.parts.left_out, 1)}"
            )

    def _made(
        self, base: Base, places: Places, problems: list[ShardmergeError], homeless: list[str]
    ) -> Iterator[tuple[str, TensorEntry]]:
        weights = [*self.parts.whole, *self._weights()]
        if codes := [*packed_base(self.spec, base.catalog, (places.find(one) or places.name(one) for one in weights))]:
            problems += codes
            return
        for name, entry in self.parts.whole.items():
            place = places.find(name)
            if place is not None:
                problems += base.misfits(place, entry, self.spec, trained=name in self.parts.trained)
                yield place, entry if self.typed else base.in_its_type(place, entry)
            elif name in self.parts.trained:
                homeless.append(name)
            elif not self._is_tied(entry):
                self.parts.used.discard(entry.name)  # a dump holds more than its adapter: rules may want a projector
        merge = ModuleMerge(self.spec, self.settings, self.parts.bases)
        yield from merge.all_made(base, places, self.parts.modules, problems, homeless)

    def _is_tied(self, entry: TensorEntry) -> bool:
        """Tells whether a tensor has a second name: a full dump has ``lm_head``, a base that ties it has not."""
        return entry.name in self.adapter.aliases or entry.name in self.adapter.aliases.values()
