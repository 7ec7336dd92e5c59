"""Adapters of other tools than peft, under the names that peft would give them. Pure.

kohya (sd-scripts) and LyCORIS write a module's name with ``_`` for every dot; which dots those were only the base can
tell. diffusers before 0.22 says ``down`` and ``up``. mlx-lm stores A and B turned around. Each is recognised by its own
endings, and only where no name has peft's ``base_model.model.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.adapters.roots import PREFIX
from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.mapping.near import count, listed
from shardmerge.mapping.spec import AdapterSpec
from shardmerge.ops.rearranging import Permute
from shardmerge.tensors import Catalog, TensorEntry
from shardmerge.tensors.vocabulary_names import is_embedding

# What stands in front of kohya's flattened names, one for each model of a pipeline.
_FLAT = re.compile(
    r"(?P<model>lora_unet|lora_te\d?|lora_transformer|lora_prior_unet|lora_prior_te|lycoris)_(?P<flat>[^.]+)\.(?P<end>.+)"
)
_FLAT_ENDS = {
    "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "lora_alpha_beside",
} | {f"{one}": one for one in (
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
    "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
)}  # fmt: skip
# diffusers: `attn.to_q.lora.down.weight`, before 0.18 `attn.processor.to_q_lora.down.weight`; `to_out` is a list.
_DOWN_UP = re.compile(
    r"(?P<module>.+?)(?:\.lora|_lora|\.lora_linear_layer)\.(?P<way>down|up)\.weight|(?P<of>.+?)(?:\.lora|_lora|\.lora_linear_layer)?\.alpha"
)
_MLX = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")
_BARE = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B)(?P<end>(?:\.[^.]+)?\.weight)")


@dataclass(frozen=True, slots=True)
class Translated:
    """An adapter under peft's names.

    Attributes
    ----------
    catalog
        The adapter.
    names
        What each name was in the source.
    tool
        Whose it is, for people; empty for peft's own.
    alpha_is_rank
        Whether a module without an alpha has its rank for one: kohya's and diffusers' rule.
    """

    catalog: Catalog
    names: Mapping[str, str] = field(default_factory=dict)
    tool: str = ""
    alpha_is_rank: bool = False


def translated(spec: AdapterSpec, adapter: Catalog, base: Catalog) -> Translated:
    """Returns an adapter under peft's names, as it is where it has them or where it is of no tool that is known here.

    Raises
    ------
    MappingError
        ``unknown-adapter-tensor``: parts of the tool that are not merged. ``adapter-without-base``: flattened names of
        another base.
    """
    inside = {
        name: bound["rest"] for name in adapter.names() if (bound := spec.source.template.match(name)) is not None
    }
    if not inside or any(PREFIX in rest for rest in inside.values()):
        return Translated(adapter)
    for read in (_kohya, _diffusers, _mlx, _bare):
        found = read(spec, adapter, base, inside)
        if found is not None:
            return found
    return Translated(adapter)


def _kohya(spec: AdapterSpec, adapter: Catalog, base: Catalog, inside: Mapping[str, str]) -> Translated | None:
    matches = {name: match for name, rest in inside.items() if (match := _FLAT.fullmatch(rest)) is not None}
    if not matches or len(matches) < len(inside):
        return None
    modules = dict(_flattened(spec, base))
    mine = {match["model"] for match in matches.values() if match["flat"] in modules}
    chosen = {name: match for name, match in matches.items() if match["model"] in mine}
    homeless = list(dict.fromkeys(match["flat"] for match in chosen.values() if match["flat"] not in modules))
    if not chosen or homeless:
        raise _no_base(spec, homeless or [match["flat"] for match in matches.values()], sorted(mine))
    odd = [name for name, match in chosen.items() if match["end"] not in _FLAT_ENDS]
    if odd:
        raise _odd_parts("kohya or LyCORIS", odd, adapter.path)
    names = {name: f"{modules[match['flat']]}.{_FLAT_ENDS[match['end']]}" for name, match in chosen.items()}
    return _renamed(spec, adapter, names, "kohya", alpha_is_rank=True)


def _flattened(spec: AdapterSpec, base: Catalog) -> Iterator[tuple[str, str]]:
    """Yields the modules of a base by their flattened names, without those that two have."""
    seen: dict[str, list[str]] = {}
    for name in base.names():
        bound = spec.onto.template.match(name)
        if bound is not None and bound["rest"].endswith(".weight"):
            module = bound["rest"].removesuffix(".weight")
            seen.setdefault(module.replace(".", "_"), []).append(module)
    return ((flat, found[0]) for flat, found in seen.items() if len(found) == 1)


def _diffusers(spec: AdapterSpec, adapter: Catalog, base: Catalog, inside: Mapping[str, str]) -> Translated | None:
    matches = {name: match for name, rest in inside.items() if (match := _DOWN_UP.fullmatch(rest)) is not None}
    if not any(match["way"] for match in matches.values()):
        return None
    if odd := [name for name in inside if name not in matches]:
        raise _odd_parts("diffusers", odd, adapter.path)
    names = {}
    for name, match in matches.items():
        module = (match["module"] or match["of"]).replace(".processor.", ".")
        if f"{spec.onto.template.format({'rest': f'{module}.weight'})}" not in base:
            module = module.replace(".to_out", ".to_out.0") if module.endswith(".to_out") else module
        end = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(match["way"] or "", "lora_alpha_beside")
        names[name] = f"{module}.{end}"
    return _renamed(spec, adapter, names, "diffusers", alpha_is_rank=True)


def _mlx(spec: AdapterSpec, adapter: Catalog, base: Catalog, inside: Mapping[str, str]) -> Translated | None:
    matches = {name: match for name, rest in inside.items() if (match := _MLX.fullmatch(rest)) is not None}
    if not any(match["part"] != "m" for match in matches.values()):
        return None
    stacks = [name for name in matches if len(adapter[name].shape) > 2]
    if odd := [*(name for name in inside if name not in matches), *stacks]:
        raise _odd_parts("mlx-lm", odd, adapter.path)
    names, entries = {}, {}
    for name, match in matches.items():
        module, part = match["module"], match["part"]
        rows = is_embedding(module)
        # Linear: W + (b^T a^T) of a [in, r], b [r, out]. An embedding: W + (a b) of a [rows, r], b [r, dims].
        kind = {"lora_a": "lora_B" if rows else "lora_A", "lora_b": "lora_A" if rows else "lora_B"}.get(part)
        names[name] = f"{module}.{kind}.weight" if kind else f"{module}.lora_magnitude_vector"
        entry = replace(adapter[name], source=spec.source.source)
        entries[name] = entry if rows or kind is None else compose(Permute(), [entry])
    return _renamed(spec, adapter, names, "mlx-lm", entries=entries)


def _bare(spec: AdapterSpec, adapter: Catalog, base: Catalog, inside: Mapping[str, str]) -> Translated | None:
    """Peft's parts without its prefix: diffusers since 0.22, and state dicts of ``get_peft_model_state_dict``."""
    matches = {name: match for name, rest in inside.items() if (match := _BARE.fullmatch(rest)) is not None}
    if not matches or len(matches) < len(inside):
        return None
    names = {name: f"{match['module']}.{match['part']}{match['end']}" for name, match in matches.items()}
    return _renamed(spec, adapter, names, "peft's parts without its prefix")


def _renamed(
    spec: AdapterSpec,
    adapter: Catalog,
    names: Mapping[str, str],
    tool: str,
    *,
    entries: Mapping[str, TensorEntry] | None = None,
    alpha_is_rank: bool = False,
) -> Translated:
    new = {name: spec.source.template.format({"rest": f"{PREFIX}{rest}"}) for name, rest in names.items()}
    held = entries or adapter
    moved = {new[name]: replace(held[name], name=new[name], source=spec.source.source) for name in names}
    catalog = replace(adapter, entries=moved, aliases={})
    return Translated(catalog, {to: name for name, to in new.items()}, tool, alpha_is_rank)


def _no_base(spec: AdapterSpec, flat: list[str], models: list[str]) -> MappingError:
    onto = spec.onto.source
    what = f"of {listed(models)} " if models else ""
    return MappingError(
        "adapter-without-base",
        f"{count(len(set(flat)), 'module')} {what}by kohya's names without a tensor in {onto}: {listed(flat, 3)}",
        where=str(spec.mark),
        expected="a base whose names are these with dots in place of some `_`",
        hint=f"name as `{onto}` the part of the pipeline that it is for (unet, text_encoder), in the layout that the "
        "adapter was trained on: kohya's names for SDXL's UNet are those of the single file, not of diffusers",
    )


def _odd_parts(tool: str, names: list[str], where: str) -> MappingError:
    return MappingError(
        "unknown-adapter-tensor",
        f"{count(len(names), 'tensor')} of {tool} that cannot be merged: {listed(names, 3)}",
        where=where,
        expected="pairs of LoRA, LoHa or LoKr, and alpha",
        hint=f"merge it with {tool} itself, and convert the result",
    )
