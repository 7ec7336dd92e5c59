"""Casts on a CUDA device, for those who ask for it: `--device cuda`.

The one module of the streaming process that imports torch, inside `require_cuda` and nowhere else. A device can win
nothing but the cast itself: what is read lands in pinned memory at once (`preadv` into it), and what is written is
written from pinned memory; so a tile crosses the bus twice and is copied by nobody. Each worker has a stream of its own
and waits once a tile.

Bits and overflow counts are those of the CPU: the device looks for NaN, an infinity, or a value beyond the largest of
the target, and a tile with one is made again by the op itself. It casts the rest, which has one right answer.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from shardmerge.errors import UsageError
from shardmerge.ops.arrays import Array
from shardmerge.ops.casts import Cast

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


class DeviceCasts:
    """Casts of one worker, on a device of torch's.

    Parameters
    ----------
    torch
        The module.
    device
        ``cuda``; ``cpu`` makes the same steps without a stream and without pinned memory.
    """

    def __init__(self, torch: ModuleType, device: str = "cuda") -> None:
        self._torch = torch
        self._device = device
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    def buffer(self, nbytes: int) -> Array:
        """Returns memory that is read into and written from, pinned: the device copies from there by itself."""
        found: Array = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=self._stream is not None).numpy()
        return found

    def apply(self, op: Cast, tile: Array, out: Array) -> int:
        """Does what ``op.apply`` does."""
        names = {op.source.name, op.target.name}
        known = all(hasattr(self._torch, dtype.torch) for dtype in (op.source, op.target))
        if names & _ON_THE_CPU or not known or not tile.flags.writeable:  # a mapped window is no memory of torch's
            return op.apply(None, (tile,), 0, out)
        with self._streaming():
            there = self._tensor(tile).to(self._device, non_blocking=True).view(getattr(self._torch, op.source.torch))
            made, plain = cast_plain(self._torch, there, op)
            self._tensor(out).copy_(made.view(self._torch.uint8), non_blocking=True)
            sure = bool(plain)  # waits for all that the stream was given, the copy included
        return 0 if sure else op.apply(None, (tile,), 0, out)

    def _tensor(self, array: Array) -> Any:  # noqa: ANN401  # torch is not typed here
        return self._torch.from_numpy(array.view(np.uint8))

    def _streaming(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        found: AbstractContextManager[object] = self._torch.cuda.stream(self._stream)
        return found


def cuda_casts() -> DeviceCasts:
    """Returns the casts of one worker on the CUDA device; raises as ``require_cuda``."""
    return DeviceCasts(require_cuda())


def cast_plain(torch: ModuleType, values: Any, op: Cast) -> tuple[Any, Any]:  # noqa: ANN401  # torch is not typed here
    """Returns a tensor in the target type and, as a tensor too, whether that is what the CPU makes, bit by bit."""
    target = getattr(torch, op.target.torch)
    largest = values.float().abs().amax()  # NaN if one is NaN, and then not below anything
    return values.to(target), largest <= torch.finfo(target).max
