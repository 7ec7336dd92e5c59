"""A checkpoint, reduced to what its headers say, and what pins its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import stat_result
from typing import NamedTuple, TypeAlias

from shardmerge.json_rows import Rows, canonical_text
from shardmerge.shown import Displayed
from shardmerge.tensors.entries import Extent, TensorEntry
from shardmerge.tensors.optimizer import OptimizerState

Fact: TypeAlias = "int | float | str | bool"

# The kind of a catalog of adapter weights, which say nothing without the base they change.
PEFT_ADAPTER = "PEFT adapter"


class Record(NamedTuple):
    """Bytes of a file that have a checksum there: a storage of a torch zip.

    Attributes
    ----------
    name
        In the archive.
    offset, nbytes
        Where they lie, in bytes.
    crc32
        As the archive says; 0 where it was written without.
    """

    name: str
    offset: int
    nbytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What pins a source file between planning and reading.

    Attributes
    ----------
    path
        Absolute path.
    size, mtime_ns
        From ``stat``.
    header
        SHA-256 (hex) of the bytes that were parsed: safetensors header, ``data.pkl``; empty where none were.
    header_at, header_nbytes
        Where these bytes lie in the file; 0 bytes where they are not compared again.
    device, inode, ctime_ns
        From ``stat``: a file put in the place of another, with its size and time of modification, differs here. 0 in a
        plan that was written down: they mean something on one machine only.
    """

    path: str
    size: int
    mtime_ns: int
    header: str = ""
    header_at: int = 0
    header_nbytes: int = 0
    device: int = field(default=0, compare=False)
    inode: int = field(default=0, compare=False)
    ctime_ns: int = field(default=0, compare=False)

    @classmethod
    def of(cls, path: str, status: stat_result, header: bytes = b"", header_at: int = 0) -> FileStamp:
        """Returns the stamp of a file from its ``stat`` and the bytes that were parsed, if any, and where they lie."""
        digest = hashlib.sha256(header).hexdigest() if header else ""
        plain = cls(path, status.st_size, status.st_mtime_ns, digest, header_at, len(header))
        return plain.seen(status)

    def seen(self, status: stat_result) -> FileStamp:
        """Returns it with the numbers of a file that is on this machine."""
        return replace(self, device=status.st_dev, inode=status.st_ino, ctime_ns=status.st_ctime_ns)


@dataclass(frozen=True, slots=True, repr=False)
class Catalog(Displayed):
    """A checkpoint, reduced to what its headers say.

    Attributes
    ----------
    path
        What the user named, resolved.
    kind
        The format, for people and JSON: ``"safetensors"``, ``"torch zip"``, ``"DeepSpeed ZeRO-2"``, ...
    entries
        By name, in the checkpoint's order.
    aliases
        Tied names: alias -> the entry that owns the bytes.
    files
        Every file that was opened.
    side_files
        Small files beside the weights (config.json, tokenizer files), by base name, each as one extent.
    absent
        Names that the checkpoint lists with no data (placeholders of ZeRO-3).
    elsewhere
        Paths of checkpoints beside this one that hold weights, where it lacks some: a ZeRO tag directory beside a model
        with placeholders, the ``checkpoint-N`` of a directory that has a config and no weights.
    notes
        What a user may want to know and what changes no value: a total_size that disagrees, the rank files read.
    warnings
        What decides which values come out: the view chosen for want of another, placeholders left out, tensors that are
        not part of the model. Shown with every plan and result, on stderr also under ``-q``, and kept in the receipt.
    doubt
        What the headers leave open and a config beside them may settle: whether the shards of all ranks are there. A
        warning, unless the config does; ``prepare.shard_counts`` sees to that.
    training_config
        Text of the training config carried in the file (mmengine ``meta["cfg"]``), or ``""``. Never executed.
    facts
        Plain values that the training run left beside the weights, by name: the scalars of Megatron's ``args``
        (``num_attention_heads``, ``tensor_model_parallel_size``, ...). Not in the fingerprint.
    optimizer
        Of the moments of a run: what its optimizer keeps beside them. Not in the fingerprint.
    quantized
        What the files beside the weights say they are quantized by (``fp8``, ``gptq``, ...), or ``""``; known once
        ``dequantizing`` has looked.
    dequantized
        Whether that no longer holds: the weights are numbers, and no config may say otherwise.
    """

    path: str
    kind: str
    entries: Mapping[str, TensorEntry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: tuple[FileStamp, ...] = ()
    side_files: Mapping[str, Extent] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()
    elsewhere: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    doubt: str = ""
    training_config: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    optimizer: OptimizerState | None = None
    quantized: str = ""
    dequantized: bool = False

    def __contains__(self, name: str) -> bool:
        return name in self.entries or name in self.aliases

    def __getitem__(self, name: str) -> TensorEntry:
        return self.entries[self.aliases.get(name, name)]

    def names(self) -> Iterator[str]:
        """Yields every name, aliases after the entries."""
        yield from self.entries
        yield from self.aliases

    def fingerprint(self) -> str:
        """Returns a SHA-256 (hex) over names, dtypes, shapes, aliases and the files' sizes and headers.

        Paths and times stay out: a copy of a checkpoint has the fingerprint of the original.
        """
        tensors = ([entry.name, entry.dtype.name, entry.shape] for entry in self.entries.values())
        files = sorted([stamp.size, stamp.header] for stamp in self.files)
        digest = hashlib.sha256()
        for piece in canonical_text(
            Rows(lambda: iter([self.kind, Rows(lambda: tensors), sorted(self.aliases.items()), files]))
        ):
            digest.update(piece.encode())
        return digest.hexdigest()
