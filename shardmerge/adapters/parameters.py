"""``target_parameters``: a LoRA on parameters that are no module's weight, such as the fused experts of a mixture.

One A and one B serve all experts: A is ``[experts * r, in]``, expert by expert; B is ``[out, r * experts]``, for each
rank the experts (peft 0.21, ``ParamWrapper.get_delta_weight``). Two parameters of one module nest: the first that the
module has stands below the other's ``base_layer``. A base on disk may hold every expert on its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shardmerge.adapters.base import Base
from shardmerge.adapters.names import Places
from shardmerge.adapters.settings import AdapterSettings
from shardmerge.adapters.weights import merged_weight
from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.mapping.near import listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.cutting import Slice
from shardmerge.ops.joining import Stack
from shardmerge.ops.rearranging import Reshape
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.tensors import TensorEntry
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

_NESTED = ".base_layer"
# Parameters of the experts of transformers 5 in the order in which their modules have them, and each expert's own
# weights on disk, which are the fused one's rows behind each other (`conversion_mapping`: mixtral, qwen2_moe).
_SPLIT = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_ON_DISK = ((".mlp.experts", ".mlp.experts"), (".mlp.experts", ".block_sparse_moe.experts"))
_ONE_OF_EXPERTS = re.compile(r"(?P<module>.+\.experts)\.0\.(?P<name>gate_proj|w1|down_proj|w2)\.weight")
# `is_transposed` of transformers 5.24: experts stored as [in, out].
_TRANSPOSED_TYPES = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})


def wrapped(module: str, config: AdapterConfig) -> tuple[str, tuple[str, ...]]:
    """Returns the module that has the parameters, and those of them that are adapted, the innermost first."""
    plain = module
    while plain.endswith(_NESTED):
        plain = plain.removesuffix(_NESTED)
    leaves = {
        path.rpartition(".")[2]
        for path in config.parameters
        if f".{plain}.{path.rpartition('.')[2]}".endswith(f".{path}")
    }
    return plain, tuple(
        sorted(leaves, key=lambda leaf: (leaf not in _SPLIT, list(_SPLIT).index(leaf) if leaf in _SPLIT else leaf))
    )


def parameter_of(module: str, config: AdapterConfig) -> tuple[str, str] | None:
    """Returns module and parameter that a module's factors adapt; None where they adapt its weight."""
    plain, leaves = wrapped(module, config)
    depth = (len(module) - len(plain)) // len(_NESTED)
    if not leaves or depth >= len(leaves):
        return None
    leaf = leaves[len(leaves) - 1 - depth]
    return None if leaf == "weight" and not depth else (plain, leaf)


@dataclass(frozen=True, slots=True)
class ParameterMerge:
    """What is the same for all parameters of an adapter."""

    spec: AdapterSpec
    settings: AdapterSettings
    base: Base
    places: Places

    def made(self, module: str, leaf: str, parts: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
        """Yields the names and tensors of the base that the factors of a parameter change.

        Raises
        ------
        MappingError
            ``adapter-incomplete``, ``adapter-without-base``, ``adapters-clash``, ``op-shape``, ``unknown-layer`` and
            those of ``AdapterSettings.scale``.
        """
        if "a" not in parts or "b" not in parts or len(parts) > 2:
            raise MappingError("adapter-incomplete", f"{module}.{leaf} has no pair of factors", found=", ".join(parts))
        place = self.places.find(f"{module}.{leaf}")
        if place is not None:
            self.base.refuse_clash(place, self.spec)
            yield place, self._fused(module, leaf, self.base.weights(place)[0], parts)
        else:
            yield from self._apart(module, leaf, parts)

    def _fused(self, module: str, leaf: str, now: TensorEntry, parts: Mapping[str, TensorEntry]) -> TensorEntry:
        a, b = parts["a"], parts["b"]
        if len(now.shape) == 2:
            scale = self._scale(module, leaf, a, 1)
            return merged_weight(now, None, a, b, None, scale, turned=False)
        experts, *matrix = now.shape
        turned = self._is_turned(module, leaf, (matrix[0], matrix[-1]), a, b)
        scale = self._scale(module, leaf, a, experts)
        made = []
        for expert in range(experts):
            own = compose(Reshape(tuple(matrix)), [compose(Slice(0, expert, expert + 1), [now])])
            made.append(merged_weight(own, None, *_factors(a, b, expert, experts), None, scale, turned=turned))
        return compose(Stack(0), made)

    def _apart(self, module: str, leaf: str, parts: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
        on_disk = self._on_disk(module, leaf)
        if on_disk is None:
            raise MappingError(
                "adapter-without-base",
                f"target_parameters: {module}.{leaf} without a tensor in {self.spec.onto.source}",
                expected=f"{module}.{leaf}, or a weight for each expert such as "
                f"{module}.0.{_SPLIT.get(leaf, ((leaf,),))[0][0]}.weight",
                hint=f"name as `{self.spec.onto.source}` the model that the adapter was trained on",
            )
        root, names = on_disk
        a, b = parts["a"], parts["b"]
        experts = 0
        while self.places.find(f"{root}.{experts}.{names[0]}.weight") is not None:
            experts += 1
        scale = self._scale(module, leaf, a, experts)
        for expert in range(experts):
            own_a, own_b = _factors(a, b, expert, experts)
            rows = 0
            for name in names:
                place = self.places.find(f"{root}.{expert}.{name}.weight")
                if place is None:
                    raise MappingError("adapter-without-base", f"{root}.{expert} of the base has no {name}")
                self.base.refuse_clash(place, self.spec)
                now = self.base.weights(place)[0]
                part = compose(Slice(0, rows, rows + now.shape[0]), [own_b])
                rows += now.shape[0]
                yield place, merged_weight(now, None, own_a, part, None, scale, turned=False)
            if rows != b.shape[0]:
                _misfit(f"{module}.{leaf}", a, b, f"{rows} rows in the base's {listed(list(names))}")

    def _on_disk(self, module: str, leaf: str) -> tuple[str, tuple[str, ...]] | None:
        for names in _SPLIT.get(leaf, ()):
            for inside, outside in _ON_DISK:
                root = module.replace(inside, outside)
                if self.places.find(f"{root}.0.{names[0]}.weight") is not None:
                    return root, names
        return None

    def _scale(self, module: str, leaf: str, a: TensorEntry, experts: int) -> float:
        if not a.shape or a.shape[0] % experts:
            _misfit(f"{module}.{leaf}", a, a, f"{experts} experts")
        return self.settings.scale(f"{module}.{leaf}", a.shape[0] // experts)

    def _is_turned(self, module: str, leaf: str, matrix: tuple[int, int], a: TensorEntry, b: TensorEntry) -> bool:
        """Whether a slice is ``A^T B^T``: by shapes, and where it is square by who wrote the adapter and the base."""
        straight, turned = (b.shape[0], a.shape[1]) == matrix, (a.shape[1], b.shape[0]) == matrix
        if straight != turned:
            return turned
        if not straight:
            _misfit(f"{module}.{leaf}", a, b, f"experts of {list(matrix)}")
        config = self.settings.config
        if config.peft_version < (0, 20):
            raise MappingError(
                "unknown-layer",
                f"{module}.{leaf} is square, and peft before 0.20 turned experts otherwise than it does now",
                expected=f"peft_version in {ADAPTER_CONFIG}, of at least 0.20",
                hint="let the peft that wrote it merge it (merge_and_unload, save_pretrained), and convert that",
            )
        return self.base.config.get("model_type") in _TRANSPOSED_TYPES


def unadapted_parameters(
    config: AdapterConfig, modules: Mapping[str, object], base: Base, places: Places
) -> Iterator[str]:
    """Yields the parameters of a base that ``target_parameters`` names and the adapter has nothing for."""
    if not config.parameters:
        return
    adapted = {found for module in modules if (found := parameter_of(module, config)) is not None}
    leaves = {path.rpartition(".")[2] for path in config.parameters}
    for name in base.catalog.names():
        inside = places.own(name)
        if inside is None:
            continue
        module, _, leaf = inside.rpartition(".")
        if (one := _ONE_OF_EXPERTS.fullmatch(inside)) is not None:
            module = one["module"].replace(".block_sparse_moe.", ".mlp.")
            leaf = next(fused for fused, ways in _SPLIT.items() if any(one["name"] in way for way in ways))
        if leaf in leaves - {"weight"} and leaf in wrapped(module, config)[1] and (module, leaf) not in adapted:
            yield f"{module}.{leaf}"


def _factors(a: TensorEntry, b: TensorEntry, expert: int, experts: int) -> tuple[TensorEntry, TensorEntry]:
    """Returns A ``[r, in]`` and B ``[out, r]`` of one expert."""
    rank = a.shape[0] // experts
    if len(b.shape) != 2 or b.shape[1] != a.shape[0]:
        _misfit("an expert", a, b, f"{experts} experts")
    grouped = compose(Reshape((b.shape[0], rank, experts)), [b])
    column = compose(Slice(2, expert, expert + 1), [grouped])
    own_a = compose(Slice(0, expert * rank, (expert + 1) * rank), [a])
    return replace(own_a, source=a.source), compose(Reshape((b.shape[0], rank)), [column])


def _misfit(what: str, a: TensorEntry, b: TensorEntry, base: str) -> None:
    raise MappingError(
        "op-shape",
        f"{what}: A, B and the base do not fit",
        found=f"A {list(a.shape)}, B {list(b.shape)}, {base}",
        expected="A [experts * r, in], B [out, r * experts], base [experts, out, in]",
        hint="name the base that the adapter was trained on",
    )
