"""A plan as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from shardmerge.errors import plain
from shardmerge.json_rows import JSON_SCHEMA, Fields, Rows
from shardmerge.plan.clones import Moved, moved
from shardmerge.plan.origins import origins_table
from shardmerge.plan.shard import PlannedShard, bytes_read, tensor_json
from shardmerge.plan.tables import Block, TextTable, counted, human_bytes
from shardmerge.plan.value import Plan
from shardmerge.tensors import TensorEntry, composed

if TYPE_CHECKING:
    from shardmerge.plan.schedule import Schedule


def plan_json(plan: Plan, how: Schedule, cloned: int = 0) -> Fields:
    """Returns the plan as JSON for who wants to know: its id, what it makes of what, and what it costs.

    What others can carry out is its text: see ``plan.writing``.

    Parameters
    ----------
    plan, how
        What is planned, and how it would be carried out.
    cloned
        Bytes that are not copied, since the file system shares them.
    """
    return Fields(
        {
            "schema": JSON_SCHEMA,
            "id": plan.id,
            "plan": _contents(plan),
            "tensors": Rows(lambda: map(tensor_json, plan.tensors())),
            "sources": [
                {
                    "name": s.name,
                    "path": s.path,
                    "kind": s.kind,
                    "fingerprint": s.fingerprint,
                    "notes": list(s.notes),
                }
                for s in plan.sources
            ],
            "warnings": list(plan.warnings),
            "checks": list(plan.checks),
            "left_behind": dict(plan.left_behind),
            "cost": {
                "tensors": sum(1 for _ in plan.tensors()),
                "total_size": plan.tensor_bytes,
                "bytes_read": sum(bytes_read(tensor) for tensor in plan.tensors()) - cloned,
                "bytes_written": plan.file_bytes - cloned,
                **moved_json(moved(plan, cloned)),
                "planned_peak": how.peak,
                "workers": how.workers,
                "processes": how.processes,
            },
        }
    )


def _contents(plan: Plan) -> Fields:
    return Fields(
        {
            "target": plan.target,
            "shards": Rows(lambda: map(_shard_json, plan.shards)),
            "side_files": [{"name": side.name, "nbytes": side.nbytes} for side in plan.side_files],
            "unused": sorted([unused.source, unused.name, unused.reason] for unused in plan.unused),
        }
    )


def _shard_json(shard: PlannedShard) -> dict[str, object]:
    return {"name": shard.name, "nbytes": shard.nbytes, "tensors": [tensor.name for tensor in shard.tensors]}


def moved_json(how: Moved) -> dict[str, int]:
    """Returns how the bytes of the tensors come to the output."""
    return {"bytes_cloned": how.cloned, "bytes_copied": how.copied, "bytes_computed": how.computed}


def moved_text(how: Moved) -> str:
    """Returns how the bytes of the tensors come to the output: ``14.90 GB cloned, 0.60 GB copied``."""
    ways = ((how.cloned, "cloned"), (how.copied, "copied"), (how.computed, "computed"))
    return ", ".join(f"{human_bytes(nbytes)} {way}" for nbytes, way in ways if nbytes) or "no data"


def plan_text(plan: Plan, how: Schedule, out: str, cloned: int = 0) -> str:
    """Returns the plan for people as one text; parameters as ``plan_blocks``."""
    return "\n\n".join(map(str, plan_blocks(plan, how, out, cloned)))


def plan_blocks(plan: Plan, how: Schedule, out: str, cloned: int = 0) -> Iterator[Block]:
    """Returns the plan for people: where every part of the model comes from, what it costs, what is left out.

    Parameters
    ----------
    plan, how, out
        What is planned, how it is carried out, and the output path as text.
    cloned
        Bytes that are not copied, since the file system shares them.
    """
    blocks = _blocks(plan, how, out, cloned)
    return (block for block in blocks if block != "")


def _blocks(plan: Plan, how: Schedule, out: str, cloned: int) -> Iterator[Block]:
    yield _headline(plan, out)
    yield from _sources(plan)
    yield "\n".join(f"warning: {plain(warning)}" for warning in plan.warnings)
    yield "\n".join(f"checked: {check}" for check in plan.checks)
    yield origins_table(plan)
    yield _files(plan)
    yield _unused(plan)
    yield _cost(plan, how, cloned)


def tensor_lines(plan: Plan) -> Iterable[str]:
    """Yields one line a tensor: its name, type, shape, and the whole way it takes."""
    for tensor in plan.tensors():
        yield f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}  <- {_way(tensor.entry)}  [{tensor.rule}]"


def _headline(plan: Plan, out: str) -> str:
    count = sum(1 for _ in plan.tensors())
    shards = counted(len(plan.shards), "file")
    return f"{plan.target} -> {out}\n{counted(count, 'tensor')}, {human_bytes(plan.tensor_bytes)} in {shards}"


def _sources(plan: Plan) -> Iterator[Block]:
    yield TextTable(("source", "format", "path"), [(source.name, source.kind, source.path) for source in plan.sources])
    yield "\n".join(f"note: {source.name}: {plain(note)}" for source in plan.sources for note in source.notes)


def _way(entry: TensorEntry) -> str:
    held = composed(entry)
    if held is None:
        origin = f" ({entry.origin})" if entry.origin else ""
        return f"{entry.source}:{entry.name}{origin}" if entry.name else "empty"
    inner = ", ".join(_way(base) for base in held.bases)
    return f"{held.recipe.label} of {inner}" if len(held.bases) == 1 else f"{held.recipe.label} of [{inner}]"


# Small files that are named: a universal checkpoint has three a tensor.
_MOST_NAMED, _FIRST = 40, 8


def _files(plan: Plan) -> str:
    names = [shard.name for shard in plan.shards[:2]]
    if len(plan.shards) > 2:
        names.append(f"... {plan.shards[-1].name}")
    sides = [side.name for side in plan.side_files]
    names += sides if len(sides) <= _MOST_NAMED else [*sides[:_FIRST], f"... and {len(sides) - _FIRST} more"]
    text = "files: " + ", ".join(names)
    if not plan.left_behind:
        return text
    reasons: dict[str, list[str]] = {}
    for name, reason in plan.left_behind:
        reasons.setdefault(reason, []).append(name)
    lines = [f"  {', '.join(found)}: {reason}" for reason, found in reasons.items()]
    return "\n".join([text, "files left behind:", *lines])


def _unused(plan: Plan) -> str:
    counts: dict[tuple[str, str], list[str]] = {}
    for unused in plan.unused:
        counts.setdefault((unused.source, unused.reason.split(":")[0]), []).append(unused.name)
    lines = [
        f"  {len(names)} of {source}, {reason}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for (source, reason), names in sorted(counts.items())
    ]
    return "\n".join(["not used:", *lines]) if lines else ""


def _cost(plan: Plan, how: Schedule, cloned: int) -> str:
    read = sum(bytes_read(tensor) for tensor in plan.tensors()) - cloned
    written = plan.file_bytes - cloned
    within = f" in {how.processes} processes" if how.processes > 1 else ""
    return (
        f"reads {human_bytes(read)}, writes {human_bytes(written)}: {moved_text(moved(plan, cloned))}\n"
        f"peak memory at most {how.peak / 2**20:.0f} MiB with {how.workers} workers{within}\n"
        f"plan {plan.id[:16]}"
    )
