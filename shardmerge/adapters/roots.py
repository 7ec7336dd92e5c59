"""Where the modules of an adapter begin in the names of a file: behind peft's prefix, and behind wrappers' words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from shardmerge.mapping.pattern import Template
from shardmerge.tensors import Catalog
from shardmerge.tensors.wrapped_names import ANYWHERE, IN_FRONT, without

# peft's own: the attribute of PeftModel, and that of the tuner in it.
PREFIX = "base_model.model."
# Of trl's model with a value head, of Lightning's module.
_AROUND = (*IN_FRONT, "pretrained_model.")

# A part of an adapter as it stands in a model, with the adapter's name; and what lies below one.
_KINDS = r".+\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)"
_LIVE = re.compile(rf"{_KINDS}\.(?!weight$|bias$)[^.]+(?:\.|$)|.+\.modules_to_save\.[^.]+(?:\.|$)")
_SAVED = re.compile(rf"{_KINDS}(?:\.weight)?")


def behind(catalog: Catalog, template: Template) -> dict[str, str]:
    """Returns the names of a file that a template takes, and what they are called behind all prefixes."""
    every = (*catalog.names(), *catalog.absent)
    rests = {name: found["rest"] for name in every if (found := template.match(name)) is not None}
    short = dict(_inside(tuple(rests.values()), said=template.text != "{rest...}"))
    return {name: short[rest] for name, rest in rests.items() if rest in short}


def _inside(names: Collection[str], *, said: bool) -> Iterator[tuple[str, str]]:
    """Yields the names that are those of modules, and what they are called behind all prefixes.

    Parameters
    ----------
    names
        Of a file, or what a template of the mapping leaves of them.
    said
        Whether that template says where the modules begin: then they need not stand behind peft's prefix.
    """
    clean = {name: name for name in names}
    for word in ANYWHERE:
        clean = {name: without(short, word) for name, short in clean.items()}
    root = _root(clean.values(), said=said)
    return ((name, short[len(root) :]) for name, short in clean.items() if short.startswith(root))


def _root(names: Collection[str], *, said: bool) -> str:
    """Returns what stands before every part of an adapter: peft's prefix, and words of wrappers in front of it."""
    parts = [name for name in names if _LIVE.match(name) or _SAVED.fullmatch(name)]
    front = _front(parts)
    bare = parts and not any(PREFIX in name for name in parts)
    live = any(_LIVE.match(name) for name in parts) or said
    return front if bare and live else front + PREFIX


def _front(parts: Collection[str]) -> str:
    found = ""
    while word := next((one for one in _AROUND if parts and all(name.startswith(found + one) for name in parts)), ""):
        found += word
    return found
