"""A plan as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardmerge.json_rows import JSON_SCHEMA, Fields, Rows
from shardmerge.plan.clones import Moved, moved
from shardmerge.plan.shard import PlannedShard, PlannedTensor, bytes_read, tensor_json
from shardmerge.plan.value import Plan
from shardmerge.tensors import TensorEntry, composed, leaves

if TYPE_CHECKING:
    from shardmerge.plan.schedule import Schedule


def human_bytes(count: int) -> str:
    """Returns bytes in decimal units, as disks and the ecosystem count them: ``16.71 GB``."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


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
    """Returns the plan for people: where every part of the model comes from, what it costs, what is left out.

    Parameters
    ----------
    plan, how, out
        What is planned, how it is carried out, and the output path as text.
    cloned
        Bytes that are not copied, since the file system shares them.
    """
    blocks = [
        _headline(plan, out),
        _sources(plan),
        "\n".join(f"warning: {warning}" for warning in plan.warnings),
        "\n".join(f"checked: {check}" for check in plan.checks),
        _groups_table(plan),
        _files(plan),
        _unused(plan),
        _cost(plan, how, cloned),
    ]
    return "\n\n".join(block for block in blocks if block)


def tensor_lines(plan: Plan) -> Iterable[str]:
    """Yields one line a tensor: its name, type, shape, and the whole way it takes."""
    for tensor in plan.tensors():
        yield f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}  <- {_way(tensor.entry)}  [{tensor.rule}]"


@dataclass(slots=True)
class _Group:
    """Tensors that share a component, a source and a way."""

    count: int = 0
    nbytes: int = 0


def _headline(plan: Plan, out: str) -> str:
    count = sum(1 for _ in plan.tensors())
    shards = f"{len(plan.shards)} file" + ("s" if len(plan.shards) > 1 else "")
    return f"{plan.target} -> {out}\n{count} tensors, {human_bytes(plan.tensor_bytes)} in {shards}"


def _sources(plan: Plan) -> str:
    rows = [("source", "format", "path")]
    rows += [(source.name, source.kind, source.path) for source in plan.sources]
    notes = [f"note: {source.name}: {note}" for source in plan.sources for note in source.notes]
    return "\n".join([*_table(rows), *notes])


def _groups_table(plan: Plan) -> str:
    groups: dict[tuple[str, str, str], _Group] = {}
    for tensor in plan.tensors():
        group = groups.setdefault(_group_key(tensor), _Group())
        group.count += 1
        group.nbytes += tensor.nbytes
    rows = [("target", "tensors", "bytes", "from", "how")]
    for (component, source, way), group in sorted(groups.items()):
        rows.append((component, str(group.count), human_bytes(group.nbytes), source, way))
    return "\n".join(_table(rows))


def _group_key(tensor: PlannedTensor) -> tuple[str, str, str]:
    head, dot, _ = tensor.name.partition(".")
    component = f"{head}.*" if dot else tensor.name
    sources = dict.fromkeys(f"{leaf.source} ({leaf.origin})" for leaf in leaves(tensor.entry))
    ways = dict.fromkeys(_ops(tensor.entry))
    return component, " + ".join(sources), " + ".join(ways) or "copy"


def _ops(entry: TensorEntry) -> Iterator[str]:
    """Yields the ops of an expression, the first one applied first."""
    held = composed(entry)
    if held is not None:
        for base in held.bases:
            yield from _ops(base)
        yield held.recipe.way


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


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
