"""What lies in the staging directories of other runs, and whether a process is at work there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shardmerge.errors import OutputError
from shardmerge.storage.listing import files_below


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Unfinished files beside an output path, of a plan that is not the one that was published.

    Attributes
    ----------
    path
        The directory.
    nbytes
        What its files take on the disk.
    """

    path: Path
    nbytes: int

    @classmethod
    def of(cls, root: Path) -> LeftOver:
        """Looks at a directory; what somebody takes away meanwhile does not count."""
        nbytes = 0
        for path in files_below(root):
            with suppress(OSError):
                nbytes += path.lstat().st_blocks * 512
        return cls(root, nbytes)

    def __str__(self) -> str:
        from shardmerge.plan.tables import human_bytes  # where there is something to say

        return human_bytes(self.nbytes)


def check_unused(root: Path) -> None:
    """Raises ``staging-in-use`` where a process of this machine has a file below a directory open."""
    users = " ".join(map(str, sorted(_users(root))))
    if users:
        raise OutputError(
            "staging-in-use",
            "a process is at work on these unfinished files",
            where=str(root),
            found=f"process {users}",
            hint=f"wait until it is done, or stop it: kill {users}; then run the same command again",
        )


def _users(root: Path) -> Iterator[int]:
    for opened in Path("/proc").glob("[0-9]*/fd"):
        with suppress(OSError):  # gone, or of somebody else
            if any(root in link.readlink().parents for link in opened.iterdir()):
                yield int(opened.parent.name)
