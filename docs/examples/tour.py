"""Every public name once: python tour.py MAPPING CHECKPOINT OUT."""

import sys

import shardmerge

mapping, checkpoint, out = sys.argv[1:4]

# Values that are made from headers alone.
catalog: shardmerge.Catalog = shardmerge.inspect(checkpoint)
entry: shardmerge.TensorEntry = next(iter(catalog.entries.values()))
layout = shardmerge.layout_of(catalog) or "unknown"
print("inspect:", catalog.kind, "layout:", layout, "first:", entry.name)
print("matching:", shardmerge.matching(catalog, ["{layer}.weight"]))
print("presets:", len(shardmerge.presets()), "in version", shardmerge.__version__)

# A plan, its result, and a verification.
options = shardmerge.Options(dtype="bfloat16", memory="256MiB", overwrite=True)
plan: shardmerge.Plan = shardmerge.plan(mapping, options)
result: shardmerge.Result = shardmerge.run(mapping, out, options)
verdict: shardmerge.Verdict = shardmerge.verify(result.path)
print("run:", verdict.tensors, "tensors, as planned:", result.plan.id == plan.id)
print("cleaned:", len(shardmerge.clean(out)), "unfinished runs")

# The same tensors without writing them, and a comparison.
merged: shardmerge.LazyCheckpoint = shardmerge.open_checkpoint(mapping)
tensor: shardmerge.LazyTensor = next(iter(merged.values()))
print("open_checkpoint:", tensor.name, tensor[...].shape)
converted = shardmerge.convert(out, f"{out}-fp32", dtype="float32", overwrite=True)
found: shardmerge.Comparison = shardmerge.diff(result.path, converted.path)
worst: shardmerge.Difference = found.differences[0]
distance: shardmerge.Distance | None = worst.distance
largest = distance.max_abs if distance else 0.0
print("diff:", worst.what, "of", len(found), "tensors; largest difference", largest)
same = shardmerge.diff(result.path, converted.path, how=shardmerge.Closeness(cast="bfloat16"))
print("after a cast:", len(same), "differences")
print("report:", shardmerge.report(result.path).name)
statement, verdict = shardmerge.attest(result.path, mapping=mapping, options=options)
print("attested:", statement.name, len(verdict.digests), "files of weights")

# Errors: the class states the kind, the code the exact error.
refused = (
    shardmerge.CheckpointError,
    shardmerge.MappingError,
    shardmerge.TargetError,
    shardmerge.OutputError,
)
assert all(issubclass(kind, shardmerge.RefusedError) for kind in refused)
others = (
    shardmerge.UsageError,
    shardmerge.VerificationError,
    shardmerge.ResourceError,
    shardmerge.InterruptedRunError,
    shardmerge.PublishedError,
    shardmerge.Problems,
)
assert all(issubclass(kind, shardmerge.ShardmergeError) for kind in others)
try:
    shardmerge.plan("no-such.yaml")
except shardmerge.ShardmergeError as error:
    print("error:", error.code, error.exit_code)
