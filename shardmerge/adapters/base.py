"""A base while adapters are merged into it: what has changed, and what its config has to say then."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.adapters.files import files_beside
from shardmerge.adapters.layers import Layers
from shardmerge.adapters.names import Places
from shardmerge.adapters.types import as_base, as_replaced
from shardmerge.adapters.weights import with_rows
from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.targets.adapter_config import last_names
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.tensors import Catalog, ReadSideFile, TensorEntry
from shardmerge.tensors.file_roles import CONFIG
from shardmerge.tensors.vocabulary_names import EMBEDDINGS, HEADS, OVER_VOCABULARY

_HEAD = "lm_head.weight"
# Language models whose head is `lm_head` beside one of these embeddings (LLaMA and its kin, GPT-2, OPT, BLOOM, Falcon).
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_BESIDE_A_HEAD = frozenset({
    "model.embed_tokens.weight", "transformer.wte.weight", "model.decoder.embed_tokens.weight",
    "transformer.word_embeddings.weight",
})  # fmt: skip
# Whole models with a head, which may be tied; one that ends in `Model` has none.
_WITH_HEAD = (*_CAUSAL, "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")
# peft's task types whose head is new, and how transformers calls the model with that head.
_CLASSIFIERS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


@dataclass(frozen=True, slots=True)
class Base:
    """A base.

    Attributes
    ----------
    name
        Of its source.
    before, catalog
        As it was opened, and as it is now.
    config
        Its config.json, ``{}`` where there is none.
    changes
        What config.json has to say otherwise by now.
    changed_by, replaced_by
        Names of weights that adapters added to, or replaced whole, and the source that did.
    """

    name: str
    before: Catalog
    catalog: Catalog
    config: JsonObject
    changes: JsonObject = field(default_factory=dict)
    changed_by: Mapping[str, str] = field(default_factory=dict)
    replaced_by: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, catalog: Catalog, read: ReadSideFile) -> Base:
        """Returns an untouched base."""
        config = load_object(catalog.side_files[CONFIG], read) if CONFIG in catalog.side_files else {}
        return cls(name, catalog, catalog, config)

    @property
    def layers(self) -> Layers:
        """What is known of its layers."""
        return Layers(self.catalog, self.config)

    def weights(self, place: str, saved: TensorEntry | None = None) -> tuple[TensorEntry, TensorEntry | None]:
        """Returns a weight as it is now, and as it was before any adapter where one has changed it.

        ``saved`` is the copy that peft saved below the adapter; it counts where the vocabulary has grown.
        """
        now = replace(self.catalog[place], source=self.name)
        if place in self.changed_by:
            before = self.before if place in self.before else self.catalog
            return now, replace(before[place], source=self.name)
        grown = saved is not None and place.endswith(OVER_VOCABULARY) and saved.shape != now.shape
        return (saved if grown and saved is not None else now), None

    def in_its_type(self, place: str, entry: TensorEntry) -> TensorEntry:
        """Returns a tensor in the type of the one that it replaces."""
        return as_replaced(entry, self.catalog[place])

    def beside(self, run: Catalog, merged: Collection[str]) -> Catalog:
        """Returns what was trained beside an adapter, its ``merged`` tensors aside, in the type of this base."""
        return as_base(run, self.before, merged)

    def refuse_clash(self, place: str, spec: AdapterSpec, *, replacing: bool = False) -> None:
        """Raises ``adapters-clash`` where an earlier adapter replaced the weight, or changed one of which this one
        would replace rows.
        """
        earlier = self.replaced_by.get(place) or (self.changed_by.get(place) if replacing else None)
        if earlier:
            raise _clash(place, earlier, spec)

    def misfits(self, place: str, entry: TensorEntry, spec: AdapterSpec, *, trained: bool) -> Iterable[ShardmergeError]:
        """Yields what is wrong with a weight that is to replace the base's."""
        earlier = self.changed_by.get(place) or (self.replaced_by.get(place) if trained else None)
        if earlier:
            yield _clash(place, earlier, spec)
        old = self.catalog[place].shape
        grows = trained and place.endswith(OVER_VOCABULARY) and entry.shape[1:] == old[1:] and entry.shape
        if entry.shape != old and not grows:
            yield MappingError(
                "adapter-shape",
                f"{spec.source.source} has {place} in another shape than its base",
                where=str(spec.mark),
                found=f"{list(entry.shape)} in {spec.source.source}:{entry.name}",
                expected=f"{list(old)} in {self.name}:{place}",
                hint=f"name as `{self.name}` the model that the adapter was trained on",
            )

    def token_rows(
        self, now: TensorEntry, rows: TensorEntry, module: str, tokens: Mapping[str, tuple[int, ...]]
    ) -> TensorEntry:
        """Returns an embedding with the rows of ``trainable_token_indices``.

        Raises
        ------
        MappingError
            ``adapter-setting``: the config does not say which rows, or says others than there are.
        """
        named = [one for name, one in tokens.items() if not name or last_names(module, (name,))]
        ids = named[0] if len(named) == 1 else ()
        fits = len(ids) == len(set(ids)) == (rows.shape[0] if rows.shape else 0) and rows.shape[1:] == now.shape[1:]
        if not ids or not fits or max(ids) >= now.shape[0]:
            raise MappingError(
                "adapter-setting",
                f"{module}: trainable_token_indices does not say which rows the trained tokens are",
                found=f"{list(rows.shape)} trained, {len(ids)} ids, and a base of {list(now.shape)}",
                expected="a different row of the base for each",
                hint="name the base of the run, with its number of rows, and use the adapter_config.json of the run",
            )
        return with_rows(now, rows, ids)

    def untied(self, trained: Collection[str], config: AdapterConfig, places: Places) -> Base:
        """Returns the base with a head of its own, where an adapter trained a tied embedding or its head alone.

        peft leaves the other one as it was (its live model; transformers' ``tie_word_embeddings`` becomes false), so
        the two are no longer one.

        Raises
        ------
        MappingError
            ``tied-embeddings``: the names of the two are not known.
        """
        ends = (*EMBEDDINGS, _HEAD)
        touched = [place for place in trained if place.endswith(ends)]
        if not touched or not self._is_tied():
            return self._apart() if touched else self
        embeddings = [name for name in self.catalog.names() if name.endswith(EMBEDDINGS)]
        if config.tied and not any(place.endswith(_HEAD) for place in touched):
            return self  # ensure_weight_tying: the head follows
        head = places.name(_HEAD)
        known = {*embeddings, head} if len(embeddings) == 1 and self._is_plain(embeddings[0], places) else set()
        if not set(touched) <= known:
            raise _tied(touched, self.name)
        copies = {name: replace(self.catalog[embeddings[0]], name=name) for name in (*embeddings, head)}
        aliases = {alias: name for alias, name in self.catalog.aliases.items() if alias not in copies}
        catalog = replace(self.catalog, entries={**self.catalog.entries, **copies}, aliases=aliases)
        text = (
            f"the embeddings were tied, and the adapter trained {' and '.join(sorted(touched))} alone or apart: "
            f"{head} is written on its own, and config.json says tie_word_embeddings: false"
        )
        before = replace(self.before, entries={**self.before.entries, **copies}, aliases=aliases)
        done = replace(self, before=before, catalog=catalog, changes={**self.changes, "tie_word_embeddings": False})
        return done.with_words((), (text,))

    def _apart(self) -> Base:
        """Embedding and head of an untied model may be one storage in a torch file: each becomes its own."""
        own = {
            alias: replace(self.catalog[alias], name=alias)
            for alias in self.catalog.aliases
            if alias.endswith(OVER_VOCABULARY)
        }
        aliases = {alias: name for alias, name in self.catalog.aliases.items() if alias not in own}
        return replace(self, catalog=replace(self.catalog, entries={**self.catalog.entries, **own}, aliases=aliases))

    def _is_plain(self, embedding: str, places: Places) -> bool:
        """Whether this is a causal model with its head under the name that is known to belong to the embedding."""
        usual = {places.name(name) for name in _BESIDE_A_HEAD}
        return embedding in usual and "vocab_size" in self.config and self._architecture().endswith(_CAUSAL)

    def _is_tied(self) -> bool:
        said = self.changes.get("tie_word_embeddings", self.config.get("tie_word_embeddings"))
        if isinstance(said, bool):
            return said
        aliased = any(name.endswith(OVER_VOCABULARY) for name in self.catalog.aliases)
        headless = not any(name.endswith(HEADS) for name in self.catalog.entries)
        return (aliased or headless) and self._architecture().endswith(_WITH_HEAD)

    def with_head(self, whole: Mapping[str, TensorEntry], config: AdapterConfig, places: Places) -> Base:
        """Returns a causal base as the classifier that the run made of it.

        It gets the adapter's head and loses that of a language model; config.json says architecture and labels.
        """
        new = {
            places.name(name): entry
            for name, entry in whole.items()
            if places.find(name) is None and last_names(name.rpartition(".")[0], config.saved)
        }
        labels = [entry.shape[0] for name, entry in new.items() if name.endswith(".weight") and len(entry.shape) == 2]
        named = self._architecture()
        stem = next((named.removesuffix(end) for end in _CAUSAL if named.endswith(end)), "")
        if config.task not in _CLASSIFIERS or len(labels) != 1 or not stem:
            return self
        gone = places.name(_HEAD)
        entries = {name: entry for name, entry in self.catalog.entries.items() if name != gone}
        aliases = {alias: name for alias, name in self.catalog.aliases.items() if gone not in (alias, name)}
        names = {number: f"LABEL_{number}" for number in range(labels[0])}
        words = {
            "architectures": [stem + _CLASSIFIERS[config.task]],
            "id2label": {str(number): name for number, name in names.items()},
            "label2id": {name: number for number, name in names.items()},
        }
        done = replace(
            self,
            catalog=replace(self.catalog, entries={**entries, **new}, aliases=aliases),
            changes={**self.changes, **words},
        )
        text = (
            f"the adapter trained a classifier: {', '.join(new)} is its head, {gone} is left out, "
            f"and config.json says {words['architectures']} with {labels[0]} labels, LABEL_0 and so on"
        )
        return done.with_words((), (text,))

    def _architecture(self) -> str:
        listed = self.config.get("architectures")
        named = listed[0] if isinstance(listed, list) and listed else ""
        return named if isinstance(named, str) else ""

    def changed(self, entries: Mapping[str, TensorEntry], whole: Collection[str], *, source: str) -> Base:
        """Returns the base with other tensors under some names; ``whole`` are those that were replaced.

        Raises
        ------
        MappingError
            ``adapter-vocabulary``: embedding and head have different numbers of rows now.
        """
        catalog = replace(self.catalog, entries={**self.catalog.entries, **entries})
        done = replace(
            self,
            catalog=catalog,
            changed_by={**self.changed_by, **dict.fromkeys(set(entries) - set(whole), source)},
            replaced_by={**self.replaced_by, **dict.fromkeys(whole, source)},
        )
        return done.of_new_rows(entries)

    def of_new_rows(self, entries: Mapping[str, TensorEntry]) -> Base:
        """Returns the base whose config says the rows that some new tensors brought; see ``changed``."""
        grown = {
            name: entry.shape[0]
            for name, entry in entries.items()
            if name.endswith(OVER_VOCABULARY) and name in self.before and entry.shape != self.before[name].shape
        }
        if not grown:
            return self
        before = {self.before[name].shape[0] for name in grown}
        every = {name: self.catalog[name].shape[0] for name in self.catalog.entries if name.endswith(OVER_VOCABULARY)}
        rows = {every[name] for name in every if name in grown or every[name] in before}
        if len(rows) != 1 or not self._says_rows():
            raise MappingError(
                "adapter-vocabulary",
                "the adapter has another vocabulary size than its base, and lacks tensors that depend on it",
                where=self.catalog.path,
                found=", ".join(f"{name} {count} rows" for name, count in every.items()),
                expected="as many rows in embedding and head, and a config.json with vocab_size",
                hint="resize the base as the run did (resize_token_embeddings, save_pretrained) and name that one",
            )
        count = rows.pop()
        text = f"the vocabulary has {count} rows in the adapter and {', '.join(map(str, sorted(before)))} in the base"
        done = replace(self, changes={**self.changes, "vocab_size": count})
        return done.with_words((), (f"{text}: config.json says vocab_size: {count}",))

    def _says_rows(self) -> bool:
        return isinstance(self.config.get("vocab_size"), int)

    def with_files(self, adapter: Catalog, source: str, read: ReadSideFile) -> Base:
        """Returns the base with the tokenizer and processor that lie beside an adapter in place of its own."""
        files, words = files_beside(adapter, self.catalog, self.config, (source, self.name), read)
        return replace(self, catalog=replace(self.catalog, side_files=files)).with_words((), words) if words else self

    def with_words(self, notes: Iterable[str], warnings: Iterable[str]) -> Base:
        """Returns the base with more notes and warnings."""
        catalog = self.catalog
        return replace(
            self,
            catalog=replace(
                catalog, notes=(*catalog.notes, *notes), warnings=tuple(dict.fromkeys((*catalog.warnings, *warnings)))
            ),
        )


def _clash(place: str, earlier: str, spec: AdapterSpec) -> MappingError:
    return MappingError(
        "adapters-clash",
        f"two adapters change {place}, and one of them replaces the whole tensor",
        where=str(spec.mark),
        found=f"{earlier} and {spec.source.source}",
        expected="modules_to_save and trained biases in one adapter only, as in peft",
        hint="merge one of them and use the result as the base of the other, in the order in which they were trained",
    )


def _tied(touched: Collection[str], name: str) -> MappingError:
    return MappingError(
        "tied-embeddings",
        f"{name} ties its embeddings, and the adapter trained one of the two: {', '.join(sorted(touched))}",
        expected="one embedding such as model.embed_tokens.weight, lm_head.weight tied to it, and a plain config.json",
        hint="untie the base first: load it with transformers, set config.tie_word_embeddings to false, give lm_head a "
        "copy of embed_tokens, save_pretrained, and name that as the base",
    )
