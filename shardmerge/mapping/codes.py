"""Codes of quantized weights that are copied as they are: only whole, with their scales, and with every float beside
them untouched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from shardmerge.dtypes import DType
from shardmerge.errors import MappingError
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.resolution import Assignment
from shardmerge.tensors import Catalog, composed
from shardmerge.tensors.packed import Packed, module_of, packed_weights, titles

# Targets that are copies of a tensor of a source, by its name.
Taken: TypeAlias = dict[str, list[Assignment]]


def odd_codes(
    assignments: Mapping[str, Assignment],
    catalogs: Mapping[str, Catalog],
    cast: DType | None,
    final: Callable[[Assignment], DType],
) -> Iterator[MappingError]:
    """Yields what is wrong with copied codes.

    Parameters
    ----------
    assignments
        By target name.
    catalogs
        By source name.
    cast
        The type that all floats shall have: who asks for it wants numbers.
    final
        Says which type a target gets.

    Returns
    -------
    Iterator of MappingError
        ``codes-without-scales``: the scales of codes do not come along, or not to the same module of the target.
        ``packed-weights``: the output is to have a type that codes have not, or floats beside them, such as their
        scales, would be cast; codes of torchao.
    """
    for source, catalog in catalogs.items():
        packed = packed_weights(catalog)
        taken = _taken(assignments.values(), source) if packed else {}
        codes = [name for name in packed if name in taken]
        if codes:
            yield from _without_header(source, codes, packed, taken)
            yield from _without_scales(source, codes, packed, taken)
            every = (one for several in taken.values() for one in several)
            changed = (one for one in every if one.entry.dtype.kind == "float" and final(one) != one.entry.dtype)
            wanted = cast or next((final(one) for one in changed), None)
            if wanted is not None:
                yield _uncastable(source, codes, packed, wanted, taken[codes[0]][0])


def _taken(assignments: Iterable[Assignment], source: str) -> Taken:
    taken: Taken = defaultdict(list)
    for one in assignments:
        if one.source == source and composed(one.entry) is None:
            taken[one.name].append(one)
    return taken


def _without_header(
    source: str, codes: Sequence[str], packed: Mapping[str, Packed], taken: Taken
) -> Iterator[MappingError]:
    """The library torchao keeps in the header of each file, by the tensors' names, how their codes are to be read."""
    ours = [name for name in codes if packed[name].title == "torchao"]
    if ours:
        yield MappingError(
            "packed-weights",
            f"{count(len(ours), 'tensor')} of {source} packed by torchao: how to read them is stated in the headers "
            f"of its files, which are not copied: {listed(ours, 3)}",
            where=str(taken[ours[0]][0].rule.mark),
            hint="copy the directory itself, or name the 16-bit model that it was quantized from",
        )


def _without_scales(
    source: str, codes: Sequence[str], packed: Mapping[str, Packed], taken: Taken
) -> Iterator[MappingError]:
    lost = [
        (one, scale)
        for name in codes
        for one in taken[name]
        for scale in packed[name].scales
        if not any(other.target.startswith(module_of(one.target)) for other in taken.get(scale, ()))
    ]
    if not lost:
        return
    first, scale = lost[0]
    names = list(dict.fromkeys(one.name for one, _ in lost))
    astray = [f"{other.target} beside {first.target}" for other in taken.get(scale, ())]
    yield MappingError(
        "codes-without-scales",
        f"{count(len(names), 'quantized weight')} of {source} ({titles(packed, names)}) copied without their "
        f"scales: {listed(names, 3)}",
        where=str(first.rule.mark),
        found=astray[0] if astray else f"{source}:{scale} is not taken",
        expected=f"{scale} in the module of {first.target}",
        hint="rename codes and scales by one rule, `{rest...}` at the end of both names, and drop none of them alone",
    )


def _uncastable(
    source: str, codes: Sequence[str], packed: Mapping[str, Packed], wanted: DType, first: Assignment
) -> MappingError:
    return MappingError(
        "packed-weights",
        f"{count(len(codes), 'tensor')} of {source} packed by quantization ({titles(packed, codes)}), codes that "
        f"cannot be cast to {wanted}; the floats beside them are scales, which cannot be cast either: "
        f"{listed(codes, 3)}",
        where=str(first.rule.mark),
        hint="leave the dtype out to copy it all as it is, or name the 16-bit model that it was quantized from",
    )


def leaves_all_codes(assignments: Iterable[Assignment], source: str, catalog: Catalog) -> bool:
    """Tells whether a source has codes and none of them is copied, so that its config does not speak of the output."""
    packed = packed_weights(catalog) if catalog.quantized else {}
    return bool(packed) and not _codes_taken(assignments, source, packed)


def _codes_taken(assignments: Iterable[Assignment], source: str, packed: Mapping[str, Packed]) -> list[str]:
    taken = _taken(assignments, source) if packed else {}
    return [name for name in packed if name in taken]


def odd_company(
    assignments: Mapping[str, Assignment], catalogs: Mapping[str, Catalog], published: str, skipped: Sequence[str]
) -> Iterator[MappingError]:
    """Yields what a published config.json would say wrongly of codes and numbers.

    Parameters
    ----------
    published
        The source whose config.json goes into the output.
    skipped
        Names, or parts of names, of the modules that this config says are not quantized.

    Returns
    -------
    Iterator of MappingError
        ``mixed-quantization``: codes of another source, or numbers in the place of codes. ``stale-quantization``: the
        config names modules that are not quantized by names that rules change.
    """
    every = assignments.values()
    for source, catalog in catalogs.items():
        codes = _codes_taken(every, source, packed_weights(catalog)) if source != published else []
        if codes:
            yield _mixed(f"{source}:{codes[0]} is quantized, and config.json is that of {published}", every, source)
    packed = packed_weights(catalogs[published])
    taken = _taken(every, published)
    if not any(name in taken for name in packed):
        return
    places = {f"{module_of(name)}weight": name for name in packed if name not in taken}
    plain = [one for one in every if one.target in places and one.entry.dtype.kind == "float"]
    if plain:
        what = f"{plain[0].target} is {plain[0].entry.dtype}, and config.json of {published} says that it is quantized"
        yield _mixed(what, plain, plain[0].source)
    parts = [part for name in skipped if (part := name.strip("*"))]
    stale = [name for name in parts for one in every if one.source == published and _renamed(one, name, packed)]
    if stale:
        yield MappingError(
            "stale-quantization",
            f"the quantization_config of {published} names modules that are not quantized, and rules rename them: "
            f"{listed(list(dict.fromkeys(stale)), 3)}",
            where=catalogs[published].side_files["config.json"].file,
            hint="keep these names, or let the output be numbers: `output: {dtype: bfloat16}` for float8 weights, the "
            "16-bit model for others",
        )


def _renamed(one: Assignment, part: str, packed: Mapping[str, Packed]) -> bool:
    return part in one.name and part not in one.target and one.name not in packed


def _mixed(what: str, cases: Iterable[Assignment], source: str) -> MappingError:
    rule = next(one.rule for one in cases if one.source == source)
    return MappingError(
        "mixed-quantization",
        what,
        where=str(rule.mark),
        hint="take all quantized weights from the source of the config, or 16-bit models for all of them",
    )
