"""What was promised before it was built, beside what the results say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from benchmarks.reading import DURABLE, QUICK, Result, contender, floor_of, ratio

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class OverFloor:
    """Seconds over those of the floor with the same guarantee, at most ``bar``."""

    bar: float
    synced: bool

    @property
    def words(self) -> str:
        """What is asked."""
        return f"at most {self.bar:g} x the " + ("synced floor, durable" if self.synced else "floor, --no-sync")

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        mine = contender(result, DURABLE if self.synced else QUICK)
        found = ratio(mine, floor_of(result, synced=self.synced))["median"] if mine else 0.0
        return f"{found:.2f} x", 0 < found <= self.bar


@dataclass(frozen=True, slots=True)
class Against:
    """Seconds or bytes of a peer over ours without sync, at least ``bar``."""

    peer: str
    figure: str
    bar: float

    @property
    def words(self) -> str:
        """What is asked."""
        if self.figure == "wall":
            return f"at least {self.bar:g} x faster than {self.peer}, --no-sync"
        return f"at most 1/{self.bar:g} of the memory of {self.peer}"

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        mine, theirs = contender(result, QUICK), contender(result, self.peer)
        if not (mine and theirs):
            return "not measured", False
        found = ratio(theirs, mine, self.figure)["median"]
        return (f"{found:.1f} x" if self.figure == "wall" else f"1/{found:.0f}"), found >= self.bar


@dataclass(frozen=True, slots=True)
class Resident:
    """Most resident MiB of the whole process, both guarantees, every run."""

    bar: int

    @property
    def words(self) -> str:
        """What is asked."""
        return f"at most {self.bar} MiB resident"

    def measured(self, result: Result) -> tuple[str, bool]:
        """Returns the figure and whether it reaches the bar."""
        found = (contender(result, key) for key in (DURABLE, QUICK))
        most = max(float(entry["peak"]["max"]) for entry in found if entry) / _MIB
        return f"{most:.1f} MiB", most <= self.bar


Goal = OverFloor | Against | Resident
# Words, figure, whether it reaches the bar.
Found = tuple[str, str, bool]

_BESIDE_DEEPSPEED = (
    Against("zero_to_fp32", "wall", 6),
    Against("zero_to_fp32-cast", "wall", 8),
    Against("zero_to_torch", "wall", 5),
    Against("zero_to_torch", "peak", 50),
)
# The bars beside DeepSpeed are for 0.5 to 1 billion parameters: 2 GiB of fp32 hold 0.54.
GOALS: dict[str, tuple[Goal, ...]] = {
    "zero2-2g": (*_BESIDE_DEEPSPEED, OverFloor(1.15, synced=True), OverFloor(1.15, synced=False), Resident(64)),
    "zero2-4g": (OverFloor(1.15, synced=True), OverFloor(1.15, synced=False), Resident(64)),
    "zero3-1g": (OverFloor(1.3, synced=True), OverFloor(1.3, synced=False)),
    "zero3-4g": (OverFloor(1.3, synced=True), OverFloor(1.3, synced=False), Resident(64)),
    "fsdp2-1g": (
        Against("dcp_to_torch", "wall", 5),
        Against("dcp_to_torch", "peak", 20),
        OverFloor(1.3, synced=True),
        OverFloor(1.3, synced=False),
        Resident(64),
    ),
    "ranks-1g": (
        Against("verl", "wall", 5),
        Against("verl", "peak", 20),
        OverFloor(1.3, synced=True),
        OverFloor(1.3, synced=False),
        Resident(64),
    ),
    "rename-1g": (OverFloor(1.05, synced=True), OverFloor(1.05, synced=False), Resident(64)),
    "hf-reshard-1g": (Resident(64),),
}


def rows(results: Mapping[str, Result]) -> Iterator[list[str]]:
    """Yields case, bar, figure and verdict; nothing for cases whose floor was another one (schema 1)."""
    for case, goals in GOALS.items():
        result = results.get(case)
        if result is None or contender(result, "floor") is None:
            continue
        for goal in goals:
            yield _row(case, goal.words, *goal.measured(result))
    for stem, rows_of in _OTHERS.items():
        if stem in results:
            yield from _other_rows(stem, rows_of, results[stem])


def _other_rows(stem: str, rows_of: Callable[[Result], Iterator[Found]], result: Result) -> list[list[str]]:
    """Nothing where a file of that name has another shape: it shows tables of its own then."""
    try:
        return [_row(stem, *found) for found in rows_of(result)]
    except KeyError:
        return []


def _row(case: str, words: str, figure: str, reached: bool) -> list[str]:
    return [f"`{case}`", words, figure, "reached" if reached else "**not reached**"]


# ---- results of other shapes


def _cloned(result: Result) -> Iterator[Found]:
    for key, floor in (
        ("shardmerge", "cp --reflink=never and sync"),
        ("shardmerge-no-sync", "the cp alone, --no-sync"),
    ):
        over = result["wall_ratios"][key]["median"]
        yield f"at most 5 % of the time of {floor}", f"{100 * over:.1f} %", over <= 0.05
    seconds = result["contenders"]["shardmerge-no-sync"]["clone_seconds"]["median"]
    space = result["new_space_share"]["shardmerge-no-sync"]
    yield "cloning itself under 0.1 s", f"{seconds:.4f} s", seconds < 0.1
    yield "at most 1 % new space", f"{100 * space:.2f} %", space <= 0.01


def _copied(result: Result) -> Iterator[Found]:
    for key, floor in (("shardmerge", "cp and sync"), ("shardmerge-no-sync", "cp, --no-sync")):
        over = result["wall_ratios"][key]["median"]
        yield f"at most 1.05 x {floor}", f"{over:.2f} x", over <= 1.05


def _flat(result: Result) -> Iterator[Found]:
    runs = result["runs_of_sizes"]
    peaks = [run["peak"] / _MIB for run in runs]
    by_job = [[run["peak"] / _MIB for run in runs if run["job"] == job] for job in {run["job"] for run in runs}]
    spread = max(max(found) - min(found) for found in by_job)
    limited = [run for run in runs if run["limit"]]
    sizes = f"{min(run['gib'] for run in runs):g} to {max(run['gib'] for run in runs):g} GiB"
    yield f"at most 64 MiB resident, {sizes}", f"{max(peaks):.1f} MiB", max(peaks) <= 64
    yield f"flat, {sizes}: copies and casts each within 8 MiB", f"{spread:.1f} MiB", spread <= 8
    yield (
        "all of it in a memory group of 128 MiB",
        f"{len(limited)} runs of {len(runs) // 2}",
        2 * len(limited) == len(runs),
    )


def _planned(result: Result) -> Iterator[Found]:
    for key, run in result["runs"].items():
        wall, peak = run["plan"]["wall"], run["plan"]["peak"] / _MIB
        seconds = 1 if "8b" in key else 60
        words = f"{run['about']}: planned within {seconds} s and 300 MiB"
        yield words, f"{wall:.2f} s, {peak:.0f} MiB", wall <= seconds and peak <= 300


def _cast(result: Result) -> Iterator[Found]:
    found = [row["ratio"]["median"] for row in result["rows"]]
    as_fast = sum(ratio >= 1 for ratio in found)
    yield "every cast at torch's speed or above", f"{as_fast} of {len(found)}", as_fast == len(found)


def _whole(result: Result) -> Iterator[Found]:
    first, *others = result["runs_of_8b"]
    peak = max(run["peak"] for run in (first, *others) if "planned_peak" in run) / _MIB
    over = first["wall"] / others[-1]["wall"]
    yield "a whole 8B, at most 1.15 x the synced floor", f"{over:.2f} x", over <= 1.15
    yield "at most 64 MiB resident", f"{peak:.1f} MiB", peak <= 64


def _lora(result: Result) -> Iterator[Found]:
    over = result["over_product"]["1"]["median"]
    yield "LoRA by one worker, at most 2 x its product in float64", f"{over:.2f} x", over <= 2
    if "16" in result["speedups"]:
        faster = result["speedups"]["16"]["median"]
        yield "by 16 workers at least 6 x faster", f"{faster:.1f} x", faster >= 6


_OTHERS: dict[str, Callable[[Result], Iterator[Found]]] = {
    "clone-xfs": _cloned,
    "clone-btrfs": _cloned,
    "clone-here": _copied,
    "casts": _cast,
    "planning": _planned,
    "sizes": _flat,
    "full-8b": _whole,
    "lora": _lora,
}
