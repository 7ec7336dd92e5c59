"""A single torch file (``.pth .pt .bin``) as a catalog: plain, nested, or written by mmengine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from shardmerge.sources.not_read import not_a_model
from shardmerge.sources.pickle_values import PickleValue, TensorRef
from shardmerge.sources.run_states import run_state
from shardmerge.sources.state_dict import StateDict, other_states, state_dict
from shardmerge.sources.torch_file import TorchFile, read_torch_file
from shardmerge.tensors import Catalog, TensorEntry


def read_torch_checkpoint(path: Path, *, root: str = "") -> Catalog:
    """Returns the catalog of one torch file.

    Parameters
    ----------
    path
        The file.
    root
        Dotted path of the state dict inside the file; empty to find it (``state_dict``, ``module``, ``model``, ...).

    Raises
    ------
    CheckpointError
        ``not-a-model``: the state of an optimizer, of random generators, of a scheduler. And as ``read_torch_file`` and
        ``state_dict``.
    """
    file = read_torch_file(path)
    state = "" if root else run_state(file.root)
    if state:
        raise not_a_model(state, file.path, ", ".join(str(key)[:80] for key in list(as_dict(file.root))[:8]))
    found = state_dict(file.root, key=root)
    catalog = torch_catalog(file, found)
    others = [] if root else other_states(file.root, found.root_key)
    if not others:
        return catalog
    said = f"{found.root_key} is read; the file holds tensors under {', '.join(others)} too: `--root {others[0]}`"
    return replace(catalog, warnings=(*catalog.warnings, f"{said} reads those"))


def torch_catalog(file: TorchFile, found: StateDict) -> Catalog:
    """Returns the catalog of a state dict of an opened torch file: shared storages as aliases."""
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    for name, ref in found.tensors.items():
        owner = owners.setdefault(file.alias_key(ref), name)
        if owner == name or 0 in ref.shape:
            entries[name] = file.entry(name, ref, f"{found.root_key or 'top level'} of {Path(file.path).name}")
        else:
            aliases[name] = owner
    config = training_config(file)
    kind = f"XTuner / mmengine {file.kind}" if config else file.kind
    warnings = []
    loose = [str(name) for name, value in as_dict(file.root).items() if isinstance(value, TensorRef)]
    if found.root_key and loose:
        warnings.append(f"{len(loose)} tensors beside {found.root_key} are not part of it: {', '.join(loose[:5])}")
    return Catalog(
        file.path,
        kind,
        entries,
        aliases,
        files=(file.stamp,),
        warnings=tuple(warnings),
        training_config=config,
    )


def training_config(file: TorchFile) -> str:
    """Returns the text of mmengine's ``meta["cfg"]``, or ``""``."""
    meta = file.root.get("meta") if isinstance(file.root, dict) else None
    config = meta.get("cfg") if isinstance(meta, dict) else None
    return config if isinstance(config, str) else ""


def as_dict(value: PickleValue) -> Mapping[object, PickleValue]:
    """Returns the value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}
