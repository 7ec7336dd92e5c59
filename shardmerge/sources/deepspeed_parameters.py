"""The parameter files of a universal checkpoint: ``zero/<name>/fp32.pt``, a small torch file for each.

Their headers are read once; nothing else of a thousand files. The moments lie beside them, ``exp_avg.pt`` and others,
in the same form, and are not opened, but for the step that the optimizer counts.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import ONE_SAVE, Tag, way_out, wrong_name
from shardmerge.sources.deepspeed_moments import no_moments
from shardmerge.sources.deepspeed_ranks import partition
from shardmerge.sources.deepspeed_values import Samples, is_float
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.torch_file import KnownPickles, TorchFile, read_torch_file
from shardmerge.tensors import FileStamp, Shape, TensorEntry, dense

MASTER = "fp32.pt"
# What ``torch.save`` called the files of a parameter.
_NAMES = frozenset({"fp32", "exp_avg", "exp_avg_sq", "step"})
# What the conversion writes beside a parameter: how it was put together. Experts of AutoEP have keys of their own.
_KEYS = frozenset({"param", "cat_dim", "vocab_tensor", "param_n_sub_params", "sub_param_shape"})
# Files with something wrong that one error tells of.
_MOST_PROBLEMS = 8


@dataclass(frozen=True, slots=True)
class Parameters:
    """The masters of a universal checkpoint.

    Attributes
    ----------
    entries
        By name.
    stamps
        Of their files.
    steps
        What the optimizer counts and the model file does not, in words; ``""`` for the same.
    warnings
        What decides which values come out.
    """

    entries: Mapping[str, TensorEntry]
    stamps: tuple[FileStamp, ...]
    steps: str
    warnings: tuple[str, ...]


def read_parameters(tag: Tag, shapes: Mapping[str, Shape], others: Collection[str] = ()) -> Parameters:
    """Returns the masters of all parameters that the model files list.

    Parameters
    ----------
    tag
        The model files.
    shapes
        Of the parameters, by name.
    others
        Names that the conversion writes too, of frozen parameters and buffers; they are not read.

    Raises
    ------
    CheckpointError
        ``missing-parameter``: one without its file. ``mixed-runs``: one that no model file lists. ``zero-layout``: one
        that is something else than the model file says. All of a kind at once.
    """
    folder = tag.folder / "zero"
    there = {item.name for item in os.scandir(folder) if item.is_dir()}
    missing = [name for name in shapes if name not in there or not (folder / name / MASTER).is_file()]
    raise_all([*_missing(tag, missing, len(shapes)), *_strangers(tag, sorted(there - {*shapes, *others}))])
    reader = _Reader(folder)
    problems: list[ShardmergeError] = []
    for name, shape in shapes.items():
        try:
            reader.read(name, shape)
        except ShardmergeError as error:
            problems += error.each()
    raise_all(problems[:_MOST_PROBLEMS])
    odd = next((name for name, step in reader.steps.items() if not tag.claims.counts_to(step)), None)
    return Parameters(
        reader.entries,
        tuple(reader.stamps),
        "" if odd is None else f"{reader.steps[odd]:g} steps in zero/{odd}/step.pt",
        tuple(reader.warnings()),
    )


def read_parameter_moments(tag: Tag, shapes: Mapping[str, Shape], kind: str) -> tuple[Parameters, Mapping[str, float]]:
    """Returns a moment of all parameters, and how often each was stepped where a file beside it says so.

    Parameters
    ----------
    tag, shapes
        As ``read_parameters``, whose checks they have passed.
    kind
        ``exp_avg`` or ``exp_avg_sq``.

    Raises
    ------
    CheckpointError
        ``no-moments``: a parameter has none. ``mixed-runs``, ``zero-layout``, as ``read_parameters``.
    """
    folder = tag.folder / "zero"
    missing = [name for name in shapes if not (folder / name / f"{kind}.pt").is_file()]
    if missing:
        raise no_moments(str(folder), f"no {kind}.pt for {len(missing)} of {len(shapes)} parameters: {shown(missing)}")
    reader = _Reader(folder, kind)
    for name, shape in shapes.items():
        reader.read(name, shape)
    return Parameters(reader.entries, tuple(reader.stamps), "", ()), reader.steps


def _missing(tag: Tag, names: list[str], total: int) -> Iterator[CheckpointError]:
    if names:
        yield tag.error(
            "missing-parameter",
            f"the files of {len(names)} of {total} parameters are missing",
            found=f"no zero/<name>/{MASTER} for {shown(names)}",
            expected="one for each parameter that the model files list",
            hint="copy the checkpoint again from where the run saved it" + way_out(tag),
        )


def _strangers(tag: Tag, names: list[str]) -> Iterator[CheckpointError]:
    if names:
        yield tag.error(
            "mixed-runs",
            "zero/ holds parameters that the model files do not list",
            found=f"{len(names)}: {shown(names)}",
            hint="it was written over another one: " + ONE_SAVE + way_out(tag),
        )


class _Reader:
    """Reads the files of one parameter after the other. Most of them have one of a few pickles."""

    def __init__(self, folder: Path, kind: str = "fp32") -> None:
        self.entries: dict[str, TensorEntry] = {}
        self.stamps: list[FileStamp] = []
        self.steps: dict[str, float] = {}
        self._folder, self._kind = folder, kind
        self._known = KnownPickles()
        self._samples = Samples()
        self._cut: list[str] = []
        self._rounded: list[str] = []

    def read(self, name: str, shape: Shape) -> None:
        """Reads one parameter, and its step if there is one."""
        path = self._folder / name / f"{self._kind}.pt"
        file = read_torch_file(path, self._known)
        if file.archive in _NAMES - {self._kind}:
            raise wrong_name(path, f"{file.archive}.pt")
        ref = _tensor(file)
        self.stamps.append(file.stamp)
        self.entries[name] = self._entry(name, shape, file, ref)
        step = path.with_name("step.pt")
        if step.is_file():
            self._add_step(name, read_torch_file(step, self._known))
        if isinstance(file.root, dict) and len(file.root) == 1 and not path.with_name("exp_avg.pt").is_file():
            self._rounded.append(name)

    def _entry(self, name: str, shape: Shape, file: TorchFile, ref: TensorRef) -> TensorEntry:
        """Stage 3 saves the elements alone; the vocabulary of a Megatron run loses its padding."""
        where = partition(file, ref)
        bare = isinstance(file.root, TensorRef) and where.numel == prod(shape)
        vocabulary = isinstance(file.root, dict) and file.root.get("vocab_tensor") is True
        cut = vocabulary and _fewer_rows(ref.shape, shape)
        if not (bare or cut or ref.shape == shape) or not is_float(ref.dtype):
            raise CheckpointError(
                "zero-layout",
                f"the file of the parameter {shown(name)} does not hold it in the shape that is stated",
                where=file.path,
                found=f"{ref.dtype.name} {ref.shape}",
                expected=f"floats {shape}, as the model file says",
                hint=ONE_SAVE,
            )
        if cut:
            self._cut.append(f"{name}, {ref.shape[0]} of {shape[0]}")
        whole = ref.shape if cut else shape
        return TensorEntry(name, ref.dtype, whole, dense(where.extent, prod(whole)), f"universal {self._kind}")

    def _add_step(self, name: str, file: TorchFile) -> None:
        step = file.root
        if isinstance(step, (int, float)):
            self.steps[name] = float(step)
        elif isinstance(step, TensorRef) and is_float(step.dtype) and prod(step.shape) == 1:
            where = partition(file, step).extent
            self.steps[name] = self._samples.value(file.path, where.offset, step.dtype)

    def warnings(self) -> Iterator[str]:
        """Yields what is to be said of the values."""
        if self._cut:
            yield f"the conversion took padding off the vocabulary; rows kept: {shown(self._cut)}"
        if self._rounded:
            yield f"{len(self._rounded)} parameters have no masters, but 16-bit weights: {shown(self._rounded)}"


def _tensor(file: TorchFile) -> TensorRef:
    """Returns the tensor of a parameter file."""
    value: PickleValue = file.root
    strange = sorted(str(key) for key in value if key not in _KEYS) if isinstance(value, dict) else []
    if isinstance(value, dict) and not strange:
        value = value.get("param")
    if not isinstance(value, TensorRef):
        raise CheckpointError(
            "zero-layout",
            "a parameter file does not hold a tensor as ds_to_universal saves it",
            where=file.path,
            found=f"keys that are not known: {shown(strange)}" if strange else type(value).__name__,
            expected="a dict with param, cat_dim, vocab_tensor, param_n_sub_params or sub_param_shape; or a tensor",
        )
    return value


def _fewer_rows(mine: Shape, stated: Shape) -> bool:
    return len(mine) == len(stated) > 0 and mine[1:] == stated[1:] and 0 < mine[0] < stated[0]
