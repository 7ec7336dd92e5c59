"""Errors of a resolution that need more than a line: what was probably meant, and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.suggest import drop_lines, ticked
from shardmerge.mapping.yaml_nodes import Mark
from shardmerge.tensors import Catalog, Shape
from shardmerge.tensors.packed import Packed, titles


@dataclass(frozen=True, slots=True)
class Misfit:
    """A target whose tensor has another shape than the config says."""

    target: str
    name: str
    shape: Shape
    wanted: Shape


def shape_hint(cases: Sequence[Misfit], source: str) -> str:
    """Returns what most likely explains shapes that do not fit."""
    swapped = _swapped(cases)
    if swapped is not None:
        return f"are the two swapped? {swapped[0].target} and {swapped[1].target} would fit in each other's place"
    first = cases[0]
    only_rows = all(len(one.shape) == len(one.wanted) and one.shape[1:] == one.wanted[1:] for one in cases)
    names = {one.target.split(".")[-2] for one in cases if "." in one.target}
    if only_rows and names & {"embed_tokens", "lm_head"}:
        have, want = first.shape[0], first.wanted[0]
        cut = ", trim: true" if have > want else ""
        other = "" if names >= {"embed_tokens", "lm_head"} else "; embedding and head come with different rows"
        said = f"`vocabulary: {{rows: {want}{cut}}}`, or `{{rows: {have}}}` to keep it"
        return f"to resize the vocabulary, say {said}{other}"
    return f"name as `{source}` the model of the sizes that the config says: this is one of another size"


def _swapped(cases: Sequence[Misfit]) -> tuple[Misfit, Misfit] | None:
    """Returns two tensors of one module's surroundings that each have the shape of the other's place."""
    for index, one in enumerate(cases):
        near = one.target.rsplit(".", 2)[0]
        for other in cases[index + 1 :]:
            if other.target.startswith(near) and (one.shape, other.shape) == (other.wanted, one.wanted):
                return one, other
    return None


def packed_error(
    source: str, names: Sequence[str], packed: Mapping[str, Packed], used: set[str], mark: Mark, purpose: str
) -> MappingError:
    """Returns the error for packed weights that shall be numbers.

    Parameters
    ----------
    source, names
        Whose they are.
    packed
        What is known of all codes of the source.
    used
        All names of the source that rules use: a line to drop the packed ones must not touch others.
    mark
        The first rule that uses one.
    purpose
        What for.
    """
    lines = ticked(drop_lines(source, names, used - set(names)))
    return MappingError(
        "packed-weights",
        f"{count(len(names), 'tensor')} of {source} packed by quantization ({titles(packed, names)}), codes that "
        f"{purpose} cannot use: {listed(names, 3)}",
        where=str(mark),
        hint=f"let `{source}` be the 16-bit model that it was quantized from; where another source has these tensors, "
        f"add under `drop:` {lines}",
    )


def placeholder_error(source: str, names: Sequence[str], catalog: Catalog, *, droppable: bool = False) -> MappingError:
    """Returns the error for tensors that are wanted and that their source lists without data.

    Parameters
    ----------
    source, names, catalog
        Whose they are.
    droppable
        Whether the mapping alone decides what is written, so that a line under `drop:` leads on.
    """
    lines = ticked(drop_lines(source, names, set(catalog.names())))
    without = f"; to go without them, add under `drop:` {lines}" if droppable else ""
    return MappingError(
        "placeholder",
        f"{count(len(names), 'tensor')} of {source} without data, placeholders of a save under ZeRO-3 that did not "
        f"gather: {listed(names, 3)}",
        where=catalog.files[0].path if len(catalog.files) == 1 else catalog.path,
        hint=placeholder_hint(catalog) + without,
    )


def placeholder_hint(catalog: Catalog) -> str:
    """Returns where the data of placeholders are."""
    if catalog.elsewhere:
        return f"the data are in the ZeRO checkpoint beside it: pass {' or '.join(catalog.elsewhere[:3])} instead"
    return (
        "the data are in the tag directory of the same save (global_stepN, with *_optim_states.pt): pass that; or save "
        'the model again with "stage3_gather_16bit_weights_on_model_save": true'
    )
