"""Hints in which there is nothing to do that a row could do: the code, words of the hint, and why."""

from __future__ import annotations

# Where the reason names a test, that test follows the hint with means that a row has not.
NOTHING_TO_DO: list[tuple[str, str, str]] = [
    ("unsafe-index", "do not use this checkpoint", "a warning of somebody hostile"),
    ("hostile-pickle", "do not open it with torch.load either", "a warning of somebody hostile"),
    ("internal-error", "SHARDMERGE_TRACEBACK=1", "a bug of ours is to be reported"),
    ("torch-tar", "with a torch of today", "no torch that can be installed writes such files"),
    ("adapter-setting", "no merge can do it", "the adapter is used with peft, and nothing is converted"),
    ("adapter-without-base", "run the adapter beside its base", "the adapter is used with peft"),
    ("kind-not-yet", "Megatron's tools/checkpoint/convert.py", "Megatron is no package that can be installed"),
    ("kind-not-yet", "Megatron's training command", "it takes the run's GPUs"),
    ("no-huggingface-hub", "pip install", "tests/test_hub.py::downloads, with the package installed"),
    ("bench-failed", "run `shardmerge convert`", "every other row does"),
]
