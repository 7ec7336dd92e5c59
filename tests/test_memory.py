"""The memory law, on real processes: measured peak <= planned peak <= budget, and the same bytes whatever is allowed.

The checkpoints are holes where nobody looks at values, so 4 GiB cost no disk; what is written is real.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness import Measured, answer, measure
from tests.conftest import GOLDEN
from tests.terminal import in_terminal, plain

synthetic = pytest.importorskip("benchmarks.synthetic", reason="torch writes the checkpoints")

MIB = 1 << 20
GIB = 1 << 30
CGROUP_LIMIT = 128 * MIB

# Runs the command line as `python -m shardmerge` does, and fails if a heavy library came in on the way.
DRIVER = """
import sys
from shardmerge.cli.main import main
try:
    main()
except SystemExit as done:
    heavy = {"torch", "transformers", "deepspeed", "tensorflow", "jax"} & sys.modules.keys()
    sys.exit(f"imported: {heavy}" if heavy else done.code)
"""


def convert(source: Path, out: Path, *options: str, group: str = "", code: int = 0) -> Measured:
    """Converts to bf16 in a process of its own."""
    command = [sys.executable, "-c", DRIVER, "convert", source, out, "--dtype", "bfloat16", "--json", *options]
    done = measure(command, group=group)
    assert done.code == code, f"exit {done.code}\n{done.stdout}\n{done.stderr}"
    return done


def converted(source: Path, out: Path, *options: str, group: str = "") -> tuple[Measured, int, int]:
    """Converts, removes the result, and returns the process, its planned peak and the bytes of tensors written."""
    done = convert(source, out, *options, group=group)
    found = answer(done)
    size, planned = found["total_size"], found["planned_peak"]
    assert isinstance(size, int)
    assert isinstance(planned, int)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    assert size <= written < size + MIB
    return done, planned, size


def zero2(folder: Path, nbytes: int, *, fill: bool = False) -> Path:
    """A ZeRO-2 checkpoint of two ranks and about so many bytes of fp32 weights."""
    return synthetic.write_zero(folder, synthetic.llama_of(nbytes).tensors(), stage=2, world=2, fill=fill)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that does not stay behind: pytest keeps the last three, which would be gigabytes."""
    folder = tmp_path_factory.mktemp("memory")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def one(scratch: Path) -> Path:
    """1 GiB of weights."""
    return zero2(scratch / "one", GIB)


@pytest.fixture(scope="module")
def four(scratch: Path) -> Path:
    """4 GiB of weights."""
    return zero2(scratch / "four", 4 * GIB)


# ---- the figure does not grow with the checkpoint


def test_memory_does_not_depend_on_the_size_of_the_checkpoint(one: Path, four: Path, scratch: Path) -> None:
    small, small_planned, small_size = converted(one, scratch / "out")
    large, large_planned, large_size = converted(four, scratch / "out")
    print(f"1 GiB: {small.peak / MIB:.1f} MiB of {small_planned / MIB:.1f} planned, {small.wall:.1f} s")
    print(f"4 GiB: {large.peak / MIB:.1f} MiB of {large_planned / MIB:.1f} planned, {large.wall:.1f} s")
    assert large_size > 3.9 * small_size > 3.9 * 0.49 * GIB
    assert small.peak <= min(small_planned, 96 * MIB)
    assert large.peak <= min(large_planned, 96 * MIB)
    assert abs(large.peak - small.peak) <= 8 * MIB


# ---- a real limit


@pytest.fixture
def group() -> Iterator[str]:
    """The ``cgroup.procs`` of a fresh control group that kills what needs more than 128 MiB, page cache included."""
    folder = _make_group()
    yield str(folder / "cgroup.procs")
    folder.rmdir()


def _make_group() -> Path:
    """Makes the group below our own, so that our own limits go on holding; skips where nobody lets us."""
    reasons = []
    for parent, limit in _parents():
        folder = parent / f"shardmerge-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            (folder / limit).write_text(str(CGROUP_LIMIT))
        except OSError as error:
            folder.rmdir()
            reasons.append(f"{folder / limit}: {error.strerror}")
            continue
        return folder
    pytest.skip("NO MEMORY CGROUP CAN BE MADE HERE, the limit of 128 MiB is not tested: " + "; ".join(reasons))


def _parents() -> Iterator[tuple[Path, str]]:
    """Yields where a group may be made, and the name of its limit: v1, v2 below ours, v2 beside ours."""
    for line in Path("/proc/self/cgroup").read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif not controllers:
            own = Path("/sys/fs/cgroup") / path.lstrip("/")
            yield own, "memory.max"
            # v2 gives controllers to children only where no process stands in the parent itself.
            if path != "/":
                yield own.parent, "memory.max"


@pytest.mark.parametrize("size", ["one", "four"])
def test_runs_inside_a_cgroup_of_128_mib(size: str, group: str, scratch: Path, request: pytest.FixtureRequest) -> None:
    source: Path = request.getfixturevalue(size)
    done, planned, _ = converted(source, scratch / "out", group=group)
    print(f"{size} in 128 MiB: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned, {done.wall:.1f} s")
    assert done.peak <= planned <= CGROUP_LIMIT


def test_the_page_cache_stays_within_the_cgroup(group: str, one: Path, scratch: Path) -> None:
    """The kernel would fill the group to its limit with pages of the files; we let them go behind the cursor."""
    counters = [Path(group).parent / name for name in ("memory.max_usage_in_bytes", "memory.failcnt")]
    if not counters[0].is_file():
        pytest.skip("cgroup v1 alone counts how often a limit was hit")
    for attempt in range(
        3
    ):  # other tests may keep the disk from taking the pages in time; without letting go it is never
        for counter in counters:
            counter.write_text("0")
        converted(one, scratch / f"out{attempt}", group=group)
        most, hits = (int(counter.read_text()) for counter in counters)
        print(f"1 GiB in 128 MiB: the group held {most / MIB:.0f} MiB at most, and hit its limit {hits} times")
        if not hits:
            break
    assert most < CGROUP_LIMIT
    assert hits == 0


def test_digests_are_taken_inside_a_cgroup(group: str, filled: Path, expected: str, scratch: Path) -> None:
    done = convert(filled, scratch / "digested", "--sha256", group=group)
    planned = answer(done)["planned_peak"]
    assert isinstance(planned, int)
    print(f"with digests: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned")
    assert done.peak <= planned <= CGROUP_LIMIT
    assert digest(scratch / "digested") == expected


def test_the_cgroup_does_kill(group: str) -> None:
    """What the tests above stand on: the limit is a real one."""
    hungry = f"print(len(bytearray(b'x') * {2 * CGROUP_LIMIT}))"
    assert measure([sys.executable, "-c", hungry], group=group).code < 0


# ---- the law for other budgets, and the same bytes from all of them


@pytest.fixture(scope="module")
def filled(scratch: Path) -> Path:
    """A small checkpoint with values, so that bytes in the wrong place show."""
    return zero2(scratch / "filled", GIB // 8, fill=True)


@pytest.fixture(scope="module")
def expected(filled: Path, scratch: Path) -> str:
    """The digest of what the defaults write."""
    convert(filled, scratch / "reference")
    return digest(scratch / "reference")


def digest(out: Path) -> str:
    """Returns the SHA-256 of the one shard of a result."""
    (shard,) = out.glob("*.safetensors")
    return hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize("io", ["mmap", "pread"])
@pytest.mark.parametrize(("workers", "budget"), [(1, 56), (1, 64), (1, 256), (2, 60), (4, 60), (4, 72), (4, 256)])
def test_the_law_and_the_bytes(workers: int, budget: int, io: str, filled: Path, expected: str, tmp_path: Path) -> None:
    budget += 12 if io == "mmap" else 0  # a map is read by a process of its own
    options = ("--workers", str(workers), "--max-memory", f"{budget}MiB", "--io", io, "--no-sync")
    done = convert(filled, tmp_path / "out", *options)
    planned = answer(done)["planned_peak"]
    assert isinstance(planned, int)
    assert done.peak <= planned <= budget * MIB
    assert digest(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("workers", "io", "dtype"),
    [(2, "mmap", "float32"), (2, "pread", "bfloat16"), (4, "mmap", "bfloat16"), (4, "pread", "float32")],
)
def test_the_law_with_as_many_tiles_in_flight_as_there_can_be(
    workers: int, io: str, dtype: str, one: Path, scratch: Path
) -> None:
    """Large enough that all workers hold their tiles at once; float32 is a copy, bfloat16 a cast."""
    options = ("--workers", str(workers), "--io", io, "--dtype", dtype, "--no-sync")
    done, planned, _ = converted(one, scratch / "out", *options)
    print(f"{workers} workers, {io}, {dtype}: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned")
    assert done.peak <= planned


@pytest.mark.parametrize("options", [("--format", "dcp"), ("--format", "zero-universal", "--dtype", "float32")])
def test_the_law_for_checkpoints_that_training_goes_on_from(
    options: tuple[str, ...], filled: Path, tmp_path: Path
) -> None:
    done = convert(filled, tmp_path / "out", *options, "--no-sync")
    planned = answer(done)["planned_peak"]
    assert isinstance(planned, int)
    assert done.peak <= planned
    shutil.rmtree(tmp_path / "out")


def test_the_law_for_the_mapping_that_loads_most_modules(tmp_path: Path) -> None:
    """In a terminal, whose bar takes memory too. Its tensors are tiny, so all of it is what is not a tile."""
    mapping = (GOLDEN.parent.parent / "docs" / "examples" / "demo.yaml").read_text("utf-8")
    (tmp_path / "m.yaml").write_text(mapping.replace("../../tests/golden", str(GOLDEN)), "utf-8")
    shown = plain(in_terminal("run", tmp_path / "m.yaml", "--out", tmp_path / "out"))
    planned, peak = (re.search(rf"{words} (\d+) MiB", shown) for words in ("planned peak", "peak memory"))
    assert planned is not None
    assert peak is not None
    assert int(peak[1]) <= int(planned[1]) - 8  # two workers' tiles, which are not used here


@pytest.mark.parametrize("budget", ["1MiB", "40MiB"])
def test_a_budget_that_cannot_be_kept_is_refused(budget: str, filled: Path, tmp_path: Path) -> None:
    done = convert(filled, tmp_path / "out", "--max-memory", budget, code=4)
    assert "memory-budget" in done.stderr
    assert "bytes needed" in done.stderr
    assert list(tmp_path.iterdir()) == []
