"""Words that wrappers of torch put into a model's names, and the mapping that takes them out again. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, count

# torch.compile (`OptimizedModule`), FSDP, and its activation checkpointing; none is ever a model's own attribute.
ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# DistributedDataParallel and DataParallel, and Lightning's strategies.
IN_FRONT = ("module.", "_forward_module.")

# Rules that a note has room for.
_MOST_RULES = 12
_MOST_HEADS = 2 * _MOST_RULES
_LETTERS = "ijk"
# Names that stand in YAML and in a template as they are.
_PLAIN = re.compile(r"[\w.-]+")
_FRONT = "|".join(re.escape(word) for word in IN_FRONT)
# Two wrappers at the most stand around a model; more is somebody's joke.
_FRONTS = rf"(?:{_FRONT}){{1,4}}"
_DIGITS = re.compile(r"(?<![^.])\d+(?=\.)")
_NUMBER = re.compile(r"\{(\w+)\}")


def holds(name: str, word: str) -> bool:
    """Tells whether a wrapper's word is one of a name's segments."""
    return name.startswith(word) or f".{word}" in name


def without(name: str, word: str) -> str:
    """Returns a name without a wrapper's word, wherever it stands."""
    return ("." + name).replace(f".{word}", ".")[1:]


def common_prefix(names: Iterable[str], prefixes: Sequence[str]) -> str:
    """Returns the first of some prefixes that every name has, ``""`` for none."""
    every = list(names)
    return next((one for one in prefixes if every and all(name.startswith(one) for name in every)), "")


def stripped(name: str, words: Iterable[str]) -> str:
    """Returns a name without words: torch's own wherever they stand, all others in front, one after the other."""
    for word in words:
        name = without(name, word) if word in ANYWHERE else name.removeprefix(word)
    return name


def unwrapped_names(names: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns each name without wrappers' words, which may make two of them one; and the words, in that order."""
    clean = {name: name for name in names}
    words = []
    for word in ANYWHERE:
        if any(holds(name, word) for name in names):
            clean = {name: without(short, word) for name, short in clean.items()}
            words.append(word)
    for front in _fronts(clean.values()):
        clean = {name: short.removeprefix(front) for name, short in clean.items()}
        words.append(front)
    return clean, tuple(words)


def unwrapping_rules(names: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the words of wrappers that names hold, and rules of a mapping that take them off all of them.

    No rules where there would be more than a note has room for, or where two names would become one. The source is
    called ``src`` in them.
    """
    clean, words = unwrapped_names(names)
    if not words or len(set(clean.values())) < len(clean) or not all(_PLAIN.fullmatch(name) for name in names):
        return words, ()
    common = _common_front(clean)
    pairs = [("{rest...}", f"src:{common}{{rest...}}")] if common else _rules(names, words)
    found: dict[str, dict[str, None]] = {}
    for target, source in pairs:
        found.setdefault(target, {})[source] = None
    rules = tuple(_written(target, tuple(sources)) for target, sources in found.items())
    return words, rules if 0 < len(rules) <= _MOST_RULES else ()


def _fronts(names: Collection[str]) -> tuple[str, ...]:
    """Returns the words that stand in front of all names, the first one first."""
    found = re.match(_FRONTS, min(names, default=""))
    words = re.findall(_FRONT, found[0]) if found else []
    while words and not all(name.startswith("".join(words)) for name in names):
        words.pop()
    return tuple(words)


def _written(target: str, sources: Sequence[str]) -> str:
    """Returns a line of YAML, where a brace begins no plain text; of several sources the first one that is there."""
    key = f'"{target}"' if target.startswith("{") else target
    quoted = ", ".join(f'"{one}"' for one in sources)
    return f"{key}: {sources[0]}" if len(sources) == 1 else f"{key}: [{quoted}]"


def _common_front(clean: dict[str, str]) -> str:
    """Returns what stands in front of all names, if nothing else was taken off any."""
    fronts = {name.removesuffix(short) if name.endswith(short) else "" for name, short in clean.items()}
    return fronts.pop() if len(fronts) == 1 else ""


def _rules(names: Collection[str], words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields a rule for all that lies under one wrapped module of every layer, and one for each module that is none."""
    ends = {name: _end_of_words(name) for name in names}
    heads = {_any_layer(name[:end]) for name, end in ends.items()}
    if len(heads) > _MOST_HEADS:
        return
    for name, end in ends.items():
        head = _any_layer(name[:end])
        inner = _unwrapped(name[:end], words)
        if inner and not any(other != head and other.startswith(head) for other in heads):
            yield _rule(name[:end], "{rest...}", words)
        else:  # one segment, so that it matches nothing below a wrapper further in
            yield _rule(name[: name.rfind(".") + 1], "{leaf}", words)


def _rule(head: str, tail: str, words: Sequence[str]) -> tuple[str, str]:
    variables = chain(_LETTERS, (f"n{number}" for number in count()))
    right = _DIGITS.sub(lambda _: f"{{{next(variables)}}}", head)
    left = _NUMBER.sub(r"{\1:int}", _unwrapped(right, words))
    return f"{left}{tail}", f"src:{right}{tail}"


def _unwrapped(head: str, words: Sequence[str]) -> str:
    for word in words:
        head = head.removeprefix(word) if word in IN_FRONT else without(head, word)
    return head


def _end_of_words(name: str) -> int:
    """Returns where a name goes on behind its last wrapper's word; 0 without one."""
    dotted = f".{name}"
    return max((dotted.rfind(f".{word}") + len(word) for word in ANYWHERE if holds(name, word)), default=0)


def _any_layer(head: str) -> str:
    return _DIGITS.sub("0", head)
