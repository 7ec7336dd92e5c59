"""What is added to a catalog of any format: side files, and what its names say of placeholders and wrappers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.errors import raise_all
from shardmerge.sources.choosing import tags_near
from shardmerge.sources.hf_folder import side_files
from shardmerge.sources.links import odd_links, steering_links
from shardmerge.sources.placeholders import without_placeholders
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import unwrapping_rules


def completed(catalog: Catalog, path: Path) -> Catalog:
    """Adds side files, checks links, and takes placeholders for what they are."""
    folder = path if path.is_dir() else path.parent
    stamps = (Path(stamp.path) for stamp in catalog.files)
    read = [file for file in stamps if file != path and file.is_relative_to(folder)]
    raise_all(odd_links([*read, *(steering_links(folder) if path.is_dir() else ())], folder))
    catalog = with_wrapper_note(replace(catalog, side_files=catalog.side_files or side_files(folder)))
    if catalog.kind.startswith("DeepSpeed"):  # its own tables say which of its tensors have no elements
        return catalog
    catalog = without_placeholders(catalog)
    return replace(catalog, elsewhere=tags_near(folder)) if catalog.absent else catalog


_WRAPPED = "the names are those of a wrapped model"


def with_wrapper_note(catalog: Catalog) -> Catalog:
    """Notes that the names, as they are now, are wrapped; not where config.json lies beside, which brings them back."""
    if "config.json" in catalog.side_files:
        return catalog
    catalog = replace(catalog, notes=tuple(note for note in catalog.notes if not note.startswith(_WRAPPED)))
    words, rules = unwrapping_rules([*catalog.names()])
    if not words:
        return catalog
    said = f"{_WRAPPED}: {', '.join(f'`{word}`' for word in words)}"
    lines = " and ".join(f"`{rule}`" for rule in rules)
    note = f"{said}; in a mapping, with this source as `src`, below `tensors:`: {lines}" if rules else said
    return replace(catalog, notes=(*catalog.notes, note))
