"""Walks over a checkpoint with one tensor in memory at a time: python walk.py CHECKPOINT."""

import sys

import numpy as np

import shardmerge

for name, tensor in shardmerge.open_checkpoint(sys.argv[1]).items():
    values = tensor.numpy()
    if tensor.dtype.kind == "float" and values.size:
        print(name, "largest", float(np.abs(values.astype(np.float32)).max()))
