"""From a path to a catalog: recognises the format by content, through any entry point people really pass.

What recognises a format is imported here, what reads it where it was recognised: a safetensors file needs no pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, UsageError, raise_all
from shardmerge.sources.deepspeed_files import View, is_tag_file, is_tag_folder
from shardmerge.sources.hf_folder import read_indexed, side_files
from shardmerge.sources.hub import is_hub_id, resolve_hub_id
from shardmerge.sources.peft_folder import is_adapter_file, read_adapter, stray_config
from shardmerge.sources.rank_files import (
    is_distributed,
    is_megatron_folder,
    is_meta_file,
    is_rank_file,
    is_rank_folder,
    newest_iteration,
)
from shardmerge.sources.safetensors_file import is_safetensors, read_safetensors
from shardmerge.tensors import PEFT_ADAPTER, Catalog

_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
# Beside the weights in Trainer and mmengine directories, and none of them a model.
_NO_MODEL = frozenset({"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "optimizer.bin"})


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a user may say about a source.

    Attributes
    ----------
    view
        Of a DeepSpeed checkpoint: ``fp32`` master weights or the 16-bit ``module``.
    root
        Dotted path of the state dict inside a torch file; empty to find it.
    download
        Whether a hub id that is not in the cache may be downloaded.
    """

    view: View = "fp32"
    root: str = ""
    download: bool = False


Reader: TypeAlias = Callable[[Path, OpenOptions], "Catalog | None"]


def open_catalog(text: str | Path, options: OpenOptions | None = None) -> Catalog:
    """Returns the catalog of the checkpoint at a path, or of a hub id.

    Raises
    ------
    UsageError
        ``missing-path``: nothing there. ``not-in-cache``: a hub id that is not here.
    CheckpointError
        ``unknown-format`` and whatever the reader of the format raises.
    """
    options = options or OpenOptions()
    path = locate(text, download=options.download)
    for reader in _FOLDER_READERS if path.is_dir() else _FILE_READERS:
        catalog = reader(path, options)
        if catalog is not None:
            raise_all(_idle(catalog, options))
            folder = path if path.is_dir() else path.parent
            return replace(catalog, side_files=catalog.side_files or side_files(folder))
    raise _unknown(path)


def _idle(catalog: Catalog, options: OpenOptions) -> Iterator[UsageError]:
    """An option that nothing here has a use for says that the user takes the checkpoint for another kind."""
    ranks = catalog.kind.startswith("DeepSpeed")
    if options.view == "module" and not ranks:
        what = "the view `module` is one of a DeepSpeed checkpoint, and this is none"
        hint = "leave `view` out; the tensors are taken as they are stored"
        yield UsageError("no-effect", what, where=catalog.path, found=catalog.kind, hint=hint)
    start = f"{options.root} of "
    if options.root and (ranks or not any(entry.origin.startswith(start) for entry in catalog.entries.values())):
        what = f"the root `{options.root}` is of no use: only a torch file has state dicts inside"
        yield UsageError("no-effect", what, where=catalog.path, found=catalog.kind, hint="leave `root` out")


def locate(text: str | Path, *, download: bool = False) -> Path:
    """Returns the existing path that a text means: a file, a directory, or a hub id's snapshot."""
    path = Path(text).expanduser()
    if path.exists():
        return path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    if is_hub_id(str(text)) and not path.parent.is_dir():
        return resolve_hub_id(str(text), download=download)
    import difflib

    near = difflib.get_close_matches(path.name, _siblings(path), n=1)
    raise UsageError(
        "missing-path",
        "no such file or directory",
        where=str(path),
        hint=f"did you mean {path.parent / near[0]}?" if near else "",
    )


def _siblings(path: Path) -> list[str]:
    return [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []


def _tag(path: Path, options: OpenOptions) -> Catalog | None:
    return _deepspeed(path, options) if is_tag_folder(path) else None


def _tag_parent(path: Path, options: OpenOptions) -> Catalog | None:
    """``latest`` names the newest tag (DeepSpeed, HF Trainer, Accelerate); without it one tag must be the only one."""
    for marker in ("latest", "latest_universal"):
        if (path / marker).is_file():
            tag = (path / marker).read_text("utf-8", "replace").strip()
            folder = path / tag
            if Path(tag).name != tag or not is_tag_folder(folder):
                raise CheckpointError(
                    "missing-tag",
                    f"'{marker}' names a tag directory that is not a DeepSpeed checkpoint",
                    where=str(path / marker),
                    found=repr(tag),
                    hint="pass the tag directory itself, e.g. .../global_step500",
                )
            return replace(_deepspeed(folder, options), side_files=side_files(path))
    tags = [item for item in sorted(path.iterdir()) if item.is_dir() and is_tag_folder(item)]
    if len(tags) > 1:
        raise CheckpointError(
            "several-tags",
            "the directory holds several checkpoints and no 'latest' file to choose one",
            where=str(path),
            found=", ".join(tag.name for tag in tags[:8]),
            hint=f"pass one of them, e.g. {tags[-1]}",
        )
    return _deepspeed(tags[0], options) if tags else None


def _work_dir(path: Path, options: OpenOptions) -> Catalog | None:
    """An mmengine work_dir: ``last_checkpoint`` holds the path of the newest ``.pth``, often an absolute one."""
    marker = path / "last_checkpoint"
    if not marker.is_file():
        return None
    target = Path(marker.read_text("utf-8", "replace").strip())
    for candidate in (path / target.name, target, path / target):
        if target.name and candidate.exists():
            return open_catalog(candidate, options)
    raise CheckpointError(
        "missing-tag",
        "'last_checkpoint' names a checkpoint that is not there",
        where=str(marker),
        found=str(target),
    )


def _megatron(path: Path, options: OpenOptions) -> Catalog | None:
    """One iteration, the parent with its tracker file, or the folder of one rank, which stands for its iteration."""
    if is_megatron_folder(path):
        return _read_megatron(path)
    if is_rank_folder(path):
        return _whole_set(_read_megatron(path.parent), path)
    newest = newest_iteration(path)
    return _read_megatron(newest) if newest else None


def _adapter(path: Path, options: OpenOptions) -> Catalog | None:
    return read_adapter(path, lambda weights: _shard(weights, options))


def _meta(path: Path, options: OpenOptions) -> Catalog | None:
    from shardmerge.sources.rank_sets import read_meta

    return read_meta(path)


def _indexed(path: Path, options: OpenOptions) -> Catalog | None:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / name).is_file():
            return _noted(read_indexed(path / name, lambda shard: _shard(shard, options)), *stray_config(path))
    return None


def _usual(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory with one weight file under the usual name; safetensors before ``.bin``."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _noted(replace(_shard(path / name, options), path=str(path)), *stray_config(path))
    return None


def _single(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory with one weight file under any name, or one index."""
    indexes = sorted(path.glob("*.index.json"))
    if len(indexes) == 1:
        return read_indexed(indexes[0], lambda shard: _shard(shard, options))
    for pattern in _WEIGHTS:
        found = sorted(item for item in path.glob(pattern) if item.name not in _NO_MODEL)
        if len(found) > 1:
            raise CheckpointError(
                "several-files",
                f"the directory holds {len(found)} {pattern} files and no index",
                where=str(path),
                found=", ".join(item.name for item in found[:5]),
                hint=f"pass the one that is meant, e.g. {found[-1]}",
            )
        if found:
            return open_catalog(found[0], options)
    return None


def _config_only(path: Path, options: OpenOptions) -> Catalog | None:
    """A base model of which nothing but config and tokenizer is needed, since the checkpoint has all of its tensors."""
    return Catalog(str(path), "config without weights", {}) if (path / "config.json").is_file() else None


def _shard(path: Path, options: OpenOptions) -> Catalog:
    if is_safetensors(path):
        return read_safetensors(path)
    catalog = _torch(path, options)
    if catalog is None:
        raise _unknown(path)
    return catalog


def _index_file(path: Path, options: OpenOptions) -> Catalog | None:
    if not path.name.endswith(".index.json"):
        return None
    return read_indexed(path, lambda shard: _shard(shard, options))


def _tag_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One file of a DeepSpeed directory stands for the whole of it (xtuner #745)."""
    if not is_tag_file(path) or options.root:
        return None
    return _whole_set(_deepspeed(path.parent, options), path)


def _rank_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One rank of Meta's or Megatron's stands for the whole set."""
    if options.root:
        return None
    if is_rank_file(path):
        return _whole_set(_read_megatron(path.parent.parent), path)
    if is_meta_file(path):
        catalog = _meta(path.parent, options)
        return _whole_set(catalog, path) if catalog else None
    if path.suffix == ".distcp" or (path.name == "common.pt" and is_distributed(path.parent)):
        return _read_megatron(path.parent)
    return None


def _whole_set(catalog: Catalog, member: Path) -> Catalog:
    whole = Path(catalog.path).name
    return _noted(catalog, f"{member.name} is one part of a checkpoint: the whole of {whole}/ is read")


def _noted(catalog: Catalog, *notes: str) -> Catalog:
    return replace(catalog, notes=(*notes, *catalog.notes))


def _adapter_file(path: Path, options: OpenOptions) -> Catalog | None:
    if options.root or not is_adapter_file(path):
        return None
    return replace(_shard(path, options), kind=PEFT_ADAPTER)


def _safetensors(path: Path, options: OpenOptions) -> Catalog | None:
    return read_safetensors(path) if is_safetensors(path) else None


def _torch(path: Path, options: OpenOptions) -> Catalog | None:
    from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
    from shardmerge.sources.torch_file import is_torch_file

    return read_torch_checkpoint(path, root=options.root) if is_torch_file(path) else None


def _deepspeed(folder: Path, options: OpenOptions) -> Catalog:
    from shardmerge.sources.deepspeed import read_deepspeed

    return read_deepspeed(folder, view=options.view)


def _read_megatron(folder: Path) -> Catalog:
    from shardmerge.sources.megatron import read_megatron

    return read_megatron(folder)


# The order says who wins where two could: a Trainer checkpoint with `latest` also holds a 16-bit model.safetensors,
# and the fp32 master weights are the better source.
_FOLDER_READERS: tuple[Reader, ...] = (
    _tag, _work_dir, _tag_parent, _megatron, _adapter, _indexed, _usual, _meta, _single, _config_only,
)  # fmt: skip
_FILE_READERS: tuple[Reader, ...] = (_index_file, _tag_member, _rank_member, _adapter_file, _safetensors, _torch)


def _unknown(path: Path) -> CheckpointError:
    if path.is_dir():
        found = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "an empty directory"
    else:
        with path.open("rb") as file:
            found = f"first bytes {file.read(8)!r}"
    return CheckpointError(
        "unknown-format",
        "not a checkpoint that shardmerge knows",
        where=str(path),
        found=found,
        expected="safetensors, torch .pth/.pt/.bin; a DeepSpeed, Megatron, XTuner, Meta, PEFT or HF directory",
    )
