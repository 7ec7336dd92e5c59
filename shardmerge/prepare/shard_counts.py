"""Whether the shards of all ranks are there, where a checkpoint alone does not say: its config.json may.

Without the last ranks of a distributed save every tensor is smaller, and whole in itself. That a config.json be made to
fit such tensors, as is said of one that disagrees, is the last thing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardmerge.errors import CheckpointError, TargetError
from shardmerge.sources.distributed_files import missing_shards
from shardmerge.tensors import Catalog, Shape

if TYPE_CHECKING:
    from shardmerge.targets.agreement import Described
    from shardmerge.targets.known_models import Known


def settled(catalog: Catalog) -> Catalog:
    """Returns the catalog without a doubt about its shards: the config beside it settles it, or it is a warning.

    Raises
    ------
    CheckpointError
        ``missing-shard``: tensors are smaller than the config says.
    """
    if not catalog.doubt:
        return catalog
    warnings = catalog.warnings if _is_confirmed(catalog) else (catalog.doubt, *catalog.warnings)
    return replace(catalog, doubt="", warnings=warnings)


def _is_confirmed(catalog: Catalog) -> bool:
    """Compares all shapes where the model is known, the rows of its vocabulary where it is not."""
    described = _described(catalog)
    if described is None:
        return False
    try:
        known = described.known()
    except TargetError:  # of that the plan speaks
        return False
    short = list(_cut_off(known, described) if known else _cut_vocabulary(described))
    if short:
        raise _missing(catalog, described, short)
    return known is not None and _is_whole(known, described)


def _described(catalog: Catalog) -> Described | None:
    """Returns the shards beside their config.json; what reads that is imported where there is a doubt."""
    from shardmerge.prepare.beside_config import read_config
    from shardmerge.prepare.publishable import describe
    from shardmerge.prepare.side_files import SideFiles
    from shardmerge.tensors.file_roles import CONFIG

    config = read_config(catalog, SideFiles().read)
    return None if config is None else describe(config, catalog.side_files[CONFIG].file, catalog.entries)


def _cut_off(known: Known, described: Described) -> Iterator[tuple[str, str]]:
    """Yields each tensor that is smaller than it has to be: what it is, and what it has to be."""
    expected = {**known.optional, **known.tensors}
    for name, shape in described.tensors.items():
        whole = expected.get(known.canonical(name), shape)
        if _is_smaller(shape, whole):
            yield f"{name} {list(shape)}", str(list(whole))


def _is_smaller(shape: Shape, whole: Shape) -> bool:
    return shape != whole and len(shape) == len(whole) and all(n <= m for n, m in zip(shape, whole, strict=True))


def _cut_vocabulary(described: Described) -> Iterator[tuple[str, str]]:
    from shardmerge.targets.stated_sizes import contradictions

    for one in contradictions(described.config, described.tensors, packed=described.packed):
        stated = one.stated if one.path[-1] == "vocab_size" and isinstance(one.stated, int) else 0
        if one.found is not None and one.found < stated:
            yield one.detail, f"{'.'.join(one.path)} {stated}"


def _is_whole(known: Known, described: Described) -> bool:
    shapes = {known.canonical(name): shape for name, shape in described.tensors.items()}
    return all(shapes.get(name) == shape for name, shape in known.tensors.items())


def _missing(catalog: Catalog, described: Described, short: Sequence[tuple[str, str]]) -> CheckpointError:
    found, expected = short[0]
    more = f", and {len(short) - 1} more" if len(short) > 1 else ""
    what = f"the shards of the last ranks are not there: tensors are smaller than {described.where} says"
    return missing_shards(Path(catalog.path), what, f"{found}{more}", expected)
