"""A view of the largest tensor, and a copy of it: python views.py CHECKPOINT."""

import sys

import shardmerge

checkpoint = shardmerge.open_checkpoint(sys.argv[1])
largest = max(checkpoint.values(), key=lambda tensor: tensor.nbytes)
view = largest.numpy()  # no byte is read yet
print(largest.name, "is", "mapped" if largest.mapped else "read", view.shape, "writeable:", view.flags.writeable)
weight = largest.torch()  # needs torch
weight.zero_()  # in memory: the file and `view` stay as they are
copy = largest.numpy(copy=True)  # read at once, safe from what happens to the file
print("as in the file:", (view == copy).all())
