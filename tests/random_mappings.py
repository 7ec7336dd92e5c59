"""Mappings drawn at random, nested moves and arithmetic over small files, with what torch makes of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

Tensor = torch.Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Most ops inside of each other.
_DEEP = 4


@dataclass(frozen=True)
class Drawn:
    """A tensor of a mapping: how the mapping says it, and its value."""

    text: str
    value: Tensor


def write_sources(folder: Path) -> dict[str, Tensor]:
    """Writes two files, one of safetensors and one of torch, and returns their tensors by reference."""
    torch.manual_seed(5)
    first = {f"w{i}": torch.randn(shape) for i, shape in enumerate([(6, 8), (4, 12), (8, 8), (5, 7)])}
    first |= {"h": torch.randn(6, 8).to(torch.bfloat16), "ids": torch.arange(24).reshape(4, 6)}
    second = {
        "t": torch.randn(12, 10).t(),
        "part": torch.randn(40, 6)[8:20],
        "half": torch.randn(6, 8).to(torch.float16),
    }
    save_file(first, folder / "a.safetensors")
    torch.save(second, folder / "b.pth")
    return {f"a:{name}": value for name, value in first.items()} | {
        f"b:{name}": value for name, value in second.items()
    }


def draw(source: random.Random, tensors: Mapping[str, Tensor], depth: int = _DEEP) -> Drawn:
    """Returns an expression of at most so many ops inside of each other."""
    if not depth or source.random() < 0.2:
        name = source.choice(sorted(tensors))
        return Drawn(f'"{name}"', tensors[name])
    inner = draw(source, tensors, depth - 1)
    ways = [_slice, _split, _transposed, _reshaped, _joined, _stacked]
    if inner.value.is_floating_point():
        ways += [_scaled, _cast, _averaged]
    return source.choice(ways)(source, inner)


def _slice(source: random.Random, one: Drawn) -> Drawn:
    dim = source.randrange(one.value.dim())
    size = one.value.shape[dim]
    start = source.randrange(size)
    stop = source.randint(start + 1, size)
    return Drawn(
        f"{{op: slice, of: {one.text}, dim: {dim}, start: {start}, stop: {stop}}}",
        one.value.narrow(dim, start, stop - start),
    )


def _split(source: random.Random, one: Drawn) -> Drawn:
    dim = source.randrange(one.value.dim())
    size = one.value.shape[dim]
    cut = source.randint(0, size)
    sizes = [part for part in (cut, size - cut) if part]
    take = source.randrange(len(sizes))
    text = f"{{op: split, of: {one.text}, dim: {dim}, sizes: {sizes}, take: {take}}}"
    return Drawn(text, one.value.split(sizes, dim)[take])


def _transposed(source: random.Random, one: Drawn) -> Drawn:
    if one.value.dim() < 2:
        return one
    dims = list(range(one.value.dim()))
    source.shuffle(dims)
    return Drawn(f"{{op: permute, of: {one.text}, dims: {dims}}}", one.value.permute(dims))


def _reshaped(source: random.Random, one: Drawn) -> Drawn:
    numel = one.value.numel()
    rows = source.choice([n for n in range(1, numel + 1) if numel % n == 0])
    return Drawn(f"{{op: reshape, of: {one.text}, shape: [{rows}, -1]}}", one.value.reshape(rows, -1))


def _joined(source: random.Random, one: Drawn) -> Drawn:
    dim = source.randrange(one.value.dim())
    return Drawn(f"{{op: concat, of: [{one.text}, {one.text}], dim: {dim}}}", torch.cat([one.value, one.value], dim))


def _stacked(source: random.Random, one: Drawn) -> Drawn:
    dim = source.randint(0, one.value.dim())
    return Drawn(f"{{op: stack, of: [{one.text}, {one.text}], dim: {dim}}}", torch.stack([one.value, one.value], dim))


def _scaled(source: random.Random, one: Drawn) -> Drawn:
    factor = source.choice([0.5, -3.0, 0.1, 1 / 3])
    return Drawn(f"{{op: scale, of: {one.text}, factor: {factor!r}}}", one.value.float() * factor)


def _cast(source: random.Random, one: Drawn) -> Drawn:
    name = source.choice(sorted(DTYPES))
    return Drawn(f"{{op: cast, of: {one.text}, dtype: {name}}}", one.value.to(DTYPES[name]))


def _averaged(source: random.Random, one: Drawn) -> Drawn:
    weights = [source.choice([0.25, 0.5, 2.0]), source.choice([0.75, -1.0])]
    text = f"{{op: linear, of: [{one.text}, {one.text}], weights: {weights}}}"
    return Drawn(text, one.value.float() * weights[0] + one.value.float() * weights[1])


def write_mapping(folder: Path, drawn: Mapping[str, Drawn], every: Mapping[str, Tensor], more: str = "") -> Path:
    """Writes the mapping of some tensors beside their sources; those of ``every`` that none uses are dropped."""
    rules = "".join(f"  {name}: {one.text}\n" for name, one in drawn.items())
    drops = [name for name in every if not any(f'"{name}"' in one.text for one in drawn.values())]
    text = "shardmerge: 1\nsources: {a: a.safetensors, b: b.pth}\n"
    text += f"output: {{path: out, shard_size: 400{more}}}\ntensors:\n{rules}drop: {drops}\n"
    path = folder / "mapping.yaml"
    path.write_text(text, "utf-8")
    return path
