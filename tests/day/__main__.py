"""A day's work in an hour: ``python -m tests.day --minutes 60 --out tests/soak/day.json``. Takes root.

It happens in namespaces of its own, so that all processes, temporary files and mounts in them are its own, and go with
it. Ctrl-C ends it; the result file is written after each step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.day.processes import groups

ROOT = Path(__file__).parent.parent.parent
LIMIT = 128 << 20
# Three commands at once, and the process that uses the API.
_GROUPS = 4
_ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="golden checkpoints only")
    parser.add_argument("--scratch", type=Path, help="where 20 GB may lie meanwhile")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "soak" / "day.json")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="shardmerge-day-", dir=given.scratch) as base,
        groups(_GROUPS, LIMIT) as made,
    ):
        told = {
            "base": base,
            "groups": [(group.procs, str(group.peak_file)) for group in made],
            "minutes": given.minutes,
            "seed": given.seed,
            "small": given.small,
            "out": str(given.out.absolute()),
        }
        command = [*_ALONE, sys.executable, "-m", "tests.day.hour", json.dumps(told)]
        code = subprocess.run(command, check=False).returncode
    sys.exit(code)


if __name__ == "__main__":
    main()
