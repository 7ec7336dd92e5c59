"""A source as the mapping names it: opened, its prefix taken off, every entry marked with its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed, printable
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec
from shardmerge.prepare.options import Options
from shardmerge.prepare.shard_counts import settled
from shardmerge.prepare.unwrapping import renamed
from shardmerge.sources.completing import with_wrapper_note
from shardmerge.sources.deepspeed_files import VIEWS
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.open_options import OpenOptions
from shardmerge.sources.opening import open_catalog
from shardmerge.tensors import Catalog, of_source
from shardmerge.tensors.wrapped_names import common_prefix, stripped


def open_source(source: SourceSpec, folder: Path, options: Options) -> Catalog:
    """Returns the catalog of a source whose relative path is relative to ``folder``."""
    view = next((view for view in VIEWS if view == source.view), VIEWS[0])
    opening = OpenOptions(view=view, root=source.root, download=options.download)
    catalog = settled(open_catalog(_located(source.path, folder), opening))
    return _marked(_stripped(catalog, source), source.name)


def _marked(catalog: Catalog, name: str) -> Catalog:
    """Marks every entry once, instead of a copy of it for each use."""
    return replace(catalog, entries={key: of_source(entry, name) for key, entry in catalog.entries.items()})


def _stripped(catalog: Catalog, source: SourceSpec) -> Catalog:
    """Takes prefixes off names. One that a preset expects may be absent; one of the user's must be there."""
    usual = common_prefix(catalog.names(), source.usual)
    words = source.strip or ((usual,) if usual else ())
    if not words:
        return catalog
    names = {name: name for name in (*catalog.names(), *catalog.absent)}
    for word in words:
        taken = {name: stripped(short, (word,)) for name, short in names.items()}
        if taken == names or any(short.startswith(".") or not short for short in taken.values()):
            raise _odd_strip(source, word, list(names.values()))
        names = taken
    check_apart(names, source)
    note = f"{' and '.join(f'`{word}`' for word in words)} is taken off every name that has it"
    catalog = with_wrapper_note(renamed(catalog, names))
    return replace(catalog, notes=(*catalog.notes, note))


def check_apart(names: Mapping[str, str], source: SourceSpec) -> None:
    """Raises ``strip-makes-one`` where two names of a source would be one without their prefixes."""
    seen: dict[str, str] = {}
    for name, short in names.items():
        if short in seen:
            raise MappingError(
                "strip-makes-one",
                f"{_said(source)} gives two tensors the same name",
                where=str(source.mark),
                found=f"{printable(seen[short])} and {printable(name)}",
                expected=f"two names, and both become {printable(short)}",
            )
        seen[short] = name


def _odd_strip(source: SourceSpec, word: str, names: list[str]) -> MappingError:
    """Says what is wrong with a prefix that no name has, or that ends within a name's segment."""
    meant = _meant(word, names)
    has = any(name.startswith(word) for name in names)
    what = f"{word!r} ends before a dot" if has else f"no name of {source.name} begins with {word!r}"
    option = source.mark == COMMAND_LINE
    hint = "leave `strip` out, and write the prefix into the rules of the names that have it"
    if meant:
        hint = f"--strip {meant}" if option else f"strip: [{meant}]"
    elif option:
        hint = "leave --strip out: the names are as they should be, or begin with something else"
    return MappingError(
        "strip-matches-nothing",
        f"{what}, which {_said(source)} takes off",
        where=str(source.mark),
        found=listed(names, 3) if names else "no tensors at all",
        hint=hint,
    )


def _said(source: SourceSpec) -> str:
    return "--strip" if source.mark == COMMAND_LINE else f"`strip` of {source.name}"


def _meant(word: str, names: list[str]) -> str:
    """Returns the prefix that was meant by one without its dot, or with a wildcard; ``""`` where none is known."""
    prefix = f"{word.rstrip('*').rstrip('.')}."
    return prefix if prefix != word and any(name.startswith(prefix) for name in names) else ""


def _located(text: str, folder: Path) -> Path | str:
    """A path relative to the mapping if there is something, a hub id if it reads like one."""
    path = folder / Path(text).expanduser()
    return text if is_hub_id(text) and not path.exists() else path
