"""A program: ``python -I -S launcher.py REPORT GROUP COMMAND...`` runs a command and writes as JSON what it cost.

It stands between who measures and what is measured, because Linux counts the memory that a process had before it called
exec: the child of a test runner of 300 MiB would never be seen below 300 MiB. This one has 10, so it imports little.
Pages of mapped files count as resident though the system can drop them at any time, so a thread looks, fifty times a
second, at both kinds, in the process and all its children.
"""

import json
import os
import signal
import sys
import threading
import time

_PERIOD = 0.02
_KINDS = ("RssAnon", "RssFile")


def main(report: str, group: str, *command: str) -> None:
    """Forks, executes, watches, waits, and writes the report."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # see `processes.measure`
    started = time.monotonic()
    child = os.fork()
    if not child:
        _become(group, command)
    curve: list[list[float]] = []
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(child, started, ended, curve))
    watcher.start()
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, and still there to be asked
    wall = time.monotonic() - started
    moved = _moved(child)
    _, status, used = os.wait4(child, 0)
    ended.set()
    watcher.join()
    found = {
        "code": os.waitstatus_to_exitcode(status),
        "wall": wall,
        "user": used.ru_utime,
        "system": used.ru_stime,
        "peak": used.ru_maxrss << 10,
        "io": moved,
        "curve": curve,
    }
    with open(report, "w") as file:
        json.dump(found, file)


def _become(group: str, command: tuple[str, ...]) -> None:
    try:
        if group:
            with open(group, "w") as members:
                members.write(str(os.getpid()))
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
    os._exit(127)


def _watch(child: int, started: float, ended: threading.Event, curve: list[list[float]]) -> None:
    """Adds seconds, anonymous bytes and bytes of file pages to the curve until the child has ended."""
    while not ended.wait(_PERIOD):
        seen = [_resident(pid) for pid in _family(child)]
        if seen:
            anonymous, mapped = (sum(column) for column in zip(*seen, strict=True))
            curve.append([round(time.monotonic() - started, 3), anonymous, mapped])


def _resident(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/status") as status:
            lines = dict(line.split(":", 1) for line in status)
    except OSError:
        lines = {}
    return [int(lines.get(kind, "0").split()[0]) << 10 for kind in _KINDS]


def _family(pid: int) -> list[int]:
    """Returns a process and all below it; without CONFIG_PROC_CHILDREN the process alone."""
    found = [pid]
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  # pathlib is memory
            with open(f"/proc/{pid}/task/{thread}/children") as children:
                for child in children.read().split():
                    found += _family(int(child))
    except OSError:
        pass
    return found


def _moved(pid: int) -> dict[str, int]:
    """Returns the counters of proc(5) ``/proc/PID/io``, of waited-for children too; empty where we may not look."""
    try:
        with open(f"/proc/{pid}/io") as file:
            return {key: int(value) for key, value in (line.split(":") for line in file)}
    except OSError:
        return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
