"""Which tensors of a catalog are codes of quantized weights, not numbers, and which tensors give them a meaning.

Pure: names, dtypes and shapes, as the libraries themselves write them.

* float8 with scales: ``weight`` is F8_E4M3 (or E5M2) beside ``weight_scale_inv`` (DeepSeek-V3, Qwen3-FP8),
  ``weight_scale`` (compressed-tensors ``float-quantized``, FBGEMM, ModelOpt, Quark), ``scale`` (DeepSeek's own code),
  ``qscale_weight`` (Mistral's own files), ``scale_weight`` (ComfyUI); experts of one tensor ``gate_up_proj`` beside
  ``gate_up_proj_scale_inv`` or ``gate_up_proj_scale`` (``quantizers/quantizer_finegrained_fp8.py`` and
  ``integrations/fbgemm_fp8.py`` in transformers 5.24). These alone can be dequantized here. float8 without a scale
  are plain numbers.
* bitsandbytes 4-bit: ``weight`` is U8 ``[n, 1]``, two codes a byte, beside ``weight.absmax``, ``weight.quant_map`` and
  ``weight.quant_state.bitsandbytes__nf4`` or ``__fp4`` (``bitsandbytes/functional.py``, ``QuantState.as_dict``). A
  training checkpoint may hold the bytes alone, without the state that gives them a meaning.
* bitsandbytes 8-bit: ``weight`` is I8, beside ``SCB``, the largest magnitude of each row (``Linear8bitLt`` in
  ``bitsandbytes/nn/modules.py``).
* GPTQ and AWQ: ``qweight`` is I32, 32 / bits codes a number, beside ``qzeros`` and ``scales``, GPTQ with ``g_idx``
  (``auto_gptq``, ``awq/modules/linear``). FP-Quant has ``qweight`` U8 and ``scales`` (``integrations/fp_quant.py``).
* compressed-tensors 0.20: ``weight_packed`` is I32 (``pack-quantized``) or U8 (``nvfp4-pack-quantized``,
  ``mxfp4-pack-quantized``), beside ``weight_scale``; ``int-quantized`` has ``weight`` I8 beside ``weight_scale``.
* NVFP4 of ModelOpt: ``weight`` is U8, two codes a byte, beside ``weight_scale`` F8_E4M3 and ``weight_scale_2``.
* MXFP4: ``gate_up_proj_blocks`` and ``_scales``, U8 (``integrations/mxfp4.py``); ``weight`` U8 beside ``weight_scale``
  (Quark), which BitNet and Gemma's 2 and 4 bits look like too.
* HQQ and SINQ ``W_q``; EETQ ``weight`` I8 with ``weight_scales`` (``integrations/eetq.py``); Quanto ``weight._data``
  with ``weight._scale`` (``optimum/quanto/tensor/qbytes.py``); torchao ``_weight_qdata``
  (``quantizers/quantizer_torchao.py``); AQLM ``codes`` with ``codebooks``; VPTQ ``indices`` with ``centroids``; SpQR
  ``dense_weights``; HIGGS ``weight`` with ``tables``; Metal and MLX ``weight`` U32 with ``scales``
  (``integrations/metal_quantization.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from shardmerge.tensors import Catalog, TensorEntry

FP8 = "fp8"
FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@dataclass(frozen=True, slots=True)
class Packed:
    """What a tensor of codes belongs to.

    Attributes
    ----------
    title
        How people call the format: ``fp8``, ``GPTQ``, ...
    scales
        Names of the tensors that give the codes a meaning, the scale first; empty where the checkpoint lacks them.
    """

    title: str
    scales: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Format:
    """How a library names what belongs to one weight. Names are behind the module's name and its dot.

    Attributes
    ----------
    dtypes
        Of the codes; empty for any.
    needs
        Names that must be there.
    with_
        Names that belong to it where they are there.
    vague
        Whether several libraries write so; the config's word is then better than the title.
    """

    title: str
    dtypes: frozenset[str]
    needs: tuple[str, ...] = ()
    with_: tuple[str, ...] = ()
    vague: bool = False


_INTS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})
_BYTES, _I8, _U8, _WORDS = frozenset({"U8", "I8"}), frozenset({"I8"}), frozenset({"U8"}), frozenset({"I32", "U32"})
_STATE = tuple(
    f"weight.{part}"
    for part in (
        "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
        "quant_state.bitsandbytes__fp4",
    )
)  # fmt: skip
_ZERO = ("weight_zero_point", "weight_g_idx", "weight_shape", "input_global_scale")

_FORMATS: dict[str, tuple[_Format, ...]] = {
    "weight": (
        _Format("bitsandbytes 4-bit", frozenset(), ("weight.absmax",), _STATE),
        _Format("bitsandbytes 8-bit", _I8, ("SCB",), ("weight_format",)),
        _Format("EETQ", _I8, ("weight_scales",)),
        _Format("NVFP4", _U8, ("weight_scale", "weight_scale_2"), ("input_scale",)),
        _Format("8-bit integers", _I8, ("weight_scale",), _ZERO, vague=True),
        _Format("4-bit or narrower codes", _BYTES, ("weight_scale",), _ZERO, vague=True),
        _Format("4-bit or narrower codes", _BYTES, ("weight_scale_inv",), vague=True),
        _Format("4-bit or narrower codes", _BYTES, ("scale",), vague=True),
        _Format("HIGGS", _INTS, ("scales", "tables"), ("tables2",)),
        _Format("MLX or Metal", _WORDS, ("scales",), ("biases", "qbiases")),
    ),
    "qweight": (
        _Format("GPTQ", _WORDS, ("scales", "g_idx"), ("qzeros",)),
        _Format("AWQ or GPTQ", _INTS, ("scales",), ("qzeros",), vague=True),
    ),
    "weight_packed": (
        _Format("NVFP4 of compressed-tensors", _U8, ("weight_scale", "weight_global_scale"), _ZERO),
        _Format("compressed-tensors", _INTS, ("weight_scale",), _ZERO),
        _Format("compressed-tensors", _INTS, ("scale_packed",), ("meta",)),
    ),
    "weight.compressed": (_Format("compressed-tensors, sparse", frozenset(), ("weight.bitmask",), ("weight.shape",)),),
    "W_q": (
        _Format("HQQ", _INTS, (), ("scale", "zero", "meta")),
        _Format("HQQ", frozenset(), ("scale", "zero"), ("meta", "shape", "nbits", "group_size", "axis")),
    ),
    "weight._data": (_Format("Quanto", frozenset(), ("weight._scale",), ("weight._shift",)),),
    "codes": (_Format("AQLM", _INTS, ("codebooks",), ("scales",)),),
    "indices": (
        _Format("VPTQ", _INTS, ("centroids.weight",), ("res_indices", "res_centroids.weight", "weight_scale", "perm")),
        _Format("VPTQ", _INTS, ("centroids",), ("res_indices", "res_centroids", "weight_scale", "perm")),
    ),
    "dense_weights": (_Format("SpQR", frozenset(), ("row_offsets",), ("col_vals", "in_perm")),),
    "embedding_quantized": (_Format("Gemma's integers", _BYTES, ("embedding_scale",)),),
}  # fmt: skip

# What a name ends in besides: the codes' own ending, and those of what belongs to them.
_ENDINGS = (
    ("_blocks", "MXFP4", _U8, ("_scales",), ()),
    ("_qdata", "torchao", frozenset[str](), ("_scale",), ("_zero_point", "_per_tensor_scale", "_act_pre_scale")),
    ("_qdata", "torchao", frozenset[str](), ("_scale_and_zero",), ()),
)

# In the order of how surely each of them is a scale of the weight.
_FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight", "scale_weight")
# Scales of activations and of the cache of keys and values: nothing that a weight is made of.
ACTIVATION_SCALES = frozenset(
    {
        "input_scale", "activation_scale", "input_scale_ub", "output_scale", "qscale_act", "scale_input", "k_scale",
        "v_scale", "q_scale", "kv_scale", "prob_output_scale", "input_zero_point", "scaled_fp8",
    }
)  # fmt: skip


def packed_weights(catalog: Catalog) -> dict[str, Packed]:
    """Returns the tensors of codes by name, in the catalog's order; empty where all weights are numbers.

    Where the catalog's config says that the weights are quantized in a way that no name tells, matrices of 8-bit or
    packed integers are codes too.
    """
    found: dict[str, Packed] = {}
    for name in catalog.names():
        entry = catalog[name]
        if is_wide(entry) and name.endswith(".weight") and f"{name}.absmax" not in catalog.entries:
            continue  # most names of most models
        packed = _packed(catalog, name, entry)
        if packed is not None:
            found[name] = packed
    if catalog.quantized and not found:
        found = {name: Packed(catalog.quantized) for name in catalog.names() if _is_integer_matrix(catalog[name])}
    return found


def fp8_weights(catalog: Catalog) -> dict[str, str]:
    """Returns the float8 weights that can be dequantized, each with the name of its scale."""
    return {
        name: packed.scales[0]
        for name, entry in catalog.entries.items()
        if entry.dtype.name in FLOAT8
        and (packed := _fp8(catalog, name)) is not None
        and packed.title == FP8
        and packed.scales
    }


def unscaled(catalog: Catalog) -> list[str]:
    """Returns float8 weights of at least two axes that have no scale, though others of the catalog have one."""
    floats = [name for name, entry in catalog.entries.items() if entry.dtype.name in FLOAT8 and len(entry.shape) > 1]
    return [name for name in floats if _is_weight(name) and _fp8(catalog, name) is None]


def packed_places(packed: Collection[str]) -> frozenset[str]:
    """Returns the names of codes, and those that their weights would have if they were numbers."""
    return frozenset(packed) | {f"{_split(name)[0]}weight" for name in packed}


def module_of(name: str) -> str:
    """Returns what the names of a weight's codes and scales have in common, with the dot."""
    return _split(name)[0]


def _is_weight(name: str) -> bool:
    return "scale" not in name.rpartition(".")[2] and not name.endswith(("_qdata", "._data"))


def is_wide(entry: TensorEntry) -> bool:
    """Tells whether a tensor holds floats of more than eight bits: numbers, and no codes of float8."""
    return entry.dtype.itemsize > 1 and entry.dtype.kind == "float"


def _is_integer_matrix(entry: TensorEntry) -> bool:
    return entry.dtype.name in {"U8", "I8", "I16", "I32", "U32"} and len(entry.shape) > 1


def _split(name: str) -> tuple[str, str]:
    """Returns the module with its dot, and the rest: a part of bitsandbytes or Quanto has a dot of its own."""
    for inner in (".weight._data", ".weight.compressed"):
        if name.endswith(inner):
            return name.removesuffix(inner[1:]), inner[1:]
    leaf = name.rpartition(".")[2]
    return name.removesuffix(leaf), leaf


def _packed(catalog: Catalog, name: str, entry: TensorEntry) -> Packed | None:
    if entry.dtype.name in FLOAT8 and not name.endswith("_qdata"):
        found = _fp8(catalog, name)
        if found is not None or not name.endswith("._data"):
            return found
    module, leaf = _split(name)
    for form in _FORMATS.get(leaf, ()):
        needs = [module + part for part in form.needs]
        if (not form.dtypes or entry.dtype.name in form.dtypes) and all(part in catalog for part in needs):
            title = catalog.quantized if form.vague and catalog.quantized else form.title
            return Packed(title, (*needs, *_there(catalog, [module + part for part in form.with_])))
    if leaf == "weight" and entry.dtype.name == "U8" and len(entry.shape) == 2 and entry.shape[1] == 1:
        return Packed("bitsandbytes 4-bit")
    return _by_ending(catalog, name, entry)


def _by_ending(catalog: Catalog, name: str, entry: TensorEntry) -> Packed | None:
    for ending, title, dtypes, needs, more in _ENDINGS:
        stem = name.removesuffix(ending)
        if stem == name or (dtypes and entry.dtype.name not in dtypes):
            continue
        scales = [stem + part for part in needs]
        if all(scale in catalog for scale in scales):
            return Packed(title, (*scales, *_there(catalog, [stem + part for part in more])))
    return None


def _fp8(catalog: Catalog, name: str) -> Packed | None:
    """Returns the format of a float8 tensor, None for one without a scale."""
    module, leaf = _split(name)
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if leaf == "weight":
        names += [module + part for part in _FP8_SCALES]
    scale = next(_there(catalog, names), "")
    if not scale:
        return None
    # A zero point or a second scale changes the formula.
    more = tuple(_there(catalog, [f"{name}_zero_point", f"{name}_scale_2", f"{name}_global_scale"]))
    return Packed("fp8 with zero points or second scales" if more else FP8, (scale, *more))


def _there(catalog: Catalog, names: Collection[str]) -> Iterator[str]:
    return (name for name in names if name in catalog)


def titles(packed: Mapping[str, Packed], names: Collection[str]) -> str:
    """Returns the formats of some codes, for people."""
    return ", ".join(dict.fromkeys(packed[name].title for name in names if name in packed))
