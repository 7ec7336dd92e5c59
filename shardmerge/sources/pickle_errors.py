"""What is wrong with a pickle: damaged, as a copy that was cut short is, or made to do harm."""

from __future__ import annotations

import struct

from shardmerge.errors import CheckpointError

AGAIN = "copy or download the file again; a checkpoint still being written looks like this too"
# What Python itself says while it reads, by the accident of the pickle that makes it.
ACCIDENTS: dict[type[Exception], str] = {
    IndexError: "it ends early, or takes a value that was never pushed",
    KeyError: "it refers to a memo entry that was never written",
    struct.error: "it ends inside a number",
}


def hostile(what: str, found: str = "", expected: str = "") -> CheckpointError:
    """Returns the error ``hostile-pickle``: an opcode, structure or size that no checkpoint needs."""
    hint = "the file is not a plain checkpoint; do not open it with torch.load either"
    return CheckpointError("hostile-pickle", what, found=found, expected=expected, hint=hint)


def damaged(what: str, found: str = "", expected: str = "") -> CheckpointError:
    """Returns the error ``damaged-pickle``: malformed or cut short."""
    return CheckpointError("damaged-pickle", what, found=found, expected=expected, hint=AGAIN)
