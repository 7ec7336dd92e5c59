"""What views of mapped files cost and whom they reach, by what the system counts: calls, descriptors, maps, pages."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.errors import CheckpointError
from shardmerge.lazy import LazyTensor
from shardmerge.storage import mapping
from shardmerge.storage.reading import FilePool
from tests.faults import tool

MIB, GIB = 1 << 20, 1 << 30
OWN_DESCRIPTOR = sys.version_info < (3, 13)  # that of a map


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Eight tensors that begin and end in the middle of pages."""
    random = torch.Generator().manual_seed(0)
    save_file({f"t{i}": torch.randn(70_001 + i, generator=random) for i in range(8)}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def maps(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def descriptors(path: Path) -> int:
    return sum(os.path.realpath(entry) == str(path) for entry in Path("/proc/self/fd").iterdir())


def bytes_read(tensor: LazyTensor) -> int:
    return tensor._reader._pool.bytes_read


def resident(kind: str) -> int:
    """Bytes of this process that are in memory: RssAnon its own, RssFile those of files."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def sparse(path: Path, nbytes: int, tensors: int = 1) -> Path:
    """A safetensors file whose data are a hole."""
    each = nbytes // tensors
    names = {
        f"t{i}": {"dtype": "BF16", "shape": [each // 8192, 4096], "data_offsets": [i * each, (i + 1) * each]}
        for i in range(tensors)
    }
    header = json.dumps(names).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + nbytes)
    return path


def run(code: str, *arguments: object, prefix: tuple[object, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*map(str, prefix), sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# ---- writing into a tensor of torch


def test_writing_reaches_neither_the_file_nor_another_view(file: Path) -> None:
    before, values = file.read_bytes(), load_file(file)
    checkpoint = shardmerge.open_checkpoint(file)
    viewed = {name: tensor.numpy() for name, tensor in checkpoint.items()}
    for name, tensor in checkpoint.items():
        written, other = tensor.torch(), tensor.torch()
        written.fill_(7)
        assert torch.equal(other, values[name])
        assert torch.equal(tensor.torch(), values[name])
        del other
        gc.collect()
        assert torch.all(written == 7)
    assert all(np.array_equal(viewed[name], values[name].numpy()) for name in values)
    os.sync()
    assert file.read_bytes() == before


def test_neighbours_on_a_page_and_parts_of_a_tensor_are_apart(file: Path) -> None:
    """All tensors share the pages at their seams; the rows of a mapping's slice lie inside of another tensor."""
    values = load_file(file)
    text = file.with_name("mapping.yaml")
    text.write_text(
        "shardmerge: 1\nsources: {x: x.safetensors}\ntensors:\n"
        '  "{rest...}": x:{rest...}\n  part: {op: slice, of: "x:t3", dim: 0, start: 100, stop: 60000}\n'
    )
    tensors = {name: tensor.torch() for name, tensor in shardmerge.open_checkpoint(text).items()}
    for number, name in enumerate(sorted(tensors)):
        tensors[name].fill_(number)
    assert tensors.pop("part").shape == (59_900,)
    del tensors["t3"], tensors["t5"]
    gc.collect()
    for number, name in enumerate(sorted(values), start=1):  # "part" was the first
        assert name not in tensors or torch.all(tensors[name] == number)


def test_a_part_of_a_tensor_keeps_what_was_written(file: Path) -> None:
    """The tensor itself is gone: what is left of it must not turn back into the file's values."""
    whole = shardmerge.open_checkpoint(file)["t2"].torch()
    whole.add_(1)
    expected = load_file(file)["t2"][1000:60_000] + 1
    part, array = whole[1000:60_000], whole.numpy()[1000:60_000]
    del whole
    gc.collect()
    assert torch.equal(part, expected)
    del part
    gc.collect()
    assert np.array_equal(array, expected.numpy())


def test_threads_that_ask_for_one_tensor_do_not_share_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is stopped between finding out that nobody has the range and taking it."""
    take = mapping._Map.view

    def slowly(self: mapping._Map, offset: int, nbytes: int) -> memoryview:
        time.sleep(0.05)
        return take(self, offset, nbytes)

    monkeypatch.setattr(mapping._Map, "view", slowly)
    tensor = shardmerge.open_checkpoint(file)["t0"]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: tensor.torch(), range(4)))
    for number, value in enumerate(found):
        value.fill_(number)
    assert all(torch.all(value == number) for number, value in enumerate(found))


def test_what_was_written_leaves_the_memory_with_its_tensor(tmp_path: Path) -> None:
    """One after the other, 512 MiB in all are written, while a first tensor keeps the file mapped."""
    checkpoint = shardmerge.open_checkpoint(sparse(tmp_path / "x.safetensors", 512 * MIB, tensors=32))
    first = checkpoint["t0"].torch()
    before = resident("RssAnon")
    for tensor in checkpoint.values():
        tensor.torch().fill_(1)
        assert bytes_read(tensor) == 0
    assert resident("RssAnon") < before + 32 * MIB
    assert not first.any()


def test_what_was_looked_at_leaves_the_memory_with_its_view(tmp_path: Path) -> None:
    checkpoint = shardmerge.open_checkpoint(sparse(tmp_path / "x.safetensors", 512 * MIB, tensors=32))
    first = checkpoint["t0"].numpy()
    before = resident("RssFile")
    for tensor in checkpoint.values():
        assert not tensor.numpy().view(np.uint16).any()
        assert bytes_read(tensor) == 0
    assert resident("RssFile") < before + 32 * MIB
    assert first.shape == (2048, 4096)


# ---- how long a map lives


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_views_of_a_file_share_a_map_and_a_descriptor(file: Path, kind: str) -> None:
    checkpoint = shardmerge.open_checkpoint(file)
    views = {name: getattr(tensor, kind)() for name, tensor in checkpoint.items()}
    assert maps(file) == 1
    assert descriptors(file) == 1 + OWN_DESCRIPTOR  # that of the checkpoint, which reads slices
    del checkpoint
    gc.collect()
    assert descriptors(file) == OWN_DESCRIPTOR
    last = views.pop("t5")
    views.clear()
    gc.collect()
    assert np.array_equal(np.asarray(last), load_file(file)["t5"].numpy())
    assert maps(file) == 1
    del last
    gc.collect()
    assert (maps(file), descriptors(file)) == (0, 0)


def test_a_view_outlives_the_name_of_its_file(file: Path) -> None:
    expected = load_file(file)["t1"]
    array, value = (getattr(shardmerge.open_checkpoint(file)["t1"], kind)() for kind in ("numpy", "torch"))
    file.unlink()
    assert torch.equal(value, expected)
    assert np.array_equal(array, expected.numpy())


def test_a_tensor_asked_for_again_and_again_leaves_nothing(file: Path) -> None:
    checkpoint = shardmerge.open_checkpoint(file)
    for _ in range(200):
        checkpoint["t0"].torch()
        checkpoint["t0"].numpy()
    assert maps(file) <= 2
    gc.collect()
    assert (maps(file), descriptors(file)) == (0, 1)


# ---- a file of 50 GiB

LOOKING = """
import re, sys
from pathlib import Path
import numpy, torch
import shardmerge
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
tensor = shardmerge.open_checkpoint(sys.argv[1])["t0"]
before = resident()
array, value = tensor.numpy(), tensor.torch()
assert array.nbytes == value.nbytes == int(sys.argv[2])
print(resident() - before)
array[-1, -1], value[-1, -1]
print(resident() - before)
"""


def test_a_view_of_50_gib_reads_nothing_and_takes_no_memory(tmp_path: Path) -> None:
    """More than the memory of most machines, and twice: Linux refuses such a map if it could be written."""
    path = sparse(tmp_path / "x.safetensors", 50 * GIB)
    log = tmp_path / "calls"
    traced = tool("strace"), "-f", "-o", log, "-P", path, "-e", "trace=read,pread64,readv,preadv,preadv2"
    done = run(LOOKING, path, 50 * GIB, prefix=traced)
    assert done.returncode == 0, done.stderr
    calls = [line for line in log.read_text().splitlines() if " = " in line]
    assert calls  # the header's
    assert sum(int(line.rpartition(" = ")[2]) for line in calls) < 4096
    seen, touched = map(int, done.stdout.split())
    assert seen < 8 * MIB  # 1 MiB is torch's, which makes its first tensor here
    assert touched < 8 * MIB  # the system maps a few pages around each that is used


AT_THE_END = """
import atexit, sys
atexit.register(lambda: print(torch.all(tensor == 7).item()))  # what is registered first runs last
import torch
import shardmerge
tensor = shardmerge.open_checkpoint(sys.argv[1])["t0"].torch().fill_(7)
"""


def test_a_tensor_keeps_its_values_to_the_end_of_the_process(file: Path) -> None:
    assert run(AT_THE_END, file).stdout == "True\n"


# ---- files that change


@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_cut_off_before_a_view_is_taken_is_an_error(file: Path, mapped: bool) -> None:
    """Also where it is mapped already, for a tensor that is whole."""
    checkpoint = shardmerge.open_checkpoint(file)
    held = [checkpoint["t0"].numpy(), checkpoint["t0"].torch()] if mapped else checkpoint["t0"][:1]
    os.truncate(file, file.stat().st_size - 1)
    for read in (checkpoint["t7"].numpy, checkpoint["t7"].torch, lambda: np.asarray(checkpoint["t7"])):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert caught.value.code == "truncated-file"
    assert len(held)


def test_what_was_not_there_when_the_file_was_opened_is_not_mapped(file: Path) -> None:
    """Nor what is gone a moment after it was looked at."""
    pool, size = FilePool(), file.stat().st_size
    pool.get(str(file))
    with file.open("ab") as grown:
        grown.write(bytes(100))
    assert mapping.FileMaps(pool).view(str(file), size - 50, 100, writable=False) is None
    real = mapping._mapped

    def shorter(fd: int, nbytes: int) -> mmap.mmap:
        os.truncate(file, 1000)
        return real(fd, nbytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "_mapped", shorter)
        assert mapping.FileMaps(pool).view(str(file), size - 100, 100, writable=False) is None


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_another_file_under_the_name_is_not_mapped(file: Path, kind: str) -> None:
    checkpoint = shardmerge.open_checkpoint(file)
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    stat = file.stat()
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(file)
    with pytest.raises(CheckpointError) as caught:
        getattr(checkpoint["t0"], kind)()
    assert caught.value.code == "source-changed"
    assert maps(file) == 0


CUT_OFF = """
import os, sys
import shardmerge
tensor = shardmerge.open_checkpoint(sys.argv[1])["t7"]
values = eval(sys.argv[2])
os.truncate(sys.argv[1], 4096)
print(values[50_000:].sum() != 0)
"""


@pytest.mark.parametrize(
    ("way", "code"),
    [
        ("tensor.numpy()", -signal.SIGBUS), ("tensor.torch()", -signal.SIGBUS),
        ("tensor.numpy(copy=True)", 0), ("tensor.torch(copy=True)", 0), ("tensor[:]", 0),
    ],
)  # fmt: skip
def test_a_file_cut_off_under_a_view_kills_and_a_copy_is_safe(file: Path, way: str, code: int) -> None:
    """What the guide says of it."""
    assert run(CUT_OFF, file, way).returncode == code


# ---- where the system maps nothing

REFUSED = """
import resource, sys
from pathlib import Path
import numpy, torch
import shardmerge
tensor = shardmerge.open_checkpoint(sys.argv[1])["t0"]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
assert tensor.mapped
array, value = tensor.numpy(), tensor.torch()
assert array.flags.writeable and not array.any() and not value.any()
try:
    numpy.asarray(tensor, copy=False)
except ValueError as error:
    print(error)
"""


def test_what_the_system_does_not_map_is_read(tmp_path: Path) -> None:
    """A limit of the address space, as batch systems set it: the file is larger, the tensor is not."""
    done = run(REFUSED, sparse(tmp_path / "x.safetensors", 4 * GIB, tensors=512))
    assert done.returncode == 0, done.stderr
    assert "without a copy" in done.stdout
