"""The ways into a DeepSpeed checkpoint: its tag directory, the directory of all tags, one of its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError
from shardmerge.sources.choosing import Remarks, beside_tag, checkpoints_inside, several, usual_models, whole_set
from shardmerge.sources.deepspeed_files import is_tag_folder, tag_of, universal_of
from shardmerge.sources.hf_folder import side_files
from shardmerge.sources.markers import read_marker
from shardmerge.sources.model_files import read_model
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.weights_file import read_weights
from shardmerge.tensors import Catalog


def read_tag(path: Path, options: OpenOptions) -> Catalog | None:
    """A tag directory itself, or ``zero/`` of a universal one and a parameter in it, which stand for the whole."""
    if is_tag_folder(path):
        return _deepspeed(path, options)
    folder = universal_of(path)
    return whole_set(_deepspeed(folder, options), path) if folder else None


def read_tag_parent(path: Path, options: OpenOptions) -> Catalog | None:
    """``latest`` names the newest tag (DeepSpeed, HF Trainer, Accelerate); without it one tag must be the only one."""
    for marker in ("latest", "latest_universal"):
        if (path / marker).is_file():
            tag = read_marker(path / marker)
            folder = path / tag
            if not folder.exists() and usual_models(path):  # whoever is short of space keeps the gathered model
                return _gathered(path, marker, tag, options)
            if Path(tag).name != tag or not is_tag_folder(folder):
                raise CheckpointError(
                    "missing-tag",
                    f"'{marker}' names a tag directory that is not a DeepSpeed checkpoint",
                    where=str(path / marker),
                    found=repr(tag[:80]),
                    hint=" or ".join(f"pass {item}" for item in checkpoints_inside(path)[-3:])
                    or "copy the tag directory here, and pass it itself, e.g. .../global_step500",
                )
            remarks = beside_tag(path, folder, f"'{marker}'")
            return replace(remarks.on(_tag_or_model(folder, path, options)), side_files=side_files(path))
    tags = [item for item in sorted(path.iterdir()) if item.is_dir() and is_tag_folder(item)]
    if len(tags) > 1:
        what = "the directory holds several checkpoints and no 'latest' file to choose one"
        raise several("several-tags", what, path, tags)
    return beside_tag(path, tags[0], "nothing else").on(_tag_or_model(tags[0], path, options)) if tags else None


def _gathered(path: Path, marker: str, tag: str, options: OpenOptions) -> Catalog:
    """Reads the 16-bit model of a Trainer's checkpoint whose tag directory was removed."""
    said = f"'{marker}' names {tag[:80]}, which is not here: the 16-bit model beside it is read, not the fp32 weights"
    return Remarks(warnings=(said,)).on(read_model(usual_models(path)[0], lambda shard: read_weights(shard, options)))


def _tag_or_model(tag: Path, folder: Path, options: OpenOptions) -> Catalog:
    """Reads a tag; where it cannot be, its error names the gathered model that lies beside it."""
    try:
        return _deepspeed(tag, options)
    except ShardmergeError as error:
        model = next(iter(usual_models(folder)), None)
        last = error.each()[-1]
        if model is not None and str(model) not in last.hint:
            before = f"{last.hint}; or " if last.hint else ""
            last.hint = f"{before}take the 16-bit model beside it: pass {model}"
        raise


def read_tag_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One file of a DeepSpeed directory stands for the whole of it (xtuner #745)."""
    folder = tag_of(path)
    if folder is None or options.root:
        return None
    return whole_set(_deepspeed(folder, options), path)


def _deepspeed(folder: Path, options: OpenOptions) -> Catalog:
    from shardmerge.sources.deepspeed_kinds import read_deepspeed

    return read_deepspeed(folder, view=options.view)
