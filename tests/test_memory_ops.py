"""The memory law of merges, on real processes: measured peak <= planned peak <= 256 MiB, the default budget.

The widths of an 8B model, one layer of it: what a worker holds depends on a tensor's width, not on how many there are.
``benchmarks/memory_8b.py`` measures all 32 layers. The values are holes where nobody looks at them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness import Measured, answer, measure
from tests.test_memory import CGROUP_LIMIT, DRIVER, MIB, _make_group

merges = pytest.importorskip("benchmarks.merges", reason="torch is needed for the synthetic checkpoints")
synthetic = pytest.importorskip("benchmarks.synthetic", reason="torch is needed for the synthetic checkpoints")

BUDGET = 256 * MIB


def merged(
    mapping: Path, out: Path, *options: str, group: str = "", threads: str = "", kernel: str = ""
) -> tuple[Measured, int]:
    """Runs a mapping in a process of its own and returns it with its planned peak; the output stays."""
    wanted = {"OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": kernel}
    env = {name: value for name, value in wanted.items() if value}
    command = [sys.executable, "-c", DRIVER, "run", mapping, "--out", out, "--json", "--no-sync", *options]
    done = measure(command, group=group, env=env)
    planned = answer(done)["planned_peak"]
    assert isinstance(planned, int)
    return done, planned


@pytest.fixture
def group() -> Iterator[str]:
    """A control group that kills what needs more than 128 MiB, page cache included."""
    folder = _make_group()
    yield str(folder / "cgroup.procs")
    folder.rmdir()


@pytest.fixture(scope="module")
def wide_lora(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A LoRA with r = 512 and its base: the widest layer and the widest vocabulary of an 8B model."""
    folder = tmp_path_factory.mktemp("lora")
    shape = replace(synthetic.LLAMA_3_8B, layers=1)
    yield merges.write_lora(folder, shape, 512, modules=("q_proj", "down_proj"))
    shutil.rmtree(folder)


def test_a_wide_lora_keeps_the_law(wide_lora: Path, tmp_path: Path) -> None:
    done, planned = merged(wide_lora, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    print(f"LoRA: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned, {done.wall:.1f} s")
    assert done.peak <= planned <= BUDGET


def test_a_wide_lora_runs_inside_a_cgroup_of_128_mib(wide_lora: Path, group: str, tmp_path: Path) -> None:
    """One worker then: A of the widest layer has 28 MiB."""
    done, planned = merged(wide_lora, tmp_path / "out", group=group)
    shutil.rmtree(tmp_path / "out")
    assert done.peak <= planned <= CGROUP_LIMIT


def test_ties_of_three_models_keeps_the_law(tmp_path: Path) -> None:
    mapping = merges.write_ties(tmp_path / "in", replace(synthetic.LLAMA_3_8B, layers=1, intermediate=3584, vocab=1024))
    done, planned = merged(mapping, tmp_path / "out")
    shutil.rmtree(tmp_path / "in")
    shutil.rmtree(tmp_path / "out")
    print(f"TIES: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned, {done.wall:.1f} s")
    assert done.peak <= planned <= BUDGET


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With values, so that sums in another order show."""
    shape = synthetic.LlamaShape(1024, 1, 8, 4, 2816, 1024)
    return merges.write_lora(tmp_path_factory.mktemp("small"), shape, 96, fill=True)


@pytest.fixture(scope="module")
def expected(small_lora: Path) -> str:
    """The digest of what the defaults write."""
    merged(small_lora, small_lora.parent / "reference")
    return digest(small_lora.parent / "reference")


def digest(out: Path) -> str:
    """Returns the SHA-256 of the one shard of a result."""
    (shard,) = out.glob("*.safetensors")
    return hashlib.sha256(shard.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("workers", "budget", "threads", "kernel"),
    [(1, 72, "1", "Nehalem"), (1, 256, "2", ""), (2, 96, "2", "Prescott"), (4, 256, "1", ""), (4, 120, "8", "")],
)
def test_the_law_and_the_bytes(
    workers: int, budget: int, threads: str, kernel: str, small_lora: Path, expected: str, tmp_path: Path
) -> None:
    """Neither workers, nor budget, nor the threads of the BLAS, nor its kernels for other processors change a bit."""
    options = ("--workers", str(workers), "--max-memory", f"{budget}MiB")
    done, planned = merged(small_lora, tmp_path / "out", *options, threads=threads, kernel=kernel)
    print(f"{workers} workers: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned")
    assert done.peak <= planned <= budget * MIB
    assert digest(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mapping that transposes matrices as wide as an 8B model's, some of them cast."""
    folder = tmp_path_factory.mktemp("tall")
    shapes = {"down": (14336, 4096), "up": (4096, 14336), "q": (4096, 4096), "o": (4096, 4096)}
    synthetic.write_safetensors(folder / "half.safetensors", shapes)
    synthetic.write_safetensors(folder / "full.safetensors", {"w": (4096, 4096), "v": (8192, 2048)}, "F32")
    (folder / "mapping.yaml").write_text(
        """\
shardmerge: 1
sources: {half: half.safetensors, full: full.safetensors}
output: {path: out, dtype: bfloat16}
tensors:
  "half.{name}": {op: transpose, of: "half:{name}"}
  "full.{name}": {op: transpose, of: "full:{name}"}
""",
        "utf-8",
    )
    yield folder / "mapping.yaml"
    shutil.rmtree(folder)


@pytest.mark.parametrize("workers", ["1", "2", "4"])
def test_transposed_matrices_keep_the_law(workers: str, tall: Path, tmp_path: Path) -> None:
    done, planned = merged(tall, tmp_path / "out", "--workers", workers)
    shutil.rmtree(tmp_path / "out")
    print(f"transposed, {workers} workers: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned, {done.wall:.1f} s")
    assert done.peak <= planned <= BUDGET


def test_transposed_matrices_fit_a_cgroup_of_128_mib(tall: Path, group: str, tmp_path: Path) -> None:
    done, planned = merged(tall, tmp_path / "out", group=group)
    shutil.rmtree(tmp_path / "out")
    print(f"transposed in 128 MiB: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned, {done.wall:.1f} s")
    assert done.peak <= planned <= CGROUP_LIMIT


# Copies and casts matrices cut into so many columns, as a reader of torch's DCP would plan it; prints the planned peak.
BOXES = """
import json, sys
from dataclasses import replace
from pathlib import Path
import shardmerge as sm
from shardmerge import api
from shardmerge.compose import cast_to
from shardmerge.dtypes import DTYPES
from shardmerge.tensors import Box, Extent, TensorEntry
from shardmerge.tensors.boxes import boxed

mapping, parts, workers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
source = str(mapping.with_name("full.safetensors"))  # holes, as long as any box

def cut(entry):
    rows, columns = entry.shape
    width = columns // parts
    boxes = [Box((0, width * n), (rows, width), Extent(source, 4096, 4 * rows * width)) for n in range(parts)]
    held = TensorEntry("w", DTYPES["F32"], entry.shape, boxed(DTYPES["F32"], entry.shape, boxes))
    return cast_to(held, entry.dtype)

plan = sm.plan(mapping)
shards = tuple(
    replace(shard, tensors=tuple(replace(tensor, entry=cut(tensor.entry)) for tensor in shard.tensors))
    for shard in plan.shards
)
options = api.Options(memory=256 << 20, workers=workers, sync=False)
prepared = api.Prepared.of(replace(plan, shards=shards), mapping.with_name("out"), options)
api.carry_out(prepared, prepared.out, options)
print(json.dumps({"planned_peak": prepared.how.peak, "workers": prepared.how.workers}))
"""


@pytest.mark.parametrize(("parts", "workers"), [(8, 4), (1024, 1), (1024, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_boxes_keep_the_law(parts: int, workers: int, dtype: str, tmp_path: Path) -> None:
    """Matrices of 4,096 columns, 64 MiB each, copied and cast: a worker each, and bands where the boxes are narrow."""
    synthetic.write_safetensors(tmp_path / "full.safetensors", dict.fromkeys("abcd", (4096, 4096)), "F32")
    (tmp_path / "m.yaml").write_text(
        "shardmerge: 1\nsources: {full: full.safetensors}\n"
        f'output: {{path: out, dtype: {dtype}}}\ntensors: {{"{{n}}": "full:{{n}}"}}\n',
        "utf-8",
    )
    done = measure([sys.executable, "-c", BOXES, tmp_path / "m.yaml", str(parts), str(workers)])
    assert done.code == 0, done.stderr
    found = answer(done)
    planned = found["planned_peak"]
    assert isinstance(planned, int)
    print(f"{parts} boxes, {dtype}, {workers} workers: {done.peak / MIB:.1f} MiB of {planned / MIB:.1f} planned")
    assert found["workers"] == workers
    assert done.peak <= planned <= BUDGET
