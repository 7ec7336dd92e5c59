"""The house of the package: what a module imports, no circles, one name an idea. Read from the code; nothing is run."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

PACKAGE = Path(__file__).parent.parent / "shardmerge"
# The rooms that are held to it.
ROOMS = (
    "adapters", "execute", "inverse", "mapping", "mergekit", "ops", "plan", "prepare", "publish", "recognition",
    "sources", "storage", "targets", "tensors",
)  # fmt: skip
MOST_IMPORTS, USUAL_IMPORTS = 15, 7
# The public door knows every verb; where a part is made, published and verified much comes together. None may join.
MANY = (
    "shardmerge.api", "shardmerge.execute.engine", "shardmerge.publish.finishing", "shardmerge.publish.having_made",
)  # fmt: skip
# One idea in two rooms that may know nothing of each other.
TWICE = {"Shape"}


@cache
def modules() -> dict[str, ast.Module]:
    """Returns every module by its dotted name; a package goes by its own."""
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
    names = {path: parts[:-1] if parts[-1] == "__init__" else parts for path, parts in paths.items()}
    return {".".join(parts): ast.parse(path.read_text("utf-8")) for path, parts in names.items()}


def imported(tree: ast.Module, known: Mapping[str, ast.Module]) -> Iterator[str]:
    """Yields the package's own modules that a module imports, those in functions and for the type checker included."""
    for node in ast.walk(tree):
        names = [one.name for one in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardmerge"):
            inside = [f"{node.module}.{name}" for name in names]
            yield from (name if name in known else str(node.module) for name in inside)
        else:
            yield from (name for name in names if name in known)


def graph() -> dict[str, set[str]]:
    every = modules()
    return {name: set(imported(tree, every)) - {name} for name, tree in every.items()}


def in_rooms(name: str) -> bool:
    return name.startswith(tuple(f"shardmerge.{room}." for room in ROOMS))


def test_a_module_imports_few_others() -> None:
    counts = {name: len(found) for name, found in graph().items()}
    assert median(counts.values()) <= USUAL_IMPORTS
    assert {name for name, count in counts.items() if count > MOST_IMPORTS} == set(MANY)


def test_no_module_imports_itself_by_way_of_others() -> None:
    edges = {name: {one for one in found if in_rooms(one)} for name, found in graph().items() if in_rooms(name)}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_a_type_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(module)
            elif isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "TypeAlias":
                places[ast.unparse(node.target)].append(module)
    shared = {name: found for name, found in places.items() if len(found) > 1 and not name.startswith("_")}
    assert set(shared) == TWICE, shared
