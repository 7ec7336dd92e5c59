"""Tensors that several ranks hold whole, and whether they are copies of each other.

Of a buffer or a replicated weight they are. Of a layer that every rank has one of its own of (experts, stages of a
pipeline), under one name and with one shape, they are not, and to take one for all would be a wrong model. A zip has
checksums, so equal ones cost nothing; where they differ, or there are none, the first bytes are read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardmerge.errors import CheckpointError
from shardmerge.sources.torch_file import ContentKey
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Box, Extent

# Weights of two layers differ in their first few numbers already.
_COMPARED = 4096
_MOST_NAMED = 5
# What torch's BatchNorm counts in each rank by itself (``torch/nn/modules/batchnorm.py``).
_OWN = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(slots=True)
class CopyCheck:
    """Compares copies as they come, and says in the end what came of it."""

    _contents: dict[tuple[str, tuple[int, ...]], ContentKey] = field(default_factory=dict)
    _differing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def compare(self, name: str, first: Box, other: Box, content: ContentKey) -> None:
        """Compares a box with the first one at its place; that one itself comes first.

        Parameters
        ----------
        name
            Of the tensor.
        first, other
            The same part of the tensor.
        content
            Of the other, as ``TorchFile.content_key`` has it.
        """
        known = self._contents.setdefault((name, first.offsets), content)
        same = first is other or (known is not None and known == content) or name in self._differing
        if not same and _first_bytes(first) != _first_bytes(other):
            self._differing[name] = _extent(first).file, _extent(other).file

    def settle(self) -> tuple[str, ...]:
        """Returns the warning for counts that every rank keeps by itself.

        Raises
        ------
        CheckpointError
            ``ranks-differ``: other tensors.
        """
        own = [name for name in self._differing if name.rpartition(".")[2] in _OWN]
        odd = [name for name in self._differing if name not in own]
        if odd:
            raise CheckpointError(
                "ranks-differ",
                f"{len(odd)} tensors are not sharded over all ranks, and ranks hold different values under one name:"
                f" {', '.join(name[:80] for name in odd[:_MOST_NAMED])}",
                where=" and ".join(self._differing[odd[0]]),
                expected="copies of one tensor",
                hint="nothing in the files says how these make one tensor: save the model from the run itself, with"
                " get_model_state_dict and StateDictOptions(full_state_dict=True)",
            )
        if not own:
            return ()
        named = ", ".join(name[:80] for name in own[:_MOST_NAMED])
        return (f"{len(own)} running statistics differ from rank to rank, those of the first are taken: {named}",)


def _first_bytes(box: Box) -> bytes:
    extent = _extent(box)
    with SourceFile(extent.file) as file:
        return file.read(extent.offset, min(extent.nbytes, _COMPARED))


def _extent(box: Box) -> Extent:
    return box.held if isinstance(box.held, Extent) else box.held.extent
