"""From a path to a catalog: recognises the format by content, through any entry point people really pass.

What recognises a format is imported here, what reads it where it was recognised: a safetensors file needs no pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, UsageError, raise_all
from shardmerge.sources import (
    dcp_entries,
    deepspeed_entries,
    distributed_entries,
    model_entries,
    rank_entries,
    weights_file,
)
from shardmerge.sources.choosing import beside_numbered, weight_files
from shardmerge.sources.completing import completed
from shardmerge.sources.deepspeed_files import VIEWS
from shardmerge.sources.hub import locate
from shardmerge.sources.markers import read_marker
from shardmerge.sources.not_read import is_optimizer, not_a_model, unknown_format
from shardmerge.sources.open_options import OpenOptions
from shardmerge.tensors import Catalog

FormatReader: TypeAlias = Callable[[Path, OpenOptions], "Catalog | None"]

_LAST = "last_checkpoint"


def open_catalog(text: str | Path, options: OpenOptions | None = None) -> Catalog:
    """Returns the catalog of the checkpoint at a path, or of a hub id.

    Raises
    ------
    UsageError
        ``missing-path``: nothing there. ``not-in-cache``: a hub id that is not here.
    CheckpointError
        ``unknown-format``, ``link-outside`` and whatever the reader of the format raises.
    """
    options = options or OpenOptions()
    path = locate(text, download=options.download)
    for reader in _FOLDER_READERS if path.is_dir() else _FILE_READERS:
        catalog = reader(path, options)
        if catalog is not None:
            raise_all(_idle(catalog, options))
            if not options.root and is_optimizer(catalog.names()):
                raise not_a_model("an optimizer's state", str(path), ", ".join([*catalog.names()][:5]))
            return completed(catalog, path)
    raise unknown_format(path)


def _idle(catalog: Catalog, options: OpenOptions) -> Iterator[UsageError]:
    """An option that nothing here has a use for says that the user takes the checkpoint for another kind."""
    ranks = catalog.kind.startswith("DeepSpeed")
    if options.view != VIEWS[0] and not ranks and catalog.optimizer is None:
        what = f"the view `{options.view}` is one of a DeepSpeed checkpoint, and this is none"
        hint = "leave `view` out; the tensors are taken as they are stored"
        yield UsageError("no-effect", what, where=catalog.path, found=catalog.kind, hint=hint)
    start = f"{options.root} of "
    if options.root and (ranks or not any(entry.origin.startswith(start) for entry in catalog.entries.values())):
        what = f"the root `{options.root}` is of no use: a checkpoint of this kind has no state dicts inside"
        yield UsageError("no-effect", what, where=catalog.path, found=catalog.kind, hint="leave `root` out")


def _work_dir(path: Path, options: OpenOptions) -> Catalog | None:
    """An mmengine work_dir: ``last_checkpoint`` holds the path of the newest ``.pth``, often an absolute one."""
    if not _is_work_dir(path):
        return None
    marker = path / _LAST
    target = Path(read_marker(marker))
    for candidate in (path / target.name, target, path / target):
        if target.name not in ("", "..") and candidate.exists() and not _is_work_dir(candidate):
            others = [file.name for file in weight_files(path) if file != candidate]
            return beside_numbered(candidate.name, others, f"'{_LAST}'").on(open_catalog(candidate, options))
    raise CheckpointError(
        "missing-tag",
        f"'{_LAST}' names a checkpoint that is not there",
        where=str(marker),
        found=str(target),
        hint="pass the checkpoint itself",
    )


def _is_work_dir(path: Path) -> bool:
    """Tells whether a path is one whose last_checkpoint is followed; one that named another could lead in a circle."""
    return (path / _LAST).is_file()


def _single(path: Path, options: OpenOptions) -> Catalog | None:
    return model_entries.read_single_model(path, options, lambda chosen: open_catalog(chosen, options))


# The order says who wins where two could: a Trainer checkpoint with `latest` also holds a 16-bit model.safetensors,
# and the fp32 master weights are the better source.
_FOLDER_READERS: tuple[FormatReader, ...] = (
    deepspeed_entries.read_tag,
    _work_dir,
    deepspeed_entries.read_tag_parent,
    rank_entries.read_verl_run,
    rank_entries.read_iteration,
    model_entries.read_adapter_folder,
    model_entries.read_usual_model,
    distributed_entries.read_shard_folder,
    dcp_entries.read_distributed_parent,
    rank_entries.read_meta_folder,
    rank_entries.read_rank_pickles,
    _single,
    model_entries.refuse_inside,
    model_entries.read_config_only,
)
_FILE_READERS: tuple[FormatReader, ...] = (
    weights_file.read_index,
    deepspeed_entries.read_tag_member,
    rank_entries.read_rank_member,
    dcp_entries.read_distributed_member,
    distributed_entries.read_rank_shard,
    weights_file.read_shard_member,
    weights_file.read_adapter_file,
    weights_file.read_any_safetensors,
    weights_file.read_torch,
)
