"""The mapping that was written for a conversion, as the text of a file: ``--save-mapping``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from shardmerge.mapping.spec import COMMAND_LINE, OutputSpec, SourceSpec, Spec
from shardmerge.mapping.spec_text import spec_lines
from shardmerge.prepare.option_values import size
from shardmerge.prepare.options import Options, wanted_dtype
from shardmerge.prepare.proposing import relative
from shardmerge.prepare.trained_bases import TRAINING_CONFIG
from shardmerge.storage.listing import without_links
from shardmerge.targets.expectation import FileChoice


def mapping_text(spec: Spec, found: Spec, out: Path, options: Options, folder: Path, command: str) -> str:
    """Returns a mapping that will lie in ``folder``, to which its paths are relative.

    Parameters
    ----------
    spec, found
        The mapping that was written, and what it came to: with the bases that a training config names.
    out, options
        What else decides the result.
    command
        Where it comes from, for people.
    """
    own = {name: replace(one, path=relative(one.path, folder)) for name, one in spec.sources.items()}
    bases = {name: one for name, one in found.sources.items() if name not in own and _is_named(one)}
    written = replace(spec, sources={**own, **bases})
    title = (f"# {command}", "# `shardmerge run` makes the same bytes of this file.")
    lines = (*title, *spec_lines(written, _output(out, options, folder)))
    return "\n".join(lines) + "\n"


def _is_named(source: SourceSpec) -> bool:
    return source.mark == TRAINING_CONFIG


def _output(out: Path, options: Options, folder: Path) -> OutputSpec:
    place = out.expanduser()
    path = str(place) if out.is_absolute() or place.is_absolute() else os.path.relpath(place, without_links(folder))
    return OutputSpec(
        path,
        wanted_dtype(options),
        size(options.shard_size, "shard_size"),
        COMMAND_LINE,
        format=options.format,
        partial=options.partial,
        files=FileChoice(options.files) if options.files else None,
        root=options.root,
        optimizer=options.optimizer,
    )
