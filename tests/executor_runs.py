"""Has the parts of a plan made by an executor, in a process of its own, and says as JSON what came of it.

python -m tests.executor_runs ENGINE PROCESSES MAPPING OUT [SECONDS]
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from shardmerge import api
from shardmerge.errors import ShardmergeError
from shardmerge.execute.engine import Counters
from shardmerge.execute.executors.contract import Executor, Make, Stopped
from shardmerge.execute.executors.failures import rows_of
from shardmerge.execute.executors.here import make_here
from shardmerge.execute.executors.ray import OnRay
from shardmerge.execute.means import Means
from shardmerge.plan.schedule import Schedule
from shardmerge.plan.value import Part
from shardmerge.publish.making import PartMaker, is_made
from shardmerge.publish.staging import Staging


@dataclass(frozen=True)
class Slowly:
    """Makes parts, each after a while."""

    make: Make
    seconds: float

    def __call__(self, part: Part, counters: Counters, stopped: Stopped) -> None:
        time.sleep(self.seconds)
        self.make(part, counters, stopped)


def main(engine: str, processes: str, mapping: str, out: str, seconds: str = "0") -> None:
    executor: Executor = make_here if engine == "here" else OnRay()
    plan = api.plan(mapping)
    parts = sorted(plan.parts(), key=lambda part: -part.shard.nbytes)
    staging = Staging.of(Path(out), plan.id, sync=False)
    staging.begin(plan.files(), Path(out))
    told: list[int] = []
    rows = []
    started = time.monotonic()
    try:
        maker = Slowly(PartMaker(staging, Means(sync=False)), float(seconds))
        executor(parts, maker, Schedule(int(processes), 1, 1 << 20, 64 << 20), told.append)
    except (ShardmergeError, OSError, RuntimeError) as error:
        rows = rows_of(error)
    made = [part.number for part in parts if is_made(staging, part)]
    answer = {"errors": rows, "made": sorted(made), "bytes": sum(told), "seconds": time.monotonic() - started}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
