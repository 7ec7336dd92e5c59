"""A view of the largest tensor, and a copy of it: python views.py CHECKPOINT."""

import sys

import shardmerge

checkpoint = shardmerge.open_checkpoint(sys.argv[1])
largest = max(checkpoint.values(), key=lambda tensor: tensor.nbytes)
view = largest.numpy()  # no byte is read yet
how = "mapped" if largest.mapped else "read"
print(largest.name, "is", how, view.shape, "writeable:", view.flags.writeable)
weight = largest.torch()  # needs torch
weight.zero_()  # in memory only: the file and `view` do not change
copy = largest.numpy(copy=True)  # read now, unaffected by later changes to the file
print("as in the file:", (view == copy).all())
