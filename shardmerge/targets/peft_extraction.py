"""An adapter made of two models: what a training changed, as a LoRA of a given rank, in a directory that peft loads.

Matrices become pairs, embeddings pairs of ``lora_embedding_``; norms and biases are saved whole, since no product of a
low rank says them. Names are those of ``get_peft_model_state_dict`` of peft 0.21.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.errors import TargetError, raise_all
from shardmerge.shown import shown
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import dump
from shardmerge.targets.expectation import Expectation, FileGroup, Request, Target
from shardmerge.targets.options import whole_number
from shardmerge.targets.peft_adapter import ROOT, STEM, adapter_config
from shardmerge.tensors import Catalog, Shape, SideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG
from shardmerge.tensors.vocabulary_names import is_embedding

_RANK = 16


def expect(request: Request) -> Expectation:
    """Returns what the adapter's directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``bad-option``. ``not-one-model``: names or shapes of the two differ, or a tensor is neither
        matrix nor vector.
    """
    tuned, base = (_source(request, role) for role in ("tuned", "base"))
    rank = whole_number(request, "rank", _RANK, most=1 << 20)
    gone = request.gone("tuned")
    names = [name for name in tuned.entries if name not in gone]
    raise_all(_misfits(names, tuned, base))
    tensors = {part: shape for name in names for part, shape in _parts(name, tuned[name].shape, rank)}
    task, base_model = (request.options.get(key, "") for key in ("task_type", "base_model"))
    config = adapter_config(tensors, AdapterConfig(alpha=rank, task=task, base=base_model), tuned.path)
    needed = {name for name in names if len(tuned[name].shape) == 2}  # vectors are the tuned model's own
    return Expectation(
        tensors=tensors,
        ignored={request.roles.get("base", "base"): frozenset(base.names()) - needed},
        side_files=(SideFile(ADAPTER_CONFIG, (dump(config),)),),
        groups=(FileGroup(stem=STEM, sharded=False),),
    )


def _source(request: Request, role: str) -> Catalog:
    name = request.roles.get(role, role)
    if name not in request.catalogs:
        raise TargetError("missing-source", f"the mapping has no source for `{role}`", expected=f"a source `{name}`")
    return request.catalogs[name]


def _misfits(names: list[str], tuned: Catalog, base: Catalog) -> Iterator[TargetError]:
    odd = [name for name in names if name not in base or base[name].shape != tuned[name].shape]
    if odd:
        has = list(base[odd[0]].shape) if odd[0] in base else "no such tensor"
        yield TargetError(
            "not-one-model",
            f"{len(odd)} tensors of the tuned model differ in the base: {shown(odd[:3])}",
            where=tuned.path,
            found=f"{list(tuned[odd[0]].shape)}, and {has} in {base.path}",
            hint="name as `base` the model that the training began with; or leave them out by a line under `drop:`",
        )
    deep = [name for name in names if not 0 < len(tuned[name].shape) < 3]
    if deep:
        yield TargetError(
            "not-one-model",
            f"{len(deep)} tensors are neither matrices nor vectors, of which no LoRA is extracted: {shown(deep[:3])}",
            where=tuned.path,
            hint="leave them out by a line under `drop:`, if the training did not change them",
        )


def _parts(name: str, shape: Shape, rank: int) -> Iterator[tuple[str, Shape]]:
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        yield f"{ROOT}{module}.base_layer.bias", shape
    elif len(shape) == 1:
        yield f"{ROOT}{name}", shape
    elif is_embedding(module):
        yield f"{ROOT}{module}.lora_embedding_A", (rank, shape[0])
        yield f"{ROOT}{module}.lora_embedding_B", (shape[1], rank)
    else:
        yield f"{ROOT}{module}.lora_A.weight", (rank, shape[1])
        yield f"{ROOT}{module}.lora_B.weight", (shape[0], rank)


TARGET = Target(
    name="peft/extracted",
    about="A LoRA of a given rank, computed from a tuned model and its base: adapter_model and adapter_config.json.",
    roles={"tuned": "the model after the training", "base": "the model before it"},
    options={
        "rank": f"rows of every A, {_RANK} where nothing is said",
        "base_model": "`base_model_name_or_path`: hub id or path of the base, for adapter_config.json",
        "task_type": "peft's name of the task, e.g. `CAUSAL_LM`",
    },
    expect=expect,
)
