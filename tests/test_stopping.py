"""A signal stops a command wherever Python is just then."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from shardmerge.errors import PublishedError, UsageError
from shardmerge.signals import STOPS

# The command line, with a command of ours.
_BEGIN = """\
import signal, sys, time
from shardmerge.cli import main
from shardmerge.errors import PublishedError, UsageError

def heard():
    signal.raise_signal({number})
    time.sleep(0)  # a handler runs between two steps of the interpreter

class Finalized:
    def __del__(self):
        heard()

def while_it_finalizes():
    Finalized()
    time.sleep(30)
    print("nobody stopped it")

def while_it_imports(error):
    try:
        heard()
    except KeyboardInterrupt as stop:
        raise error from stop

def run(command):
    main.cli.main = lambda **_: command()
    sys.argv = ["shardmerge", "inspect", "x", "--json"]
    main.main()
"""


def _ran(code: str, number: int) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", _BEGIN.format(number=int(number)) + code]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def _interrupted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 5, done.stderr
    assert [error["code"] for error in json.loads(done.stdout)["errors"]] == ["interrupted"]
    assert done.stderr == ("error: interrupted [interrupted]\n  hint: to go on: shardmerge inspect x --json\n")


@pytest.mark.parametrize("number", STOPS)
def test_a_finalizer_drops_no_signal(number: int) -> None:
    """Python says on stderr that it ignored the exception, and goes on."""
    _interrupted(_ran("run(while_it_finalizes)", number))


@pytest.mark.parametrize(
    "error", ["ImportError('umath failed to import')", "UsageError('needs-zstd', 'not installed')"]
)
def test_an_error_made_of_a_signal_is_the_signal(error: str) -> None:
    """As guards of optional packages make one, and numpy."""
    _interrupted(_ran(f"run(lambda: while_it_imports({error}))", signal.SIGTERM))


@pytest.mark.parametrize("module", ["numpy", "numpy.version", "numpy._core.multiarray", "numpy.lib", "numpy.linalg"])
def test_a_signal_waits_while_arrays_are_imported(module: str) -> None:
    """The C code of ml_dtypes imports numpy, prints a traceback of whatever happens meanwhile, and only then raises."""
    code = """
class Heard:
    def find_spec(self, name, path=None, target=None):
        if name == MODULE:
            sys.meta_path.remove(self)
            heard()

def import_arrays():
    sys.meta_path.insert(0, Heard())
    import shardmerge.ops.arrays
    time.sleep(30)

run(import_arrays)
"""
    _interrupted(_ran(code.replace("MODULE", repr(module)), signal.SIGTERM))


def test_what_was_published_before_the_signal_is_said() -> None:
    done = _ran("run(lambda: while_it_imports(PublishedError('durability-unconfirmed', 'x')))", signal.SIGTERM)
    assert done.returncode == PublishedError.exit_code, done.stderr
    assert "[durability-unconfirmed]" in done.stderr


def test_an_error_without_a_signal_is_said() -> None:
    code = "def fail():\n    raise UsageError('bad-usage', 'x')\nrun(fail)"
    assert _ran(code, signal.SIGTERM).returncode == UsageError.exit_code


def test_other_errors_of_finalizers_are_python_s_to_say() -> None:
    code = (
        "class Broken:\n    def __del__(self):\n        raise ValueError('of a finalizer')\nrun(lambda: Broken() and 0)"
    )
    done = _ran(code, signal.SIGTERM)
    assert done.returncode == 0
    assert "ValueError: of a finalizer" in done.stderr


def test_a_signal_at_the_very_end_changes_nothing() -> None:
    """The answer is out, and Python takes itself apart: there is nothing to stop, and no traceback."""
    code = "end = sys.exit\nsys.exit = lambda code: heard() or end(code)\nrun(lambda: print('done') or 0)"
    done = _ran(code, signal.SIGTERM)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
