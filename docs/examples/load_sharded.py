"""Fills a state dict from a checkpoint or mapping by torch's DCP: python load_sharded.py CHECKPOINT."""

import sys

import torch
import torch.distributed.checkpoint as dcp

import shardmerge

checkpoint = shardmerge.open_checkpoint(sys.argv[1])
# With FSDP: state = model.state_dict() after fully_shard(model); the names must be those of the checkpoint.
state = {name: torch.empty(one.shape, dtype=getattr(torch, one.dtype.torch)) for name, one in checkpoint.items()}
dcp.load(state, storage_reader=checkpoint.storage_reader(), no_dist=True)  # without no_dist where there are ranks
print(len(state), "tensors, of which", sorted(state)[0], "sums to", float(state[sorted(state)[0]].float().sum()))
