"""Measures what tests cover, changes the code place by place, and says what survived."""

from __future__ import annotations

import argparse

from tests.mutants import covering, results
from tests.mutants.places import ROOMS
from tests.mutants.runs import Copy


def main() -> None:
    """Does what the command line says."""
    given = _parser().parse_args()
    if given.what == "show":
        results.show(given.rooms or ROOMS)
        return
    if given.what == "explain":
        results.explain(given.room, given.only, given.reason)
        return
    copy = Copy("record" if given.what == "record" else f"{given.room}-again" if given.again else given.room)
    if given.what == "record":
        copy.warm_up()
        covering.record(copy, given.tests)
    else:
        copy.warm_up(given.room)
        again = results.Again(given.only, given.tests) if given.again else None
        results.campaign(copy, given.room, given.limit, again)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    verbs = parser.add_subparsers(dest="what", required=True)
    record = verbs.add_parser("record", help="measure which lines tests run")
    record.add_argument("tests", nargs="*", help="rooms, or `publish` for tests/test_publish.py; all rooms")
    run = verbs.add_parser("run", help="try the next places of a package; a run that was stopped is gone on with")
    run.add_argument("room", choices=ROOMS)
    run.add_argument("--limit", type=int, default=100, help="places that are tried in all")
    run.add_argument(
        "--again",
        action="store_true",
        help="try those that survived without a reason again, then with whole files of tests; no others",
    )
    run.add_argument("--only", default="", help="with --again: those alone whose text holds this")
    run.add_argument("--tests", nargs="*", default=(), help="with --again: these tests alone (files, or ids)")
    explain = verbs.add_parser("explain", help="say why a change that survived is none that a test could notice")
    explain.add_argument("room", choices=ROOMS)
    explain.add_argument("only", help="part of its text that no other survivor has")
    explain.add_argument("reason")
    show = verbs.add_parser("show", help="list what survived")
    show.add_argument("rooms", nargs="*", choices=[*ROOMS, []])
    return parser


if __name__ == "__main__":
    main()
