"""The pages of the presets, from the files they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from docs.markdown import code, link, table
from shardmerge.mapping.preset_files import Preset, list_presets, load_preset
from shardmerge.mapping.spec import OpTerm, Rule, Term
from shardmerge.ops.registry import OPS
from shardmerge.targets.registry import TARGETS

_LINE = 120


def preset_pages() -> dict[str, str]:
    """Returns every page of the presets by its path below docs/, the index included."""
    presets = [load_preset(name) for name in list_presets()]
    pages = {f"presets/{file_name(preset.name)}": _page(preset) for preset in presets}
    return {"presets/index.md": _index(presets), **pages}


def file_name(preset: str) -> str:
    """Returns the name of a preset's page."""
    return f"{preset.replace('/', '-')}.md"


def inverse_of(preset: str) -> str | None:
    """Returns the preset that goes the way back, by the names: a-to-b and b-to-a of one group."""
    group, _, name = preset.partition("/")
    start, arrow, end = name.partition("-to-")
    back = f"{group}/{end}-to-{start}"
    return back if arrow and back != preset and back in list_presets() else None


def _index(presets: list[Preset]) -> str:
    lines = [
        "# Presets",
        "",
        "A preset is a mapping that ships with shardmerge. `shardmerge presets list` lists them, and",
        "`shardmerge presets show NAME` prints one. To choose, see [Which layout, which preset](../guides/layouts.md).",
        "",
    ]
    for group, members in itertools.groupby(presets, lambda preset: preset.name.partition("/")[0]):
        lines += [
            f"## {group}",
            "",
            *table(("preset", "conversion", "target", "inverse"), map(_index_row, members)),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def _index_row(preset: Preset) -> tuple[str, ...]:
    back = inverse_of(preset.name)
    return (
        link(f"`{preset.name}`", file_name(preset.name)),
        preset.title,
        f"`{preset.target.name}`" if preset.target else "",
        link(f"`{back}`", file_name(back)) if back else "",
    )


def _page(preset: Preset) -> str:
    parts = [
        [f"# {preset.name}", "", f"**{preset.title}.** {preset.description}"],
        _way_back(preset),
        _use(preset),
        _sources(preset),
        _variables(preset),
        _target(preset),
        _adapters(preset),
        _rules(preset),
        _drops(preset),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _way_back(preset: Preset) -> list[str]:
    back = inverse_of(preset.name)
    return [f"The inverse is {link(f'`{back}`', file_name(back))}."] if back else []


def _use(preset: Preset) -> list[str]:
    first, others = _main_source(preset)
    options = [f"--use {preset.name}"]
    options += [f"--base {name}={name.upper()}" for name in others if preset.roles[name].required]
    options += [f"--let {name}=NUMBER" for name in _unsaid(preset)]
    lines = ["## Use it", "", "```console", f"$ shardmerge convert {first.upper()} OUT {' '.join(options)}", "```"]
    optional = [name for name in preset.roles if not preset.roles[name].required]
    if optional:
        lines += ["", f"Optional: {', '.join(f'`--base {name}={name.upper()}`' for name in optional)}."]
    lines += ["", "Or as a mapping:", "", "```yaml", "shardmerge: 1", "sources:"]
    lines += [
        f"  {name}: {name.upper()}{'' if role.required else '    # optional'}" for name, role in preset.roles.items()
    ]
    lines += ["output: OUT", f"use: {preset.name}"]
    lines += [f"let: {{{', '.join(f'{name}: NUMBER' for name in _unsaid(preset))}}}"] if _unsaid(preset) else []
    return [*lines, "```"]


def _main_source(preset: Preset) -> tuple[str, list[str]]:
    """The source that `convert` takes as its own, the first required one, and the others."""
    first = next(name for name, role in preset.roles.items() if role.required)
    return first, [name for name in preset.roles if name != first]


def _sources(preset: Preset) -> list[str]:
    rows = [
        (f"`{n}`", "yes" if role.required else "no", _about(role.about, role.strip)) for n, role in preset.roles.items()
    ]
    return ["## Sources", "", *table(("source", "required", "meaning"), rows)]


def _about(about: str, strip: Sequence[str]) -> str:
    prefixes = " or ".join(f"`{one}`" for one in strip)
    return f"{about}; the prefix {prefixes} is removed if all names have it" if strip else about


def _variables(preset: Preset) -> list[str]:
    rows = [(f"`{name}`", code(variable.formula.text)) for name, variable in preset.variables.items()]
    rows += [(f"`{name}`", "required") for name in _unsaid(preset)]
    if not rows:
        return []
    about = "Numbers that the rules use. To change one, use `let:` in a mapping, or `--let NAME=VALUE`."
    return ["## Variables", "", about, "", *table(("name", "value"), rows)]


def _unsaid(preset: Preset) -> list[str]:
    """Numbers that rules name and the preset leaves to the user."""
    found: dict[str, None] = {}
    for rule in preset.rules:
        known = {*preset.variables, *rule.target.captures, *rule.ranges}
        for term in rule.candidates:
            found |= dict.fromkeys(name for name in _names(term) if "." not in name and name not in known)
        found |= dict.fromkeys(
            n for f in rule.target.formulas for n in f.names if n not in known and n in preset.variables
        )
    return list(found)


def _names(term: Term) -> Iterator[str]:
    if isinstance(term, OpTerm):
        captured = {name for one in term.inputs if not isinstance(one, OpTerm) for name in one.template.captures}
        for argument in term.arguments.values():
            yield from (name for formula in argument.formulas for name in formula.names if name not in captured)
        for one in term.inputs:
            yield from _names(one)


def _target(preset: Preset) -> list[str]:
    if preset.target is None:
        return ["## Target", "", "None: a plain state dict, whose names and shapes are not checked against a config."]
    target = TARGETS[preset.target.name]
    said = ", ".join([f"name: {target.name}", *(f"{key}: {value}" for key, value in preset.target.roles.items())])
    lines = [
        "## Target",
        "",
        f"`{target.name}`: {target.about} The preset sets",
        "",
        "```yaml",
        f"target: {{{said}}}",
        "```",
    ]
    if target.options:
        lines += ["", "A `target:` in your mapping replaces this line. It can have these options:", ""]
        lines += table(("option", "meaning"), [(f"`{key}`", about) for key, about in target.options.items()])
    return lines


def _adapters(preset: Preset) -> list[str]:
    rows = [
        (code(f"{one.source.source}:{one.source.template}"), code(f"{one.onto.source}:{one.onto.template}"))
        for one in preset.adapters
    ]
    about = "Merged before the rules apply, if the source contains adapters."
    return ["## Adapters", "", about, "", *table(("from", "onto"), rows)] if rows else []


def _rules(preset: Preset) -> list[str]:
    head = "If there are several source names, the first one that exists is used."
    rows = [_rule(rule) for rule in preset.rules]
    return ["## Rules", "", head, "", *table(("target", "source"), rows)]


def _rule(rule: Rule) -> tuple[str, str]:
    ranges = "".join(f"<br>for {code(name)} from 0 to {code(f.text)} - 1" for name, f in rule.ranges.items())
    return code(rule.target.text) + ranges, "<br>else ".join(code(_term(term)) for term in rule.candidates)


def _term(term: Term) -> str:
    """An op as it is read: ``rotary_permute(tune:..., heads: heads)``."""
    if not isinstance(term, OpTerm):
        return f"{term.source}:{term.template}"
    inputs = [_term(one) for one in term.inputs]
    named = [f"{name}: {text}" for name, text in zip(term.kind.terms, inputs, strict=False)]
    shown = [*named, *inputs[len(named) :], *(f"{name}: {one.text}" for name, one in term.arguments.items())]
    return f"{term.kind.name}({', '.join(shown)})"


def _drops(preset: Preset) -> list[str]:
    rows = [f"- {code(f'{drop.source}:{drop.template}')}" for drop in preset.drops]
    ops = _ops(preset)
    used = ["", f"Ops used: {', '.join(link(f'`{name}`', f'../ops/{name}.md') for name in ops)}."] if ops else []
    return ["## Left out", "", *rows, *used] if rows else used[1:]


def _ops(preset: Preset) -> list[str]:
    def walk(term: Term) -> Iterator[str]:
        if isinstance(term, OpTerm):
            yield term.kind.name
            for one in term.inputs:
                yield from walk(one)

    used = {name for rule in preset.rules for term in rule.candidates for name in walk(term)}
    return [name for name in OPS if name in used]
