"""A plan from its text, whole or a part of it: a worker of a thousand parts holds one. See ``plan.writing``."""

from __future__ import annotations

import hashlib
import json
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import chain

from shardmerge.errors import CheckpointError, UnreadableError
from shardmerge.plan.expressions import Lookup, entry_of
from shardmerge.plan.identity import SCHEMA
from shardmerge.plan.json_values import Row, fields, listed, natural, naturals, text, texts, whole
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.soundness import check_copies, check_id, check_names, check_shard
from shardmerge.plan.value import Part, Plan, PlannedSource, Unused
from shardmerge.plan.writing import END, FORMAT
from shardmerge.system_errors import advice
from shardmerge.tensors import Extent, FileStamp, SideFile
from shardmerge.version import __version__


class PlanText:
    """A plan that is being read, line by line.

    Parameters
    ----------
    lines
        As ``plan_lines`` yields them. They are read once: ask for ``plan``, or for ``parts``.
    where
        The file, for messages.
    moved
        Returns where a file is now, of where it was when the plan was made.

    Attributes
    ----------
    id, target, out
        Of the plan; the output path is empty where the plan has none.
    files
        Its file table, at the paths where the files are now.
    sizes
        Of its parts, in bytes, by number.

    Raises
    ------
    CheckpointError
        ``damaged-plan``: the text is not whole, or was changed. ``other-version``: another version made it.
    """

    def __init__(self, lines: Iterable[str], where: str, moved: Callable[[str], str] = str) -> None:
        self._lines = iter(lines)
        self._where = where
        self._digest = hashlib.sha256()
        with self._checked():
            head = fields(json.loads(self._line().rstrip(",\n") + "}"))
            self._check_version(head)
            check_id(text(head["plan"]))
            self.id, self.target, self.out = text(head["plan"]), text(head["target"]), text(head["out"])
            self.sizes = naturals(head["parts"])
            self.files = tuple(_stamp(listed(row), moved) for row in self._section("files"))
            self._lookup = Lookup([stamp.path for stamp in self.files], self._section("ranks"))
            self._rules = [text(rule) for rule in self._section("rules")]

    def plan(self) -> Plan:
        """Returns the whole plan, once its digest is that of its text."""
        shards = tuple(shard for _, shard in self._shards(range(len(self.sizes))))
        with self._checked():
            copies: dict[Extent, str] = {}
            sides = tuple(self._side(fields(row), copies) for row in self._section("side_files"))
            sources = tuple(self._source(fields(row)) for row in self._section("sources"))
            side_sources = tuple(self.files[natural(number)] for number in self._section("side_sources"))
            unused = tuple(Unused(*texts(row)) for row in self._section("unused"))
            warnings, checks = (tuple(text(one) for one in self._section(name)) for name in ("warnings", "checks"))
            left = tuple((text(name), text(why)) for name, why in map(listed, self._section("left_behind")))
            check_names([*(shard.name for shard in shards), *(side.name for side in sides)])
            check_copies(copies, side_sources)
        self._finish()
        made = Plan(self.target, sources, shards, sides, unused, warnings, copies, side_sources, left, checks)
        return made.known_as(self.id)

    def parts(self, wanted: Iterable[int]) -> Iterator[Part]:
        """Yields some parts, each as soon as it is read, and raises at the end if the text is not whole.

        Raises
        ------
        CheckpointError
            As the class says.
        """
        for number, shard in self._shards(frozenset(wanted)):
            with self._checked():
                check_names([shard.name])
            yield Part(self.id, number, shard, self.files)
        with self._checked():
            deque(self._each_line(), maxlen=0)
        self._finish()

    def _shards(self, wanted: Container[int]) -> Iterator[tuple[int, PlannedShard]]:
        with self._checked():
            self._expect('"shards": [\n')
        for number in range(len(self.sizes)):
            with self._checked():
                head = fields(json.loads(f"{self._line().rstrip()}]}}"))
                rows = self._until("]}\n", "]},\n")
                if number not in wanted:
                    deque(rows, maxlen=0)
                    continue
                shard = self._shard(head, rows)
                check_shard(shard, self.sizes[number])
            yield number, shard
        with self._checked():
            self._expect("],\n")

    def _shard(self, head: Row, rows: Iterable[str]) -> PlannedShard:
        blobs = tuple(
            (natural(at), b64decode(text(data), validate=True)) for at, data in map(listed, listed(head["blobs"]))
        )
        checksums = {name: naturals(places) for name, places in fields(head["checksums"]).items()}
        tensors = tuple(self._tensor(fields(json.loads(row.rstrip(",\n")))) for row in rows)
        return PlannedShard(text(head["name"]), natural(head["nbytes"]), blobs, tensors, checksums)

    def _tensor(self, row: Row) -> PlannedTensor:
        name, rule = text(row["name"]), self._rules[natural(row["rule"])]
        entry = entry_of(fields(row["made"]), self._lookup)
        return PlannedTensor(name, entry, rule, text(row.get("stored", name)), natural(row["offset"]))

    def _side(self, row: Row, copies: dict[Extent, str]) -> SideFile:
        parts: list[bytes | Extent] = []
        for part in map(fields, listed(row["parts"])):
            if "copy" in part:
                file, offset, nbytes = listed(part["copy"])
                extent = self._lookup.extent(file, offset, natural(nbytes))
                copies[extent] = text(part["sha256"])
                parts.append(extent)
            else:
                parts.append(
                    text(part["text"]).encode() if "text" in part else b64decode(text(part["base64"]), validate=True)
                )
        return SideFile(text(row["name"]), tuple(parts))

    def _source(self, row: Row) -> PlannedSource:
        name, path, kind, fingerprint = (text(row[key]) for key in ("name", "path", "kind", "fingerprint"))
        files = tuple(self.files[number] for number in naturals(row["files"]))
        return PlannedSource(name, path, kind, fingerprint, files, texts(row["notes"]))

    def _check_version(self, head: Row) -> None:
        if head.get("format") != FORMAT:
            raise ValueError("the text does not begin as a plan does")
        if (head.get("schema"), head.get("shardmerge")) != (SCHEMA, __version__):
            raise CheckpointError(
                "other-version",
                "the plan was made by another version of shardmerge, whose plans may have another meaning",
                where=self._where,
                found=f"shardmerge {head.get('shardmerge')}, schema {head.get('schema')}",
                expected=f"shardmerge {__version__}, schema {SCHEMA}",
                hint="make the plan again: shardmerge plan MAPPING --out PLAN",
            )

    # --- lines ---

    def _line(self) -> str:
        line = next(self._lines, "")
        if not line.endswith("\n"):
            raise ValueError("it ends in the middle")
        self._digest.update(line.encode())
        return line

    def _each_line(self) -> Iterator[str]:
        """Yields the lines up to the last, which is put back."""
        for line in self._lines:
            if line.startswith(END):
                self._lines = chain([line], self._lines)
                return
            self._digest.update(line.encode())
            yield line

    def _expect(self, line: str) -> None:
        if self._line() != line:
            raise ValueError(f"it lacks the line {line.strip()}")

    def _until(self, *ends: str) -> Iterator[str]:
        while (line := self._line()) not in ends:
            yield line

    def _section(self, name: str) -> Iterator[object]:
        self._expect(f'"{name}": [\n')
        for line in self._until("],\n"):
            yield json.loads(line.rstrip(",\n"))

    def _finish(self) -> None:
        digest = self._digest.hexdigest()
        with self._checked():
            if next(self._lines, "") != f'{END}{digest}"}}\n' or next(self._lines, ""):
                raise ValueError("its digest is not that of its text")

    def _checked(self) -> _Checked:
        return _Checked(self._where)


# What JSON, and values that are not what they should be, may raise; too deep and too large ones among them.
_ODD = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, CheckpointError)


class _Checked:
    """Whatever does not read as a plan is a damaged plan."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, CheckpointError) and error.where == self._where:  # said already
            return
        if isinstance(error, OSError):
            what = f"the system could not read: {error.strerror}"
            raise UnreadableError("unreadable-file", what, where=self._where, hint=advice(error)) from error
        if isinstance(error, _ODD):
            raise CheckpointError(
                "damaged-plan",
                "the file is not a valid plan: it is cut off or was edited",
                where=self._where,
                found=error.what if isinstance(error, CheckpointError) else str(error),
                hint="make the plan again: shardmerge plan MAPPING --out PLAN",
            ) from error


def _stamp(row: list[object], moved: Callable[[str], str]) -> FileStamp:
    path, size, mtime_ns, header, *place = row
    header_at, header_nbytes = map(natural, place)
    return FileStamp(moved(text(path)), natural(size), whole(mtime_ns), text(header), header_at, header_nbytes)


def moved_by(roots: Sequence[tuple[str, str]]) -> Callable[[str], str]:
    """Returns what gives the place where a file is now: under another root, the longest that fits."""

    def moved(path: str) -> str:
        fitting = [(old, new) for old, new in roots if path == old or path.startswith(f"{old.rstrip('/')}/")]
        old, new = max(fitting, key=lambda pair: len(pair[0]), default=("", ""))
        return new.rstrip("/") + path[len(old.rstrip("/")) :] if old else path

    return moved
