"""Lazy tensors fed to transformers and to torch's distributed checkpoints; what is read is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge import feeds
from shardmerge.dtypes import DTYPES
from tests.load_environments import VERSIONS, interpreter, ready

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(HERE.parent)}
MAPPING = """\
shardmerge: 1
sources: {trained: trained}
output: {path: out, dtype: bfloat16}
tensors:
  "{rest...}": trained:{rest...}
"""


# What torch says where there is one process only.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def run(*command: object) -> str:
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- transformers ---


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32 as a mapping that casts it, and the reference that transformers casts and saves."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tuned")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.save(model.state_dict(), folder / "trained.pth")
    model.to(torch.bfloat16).save_pretrained(folder / "reference")
    (folder / "mapping.yaml").write_text(MAPPING.replace("trained: trained", "trained: trained.pth"), "utf-8")
    return folder


@pytest.mark.load
@pytest.mark.parametrize("version", VERSIONS)
def test_from_pretrained_reads_each_tensor_once(tuned: Path, version: str) -> None:
    if not ready(version):
        pytest.skip(f"transformers {version} could not be installed: `python tests/load_environments.py` says why")
    script = HERE / "load_lazily.py"
    answer = json.loads(run(interpreter(version), script, tuned / "mapping.yaml", tuned / "reference").splitlines()[-1])
    assert answer["transformers"] == version
    assert set(answer["reads"]) == set(load_file(tuned / "reference" / "model.safetensors"))
    assert set(answer["reads"].values()) == {1}
    assert len(answer["reads"]) == 30
    assert answer["equal"]
    assert answer["said"] == {}


def test_the_example_of_the_guide_loads_the_model(tuned: Path) -> None:
    example = HERE.parent / "docs" / "examples" / "load_model.py"
    told = run(sys.executable, example, tuned / "mapping.yaml", tuned / "reference").splitlines()[-1]
    reference = load_file(tuned / "reference" / "model.safetensors")
    count = sum(one.numel() for one in reference.values())
    assert told == f"LlamaForCausalLM torch.bfloat16 {count} parameters"


def test_a_state_dict_reads_what_is_taken(tuned: Path) -> None:
    merged = shardmerge.open_checkpoint(tuned / "mapping.yaml")
    state, pool = merged.torch(), merged["lm_head.weight"]._reader._pool  # type: ignore[attr-defined]
    assert list(state) == list(merged)
    assert len(state) == 30
    assert "lm_head.weight" in state
    assert pool.bytes_read == 0
    reference = load_file(tuned / "reference" / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], reference["lm_head.weight"])
    assert pool.bytes_read == reference["lm_head.weight"].numel() * 4  # float32


# --- torch.distributed.checkpoint ---


def loaded(path: Path, world: int, how: str, out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, int]]]:
    """Returns the state dict that ranks hold together, and what each holds and read."""
    run(sys.executable, HERE / "load_from_reader.py", path, world, how, out)
    return torch.load(out), [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(world)]


def same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> bool:
    return found.keys() == truth.keys() and all(
        found[name].dtype == one.dtype and torch.equal(found[name], one) for name, one in truth.items()
    )


# FSDP shards no 0-d parameter, and the bag has one.
@pytest.mark.parametrize(
    ("case", "world", "how"),
    [("llama_z3_w2_bf16", 1, "fsdp"), ("llama_z3_w2_bf16", 2, "fsdp"), ("llama_z3_w2_bf16", 2, "plain"),
     ("bag_z2_w3_fp16", 2, "columns")],
)  # fmt: skip
def test_dcp_loads_zero_shards_and_each_rank_reads_its_share(
    golden: Path, tmp_path: Path, case: str, world: int, how: str
) -> None:
    found, ranks = loaded(golden / "zero" / case / "ckpt", world, how, tmp_path / "state.pt")
    truth = load_file(golden / "zero" / case / "truth.safetensors")
    assert same(found, truth)
    whole = sum(one.nbytes for one in truth.values())
    assert [rank["read"] for rank in ranks] == [rank["held"] for rank in ranks]
    assert how == "plain" or max(rank["held"] for rank in ranks) < whole / world + 400


def test_dcp_loads_a_mapping_cast(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "trained").symlink_to(golden / "zero" / "llama_z3_w2_bf16" / "ckpt")
    (tmp_path / "mapping.yaml").write_text(MAPPING, "utf-8")
    found, ranks = loaded(tmp_path / "mapping.yaml", 2, "columns", tmp_path / "state.pt")
    truth = load_file(golden / "zero" / "llama_z3_w2_bf16" / "truth.safetensors")
    assert same(found, {name: one.to(torch.bfloat16) for name, one in truth.items()})
    assert [rank["read"] for rank in ranks] == [2 * rank["held"] for rank in ranks]  # float32 in the files


@alone
def test_dcp_loads_every_type_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_TILE", 64)
    numbers = torch.arange(5 * 12, dtype=torch.uint8).reshape(5, 12)
    truth = {
        name: (numbers.float() if row.kind in ("float", "complex") else numbers).to(getattr(torch, row.torch))
        for name, row in DTYPES.items()
    } | {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "long": torch.arange(1000)}
    save_file(truth, tmp_path / "all.safetensors")
    state = {name: torch.zeros(one.shape, dtype=torch.uint8).to(one.dtype) for name, one in truth.items()}
    dcp.load(state, storage_reader=shardmerge.open_checkpoint(tmp_path / "all.safetensors").storage_reader(),
             no_dist=True)  # fmt: skip
    for name, one in truth.items():
        assert state[name].dtype == one.dtype
        assert torch.equal(state[name].reshape(-1).view(torch.uint8), one.reshape(-1).view(torch.uint8)), name


@alone
def test_dcp_refuses_what_does_not_fit(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 3)}, tmp_path / "one.safetensors")
    reader = shardmerge.open_checkpoint(tmp_path / "one.safetensors").storage_reader()
    for state, words in (({"w": torch.zeros(3, 4)}, "Size mismatch"), ({"v": torch.zeros(4, 3)}, "Missing key")):
        with pytest.raises(dcp.api.CheckpointException, match=words):
            dcp.load(state, storage_reader=reader, no_dist=True)
    with pytest.raises(ValueError, match="leave checkpoint_id out"):
        dcp.load({"w": torch.zeros(4, 3)}, storage_reader=reader, checkpoint_id=tmp_path, no_dist=True)


def test_torch_is_imported_for_feeds_alone() -> None:
    program = (
        "import sys, shardmerge, shardmerge.lazy\n"
        "assert 'torch' not in sys.modules and 'shardmerge.feeds' not in sys.modules\n"
    )
    run(sys.executable, "-c", program)
