"""Inputs of the rows: copies of checkpoints with something gone or changed, small files, mappings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import GOLDEN
from tests.following import RUN, Call, Follow, filled

ZERO = GOLDEN / "zero"
LAYOUTS = GOLDEN / "layouts"
CONVERT = ("convert", "--no-sync", "-q")
Given = Callable[[Call], Sequence[str]]


def mapped(text: str, *args: str, before: Callable[[Call], object] = str) -> Given:
    """A mapping below its first line, and a call; something may be made before."""

    def given(call: Call) -> Sequence[str]:
        before(call)
        call.write("shardmerge: 1\n" + filled(text, call.world))
        return args or RUN

    return given


def raw(text: str, *args: str) -> Given:
    """A mapping to the letter."""

    def given(call: Call) -> Sequence[str]:
        call.write(filled(text, call.world))
        return args or RUN

    return given


def copied(source: Path | str, *args: str, without: str = "", then: Callable[[Path], object] = str) -> Given:
    """A copy of a checkpoint as ``ck``, some of it put aside or changed, and a conversion of it, or another call."""

    def given(call: Call) -> Sequence[str]:
        shutil.copytree(call.world[source] if isinstance(source, str) else source, call.folder / "ck")
        if without:
            gone = [path for path in sorted((call.folder / "ck").rglob(without)) if path.is_file()]
            assert gone
            (call.folder / "aside").mkdir()
            for path in gone:
                shutil.move(path, call.folder / "aside")
        then(call.folder / "ck")
        return args if args and args[0] in ("run", "convert", "inspect", "plan") else [*CONVERT, "ck", "out", *args]

    return given


def made(make: Callable[[Call], object], *args: str) -> Given:
    """What a function makes, and a call."""

    def given(call: Call) -> Sequence[str]:
        make(call)
        return args or [*CONVERT, "ck", "out"]

    return given


def stored(path: Path, tensors: Mapping[str, torch.Tensor], **config: object) -> Path:
    """A file of tensors, safetensors or torch by its ending, with a config.json beside it if one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
    if config:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edited(name: str, **values: object) -> Callable[[Path], object]:
    """Sets keys of a JSON file of a folder; None takes a key away."""

    def do(folder: Path) -> None:
        path = folder / name
        config: dict[str, Any] = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return do


def truncated(name: str) -> Callable[[Path], object]:
    """Cuts a file short; the whole one lies aside."""

    def do(folder: Path) -> None:
        path = next(folder.rglob(name))
        aside = Path("aside")
        aside.mkdir(exist_ok=True)
        shutil.copy(path, aside)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size * 2 // 3)

    return do


def rewritten(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Changes what torch reads of files; the files as they were lie aside."""

    def do(folder: Path) -> None:
        aside = Path("aside")
        aside.mkdir(exist_ok=True)
        for path in sorted(folder.rglob(name)):
            shutil.copy(path, aside)
            state = torch.load(path, weights_only=False)
            change(state)
            torch.save(state, path)

    return do


def done_before(text: str, then: Callable[[Call], object], *args: str) -> Given:
    """A mapping that was carried out, something that happens, and a call."""

    def given(call: Call) -> Sequence[str]:
        call.args = list(mapped(text)(call))
        assert call.attempt() == ()
        then(call)
        return args

    return given


# --- what is done by hand ---


def back(folder: str = "ck") -> Callable[[Call], object]:
    """Brings what was put aside, in the place of what has its name, or into the folder."""

    def do(call: Call) -> None:
        for path in (call.folder / "aside").iterdir():
            there = next((call.folder / folder).rglob(path.name), call.folder / folder / path.name)
            shutil.copy(path, there)

    return do


def removed(*names: str) -> Callable[[Call], object]:
    """Removes files or directories."""

    def do(call: Call) -> None:
        for name in names:
            path = call.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def instead(old: str, new: str, words: str) -> Follow:
    """Names another checkpoint, as the hint asks for in these words."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        call.change(filled(old, call.world), filled(new, call.world))

    return follow


def told(words: str, old: str, new: str) -> Follow:
    """Changes the mapping or the call; what is put there is in the hint, or follows from its words."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        call.change(filled(old, call.world), filled(new, call.world))

    return follow


def config(name: str, words: str, **values: object) -> Follow:
    """Edits a JSON file as the hint says."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        edited(Path(name).name, **values)((call.folder / name).parent)

    return follow


def alone(args: str, words: str) -> Follow:
    """Calls another command, as the hint says, in place of the one that was refused."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        call.args = filled(args, call.world).split()

    return follow


def at_last(number: int = 0) -> Follow:
    """Passes one of the paths after `pass ` as the checkpoint."""

    def follow(call: Call) -> None:
        paths = call.hint.rpartition("pass ")[2].rpartition(": ")[2].removesuffix(" instead").split(" or ")
        path = paths[number].split(";")[0].strip()
        assert Path(path).exists(), call.hint
        call.change("ck", path) if "ck" in call.args else call.change(str(call.folder / "ck"), path)

    return follow


def without(*words: str) -> Follow:
    """Leaves arguments out, as the hint says."""

    def follow(call: Call) -> None:
        assert "out" in call.hint, call.hint
        for word in words:
            call.args.remove(word)

    return follow
