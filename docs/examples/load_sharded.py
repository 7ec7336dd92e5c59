"""Fills a state dict from a checkpoint or mapping with DCP: python load_sharded.py CHECKPOINT."""

import sys

import torch
import torch.distributed.checkpoint as dcp

import shardmerge


def empty(tensor: shardmerge.LazyTensor) -> torch.Tensor:
    """Returns the memory for a tensor."""
    return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.torch))


checkpoint = shardmerge.open_checkpoint(sys.argv[1])
# With FSDP: state = model.state_dict() after fully_shard(model), with the names of the checkpoint.
state = {name: empty(tensor) for name, tensor in checkpoint.items()}
# With several ranks, omit no_dist.
dcp.load(state, storage_reader=checkpoint.storage_reader(), no_dist=True)
first = sorted(state)[0]
print(len(state), "tensors, of which", first, "sums to", float(state[first].float().sum()))
