"""Rank sets of Meta and Megatron: files as their training code saves them with torch.save."""

from __future__ import annotations

import argparse
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import shardmerge as sm
from tests.conftest import read_all, same_values, shardmerge

State = dict[str, torch.Tensor]


def assert_holds(catalog: sm.Catalog, tensors: State) -> None:
    found = read_all(catalog)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert same_values(found[name], tensor.double().numpy()), name


def refusal(path: Path, **options: str) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(path, **options)
    return caught.value


# --- Meta ---

VOCABULARY, DIM = 24, 8


def meta_rank(ranks: int, *, rows: bool) -> State:
    """One rank of a layer: Llama 3 cuts the embedding by rows, Llama 1 and 2 by columns."""
    embedding = (VOCABULARY // ranks, DIM) if rows else (VOCABULARY, DIM // ranks)
    return {
        "tok_embeddings.weight": torch.randn(embedding).bfloat16(),
        "norm.weight": torch.ones(DIM).bfloat16(),
        "layers.0.attention.wq.weight": torch.randn(DIM // ranks, DIM).bfloat16(),
        "output.weight": torch.randn(VOCABULARY // ranks, DIM).bfloat16(),
    }


def write_meta(folder: Path, ranks: int, *, rows: bool = True, legacy: bool = False) -> State:
    folder.mkdir(exist_ok=True)
    everything = {}
    for rank in range(ranks):
        state = meta_rank(ranks, rows=rows)
        name = folder / f"consolidated.{rank:02d}.pth"
        torch.save(state, name, _use_new_zipfile_serialization=not legacy)
        everything |= {f"{rank:02d}.{name}": tensor for name, tensor in state.items()}
    params = {"dim": DIM, "n_heads": 2, "vocab_size": VOCABULARY if rows else -1}
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    return everything


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rows", [False, True])
def test_meta_ranks(tmp_path: Path, ranks: int, *, rows: bool) -> None:
    tensors = write_meta(tmp_path, ranks, rows=rows)
    catalog = sm.inspect(tmp_path)
    assert_holds(catalog, tensors)
    assert catalog.kind == f"Meta consolidated, {ranks} rank{'s' * (ranks > 1)}"
    assert {"params.json", "tokenizer.model"} <= set(catalog.side_files)
    assert len(catalog.files) == ranks


def test_twelve_meta_ranks_in_the_format_of_old_torch(tmp_path: Path) -> None:
    state = {"w": torch.arange(3)}
    for rank in range(12):
        torch.save(state, tmp_path / f"consolidated.{rank:02d}.pth", _use_new_zipfile_serialization=False)
    assert_holds(sm.inspect(tmp_path), {f"{rank:02d}.w": state["w"] for rank in range(12)})


def test_one_meta_file_stands_for_all(tmp_path: Path) -> None:
    tensors = write_meta(tmp_path / "llama", 2)
    catalog = sm.inspect(tmp_path / "llama" / "consolidated.01.pth")
    assert_holds(catalog, tensors)
    assert "the whole of llama/ is read" in catalog.notes[0]
    assert "params.json" in catalog.side_files


@pytest.mark.parametrize(
    ("ranks", "gone", "rows"), [(4, 1, False), (4, 0, False), (4, 3, False), (4, 3, True), (2, 1, True)]
)
def test_a_missing_meta_rank_is_named(tmp_path: Path, ranks: int, gone: int, *, rows: bool) -> None:
    write_meta(tmp_path, ranks, rows=rows)
    (tmp_path / f"consolidated.{gone:02d}.pth").unlink()
    error = refusal(tmp_path)
    assert error.code == "missing-rank"
    assert f"consolidated.{gone:02d}.pth is missing" in error.what


@pytest.mark.parametrize("params", ["", "{", "[]", '{"vocab_size": "many"}', '{"vocab_size": 0}', "{}"])
def test_params_that_say_nothing_are_no_reason_to_refuse(tmp_path: Path, params: str) -> None:
    tensors = write_meta(tmp_path, 2)
    (tmp_path / "params.json").write_text(params)
    assert_holds(sm.inspect(tmp_path), tensors)


def test_meta_ranks_of_two_models(tmp_path: Path) -> None:
    write_meta(tmp_path, 2)
    torch.save(meta_rank(2, rows=True) | {"rope.freqs": torch.ones(2)}, tmp_path / "consolidated.01.pth")
    error = refusal(tmp_path)
    assert (error.code, error.found) == ("mixed-ranks", "rope.freqs")


def test_tied_meta_tensors_stay_tied_within_their_rank(tmp_path: Path) -> None:
    shared = torch.randn(4, 2)
    for rank in range(2):
        torch.save({"a": shared, "b": shared}, tmp_path / f"consolidated.{rank:02d}.pth")
    assert dict(sm.inspect(tmp_path).aliases) == {"00.b": "00.a", "01.b": "01.a"}


def test_a_hub_model_with_metas_files_beside_it_is_the_hub_model(tmp_path: Path) -> None:
    write_meta(tmp_path, 1)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_holds(sm.inspect(tmp_path), {"w": torch.ones(1)})


# --- Megatron ---


def megatron_arguments(tensor: int, stages: int, **more: object) -> argparse.Namespace:
    return argparse.Namespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=stages,
        num_attention_heads=8,
        rotary_percent=0.5,
        swiglu=True,
        tokenizer_type="Llama2Tokenizer",
        params_dtype=torch.bfloat16,
        data_path=["a", "b"],
        **more,
    )


def megatron_rank(stage: int) -> State:
    own = {"embedding.word_embeddings.weight": torch.randn(6, 4)} if stage == 0 else {}
    return own | {
        "decoder.layers.0.self_attention.linear_qkv.weight": torch.randn(3, 4).bfloat16(),
        "decoder.layers.0.mlp.linear_fc1._extra_state": torch.arange(5, dtype=torch.uint8),
    }


def extra_states() -> dict[str, object]:
    """What versions of Transformer Engine put into a state dict."""
    filled = io.BytesIO()
    torch.save({"recipe": 1}, filled)
    return {"a._extra_state": filled, "b._extra_state": None, "c._extra_state": b"\x00\xff", "d._extra_state": ""}


def write_megatron(
    folder: Path, tensor: int, stages: int, *, name: str = "model_optim_rng.pt", pickled: object = None
) -> State:
    arguments = pickled or megatron_arguments(tensor, stages)
    everything = {}
    for stage in range(stages):
        for rank in range(tensor):
            state = megatron_rank(stage)
            numbers = f"{rank:02d}_{stage:03d}" if stages > 1 else f"{rank:02d}"
            path = folder / f"mp_rank_{numbers}" / name
            path.parent.mkdir(parents=True)
            whole = {
                "args": arguments,
                "checkpoint_version": 3.0,
                "iteration": 7,
                "model": state | extra_states(),
                "optimizer": {"fp32_from_fp16_params": [[torch.ones(2)]]},
                "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
            }
            torch.save(whole, path)
            everything |= {f"{rank:02d}.{stage:03d}.{key}": value for key, value in state.items()}
    return everything


@pytest.mark.parametrize(("tensor", "stages"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", ["model_optim_rng.pt", "model_rng.pt"])
def test_megatron_ranks(tmp_path: Path, tensor: int, stages: int, name: str) -> None:
    tensors = write_megatron(tmp_path / "iter_0000007", tensor, stages, name=name)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7\n")
    for entry in (tmp_path / "iter_0000007", tmp_path):
        assert_holds(sm.inspect(entry), tensors)
    for part in sorted((tmp_path / "iter_0000007").rglob("mp_rank_*")):
        for entry in (part, part / name):
            catalog = sm.inspect(entry)
            assert_holds(catalog, tensors)
            assert catalog.notes[0].endswith("the whole of iter_0000007/ is read")
    kind = f"Megatron, {tensor} rank{'s' * (tensor > 1)}" + f" x {stages} pipeline stages" * (stages > 1)
    assert sm.inspect(tmp_path).kind == kind


def test_a_released_megatron_model(tmp_path: Path) -> None:
    tensors = write_megatron(tmp_path / "release", 1, 1)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert_holds(sm.inspect(tmp_path), tensors)


def test_the_arguments_become_facts_and_stay_out_of_the_fingerprint(tmp_path: Path) -> None:
    write_megatron(tmp_path / "iter_0000001", 1, 1)
    catalog = sm.inspect(tmp_path / "iter_0000001")
    assert catalog.facts == {
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "num_attention_heads": 8,
        "rotary_percent": 0.5,
        "swiglu": True,
        "tokenizer_type": "Llama2Tokenizer",
    }
    assert replace(catalog, facts={}).fingerprint() == catalog.fingerprint()


def test_extra_states_that_are_no_tensors_are_noted(tmp_path: Path) -> None:
    write_megatron(tmp_path / "iter_0000001", 2, 1)
    catalog = sm.inspect(tmp_path / "iter_0000001")
    assert "8 entries of model are no tensors and are left out: a._extra_state, b._extra" in catalog.notes[-1]
    assert catalog["01.000.decoder.layers.0.mlp.linear_fc1._extra_state"].dtype.name == "U8"


def test_one_rank_alone_by_its_root(tmp_path: Path) -> None:
    tensors = write_megatron(tmp_path / "iter_0000001", 2, 1)
    own = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("01")}
    assert_holds(sm.inspect(tmp_path / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt", root="model"), own)


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("gone", ["00_000", "01_000", "00_001", "01_001"])
def test_a_missing_megatron_rank_is_named(tmp_path: Path, gone: str) -> None:
    write_megatron(tmp_path, 2, 2)
    remove(tmp_path / f"mp_rank_{gone}")
    error = refusal(tmp_path)
    assert error.code == "missing-rank"
    assert f"mp_rank_{gone}/model_optim_rng.pt is missing" in error.what


@pytest.mark.parametrize(("tensor", "stages", "missing"), [(4, 2, "mp_rank_02_000"), (2, 3, "mp_rank_00_002")])
def test_ranks_that_only_the_arguments_know_of(tmp_path: Path, tensor: int, stages: int, missing: str) -> None:
    write_megatron(tmp_path, 2, 2, pickled=megatron_arguments(tensor, stages))
    error = refusal(tmp_path)
    assert error.code == "missing-rank"
    assert f"{missing}/model_optim_rng.pt" in error.what


def test_more_ranks_than_the_arguments_know_of(tmp_path: Path) -> None:
    write_megatron(tmp_path, 2, 2, pickled=megatron_arguments(1, 2))
    assert refusal(tmp_path).code == "mixed-ranks"


def test_numbers_beyond_reason_cost_nothing(tmp_path: Path) -> None:
    write_megatron(tmp_path, 1, 1, pickled=megatron_arguments(1 << 60, 1 << 60))
    error = refusal(tmp_path)
    assert error.code == "missing-rank"
    assert error.what.count("mp_rank_") == 5


def test_megatron_ranks_of_two_models(tmp_path: Path) -> None:
    write_megatron(tmp_path, 2, 1)
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "mp_rank_01" / "model_optim_rng.pt")
    assert refusal(tmp_path).code == "mixed-ranks"


def test_the_optimizers_own_folders_are_no_ranks(tmp_path: Path) -> None:
    """Versions of 2022 kept the distributed optimizer in a folder for each data-parallel rank."""
    tensors = write_megatron(tmp_path, 2, 1, name="model_rng.pt")
    (tmp_path / "mp_rank_00_000").mkdir()
    torch.save({"optimizer": {}}, tmp_path / "mp_rank_00_000" / "optim.pt")
    assert_holds(sm.inspect(tmp_path), tensors)


def test_virtual_pipeline_stages_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_000").mkdir()
    state = {"model0": {"w": torch.ones(1)}, "model1": {"w": torch.ones(1)}}
    torch.save(state, tmp_path / "mp_rank_00_000" / "model_optim_rng.pt")
    error = refusal(tmp_path)
    assert (error.code, error.found) == ("kind-not-yet", "model0, model1")
    assert "virtual pipeline" in error.what
    assert "tools/checkpoint/convert.py" in error.hint


@pytest.mark.parametrize("by_name", [False, True])
def test_expert_ranks_are_refused_with_a_way_out(tmp_path: Path, *, by_name: bool) -> None:
    """With experts and one stage the second number is that of an expert, which only the arguments tell."""
    folder = tmp_path / ("mp_rank_00_000_001" if by_name else "mp_rank_00_000")
    folder.mkdir()
    arguments = megatron_arguments(1, 1, expert_model_parallel_size=1 if by_name else 2)
    torch.save({"args": arguments, "model": {"w": torch.ones(1)}}, folder / "model_optim_rng.pt")
    error = refusal(tmp_path)
    assert error.code == "kind-not-yet"
    assert "expert" in error.what
    assert error.hint


@pytest.mark.parametrize("text", ["12", "../release", "iter_0000012", "", "release", "iter_/../iter_0000007"])
def test_a_tracker_that_names_nothing(tmp_path: Path, text: str) -> None:
    write_megatron(tmp_path / "iter_0000007", 1, 1)
    (tmp_path / "iter_").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert refusal(tmp_path).code == "missing-tag"


def test_megatrons_distributed_checkpoint_comes_with_its_arguments(tmp_path: Path) -> None:
    """Written by torch.distributed.checkpoint itself; Megatron adds common.pt and metadata.json."""
    folder = tmp_path / "iter_0000003"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"decoder.weight": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    torch.save({"args": megatron_arguments(1, 1)}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    for path in (tmp_path, folder, folder / "common.pt", folder / ".metadata", *folder.glob("*.distcp")):
        catalog = sm.inspect(path)
        assert catalog.kind == "Megatron torch_dist, 1 rank"
        assert list(catalog.names()) == ["decoder.weight"]
        assert catalog.facts["tensor_model_parallel_size"] == 1


@pytest.mark.parametrize("text", ['{"sharded_backend": "zarr"}', "{}", "[]", "{"])
def test_megatrons_other_formats_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(text)
    torch.save({"args": megatron_arguments(1, 1)}, tmp_path / "common.pt")
    error = refusal(tmp_path)
    assert error.code == "kind-not-yet"
    assert "--ckpt-convert-format torch_dist" in error.hint


def test_the_command_line_lists_ranks(tmp_path: Path) -> None:
    write_megatron(tmp_path, 2, 1)
    shown = shardmerge("inspect", tmp_path).stdout
    assert shown.startswith("Megatron, 2 ranks: 6 tensors")
    assert re.search(r"^01.*embedding.*word_embeddings.weight", shown, re.MULTILINE | re.DOTALL)
    assert "01.000.embedding.word_embeddings.weight" in shardmerge("inspect", tmp_path, "--flat").stdout
