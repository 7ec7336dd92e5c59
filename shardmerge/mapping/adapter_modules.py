"""One module of an adapter on its way into the base: the weight that it changes, and its bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.mapping.adapter_base import Base
from shardmerge.mapping.adapter_names import Places
from shardmerge.mapping.adapter_settings import AdapterSettings
from shardmerge.mapping.adapter_weights import merged_weight
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.pointwise import Linear
from shardmerge.tensors import TensorEntry


@dataclass(frozen=True, slots=True)
class ModuleMerge:
    """What is the same for all modules of an adapter; ``bases`` are the weights that peft saved below it."""

    spec: AdapterSpec
    settings: AdapterSettings
    bases: Mapping[str, TensorEntry]

    def made(
        self, base: Base, places: Places, module: str, place: str, parts: Mapping[str, TensorEntry]
    ) -> Iterator[tuple[str, TensorEntry]]:
        """Yields the names and tensors of the base that a module of the adapter changes.

        Parameters
        ----------
        base, places
            The base so far, and its names by those of the adapter.
        module, place
            The module as the adapter calls it, and the name of its weight in the base.
        parts
            The adapter's tensors of it, by part.

        Raises
        ------
        MappingError
            ``adapter-incomplete``, ``adapter-setting``, ``adapter-without-base``, ``adapters-clash``,
            ``unknown-alpha``, ``odd-pattern``, ``op-shape``.
        """
        base.refuse_clash(place, self.spec)
        now, untouched = base.weights(place, self.bases.get(f"{module}.weight"))
        origin = f"merged with {self.spec.source.source}"
        if "tokens" in parts:
            base.refuse_clash(place, self.spec, replacing=True)
            rows = base.token_rows(now, parts["tokens"], module, self.settings.config.tokens, origin=origin)
            if len(parts) > 1:
                raise MappingError("adapter-setting", f"{module} has trained tokens and a LoRA: they are two answers")
            yield place, replace(rows, name=place, origin=origin)
            return
        embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in "ab")
        if a is None or b is None:
            missing = "lora_A" if a is None else "lora_B"
            raise MappingError("adapter-incomplete", f"{module} has no {missing}", found=", ".join(parts))
        scale = self.settings.scale(module, a.shape[0] if a.shape else 0)
        turned = embedding or self._is_turned(base, module, place, a, b)
        weight = merged_weight(now, untouched, a, b, parts.get("magnitude"), scale, turned=turned)
        yield place, replace(weight, name=place, origin=origin)
        if "b_bias" in parts:
            bias = places.find(f"{module}.bias")
            if bias is None:
                raise MappingError(
                    "adapter-without-base",
                    f"{module} has a LoRA bias, and its base has no bias",
                    hint="peft cannot merge it either: run the adapter beside its base",
                )
            made = compose(Linear((1.0, scale)), [base.weights(bias)[0], parts["b_bias"]])
            yield bias, replace(made, name=bias, origin=origin)

    def _is_turned(self, base: Base, module: str, place: str, a: TensorEntry, b: TensorEntry) -> bool:
        if len(base.catalog[place].shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            return False  # a convolution, or what the op explains
        filed = self.settings.config.fan_in_fan_out
        return base.layers.turned(module, place, (b.shape[0], a.shape[1]), said=self.settings.turned, filed=filed)
