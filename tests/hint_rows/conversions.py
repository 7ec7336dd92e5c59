"""Options of a conversion without a mapping file: --strip and --config."""

from __future__ import annotations

import torch

from tests.following import Call, Row, argument
from tests.hint_rows.given import CONVERT, Follow, made, mapped, stored


def wrapped(call: Call) -> None:
    """Weights behind a prefix."""
    stored(call.folder / "run.safetensors", {"net.w": torch.ones(4)})


def without(option: str, words: str) -> Follow:
    """Leaves an option out, as the hint says in these words."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        place = call.args.index(option)
        del call.args[place : place + 2]

    return follow


def said(option: str) -> Follow:
    """Puts the option that the hint says in the place of another one."""

    def follow(call: Call) -> None:
        place = call.args.index(option)
        call.args[place : place + 2] = call.hint.split()

    return follow


ROWS = [
    Row(
        "--strip without the dot",
        made(wrapped, *CONVERT, "run.safetensors", "out", "--strip", "net"),
        "strip-matches-nothing",
        said("--strip"),
    ),
    Row(
        "a strip without the dot",
        mapped(
            'sources: {m: {path: run.safetensors, strip: net}}\noutput: out\ntensors: {"{rest...}": "m:{rest...}"}\n',
            before=wrapped,
        ),
        "strip-matches-nothing",
        lambda call: call.change("strip: net", call.hint),
    ),
    Row(
        "--strip of a prefix that is not there",
        (*CONVERT, "$llm", "out", "--strip", "module."),
        "strip-matches-nothing",
        without("--strip", "leave --strip out"),
    ),
    Row(
        "--config of the file itself",
        (*CONVERT, "$llm", "out", "--config", "$llm/config.json"),
        "missing-config",
        said("--config"),
    ),
    Row(
        "--config of a directory without one",
        made(
            lambda call: (call.folder / "deep/empty").mkdir(parents=True),
            *CONVERT,
            "$llm",
            "out",
            "--config",
            "deep/empty",
        ),
        "missing-config",
        argument("deep/empty", "$llm", "name the directory of the model"),
    ),
    Row(
        "--config with a preset that has a source for it",
        (*CONVERT, "$lora", "out", "--use", "peft/merge", "--config", "$base"),
        "no-effect",
        said("--config"),
    ),
    Row(
        "--config with a preset of one source",
        (*CONVERT, "$llm", "out", "--use", "llama/hf-to-torchtune", "--config", "$llm"),
        "no-effect",
        without("--config", "leave --config out"),
    ),
]
