"""What a power cut may leave, on a disk that keeps no more than POSIX promises.

Data is there once its file was synced, a name once its directory was. Until then each change of its own may be there or
not, in whatever order. No file system is as bad as that all the time, and each is in some respect: ext4 writes names
down in their order and data when it likes, btrfs the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.killing import Call

_PART = re.compile(r".*/parts/(\d{5})\.\w+\.\d+\.tmp")
_CLAIM = re.compile(r".*/ready-\w+")
_RECEIPT = re.compile(r"(.*)/parts/(\d{5})\.json")


@dataclass(eq=False)
class Node:
    """A file or a directory.

    Attributes
    ----------
    dirty
        Whether some of its data may be lost.
    names
        Of a directory, what it holds.
    kept
        Of a directory, what it held when it was synced last.
    """

    dirty: bool = False
    names: dict[str, Node] | None = None
    kept: dict[str, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Node:
        """Returns what is there, all of it on the disk for long."""
        if not path.is_dir():
            return cls()
        names = {one.name: cls.of(one) for one in path.iterdir()}
        return cls(names=names, kept=dict(names))

    def safe(self) -> bool:
        """Tells whether all of it survives a power cut, names and data."""
        if self.names is None:
            return not self.dirty
        return self.names == self.kept and all(one.safe() for one in self.names.values())


class Disk:
    """Follows a run call by call.

    Parameters
    ----------
    root
        Where it happens.
    tree
        What is there before.
    out, names
        The output path, and the file of each part by its number.
    """

    def __init__(self, root: Path, tree: Node, out: Path, names: Sequence[str]) -> None:
        self._root, self._tree, self._out, self._names = str(root), tree, str(out), names

    def broken(self, calls: Sequence[Call], *, published: bool = True) -> Iterator[str]:
        """Yields every promise that a power cut at some moment would break, when a command has ended too."""
        for call in calls:
            if call.result >= 0:
                yield from self._before(call)
                self._do(call)
                yield from self._after(call)
        yield from self._lost_parts()
        if published and not self._survives(self._out):
            yield "the run ended, and its result may be lost"

    def _before(self, call: Call) -> Iterator[str]:
        begins = _PART.fullmatch(call.a)
        if call.name == "pwrite" and call.b == "begins" and begins and self._at(call.a).dirty:
            yield f"part {begins[1]} looks whole to a reader before it is"
        if (call.name == "open" and begins) or (call.name == "rename" and _CLAIM.fullmatch(call.b)):
            yield from self._lost_parts()
        if call.name == "rename" and "partial-gone" in call.b and not self._survives(self._out):
            yield "what the result was made of is removed before the result is safe"

    def _after(self, call: Call) -> Iterator[str]:
        if call.name not in ("rename", "exchange"):
            return
        receipt = _RECEIPT.fullmatch(call.b)
        if receipt and not self._at(f"{receipt[1]}/model/{self._names[int(receipt[2])]}").safe():
            yield f"part {receipt[2]} has a receipt before it is on the disk"
        if call.b == self._out and not self._at(self._out).safe():
            yield "the result may be published in part"

    def _lost_parts(self) -> Iterator[str]:
        """Yields the parts that were committed and may be lost."""
        for path in self._paths(self._tree, self._root):
            receipt = _RECEIPT.fullmatch(path)
            if receipt is None:
                continue
            model = f"{receipt[1]}/model/{self._names[int(receipt[2])]}"
            for needed in (path, model, f"{receipt[1]}/begun.json"):
                if not self._survives(needed):
                    yield f"part {receipt[2]} is committed, and {needed.rsplit('/', 1)[1]} may be lost"

    def _paths(self, node: Node, path: str) -> Iterator[str]:
        for name, one in (node.names or {}).items():
            yield f"{path}/{name}"
            yield from self._paths(one, f"{path}/{name}")

    def _survives(self, path: str) -> bool:
        """Tells whether a name, all above it, and what it stands for are there after a power cut."""
        node = self._tree
        for name in self._steps(path):
            here = (node.names or {}).get(name)
            if here is None or node.kept.get(name) is not here:
                return False
            node = here
        return node.safe()

    def _at(self, path: str) -> Node:
        node = self._tree
        for name in self._steps(path):
            assert node.names is not None
            node = node.names[name]
        return node

    def _in(self, path: str) -> tuple[dict[str, Node], str]:
        """Returns what the folder of a path holds, and the last name."""
        folder, name = path.rsplit("/", 1)
        names = self._at(folder).names
        assert names is not None
        return names, name

    def _steps(self, path: str) -> list[str]:
        return path.removeprefix(self._root).strip("/").split("/") if path != self._root else []

    def _do(self, call: Call) -> None:
        if call.name == "tmpfile" or call.a.endswith(" (deleted)"):  # it never has a name
            return
        if call.name == "fsync":
            if not f"{call.a}/".startswith(f"{self._root}/"):  # there for long
                return
            node = self._at(call.a)
            node.dirty, node.kept = False, dict(node.names or {})
            return
        folder, name = self._in(call.a)
        if call.name == "mkdir":
            folder[name] = Node(names={})
        elif call.name == "open" and call.x:
            folder.setdefault(name, Node(dirty=True))
        elif call.name in ("pwrite", "write", "ftruncate", "ioctl"):
            folder[name].dirty = True
        elif call.name in ("unlink", "rmdir"):
            del folder[name]
        elif call.name in ("rename", "exchange"):
            other, there = self._in(call.b)
            moved, replaced = folder.pop(name), other.get(there)
            other[there] = moved
            if call.name == "exchange" and replaced is not None:
                folder[name] = replaced
