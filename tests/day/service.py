"""What the process that uses the Python API is asked for."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from tests.day.jobs import Job
from tests.day.scene import Day, must

# Of the time: whether it grows shows in many conversions.
_SHARES = {"small": 0.8, "medium": 0.1, "8B": 0.1}


def serve(day: Day) -> None:
    """Asks for a conversion, whole or cancelled or refused, and for what is done with a result."""
    job = day.rng.choice([job for job in day.of(day.due(_SHARES)) if not job.heavy])
    what = day.rng.choice(list(DOES))
    day.step("API", what, job, DOES[what])


def ask(day: Day, request: dict[str, Any], *, exits: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Asks, checks the answer and what the process then has open, and counts."""
    assert day.service is not None
    line = day.service.ask(json.dumps(request), day.tick)
    must(line, f"the process that uses the API has died of {request['do']}")
    answer = json.loads(line)
    day.tally.count("API calls", f"{request['do']}: {answer['code'] or 'done'}")
    must(answer["exit"] in exits, f"{request} came to {answer}")
    must(not answer["children"], f"{request['do']} left {answer['children']} processes")
    day.tally.answered(answer["resident"], len(answer["descriptors"]))
    day.known = day.known or answer["descriptors"]
    more = {name: what for name, what in answer["descriptors"].items() if name not in day.known}
    must(not more, f"{request['do']} left open {more}")
    if answer["exit"] == 0 and "planned" in answer["done"]:
        day.tally.count("bytes", "total_size", answer["done"]["planned"])
    return answer


def made(day: Day, job: Job) -> None:
    ask(day, job.call(day.out))
    day.published(job)
    if job.size == "small":
        for do in day.rng.sample(["verify", "diff"], day.rng.randrange(3)):
            if job.form == "safetensors" or do == "verify":
                ask(day, {"do": do, "out": str(day.out)})


def cancelled(day: Day, job: Job) -> None:
    """At the first word of progress."""
    ask(day, {**job.call(day.out), "cancel": True}, exits=(5,))
    must(not day.out.exists(), f"{job.name}: a result of a conversion that was cancelled")
    made(day, job)


def interrupted(day: Day, job: Job) -> None:
    """As by Ctrl-C, at any moment."""
    after = day.rng.uniform(0.001, day.seconds[job.name])
    ask(day, {**job.call(day.out), "interrupt": after}, exits=(0, 5))
    day.unharmed(job)
    made(day, job)


def refused(day: Day, job: Job) -> None:
    bad = day.out.parent / "bad.safetensors"
    bad.write_bytes(day.rng.randbytes(day.rng.randrange(5000)))
    mapping = bad.with_name("bad.yaml")
    mapping.write_text(f'shardmerge: 1\nsources: {{a: {bad}}}\ntensors: {{"x": "a:y"}}\n')
    call = {**job.call(day.out), "bases": {}, "use": ""}
    for request in day.rng.sample(
        [
            {**call, "do": "convert", "given": str(bad)},
            {**call, "do": "run", "given": str(mapping)},
            {**call, "do": "convert", "given": str(bad.with_name("absent"))},
            {**job.call(day.out), "more": {"memory": "1MiB"}},
            {**call, "do": "convert", "given": job.given, "use": "no/such-preset"},
            {"do": "look", "given": str(bad)},
            {"do": "verify", "out": str(bad.parent)},
        ],
        3,
    ):
        ask(day, request, exits=(1, 2, 3, 4))
        must(not day.out.exists(), f"{request}: a result of what was refused")


def full(day: Day, job: Job) -> None:
    """A disk without room, from the beginning."""
    ballast = day.small_disk / "ballast"
    status = os.statvfs(day.small_disk)
    with ballast.open("wb") as file, suppress(OSError):  # the file system needs some of it for itself
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
    ask(day, job.call(day.small_disk / "out"), exits=(4,))
    must(not (day.small_disk / "out").exists(), f"{job.name}: a result on a full disk")
    ballast.unlink()


def looked_at(day: Day, job: Job) -> None:
    if job.is_mapping:
        ask(day, {"do": "plan", "given": job.given, "options": job.options()})
    ask(day, {"do": "look", "given": job.given})


DOES = {
    "made": made,
    "cancelled": cancelled,
    "interrupted": interrupted,
    "refused": refused,
    "full": full,
    "looked at": looked_at,
}
