"""What a message quotes of a file is cut and cannot steer a terminal: escapes, line breaks, marks of direction."""

from __future__ import annotations

import json
import logging
import re

import click
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.cli import colour as painting
from shardmerge.cli.failing import failed
from shardmerge.cli.main import cli
from shardmerge.errors import LONGEST_LINE, CheckpointError, Problems, ShardmergeError, escaped, plain
from shardmerge.system_errors import tell
from tests.attacks.seeds import ENTRY, WEIGHTS, safetensors

EVIL = "\x1b[31mred\x1b[0m\nerror: forged [fine]\r\x07\u202eevil\u2066\ud800"


def is_harmless(text):
    """Lines of printable characters, none too long."""
    return all(line.isprintable() and len(line) <= LONGEST_LINE + 100 for line in text.split("\n"))


@given(text=st.text(max_size=60), times=st.sampled_from((1, 300)))
def test_a_line_is_printable_and_bounded(text, times):
    shown = plain(text * times)
    assert is_harmless(shown)
    assert all(line.startswith("    ") for line in shown.split("\n")[1:])
    assert len(text) > 60 or plain(text) == escaped(text) or "\n    " in text
    if text.isprintable():
        assert plain(text) == text


def test_every_field_of_an_error():
    one = CheckpointError("damaged-header", EVIL, where=EVIL, found=EVIL * 500, expected=EVIL, hint=EVIL)
    for error in (one, Problems([one, one])):
        assert is_harmless(str(error))
        assert "\n".join(error.lines()) == str(error)
    assert len(one.lines()) == 5
    assert one.lines()[0] == (r"\x1b[31mred\x1b[0m\nerror: forged [fine]\r\x07\u202eevil\u2066\ud800 [damaged-header]")
    assert one.fields()["what"] == EVIL  # JSON escapes by itself, and a script compares


def test_the_log(caplog):
    with caplog.at_level(logging.WARNING, "shardmerge"):
        tell(OSError(5, "Input/output error", EVIL), 1.0)
    assert is_harmless(caplog.messages[0])


@pytest.mark.parametrize("colour", ["never", "always"])
def test_what_is_echoed(colour, capsys):
    """Of what is no error, a plan or an explanation, the same; our own bold stays."""
    painting.choose(colour)
    painting.echo(f"w\x1b[2J\r\n\u202ev {painting.bold('head')}")
    painting.choose("auto")
    head = "\x1b[1mhead\x1b[0m" if colour == "always" else "head"
    assert capsys.readouterr().out == r"w\x1b[2J\r" + "\n" + rf"\u202ev {head}" + "\n"


def _files(folder):
    name = EVIL.replace("\ud800", "")
    torch.save({name: torch.ones(2), "b" * 4000: torch.ones(1)}, folder / "model.pth")
    torch.save({name: torch.ones(2).to_sparse()}, folder / "sparse.pth")
    direction = {"\u202eevil": ENTRY, "x" * 3000: {**ENTRY, "data_offsets": [4, 8]}}
    (folder / "names.safetensors").write_bytes(safetensors(direction, b"\0" * 8))
    (folder / "bad.safetensors").write_bytes(safetensors({name: ENTRY}))
    (folder / "dtype.safetensors").write_bytes(safetensors({"w": {**ENTRY, "dtype": name * 99}}))
    index = folder / "index"
    index.mkdir()
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name * 99}}))
    config = folder / "config"
    config.mkdir()
    (config / "model.safetensors").write_bytes(WEIGHTS)
    (config / "config.json").write_text(json.dumps({name: {"vocab_size": name}, "model_type": name}))
    (folder / "mapping.yaml").write_text(f"shardmerge: 1\n{json.dumps(name)}: 1\n")
    odd = folder / f"odd{name}"
    odd.mkdir()
    (odd / "model.pth").write_bytes(b"x")
    return ["model.pth", "sparse.pth", "names.safetensors", "bad.safetensors", "dtype.safetensors", "index", "config",
            odd.name]  # fmt: skip


@pytest.mark.parametrize("colour", ["never", "always"])
def test_nothing_of_a_file_reaches_the_terminal(colour, tmp_path, capfdbinary):
    said = []
    made = _files(tmp_path)
    commands = [["inspect", str(tmp_path / name), *more] for name in made for more in ([], ["--flat"])]
    commands += [["convert", str(tmp_path / name), str(tmp_path / "out"), "--dry-run"] for name in made]
    commands += [["plan", str(tmp_path / "mapping.yaml")]]
    for command in commands:
        try:
            cli.main(["--color", colour, *command], standalone_mode=False)
        except (ShardmergeError, click.ClickException) as error:
            failed(error)
        said.append("".join(text.decode() for text in capfdbinary.readouterr()))
    painting.choose("auto")
    own = re.compile(r"\x1b\[(0|1|1;3[1236]|32)m")
    for command, text in zip(commands, said, strict=True):
        shown = own.sub("", text) if colour == "always" else text
        assert all(line.isprintable() for line in shown.split("\n")), (command, shown)
        assert not re.search("^error: forged", shown, re.MULTILINE), command
