"""Checkpoints of true shape at any size, written with little memory by torch itself.

``torch.save`` under ``skip_data`` writes every header and leaves holes where the data would be; the holes are then
filled, or not: a plan needs headers only.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile, ZipInfo

import ml_dtypes
import numpy as np
import torch

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a LLaMA that decide its tensors."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int

    def tensors(self, prefix: str = "") -> dict[str, tuple[int, ...]]:
        """Returns every tensor of LlamaForCausalLM with its shape, in the model's order."""
        kv = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            found[f"{at}.self_attn.q_proj.weight"] = (self.hidden, self.hidden)
            found[f"{at}.self_attn.k_proj.weight"] = (kv, self.hidden)
            found[f"{at}.self_attn.v_proj.weight"] = (kv, self.hidden)
            found[f"{at}.self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            found[f"{at}.mlp.gate_proj.weight"] = (self.intermediate, self.hidden)
            found[f"{at}.mlp.up_proj.weight"] = (self.intermediate, self.hidden)
            found[f"{at}.mlp.down_proj.weight"] = (self.hidden, self.intermediate)
            found[f"{at}.input_layernorm.weight"] = (self.hidden,)
            found[f"{at}.post_attention_layernorm.weight"] = (self.hidden,)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocab, self.hidden)
        return {prefix + name: shape for name, shape in found.items()}


LLAMA_3_8B = LlamaShape(4096, 32, 32, 8, 14336, 128256)


def llama_of(fp32_bytes: int) -> LlamaShape:
    """Returns a LLaMA of about ``fp32_bytes`` bytes in fp32, as many layers as that takes.

    Below 16 GiB its layers have 12.6 M parameters and its vocabulary 32,000; from there on it has the widths of the 8B.
    A model of 8 GiB with 3,000 tensors, which nobody trains, would measure the cost of names.
    """
    small = LlamaShape(1024, 1, 16, 8, 3072, 32_000)
    shape = replace(LLAMA_3_8B, layers=1) if fp32_bytes >= 16 << 30 else small
    one, two = (_fp32_bytes(replace(shape, layers=layers)) for layers in (1, 2))
    return replace(shape, layers=max((fp32_bytes - 2 * one + two) // (two - one), 1))


def _fp32_bytes(shape: LlamaShape) -> int:
    return 4 * sum(prod(dims) for dims in shape.tensors().values())


def write_zero(
    folder: Path, shapes: Shapes, *, stage: int, world: int, fill: bool, extra: Mapping[str, object] | None = None
) -> Path:
    """Writes a DeepSpeed ZeRO-2 or ZeRO-3 tag directory (bf16 training, Adam) and returns it.

    Parameters
    ----------
    folder
        The save directory; gets ``latest`` and ``global_step1/``.
    shapes
        Trainable parameters, one group.
    stage, world
        ZeRO stage (2 or 3) and ranks.
    fill
        Whether the master weights get random values, and the module of stage 2 the same in bf16, as in any checkpoint;
        the moments stay holes.
    extra
        Further keys of the model file, as a client state has.
    """
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    for rank in range(world if stage == 3 else 1):
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        _save(model_states(shapes, stage, world, extra or {}), tag / name)
    for rank in range(world):
        path = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        flat = rank_numel(shapes, stage, world, rank)
        _save(optim_states(flat, stage, world), path)
        if fill:
            _fill(path, flat, seed=rank)
    if fill and stage == 2:
        _fill_module(tag, shapes, world)
    return tag


def write_safetensors(
    path: Path,
    shapes: Shapes,
    dtype: str = "BF16",
    metadata: bool = True,
    fill: bool = False,
    *,
    sharding: bool = False,
    seed: int = 0,
) -> None:
    """Writes a safetensors file with a true header, and random values or a hole for its data.

    With ``sharding`` the header also says, as torch's distributed checkpoints do, that every tensor in it is whole.
    """
    told = {"format": "pt"} | ({"DCP_SHARDING_INFO": _whole(shapes)} if sharding else {})
    fields: dict[str, object] = {"__metadata__": told} if metadata else {}
    cursor = 0
    for name, shape in shapes.items():
        end = cursor + prod(shape) * (4 if dtype == "F32" else 2)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [cursor, end]}
        cursor = end
    text = json.dumps(fields).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + cursor)
        if fill:
            write_normal(file, cursor // (4 if dtype == "F32" else 2), seed=seed, half=dtype != "F32")


def _whole(shapes: Shapes) -> str:
    return json.dumps({name: {"saved_offsets": [0] * len(shape)} for name, shape in shapes.items()})


def master_weights(tag: Path, world: int, total: int, start: int, count: int) -> np.ndarray:
    """Returns ``count`` fp32 master weights of a ZeRO-2 tag directory of ``total``, from element ``start`` on."""
    share, found = -(-total // (2 * world)) * 2, []
    for rank in range(world):
        first, end = max(start, rank * share), min(start + count, (rank + 1) * share)
        if first < end:
            path = tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            numel = min(share, total - rank * share)
            offset = _last_storage(path, 4 * numel) + 4 * (first - rank * share)
            found.append(np.fromfile(path, np.float32, end - first, offset=offset))
    return np.concatenate(found)


def write_torch(path: Path, value: object) -> None:
    """Writes a torch zip file with true headers and holes for its data."""
    _save(value, path)


def _save(value: object, path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save(value, path)


def model_states(shapes: Shapes, stage: int, world: int, extra: Mapping[str, object]) -> dict[str, object]:
    """What a rank's ``model_states`` file holds: stage 3 has placeholders for the module."""
    if stage == 3:
        module = {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes}
    else:
        module = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "dp_world_size": world,
        "mp_world_size": 1,
        "global_steps": 0,  # as many as the optimizer's counter says, which is a hole
        "ds_version": "0.19.8",
        **extra,
    }


def rank_numel(shapes: Shapes, stage: int, world: int, rank: int) -> int:
    """Returns the elements of a rank's flat fp32 group."""
    if stage == 3:
        return sum(-(-prod(shape) // world) for shape in shapes.values())
    total = sum(prod(shape) for shape in shapes.values())
    part = -(-total // (2 * world)) * 2
    return min(part, total - rank * part)


def optim_states(numel: int, stage: int, world: int) -> dict[str, object]:
    """What a rank's ``optim_states`` file holds: flat masters of so many elements, Adam's moments."""

    def flat() -> torch.Tensor:
        return torch.empty(numel, dtype=torch.float32)

    adam = {"state": {0: {"step": torch.ones(()), "exp_avg": flat(), "exp_avg_sq": flat()}}, "param_groups": []}
    state: dict[str, object] = {"zero_stage": stage, "loss_scaler": None, "overflow": False}
    if stage == 3:
        state |= {"partition_count": world, "optimizer_state_dict": adam, "fp32_flat_groups": [flat()]}
    else:
        state |= {
            "base_optimizer_state": adam,
            "single_partition_of_fp32_groups": [flat()],
            "partition_count": [world],
            "group_paddings": [0],
        }
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}


def _fill(path: Path, numel: int, seed: int) -> None:
    """Writes normal values, 0.02 wide like real weights, into the last storage of ``numel`` floats of the file."""
    with path.open("r+b") as file:
        file.seek(_last_storage(path, 4 * numel))
        write_normal(file, numel, seed)


def _fill_module(tag: Path, shapes: Shapes, world: int) -> None:
    """Writes the masters, rounded to bf16, into the module, whose storages are pickled first and in order."""
    path = tag / "mp_rank_00_model_states.pt"
    total, start = sum(map(prod, shapes.values())), 0
    with ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    with path.open("r+b") as file:
        for index, numel in enumerate(map(prod, shapes.values())):
            file.seek(_data_offset(path, members[f"{path.stem}/data/{index}"]))
            for done in range(0, numel, 1 << 22):
                masters = master_weights(tag, world, total, start + done, min(1 << 22, numel - done))
                file.write(masters.astype(ml_dtypes.bfloat16).tobytes())
            start += numel


def write_normal(file: BinaryIO, numel: int, seed: int, *, half: bool = False) -> None:
    """Writes fp32 values at the file's position, or the upper halves of them, which are bf16 values."""
    values = np.random.default_rng(seed).standard_normal(1 << 22, np.float32) * np.float32(0.02)
    block = values.view(np.uint16)[1::2].copy() if half else values
    file.writelines(block[: numel - start].tobytes() for start in range(0, numel, len(block)))


def _last_storage(path: Path, nbytes: int) -> int:
    """Returns where the data of the last zip member of this size starts: the master weights are pickled last."""
    with ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.file_size == nbytes]
    return _data_offset(path, members[-1])


def _data_offset(path: Path, member: ZipInfo) -> int:
    with path.open("rb") as file:
        file.seek(member.header_offset)
        header = file.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return member.header_offset + 30 + int(name) + int(extra)


def clip_tensors(
    hidden: int, layers: int, image: int, patch: int, prefix: str = "vision_model."
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the tensors of CLIPVisionModel, in the model's order."""
    yield f"{prefix}embeddings.class_embedding", (hidden,)
    yield f"{prefix}embeddings.patch_embedding.weight", (hidden, 3, patch, patch)
    yield f"{prefix}embeddings.position_embedding.weight", ((image // patch) ** 2 + 1, hidden)
    for side in ("weight", "bias"):
        yield f"{prefix}pre_layrnorm.{side}", (hidden,)
        yield f"{prefix}post_layernorm.{side}", (hidden,)
    for layer in range(layers):
        yield from _clip_layer(f"{prefix}encoder.layers.{layer}", hidden)


def clip_model_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the float tensors of the full CLIPModel ViT-L/14-336: both encoders, both projections, the scale."""
    vision, text, projection = 1024, 768, 768
    yield "logit_scale", ()
    yield "text_model.embeddings.token_embedding.weight", (49408, text)
    yield "text_model.embeddings.position_embedding.weight", (77, text)
    for layer in range(12):
        yield from _clip_layer(f"text_model.encoder.layers.{layer}", text)
    for side in ("weight", "bias"):
        yield f"text_model.final_layer_norm.{side}", (text,)
    yield from clip_tensors(vision, 24, 336, 14)
    yield "visual_projection.weight", (projection, vision)
    yield "text_projection.weight", (projection, text)


def _clip_layer(at: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner = 4 * hidden
    for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
        yield f"{at}.self_attn.{name}.weight", (hidden, hidden)
        yield f"{at}.self_attn.{name}.bias", (hidden,)
    for name in ("layer_norm1", "layer_norm2"):
        yield f"{at}.{name}.weight", (hidden,)
        yield f"{at}.{name}.bias", (hidden,)
    yield f"{at}.mlp.fc1.weight", (inner, hidden)
    yield f"{at}.mlp.fc1.bias", (inner,)
    yield f"{at}.mlp.fc2.weight", (hidden, inner)
    yield f"{at}.mlp.fc2.bias", (hidden,)
