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
from shardmerge.packed import Packed, module_of, packed_weights, titles
from shardmerge.tensors import Catalog, composed

# Targets that are copies of a tensor of a source, by its name.
Taken: TypeAlias = dict[str, list[Assignment]]


def odd_codes(
    assignments: Mapping[str, Assignment], catalogs: Mapping[str, Catalog], final: Callable[[Assignment], DType]
) -> Iterator[MappingError]:
    """Yields what is wrong with copied codes.

    Parameters
    ----------
    assignments
        By target name.
    catalogs
        By source name.
    final
        Says which type a target gets.

    Returns
    -------
    Iterator of MappingError
        ``codes-without-scales``: the scales of codes do not come along, or not to the same module of the target.
        ``packed-weights``: floats beside codes would be cast, the scales among them.
    """
    for source, catalog in catalogs.items():
        packed = packed_weights(catalog)
        taken = _taken(assignments.values(), source) if packed else {}
        codes = [name for name in packed if name in taken]
        if codes:
            yield from _without_scales(source, codes, packed, taken)
            every = (one for several in taken.values() for one in several)
            yield from _cast(source, codes, packed, every, final)


def _taken(assignments: Iterable[Assignment], source: str) -> Taken:
    taken: Taken = defaultdict(list)
    for one in assignments:
        if one.source == source and composed(one.entry) is None:
            taken[one.name].append(one)
    return taken


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
        f"{count(len(names), 'quantized weight')} of {source} ({titles(packed, names)}) copied without what gives the "
        f"codes a meaning: {listed(names, 3)}",
        where=str(first.rule.mark),
        found=astray[0] if astray else f"{source}:{scale} is not taken",
        expected=f"{scale} in the module of {first.target}",
        hint="rename codes and scales by one rule, `{rest...}` at the end of both names, and drop none of them alone",
    )


def _cast(
    source: str,
    codes: Sequence[str],
    packed: Mapping[str, Packed],
    taken: Iterable[Assignment],
    final: Callable[[Assignment], DType],
) -> Iterator[MappingError]:
    changed = [a for a in taken if a.entry.dtype.kind == "float" and final(a) != a.entry.dtype]
    if changed:
        yield MappingError(
            "packed-weights",
            f"{source} is quantized ({titles(packed, codes)}): codes cannot be cast, and the floats beside them are "
            f"scales, or what the kernels expect: {listed([a.name for a in changed], 3)}",
            where=str(changed[0].rule.mark),
            found=f"{changed[0].entry.dtype}",
            expected=f"{final(changed[0])} is asked for",
            hint="leave the dtype out to copy it as it is, or name the 16-bit model that it was quantized from",
        )
