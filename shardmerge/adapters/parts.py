"""Which module and part of an adapter every name is.

Key shapes are those of peft 0.6 to 0.21, as saved by ``save_pretrained`` (no adapter name) and as they stand in a model
(``.default``), which is what XTuner and DeepSpeed save. A name that looks like a part of an adapter and is none of
these is refused: taken for a plain weight it would replace one of the base's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from shardmerge.adapters.roots import PREFIX, behind
from shardmerge.errors import MappingError
from shardmerge.mapping.near import count, did_you_mean, listed, printable
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.tensors import PEFT_ADAPTER, Catalog, TensorEntry
from shardmerge.tensors.packed import packed_weights

# What stands behind a module's name, with the adapter's own name or without it, and which part of an adapter it is.
_NAMED = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_PARTS = tuple(
    (re.compile(rf"(?P<module>.+)\.{text}"), part)
    for text, part in (
        (rf"lora_A{_NAMED}\.weight", "a"),
        (rf"lora_B{_NAMED}\.weight", "b"),
        (rf"lora_B{_NAMED}\.bias", "b_bias"),
        (rf"lora_embedding_A{_NAMED}", "embedding_a"),
        (rf"lora_embedding_B{_NAMED}", "embedding_b"),
        (rf"lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
        (rf"(?P<lycoris>(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12])){_NAMED}", ""),
        (r"lora_alpha_beside(?P<adapter>)", "alpha"),
        (rf"token_adapter\.trainable_tokens_delta{_NAMED}", "tokens"),
    )
)
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?:(?P<adapter>[^.]+)\.)?(?P<leaf>.+)")
_BASE_LAYER = re.compile(r"(?P<module>.+)\.base_layer\.(?P<leaf>.+)")
# Full dumps hold these besides: the untouched copy of a module that was trained whole, or of single rows.
_UNTOUCHED = re.compile(r".+\.(?:original_module\..+|token_adapter\..+)")

# How the tensors of other adapters begin (peft's tuners, LyCORIS, kohya, mlx).
_FOREIGN = re.compile(
    r"(?:^|\.)(lora_\w+|lora|hada_\w+|lokr_\w+|loha_\w+|oft_\w+|boft_\w+|ia3_\w+|vera_\w+|hra_\w+|"
    r"randlora_\w+|fourierft_\w+|vblora_\w+|shira_\w+|bone_\w+|miss_\w+|c3a_\w+|road_\w+|waveft_\w+|delora_\w+|"
    r"gralora_\w+|dora_scale|trainable_tokens\w*|prompt_embeddings|adaption_\w+|diff_b)(?:\.|$)"
)


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """An adapter's tensors.

    Attributes
    ----------
    modules
        By module, then by part: ``a``, ``b``, ``b_bias``, ``embedding_a``, ``embedding_b``, ``magnitude``,
        ``tokens``, ``alpha`` and LyCORIS's under their own names.
    whole
        Weights and biases that take the place of the base's, by their names in the base.
    trained
        Those of ``whole`` that were trained for certain: what peft saved, and ``modules_to_save`` of a dump.
    bases
        The weights below the adapter that peft saved with it, by their names in the base.
    used
        Every name that was looked at, in the source.
    left_out
        Frozen copies in a dump that hold no numbers: placeholders and packed weights.
    """

    modules: dict[str, dict[str, TensorEntry]] = field(default_factory=lambda: defaultdict(dict))
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    bases: dict[str, TensorEntry] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)

    def trained_alone(self) -> AdapterTensors:
        """Returns it without what is the base's too, for a base that is of the same checkpoint."""
        return replace(self, whole={name: self.whole[name] for name in self.whole if name in self.trained})


def foreign_names(names: Collection[str]) -> list[str]:
    """Returns those names that belong to an adapter of any make."""
    return [name for name in names if _FOREIGN.search(name)]


def sort_adapter(spec: AdapterSpec, catalog: Catalog) -> AdapterTensors:
    """Returns the parts of the adapter that a spec means.

    Raises
    ------
    MappingError
        ``several-adapters``: there are more than one, and the mapping says no ``name:``. ``unknown-adapter``: none of
        that name. ``unknown-adapter-tensor``: a part that no LoRA of peft has. ``empty-adapter``: tensors without
        elements, or listed without data.
    """
    work = _Sort(spec, catalog, saved=catalog.kind.startswith(PEFT_ADAPTER))
    work.sort()
    return work.parts


@dataclass(slots=True)
class _Sort:
    spec: AdapterSpec
    catalog: Catalog
    saved: bool
    parts: AdapterTensors = field(default_factory=AdapterTensors)
    adapters: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def sort(self) -> None:
        packed = frozenset(packed_weights(self.catalog))
        found = behind(self.catalog, self.spec.source.template)
        for name in (one for one in self.catalog.names() if one in found):
            rest = found[name]
            self.parts.used.add(name)
            entry = replace(self.catalog[name], source=self.spec.source.source)
            self._one(rest, entry, packed=name in packed or name.rpartition(".")[0] in packed)
        for name in sorted(self.catalog.absent & set(found)):
            rest = found[name]
            (self.empty if self._is_trained(rest) else self.parts.left_out).append(name)
        self._check()

    def _one(self, rest: str, entry: TensorEntry, *, packed: bool) -> None:
        for pattern, part in _PARTS:
            if (match := pattern.fullmatch(rest)) is not None:
                if self._is_meant(match["adapter"] or None, entry):
                    self.parts.modules[match["module"]][part or match["lycoris"]] = entry
                return
        if (saved := _SAVED.fullmatch(rest)) is not None:
            if self._is_meant(saved["adapter"], entry):
                self._whole(f"{saved['module']}.{saved['leaf']}", entry, trained=True)
        elif (layer := _BASE_LAYER.fullmatch(rest)) is not None:
            self._below(f"{layer['module']}.{layer['leaf']}", entry)
        elif _UNTOUCHED.fullmatch(rest) is None:
            self._plain(rest, entry, packed=packed)

    def _plain(self, rest: str, entry: TensorEntry, *, packed: bool) -> None:
        """A weight of the model: trained where peft saved it, frozen or trained in a dump of everything."""
        if _FOREIGN.search(rest):
            self.foreign.append(entry.name)
        elif packed or (not entry.numel and not self.saved):
            self.parts.left_out.append(rest)
        else:
            self._whole(rest, entry, trained=self.saved)

    def _below(self, name: str, entry: TensorEntry) -> None:
        """The weight under an adapter is the base's; a bias may have been trained."""
        if name.endswith(".weight"):
            if self.saved and entry.numel:
                self.parts.bases[name] = entry
        elif name.endswith(".bias"):
            self._whole(name, entry, trained=self.saved)

    def _whole(self, name: str, entry: TensorEntry, *, trained: bool) -> None:
        if trained:
            self.parts.trained.add(name)
            self.empty += [] if entry.numel else [entry.name]
        if entry.numel or trained:
            self.parts.whole[name] = entry

    def _is_meant(self, adapter: str | None, entry: TensorEntry) -> bool:
        """Whether a tensor is of the adapter that the mapping names; one without a name is of every one."""
        wanted = self.spec.settings.get("name", "")
        if adapter is not None:
            self.adapters.setdefault(adapter, entry.name)
        if wanted and adapter not in (None, wanted):
            return False
        if not entry.numel:
            self.empty.append(entry.name)
        return True

    def _is_trained(self, rest: str) -> bool:
        known = any(pattern.fullmatch(rest) for pattern, _ in _PARTS) or _SAVED.fullmatch(rest)
        wanted = self.spec.settings.get("name", "")
        return bool(known or self.saved) and (not wanted or not self.adapters or f".{wanted}" in rest or self.saved)

    def _check(self) -> None:
        where, source = str(self.spec.mark), self.spec.source.source
        wanted = self.spec.settings.get("name", "")
        if len(self.adapters) > 1 and not wanted:
            raise MappingError(
                "several-adapters",
                f"{source} holds {len(self.adapters)} adapters: {listed(sorted(self.adapters))}",
                where=where,
                found=" and ".join(printable(name) for name in list(self.adapters.values())[:2]),
                hint=f"say which one under `adapters:`, such as `name: {printable(min(self.adapters))}`",
            )
        if wanted and wanted not in self.adapters and self.parts.used:
            self._unknown(wanted, where)
        self.foreign += self._mixed()
        if self.foreign:
            raise foreign_error(self.foreign, source, self.catalog.path)
        if self.empty:
            raise _empty_error(list(dict.fromkeys(self.empty)), source, self.catalog.path)

    def _mixed(self) -> list[str]:
        """LyCORIS's factors in a module that has LoRA's: no tool writes both."""
        found = []
        for parts in self.parts.modules.values():
            other = [entry.name for part, entry in parts.items() if part.startswith(("hada_", "lokr_"))]
            found += other if {"a", "b", "embedding_a", "embedding_b"} & parts.keys() else []
        return found

    def _unknown(self, wanted: str, where: str) -> None:
        held = sorted(self.adapters)
        raise MappingError(
            "unknown-adapter",
            f"{self.spec.source.source} holds no adapter called {printable(wanted)}",
            where=where,
            found=listed(held) if held else "names without an adapter's name, as save_pretrained writes them",
            hint=(did_you_mean(wanted, held) or f"say `name: {printable(held[0])}`") if held else "remove `name:`",
        )


def foreign_error(names: Collection[str], source: str, where: str) -> MappingError:
    """Returns the error for tensors of an adapter that is no LoRA as peft saves it."""
    first = next(iter(names))
    match = _FOREIGN.search(first)
    return MappingError(
        "unknown-adapter-tensor",
        f"{source} holds {count(len(names), 'tensor')} that are not part of a LoRA of peft: {listed(list(names), 3)}",
        where=where,
        found=f"`{match[1]}`: {_make(first)}" if match else "",
        expected="base_model.model. ... with lora_A and lora_B, lora_embedding_A and _B, lora_magnitude_vector, or "
        "modules_to_save",
        hint="load it with the library that made it and save it with peft's save_pretrained, or write rules with "
        "`op: lora` for its tensors",
    )


def _make(name: str) -> str:
    """Returns whose naming a tensor has, for people."""
    match name:
        case _ if "lora_down" in name or "lora_up" in name or name.startswith(("lora_unet_", "lora_te")):
            return "kohya's names"
        case _ if ".lora.up." in name or ".lora.down." in name:
            return "diffusers' names"
        case _ if "hada_" in name or "lokr_" in name or "loha_" in name:
            return "LyCORIS"
        case _ if ".lora_a" in name or ".lora_b" in name:
            return "the names of mlx and torchtune"
        case _ if "lora_A" in name and not name.startswith(PREFIX):
            return f"peft's names without `{PREFIX}`"
        case _:
            return "another kind of adapter"


def _empty_error(names: list[str], source: str, where: str) -> MappingError:
    return MappingError(
        "empty-adapter",
        f"{count(len(names), 'tensor')} of {source} without elements: placeholders [0] of an adapter that was saved "
        f"under ZeRO-3 before its parts were gathered: {listed(names, 3)}",
        where=where,
        expected="tensors with elements: A [r, in], B [out, r]",
        hint="name the directory of the DeepSpeed checkpoint beside it as the adapter (global_stepN, or the one with "
        "`latest`): it has the numbers; or save again with stage3_gather_16bit_weights_on_model_save",
    )
