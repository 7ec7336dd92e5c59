"""Runs pytest in a copy of the repository, in a process forked from one that has the large libraries already."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.abc
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PLACE = ROOT / ".mutants"

_LIBRARIES = (
    "hypothesis", "ml_dtypes", "numpy", "numpy.testing", "pytest", "_pytest.assertion.rewrite", "rich.console",
    "safetensors.torch", "torch", "torch.distributed.checkpoint", "tqdm", "transformers", "yaml", "click", "jsonschema",
)  # fmt: skip
_LARGEST_FILE = 4 << 30
# It makes a larger one, and would fail whatever was changed.
_LARGER = "tests/test_every_error.py::test_a_latest_without_end_is_not_read_to_its_end"


@dataclass(frozen=True)
class Ran:
    """What became of a run.

    Attributes
    ----------
    outcome
        ``passed``, ``failed``, or ``timed out``.
    by
        The first test that failed, or none.
    seconds
        How long each test took, with what it needs.
    failed
        All that failed.
    more
        What ``watch`` handed over.
    """

    outcome: str
    by: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    more: Any = None


class Copy:
    """A copy of the repository; one process at a time changes it and runs tests in it."""

    def __init__(self, name: str) -> None:
        self.tree = PLACE / name / "tree"
        self._temporary, self._log = PLACE / name / "tmp", PLACE / name / "log"
        self._bring_up_to_date()

    def _bring_up_to_date(self) -> None:
        """Copies all that git knows or does not ignore, and removes what is no longer there."""
        command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
        for name in names:
            if _stamp(ROOT / name) != _stamp(self.tree / name):
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        for folder, folders, files in os.walk(self.tree):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for path in (Path(folder, name) for name in files):
                if not path.is_symlink() and str(path.relative_to(self.tree)) not in names:
                    path.unlink()
        for name in (".venv", ".envs"):
            with suppress(FileExistsError):
                (self.tree / name).symlink_to((ROOT / name).resolve())

    def warm_up(self, room: str = "") -> None:
        """Imports libraries, and of shardmerge what knows nothing of a room; adopts orphans."""
        for name in _LIBRARIES:
            with suppress(ImportError):
                importlib.import_module(name)
        sys.path[:] = [str(self.tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
        if room:
            _import_without(self.tree, f"shardmerge.{room}")
        gc.freeze()
        assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER

    def run(self, tests: Sequence[str], limit: float, watch: Callable[[], Any] | None = None, *flags: str) -> Ran:
        """Runs tests in the copy.

        Parameters
        ----------
        tests
            Their ids, or files.
        limit
            After so many seconds the run is ended.
        watch
            Called in the process first; it returns a plugin for pytest, and JSON comes back from its ``found``.
        flags
            For pytest.
        """
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(reads)
            self._child(tests, writes, watch, flags)
        os.close(writes)
        until = time.monotonic() + limit
        data, ended = b"", False
        while not ended and (left := until - time.monotonic()) > 0 and select.select([reads], [], [], left)[0]:
            got = os.read(reads, 1 << 20)
            data, ended = data + got, not got
        os.close(reads)
        _end_all()
        shutil.rmtree(self._temporary, ignore_errors=True)
        said = [json.loads(line) for line in data.decode().split("\n")[:-1]]
        return _ran(said, ended=ended)

    def _child(self, tests: Sequence[str], pipe: int, watch: Callable[[], Any] | None, flags: Sequence[str]) -> None:
        code = 70
        try:
            os.setsid()
            os.set_inheritable(pipe, False)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_DFL)
            with self._log.open("wb") as log:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
            Path("/proc/self/oom_score_adj").write_text("1000")  # a change may ask for all memory there is
            os.chdir(self.tree)
            os.environ["PYTHONPATH"] = str(self.tree)
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]
            teller = _Teller(pipe)
            found = watch() if watch is not None else None
            import pytest

            basics = [
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "-p",
                "no:anyio",
                f"--basetemp={self._temporary}",
                f"--rootdir={self.tree}",
                f"--deselect={_LARGER}",
            ]
            basics += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins, which ``warm_up`` imported
            code = int(pytest.main([*basics, *flags, *tests], plugins=[teller, *([found] if found else [])]))
            teller.say(code=code, more=found.found() if found else None)
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            raise
        finally:
            os._exit(code)


def _stamp(path: Path) -> tuple[int, int]:
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else (-1, 0)


def _import_without(tree: Path, package: str) -> None:
    class Nothing(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name.startswith(package):
                raise ImportError(name)

    finder = Nothing()
    sys.meta_path.insert(0, finder)
    for path in sorted((tree / "shardmerge").rglob("*.py")):
        name = ".".join(path.relative_to(tree).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("__main__"):
            with suppress(ImportError):
                importlib.import_module(name)
    sys.meta_path.remove(finder)
    sys.path_importer_cache.clear()
    assert not any(name.startswith(package) for name in sys.modules)


def _ran(said: Sequence[dict[str, Any]], *, ended: bool) -> Ran:
    seconds: dict[str, float] = {}
    for one in said:
        if "test" in one:
            seconds[one["test"]] = seconds.get(one["test"], 0.0) + one["seconds"]
    failed = tuple(dict.fromkeys(one["test"] for one in said if one.get("failed")))
    last = next((one for one in said if "code" in one), {})
    if failed:
        return Ran("failed", failed[0], seconds, failed, last.get("more"))
    if not ended:
        return Ran("timed out", "", seconds)
    by = "" if last.get("code") == 0 else f"pytest exits with {last.get('code')}"
    return Ran("failed" if by else "passed", by, seconds, (), last.get("more"))


class _Teller:
    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def say(self, **what: object) -> None:
        data = memoryview((json.dumps(what) + "\n").encode())
        while data:
            data = data[os.write(self._pipe, data) :]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.say(test=report.nodeid, seconds=report.duration, failed=report.failed)


def _end_all() -> None:
    """Ends what is left of a run, whoever started it: all children are children of this process by then."""
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)
