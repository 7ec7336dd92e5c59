"""What is in a checkpoint? Reads headers only: python look_inside.py CHECKPOINT."""

import sys

import shardmerge

catalog = shardmerge.inspect(sys.argv[1])
print(catalog.kind, len(catalog.entries), "tensors")
for note in catalog.notes:
    print("note:", note)
for entry in sorted(catalog.entries.values(), key=lambda entry: -entry.nbytes)[:3]:
    print(entry.name, entry.dtype, list(entry.shape), entry.origin)
