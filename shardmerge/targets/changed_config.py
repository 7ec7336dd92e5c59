"""A config.json that has to say something else than its file: what targets read, and what is written. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardmerge.targets.config_numbers import JsonObject, dump, load_object
from shardmerge.targets.expectation import Expectation
from shardmerge.tensors import Extent, ReadSideFile, SideFile


def changed_reader(changes: Mapping[Extent, JsonObject], read: ReadSideFile) -> ReadSideFile:
    """Returns a reader that gives the files in ``changes`` with those values over their own."""

    def changed(extent: Extent) -> bytes:
        if extent not in changes:
            return read(extent)
        return dump(load_object(extent, read) | changes[extent], sort=False)

    return changed if changes else read


def with_changes(expectation: Expectation, changes: Mapping[Extent, JsonObject], read: ReadSideFile) -> Expectation:
    """Returns the expectation with the changed text for every file that would be copied as it is."""
    files = tuple(
        SideFile(file.name, tuple(read(part) if isinstance(part, Extent) and part in changes else part
                                  for part in file.parts))
        for file in expectation.side_files
    )  # fmt: skip
    return replace(expectation, side_files=files) if changes else expectation
