"""The layer files of a DeepSpeed pipeline: weights and buffers of one layer each, 16-bit, under names of its own.

The optimizer and ``param_shapes`` call ``weight`` of layer 3 ``3.weight``. A module that several layers share is
``tied_modules.<key>`` there (``runtime/pipe/module.py``, ``TiedLayerSpec``, DeepSpeed 0.9 to 0.19); which layer it is
stands in no file. Its layer is found by its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import CheckpointError, ShardmergeError, raise_all
from shardmerge.shown import shown
from shardmerge.sources.deepspeed_checks import NODES, ONE_SAVE, wrong_name
from shardmerge.sources.deepspeed_files import DeepSpeedRankFile, layer_name
from shardmerge.sources.deepspeed_ranks import named_tensors
from shardmerge.sources.deepspeed_stages import TIED
from shardmerge.sources.deepspeed_values import Stored, compare_masters
from shardmerge.sources.torch_file import KnownPickles, TorchFile, read_torch_file
from shardmerge.tensors import Shape, TensorEntry

# A number with more of them is no layer's; Python refuses to read one of thousands.
_MOST_DIGITS = 9
# Weights that are compared to find the layer of a tied module.
_COMPARED = 2048


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer file.

    Attributes
    ----------
    number
        Of the layer, from 0 on.
    tensors
        By their names in the layer.
    """

    number: int
    file: TorchFile
    tensors: Mapping[str, Stored]

    def named(self, prefix: str) -> dict[str, Stored]:
        """Returns its tensors with their names in the model."""
        return {f"{prefix}.{name}": placed for name, placed in self.tensors.items()}


def read_layers(paths: Mapping[int, Path]) -> list[Layer]:
    """Returns the layers, in order; raises ``mixed-runs`` for files that have another layer's name."""
    known = KnownPickles()
    layers = []
    problems: list[ShardmergeError] = []
    for number, path in paths.items():
        file = read_torch_file(path, known)
        tensors = {name: Stored(file, ref) for name, ref in named_tensors(file.root).items()}
        layers.append(Layer(number, file, tensors))
        saved_as = DeepSpeedRankFile(path, 0, 0).saved_as(file.archive)
        if saved_as:
            problems.append(wrong_name(path, saved_as))
    raise_all(problems)
    return layers


def check_layers(folder: Path, layers: Sequence[Layer], listed: Collection[str], shapes: Mapping[str, Shape]) -> None:
    """Checks that the layers hold what the stages list: every parameter, in its shape, and every buffer.

    Parameters
    ----------
    folder
        The tag directory.
    listed, shapes
        Names of all stages' parameters and buffers, and the shapes that are stated. Those of tied modules are left out:
        a module that is only used by functions of it has no layer file.

    Raises
    ------
    CheckpointError
        ``missing-layer``, ``zero-layout``; all at once.
    """
    there = {layer.number: layer for layer in layers}
    mine = [name for name in listed if not name.startswith(TIED)]
    numbers = dict.fromkeys(layer_of(name) for name in mine)
    missing = sorted(number for number in numbers if number is not None and number not in there)
    problems: list[ShardmergeError] = []
    if missing:
        problems.append(_missing_layers(folder, missing, len(layers)))
    lacking = [name for name in mine if layer_of(name) in there and not _holds(there, name)]
    if lacking:
        problems.append(
            CheckpointError(
                "zero-layout",
                "layer files do not hold tensors that the model files list",
                where=str(folder),
                found=f"{len(lacking)}: {shown(lacking)}",
                hint=ONE_SAVE,
            )
        )
    raise_all([*problems, *_other_shapes(there, shapes)])


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that a name begins with, None for a tied module's."""
    head = name.partition(".")[0]
    return int(head) if len(head) <= _MOST_DIGITS and head.isascii() and head.isdigit() else None


def _holds(layers: Mapping[int, Layer], name: str) -> bool:
    number = layer_of(name)
    return number is not None and name.partition(".")[2] in layers[number].tensors


def _missing_layers(folder: Path, missing: Sequence[int], there: int) -> CheckpointError:
    names = ", ".join(layer_name(number) for number in missing[:8])
    return CheckpointError(
        "missing-layer",
        f"{len(missing)} layer files of the pipeline are missing",
        where=str(folder),
        found=f"{there} files; not {names}",
        expected="a file for each layer whose parameters or buffers the model files list",
        hint=NODES,
    )


def _other_shapes(layers: Mapping[int, Layer], shapes: Mapping[str, Shape]) -> Iterator[CheckpointError]:
    for name, shape in shapes.items():
        number = layer_of(name)
        layer = layers.get(number) if number is not None else None
        placed = layer.tensors.get(name.partition(".")[2]) if layer else None
        if placed is not None and placed.ref.shape != shape:
            yield CheckpointError(
                "zero-layout",
                f"the layer file does not have the parameter {shown(name)} in the shape that is stated",
                where=placed.file.path,
                found=str(placed.ref.shape),
                expected=f"{shape}, as param_shapes says",
                hint=ONE_SAVE,
            )


def tied_module(layer: Layer, stages: Sequence[Mapping[str, TensorEntry]]) -> tuple[int, str] | None:
    """Returns whose weights a layer holds: a pipeline stage and ``tied_modules.<key>``; None if it has no such shapes.

    Parameters
    ----------
    layer
        One of no stage's own parameters.
    stages
        The masters of each, by name: in one save they round to the layer's weights.

    Raises
    ------
    CheckpointError
        ``mixed-runs``: a layer with the names and shapes of a tied module, and other weights.
    """
    alike = [
        (number, prefix, mine)
        for number, masters in enumerate(stages)
        for prefix, mine in _tied(masters).items()
        if all(_same_shape(layer, name.removeprefix(f"{prefix}."), entry) for name, entry in mine.items())
    ]
    if not alike:
        return None
    tallies = [compare_masters(layer.named(prefix), mine, _COMPARED) for _, prefix, mine in alike]
    nearest = min(range(len(alike)), key=lambda index: tallies[index].differing)
    number, prefix, _ = alike[nearest]
    if tallies[nearest].worst() or not tallies[nearest].files:
        raise CheckpointError(
            "mixed-runs",
            "a layer file has the shapes of a tied module, and other weights than the optimizer files have for it",
            where=layer.file.path,
            found=", ".join(layer.tensors),
            expected=f"weights that masters of {prefix} round to",
            hint=ONE_SAVE,
        )
    return number, prefix


def _tied(masters: Mapping[str, TensorEntry]) -> dict[str, dict[str, TensorEntry]]:
    """Returns the masters of tied modules, by module."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in masters.items():
        if name.startswith(TIED):
            found.setdefault(".".join(name.split(".")[:2]), {})[name] = entry
    return found


def _same_shape(layer: Layer, name: str, entry: TensorEntry) -> bool:
    return name in layer.tensors and layer.tensors[name].ref.shape == entry.shape
