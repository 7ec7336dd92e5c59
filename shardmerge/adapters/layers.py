"""Which way round a base stores an adapted weight: ``[out, in]`` of Linear, or ``[in, out]`` of Conv1D. Pure.

peft decides it by the class of each layer (``lora/layer.py``, ``dispatch_default``), and writes one ``fan_in_fan_out``
for the whole file, that of the last layer it wrapped. So the file's word is the last one that is asked here. Where a
weight is not square the shapes decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.errors import MappingError
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Catalog, TensorEntry

# The architectures of transformers 4.51 to 5.24 whose layers are `pytorch_utils.Conv1D`, and the layers that are.
_CONV1D_TYPES = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")
# Layers of a GPT that widen: [in, out] of Conv1D has more columns than rows, [out, in] of Linear more rows.
_WIDENING = ("c_attn", "c_fc")


@dataclass(frozen=True, slots=True)
class Layers:
    """What is known of a base's layers.

    Attributes
    ----------
    base
        Its catalog.
    config
        Its config.json, ``{}`` where there is none.
    """

    base: Catalog
    config: JsonObject

    def turned(self, module: str, place: str, shapes: tuple[int, int], *, said: bool | None, filed: bool) -> bool:
        """Tells whether a two-dimensional weight is stored as ``[in, out]``.

        Parameters
        ----------
        module, place
            Its names in the adapter and in the base.
        shapes
            ``(out, in)`` by B and A.
        said, filed
            ``fan_in_fan_out`` of the mapping, None where it does not say, and of the adapter's config.

        Raises
        ------
        MappingError
            ``unknown-layer``: it is square, and nothing tells.
        """
        shape = self.base[place].shape
        if shape != shapes[::-1]:
            return False  # Linear, or a misfit that the op explains
        if shape != shapes:
            return True
        leaf = module.rpartition(".")[2]
        kinds = set(_model_types(self.config))
        if kinds & _CONV1D_TYPES:
            return leaf in _CONV1D_LAYERS
        if said is not None:
            return said
        if kinds and "auto_map" not in self.config:
            return False  # transformers' own code, and no other of its architectures has a Conv1D
        return self._by_neighbours(module, filed=filed) if leaf in _CONV1D_LAYERS else filed

    def _by_neighbours(self, module: str, *, filed: bool) -> bool:
        """A base of unknown code tells by another layer of its own kind, one that is not square."""
        for name in self.base.names():
            entry: TensorEntry = self.base[name]
            layer = name.removesuffix(".weight").rpartition(".")[2]
            if layer in _WIDENING and len(entry.shape) == 2 and entry.shape[0] != entry.shape[1]:
                return entry.shape[0] < entry.shape[1]
        if filed:
            return True
        raise MappingError(
            "unknown-layer",
            f"{module} is square, and it is unknown whether its base is Linear, [out, in], or Conv1D, [in, out]",
            where=self.base.path,
            expected="config.json beside the base, with its model_type",
            hint="say `fan_in_fan_out: true` (Conv1D) or `fan_in_fan_out: false` (Linear) under `adapters:`",
        )


def _model_types(config: JsonObject) -> Iterator[str]:
    """Yields the ``model_type`` of a config and of the configs in it: encoder, decoder, text."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind:
        yield kind
    for value in config.values():
        if isinstance(value, dict) and isinstance(nested := value.get("model_type"), str) and nested:
            yield nested
