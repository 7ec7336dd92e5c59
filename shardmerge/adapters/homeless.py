"""Weights of an adapter that its base does not have: what is the matter, and what leads on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from shlex import quote

from shardmerge.adapters.fit import Fit, wanted
from shardmerge.adapters.names import Places
from shardmerge.adapters.parts import AdapterTensors
from shardmerge.adapters.search import head_of, renamings
from shardmerge.errors import MappingError
from shardmerge.mapping.near import NameIndex, count, listed
from shardmerge.mapping.renaming import Renamings, line, renamed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.tensors.file_roles import CONFIG

_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.")
# One tensor for all experts of a layer, as transformers 5 holds them in memory and others on disk.
_FUSED = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")


def without_base(
    spec: AdapterSpec, names: Sequence[str], places: Places, parts: AdapterTensors, saved: Sequence[str]
) -> Iterator[MappingError]:
    """Yields the errors for weights of an adapter that its base does not have."""
    new = [name for name in names if any(f".{one}." in f".{name}" for one in saved)]
    if new:
        yield _new_module(spec, new)
    names = [name for name in names if name not in new]
    if not names:
        return
    source, onto = spec.source.source, spec.onto.source
    what = f"{count(len(names), 'adapter module')} of {source} without a tensor in {onto}: {listed(names, 3)}"
    first = places.name(names[0])
    found = _near(names[0], places)
    if places.ways:
        what = f"the names of {source} fit those of {onto} in {count(len(places.ways), 'way')}"
        found = [places.spec.onto.template.format({"rest": renamed(names[0], one)}) for one in places.ways]
    elif fused := _fused(names, places):
        what, found = f"{what}, which has the experts fused: one tensor for all of a layer", fused
    yield MappingError(
        "adapter-names" if places.ways else "adapter-without-base",
        what,
        where=str(spec.mark),
        expected=f"{onto}:{first}",
        found=f"names such as {', '.join(found)}" if found else "no such names",
        hint=_way(spec, names, wanted(parts), places),
    )


def idle_renames(spec: AdapterSpec, parts: AdapterTensors) -> Iterator[MappingError]:
    """Yields an error for a ``rename:`` of the mapping that no name of the adapter matches."""
    names = [*(f"{module}.weight" for module in parts.modules), *parts.whole]
    for rule in spec.renames:
        if not any(rule.old.match(name) for name in names):
            yield MappingError(
                "unused-rename",
                f"no module of {spec.source.source} is called `{rule.old}`",
                where=str(spec.mark),
                found=listed(names, 2),
                hint="write the names as `found` has them, without `base_model.model.`",
            )


def _new_module(spec: AdapterSpec, names: Sequence[str]) -> MappingError:
    return MappingError(
        "adapter-new-module",
        f"{spec.source.source} trained a module that {spec.onto.source} does not have: {listed(names, 3)}",
        where=str(spec.mark),
        expected="modules_to_save that are in the base",
        hint="name as the base a model with that module, as transformers makes it: "
        "AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=N).save_pretrained(NEW_BASE)",
    )


def _near(name: str, places: Places) -> list[str]:
    """Returns the base's names that end like a name does, and those that look like it."""
    tail = name[len(head_of(name)) :].lstrip(".")
    same = [one for one in places.base.names() if one == tail or one.endswith(f".{tail}")]
    return same[:3] or NameIndex(places.base.names()).near(places.name(name))


def _fused(names: Sequence[str], places: Places) -> list[str]:
    """Returns the tensors of fused experts that the base has where the adapter has single ones."""
    layers = {found["experts"] for name in names if (found := _EXPERT.match(name)) is not None}
    return [place for layer in sorted(layers) for one in _FUSED if (place := places.find(f"{layer}.{one}"))][:3]


def _way(spec: AdapterSpec, names: Sequence[str], fits: Mapping[str, Fit], places: Places) -> str:
    """Returns what leads on: the lines that rename, or what to name as the base."""
    onto = spec.onto.source
    if places.ways:
        lines = " or ".join(f"`{line(one)}`" for one in places.ways[:4])
        return f"say which one is meant, in the adapter's line under `adapters:`: {lines}"
    if _fused(names, places):
        command = f"shardmerge convert {quote(places.base.path)} SPLIT --use hf/to-4.51"
        split = f"split them first, by `{command}`, and " if CONFIG in places.base.side_files else ""
        return f"{split}name as `{onto}` the model with a tensor for each expert, as transformers before 5 saves it"
    if spec.renames:
        return f"correct the line under `rename:` to names of {onto}"
    if rules := _proposed(names, fits, places):
        return f"if they are the same modules under other names, say so under `adapters:`: `{line(rules)}`"
    return f"name as `{onto}` the model that the adapter was trained on"


def _proposed(names: Sequence[str], fits: Mapping[str, Fit], places: Places) -> Renamings:
    """Returns a renaming by which the base has every name, else the first one; shapes fit."""
    inside = places.inside()
    for some in (names, names[:1]):
        ways = renamings({name: fits[name] for name in some if name in fits}, (), inside, (), anywhere=True)
        if ways:
            return ways[0]
    return ()
