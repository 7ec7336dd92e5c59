"""Which tensors of a catalog are quantized weights packed into integers: codes, not numbers to compute with. Pure.

Names and shapes are those that the libraries themselves write:

* bitsandbytes 4-bit: ``weight`` is U8 ``[n, 1]``, two codes a byte, beside ``weight.absmax``, ``weight.quant_map`` and
  ``weight.quant_state.bitsandbytes__nf4`` or ``__fp4`` (``bitsandbytes/functional.py``, ``QuantState.as_dict``). A
  training checkpoint may hold the bytes alone, without the state that gives them a meaning.
* bitsandbytes 8-bit: ``weight`` is I8, beside ``SCB``, the largest magnitude of each row (``Linear8bitLt`` in
  ``bitsandbytes/nn/modules.py``).
* GPTQ and AWQ: ``qweight`` is I32, 32 / bits codes a number, beside ``qzeros`` and ``scales`` (``auto_gptq``,
  ``awq/modules/linear``).
* compressed-tensors: ``weight_packed`` is I32, beside ``weight_scale`` (``compressors/quantized_compressors``).
"""

from __future__ import annotations

from shardmerge.tensors import Catalog, TensorEntry

_QUANT_STATE = ".quant_state.bitsandbytes__"


def packed_weights(catalog: Catalog) -> tuple[str, ...]:
    """Returns the names of the packed weights of a catalog, in its order; empty where all weights are plain."""
    stated = {name.partition(_QUANT_STATE)[0] for name in catalog.names() if _QUANT_STATE in name}
    return tuple(name for name in catalog.names() if name in stated or _is_packed(catalog, name, catalog[name]))


def _is_packed(catalog: Catalog, name: str, entry: TensorEntry) -> bool:
    leaf = name.rpartition(".")[2]
    module = name.removesuffix(leaf)
    match leaf:
        case "weight":
            bare = entry.dtype.name == "U8" and len(entry.shape) == 2 and entry.shape[1] == 1
            return bare or f"{name}.absmax" in catalog or (entry.dtype.name == "I8" and f"{module}SCB" in catalog)
        case "qweight":
            return entry.dtype.kind == "int" and f"{module}scales" in catalog
        case "weight_packed":
            return entry.dtype.kind == "int" and f"{module}weight_scale" in catalog
        case _:
            return False
