"""The plan of a LLaVA of full size: LLaMA-3-8B and CLIP ViT-L/14-336, trained with ZeRO-2 on eight ranks.

The files have their true headers and sizes (130 GB) and holes for their data; a plan reads headers only.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardmerge
from benchmarks.harness import Measured, answer, measure
from shardmerge.storage.reading import FilePool, SourceFile
from shardmerge.tensors import leaves
from tests.counting import calls

torch = pytest.importorskip("torch", reason="torch writes the checkpoints")
synthetic = pytest.importorskip("benchmarks.synthetic")

# The sum of the 686 tensors in bf16, worked out from the shapes of the two models (docs: 16.71 GB).
TENSORS, TOTAL_SIZE = 686, 16_710_545_408

LLAMA_3_8B_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128009, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
CLIP_CONFIG = {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": 768, "logit_scale_init_value": 2.6592,
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12},
    "text_config_dict": None, "vision_config_dict": None, "transformers_version": "4.21.3",
    "vision_config": {
        "attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
TRAINING_CONFIG = """\
model = dict(
    freeze_llm=False,
    freeze_visual_encoder=True,
    llm=dict(pretrained_model_name_or_path='meta-llama/Meta-Llama-3-8B-Instruct'),
    type='xtuner.model.LLaVAModel',
    visual_encoder=dict(pretrained_model_name_or_path='openai/clip-vit-large-patch14-336'))
"""
MAPPING = """\
shardmerge: 1
sources:
  trained: trained
  llm: llm
  vision: vision
output: {path: out, dtype: bfloat16}
use: xtuner/llava-to-hf
"""

# Plans in the process, a second time so that all imports are done, and tells what it read through read(2) and its kin.
READING = """
import json, sys
import shardmerge
def read():
    with open("/proc/self/io") as counters:
        return int(counters.readline().split()[1])
shardmerge.plan(sys.argv[1])
before = read()
plan = shardmerge.plan(sys.argv[1])
print(json.dumps({"read": read() - before, "heavy": sorted({"torch", "transformers"} & sys.modules.keys())}))
"""


@pytest.fixture(scope="module")
def mapping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The mapping beside its three sources."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "mapping.yaml").write_text(MAPPING, "utf-8")
    _write_trained(folder / "trained")
    _write_base(folder / "llm", LLAMA_3_8B_CONFIG)
    synthetic.write_safetensors(folder / "llm" / "model.safetensors", synthetic.LLAMA_3_8B.tensors())
    _write_base(folder / "vision", CLIP_CONFIG)
    synthetic.write_torch(folder / "vision" / "pytorch_model.bin", _clip_state())
    yield folder / "mapping.yaml"
    shutil.rmtree(folder)


def _write_trained(folder: Path) -> None:
    shapes = synthetic.LLAMA_3_8B.tensors("llm.")
    for layer, columns in ((0, 1024), (2, 4096)):
        shapes[f"projector.model.{layer}.weight"] = (4096, columns)
        shapes[f"projector.model.{layer}.bias"] = (4096,)
    meta = {"cfg": TRAINING_CONFIG, "seed": 1, "epoch": 0, "iter": 5198, "experiment_name": "llava"}
    synthetic.write_zero(folder, shapes, stage=2, world=8, fill=False, extra={"meta": meta})


def _write_base(folder: Path, config: dict[str, object]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def _clip_state() -> dict[str, object]:
    """The state dict as it was published in 2022: fp32, with the position ids that newer versions leave out."""
    state = {name: torch.empty(shape, dtype=torch.float32) for name, shape in synthetic.clip_model_tensors()}
    state["text_model.embeddings.position_ids"] = torch.empty((1, 77), dtype=torch.int64)
    state["vision_model.embeddings.position_ids"] = torch.empty((1, 577), dtype=torch.int64)
    return state


def test_plans_in_100_mib(mapping: Path) -> None:
    """How long it takes is a benchmark's business: what it opens, reads and calls is counted here."""
    done = _plan(mapping)
    cost = answer(done)["cost"]
    assert isinstance(cost, dict)
    assert (cost["tensors"], cost["total_size"]) == (TENSORS, TOTAL_SIZE)
    print(f"plan: {done.wall:.2f} s, {done.peak / 2**20:.1f} MiB")
    assert done.peak < 100 << 20


def test_the_work_of_a_plan_grows_with_its_tensors(mapping: Path) -> None:
    shardmerge.plan(mapping)  # what is imported and cached is there
    count = calls(lambda: shardmerge.plan(mapping))
    print(f"{count:,} calls")
    assert count < 2_000 * TENSORS


def _plan(mapping: Path) -> Measured:
    done = measure([sys.executable, "-m", "shardmerge", "plan", mapping, "--json"])
    assert done.code == 0, done.stderr
    return done


def test_each_part_comes_from_where_it_should(mapping: Path) -> None:
    plan = shardmerge.plan(mapping)
    parts: dict[tuple[str, str], int] = {}
    for tensor in plan.tensors():
        (source,) = {leaf.source for leaf in leaves(tensor.entry)}
        key = tensor.name.split(".")[0], source
        parts[key] = parts.get(key, 0) + 1
    assert parts == {
        ("language_model", "trained"): 291,
        ("multi_modal_projector", "trained"): 4,
        ("vision_tower", "vision"): 391,
    }


def test_reads_no_tensor_data(mapping: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: object, *arguments: object) -> None:
        raise AssertionError(f"tensor data was read: {arguments}")

    monkeypatch.setattr(FilePool, "view", forbidden)
    monkeypatch.setattr(FilePool, "read_into", forbidden)
    monkeypatch.setattr(SourceFile, "window", forbidden)
    assert shardmerge.plan(mapping).tensor_bytes == TOTAL_SIZE


def test_reads_a_megabyte_of_headers(mapping: Path) -> None:
    done = measure([sys.executable, "-c", READING, str(mapping)])
    found = answer(done)
    print(f"headers: {found['read']:,} bytes read of {_apparent(mapping.parent) / 1e9:.0f} GB")
    assert found["heavy"] == []
    assert isinstance(found["read"], int)
    assert found["read"] < 1 << 20


def _apparent(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
