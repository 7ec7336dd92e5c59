"""The way back: a mapping that makes, of what another mapping made, one of the sources again. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.errors import MappingError, UsageError, raise_all
from shardmerge.inverse.text import made_name, mapping_lines
from shardmerge.inverse.undoing import AT_HAND, Undoing
from shardmerge.inverse.way_back import Forward, check_way_back
from shardmerge.mapping.narrower import is_narrower
from shardmerge.mapping.near import did_you_mean, listed
from shardmerge.mapping.spec import Spec, references


def invert_spec(spec: Spec, source: str = "", forward: Forward | None = None) -> str:
    """Returns the mapping that leads back, as YAML with comments.

    Parameters
    ----------
    spec
        A mapping, its preset combined with it.
    source
        The source to get back; empty for the first. What comes from others is dropped by name.
    forward
        What the mapping came to, if its sources are at hand. The way back is then checked against it: it brings back
        every tensor of the source that was used, and no other.

    Raises
    ------
    MappingError
        ``no-inverse``: one for every rule that has none, with the reason.
    UsageError
        ``unknown-source``.
    """
    source = source or next(iter(spec.sources))
    if source not in spec.sources:
        hint = did_you_mean(source, spec.sources)
        raise UsageError("unknown-source", f"there is no source `{source}`", where=spec.file, hint=hint)
    back = Undoing(source)
    if forward is None:
        raise_all(_overlapping(spec))
        for rule in spec.rules:
            back.rule(rule)
    elif source in forward.catalogs:
        for rule, term in forward.taken(source):
            back.candidate(rule, term)
    back.finish()
    if forward is not None:
        back.cut_off(forward)
    raise_all([*back.problems, *_merged(spec, source, forward)])
    if not back.rules:
        what = f"no rule takes anything from `{source}` alone"
        other = next((r.source for rule in spec.rules for one in rule.candidates for r in references(one)), "")
        hint = f"get back another one: `--source {other}`" if other else ""
        raise MappingError("no-inverse", what, where=spec.file, hint=hint)
    text = "\n".join(mapping_lines(spec, back, forward)) + "\n"
    if forward is not None:
        check_way_back(text, forward, source, made_name(spec, back))
    return text


def _overlapping(spec: Spec) -> Iterator[MappingError]:
    """Of two rules for a name the narrower one makes it if it can, and that is not known without the sources."""
    wide = [rule for rule in spec.rules if rule.target.captures]
    for rule in wide:
        if rule.rest or any(is_narrower(one.target, rule.target) for one in spec.rules):
            what = f"what is left to the rule for `{rule.target}` is only known with the sources at hand"
            yield MappingError("no-inverse", what, where=str(rule.mark), hint=AT_HAND)


def _merged(spec: Spec, source: str, forward: Forward | None) -> Iterator[MappingError]:
    what = "an adapter that is merged into its base cannot be taken out again"
    for adapter in spec.adapters:
        if not adapter.optional:
            yield MappingError("no-inverse", what, where=str(adapter.mark))
            return
    names = forward.merged(source) if forward is not None and source in forward.catalogs else []
    if names:
        yield MappingError("no-inverse", what, where=spec.file, found=f"{source}: {listed(names)}")
