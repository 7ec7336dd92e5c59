"""From a path to a catalog: recognises the format by content, through any entry point people really pass.

What recognises a format is imported here, what reads it where it was recognised: a safetensors file needs no pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from shardmerge.errors import CheckpointError, ShardmergeError, UsageError, raise_all
from shardmerge.sources.choosing import (
    Remarks,
    beside_numbered,
    beside_tag,
    checkpoints_inside,
    nothing_here,
    several,
    tags_near,
    usual_models,
    weight_files,
)
from shardmerge.sources.deepspeed_files import DeepSpeedView, is_tag_file, is_tag_folder
from shardmerge.sources.hf_folder import read_indexed, side_files
from shardmerge.sources.hub import is_hub_id, resolve_hub_id
from shardmerge.sources.links import odd_links
from shardmerge.sources.model_files import read_model, read_set_of, read_single, read_usual
from shardmerge.sources.not_read import is_optimizer, not_a_model, unknown_format
from shardmerge.sources.peft_folder import is_adapter_file, read_adapter
from shardmerge.sources.placeholders import without_placeholders
from shardmerge.sources.rank_files import (
    TRACKER,
    is_distributed,
    is_megatron_folder,
    is_meta_file,
    is_rank_file,
    is_rank_folder,
    newest_iteration,
)
from shardmerge.sources.safetensors_file import is_safetensors, read_safetensors
from shardmerge.tensors import PEFT_ADAPTER, Catalog


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

    view: DeepSpeedView = "fp32"
    root: str = ""
    download: bool = False


FormatReader: TypeAlias = Callable[[Path, OpenOptions], "Catalog | None"]


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
            return _completed(catalog, path)
    raise unknown_format(path)


def _completed(catalog: Catalog, path: Path) -> Catalog:
    """Adds side files, checks links, and takes placeholders for what they are."""
    folder = path if path.is_dir() else path.parent
    stamps = (Path(stamp.path) for stamp in catalog.files)
    raise_all(odd_links((file for file in stamps if file != path and file.is_relative_to(folder)), folder))
    catalog = replace(catalog, side_files=catalog.side_files or side_files(folder))
    if catalog.kind.startswith("DeepSpeed"):  # its own tables say which of its tensors have no elements
        return catalog
    catalog = without_placeholders(catalog)
    return replace(catalog, elsewhere=tags_near(folder)) if catalog.absent else catalog


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
            if (
                len(tag) < _LONGEST_NAME and not folder.exists() and usual_models(path)
            ):  # whoever is short of space keeps the gathered model
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
    return Remarks(warnings=(said,)).on(read_model(usual_models(path)[0], lambda shard: _shard(shard, options)))


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


def _work_dir(path: Path, options: OpenOptions) -> Catalog | None:
    """An mmengine work_dir: ``last_checkpoint`` holds the path of the newest ``.pth``, often an absolute one."""
    marker = path / "last_checkpoint"
    if not marker.is_file():
        return None
    target = Path(marker.read_text("utf-8", "replace").strip())
    for candidate in (path / target.name, target, path / target):
        if target.name and candidate.exists():
            others = [file.name for file in weight_files(path) if file != candidate]
            return beside_numbered(candidate.name, others, "'last_checkpoint'").on(open_catalog(candidate, options))
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
    iterations = [item for item in sorted(path.glob("iter_*")) if item.is_dir() and is_megatron_folder(item)]
    if newest is None and len(iterations) > 1:
        raise several("several-tags", f"the directory holds several iterations and no {TRACKER}", path, iterations)
    if newest is None:
        return None
    others = [item.name for item in iterations if item != newest]
    return beside_numbered(newest.name, others, TRACKER).on(_read_megatron(newest))


def _adapter(path: Path, options: OpenOptions) -> Catalog | None:
    catalog = read_adapter(path, lambda weights: _shard(weights, options))
    inside = [f"{item.name}/" for item in checkpoints_inside(path)]
    if catalog is None or not inside:
        return catalog
    return _noted(catalog, f"the adapter of this directory is read, and not those in {', '.join(inside[:8])}")


def _meta(path: Path, options: OpenOptions) -> Catalog | None:
    from shardmerge.sources.rank_sets import read_meta

    return read_meta(path)


def _usual(path: Path, options: OpenOptions) -> Catalog | None:
    return read_usual(path, lambda shard: _shard(shard, options))


def _single(path: Path, options: OpenOptions) -> Catalog | None:
    return read_single(path, lambda shard: _shard(shard, options), lambda chosen: open_catalog(chosen, options))


def _inside(path: Path, options: OpenOptions) -> Catalog | None:
    """A directory of checkpoints is none itself: no convention says which of them is meant."""
    del options
    inside = checkpoints_inside(path)
    if not inside or (path / "config.json").is_file():
        return None
    what = (
        "no weights here, but in " + ("a directory" if len(inside) == 1 else f"{len(inside)} directories") + " inside"
    )
    raise several("several-checkpoints", what, path, inside)


def _config_only(path: Path, options: OpenOptions) -> Catalog | None:
    """A base model of which nothing but config and tokenizer is needed, since the checkpoint has all of its tensors."""
    del options
    if not (path / "config.json").is_file():
        return None
    elsewhere = tuple(str(item) for item in checkpoints_inside(path))
    return Catalog(str(path), "config without weights", {}, notes=tuple(nothing_here(path)), elsewhere=elsewhere)


def _shard(path: Path, options: OpenOptions) -> Catalog:
    if is_safetensors(path):
        return read_safetensors(path)
    catalog = _torch(path, options)
    if catalog is None:
        raise unknown_format(path)
    return catalog


def _index_file(path: Path, options: OpenOptions) -> Catalog | None:
    if not path.name.endswith(".index.json"):
        return None
    return read_indexed(path, lambda shard: _shard(shard, options))


def _shard_member(path: Path, options: OpenOptions) -> Catalog | None:
    """One shard stands for the whole model, as the file of a rank does."""
    catalog = None if options.root else read_set_of(path, lambda shard: _shard(shard, options))
    return _whole_set(catalog, path) if catalog else None


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


# Bytes of a file's name on Linux.
_LONGEST_NAME = 255

# The order says who wins where two could: a Trainer checkpoint with `latest` also holds a 16-bit model.safetensors,
# and the fp32 master weights are the better source.
_FOLDER_READERS: tuple[FormatReader, ...] = (
    _tag, _work_dir, _tag_parent, _megatron, _adapter, _usual, _meta, _single, _inside, _config_only,
)  # fmt: skip
_FILE_READERS: tuple[FormatReader, ...] = (
    _index_file, _tag_member, _rank_member, _shard_member, _adapter_file, _safetensors, _torch,
)  # fmt: skip
