"""Reads pickles without running them: an opcode interpreter over inert values.

Nothing is imported, looked up or called. A class or function that a pickle names becomes a ``Global``, what it would
build becomes an ``Opaque`` record, and only the few constructors that torch checkpoints need (``OrderedDict``,
``torch.Size``, ``_rebuild_tensor_v2``, ...) become values of our own. An allow-list on ``pickle.Unpickler`` is no such
boundary: BUILD still changes whatever object the list let through.
"""

from __future__ import annotations

import struct

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_errors import ACCIDENTS, AGAIN
from shardmerge.sources.pickle_machine import Machine
from shardmerge.sources.pickle_values import Parsed, PickleValue


def interpret(
    data: bytes | memoryview, *, where: str, legacy: bool = False, allow_trailing: bool = False, base: int = 0
) -> PickleValue:
    """Returns the value of a pickle.

    Parameters
    ----------
    data
        The pickle, protocol 2 to 5.
    where
        The file, for errors.
    legacy
        Storages are named by the six fields of torch before 1.6.
    allow_trailing
        Bytes may follow the pickle.
    base
        Offset of ``data`` in the file, in bytes, for errors.

    Raises
    ------
    CheckpointError
        ``hostile-pickle``: an opcode, structure or size that no checkpoint needs. ``damaged-pickle``:
        malformed or cut short.
    """
    parsed = interpret_at(data, 0, where=where, legacy=legacy, base=base)
    if parsed.end != len(data) and not allow_trailing:
        raise CheckpointError(
            "hostile-pickle",
            "bytes follow the end of the pickle",
            where=f"{where}, byte {base + parsed.end}",
            found=f"{len(data) - parsed.end} more bytes",
        )
    return parsed.value


def interpret_at(data: bytes | memoryview, start: int, *, where: str, legacy: bool = False, base: int = 0) -> Parsed:
    """Returns the pickle that begins at ``data[start]``, with its end and storages; see ``interpret``."""
    machine = Machine(bytes(data), start, legacy)
    try:
        machine.run()
        value = machine.result()
    except CheckpointError as error:
        error.where = f"{where}, byte {base + machine.op}"
        raise
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise CheckpointError(
            "damaged-pickle",
            f"the pickle is malformed: {ACCIDENTS.get(type(error), 'a bad name or text')}",
            where=f"{where}, byte {base + machine.op}",
            hint=AGAIN,
        ) from error
    return Parsed(value, machine.pos, machine.storages)
