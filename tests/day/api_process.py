"""A process that uses the Python API over and over, as a service does: ``python -m tests.day.api_process``.

Each line of its input is a request, each line of its output what became of it, with its descriptors and memory after
it. It never collects garbage itself: what a reference cycle keeps open shows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import shardmerge as sm

Request = dict[str, Any]

# How long the disk may take, in seconds.
_LONGEST = 30.0


class CancelledError(Exception):
    """What a program raises where it is told of progress, to stop a conversion."""


def descriptors() -> dict[str, str]:
    """Returns the open descriptors of this process, and what they are."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            found[path.name] = str(path.readlink())
        except OSError:  # the one that lists
            continue
    return found


def resident() -> int:
    """Returns bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _progress(request: Request) -> Callable[[int], None] | None:
    """Cancels at the first word of progress, if asked to."""
    if not request.get("cancel"):
        return None

    def stop(nbytes: int) -> None:
        raise CancelledError(f"after {nbytes} bytes")

    return stop


@contextmanager
def _interrupted(after: float) -> Iterator[None]:
    """Interrupts what is done, as Ctrl-C does, after so many seconds."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def convert(request: Request) -> object:
    options = sm.Options(**request["options"], **request.get("more", {}))
    made = sm.convert(
        request["given"],
        request["out"],
        use=request["use"],
        bases=request["bases"],
        options=options,
        progress=_progress(request),
    )
    return {"planned": made.plan.tensor_bytes}


def run(request: Request) -> object:
    options = sm.Options(**request["options"], **request.get("more", {}))
    made = sm.run(request["given"], request["out"], options=options, progress=_progress(request))
    return {"planned": made.plan.tensor_bytes}


def look(request: Request) -> object:
    """Inspects, and reads the first and the last tensor lazily; keeps nothing."""
    checkpoint = sm.open_checkpoint(request["given"])
    names = list(checkpoint)
    for tensor in (checkpoint[name] for name in (names[0], names[-1])):
        if tensor.shape:
            tensor[:1].sum()
        if tensor.nbytes < 1 << 20:
            tensor.numpy().sum()
            tensor.numpy(copy=True).sum()
    return {"tensors": len(names)}


def plan(request: Request) -> object:
    return {"bytes": sm.plan(request["given"], sm.Options(**request["options"])).tensor_bytes}


def verify(request: Request) -> object:
    return {"checks": len(sm.verify(request["out"]).checks)}


def diff(request: Request) -> object:
    return {"equal": not sm.diff(request["out"], request["out"])}


DOES: dict[str, Callable[[Request], object]] = {one.__name__: one for one in (convert, run, look, plan, verify, diff)}


def answered(request: Request) -> dict[str, object]:
    """Does what it is asked, and says what became of it."""
    try:
        with _interrupted(request.get("interrupt", 0.0)):
            done = DOES[request["do"]](request)
    except sm.ShardmergeError as error:
        return {"code": error.code, "exit": error.exit_code}
    except CancelledError:
        return {"code": "cancelled", "exit": 5}
    except KeyboardInterrupt:
        _disk_answers()
        return {"code": "interrupted", "exit": 5}
    except Exception as error:  # noqa: BLE001  # what the command line calls a bug
        return {"code": "internal-error", "exit": 70, "what": repr(error)}
    return {"code": "", "exit": 0, "done": done}


def _disk_answers() -> None:
    """A thread that waits for the disk cannot be interrupted; it closes what it has open when the disk answers."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(_LONGEST)


def measured(request: Request) -> dict[str, object]:
    answer = answered(request)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {**answer, "descriptors": descriptors(), "resident": resident(), "children": len(children)}


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(measured(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
