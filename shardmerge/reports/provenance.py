"""What a receipt says of where each tensor is from, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardmerge.errors import VerificationError
from shardmerge.publish.receipt import damaged, read_receipt
from shardmerge.reports.operations import kind_of, steps
from shardmerge.tensors.natural_order import natural_key

# More bytes or elements than any file can hold.
_TOO_MANY = 1 << 63


@dataclass(frozen=True, slots=True)
class Leaf:
    """A source tensor, as one of the things that a tensor is made of.

    Attributes
    ----------
    source, tensor
        Names of the source and of the tensor in it.
    numel
        Number of its elements.
    origin
        Where in the source it lies, in words.
    """

    source: str
    tensor: str
    numel: int
    origin: str

    @property
    def text(self) -> str:
        """``trained:llm.lm_head.weight``."""
        return f"{self.source}:{self.tensor}"


@dataclass(frozen=True, slots=True)
class Origin:
    """A tensor of the result, and where it is from.

    Attributes
    ----------
    name, dtype, shape, numel, nbytes, shard, rule
        As in the receipt.
    leaves
        What it is made of.
    kind
        What was done to it: one of ``operations.KINDS``.
    how, way
        The same in detail, with parameters and without.
    crc32
        Of its bytes, in hexadecimal; ``""`` where it was cloned.
    overflowed
        Values that became infinite in a cast.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    shard: str
    rule: str
    leaves: tuple[Leaf, ...]
    kind: str
    how: str
    way: str
    crc32: str
    overflowed: int


@dataclass(frozen=True, slots=True)
class Source:
    """A source: its name in the mapping, its path as the user wrote it, what it is, its digest, remarks."""

    name: str
    path: str
    kind: str
    fingerprint: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """A receipt.

    Attributes
    ----------
    name
        Of the directory.
    target, plan, version
        What was made, the plan's id, and the version of shardmerge that made it.
    sources, tensors
        Tensors by name, ``layers.2`` before ``layers.11``.
    shards
        Name, bytes, and SHA-256 of all bytes that are no tensor data.
    side_files
        Name and SHA-256.
    unused
        Source, tensor and reason of everything that was not taken.
    warnings
        Of the plan.
    """

    name: str
    target: str
    plan: str
    version: str
    sources: tuple[Source, ...]
    tensors: tuple[Origin, ...]
    shards: tuple[tuple[str, int, str], ...]
    side_files: tuple[tuple[str, str], ...]
    unused: tuple[tuple[str, str, str], ...]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.numel for tensor in self.tensors)


def read_provenance(folder: Path) -> Provenance:
    """Reads the receipt of a published directory.

    Raises
    ------
    UsageError
        ``no-receipt``: not a directory that shardmerge made.
    VerificationError
        ``damaged-receipt``.
    """
    receipt: Any = read_receipt(folder)
    try:
        return _provenance(folder.absolute().name, receipt)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise _incomplete(folder, error) from error


def _incomplete(folder: Path, error: Exception) -> VerificationError:
    return damaged(folder, f"the receipt does not say all that it should: {type(error).__name__}: {error}"[:200])


def _provenance(name: str, receipt: Any) -> Provenance:  # noqa: ANN401  # JSON, checked by reading it
    return Provenance(
        name,
        str(receipt["target"]),
        str(receipt["plan"]),
        str(receipt["shardmerge"]),
        tuple(_source(key, value) for key, value in receipt["sources"].items()),
        tuple(_origin(*item) for item in sorted(receipt["tensors"].items(), key=lambda item: natural_key(item[0]))),
        tuple((key, _count(value["nbytes"]), str(value["frame_sha256"])) for key, value in receipt["shards"].items()),
        tuple((key, str(value)) for key, value in receipt["side_files"].items()),
        tuple((str(one["source"]), str(one["tensor"]), str(one["reason"])) for one in receipt["unused"]),
        tuple(map(str, receipt["warnings"])),
    )


def _source(name: str, value: Any) -> Source:  # noqa: ANN401
    notes = tuple(map(str, value["notes"]))
    return Source(name, str(value["path"]), str(value["kind"]), str(value["fingerprint"]), notes)


def _origin(name: str, value: Any) -> Origin:  # noqa: ANN401
    shape, crc32 = tuple(map(_count, value["shape"])), str(value.get("crc32", ""))
    leaves, ops = tuple(dict.fromkeys(_leaves(value["made"]))), tuple(dict.fromkeys(_ops(value["made"])))
    kind = kind_of(ops, shape, sources=bool(leaves), cloned=not crc32)
    return Origin(
        name,
        str(value["dtype"]),
        shape,
        _numel(shape),
        _count(value["nbytes"]),
        str(value["shard"]),
        str(value["rule"]),
        leaves,
        kind,
        ", ".join(steps(ops, shape, exact=True)) or kind,
        ", ".join(steps(ops, shape, exact=False)) or kind,
        crc32,
        _count(value.get("overflowed", 0)),
    )


def _leaves(made: Mapping[str, Any]) -> Iterator[Leaf]:
    """Yields the source tensors of an expression; one without a name holds nothing."""
    for base in made.get("of", ()):
        yield from _leaves(base)
    if "source" in made and made["tensor"]:
        yield Leaf(str(made["source"]), str(made["tensor"]), _numel(made["shape"]), str(made["origin"]))


def _ops(made: Mapping[str, Any]) -> Iterator[str]:
    for base in made.get("of", ()):
        yield from _ops(base)
    if "op" in made:
        yield str(made["op"])


def _numel(shape: Any) -> int:  # noqa: ANN401
    count = 1
    for size in shape:
        count = _count(count * _count(size))
    return count


def _count(value: Any) -> int:  # noqa: ANN401
    """Returns a number of bytes, elements or values, if it can be one."""
    if not isinstance(value, int) or not 0 <= value < _TOO_MANY:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value
