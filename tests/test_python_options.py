"""Options from Python: what the command line takes, with its messages; and ``plan``, a function and a package."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

import shardmerge
from shardmerge.cli.main import cli
from shardmerge.dtypes import DTYPES


@pytest.fixture
def mapping(tmp_path: Path) -> Path:
    tensors = {f"layers.{i}.w": torch.randn(64, 32) for i in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "mapping.yaml").write_text(
        'shardmerge: 1\nsources: {a: model.safetensors}\ntensors:\n  "{rest...}": a:{rest...}\n'
    )
    return tmp_path / "mapping.yaml"


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", "bf16", "torch.bfloat16", "BF16", torch.bfloat16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16),
     DTYPES["BF16"]],
    ids=repr,
)  # fmt: skip
def test_a_dtype_by_any_of_its_names(dtype: object) -> None:
    assert shardmerge.Options(dtype=dtype).dtype == DTYPES["BF16"]


def test_numpy_types() -> None:
    assert shardmerge.Options(dtype=np.float16).dtype == DTYPES["F16"]
    assert shardmerge.Options(dtype=np.dtype("float32")).dtype == DTYPES["F32"]


def test_sizes_as_text() -> None:
    found = shardmerge.Options(memory="256MiB", shard_size="5GB")
    assert (found.memory, found.shard_size) == (256 << 20, 5_000_000_000)
    assert shardmerge.Options(memory=1 << 20).memory == 1 << 20


@pytest.mark.parametrize(
    ("option", "argument", "value"),
    [
        ("dtype", "--dtype", "bflot16"),
        ("dtype", "--dtype", "int8"),
        ("shard_size", "--shard-size", "5GiB"),
        ("shard_size", "--shard-size", "big"),
        ("memory", "--max-memory", "1 parsec"),
    ],
)
def test_the_messages_are_those_of_the_command_line(mapping: Path, option: str, argument: str, value: str) -> None:
    with pytest.raises(shardmerge.UsageError) as caught:
        shardmerge.run(mapping, mapping.parent / "out", **{option: value})
    asked = CliRunner().invoke(cli, ["run", str(mapping), "--out", "out", argument, value], standalone_mode=False)
    assert isinstance(asked.exception, shardmerge.UsageError)
    assert caught.value.lines() == asked.exception.lines()
    assert not (mapping.parent / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", 16), ("dtype", torch.int8), ("shard_size", 0), ("shard_size", 5.0), ("memory", True),
        ("memory", -1), ("workers", 0), ("workers", "2"), ("format", "safetensor"), ("io", "read"), ("files", True),
        ("device", "gpu"), ("engine", "dask"), ("check", True), ("overwrite", "no"), ("sync", 0),
    ],
)  # fmt: skip
def test_other_values_are_errors_that_name_the_option(option: str, value: object) -> None:
    with pytest.raises(shardmerge.UsageError) as caught:
        shardmerge.Options(**{option: value})
    assert caught.value.code in ("unknown-dtype", "bad-size", "bad-option")
    assert caught.value.expected
    if caught.value.code == "bad-option":
        assert option in caught.value.what


def test_options_by_keyword(mapping: Path) -> None:
    out = mapping.parent / "out"
    result = shardmerge.run(mapping, out, dtype=torch.float16, shard_size="6KB")
    assert len(result.plan.shards) == 4
    with safe_open(out / "model-00001-of-00004.safetensors", "pt") as file:
        assert file.get_tensor("layers.0.w").dtype == torch.float16
    assert shardmerge.verify(out, sources=mapping, dtype="float16", shard_size="6KB").tensors == 4
    plan = shardmerge.plan(mapping, shardmerge.Options(dtype="float16", shard_size="5GB"), shard_size="6KB")
    assert plan.id == result.plan.id
    converted = shardmerge.convert(mapping.parent / "model.safetensors", mapping.parent / "plain", dtype="bf16")
    assert {tensor.dtype.name for tensor in converted.plan.tensors()} == {"BF16"}


def test_a_keyword_that_is_no_option(mapping: Path) -> None:
    with pytest.raises(TypeError, match="there is no option 'dtpye'; did you mean `dtype`"):
        shardmerge.plan(mapping, dtpye="bfloat16")


@pytest.mark.parametrize(
    "program",
    [
        "import shardmerge.plan as p; import shardmerge.plan.value; assert p.value.Plan",
        "import shardmerge.plan; assert shardmerge.plan.__path__",
        "from shardmerge import plan; import shardmerge.plan.value; assert plan(MAPPING).target",
        "import shardmerge.plan.value; from shardmerge import plan; assert plan(MAPPING, dtype='bf16').target",
        "from shardmerge import *; assert plan(MAPPING).target",
        "import shardmerge; assert shardmerge.plan(MAPPING).target; import shardmerge.plan.value as v; assert v.Plan",
        "from shardmerge.plan.value import Plan; import shardmerge; assert isinstance(shardmerge.plan(MAPPING), Plan)",
    ],
)
def test_plan_is_a_function_and_a_package(mapping: Path, program: str) -> None:
    subprocess.run([sys.executable, "-c", program.replace("MAPPING", repr(str(mapping)))], check=True)


def test_plan_has_the_signature_of_the_function() -> None:
    import shardmerge.api

    assert inspect.signature(shardmerge.plan) == inspect.signature(shardmerge.api.plan)
