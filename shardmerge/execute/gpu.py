"""Casts on a CUDA device, for those who ask for it: `--device cuda`.

The one module of the streaming process that imports torch, inside `require_cuda` and nowhere else. Bits and overflow
counts are those of the CPU: a chunk with NaN, an infinity, or a value beyond the largest of the target is made again by
the op itself. The device casts the rest, and those casts have one right answer.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from shardmerge.errors import UsageError
from shardmerge.ops.arrays import Array
from shardmerge.ops.casts import Cast

# Elements of a chunk: 1 MiB of float32. A worker has two pinned buffers of 8 bytes an element each way at most, so that
# one chunk is copied by the host while the device has the other.
_CHUNK = 256 << 10

# float64 is rounded once here and twice by torch.
_ON_THE_CPU = frozenset({"F64"})


def require_cuda() -> ModuleType:
    """Returns torch, with a CUDA device.

    Raises
    ------
    UsageError
        ``device-unavailable``.
    """
    try:
        import torch  # 200 MiB and more, for who asks for a device
    except ImportError as error:
        raise UsageError(
            "device-unavailable",
            "--device cuda needs torch, and it cannot be imported",
            found=str(error),
            hint="pip install 'shardmerge[torch]', or leave --device out",
        ) from error
    if not torch.cuda.is_available():
        raise UsageError(
            "device-unavailable",
            "torch sees no CUDA device",
            found=f"torch {torch.__version__}, built for CUDA {torch.version.cuda or '(none)'}",
            hint="leave --device out",
        )
    found: ModuleType = torch
    return found


class CudaCasts:
    """Casts of one worker: a stream of its own and two slots."""

    def __init__(self) -> None:
        self._torch = require_cuda()
        self._stream = self._torch.cuda.Stream()
        self._slots = (_Slot(self._torch), _Slot(self._torch))

    def apply(self, op: Cast, tile: Array, out: Array) -> int:
        """Does what ``op.apply`` does."""
        names = {op.source.name, op.target.name}
        if names & _ON_THE_CPU or not all(hasattr(self._torch, dtype.torch) for dtype in (op.source, op.target)):
            return op.apply(None, (tile,), 0, out)
        total = 0
        with self._torch.cuda.stream(self._stream):
            for number, low in enumerate(range(0, out.size, _CHUNK)):
                slot = self._slots[number % 2]
                total += slot.finish()
                slot.start(op, tile[low : low + _CHUNK], out[low : low + _CHUNK])
            return total + sum(slot.finish() for slot in self._slots)


class _Slot:
    """Pinned memory for a chunk each way, and what is under way in it."""

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._given, self._made = (torch.empty(4 * _CHUNK, dtype=torch.uint8, pin_memory=True) for _ in range(2))
        self._plain = torch.empty(1, dtype=torch.bool, pin_memory=True)
        self._event = torch.cuda.Event()
        self._pending: tuple[Cast, Array, Array] | None = None

    def start(self, op: Cast, tile: Array, out: Array) -> None:
        """Sends a chunk; nothing here waits for the device."""
        given = self._given[: tile.nbytes]
        np.copyto(given.numpy(), tile.view(np.uint8))
        there = given.to("cuda", non_blocking=True).view(getattr(self._torch, op.source.torch))
        made, plain = cast_plain(self._torch, there, op)
        self._made[: out.nbytes].copy_(made.view(self._torch.uint8), non_blocking=True)
        self._plain.copy_(plain.reshape(1), non_blocking=True)
        self._event.record()
        self._pending = (op, tile, out)

    def finish(self) -> int:
        """Waits for the chunk under way, if there is one, and hands it over; returns how many values overflowed."""
        if self._pending is None:
            return 0
        op, tile, out = self._pending
        self._pending = None
        self._event.synchronize()
        if not self._plain.item():
            return op.apply(None, (tile,), 0, out)
        np.copyto(out.view(np.uint8), self._made[: out.nbytes].numpy())
        return 0


def cast_plain(torch: ModuleType, values: Any, op: Cast) -> tuple[Any, Any]:  # noqa: ANN401  # torch is not typed here
    """Returns a tensor in the target type and, as a tensor too, whether that is what the CPU makes, bit by bit."""
    target = getattr(torch, op.target.torch)
    largest = values.float().abs().amax()  # NaN if one is NaN, and then not below anything
    return values.to(target), largest <= torch.finfo(target).max
