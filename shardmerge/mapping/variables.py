"""The numbers that formulas may name: ``let:`` of the mapping, and what the sources' configs say.

``SOURCE.config.x`` is a key of the source's config.json, ``SOURCE.params.x`` of params.json, ``SOURCE.adapter.x`` of
adapter_config.json, ``SOURCE.model_config.x`` of litgpt's model_config.yaml, ``SOURCE.facts.x`` a value found inside
of the checkpoint, ``SOURCE.cfg.x`` one of the training config that mmengine stores. Without ``SOURCE.`` the first
source that has it answers. Dots go into nested objects.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.formulas import Formula, FormulaValue, Number
from shardmerge.mapping.near import NameIndex, did_you_mean
from shardmerge.mapping.spec import Spec, Variable, formulas_of
from shardmerge.targets.config_numbers import JsonObject, load_object
from shardmerge.tensors import Catalog, Extent, ReadSideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, CONFIG

# How a formula calls a JSON file beside the weights.
_FILES = {
    "config": CONFIG,
    "params": "params.json",
    "adapter": ADAPTER_CONFIG,
    "model_config": "model_config.yaml",
}
ROOMS = (*_FILES, "facts", "cfg")

_Plain = int | float | str | bool


@dataclass(slots=True)
class Variables:
    """Looks names up; every file is read once."""

    catalogs: Mapping[str, Catalog]
    read: ReadSideFile
    variables: Mapping[str, Variable] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    _objects: dict[tuple[str, str], JsonObject] = field(default_factory=dict)
    _busy: list[str] = field(default_factory=list)

    def number(self, formula: Formula, where: str, bindings: Mapping[str, str] | None = None) -> Number:
        """Returns a formula's value.

        Parameters
        ----------
        formula
            What to compute.
        where
            Its place, for messages.
        bindings
            Captures; those that are digits count as numbers.

        Raises
        ------
        MappingError
            ``unknown-value``: a name that nothing knows. ``bad-formula``: no number.
        """
        bound = bindings or {}
        try:
            value = formula.value(lambda name: int(bound[name]) if bound.get(name, "").isdigit() else self.get(name))
        except MappingError as error:
            raise MappingError(error.code, error.what, where=where) from error
        if value is None:
            missing = next((name for name in formula.names if name not in bound and self.get(name) is None), "")
            raise MappingError(
                "unknown-value",
                f"the value `{missing}` is unknown"
                + (f", which `{formula.text}` needs" if formula.text != missing else ""),
                where=where,
                expected=self._looked(missing),
                hint=self._near(missing)
                or f"define it in the mapping: `let: {{{missing.rsplit('.', 1)[-1]}: NUMBER}}`",
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            kind = "" if isinstance(value, bool) else "the text "
            raise MappingError("bad-formula", f"`{formula.text}` is {kind}{value!r}, not a number", where=where)
        return value

    def get(self, name: str) -> FormulaValue:
        """Returns the value of a name, or None."""
        if name in self.variables:
            return self._variable(name)
        head, _, rest = name.partition(".")
        if head in self.catalogs and rest:
            return self._looked_up(head, rest)
        if head in ROOMS:
            return next(
                (value for source in self.catalogs if (value := self._looked_up(source, name)) is not None), None
            )
        return None

    def _variable(self, name: str) -> FormulaValue:
        if name in self._busy:
            circle = " -> ".join([*self._busy[self._busy.index(name) :], name])
            raise MappingError("circular-value", f"`{name}` is defined by itself: {circle}")
        self.used.add(name)
        self._busy.append(name)
        try:
            return self.variables[name].formula.value(self.get)
        finally:
            self._busy.pop()

    def _looked_up(self, source: str, path: str) -> _Plain | None:
        room, _, key = path.partition(".")
        catalog = self.catalogs[source]
        if room == "cfg":
            from shardmerge.targets.training_config import read_config_value

            return read_config_value(catalog.training_config, key)
        if room == "facts":
            fact = catalog.facts.get(key)
            return int(fact) if isinstance(fact, bool) else fact  # a switch counts: `heads * (1 - grouped)`
        return _entry(self._object(source, _FILES[room]), key) if room in _FILES else None

    def _object(self, source: str, file: str) -> JsonObject:
        if (source, file) not in self._objects:
            extent = self.catalogs[source].side_files.get(file)
            try:
                self._objects[source, file] = _load(extent, self.read) if extent is not None else {}
            except ShardmergeError:
                self._objects[source, file] = {}  # the target says what is wrong with it
        return self._objects[source, file]

    def _looked(self, name: str) -> str:
        head, _, rest = name.partition(".")
        room = rest.partition(".")[0] if head in self.catalogs else head
        place = head if head in self.catalogs else "any source"
        return f"{_FILES[room]} of {place}" if room in _FILES else ""

    def _near(self, name: str) -> str:
        return did_you_mean(name, [*self.variables, *self._config_names()])

    def _config_names(self) -> Iterator[str]:
        for source in self.catalogs:
            for room, file in _FILES.items():
                yield from (f"{source}.{room}.{key}" for key in self._object(source, file))
            yield from (f"{source}.facts.{key}" for key in self.catalogs[source].facts)


def unused_variables(spec: Spec, names: Collection[str]) -> Iterator[MappingError]:
    """Yields an error for each of some variables that no formula of a mapping names: most likely a misspelt one."""
    named = set(formula_names(spec))
    for name in names:
        if name not in named:
            yield MappingError(
                "unused-variable",
                f"nothing uses the variable `{name}`",
                where=str(spec.variables[name].mark),
                hint=_unused_hint(name, {one for one in named if "." not in one}, set(spec.variables) - {name}),
            )


def _unused_hint(name: str, named: set[str], others: set[str]) -> str:
    """Either the variable is misspelt, or the formula that wants it."""
    astray = NameIndex(named - others).near(name, 1)
    if astray:
        return f"did you mean `{astray[0]}`? A formula names it, and nothing defines it: write both alike"
    near = NameIndex(others).near(name)
    return f"did you mean {' or '.join(f'`{one}`' for one in near)}?" if near else "remove it"


def formula_names(spec: Spec) -> Iterator[str]:
    """Yields every name that a formula of a mapping asks for."""
    for variable in spec.variables.values():
        yield from variable.formula.names
    for rule in spec.rules:
        for formula in (*rule.ranges.values(), *rule.target.formulas):
            yield from formula.names
        for formula in (one for term in rule.candidates for one in formulas_of(term)):
            yield from formula.names
    if spec.target is not None:
        yield from spec.target.roles.values()  # options of a target may be variables


def _load(extent: Extent, read: ReadSideFile) -> JsonObject:
    if not extent.file.endswith(".yaml"):
        return load_object(extent, read)
    from shardmerge.targets.yaml_files import load_yaml

    return load_yaml(extent, read)


def _entry(found: object, path: str) -> _Plain | None:
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, (int, float, str, bool)) else None
