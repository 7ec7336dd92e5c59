"""Converts to bfloat16 and checks every byte: python convert_and_verify.py CHECKPOINT OUT."""

import sys

import shardmerge

source, out = sys.argv[1:3]
result = shardmerge.convert(source, out, dtype="bfloat16", shard_size="2GB")
print(len(result.outcome.checksums), "tensors,", result.plan.tensor_bytes, "bytes")
for name, count in result.outcome.overflows.items():
    print("overflow:", name, count)
for check in shardmerge.verify(out).checks:
    print("ok:", check)
