"""Models between generations of transformers: against what three versions save, load and have in memory themselves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import shardmerge as sm
from shardmerge.errors import MappingError, ShardmergeError
from shardmerge.mapping.generations import generations, names_of
from tests.load_environments import VERSIONS, interpreter, ready
from tests.model_generations import MODELS

HERE = Path(__file__).parent
OLD, MIDDLE, NEW = VERSIONS

Saved = dict[str, Path]
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]

load = pytest.mark.load

# Others load alike: a table more, and no other code.
UNLOADED = (
    "clip_vision_model",
    "siglip_vision_model",
    "llava_next_video",
    "vipllava",
    "paligemma",
    "qwen2_moe",
    "olmoe",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """All models, built by the oldest version that has them and loaded and saved by the others; by version."""
    home = tmp_path_factory.mktemp("generations")
    older: list[Path] = []
    for version in VERSIONS:
        if not ready(version):
            pytest.skip(f"transformers {version} could not be installed: `python tests/load_environments.py` says why")
        run(version, "model_generations.py", "--out", home / version, "--from", *older)
        older.append(home / version)
    return dict(zip(VERSIONS, older, strict=True))


def run(version: str, script: str, *arguments: object) -> str:
    command = [interpreter(version), "-W", "ignore", HERE / script, *arguments]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # threads only get in each other's way over tensors of a few bytes
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=one)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def first(saved: Saved, case: str) -> Path:
    """The directory that the oldest version wrote."""
    return next(folder / case for folder in saved.values() if (folder / case).is_dir())


def tensors(path: Path) -> Tensors:
    with safe_open(path, "np") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it has no __iter__
        return {name: (part.get_dtype(), tuple(part.get_shape()), part[:].tobytes()) for name, part in parts.items()}


def source(saved: Saved, version: str, case: str, kind: str, into: Path) -> Path:
    """A directory with the config and the names of a version: what it has in memory, or what a fresh model saves."""
    folder = into / f"{case}-{version}-{kind}"
    folder.mkdir()
    shutil.copy(saved[version] / case / "config.json", folder)
    shutil.copy(saved[version] / case / f"{kind}.safetensors", folder / "model.safetensors")
    return folder


def converted(model: Path, generation: str, out: Path) -> Path:
    sm.convert(model, out, use=f"hf/to-{generation}", options=sm.Options(sync=False))
    return out


@load
@pytest.mark.parametrize("case", MODELS)
def test_a_file_of_the_oldest_version_becomes_what_newer_ones_have_in_memory(
    saved: Saved, case: str, tmp_path: Path
) -> None:
    """Names, shapes and bytes, experts fused; and it stays what it is for its own generation."""
    home = first(saved, case)
    for generation, version in (("4.52", MIDDLE), ("5.6", NEW)):
        out = converted(home, generation, tmp_path / generation)
        assert tensors(out / "model.safetensors") == tensors(saved[version] / case / "memory.safetensors")
    kept = converted(home, "4.51", tmp_path / "kept")
    assert tensors(kept / "model.safetensors") == tensors(home / "model.safetensors")


@load
@pytest.mark.parametrize("case", MODELS)
def test_what_newer_versions_have_in_memory_or_save_becomes_the_file_again(
    saved: Saved, case: str, tmp_path: Path
) -> None:
    """Bit for bit what 5.23 itself saves of the model that it loaded from there, under its names."""
    home = first(saved, case)
    assert tensors(saved[NEW] / case / "model.safetensors") == tensors(home / "model.safetensors")
    for version, kind in ((MIDDLE, "memory"), (NEW, "memory"), (NEW, "fresh")):
        model = source(saved, version, case, kind, tmp_path)
        out = converted(model, "4.51", tmp_path / f"{version}-{kind}")
        assert tensors(out / "model.safetensors") == tensors(home / "model.safetensors"), (version, kind)


@load
def test_results_load_and_compute_the_same_in_each_version(saved: Saved, tmp_path: Path) -> None:
    """0 missing, 0 unexpected, logits equal to the last bit, and the config means the same to that version."""
    for case in (case for case in MODELS if case not in UNLOADED):
        newest = source(saved, NEW, case, "memory", tmp_path)
        back = converted(newest, "4.51", tmp_path / f"{case}-back")
        middle = converted(newest, "4.52", tmp_path / f"{case}-middle")
        forth = converted(first(saved, case), "5.6", tmp_path / f"{case}-forth")
        for version, ours in ((OLD, (back,)), (MIDDLE, (middle,)), (NEW, (forth, middle))):
            if (saved[version] / case).is_dir():
                pairs = [path for one in ours for path in (one, saved[version] / case)]
                (tmp_path / version).mkdir(exist_ok=True)
                (tmp_path / version / case).write_text("\n".join(map(str, pairs)))
    for version in VERSIONS:
        pairs = [line for file in sorted((tmp_path / version).iterdir()) for line in file.read_text().splitlines()]
        answers = [json.loads(line) for line in run(version, "load_generations.py", *pairs).splitlines()]
        assert len(answers) == len(pairs) // 2 > len(MODELS) // 2
        for answer in answers:
            assert "error" not in answer, answer
            assert (answer["said"], answer["equal"]) == ({}, True), answer
            assert not meant(answer["config"]), answer


def meant(config: dict[str, list[object]]) -> set[str]:
    """The keys that differ, but for those that mean nothing to the version that read them."""
    # 5.x writes null where use_sliding_window is false; the text part of a LLaVA says for 4.x whether the head is tied.
    idle = {"sliding_window", "text_config.sliding_window", "tie_word_embeddings"}
    # The middle version reads Qwen2-VL's text config flat as well as nested, and keeps what it read.
    nested = {key for key, (ours, _) in config.items() if ours is None} if len(config) > 10 else set()
    return set(config) - idle - nested


# ---- what is not known


def model(folder: Path, config: dict[str, object], names: Iterable[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: np.zeros(2, np.float32) for name in names}, folder / "model.safetensors")
    return folder


def refused(folder: Path, generation: str = "5.6") -> ShardmergeError:
    with pytest.raises(ShardmergeError) as caught:
        sm.convert(folder, folder.parent / "out", use=f"hf/to-{generation}")
    assert not (folder.parent / "out").exists()
    return caught.value


QWEN = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "visual.blocks.0.norm1.weight"]


@pytest.mark.parametrize("odd", ["model.embeddings.weight", "lm_head2.weight", "visuals.blocks.0.norm1.weight"])
def test_a_name_outside_of_the_table_is_an_error(tmp_path: Path, odd: str) -> None:
    error = refused(model(tmp_path / "model", {"model_type": "qwen2_vl"}, [*QWEN, odd]))
    assert error.code == "unknown-names"
    assert error.found == odd


def test_what_is_dropped_needs_no_name_in_the_table(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", {"model_type": "qwen2_vl"}, [*QWEN, "lm_head2.weight", "visual.rotary.inv_freq"])
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        f"shardmerge: 1\nsources: {{hf: {folder}}}\noutput: out\nuse: hf/to-5.6\ndrop: ['hf:lm_head2.weight']\n"
    )
    sm.run(mapping)
    assert set(tensors(tmp_path / "out" / "model.safetensors")) == {
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.visual.blocks.0.norm1.weight",
    }


def test_a_generation_that_is_none_is_answered_with_the_one_before_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", {"model_type": "qwen2_vl"}, QWEN)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        f"shardmerge: 1\nsources: {{hf: {folder}}}\noutput: out\nuse: hf/to-5.6\n"
        'target: {name: hf/names, model: hf, generation: "5.23"}\n'
    )
    with pytest.raises(ShardmergeError) as caught:
        sm.run(mapping)
    assert caught.value.code == "unknown-generation"
    assert 'generation: "5.6"' in caught.value.hint


def test_a_model_that_was_renamed_in_ways_not_known_is_refused(tmp_path: Path) -> None:
    """Dinov2 in a LLaVA: 5.x renames inside of it, and no table here says how."""
    config = {"model_type": "llava", "vision_config": {"model_type": "dinov2"}}
    error = refused(
        model(tmp_path / "model", config, ["vision_tower.encoder.layer.0.attention.attention.query.weight"])
    )
    assert error.code == "unknown-renames"
    for known in (
        {"model_type": "dinov2"},
        {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}},
    ):
        with pytest.raises(MappingError):
            names_of(known)


def test_layers_with_rotary_embeddings_of_their_own_are_refused_for_4_x(tmp_path: Path) -> None:
    rope = {kind: {"rope_theta": 1e4, "rope_type": "default"} for kind in ("full_attention", "sliding_attention")}
    folder = model(tmp_path / "model", {"model_type": "modernbert", "rope_parameters": rope}, ["layers.0.weight"])
    assert refused(folder, "4.51").code == "unsupported-rope"


def test_generations_are_the_versions_that_renamed_something() -> None:
    assert generations() == ("4.51", "4.52", "5.0", "5.6")


def test_names_that_never_changed_are_kept_whatever_they_are() -> None:
    names = names_of({"model_type": "gpt2"})
    assert set(names.templates(names.generation("5.6")).values()) == {"{rest...}"}


def test_the_table_is_read_without_transformers() -> None:
    code = (
        "from shardmerge.mapping.generations import *; generations(); import sys; print('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
