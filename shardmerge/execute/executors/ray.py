"""On a cluster of Ray: a task makes a part.

Nothing here has to be right for a result to be: a task that is lost with its node is run again somewhere else, one that
was thought to be lost and goes on makes the same bytes, and what counts is the receipt of a part. A part is handed over
as it is, by pickle, and the file table, which all parts have in common, once. Nobody plans anew.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shardmerge.errors import ResourceError, UsageError
from shardmerge.execute.executors.contract import Make, Progress
from shardmerge.execute.executors.failures import FailureRow, error_from, rows_of
from shardmerge.execute.patience import interrupted
from shardmerge.plan.schedule import Schedule
from shardmerge.plan.value import Part
from shardmerge.tensors import FileStamp

if TYPE_CHECKING:
    from ray import ObjectRef

# How often a part is begun anew after its worker or its node was lost. Nodes that may be taken away at any time are
# lost more than once; a part that is lost ten times ends its workers itself.
_RETRIES = 10

# How long a cluster may take to answer, in seconds.
_KNOCK = 10.0

# How long this process waits for tasks before it looks whether it was interrupted, in seconds.
_LOOK = 0.5


@dataclass(frozen=True, slots=True)
class OnRay:
    """Makes parts by tasks of a cluster: see ``contract.Executor``. The schedule is that of a task.

    What makes a part travels by pickle. Staging directory and sources must be at the same paths on all nodes.

    Attributes
    ----------
    address
        As ``ray.init`` takes it; None for the cluster that Ray finds, or else one on this machine alone.

    Raises
    ------
    UsageError
        ``no-ray``: it is not installed. ``no-cluster``: nothing answers at the address.
    ResourceError
        ``worker-died``: a task ended again and again without an answer.
    """

    address: str | None = None

    def __call__(self, parts: Sequence[Part], make: Make, how: Schedule, progress: Progress | None) -> None:
        """Returns when all parts have receipts."""
        if not parts:
            return
        with _cluster(self.address) as ours:
            tasks = _begun(parts, make, how)
            try:
                _wait(tasks, progress)
            except BaseException as error:
                if not ours:
                    _cancel(tasks)
                if isinstance(error, KeyboardInterrupt):
                    raise interrupted() from error
                raise


@contextmanager
def _cluster(address: str | None) -> Iterator[bool]:
    """Connects with a cluster, and at the end leaves it, which ends its tasks; False where the caller has connected."""
    try:
        import ray
    except ImportError as error:
        what = "--engine ray needs Ray, which is not installed"
        raise UsageError("no-ray", what, hint="pip install 'shardmerge[ray]', here and on all nodes") from error
    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # where Ray starts a cluster, it would report that
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _knock(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(
            "no-cluster",
            "no Ray cluster answers",
            where=address or "",
            found=str(error).splitlines()[0],
            hint="start one: ray start --head; or leave --address out",
        ) from error
    for number, handler in handlers.items():  # Ray takes SIGTERM for itself, and exits at once
        signal.signal(number, handler)
    try:
        yield True
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raises ``OSError`` where nobody listens: Ray 2.60 tries for more than three minutes, and ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK).close()


def _begun(parts: Sequence[Part], make: Make, how: Schedule) -> dict[ObjectRef[list[FailureRow]], Part]:
    """Gives a task for each part, in their order; it begins where as many CPUs and as much memory are free."""
    import ray

    maker, files = ray.put(make), ray.put(parts[0].files)
    task = ray.remote(_made).options(num_cpus=_cpus(how.threads), memory=how.peak, max_retries=_RETRIES)
    return {task.remote(maker, replace(part, files=()), files, how.threads): part for part in parts}


def _cpus(threads: int) -> int:
    """Returns how many CPUs a task asks for: no more than the smallest node has, or it would never begin there."""
    import ray

    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return min([threads, *(cpus for cpus in nodes if cpus)])


def _made(make: Make, part: Part, files: tuple[FileStamp, ...], threads: int) -> list[FailureRow]:
    """Makes a part, on some node; returns what went wrong, with the name of the node."""
    try:
        make(replace(part, files=files), [0] * threads, bool)
    except Exception as error:  # noqa: BLE001  # it must reach the driver as it is, and not as an error of Ray
        host = os.uname().nodename
        return [{**row, "where": f"{row.get('where', '')} (on {host})".strip()} for row in rows_of(error)]
    return []


def _wait(tasks: dict[ObjectRef[list[FailureRow]], Part], progress: Progress | None) -> None:
    """Returns when all tasks are done, and raises what one of them met."""
    import ray
    from ray.exceptions import RayError

    waiting = list(tasks)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=_LOOK)
        if progress is not None:
            progress(0)
        for one in done:
            try:
                rows = ray.get(one)
            except RayError as error:
                raise _lost(tasks[one], error) from error
            if rows:
                raise error_from(rows)
            if progress is not None:
                progress(sum(tensor.nbytes for tensor in tasks[one].shard.tensors))


def _cancel(tasks: dict[ObjectRef[list[FailureRow]], Part]) -> None:
    """Interrupts tasks. Not by force: Ray 2.60 aborts this process where one of them was just done."""
    import ray

    for task in tasks:
        ray.cancel(task)


def _lost(part: Part, error: Exception) -> ResourceError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ResourceError(
        "worker-died",
        "a task of Ray ended without an answer",
        where=part.shard.name,
        found=lines[-1].strip() if lines else type(error).__name__,
        hint="every node needs this shardmerge, and memory for a task; the same command goes on where it was",
    )
