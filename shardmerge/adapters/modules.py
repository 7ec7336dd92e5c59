"""One module of an adapter on its way into the base: the weight that it changes, and its bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from shardmerge.adapters.base import Base
from shardmerge.adapters.names import Places
from shardmerge.adapters.parameters import ParameterMerge, parameter_of
from shardmerge.adapters.products import is_lycoris, lycoris_rank, lycoris_weight, scaled_by_alpha
from shardmerge.adapters.refusals import explained
from shardmerge.adapters.settings import AdapterSettings
from shardmerge.adapters.weights import merged_weight
from shardmerge.compose import cast_to, compose
from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.pointwise import Linear
from shardmerge.ops.rearranging import Permute
from shardmerge.ops.residual import Residual
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.tensors import TensorEntry

_Modules = dict[str, dict[str, TensorEntry]]


def whole_modules(modules: _Modules, config: AdapterConfig) -> _Modules:
    """Returns the modules whose weight is adapted, without those of which it is a parameter of another name."""
    return {module: parts for module, parts in modules.items() if parameter_of(module, config) is None}


@dataclass(frozen=True, slots=True)
class ModuleMerge:
    """What is the same for all modules of an adapter; ``bases`` are the weights that peft saved below it."""

    spec: AdapterSpec
    settings: AdapterSettings
    bases: Mapping[str, TensorEntry]

    def all_made(
        self,
        base: Base,
        places: Places,
        modules: Mapping[str, Mapping[str, TensorEntry]],
        problems: list[ShardmergeError],
        homeless: list[str],
    ) -> Iterator[tuple[str, TensorEntry]]:
        """Yields what all modules change; adds what is wrong to ``problems``, and weights that no base has."""
        parameters = ParameterMerge(self.spec, self.settings, base, places)
        for module, parts in modules.items():
            try:
                if (parameter := parameter_of(module, self.settings.config)) is not None:
                    yield from parameters.made(*parameter, parts)
                elif (place := places.find(f"{module}.weight")) is not None:
                    yield from self.made(base, places, module, place, parts)
                else:
                    homeless.append(f"{module}.weight")
            except MappingError as error:
                problems.append(explained(error, module, self.spec))
                if error.code in ("unknown-alpha", "odd-pattern"):
                    return  # the same for every module

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
        if self.settings.config.alpha is not None:  # what a config or the mapping says stands in its place
            parts = {part: entry for part, entry in parts.items() if part != "alpha"}
        now, untouched = base.weights(place, self.bases.get(f"{module}.weight"))
        origin = f"merged with {self.spec.source.source}"
        if "tokens" in parts:
            base.refuse_clash(place, self.spec, replacing=True)
            rows = base.token_rows(now, parts["tokens"], module, self.settings.config.tokens)
            if len(parts) > 1:
                raise MappingError(
                    "adapter-setting", f"{module} has trained tokens and a LoRA, which contradict each other"
                )
            yield place, replace(rows, name=place, origin=origin)
            return
        if is_lycoris(parts):
            rank = lycoris_rank(parts)
            scale = self.settings.scale(module, rank, beside="alpha" in parts)
            yield place, replace(lycoris_weight(now, module, parts, scale), name=place, origin=origin)
            return
        embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in "ab")
        if a is None or b is None:
            missing = "lora_A" if a is None else "lora_B"
            raise MappingError("adapter-incomplete", f"{module} has no {missing}", found=", ".join(parts))
        scale = self.settings.scale(module, a.shape[0] if a.shape else 0, beside="alpha" in parts)
        a = scaled_by_alpha(a, parts)
        turned = embedding or self._is_turned(base, module, place, a, b)
        now = now if embedding else self._after_start(now, untouched, module, a, scale, turned=turned)
        weight = merged_weight(now, untouched, a, b, parts.get("magnitude"), scale, turned=turned)
        yield place, replace(weight, name=place, origin=origin)
        if "b_bias" in parts:
            bias = places.find(f"{module}.bias")
            if bias is None:
                raise MappingError(
                    "adapter-without-base",
                    f"{module} has a LoRA bias, and its base has no bias",
                    hint="peft cannot merge it either: load the adapter together with its base",
                )
            made = compose(Linear((1.0, scale)), [base.weights(bias)[0], parts["b_bias"]])
            yield bias, replace(made, name=bias, origin=origin)

    def _after_start(
        self,
        now: TensorEntry,
        untouched: TensorEntry | None,
        module: str,
        a: TensorEntry,
        scale: float,
        *,
        turned: bool,
    ) -> TensorEntry:
        """The weight without what PiSSA or OLoRA took out of it before the run, in its own type, as in peft."""
        init = self.settings.config.init
        if not init:
            return now
        if untouched is not None or (init == "olora" and turned) or self.settings.weight != 1:
            raise MappingError(
                "adapter-setting",
                f"{module}: init_lora_weights {init} subtracted its start from the base, which was changed since",
                expected="a single adapter without `weight:`, over an unchanged base",
                hint="merge it first, into the original base, in a run of its own",
            )
        turn = compose(Permute(), [now]) if turned else now
        left = cast_to(compose(Residual(init, a.shape[0], scale), [turn]), now.dtype)
        return compose(Permute(), [left]) if turned else left

    def _is_turned(self, base: Base, module: str, place: str, a: TensorEntry, b: TensorEntry) -> bool:
        if len(base.catalog[place].shape) != 2 or len(a.shape) != 2 or len(b.shape) != 2:
            return False  # a convolution, or what the op explains
        filed = self.settings.config.fan_in_fan_out
        return base.layers.turned(module, place, (b.shape[0], a.shape[1]), said=self.settings.turned, filed=filed)
