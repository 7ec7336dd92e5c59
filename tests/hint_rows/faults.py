"""What stands in the way of a run: disk, memory, devices, environments."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from unittest import mock

import torch

from shardmerge import api
from shardmerge.cli.main import cli
from tests.following import Call, Row, argument, by_hand
from tests.hint_rows.given import CONVERT, Given, copied, done_before, edited, made, stored, without
from tests.hint_rows.output import LLAMA
from tests.test_mistakes import GQA, REST

# --- what stands in the way ---


def mended(call: Call) -> None:
    """Ends the faults."""
    call.faults.close()


def faulty(patch: Callable[[], mock._patch], *args: str) -> Given:  # type: ignore[type-arg]
    return made(lambda call: call.faults.enter_context(patch()), *args)


def small_files(call: Call) -> None:
    """Lets the system refuse files of more than 4 KiB, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def any_files(call: Call) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def changing(call: Call) -> None:
    """Somebody writes to the source between plan and copy, once."""
    shutil.copytree(call.world["gqa"], call.folder / "ck")
    carry_out = api.carry_out

    def once(*args: object, **named: object) -> object:
        api.carry_out = carry_out
        os.utime(call.folder / "ck/model.safetensors")
        return carry_out(*args, **named)  # type: ignore[arg-type]

    api.carry_out = once  # type: ignore[assignment]


def planned(call: Call) -> None:
    """A plan that is written down."""
    shutil.copytree(call.world["gqa"], call.folder / "ck")
    call.write('shardmerge: 1\nsources: {m: ck}\noutput: {path: out}\ntensors: {"{rest...}": "m:{rest...}"}\n')
    _plan(call)


def _plan(call: Call) -> None:
    cli.main(["plan", "mapping.yaml", "--out", "plan.json"], standalone_mode=False)


def planned_before(call: Call) -> None:
    planned(call)
    os.utime(call.folder / "ck/model.safetensors")


def planned_elsewhere(call: Call) -> None:
    planned(call)
    (call.folder / "ck").rename(call.folder / "moved")


def huge(call: Call) -> None:
    """A safetensors file with an empty tensor that torch cannot make."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}).encode()
    (call.folder / "ck.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


FAULTS = [
    Row(
        "an output that is there",
        made(lambda call: stored(call.folder / "out/model.safetensors", {"w": torch.ones(1)}), *CONVERT, "$gqa", "out"),
        "output-exists",
        argument("out", "out2", "choose another path"),
    ),
    Row(
        "an output that is there, to be removed",
        made(lambda call: stored(call.folder / "out/model.safetensors", {"w": torch.ones(1)}), *CONVERT, "$gqa", "out"),
        "output-exists",
        by_hand("remove it first", lambda call: shutil.rmtree(call.folder / "out")),
    ),
    Row(
        "an output over its source",
        made(lambda call: shutil.copytree(call.world["gqa"], call.folder / "ck"), *CONVERT, "ck", "ck"),
        "output-is-source",
        lambda call: call.args.__setitem__(-1, "out"),
    ),
    Row(
        "a disk without room",
        faulty(lambda: mock.patch("shardmerge.publish.checks.free_bytes", return_value=0), *CONVERT, "$gqa", "out"),
        "disk-too-small",
        by_hand("free some space", mended),
    ),
    Row(
        "a disk that is full",
        made(small_files, *CONVERT, "$gqa", "out"),
        "disk-full",
        by_hand("raise the limit (ulimit -f)", any_files),
    ),
    Row(
        "a source that changes",
        made(changing, *CONVERT, "ck", "out"),
        "source-changed",
        by_hand("run again", lambda call: None),
    ),
    Row(
        "a source that changed after a plan was written",
        made(planned_before, "run", "plan.json", "--no-sync", "-q"),
        "source-changed",
        by_hand("shardmerge plan MAPPING --out PLAN", _plan),
    ),
    Row(
        "a source that was moved after a plan was written",
        made(planned_elsewhere, "run", "plan.json", "--no-sync", "-q"),
        "source-changed",
        by_hand(
            "--root OLD=NEW",
            lambda call: call.args.append(f"--root={call.folder / 'ck'}={call.folder / 'moved'}"),
        ),
    ),
    Row(
        "too little memory",
        (*CONVERT, "$gqa", "out", "--dtype", "f32", "--max-memory", "1MiB"),
        "memory-budget",
        lambda call: call.args.extend(call.hint.split()[2:]),
    ),
    Row(
        "a device without its library",
        faulty(
            lambda: mock.patch.dict(sys.modules, {"torch": None}),
            *CONVERT,
            "$gqa",
            "out",
            "--device",
            "cuda",
            "--dtype",
            "f32",
        ),
        "device-unavailable",
        lambda call: (mended(call), without("--device", "cuda")(call)),
    ),
    Row(
        "a device that is not there",
        faulty(
            lambda: mock.patch("torch.cuda.is_available", return_value=False),
            *CONVERT,
            "$gqa",
            "out",
            "--device",
            "cuda",
            "--dtype",
            "f32",
        ),
        "device-unavailable",
        lambda call: (mended(call), without("--device", "cuda")(call)),
    ),
    Row(
        "a header that is too large",
        faulty(lambda: mock.patch("shardmerge.plan.shards._LARGEST_HEADER", 4096), *CONVERT, "$clip", "out"),
        "header-too-large",
        lambda call: call.args.extend([call.hint.split()[-1], "20KB"]),
    ),
    Row(
        "a shape that torch cannot hold",
        made(huge, *CONVERT, "ck.safetensors", "out", "--format", "bin"),
        "shape-too-large",
        argument("bin", "safetensors", "write safetensors"),
    ),
]


def hidden(call: Call) -> None:
    """An environment whose transformers cannot be found, for the child that loads the model."""
    (call.folder / "hidden/transformers").mkdir(parents=True)
    (call.folder / "hidden/transformers/__init__.py").write_text(
        "raise ModuleNotFoundError('No module named transformers', name='transformers')"
    )
    call.faults.enter_context(mock.patch.dict(os.environ, {"PYTHONPATH": str(call.folder / "hidden")}))


ENVIRONMENT = [
    Row(
        "a check of what is no model",
        (*CONVERT, "$mixed", "out", "--check", "transformers"),
        "no-effect",
        without("--check", "transformers"),
    ),
    Row(
        "a config that transformers does not take",
        copied("gqa", "--check", "transformers", then=edited("config.json", hidden_act="nonsense")),
        "does-not-load",
        without("--check", "transformers"),
    ),
    Row(
        "an environment without transformers",
        done_before(LLAMA + GQA + REST, hidden, "verify", "out", "--load", "-q"),
        "no-transformers",
        by_hand("pip install 'shardmerge[transformers]'", mended),
    ),
    Row(
        "a benchmark of next to nothing",
        ("bench", "--size", "1KB", "--rounds", "1"),
        "bad-size",
        lambda call: call.args.extend(call.hint.replace(",", "").split()[:2]),
    ),
    Row(
        "a benchmark of more than the disk",
        ("bench", "--size", "999TB", "--rounds", "1"),
        "disk-too-small",
        argument("999TB", "17MiB", "a smaller --size"),
    ),
]


ROWS = [*FAULTS, *ENVIRONMENT]
