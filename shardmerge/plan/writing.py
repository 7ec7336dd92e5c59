"""A plan as text: JSON, a file of lines that a reader can begin with before the end.

The lines are those of one JSON document, so any tool reads it; each row of a table (files, rules, tensors) has a line
of its own, and the last line holds the SHA-256 of all before it. ``plan.reading`` is the way back.
"""

from __future__ import annotations

import hashlib
import json
from base64 import b64encode
from collections.abc import Iterable, Iterator

from shardmerge.plan.expressions import Tables, entry_row
from shardmerge.plan.identity import SCHEMA
from shardmerge.plan.json_values import Row
from shardmerge.plan.shard import PlannedShard, PlannedTensor
from shardmerge.plan.value import Plan, PlannedSource
from shardmerge.tensors import Extent, SideFile
from shardmerge.version import __version__

FORMAT = "shardmerge plan"
END = '"sha256": "'


def plan_lines(plan: Plan, out: str = "") -> Iterator[str]:
    """Yields a plan as lines of text, with the output path that it was made for, if there is one."""
    digest = hashlib.sha256()
    for line in _lines(plan, out):
        digest.update(line.encode())
        yield line
    yield f'{END}{digest.hexdigest()}"}}\n'


def _lines(plan: Plan, out: str) -> Iterator[str]:
    stamps = plan.files()
    tables = Tables(stamp.path for stamp in stamps)
    tables.collect(tensor.entry for tensor in plan.tensors())
    rules = {rule: number for number, rule in enumerate(dict.fromkeys(tensor.rule for tensor in plan.tensors()))}
    head = {"format": FORMAT, "schema": SCHEMA, "shardmerge": __version__, "plan": plan.id, "target": plan.target}
    yield f"{json.dumps({**head, 'out': out, 'parts': [shard.nbytes for shard in plan.shards]})[:-1]},\n"
    yield from _section("files", ([s.path, s.size, s.mtime_ns, s.header, s.header_at, s.header_nbytes] for s in stamps))
    yield from _section("ranks", tables.ranks)
    yield from _section("rules", rules)
    yield '"shards": [\n'
    for number, shard in enumerate(plan.shards):
        yield from _shard_lines(shard, tables, rules, last=number + 1 == len(plan.shards))
    yield "],\n"
    yield from _section("side_files", (_side_row(side, plan, tables) for side in plan.side_files))
    yield from _section("sources", (_source_row(source, tables) for source in plan.sources))
    yield from _section("side_sources", (tables.file(stamp.path) for stamp in plan.side_sources))
    yield from _section("unused", ([one.source, one.name, one.reason] for one in plan.unused))
    yield from _section("warnings", plan.warnings)
    yield from _section("checks", plan.checks)
    yield from _section("left_behind", plan.left_behind)


def _section(name: str, rows: Iterable[object]) -> Iterator[str]:
    yield f'"{name}": [\n'
    yield from _rows(rows)
    yield "],\n"


def _rows(rows: Iterable[object]) -> Iterator[str]:
    before = ""
    for row in rows:
        if before:
            yield f"{before},\n"
        before = json.dumps(row)
    if before:
        yield f"{before}\n"


def _shard_lines(shard: PlannedShard, tables: Tables, rules: dict[str, int], *, last: bool) -> Iterator[str]:
    blobs = [[offset, b64encode(blob).decode()] for offset, blob in shard.blobs]
    head = {"name": shard.name, "nbytes": shard.nbytes, "blobs": blobs, "checksums": shard.checksums, "tensors": []}
    yield f"{json.dumps(head, default=dict)[:-2]}\n"
    yield from _rows(_tensor_row(tensor, tables, rules) for tensor in shard.tensors)
    yield "]}\n" if last else "]},\n"


def _tensor_row(tensor: PlannedTensor, tables: Tables, rules: dict[str, int]) -> Row:
    stored = {"stored": tensor.stored} if tensor.stored != tensor.name else {}
    row = {"name": tensor.name, **stored, "offset": tensor.offset, "rule": rules[tensor.rule]}
    return row | {"made": entry_row(tensor.entry, tables)}


def _side_row(side: SideFile, plan: Plan, tables: Tables) -> Row:
    return {"name": side.name, "parts": [_side_part(part, plan, tables) for part in side.parts]}


def _side_part(part: bytes | Extent, plan: Plan, tables: Tables) -> Row:
    if isinstance(part, Extent):
        return {"copy": [tables.file(part.file), part.offset, part.nbytes], "sha256": plan.copies[part]}
    try:
        return {"text": part.decode()}
    except UnicodeDecodeError:
        return {"base64": b64encode(part).decode()}


def _source_row(source: PlannedSource, tables: Tables) -> Row:
    row = {"name": source.name, "path": source.path, "kind": source.kind, "fingerprint": source.fingerprint}
    return {**row, "files": [tables.file(stamp.path) for stamp in source.files], "notes": source.notes}
