"""The tensors of a mapping without writing them: python merge_in_memory.py MAPPING."""

import sys

import shardmerge

merged = shardmerge.open_checkpoint(sys.argv[1])  # a .yaml gives the target's names
state_dict = {name: tensor.torch() for name, tensor in merged.items()}  # needs torch
print(merged)
for name, value in state_dict.items():
    print(name, value.dtype, tuple(value.shape), "<-", merged[name].origin)
