"""The directories of a verl run: ``global_step_N/actor/`` with the ranks, ``critic/`` beside it, a file that says N.

Names are those of ``verl/trainer/ppo/ray_trainer.py`` (``_save_checkpoint``) and ``utils/checkpoint/``: the tracker
file has Megatron's name and only a number in it, and fine-tuning leaves ``actor/`` out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shardmerge.sources.choosing import Remarks, beside_numbered
from shardmerge.sources.markers import read_marker
from shardmerge.sources.rank_files import TRACKER
from shardmerge.sources.rank_pickle_files import actor_folder, read_object
from shardmerge.storage.listing import matching
from shardmerge.tensors import Catalog, Fact
from shardmerge.tensors.file_roles import LORA_META


def step_model(step: Path) -> tuple[Path, Remarks] | None:
    """Returns the directory of a step that has the policy's ranks, and what is to be said of the critic's; or None."""
    actor, critic = actor_folder(step), step / "critic"
    if actor is None or not critic.is_dir():
        return (actor, Remarks()) if actor else None
    said = f"{actor.name}/ is read; {critic.name}/ beside it is another model: pass {critic} for that"
    return actor, Remarks(warnings=(said,))


def newest_step(folder: Path) -> tuple[Path, Remarks] | None:
    """Returns the step that the tracker file of a run names, and what is to be said of the others; or None."""
    tracker = folder / TRACKER
    text = read_marker(tracker) if tracker.is_file() else ""
    step = folder / f"global_step_{text}"
    if not text.isascii() or not text.isdigit() or not step.is_dir():
        return None
    others = [path.name for path in matching(folder, "global_step_*") if path != step]
    return step, beside_numbered(step.name, others, TRACKER)


def with_lora(catalog: Catalog, folder: Path) -> Catalog:
    """Returns the catalog with what ``lora_train_meta.json`` says: a LoRA is among the weights that it changes."""
    stated = read_object(folder / LORA_META)
    facts: dict[str, Fact] = {
        f"lora_{name.removeprefix('lora_')}": value
        for name in ("r", "lora_alpha")
        if isinstance(value := stated.get(name), int | float)
    }
    if isinstance(task := stated.get("task_type"), str):
        facts["lora_task_type"] = task
    if not facts:
        return catalog
    said = ", ".join(f"{name} {value}" for name, value in facts.items())
    note = f"{LORA_META} says that a LoRA is among these tensors, beside the weights that it changes: {said}"
    return replace(catalog, notes=(*catalog.notes, note), facts={**catalog.facts, **facts})
