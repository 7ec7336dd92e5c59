"""Some tensors of a result: those of given names, or a sample that everybody draws alike."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

from shardmerge.errors import UsageError
from shardmerge.prepare.inspection import names_matching
from shardmerge.publish.recorded import Recorded

_SIZE = re.compile(r"(\d{1,9})|(\d{1,3}(?:\.\d{1,6})?)%")


@dataclass(frozen=True, slots=True)
class Selection:
    """Which tensors are looked at.

    Attributes
    ----------
    tensors
        Names, or templates as mappings have them; all, if there are none.
    sample
        How many of those: ``100`` or ``5%``; all, if it is empty.
    seed
        Of the sample: another seed draws another one.

    Raises
    ------
    UsageError
        ``bad-sample``.
    """

    tensors: tuple[str, ...] = ()
    sample: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample:
            _count(self.sample, 0)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.sample)

    def of(self, receipt: Recorded, folder: Path) -> Recorded:
        """Returns a receipt of the selected tensors and the files of weights that hold them.

        Raises
        ------
        UsageError
            ``unknown-tensor``: a name or template that no tensor has.
        """
        if not self:
            return receipt
        names = self._names(receipt, folder)
        tensors = {name: tensor for name, tensor in receipt.tensors.items() if name in names}
        touched = {tensor.shard for tensor in tensors.values()}
        shards = {name: shard for name, shard in receipt.shards.items() if name in touched}
        return replace(receipt, shards=shards, side_files={}, tensors=tensors)

    def _names(self, receipt: Recorded, folder: Path) -> frozenset[str]:
        exact = [name for name in self.tensors if name in receipt.tensors]
        templates = [name for name in self.tensors if name not in receipt.tensors]
        names = {*exact, *_matching(tuple(receipt.tensors), templates, folder)} if self.tensors else {*receipt.tensors}
        return frozenset(sorted(names, key=self._rank)[: _count(self.sample, len(names)) if self.sample else None])

    def _rank(self, name: str) -> bytes:
        return hashlib.sha256(f"{self.seed} {name}".encode("utf-8", "surrogatepass")).digest()

    def left_out(self, receipt: Recorded, selected: Recorded) -> str:
        """Returns what of a receipt is not selected, in words, or ``""``."""
        rest = [tensor.nbytes for name, tensor in receipt.tensors.items() if name not in selected.tensors]
        if not self:
            return ""
        drawn = f"the sample of seed {self.seed}" if self.sample else "what --tensor names"
        files = f"{len(receipt.side_files)} side file(s), {len(receipt.shards) - len(selected.shards)} shard header(s)"
        return f"{sum(rest):,} bytes in {len(rest)} tensors, {files}: not in {drawn}"


def _matching(names: Sequence[str], templates: Sequence[str], folder: Path) -> tuple[str, ...]:
    return names_matching(names, templates, str(folder)) if templates else ()


def _count(sample: str, of: int) -> int:
    """Returns how many of so many a sample has: at least one."""
    match = _SIZE.fullmatch(sample)
    number, share = match.groups() if match else (None, None)
    size = float(number or share or 0)
    if not size or (share and size > 100):
        what = "a sample is a number of tensors, or a share of them"
        raise UsageError("bad-sample", what, found=sample, expected="such as 100, or 5%")
    return int(number) if number else max(ceil(of * size / 100), 1)
