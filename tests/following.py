"""A call that is refused, and how its hint is followed: what to do is taken from the hint itself, word for word."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from shardmerge.cli.main import cli
from shardmerge.errors import ShardmergeError

RUN = ("run", "mapping.yaml", "--no-sync", "-q")


@dataclass
class Call:
    """A call of the command line in a folder of its own.

    Attributes
    ----------
    folder, world
        The current directory, and checkpoints by name.
    args
        What is called; changed by whoever follows a hint.
    hint
        Of the error.
    faults
        What is broken on purpose, until a hint is followed that mends it.
    """

    folder: Path
    world: Mapping[str, Path]
    args: list[str] = field(default_factory=list)
    hint: str = ""
    faults: ExitStack = field(default_factory=ExitStack)

    @property
    def mapping(self) -> str:
        """The text of mapping.yaml."""
        return (self.folder / "mapping.yaml").read_text()

    def write(self, text: str) -> None:
        (self.folder / "mapping.yaml").write_text(text)

    def change(self, old: str, new: str) -> None:
        """Changes the mapping, or the arguments where there is none that has the words."""
        if (self.folder / "mapping.yaml").is_file() and old in self.mapping:
            self.write(self.mapping.replace(old, new))
            return
        assert any(old in one for one in self.args), (old, self.args)
        self.args = [one.replace(old, new) for one in self.args]

    def add(self, text: str) -> None:
        """Pastes lines at the end of the mapping."""
        self.write(f"{self.mapping}{text}\n")

    def ticked(self) -> list[str]:
        """What the hint has in backticks."""
        return re.findall(r"`([^`]+)`", self.hint)

    def attempt(self) -> tuple[ShardmergeError, ...]:
        """Calls; returns the errors, none where it worked."""
        try:
            cli.main([str(one) for one in self.args], standalone_mode=False)
        except ShardmergeError as error:
            return error.each()
        except SystemExit as end:  # `diff` says with its exit code whether two checkpoints differ
            if end.code not in (0, 3):
                raise
        return ()


Follow: TypeAlias = Callable[[Call], object]
Given: TypeAlias = "str | Sequence[str] | Callable[[Call], Sequence[str]]"


@dataclass(frozen=True)
class Row:
    """A mistake whose hint is followed.

    Attributes
    ----------
    about
        What the user did.
    given
        The mapping below its first line, arguments, or what makes files and returns arguments. ``$name`` is a
        checkpoint of the world.
    code
        Of the error.
    follow
        Does what the hint says.
    then
        The codes of the next errors, other ones; empty where it works.
    words
        Of the hint, where several errors have the code.
    """

    about: str
    given: Given
    code: str
    follow: Follow
    then: str = ""
    words: str = ""


def filled(text: str, world: Mapping[str, Path]) -> str:
    """Puts the paths in; longer names first, so that `$lora` does not take a part of another."""
    for name in sorted(world, key=len, reverse=True):
        text = text.replace(f"${name}", str(world[name]))
    return text


def begin(row: Row, folder: Path, world: Mapping[str, Path]) -> Call:
    """Returns the call that a row describes."""
    call = Call(folder, world)
    if isinstance(row.given, str):
        call.write("shardmerge: 1\n" + filled(row.given, world))
        call.args = list(RUN)
    else:
        given = row.given(call) if callable(row.given) else row.given
        call.args = [filled(one, world) for one in given]
    return call


# --- ways to follow a hint ---


def under(section: str) -> Follow:
    """Pastes the lines that the hint has in backticks under a key."""
    return lambda call: call.add(f"{section}:\n" + "\n".join(f"  {one}" for one in call.ticked() if one[:2] == "- "))


def said(wrong: str) -> Follow:
    """Puts the first word in backticks in the place of the wrong one."""
    return lambda call: call.change(wrong, call.ticked()[0])


def pasted(call: Call) -> None:
    """Adds the first line in backticks to the mapping."""
    call.add(call.ticked()[0])


def argument(old: str, new: str, words: str) -> Follow:
    """Gives another argument, or none for an empty one, as the hint says in these words."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        assert old in call.args, call.args
        place = call.args.index(old)
        call.args[place : place + 1] = [filled(one, call.world) for one in new.split()]

    return follow


def ran(call: Call) -> None:
    """Runs the command of shardmerge that the hint has in backticks."""
    command = next(one for one in call.ticked() if one.startswith("shardmerge ")).replace("MAPPING", "mapping.yaml")
    call.args = shlex.split(command)[1:]


def near(wrong: str) -> Follow:
    """Takes the first of the near names."""
    return lambda call: call.change(wrong, re.split(r"[, ]+", call.hint.partition("near names: ")[2])[0])


def change(old: str, new: str, *words: str) -> Follow:
    """Changes something as the hint says in these words; all that is new stands in the hint unless words are given."""

    def follow(call: Call) -> None:
        for word in words or (new,):
            assert word in call.hint, (word, call.hint)
        call.change(old, filled(new, call.world))

    return follow


def by_hand(words: str, do: Callable[[Call], object]) -> Follow:
    """Does outside of shardmerge what the hint asks for in these words."""

    def follow(call: Call) -> None:
        assert words in call.hint, (words, call.hint)
        do(call)

    return follow


def option(*more: str, words: str = "") -> Follow:
    """Adds options; they, or the words, stand in the hint."""

    def follow(call: Call) -> None:
        assert (words or more[0]) in call.hint, call.hint
        call.args += [filled(one, call.world) for one in more]

    return follow
