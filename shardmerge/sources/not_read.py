"""Errors for paths that hold no checkpoint: what is there instead, by name."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.file_roles import foreign_weights
from shardmerge.sources.choosing import nothing_here


def unknown(path: Path) -> CheckpointError:
    """Returns the error for a file or directory that no reader knows."""
    if path.is_dir():
        return _no_weights(path)
    with path.open("rb") as file:
        found = f"first bytes {file.read(8)!r}"
    kind = foreign_weights(path.name)
    return _not_read(path, found, kind) if kind else _no_checkpoint(path, found)


def _no_weights(folder: Path) -> CheckpointError:
    """A directory without weights that are read: what it holds instead."""
    names = sorted(item.name for item in folder.iterdir())
    kinds = {kind: name for name in names if (kind := foreign_weights(name))}
    lines = "; ".join(nothing_here(folder))
    if not kinds:
        return _no_checkpoint(folder, lines or ", ".join(names[:8]) or "an empty directory")
    error = _not_read(folder, lines, next(iter(kinds)))
    torch = next((folder / name for name in names if name.endswith(".ckpt") and _is_torch(folder / name)), None)
    if torch is not None:
        error.hint = f"torch wrote {torch.name}: pass the file itself, {torch}"
    return error


def _is_torch(path: Path) -> bool:
    from shardmerge.sources.torch_file import is_torch_file

    return is_torch_file(path)


def _not_read(path: Path, found: str, kind: str) -> CheckpointError:
    return CheckpointError(
        "kind-not-yet",
        f"these are weights of a kind that is not read: {kind}",
        where=str(path),
        found=found,
        expected="safetensors, or torch .bin, .pth, .pt",
        hint="pass the model that they were made from, or save it with save_pretrained first",
    )


def _no_checkpoint(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "unknown-format",
        "not a checkpoint that shardmerge knows",
        where=str(path),
        found=found,
        expected="safetensors, torch .pth/.pt/.bin; a DeepSpeed, Megatron, XTuner, Meta, PEFT or HF directory",
    )
