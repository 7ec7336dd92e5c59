"""The product that a module's tensors make, whatever the tool: LoRA, LoHa, LoKr. Pure.

Each becomes an entry over views of the factors. A convolution's are matrices over flattened kernels; Tucker's core
(``hada_t1``, ``lokr_t2``) is contracted first, as ``make_weight_cp`` of peft 0.21 and ``rebuild_tucker`` of LyCORIS.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.compose import compose
from shardmerge.errors import MappingError
from shardmerge.ops.fill import Fill
from shardmerge.ops.lora import Lora
from shardmerge.ops.lycoris import LoHa, LoKr, ScaleBy
from shardmerge.ops.rearranging import Permute, Reshape
from shardmerge.tensors import TensorEntry

Parts = Mapping[str, TensorEntry]

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def is_lycoris(parts: Parts) -> bool:
    """Whether a module's tensors are LyCORIS's."""
    return any(part.startswith(("hada_", "lokr_")) for part in parts)


def lycoris_rank(parts: Parts) -> int | None:
    """Returns the rank of a module, None for a LoKr of two whole factors, which has none."""
    of_rows = ("hada_w1_b", "hada_t1", "lokr_w1_b", "lokr_t2", "lokr_w2_b")
    found = [parts[part].shape[0] for part in of_rows if part in parts and parts[part].shape]
    return found[0] if found else None


def lycoris_weight(base: TensorEntry, module: str, parts: Parts, scale: float) -> TensorEntry:
    """Returns the base with a LyCORIS product added.

    Raises
    ------
    MappingError
        ``adapter-incomplete``: a factor is not there. ``op-shape``: factors and base do not fit.
    """
    if len(base.shape) > 2:
        flat = lycoris_weight(compose(Reshape((base.shape[0], -1)), [base]), module, parts, scale)
        return compose(Reshape(base.shape), [flat])
    if any(part.startswith("hada_") for part in parts):
        _check(module, parts, _HADA)
        w1 = _tucker(parts, "hada_t1", "hada_w1_a", "hada_w1_b")
        w2 = _tucker(parts, "hada_t2", "hada_w2_a", "hada_w2_b")
        return compose(LoHa(scale), [*_scaled(w1, parts), *w2, base])
    first, second = _kronecker(module, parts, "lokr_w1"), _kronecker(module, parts, "lokr_w2")
    if lycoris_rank(parts) is not None:  # two whole factors count once, whatever alpha stands beside them
        (first,) = _scaled((first,), parts)
    return compose(LoKr(scale), [first, second, base])


def scaled_by_alpha(a: TensorEntry, parts: Parts) -> TensorEntry:
    """Returns A times the ``.alpha`` that stands beside it, where there is one."""
    return _scaled((a,), parts)[0]


def _scaled(factors: tuple[TensorEntry, ...], parts: Parts) -> tuple[TensorEntry, ...]:
    if "alpha" not in parts:
        return factors
    first, *others = factors
    return (compose(ScaleBy(), [first, parts["alpha"]]), *others)


def _kronecker(module: str, parts: Parts, name: str) -> TensorEntry:
    """A factor of Kronecker, ``[rows, columns]``: whole, or a product of two or three."""
    if name in parts:
        return _flat(parts[name])
    _check(module, parts, (f"{name}_a", f"{name}_b"))
    left, right = _tucker(parts, name.replace("_w", "_t"), f"{name}_a", f"{name}_b")
    return _product(left, right)


def _tucker(parts: Parts, core: str, left: str, right: str) -> tuple[TensorEntry, TensorEntry]:
    """Two factors ``[out, r]`` and ``[r, in * kernel]``; with a core they are ``[r, out]`` and ``[r, in]`` first."""
    if core not in parts:
        return _flat(parts[left]), _flat(parts[right])
    rank, other, *kernel = parts[core].shape
    last = compose(Permute((0, *range(2, 2 + len(kernel)), 1)), [parts[core]])
    product = _product(compose(Reshape((-1, other)), [last]), parts[right])
    width = parts[right].shape[1]
    apart = compose(Reshape((rank, *kernel, width)), [product])
    turned = compose(Permute((0, len(kernel) + 1, *range(1, len(kernel) + 1))), [apart])
    return compose(Permute(), [parts[left]]), compose(Reshape((rank, -1)), [turned])


def _product(left: TensorEntry, right: TensorEntry) -> TensorEntry:
    zeros = compose(Fill((left.shape[0], right.shape[1]), left.dtype, 0.0), [])
    return compose(Lora(1.0), [right, left, zeros])


def _flat(entry: TensorEntry) -> TensorEntry:
    return compose(Reshape((entry.shape[0], -1)), [entry]) if len(entry.shape) > 2 else entry


def _check(module: str, parts: Parts, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise MappingError("adapter-incomplete", f"{module} has no {missing[0]}", found=", ".join(parts))
