"""A signal ends a command cleanly, and once, whatever becomes of the exception that it raises.

Python raises it wherever the program is. In the middle of an import it may come out as an ``ImportError``, with a
traceback on stderr where C code imports numpy (``import_array``; here that of ml_dtypes does). In a finalizer, or in
what Python calls when a lock of its imports goes, it is dropped.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from shardmerge.errors import InterruptedRunError, PublishedError
from shardmerge.signals import STOPS

# How long Python has to leave what drops the exception, in seconds. Raised at once it would be dropped again.
_LATER = 0.01

_heard: list[int] = []


def listen() -> None:
    """Makes every signal that stops a run raise ``KeyboardInterrupt``, but for those ignored, as nohup has it."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _dropped


def listen_no_more() -> None:
    """Ignores them from here on: what is left is to end, and Python would answer with a traceback."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def cause_of(error: BaseException) -> BaseException:
    """Returns what ended the command: the signal, if there was one, unless the error knows of it or is of later."""
    known = isinstance(error, InterruptedRunError | PublishedError)
    return error if known or not _heard else KeyboardInterrupt()


def _stop(signum: int, frame: FrameType | None) -> None:
    """The same clean stop for all, and once: Slurm says it twice, and a second one would end the ending."""
    if _arrays_begin():
        _raise_later()
        return
    listen_no_more()
    _heard.append(signum)
    raise KeyboardInterrupt


def _dropped(what: sys.UnraisableHookArgs) -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
        _raise_later()
    else:
        sys.__unraisablehook__(what)


def _raise_later() -> None:
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, _LATER)


def _arrays_begin() -> bool:
    """Tells whether ml_dtypes, and with it numpy, is being imported, as Python's own imports tell it."""
    return bool(getattr(getattr(sys.modules.get("ml_dtypes"), "__spec__", None), "_initializing", False))
