"""Which tests run which lines: measured once, in the process of the tests alone, and kept in ``.mutants``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.mutants.runs import PLACE, ROOT, Copy

FILE = PLACE / "covering.json"
# A file of tests may take so long, in seconds.
_LONGEST = 600.0

# Files of tests that are asked about a room: those that read, convert, publish and verify small files.
CHOSEN = {
    "storage": "io_errors mapped_files mapped_views limits packed_items cloning publish checksum gather_counters "
    "storage_guards descriptors",
    "execute": "gather gather_counters records cloning checksum executors ranks pins device boxes digests staged_parts "
    "workers workshop ops_merging adapter_maths",
    "publish": "publish staged_parts resume overwrite parts verify_damage verify_selection comparing products "
    "stragglers progress digests signing",
    "sources": "sources refusals torch_files pickle_vm safetensors_file dcp rank_sets rank_pickles universal hub "
    "deepspeed_parallel deepspeed_guards distributed_safetensors megatron_dist incomplete optimizer_sources "
    "reader_guards uneven_layers pins",
}
# Those that start processes, of which coverage knows nothing: asked after the others, whole.
WHOLE = {
    "storage": "io_errors descriptors mapped_files limits packed_items publish kills every_error signals",
    "execute": "executors gather_counters records cloning stragglers publish parts kills signals",
    "publish": "publish overwrite resume parts verify_damage products races kills signals every_error",
    "sources": "sources refusals io_errors pins every_error",
}


class _Coverage:
    """A plugin that notes the lines that each test runs."""

    def __init__(self, tree: Path) -> None:
        import coverage

        self._tree = tree
        self._cov = coverage.Coverage(data_file=None, include=[f"{tree}/shardmerge/*"], config_file=False)
        self._cov.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._cov.switch_context(nodeid)

    def found(self) -> dict[str, dict[str, list[int]]]:
        """Returns by test and module the lines."""
        self._cov.stop()
        data, lines = self._cov.get_data(), dict[str, dict[str, list[int]]]()
        for path in data.measured_files():
            for line, tests in data.contexts_by_lineno(path).items():
                for test in tests:
                    lines.setdefault(test, {}).setdefault(str(Path(path).relative_to(self._tree)), []).append(line)
        lines.pop("", None)
        return lines


def record(copy: Copy, names: Sequence[str]) -> None:
    """Measures files of tests: those named, or those of rooms that are not measured yet."""
    kept = json.loads(FILE.read_text()) if FILE.is_file() else {"files": {}}
    modules = (copy.tree / "shardmerge").rglob("*.py")
    kept["texts"] = {str(path.relative_to(copy.tree)): path.read_text() for path in modules}
    of_rooms = [name for room in names or CHOSEN if room in CHOSEN for name in CHOSEN[room].split()]
    wanted = [name for name in of_rooms if name not in kept["files"]]
    for name in dict.fromkeys([*wanted, *(name for name in names if name not in CHOSEN)]):
        test = f"tests/test_{name}.py"
        ran = copy.run([test], _LONGEST, partial(_Coverage, copy.tree))
        lines = ran.more or {}
        kept["files"][name] = {
            "failed": list(ran.failed),
            "tests": {
                one: {"seconds": round(took, 2), "lines": lines.get(one, {})} for one, took in ran.seconds.items()
            },
        }
        FILE.write_text(json.dumps(kept))
        print(
            f"{name}: {ran.outcome}, {len(ran.seconds)} tests, {sum(ran.seconds.values()):.0f} s",
            *ran.failed,
            flush=True,
        )


def _in_server(name: str) -> set[str]:
    """Returns the tests of a file that run commands in a server, whose start takes longer than other tests."""
    text = (ROOT / f"tests/test_{name}.py").read_text()
    return set(re.findall(r"^def (test_\w+)\([^)]*: (?:Machine|Scene)\b", text, flags=re.MULTILINE))


class Covering:
    """What was measured, asked by today's lines."""

    def __init__(self) -> None:
        kept: dict[str, Any] = json.loads(FILE.read_text())
        self._texts = kept["texts"]
        self.seconds: dict[str, float] = {}
        self._tests: dict[tuple[str, int], list[str]] = {}
        self._of_module: dict[str, list[str]] = {}
        for name, file in kept["files"].items():
            slow = _in_server(name)
            for test, found in file["tests"].items():
                if test not in file["failed"] and test.partition("::")[2].partition("[")[0] not in slow:
                    self._note(test, found)
        self._failed = {test for file in kept["files"].values() for test in file["failed"]}

    def _note(self, test: str, found: Any) -> None:
        self.seconds[test] = found["seconds"]
        for module, lines in found["lines"].items():
            self._of_module.setdefault(module, []).append(test)
            for line in lines:
                self._tests.setdefault((module, line), []).append(test)

    def tests(self, module: str, *lines: int) -> list[str]:
        """Returns the tests that run the first of some lines that any runs, or all of the module."""
        today = {new: old for old, new in self._moved(module)}
        for line in lines:
            if found := self._tests.get((module, today.get(line, 0))):
                return found
        return self._of_module.get(module, [])

    def _moved(self, module: str) -> Iterator[tuple[int, int]]:
        old, new = self._texts.get(module, "").splitlines(), (ROOT / module).read_text().splitlines()
        for block in difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks():
            yield from ((block.a + at + 1, block.b + at + 1) for at in range(block.size))

    def failing(self) -> list[str]:
        """Returns the flags that leave out tests that fail without any change."""
        return [f"--deselect={test}" for test in sorted(self._failed)]
