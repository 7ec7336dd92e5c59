"""What all tests share: Hypothesis without a clock, paths of the golden files, a checkpoint reader to compare with."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from shardmerge.execute.gather import gather
from shardmerge.ops.arrays import Array, as_array
from shardmerge.signals import STOPS
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog, TensorEntry

settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ci")

pytest_plugins = ["tests.accidents"]

GOLDEN = Path(__file__).parent / "golden"

# A shell starts what it puts in the background with SIGINT ignored, and a process hands that on to its children: tests
# that interrupt a command would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A signal that one test leaves ignored is ignored by every process that a later one starts and interrupts."""
    before = [signal.getsignal(number) for number in STOPS], signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    assert ([signal.getsignal(number) for number in STOPS], signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before


@pytest.fixture(scope="session")
def golden() -> Path:
    """The checkpoints made by real tools."""
    return GOLDEN


@pytest.fixture
def remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Code of checkpoints in a cache of its own, and forgotten: transformers keeps it in one package of the process."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [cache, *sys.path])
    _forget_remote_code()
    yield
    _forget_remote_code()


def _forget_remote_code() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def read_entry(entry: TensorEntry) -> Array:
    """Reads a tensor whole, through its pieces."""
    data = bytearray(entry.nbytes)
    gather(FilePool(), entry, 0, memoryview(data))
    return as_array(memoryview(data), entry.dtype).reshape(entry.shape)


def read_all(catalog: Catalog) -> dict[str, Array]:
    """Reads every tensor of a catalog, aliases included."""
    return {name: read_entry(catalog[name]) for name in catalog.names()}


def same_values(left: Array, right: Array) -> bool:
    """Tells whether two arrays have the same shape and values after widening; NaN equals NaN."""
    wide = [np.asarray(a).astype(np.float64) for a in (left, right)]
    return wide[0].shape == wide[1].shape and np.array_equal(wide[0], wide[1], equal_nan=True)


def shardmerge(
    *arguments: object, code: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own and checks its exit code."""
    command = [sys.executable, "-m", "shardmerge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


# mkfs and losetup are where ordinary users do not look.
_TOOLS = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_MAKE = {"xfs": ["mkfs.xfs", "-q"], "btrfs": ["mkfs.btrfs", "-q"], "ext4": ["mkfs.ext4", "-q", "-F"]}


@pytest.fixture(scope="session")
def disk() -> Iterator[Callable[[str], Path]]:
    """Gives, by its kind, the root of a real file system of 512 MiB in a sparse file; skips where it cannot."""
    mounted: dict[str, Path] = {}

    def mount(kind: str) -> Path:
        if kind not in mounted:
            mounted[kind] = _mount(kind)
        return mounted[kind]

    yield mount
    for folder in mounted.values():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed test may still hold a file of it
        folder.rmdir()


def _mount(kind: str) -> Path:
    make, *options = _MAKE[kind]
    tool = shutil.which(make, path=_TOOLS)
    if os.geteuid() or tool is None:
        pytest.skip(f"making and mounting {kind} takes root and {make}")
    # Not below pytest's own directory: after a run that was killed it could not be tidied up while this is mounted.
    folder = Path(tempfile.mkdtemp(prefix=f"shardmerge-{kind}-"))
    with tempfile.NamedTemporaryFile(prefix=f"shardmerge-{kind}-") as image:  # goes when the mount goes
        image.truncate(512 << 20)
        subprocess.run([tool, *options, image.name], check=True, capture_output=True)
        command = ["mount", "-o", "loop", image.name, str(folder)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        folder.rmdir()
        pytest.skip(f"{kind} cannot be mounted here: {done.stderr.strip()}")
    return folder
