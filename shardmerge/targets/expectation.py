"""What a target promises, as a value: the planner checks the resolved mapping against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from shardmerge.tensors import Extent, Shape

# Targets open no files: whoever calls them passes the function that reads a side file's bytes.
ReadSideFile: TypeAlias = Callable[[Extent], bytes]


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file of the output directory.

    Attributes
    ----------
    name
        Base name, e.g. ``tokenizer.json``.
    parts
        Its content in order: bytes made here, or extents of source files copied as they are.
    """

    name: str
    parts: tuple[bytes | Extent, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """A part of the model, to say in one line what a hundred missing tensors have in common.

    Attributes
    ----------
    pattern
        The target names' common prefix, e.g. ``vision_tower.``.
    reason
        Why the checkpoint may lack it, or ``""``: "the checkpoint was trained with the visual encoder frozen".
    remedy
        What to add: "Add `vision: openai/clip-vit-large-patch14-336`".
    """

    prefix: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the finished directory must hold.

    Attributes
    ----------
    tensors
        Every target name with its final shape; nothing more and nothing less is written.
    grown
        Names whose source may have fewer rows (dim 0) than the final shape: new rows are the mean of the old ones.
    tied
        Names that are not written although a source may have them, with the name they are tied to.
    side_files
        config.json, tokenizer files and so on.
    components
        For the messages about missing tensors.
    warnings
        Things a user must see although nothing stops.
    """

    tensors: Mapping[str, Shape]
    grown: frozenset[str] = frozenset()
    tied: Mapping[str, str] = field(default_factory=dict)
    side_files: tuple[SideFile, ...] = ()
    components: tuple[Component, ...] = ()
    warnings: tuple[str, ...] = ()
