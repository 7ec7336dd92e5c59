"""The target ``hf/llava-next``: a directory that ``LlavaNextForConditionalGeneration.from_pretrained`` loads."""

from __future__ import annotations

from shardmerge.targets import training_run
from shardmerge.targets.bases import ROLES
from shardmerge.targets.expectation import Expectation, Request, Target
from shardmerge.targets.llava import expect_kind
from shardmerge.targets.llava_kinds import NEXT
from shardmerge.targets.llava_model import OPTIONS


def expect(request: Request) -> Expectation:
    """Returns what the finished LLaVA-NeXT directory must hold.

    Raises
    ------
    TargetError
        As ``hf/llava``.
    """
    return expect_kind(request, NEXT)


TARGET = Target(
    name="hf/llava-next",
    about="A LLaVA 1.6 (NeXT) for transformers: `LlavaNextForConditionalGeneration.from_pretrained` loads it.",
    roles=ROLES | training_run.ROLES,
    options=OPTIONS,
    expect=expect,
)
