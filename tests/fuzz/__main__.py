"""Fuzzes the readers of untrusted bytes and writes down how far that came.

``python -m tests.fuzz --target pickle --runs 5000000``; without ``--target`` all of them, one after the other. Needs
atheris (``pip install -e .[fuzz]``). With ``--resume`` what was done before counts, and what is left is run. Findings
are kept in the work directory; in ``tests/fuzz/found/TARGET/`` they are tests.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

RESULTS = Path(__file__).parents[1] / "soak" / "fuzz.json"
_NOTHING = {"executions": 0, "edges": 0, "seconds": 0, "mebibytes": 0, "findings": {}}
_COVERED = re.compile(r"cov: (\d+)")
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_.]{3,40}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", action="append", choices=[*TARGETS])
    parser.add_argument("--runs", type=int, default=5_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "shardmerge-fuzz"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    for name in given.target or TARGETS:
        fuzz(TARGETS[name], given.runs, given.work / name, given.out, resume=given.resume)


def fuzz(target: Target, runs: int, folder: Path, out: Path, *, resume: bool) -> None:
    """Runs a target so many times; with ``resume`` until it was run so many times in all."""
    _prepare(target, folder)
    before = _row(out, target.name) if resume else dict(_NOTHING)
    while before["executions"] < runs:
        row = _session(target, runs - before["executions"], folder, out, before)
        if row["executions"] == before["executions"]:
            sys.exit(f"{target.name} does not run")
        before = row


def _prepare(target: Target, folder: Path) -> None:
    for name in ("corpus", "seeds", "found"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    words: set[bytes] = set()
    for number, data in enumerate(target.seeds()):
        if len(data) <= target.most:
            (folder / "seeds" / str(number)).write_bytes(data)
            words.update(_WORD.findall(data))
    lines = (f'"{word.decode()}"' for word in sorted(words)[:2_000])
    (folder / "words").write_text("\n".join(lines) + "\n")


def _session(target: Target, runs: int, folder: Path, out: Path, before: dict) -> dict:
    """Runs one process, and writes its counts down while it runs."""
    (folder / "counts.json").unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "tests.fuzz.child", target.name, str(folder), f"-runs={runs}", f"-max_len={target.most}",
        f"-dict={folder / 'words'}", f"-artifact_prefix={folder / 'found'}/", "-timeout=60", "-rss_limit_mb=2048",
        "-print_final_stats=1", "-reload=0", str(folder / "corpus"), str(folder / "seeds"),
    ]  # fmt: skip
    log = folder / "log"
    started = time.monotonic()
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as child:
        while True:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                _write(target, before, folder, out, time.monotonic() - started)
            else:
                break
    return _write(target, before, folder, out, time.monotonic() - started)


def _write(target: Target, before: dict, folder: Path, out: Path, seconds: float) -> dict:
    log = (folder / "log").read_text("utf-8", "replace")
    try:
        counts = json.loads((folder / "counts.json").read_text())
    except (OSError, ValueError):
        counts = {"executions": 0, "findings": {}, "mebibytes": 0}
    done = re.findall(r"stat::number_of_executed_units:\s*(\d+)", log)
    row = {
        "about": target.about,
        "most_bytes": target.most,
        "executions": before["executions"] + (int(done[-1]) if done else counts["executions"]),
        "edges": max([before["edges"], *map(int, _COVERED.findall(log))]),
        "seconds": round(before["seconds"] + seconds),
        "mebibytes": max(before["mebibytes"], counts["mebibytes"]),
        "findings": {**before["findings"], **counts["findings"], **_ended(folder)},
    }
    with out.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two processes may each run other targets
        file.seek(0)
        value = json.loads(file.read() or '{"targets": {}}')
        value |= {
            "date": datetime.now(timezone.utc).date().isoformat(),
            "kernel": os.uname().release,
            "python": sys.version.split()[0],
        }
        value["targets"][target.name] = row
        file.truncate(0)
        file.write(json.dumps(value, indent=1) + "\n")
    return row


def _ended(folder: Path) -> dict[str, str]:
    """Returns what ended a process: libFuzzer names the input after it."""
    kinds = ("crash-*", "timeout-*", "oom-*")
    return {path.name: "ended the process" for kind in kinds for path in (folder / "found").glob(kind)}


def _row(out: Path, name: str) -> dict:
    with out.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        file.seek(0)
        rows = json.loads(file.read() or '{"targets": {}}')["targets"]
    return rows.get(name) or dict(_NOTHING)


if __name__ == "__main__":
    main()
