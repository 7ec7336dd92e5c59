"""Asks the installed transformers what it makes of a model, in a child process: of a finished directory, or of a plan.

The streaming process never imports torch or transformers; see ``load_check`` for what the child does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from shardmerge.errors import TargetError, UsageError, raise_all
from shardmerge.plan.value import Plan
from shardmerge.prepare.publishable import PARTIAL, Conditions, described
from shardmerge.shown import shown
from shardmerge.targets.agreement import INCOMPLETE, Described, LoadedKeys, loading_errors
from shardmerge.tensors import ReadSideFile

Check: TypeAlias = Literal["transformers"]
# Files that no ``from_pretrained`` looks for.
_OF_TRAINING = (".distcp", "/fp32.pt")
_PACKAGES = ("transformers", "torch", "accelerate")
_EXTRA = "pip install 'shardmerge[transformers]'"


@dataclass(frozen=True, slots=True)
class Answer:
    """What transformers says of a model.

    Attributes
    ----------
    version
        Of transformers; empty where it did not come to loading.
    keys
        The class, and the keys that are not as they should be.
    own_code
        The class, if it is code of the checkpoint, which is never executed.
    failed
        Why it does not load; empty if it does.
    """

    version: str = ""
    keys: LoadedKeys = field(default_factory=LoadedKeys)
    own_code: str = ""
    failed: str = ""

    def says(self) -> str:
        """Returns who answered: ``transformers 5.24.0 loads it as GPT2LMHeadModel``."""
        return f"transformers {self.version} loads it as {self.keys.kind}"


def ask(folder: str = "", given: str = "", python: str = sys.executable) -> Answer:
    """Asks the transformers of an environment.

    Parameters
    ----------
    folder
        A finished directory; empty for a plan.
    given
        The plan, as ``load_check.py`` reads it.
    python
        The interpreter of the environment.

    Raises
    ------
    UsageError
        ``no-transformers``: that environment lacks a package. ``cannot-check``: loading this class needs values.
    """
    return _answer(child(folder, given, python))


def child(folder: str, given: str, python: str) -> Mapping[str, object]:
    """Runs ``load_check.py`` in a process of its own and returns what it answers."""
    script = Path(__file__).with_name("load_check.py")
    done = subprocess.run(
        [python, str(script), *([folder] if folder else [])],
        input=given,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return {"failed": shown(last[0], 300)}
    found: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _answer(found: Mapping[str, object]) -> Answer:
    if lacks := found.get("lacks"):
        hint = _EXTRA if found.get("package") in _PACKAGES else "install it beside transformers, or leave the check out"
        raise UsageError("no-transformers", "asking transformers needs a package", found=str(lacks), hint=hint)
    if why := found.get("no_meta"):
        hint = "leave --check out, and try the result with `shardmerge verify OUT --load`"
        raise UsageError("cannot-check", "transformers needs this model's values to load it", found=str(why), hint=hint)
    keys = LoadedKeys(
        str(found.get("class", "")), *(_names(found.get(what)) for what in ("missing", "unexpected", "mismatched"))
    )
    text = {key: str(found.get(key, "")) for key in ("transformers", "own_code", "failed")}
    return Answer(text["transformers"], keys, text["own_code"], text["failed"])


def _names(value: object) -> tuple[str, ...]:
    return tuple(str(item) for item in value) if isinstance(value, list) else ()


def load_checked(plan: Plan, read: ReadSideFile, conditions: Conditions) -> Plan:
    """Returns the plan with what transformers says of every directory that it will write with a config.json.

    Raises
    ------
    TargetError
        ``does-not-load``; ``incomplete-model``, ``config-disagrees``: missing, unexpected or mismatched keys.
    UsageError
        ``no-effect``: no config.json is written. As ``ask``.
    """
    if any(shard.name.endswith(_OF_TRAINING) for shard in plan.shards):
        what = "transformers loads no checkpoint that is made for training to go on from"
        raise UsageError("no-effect", what, hint="leave --check out")
    directories = list(described(plan, read, conditions))
    if not directories:
        what = "there is nothing that transformers could load: no config.json is written beside the weights"
        raise UsageError("no-effect", what, hint="leave --check out")
    types = {tensor.stored: tensor.dtype.name for tensor in plan.tensors()}
    said = [_said(one, types, partial=conditions.partial) for one in directories]
    raise_all(error for one in said for error in one.problems)
    checks = tuple(one.check for one in said if one.check)
    return replace(plan, checks=checks, warnings=(*plan.warnings, *(text for one in said for text in one.warnings)))


@dataclass(frozen=True, slots=True)
class _Said:
    """What came of one directory: a line if all is well, what a user must know, what stops the run."""

    check: str = ""
    warnings: tuple[str, ...] = ()
    problems: tuple[TargetError, ...] = ()


def _said(one: Described, types: Mapping[str, str], *, partial: bool) -> _Said:
    if one.packed or "quantization_config" in one.config:
        return _Said(warnings=(f"--check: {one.where}: quantized weights are not checked with transformers",))
    tensors = {name: (types[name], shape) for name, shape in one.tensors.items()}
    answer = ask(given=json.dumps({"config": one.config, "tensors": tensors}))
    if answer.own_code:
        why = f"{answer.own_code} is code of the checkpoint, which is not executed: not checked"
        return _Said(warnings=(f"--check: {one.where}: {why}",))
    if answer.failed:
        return _Said(problems=(_does_not_load(one, answer),))
    wrong = loading_errors(one, answer.keys, answer.says())
    if not wrong:
        return _Said(f"{answer.says()}: 0 keys missing, unexpected or mismatched")
    wanted = [error for error in wrong if partial and error.code == INCOMPLETE]
    problems = tuple(error for error in wrong if error not in wanted)
    return _Said(warnings=tuple(f"{PARTIAL}: {error.what}" for error in wanted), problems=problems)


def _does_not_load(one: Described, answer: Answer) -> TargetError:
    return TargetError(
        "does-not-load",
        "transformers cannot load what would be written",
        where=one.where,
        found=answer.failed,
        hint="correct config.json, or leave --check out if another library, or another version, loads it",
    )
