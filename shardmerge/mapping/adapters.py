"""Adapters: merged into their bases before any rule sees the bases.

A base's catalog comes back with the merged tensors under the base's own names, so rules need not know of adapters. Key
shapes are those of peft 0.6 to 0.21, as saved by ``save_pretrained`` (no adapter name) and as they stand in a model
(``.default``), which is what XTuner and DeepSpeed save.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shardmerge.compose import compose
from shardmerge.errors import MappingError, ShardmergeError, raise_all
from shardmerge.mapping.adapter_settings import Settings, read_settings
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.lora import Dora, Lora
from shardmerge.ops.moves import Permute, Reshape
from shardmerge.ops.pointwise import Linear
from shardmerge.packed import packed_places, packed_weights, titles
from shardmerge.targets.expectation import ReadSideFile
from shardmerge.tensors import Catalog, TensorEntry

_PREFIX = "base_model.model."

# What stands behind a module's name, with the adapter's own name or without it, and which part of an adapter it is.
_PARTS = (
    (re.compile(r"(.+)\.lora_A(\.[^.]+)?\.weight"), "a"),
    (re.compile(r"(.+)\.lora_B(\.[^.]+)?\.weight"), "b"),
    (re.compile(r"(.+)\.lora_B(\.[^.]+)?\.bias"), "b_bias"),
    (re.compile(r"(.+)\.lora_embedding_A(\.[^.]+)?"), "embedding_a"),
    (re.compile(r"(.+)\.lora_embedding_B(\.[^.]+)?"), "embedding_b"),
    (re.compile(r"(.+)\.lora_magnitude_vector(\.[^.]+)?(?:\.weight)?"), "magnitude"),
)
_SAVED = re.compile(r"(.+)\.modules_to_save(\.[^.]+)?\.([^.]+)")
# Full dumps hold these besides: the untouched copy of a module that was trained whole.
_ORIGINAL = re.compile(r".+\.original_module\.[^.]+")
_BASE_LAYER = re.compile(r"(.+)\.base_layer\.([^.]+)")


@dataclass(frozen=True, slots=True)
class Merged:
    """The outcome.

    Attributes
    ----------
    catalogs
        All of them, the bases with the merged tensors in place of their own.
    used
        (source, name) of every adapter tensor that is part of a base now.
    """

    catalogs: dict[str, Catalog]
    used: frozenset[tuple[str, str]]


def merge_adapters(specs: Sequence[AdapterSpec], catalogs: Mapping[str, Catalog], read: ReadSideFile) -> Merged:
    """Returns the catalogs with every adapter merged into its base.

    Raises
    ------
    MappingError
        All problems at once: ``not-an-adapter``, ``adapter-without-base``, ``adapter-incomplete``, ``unknown-alpha``,
        ``adapter-rank``, ``packed-weights``, ``op-shape``, and those of ``read_settings``.
    """
    found, used = dict(catalogs), set[tuple[str, str]]()
    problems: list[ShardmergeError] = []
    for spec in specs:
        if spec.source.source not in found or spec.onto.source not in found:
            continue  # declared `required: false`, and not there
        try:
            work = _Merge(spec, found[spec.source.source], found[spec.onto.source], read)
            merged = work.merged()
        except MappingError as error:
            problems += error.each()
            continue
        except ShardmergeError as error:
            problems += error.each()
            continue
        if merged is not None:
            found[spec.onto.source] = merged
            used |= {(spec.source.source, name) for name in work.used}
    raise_all(problems)
    return Merged(found, frozenset(used))


@dataclass(slots=True)
class _Module:
    """The tensors of one adapted module, by part."""

    parts: dict[str, TensorEntry] = field(default_factory=dict)


@dataclass(slots=True)
class _Merge:
    """One adapter on its way into its base."""

    spec: AdapterSpec
    adapter: Catalog
    base: Catalog
    read: ReadSideFile
    used: set[str] = field(default_factory=set)
    modules: dict[str, _Module] = field(default_factory=lambda: defaultdict(_Module))
    whole: dict[str, TensorEntry] = field(default_factory=dict)

    def merged(self) -> Catalog | None:
        """Returns the base with the adapter in it, None where there is nothing to merge and that is allowed."""
        self._sort()
        if not self.modules and not self.whole:
            if self.spec.optional:
                return None
            raise MappingError(
                "not-an-adapter",
                f"{self.spec.source.source} holds no adapter tensors under `{self.spec.source.template}`",
                where=str(self.spec.mark),
                found=listed(list(self.adapter.names()), 3),
                expected="names with `lora_A` and `lora_B`, or `modules_to_save`",
                hint="`shardmerge inspect` shows the names; say `from: source:prefix.{rest...}` if there is a prefix",
            )
        settings = read_settings(self.spec, self.adapter, self.read)
        entries = dict(self.base.entries)
        problems: list[ShardmergeError] = []
        homeless: list[str] = []
        entries |= dict(self._made(settings, problems, homeless))
        raise_all([*problems, *self._without_base(homeless)])
        note = f"{count(len(self.modules) + len(self.whole), 'module')} merged from {self.spec.source.source}"
        alpha = f", alpha {settings.alpha:g} from {settings.said_by}" if settings.alpha is not None else ""
        return replace(self.base, entries=entries, notes=(*self.base.notes, note + alpha))

    def _sort(self) -> None:
        """Finds out of every name which module and part it is."""
        named = self.spec.settings.get("name", "")
        for name in self.adapter.names():
            bindings = self.spec.source.template.match(name)
            if bindings is None or (rest := bindings["rest"].removeprefix(_PREFIX)) == bindings["rest"]:
                continue  # everything of an adapter stands below base_model.model
            self.used.add(name)
            entry = replace(self.adapter[name], source=self.spec.source.source)
            self._sort_one(rest, entry, named)

    def _sort_one(self, rest: str, entry: TensorEntry, named: str) -> None:
        for pattern, part in _PARTS:
            match = pattern.fullmatch(rest)
            if match is not None:
                if not named or match[2] in (None, f".{named}"):
                    self._add(match[1], part, entry)
                return
        saved, layer = _SAVED.fullmatch(rest), _BASE_LAYER.fullmatch(rest)
        if saved is not None:
            self.whole[f"{saved[1]}.{saved[3]}"] = entry
        elif layer is not None and layer[2] != "weight":
            self.whole[f"{layer[1]}.{layer[2]}"] = entry  # a trained bias; the weight itself is the base's
        elif layer is None and _ORIGINAL.fullmatch(rest) is None:
            self.whole[rest] = entry

    def _add(self, module: str, part: str, entry: TensorEntry) -> None:
        if part in self.modules[module].parts:
            raise MappingError(
                "several-adapters",
                f"{module} has two adapters",
                where=str(self.spec.mark),
                found=f"{self.modules[module].parts[part].name} and {entry.name}",
                hint="say which one: `name: default`",
            )
        self.modules[module].parts[part] = entry

    def _made(
        self, settings: Settings, problems: list[ShardmergeError], homeless: list[str]
    ) -> Iterator[tuple[str, TensorEntry]]:
        packed = packed_places(packed_weights(self.base))
        for name, entry in self.whole.items():
            place = self._place(name)
            codes = place or self.spec.onto.template.format({"rest": name})
            if codes in packed:
                problems.append(self._packed(codes))
                return
            if place is not None:
                yield place, entry
            elif not self._is_tied(entry):
                homeless.append(name)
        for module, tensors in self.modules.items():
            place = self._place(f"{module}.weight")
            codes = place or self.spec.onto.template.format({"rest": f"{module}.weight"})
            if codes in packed:
                problems.append(self._packed(codes))
                return
            if place is None:
                homeless.append(f"{module}.weight")
                continue
            try:
                yield from self._module(module, place, tensors.parts, settings)
            except MappingError as error:
                problems.append(self._explained(error, module))
                if error.code in ("unknown-alpha", "odd-pattern"):
                    return  # the same for every module

    def _is_tied(self, entry: TensorEntry) -> bool:
        """Tells whether a tensor has a second name: a full dump has ``lm_head``, a base that ties it has not."""
        return entry.name in self.adapter.aliases or entry.name in self.adapter.aliases.values()

    def _module(
        self, module: str, place: str, parts: Mapping[str, TensorEntry], settings: Settings
    ) -> Iterator[tuple[str, TensorEntry]]:
        base = self._base(place)
        embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in "ab")
        if a is None or b is None:
            missing = "lora_A" if a is None else "lora_B"
            raise MappingError("adapter-incomplete", f"{module} has no {missing}", found=", ".join(parts))
        scale = settings.scale(module, a.shape[0] if a.shape else 0)
        weight = _merged_weight(base, a, b, parts.get("magnitude"), scale,
                                turned=embedding or settings.fan_in_fan_out)  # fmt: skip
        yield place, replace(weight, name=place, origin=f"merged with {self.spec.source.source}")
        if "b_bias" in parts:
            bias = self._place(f"{module}.bias")
            if bias is None:
                raise MappingError("adapter-without-base", f"{module} has a LoRA bias, and its base has no bias")
            made = compose(Linear((1.0, scale)), [self._base(bias), parts["b_bias"]])
            yield bias, replace(made, name=bias, origin=f"merged with {self.spec.source.source}")

    def _base(self, name: str) -> TensorEntry:
        return replace(self.base[name], source=self.spec.onto.source)

    def _place(self, name: str) -> str | None:
        """Returns the base's name of a tensor. transformers 5.6 dropped the level ``vision_model`` of a lone CLIP."""
        for text in (name, f"vision_model.{name}", name.removeprefix("vision_model.")):
            place = self.spec.onto.template.format({"rest": text})
            if place in self.base:
                return self.base.aliases.get(place, place)
        return None

    def _without_base(self, names: list[str]) -> Iterator[MappingError]:
        if not names:
            return
        template = self.spec.onto.template
        near = NameIndex(self.base.names()).near(template.format({"rest": names[0]}))
        yield MappingError(
            "adapter-without-base",
            f"{count(len(names), 'adapter module')} of {self.spec.source.source} "
            f"without a tensor in {self.spec.onto.source}: {listed(names, 3)}",
            where=str(self.spec.mark),
            expected=f"{self.spec.onto.source}:{template.format({'rest': names[0]})}",
            found=f"names such as {', '.join(near)}" if near else "no such names",
            hint=f"is `{self.spec.onto.source}` the model that the adapter was trained on? "
            "`onto: source:prefix.{rest...}` adds a prefix",
        )

    def _packed(self, name: str) -> MappingError:
        packed = packed_weights(self.base)
        return MappingError(
            "packed-weights",
            f"{self.spec.onto.source} is quantized ({titles(packed, packed)}): an adapter cannot be added to packed "
            f"weights such as {name}",
            where=self.base.path,
            hint="name the 16-bit model that it was quantized from; the adapter fits that one too",
        )

    def _explained(self, error: MappingError, module: str) -> MappingError:
        source, onto = self.spec.source, self.spec.onto
        hint = error.hint
        if error.code == "unknown-alpha":
            said = "" if source.template.text == "{rest...}" else f":{source.template}"
            goal = "" if onto.template.text == "{rest...}" else f":{onto.template}"
            hint = f'`adapters: [{{from: "{source.source}{said}", onto: "{onto.source}{goal}", alpha: NUMBER}}]`'
        what = error.what if module in error.what or error.code == "unknown-alpha" else f"{module}: {error.what}"
        return MappingError(
            error.code, what, where=str(self.spec.mark), found=error.found, expected=error.expected, hint=hint
        )


def _merged_weight(
    base: TensorEntry, a: TensorEntry, b: TensorEntry, magnitude: TensorEntry | None, scale: float, *, turned: bool
) -> TensorEntry:
    """Returns the merged weight; ``turned`` where the base is ``[in, out]`` (embeddings, GPT-2's Conv1D).

    A convolution's A ``[r, in, kh, kw]`` and B ``[out, r, 1, 1]`` are matrices over flattened kernels.
    """
    if len(base.shape) > 2:
        flat = _matrix(base)
        merged = _merged_weight(flat, _matrix(a), _matrix(b), magnitude, scale, turned=False)
        return compose(Reshape(base.shape), [merged])
    if magnitude is not None:
        magnitude = compose(Reshape((-1,)), [magnitude])
        if turned:
            merged = compose(Dora(scale), [a, b, magnitude, _turned(base)])
            return _turned(merged)
        return compose(Dora(scale), [a, b, magnitude, base])
    if turned:
        a, b = _turned(b), _turned(a)
    return compose(Lora(scale), [a, b, base])


def _turned(entry: TensorEntry) -> TensorEntry:
    return compose(Permute(), [entry])


def _matrix(entry: TensorEntry) -> TensorEntry:
    return compose(Reshape((entry.shape[0], -1)), [entry])
