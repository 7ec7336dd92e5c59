"""config.json for transformers 4.x; that it means the same there, tests/test_generations.py shows with real models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardmerge as sm
from shardmerge.errors import ShardmergeError, TargetError
from shardmerge.targets.older_config import older_config

GEMMA_ROPE = {
    "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}


def older(config: dict[str, object], *, flat: bool = True) -> dict[str, object]:
    return older_config(config, flat=flat, where="config.json")


def test_both_ropes_of_a_gemma_3() -> None:
    """As configuration_gemma3.py of 4.51 reads them: one theta for layers that see all, one for the others."""
    assert older({"model_type": "gemma3_text", "rope_parameters": GEMMA_ROPE}) == {
        "model_type": "gemma3_text",
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 1e4,
    }


def test_a_rope_for_the_layers_that_see_a_window_is_refused_if_it_is_scaled() -> None:
    rope = {**GEMMA_ROPE, "sliding_attention": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    with pytest.raises(TargetError, match="several kinds"):
        older({"model_type": "gemma3_text", "rope_parameters": rope})


@pytest.mark.parametrize(("kinds", "fits"), [("ssf", True), ("sfs", False), ("sss", False)])
def test_layers_that_see_all_follow_a_pattern_or_are_refused(kinds: str, fits: bool) -> None:
    named = {"s": "sliding_attention", "f": "full_attention"}
    config = {"model_type": "gemma3_text", "_sliding_window_pattern": 3, "layer_types": [named[one] for one in kinds]}
    if fits:
        assert older(config)["sliding_window_pattern"] == 3
        return
    with pytest.raises(TargetError, match="no pattern"):
        older(config)


@pytest.mark.parametrize("version", ["5.23.0", "4.57.1"])
def test_what_5_x_says_of_the_head_is_said_of_the_language_model(version: str) -> None:
    """4.x reads ``tie_word_embeddings`` there, and what 4.x wrote is left alone."""
    config = {
        "transformers_version": version,
        "tie_word_embeddings": True,
        "text_config": {"tie_word_embeddings": False},
    }
    made = older({**config, "model_type": "llava"})["text_config"]
    assert made == {"tie_word_embeddings": version[0] == "5"}


def test_a_rope_of_part_of_the_head() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert older({"model_type": "glm", "rope_parameters": rope}) == {
        "model_type": "glm", "rope_theta": 5e5, "partial_rotary_factor": 0.5,
    }  # fmt: skip


def model(folder: Path, **files: object) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    save_file({"model.norm.weight": np.ones(2, np.float32)}, folder / "model.safetensors")
    return folder


def test_a_processor_that_older_versions_do_not_find(tmp_path: Path) -> None:
    processor = {"image_processor": {"size": 28}}
    source = model(tmp_path / "hf", config={"model_type": "gpt2"}, processor_config=processor)
    warned = []
    for generation in ("4.51", "5.6"):
        mapping = tmp_path / f"{generation}.yaml"
        mapping.write_text(f"shardmerge: 1\nsources: {{hf: {source}}}\noutput: out\nuse: hf/to-{generation}\n")
        warned.append([one for one in sm.plan(mapping).warnings if "preprocessor_config.json" in one])
    assert [len(one) for one in warned] == [1, 0]


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ShardmergeError) as caught:
        sm.convert(model(tmp_path / "hf"), tmp_path / "out", use="hf/to-4.51")
    assert caught.value.code == "missing-source"
