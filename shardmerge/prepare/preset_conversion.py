"""A conversion through a preset, without a mapping file: the mapping that is written for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shardmerge.errors import UsageError
from shardmerge.formulas import Formula
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.preset_files import Preset, load_preset
from shardmerge.mapping.spec import COMMAND_LINE, SourceSpec, Spec, Variable
from shardmerge.prepare.conversion import WrittenMapping


def through_preset(
    use: str, source: SourceSpec, bases: Mapping[str, str], let: Mapping[str, str], config: str = ""
) -> WrittenMapping:
    """Returns the mapping of a preset whose first required source is ``source``.

    Raises
    ------
    UsageError
        ``unknown-source``, ``unknown-value``: the preset has no such source or number. ``no-effect``: a preset's
        sources say where config.json comes from.
    """
    preset = load_preset(use)
    first = next(name for name, role in preset.roles.items() if role.required)
    others = [role for role in preset.roles if role != first]
    if config:
        what = f"--config is for conversions without --use: {use} takes config.json and tokenizer from its own sources"
        hint = " or ".join(f"--base {name}={config}" for name in others) or "leave --config out"
        raise UsageError("no-effect", what, hint=hint)
    sources = {first: replace(source, name=first)}
    for name, path in bases.items():
        if name not in preset.roles:
            what, hint = f"the preset {use} has no source {name!r}", did_you_mean(name, others)
            raise UsageError("unknown-source", what, expected=", ".join(others), hint=hint)
        sources[name] = SourceSpec(name, path, mark=COMMAND_LINE)
    return WrittenMapping(Spec(COMMAND_LINE.file, sources, None, use, None, (), (), _variables(let, preset)))


def _variables(let: Mapping[str, str], preset: Preset) -> dict[str, Variable]:
    found = {}
    for name, text in let.items():
        if name not in preset.variables:
            hint = did_you_mean(name, preset.variables) or f"leave --let {name}={text} out"
            raise UsageError("unknown-value", f"the preset {preset.name} has no number {name!r}", hint=hint)
        found[name] = Variable(Formula.parse(text, f"--let {name}"), COMMAND_LINE)
    return found
