"""Errors for paths that hold no checkpoint: what is there instead, by its name or the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardmerge.errors import CheckpointError
from shardmerge.sources.choosing import nothing_here
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors.file_roles import foreign_weights

# The moments that Adam, SGD, Adafactor, Lion, Shampoo keep, by the last part of their names in a flat file.
MOMENTS = frozenset({
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_avg_sq_row", "exp_avg_sq_col",
    "square_avg", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2",
})  # fmt: skip
# What lies beside them, and may be called so in a model too.
_BESIDE_MOMENTS = frozenset({"step", "sum"})


def is_optimizer(names: Iterator[str]) -> bool:
    """Tells whether all names of a flat file are those of moments; False for none at all."""
    leaves: set[str] = set()
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf not in MOMENTS | _BESIDE_MOMENTS:
            return False
        leaves.add(leaf)
    return bool(leaves - _BESIDE_MOMENTS)


def not_a_model(state: str, where: str, found: str) -> CheckpointError:
    """Returns the error for a file that holds state of a run."""
    return CheckpointError(
        "not-a-model",
        f"this is {state}, and no model",
        where=where,
        found=found,
        expected="a state dict: tensors by the names of a model's parameters",
        hint="pass the model's weights, or the directory of the whole checkpoint",
    )


def unknown_format(path: Path) -> CheckpointError:
    """Returns the error for a file or directory that no reader knows."""
    if path.is_dir():
        return _no_weights(path)
    with SourceFile(path) as file:
        found = f"first bytes {file.read(0, min(file.size, 8))!r}"
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
