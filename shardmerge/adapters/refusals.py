"""Errors of adapters that need more than a line: no adapter at all, codes below it, a module that cannot be merged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shardmerge.adapters.held import held_base
from shardmerge.adapters.parts import AdapterTensors, foreign_error, foreign_names
from shardmerge.adapters.roots import PREFIX
from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.shown import inspecting
from shardmerge.tensors import Catalog
from shardmerge.tensors.packed import packed_places, packed_weights, titles


def refuse_no_adapter(spec: AdapterSpec, adapter: Catalog, tensors: AdapterTensors) -> None:
    """Refuses a source without an adapter, unless the mapping says that it may have none.

    Raises
    ------
    MappingError
        ``not-an-adapter``; ``unknown-adapter-tensor``: it is one of another make.
    """
    source, template = spec.source.source, spec.source.template
    names = [name for name in adapter.names() if template.match(name) is not None]
    inside = [name.partition(f".{PREFIX}")[0] for name in names if f".{PREFIX}" in name and ".lora_" in name]
    if not tensors.used and not inside and (kin := foreign_names(names)):
        raise foreign_error(kin, spec.source.source, adapter.path)
    if (
        spec.optional
        and not (inside and template.text == "{rest...}")
        and (template.text != "{rest...}" or spec.source.source == spec.onto.source)
    ):
        return  # a checkpoint that may hold an adapter or not
    raise MappingError(
        "not-an-adapter",
        f"{source} holds no adapter tensors under `{template}`",
        where=str(spec.mark),
        found=listed(list(adapter.names()), 3),
        expected="names with `lora_A` and `lora_B`, or `modules_to_save`",
        hint=" or ".join(f'`from: "{source}:{one}.{{rest...}}"`' for one in dict.fromkeys(inside))
        or f"{inspecting(adapter.path)} lists the names",
    )


def refuse_own_adapter(spec: AdapterSpec, base: Catalog) -> None:
    """Refuses a base that is a run itself, with an adapter that nobody merges.

    Raises
    ------
    MappingError
        ``base-with-adapter``.
    """
    onto = spec.onto.source
    if held_base(base, spec.onto.template) is not None:
        raise MappingError(
            "base-with-adapter",
            f"{onto} is a training checkpoint itself, with an adapter over its own base",
            where=base.path,
            hint=f"name the model that the run began with; or, to merge its own adapter first, write "
            f"`{{from: {onto}, onto: {onto}}}` before this one under `adapters:`",
        )


def packed_base(spec: AdapterSpec, base: Catalog, places: Iterable[str]) -> Iterator[MappingError]:
    """Yields the error for a base whose weights, at the first of these places that is one, are codes."""
    packed = packed_weights(base)
    every = packed_places(packed)
    for name in (place for place in places if place in every):
        yield MappingError(
            "packed-weights",
            f"{spec.onto.source} is quantized ({titles(packed, packed)}): an adapter cannot be added to packed "
            f"weights such as {name}",
            where=base.path,
            hint="name the 16-bit model that it was quantized from; the adapter fits that one too",
        )
        return


def explained(error: MappingError, module: str, spec: AdapterSpec) -> MappingError:
    """Returns an error of one module with its name, the mapping's line, and the way out."""
    source, onto = spec.source, spec.onto
    hint = error.hint
    if error.code == "unknown-alpha":
        said = "" if source.template.text == "{rest...}" else f":{source.template}"
        goal = "" if onto.template.text == "{rest...}" else f":{onto.template}"
        hint = f'`adapters: [{{from: "{source.source}{said}", onto: "{onto.source}{goal}", alpha: NUMBER}}]`'
    what = error.what if module in error.what or error.code == "unknown-alpha" else f"{module}: {error.what}"
    return MappingError(error.code, what, where=str(spec.mark), found=error.found, expected=error.expected, hint=hint)
