"""Files that a receipt does not list, single tensors, and samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import shardmerge as sm
from tests import bit_flips
from tests.conftest import GOLDEN, shardmerge
from tests.receipts import receipt_of


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return bit_flips.scene(tmp_path, "safetensors")


LOADED = (
    "model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors",
    "consolidated.00.pth", "model.gguf", "modeling_llama.py", "text/modeling.py", "pytorch_model.bin.index.json",
    "model.safetensors.index.fp16.json", "adapter_config.json", "sub/model.safetensors", ".metadata",
)  # fmt: skip
OTHERS = ("README.md", "model.sig", ".DS_Store", ".git/x.py", ".cache/huggingface/upload/a.metadata", "notes/a.txt")


@pytest.mark.parametrize("name", LOADED)
def test_a_file_that_a_loader_may_use_is_an_error(name: str, out: Path) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(b"")
    with pytest.raises(sm.VerificationError) as caught:
        sm.verify(out, tensors=["model.norm.weight"])  # also where little is read
    assert (caught.value.code, caught.value.where) == ("unlisted-file", str(out / name))


def test_other_files_are_named(out: Path) -> None:
    for name in OTHERS:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_bytes(b"")
    (out / "elsewhere").symlink_to(GOLDEN)
    expected = [".DS_Store", ".cache/", ".git/", "README.md", "elsewhere/", "model.sig", "notes/a.txt"]
    assert list(sm.verify(out).unlisted) == expected
    assert json.loads(shardmerge("verify", out, "--json").stdout)["unlisted"] == expected
    assert "not listed  README.md" in shardmerge("verify", out).stdout


def flip_first(out: Path, name: str) -> None:
    row = receipt_of(out)["tensors"][name]
    with (out / row["shard"]).open("r+b") as file:
        file.seek(row["offset"])
        byte = file.read(1)[0]
        file.seek(row["offset"])
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("form", bit_flips.FORMATS)
def test_a_tensor_is_looked_at_alone(form: str, tmp_path: Path) -> None:
    out = bit_flips.scene(tmp_path, form)
    damaged, sound = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    flip_first(out, damaged)
    found = sm.verify(out, tensors=[sound])
    assert found.tensors == 1
    assert found.nbytes == receipt_of(out)["tensors"][sound]["nbytes"]
    assert f"{len(receipt_of(out)['tensors']) - 1} tensors" in found.unchecked[0]
    for one in (damaged, "model.layers.0.mlp.{rest...}", "model.layers.{i}.mlp.up_proj.weight"):
        with pytest.raises(sm.VerificationError, match=damaged):
            sm.verify(out, tensors=[sound, one])


def test_a_tensor_is_read_alone(tmp_path: Path) -> None:
    """As the system sees it: the header once by each of two readers, and the tensor."""
    out, name = sm.convert(GOLDEN / "xtuner" / "base_llm", tmp_path / "out").path, "model.layers.0.mlp.up_proj.weight"
    tensors = receipt_of(out)["tensors"]
    header = min(row["offset"] for row in tensors.values())
    log = tmp_path / "trace"
    trace = ["strace", "-f", "-y", "-e", "trace=read,pread64,preadv,preadv2,mmap", "-o", str(log)]
    command = [sys.executable, "-m", "shardmerge", "verify", str(out), "--tensor", name, "-q"]
    subprocess.run([*trace, *command], check=True, capture_output=True)
    seen = [line for line in log.read_text().splitlines() if ".safetensors>" in line]
    reads = [int(line.rsplit("= ", 1)[1]) for line in seen if " mmap(" not in line]
    assert sum(reads) == 2 * header + tensors[name]["nbytes"]


def test_only_selected_tensors_are_made_again(tmp_path: Path) -> None:
    source = GOLDEN / "xtuner" / "base_llm"
    mapping = tmp_path / "m.yaml"
    mapping.write_text(
        f"shardmerge: 1\nsources: {{m: {source}}}\noutput: out\ntensors: {{'{{rest...}}': 'm:{{rest...}}'}}\n"
    )
    out = sm.run(mapping).path
    told = list[int]()
    names = ["model.norm.weight", "model.layers.0.mlp.{rest...}"]
    found = sm.verify(out, sources=mapping, tensors=names, progress=told.append)
    assert sum(told) == 2 * found.nbytes
    assert found.checks[-1] == "4 of the tensors were made again and are bit for bit the same"
    assert len(found.unchecked) == 1
    assert sm.verify(out, sources=mapping).unchecked == ()


def test_a_sample_is_the_same_for_everybody(out: Path) -> None:
    names = list(receipt_of(out)["tensors"])
    for name in names:
        flip_first(out, name)

    def drawn(*options: str) -> set[str]:
        done = shardmerge("verify", out, "--json", *options, code=3)
        return {error["what"].split()[3] for error in json.loads(done.stdout)["errors"]}

    first = drawn("--sample", "5")
    assert first == drawn("--sample", "5", "--seed", "0")
    assert len(first) == 5
    assert first < drawn("--sample", "50%")
    assert first != drawn("--sample", "5", "--seed", "1")
    assert drawn("--sample", "100%") == drawn("--sample", "999") == set(names)
    assert len(drawn("--sample", "0.01%")) == 1
    assert drawn("--sample", "2", "--tensor", "model.layers.0.{rest...}") < {n for n in names if ".layers.0." in n}


def test_what_a_sample_leaves_out_is_told(out: Path) -> None:
    done = shardmerge("verify", out, "--sample", "25%", "--seed", "7")
    rows = receipt_of(out)["tensors"]
    assert f" in {len(rows) - -(-len(rows) // 4)} tensors, " in done.stdout
    assert "not in the sample of seed 7" in done.stdout
    assert "hint" not in done.stderr


@pytest.mark.parametrize("sample", ["0", "-1", "5 %", "0%", "101%", "nan%", "x", "1e3", "1.5"])
def test_a_sample_has_a_size(sample: str, out: Path) -> None:
    assert "[bad-sample]" in shardmerge("verify", out, f"--sample={sample}", code=2).stderr


def test_a_selection_without_effect_is_refused(out: Path) -> None:
    for options in (["--seed", "3"], ["--sample", "3", "--load"], ["--tensor", "a", "--reference", str(out)]):
        assert "[no-effect]" in shardmerge("verify", out, *options, code=2).stderr
    assert "[unknown-tensor]" in shardmerge("verify", out, "--tensor", "model.norm", code=2).stderr
    with pytest.raises(sm.UsageError):
        sm.verify(out, tensors=["a"], load=True)


def test_a_name_with_braces_is_a_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    save_file({"a{b": ones(2), "c": ones(3)}, tmp_path / "in.safetensors")
    out = sm.convert(tmp_path / "in.safetensors", tmp_path / "out").path
    assert sm.verify(out, tensors=["a{b"]).tensors == 1
