"""Runs a plan on a copy of its sources: python plan_elsewhere.py MAPPING SOURCES COPY."""

import shutil
import sys
from pathlib import Path

import shardmerge
from shardmerge import api

mapping, sources, new_place = sys.argv[1:4]
prepared = api.prepare(Path(mapping), shardmerge.Options())
api.write_plan(prepared, Path("plan.json"), Path("out").absolute())
shutil.copytree(sources, new_place)  # keeps the times, as cp -a and rsync -a do
roots = [(str(Path(sources).resolve()), str(Path(new_place).resolve()))]
moved = api.prepare(Path("plan.json"), shardmerge.Options(), roots)
print("same plan:", moved.plan.id == prepared.plan.id)
result = api.carry_out(moved, api.output_path(moved, None, "plan.json"), shardmerge.Options())
print("published:", result.path.name, result.made, "file")
