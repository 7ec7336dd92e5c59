"""`--device cuda`: refused before anything is written where it cannot be, and the same bytes where it can."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.compose import cast_to
from shardmerge.dtypes import DTYPES
from shardmerge.execute.gather import Assembler
from shardmerge.execute.gpu import DeviceCasts, cast_plain, cuda_casts
from shardmerge.ops.arrays import numpy_dtype
from shardmerge.ops.casts import CASTABLE, Cast
from shardmerge.storage.reading import FilePool
from tests.conftest import shardmerge
from tests.test_casts import every_value

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PAIRS = [pair for pair in permutations(sorted(CASTABLE), 2) if "F64" not in pair]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    wild = torch.tensor([1e30, -70000.0, float("nan"), float("inf"), -0.0, 1e-30])
    save_file({"w": torch.randn(700, 1000), "wild": wild, "ids": torch.arange(5)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@no_gpu
@pytest.mark.parametrize("command", ["run", "convert"])
def test_without_a_gpu_nothing_is_written(command: str, source: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        f"shardmerge: 1\nsources: {{a: {source}}}\noutput: {{path: out}}\ntensors: {{'{{x...}}': 'a:{{x...}}'}}\n"
    )
    arguments = [mapping] if command == "run" else [source, tmp_path / "out"]
    done = shardmerge(command, *arguments, "--device", "cuda", "--dtype", "bf16", code=2)
    assert "[device-unavailable]" in done.stderr
    assert "hint: leave --device out" in done.stderr
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"in.safetensors", "m.yaml"}


def test_without_torch_it_says_what_to_install(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from shardmerge.cli.main import main\n"
        "sys.argv[0] = 'shardmerge'; main()"
    )
    command = [sys.executable, "-c", code, "convert", source, tmp_path / "out", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "[device-unavailable]" in done.stderr
    assert "pip install 'shardmerge[torch]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_the_device_is_trusted_with_has_the_bits_of_the_cpu(source: str, target: str) -> None:
    """The rule, on torch's CPU: every value that it calls plain, one at a time and all of them together."""
    op = Cast(DTYPES[source], DTYPES[target])
    values = every_value(op.source)
    expected = np.empty(values.size, numpy_dtype(op.target))
    op.apply(None, (values,), 0, expected)
    largest = torch.finfo(getattr(torch, op.target.torch)).max
    plain = np.abs(values.astype(np.float64)) <= largest
    there = torch.from_numpy(values[plain].view(np.uint8)).view(getattr(torch, op.source.torch))
    made, called_plain = cast_plain(torch, there, op)
    assert called_plain
    assert made.view(torch.uint8).numpy().tobytes() == expected[plain].tobytes()
    for index in np.flatnonzero(~plain)[:: max(1, np.count_nonzero(~plain) // 50)]:
        one = torch.from_numpy(values[index : index + 1].view(np.uint8)).view(getattr(torch, op.source.torch))
        assert not cast_plain(torch, one, op)[1]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_steps_of_a_device_make_the_bits_of_the_cpu(source: str, target: str) -> None:
    """On torch's CPU, by tiles: plain ones, and ones that hold what only the op itself makes right."""
    op, casts = Cast(DTYPES[source], DTYPES[target]), DeviceCasts(torch, "cpu")
    values = np.resize(every_value(op.source), 300_007)
    plain = values[np.abs(values.astype(np.float64)) <= torch.finfo(getattr(torch, op.target.torch)).max]
    for given in (values, plain, plain[:1], values[-3:].copy()):
        found, expected = (np.empty(given.size, numpy_dtype(op.target)) for _ in range(2))
        assert casts.apply(op, given, found) == op.apply(None, (given,), 0, expected)
        assert found.tobytes() == expected.tobytes()


def test_what_a_device_reads_and_writes_lies_in_its_memory(source: Path) -> None:
    """On torch's CPU: every buffer of an assembler is one that the device gave."""
    catalog = sm.inspect(source)
    given: list[int] = []

    class Counted(DeviceCasts):
        def buffer(self, nbytes: int) -> np.ndarray:
            found = super().buffer(nbytes)
            given.append(found.ctypes.data)
            return found

        def apply(self, op: Cast, tile: np.ndarray, out: np.ndarray) -> int:
            assert tile.ctypes.data in given
            assert out.ctypes.data in given
            return super().apply(op, tile, out)

    entry = cast_to(catalog["w"], DTYPES["F16"])
    assembler = Assembler(FilePool(), 1 << 20, Counted(torch, "cpu"))
    made = b"".join(
        bytes(assembler.view(entry, start, min(100_000, entry.numel - start)))
        for start in range(0, entry.numel, 100_000)
    )
    assert made == load_file(source)["w"].to(torch.float16).numpy().tobytes()


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_device_makes_the_bits_of_the_cpu(source: str, target: str) -> None:
    op = Cast(DTYPES[source], DTYPES[target])
    values = np.resize(every_value(op.source), 1_000_003)
    found, expected = (np.empty(values.size, numpy_dtype(op.target)) for _ in range(2))
    assert cuda_casts().apply(op, values, found) == op.apply(None, (values,), 0, expected)
    assert found.tobytes() == expected.tobytes()


@gpu
@pytest.mark.gpu
def test_a_run_writes_the_same_files(source: Path, tmp_path: Path) -> None:
    digests = []
    for device in ("cpu", "cuda"):
        options = sm.Options(dtype="float16", device=device, sync=False)
        result = sm.convert(source, tmp_path / device, options=options)
        assert result.outcome.overflows == {"wild": 2}
        files = sorted((tmp_path / device).glob("*"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
