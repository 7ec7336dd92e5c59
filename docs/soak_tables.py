"""Tables of docs/reliability.md: sources that change, races, results made again, damage to what a stopped run left."""

from __future__ import annotations

from collections import Counter

from docs.markdown import table
from docs.soak_results import measured, read

# What may become of a run that goes on with a damaged file.
OUTCOMES = ("right result", "refused", "published, verify names the file")


def source_changes() -> list[str]:
    """Returns the lines of the table: by source, file and change, what became of the runs."""
    result = read("source-changes")
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for row in result["rows"]:
        found = rows.setdefault((row["source"], _kind_of(row["file"]), row["kind"]), Counter())
        for outcome, count in row["outcomes"].items():
            found[_outcome(outcome)] += count
        found["wrong"] += len(row["wrong"])
    heads = ("source-changed", "another error", "as before", "as it is now", "wrong")
    lines = [(*key, f"{found.total():,}", *(f"{found[head]:,}" for head in heads)) for key, found in rows.items()]
    said = f"{measured(result, 'source_changes')}: {len(result['rows'])} of {result['groups']} groups of 50 moments."
    return [said, "", *table(("source", "file", "change", "runs", *heads), lines)]


def _kind_of(file: str) -> str:
    return file if file.endswith(".json") else "weights"


def _outcome(text: str) -> str:
    head, _, code = text.partition(": ")
    return head if not code else code if code == "source-changed" else "another error"


def races() -> list[str]:
    """Returns the lines of the table: how many races, of how many processes."""
    result = read("races")
    heads = ("played", "processes", "killed", "refused")
    lines = [
        (name, *(f"{row[head]:,}" for head in heads), str(len(row["wrong"]))) for name, row in result["plays"].items()
    ]
    return [f"{measured(result, 'races')}.", "", *table(("", "races", *heads[1:], "wrong"), lines)]


def same_bytes() -> list[str]:
    """Returns the lines of the table: how often each format was made, and in how many runs each way was used."""
    result = read("same-bytes")
    ways = sorted({way for row in result["formats"].values() for way in row["ways"]})
    lines = [
        (form, str(row["runs"]), *(str(row["ways"].get(way, 0)) for way in ways), str(len(row["different"])))
        for form, row in result["formats"].items()
    ]
    return [f"{measured(result, 'same_bytes')}.", "", *table(("format", "runs", *ways, "different"), lines)]


def interrupts() -> list[str]:
    """Returns the lines of the table: by source, how many steps its conversion has, and what became of the calls."""
    result = read("interrupts")
    heads = ("nothing published", "published", "durability-unconfirmed")
    lines = [
        (
            row["source"],
            f"{row['steps']:,}",
            f"{sum(row['outcomes'].values()):,}",
            *(f"{row['outcomes'].get(head, 0):,}" for head in heads),
            str(len(row["wrong"])),
        )
        for row in result["rows"]
    ]
    head = ("source", "steps", "interrupted", *heads[:2], "published, not confirmed", "wrong")
    return [f"{measured(result, 'interrupts')}.", "", *table(head, lines)]


def part_flips() -> list[str]:
    """Returns the lines of the table: by file and whether all of it was compared, what became of the command."""
    result = read("part-flips")
    rows: dict[tuple[str, str, str], Counter[str]] = {}
    for row in result["rows"]:
        key = row["format"], row["file"], "yes" if row["recheck"] else "no"
        rows.setdefault(key, Counter())[row["outcome"] if row["outcome"] in OUTCOMES else "wrong"] += row["count"]
    lines = [
        (*key, f"{found.total():,}", *(f"{found[one]:,}" for one in (*OUTCOMES, "wrong")))
        for key, found in sorted(rows.items())
    ]
    head = ("format", "file", "`--recheck`", "bits flipped", *OUTCOMES, "wrong")
    return [f"{measured(result, 'part_flips')}.", "", *table(head, lines)]
