"""Distributed safetensors, as torch and transformers save them: read whole, or refused for what is missing or mixed."""

from __future__ import annotations

import json
import shutil
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files,
    consolidate_safetensors_files_on_every_rank,
)

import shardmerge as sm
from shardmerge.execute.gather import gather
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog
from tests.conftest import GOLDEN, shardmerge

FOLDER = GOLDEN / "distributed_safetensors"
CASES = sorted(path.parent for path in FOLDER.glob("*/case.json"))
# Read as they are; the two others are one rank's, and a file that torch spoilt.
WHOLE = [case for case in CASES if case.name not in ("one_rank_w1", "unsaved_name_w2")]
SETS = [case for case in WHOLE if case.name not in ("one_process", "consolidated_w2")]
# torch.finfo() of a bool in its consolidation.
FAILS_IN_TORCH = ("fsdp2_bag_w3", "types_w2")
MANY = FOLDER / "fsdp2_parts_w3/ckpt"
Header = dict[str, dict]


def name_of(case: Path) -> str:
    return case.name


def held(catalog: Catalog) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor."""
    found = {}
    for name in catalog.names():
        entry, data = catalog[name], bytearray(catalog[name].nbytes)
        gather(FilePool(), entry, 0, memoryview(data))
        found[name] = (entry.dtype.name, entry.shape, bytes(data))
    return found


def truth(case: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return held(sm.inspect(case / "truth.safetensors"))


def refusal(function: Callable[..., object], *given: object) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        function(*given)
    return caught.value


def copy(case: Path | str, folder: Path) -> Path:
    return shutil.copytree(FOLDER / case / "ckpt", folder / "ckpt")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def rewritten(path: Path, change: Callable[[Header, dict[str, dict]], object]) -> None:
    """Changes the header of a file, and its offsets; the data stay."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    change(header, offsets)
    if "DCP_SHARDING_INFO" in header["__metadata__"]:
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def without(path: Path, *names: str) -> None:
    """Writes a shard anew without some of its tensors."""
    with safe_open(path, "pt") as file:
        offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    tensors = load_file(path)
    for name in names:
        del tensors[name], offsets[name]
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})


# ---- whole ones


def test_the_golden_folder_is_whole() -> None:
    assert len(CASES) >= 14
    assert len(WHOLE) == len(CASES) - 2


@pytest.mark.parametrize("case", WHOLE, ids=name_of)
def test_every_tensor_has_the_bits_of_the_truth(case: Path) -> None:
    assert held(sm.inspect(case / "ckpt")) == truth(case)


@pytest.mark.parametrize("case", WHOLE, ids=name_of)
def test_converted_it_has_the_bits_of_the_truth(case: Path, tmp_path: Path) -> None:
    sm.convert(case / "ckpt", tmp_path / "out", options=sm.Options(sync=False))
    assert held(sm.inspect(tmp_path / "out")) == truth(case)
    sm.verify(tmp_path / "out")


@pytest.mark.parametrize("case", SETS, ids=name_of)
def test_each_shard_stands_for_all(case: Path) -> None:
    expected = truth(case)
    for path in shards(case / "ckpt"):
        found = sm.inspect(path)
        assert held(found) == expected
        assert f"{path.name} is one part of a checkpoint" in found.notes[0]


@pytest.mark.parametrize("case", SETS, ids=name_of)
def test_inspect_names_it(case: Path) -> None:
    world = json.loads((case / "case.json").read_text())["world"]
    assert sm.inspect(case / "ckpt").kind == f"distributed safetensors, {world} ranks"
    assert f"distributed safetensors, {world} ranks" in shardmerge("inspect", case / "ckpt").stdout


@pytest.mark.parametrize("case", [one for one in SETS if one.name not in FAILS_IN_TORCH], ids=name_of)
@pytest.mark.parametrize("consolidate", [consolidate_safetensors_files, consolidate_safetensors_files_on_every_rank])
def test_torch_consolidates_it_to_the_same(case: Path, consolidate: Callable[..., None], tmp_path: Path) -> None:
    names = dict.fromkeys(sm.inspect(case / "ckpt").names(), 1)
    consolidate(str(case / "ckpt"), str(tmp_path), names)
    assert held(sm.inspect(tmp_path)) == held(sm.inspect(case / "ckpt"))


@pytest.mark.parametrize("case", SETS, ids=name_of)
def test_torch_loads_it_as_the_same(case: Path) -> None:
    """Bool tensors, too, which its consolidation fails on."""
    state = {name: torch.zeros_like(tensor) for name, tensor in load_file(case / "truth.safetensors").items()}
    reader = HuggingFaceStorageReader(str(case / "ckpt"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it loads in one process
        dcp.load(state, storage_reader=reader, no_dist=True)
    found = held(sm.inspect(case / "ckpt"))
    for name, tensor in state.items():
        assert found[name][2] == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_where_a_chunk_without_elements_lies_says_nothing(tmp_path: Path) -> None:
    """torch writes some of them beyond the end of axes that are not cut."""
    folder = copy("fsdp2_specks_w4", tmp_path)

    def beyond(header: Header, offsets: dict[str, dict]) -> None:
        for name, place in offsets.items():
            if 0 in header[name]["shape"]:
                place["saved_offsets"] = [9] * len(header[name]["shape"])
                moved.append(name)

    moved: list[str] = []
    for path in shards(folder):
        rewritten(path, beyond)
    assert moved
    assert held(sm.inspect(folder)) == truth(FOLDER / "fsdp2_specks_w4")


def test_headers_alone_are_read_to_open_it(tmp_path: Path) -> None:
    """Data that nobody can read do not matter before they are asked for."""
    folder = copy("fsdp2_w2", tmp_path)
    expected = sm.inspect(folder)
    for path in shards(folder):
        raw = path.read_bytes()
        length = 8 + struct.unpack("<Q", raw[:8])[0]
        path.write_bytes(raw[:length] + bytes(len(raw) - length))
    assert sm.inspect(folder).fingerprint() == expected.fingerprint()


# ---- ways in


def test_what_lies_beside_goes_along(tmp_path: Path) -> None:
    catalog = sm.inspect(FOLDER / "transformers_fsdp_w2/ckpt")
    assert {"config.json", "generation_config.json"} <= set(catalog.side_files)
    assert catalog.warnings == ()
    result = sm.convert(FOLDER / "transformers_fsdp_w2/ckpt", tmp_path / "out", options=sm.Options(sync=False))
    assert (result.path / "config.json").is_file()


def test_the_consolidated_model_is_read_and_not_its_shards(tmp_path: Path) -> None:
    case = FOLDER / "consolidated_w2"
    catalog = sm.inspect(case / "ckpt")
    assert catalog.kind == "safetensors, 2 shards"
    assert any("sharded/" in note for note in catalog.notes)
    inner = sm.inspect(case / "ckpt/sharded")
    assert inner.kind == "distributed safetensors, 2 ranks"
    assert held(inner) == held(catalog)
    folder = copy(case, tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    assert sm.inspect(folder).kind == "safetensors, 2 shards"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    alone = sm.inspect(folder)  # the run ended before the consolidation, or had none
    assert held(alone) == held(catalog)
    assert alone.notes == ("the shards in sharded/ are read",)


def test_shards_with_a_consolidated_model_inside(tmp_path: Path) -> None:
    """As NeMo Automodel has them, and transformers where it pushes to the hub."""
    folder = copy("fsdp2_w2", tmp_path / "model").parent / "ckpt"
    shutil.copytree(FOLDER / "transformers_fsdp_w2/ckpt", folder / "consolidated")
    catalog = sm.inspect(folder)
    assert catalog.notes == ("the shards are read, and not what lies in consolidated/",)
    save_file({"a": torch.ones(2)}, folder / "other.safetensors")
    assert sm.inspect(folder).warnings == ("the shards are read, and not other.safetensors",)
    assert f"pass the one that is meant: {folder}" in refusal(sm.inspect, folder.parent).hint


def test_a_model_in_the_same_directory_goes_first(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    shutil.copy(FOLDER / "fsdp2_w2/truth.safetensors", folder / "model.safetensors")
    catalog = sm.inspect(folder)
    assert catalog.kind == "safetensors"
    assert "a part of one, lies beside it: shard-00001" in catalog.warnings[0]


# ---- what is missing


def incomplete(case: Path) -> list[list[str]]:
    """The files of a set without each of them, and without those of the last ranks."""
    names = [path.name for path in shards(case / "ckpt")]
    ranks = sorted({name[:11] for name in names})
    without = [{name} for name in names]
    without += [{name for name in names if name[:11] >= first} for first in ranks[1:]]
    return [sorted(set(names) - gone) for gone in without]


def refused_or_warned(folder: Path) -> bool:
    try:
        return any("nothing says how many there were" in text for text in sm.inspect(folder).warnings)
    except sm.CheckpointError as error:
        return error.code in {"missing-shard", "lone-shard", "box-hole"}


@pytest.mark.parametrize("case", SETS, ids=name_of)
def test_a_part_of_a_set_is_never_read_without_a_word(case: Path, tmp_path: Path) -> None:
    for number, names in enumerate(incomplete(case)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in (*names, "config.json"):
            if (case / "ckpt" / name).is_file():
                shutil.copy(case / "ckpt" / name, folder)
        assert refused_or_warned(folder), names


@pytest.mark.parametrize(
    ("gone", "code", "words"),
    [
        ("shard-00002*", "missing-shard", "no shard of rank 2 is there"),
        ("shard-00001*", "missing-shard", "no shard of rank 1 is there"),
        ("*-model-00002-of*", "missing-shard", "file 2 of 2 of the model"),
        ("shard-00002-model-00001*", "box-hole", "do not fit"),
        ("shard-00003-model-00002*", "missing-shard", "shard-00003-model-00002-of-00002.safetensors is not there"),
        ("shard-00003*", "missing-shard", "cut off at its end"),
        ("shard-0000[23]*", "lone-shard", "files of other ranks may be missing"),
    ],
)
def test_a_missing_shard_is_named(gone: str, code: str, words: str, tmp_path: Path) -> None:
    folder = shutil.copytree(MANY, tmp_path / "ckpt")
    for path in folder.glob(gone):
        path.unlink()
    for path in (folder, shards(folder)[0]):
        error = refusal(sm.inspect, path)
        assert (error.code, words in error.what) == (code, True), error.lines()
        assert "copy the files of all ranks" in error.hint


def test_a_norm_beside_its_embedding_says_how_many_ranks_there_were(tmp_path: Path) -> None:
    folder = copy("fsdp2_parts_w3", tmp_path)
    for path in folder.glob("shard-00003*"):
        path.unlink()
    error = refusal(sm.inspect, folder)
    assert "of 6, beside an embedding of 8 columns" in error.found
    assert error.expected == "the shards of 3 ranks"


@pytest.mark.parametrize("case", [one for one in SETS if one.name.startswith(("fsdp2_w2", "fsdp2_parts", "transf"))])
def test_a_set_that_shows_its_end_is_read_without_a_warning(case: Path) -> None:
    assert sm.inspect(case / "ckpt").warnings == ()


def test_nothing_that_tells_the_number_of_ranks_is_a_warning(tmp_path: Path) -> None:
    """Columns in halves, as many as the norms have elements: three such shards would be a larger model."""
    catalog = sm.inspect(FOLDER / "fsdp2_columns_w2/ckpt")
    assert catalog.warnings[0].startswith("the shards of 2 ranks are read, and nothing says how many")
    result = sm.convert(FOLDER / "fsdp2_columns_w2/ckpt", tmp_path / "out", options=sm.Options(sync=False))
    assert catalog.warnings[0] in " ".join(result.plan.warnings)


@pytest.mark.parametrize("name", ["hsdp_2x2", "transformers_tp_w2"])
def test_replicas_and_tensor_parallel_ranks_are_counted_by_a_config_alone(name: str, tmp_path: Path) -> None:
    """The norm behind the layers is whole in one rank, or before the last one."""
    folder = copy(name, tmp_path)
    shutil.copy(FOLDER / "transformers_fsdp_w2/ckpt/config.json", folder)
    assert sm.inspect(folder).warnings == ()
    (folder / "config.json").unlink()
    assert "nothing says how many" in sm.inspect(folder).warnings[0]


def test_names_that_a_config_misses_leave_the_count_open(tmp_path: Path) -> None:
    """The shards of two replicas hold a half of the tensors each, all of them whole."""
    folder = copy("hsdp_2x2", tmp_path)
    shutil.copy(FOLDER / "transformers_fsdp_w2/ckpt/config.json", folder)
    for path in shards(folder)[2:]:
        path.unlink()
    assert "nothing says how many" in sm.inspect(folder).warnings[0]
    assert refusal(sm.convert, folder, tmp_path / "out").code == "incomplete-model"


def test_a_stage_without_what_is_behind_its_layers_is_no_whole_model(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    for path in shards(folder):
        without(path, "model.norm.weight", "lm_head.weight")
    assert "nothing says how many" in sm.inspect(folder).warnings[0]


def test_a_config_tells_the_number_of_ranks(tmp_path: Path) -> None:
    config = FOLDER / "transformers_fsdp_w2/ckpt/config.json"
    folder = copy("fsdp2_columns_w2", tmp_path)
    shutil.copy(config, folder)
    assert sm.inspect(folder).warnings == ()
    assert sm.inspect(FOLDER / "transformers_tp_w2/ckpt").warnings == ()
    folder = copy("fsdp2_columns_w4", tmp_path / "four")
    shards(folder)[-1].unlink()
    assert "nothing says how many" in sm.inspect(folder).warnings[0]
    shutil.copy(config, folder)
    for call in (lambda: sm.inspect(folder), lambda: sm.convert(folder, tmp_path / "out")):
        error = refusal(call)
        assert error.code == "missing-shard"
        assert error.found == "lm_head.weight [33, 6], and 20 more"
        assert error.expected == "[33, 8]"
        assert "config.json" in error.what
        assert "copy the files of all ranks" in error.hint


def test_the_vocabulary_of_a_model_that_is_not_known_tells_too(tmp_path: Path) -> None:
    folder = copy("fsdp2_columns_w2", tmp_path)
    config = {"model_type": "new", "architectures": ["NewForCausalLM"], "vocab_size": 33, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    assert "nothing says how many" in sm.inspect(folder).warnings[0]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    error = refusal(sm.inspect, folder)
    assert (error.code, error.expected) == ("missing-shard", "vocab_size 50")
    (folder / "config.json").write_text("{")  # says nothing
    assert "nothing says how many" in sm.inspect(folder).warnings[0]


# ---- one shard alone


def test_one_rank_is_refused_and_read_where_the_user_says_that_it_is_all(tmp_path: Path) -> None:
    folder = copy("one_rank_w1", tmp_path)
    error = refusal(sm.inspect, folder)
    assert error.code == "lone-shard"
    assert "take `shard-00001-` off the name" in error.hint
    for path in shards(folder):
        path.rename(folder / path.name.removeprefix("shard-00001-"))
    assert held(sm.inspect(folder)) == truth(FOLDER / "one_rank_w1")


@pytest.mark.parametrize("number", [1, 2])
def test_a_shard_under_another_name_is_known_by_its_offsets_or_its_norms(number: int, tmp_path: Path) -> None:
    source = shards(FOLDER / "fsdp2_w2/ckpt")[number - 1]
    for name in ("model.safetensors", "pretrained.safetensors", "model-00001-of-00001.safetensors"):
        (tmp_path / name).mkdir()
        path = Path(shutil.copy(source, tmp_path / name / name))
        for given in (path, path.parent):
            error = refusal(sm.inspect, given)
            assert error.code == "lone-shard"
            assert ("begins at" if number == 2 else "beside an embedding of 8 columns") in error.found


@pytest.mark.parametrize(("size", "whole"), [(5, True), (4, False), (8, True), (16, True)])
def test_a_norm_that_no_number_of_ranks_would_leave_is_whole(size: int, tmp_path: Path, *, whole: bool) -> None:
    """Of 8 columns two ranks have 4, and none has 5: that norm is of something else."""
    tensors = {"embed_tokens.weight": torch.ones(6, 8), "layers.0.q_a_norm.weight": torch.ones(size)}
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": json.dumps(offsets)})
    if whole:
        assert len(sm.inspect(path).entries) == 2
    else:
        assert refusal(sm.inspect, path).code == "lone-shard"


# ---- files that lie


def change_all(folder: Path, change: Callable[[Header, dict[str, dict]], object]) -> None:
    rewritten(shards(folder)[-1], change)


def move(header: Header, offsets: dict[str, dict], *, by: int) -> None:
    offsets["model.norm.weight"]["saved_offsets"][0] += by


def put(value: object) -> Callable[[Header, dict[str, dict]], object]:
    def change(header: Header, offsets: dict[str, dict]) -> None:
        offsets["model.norm.weight"]["saved_offsets"] = value

    return change


def retyped(header: Header, offsets: dict[str, dict]) -> None:
    header["model.norm.weight"]["dtype"] = "F16"


def reshaped(header: Header, offsets: dict[str, dict]) -> None:
    header["model.norm.weight"]["shape"] = [2, 2]
    offsets["model.norm.weight"]["saved_offsets"] = [2, 0]


def stripped(header: Header, offsets: dict[str, dict]) -> None:
    header["__metadata__"].pop("DCP_SHARDING_INFO")


LIES = {
    "a hole": (lambda header, offsets: move(header, offsets, by=1), "box-hole"),
    "far beyond": (lambda header, offsets: move(header, offsets, by=1 << 40), "box-hole"),
    "an overlap": (lambda header, offsets: move(header, offsets, by=-1), "box-overlap"),
    "the place of another": (lambda header, offsets: move(header, offsets, by=-4), "box-overlap"),
    "a negative offset": (put([-4]), "damaged-offsets"),
    "an offset beyond all files": (put([1 << 60]), "damaged-offsets"),
    "a number that is none": (put([4.0]), "damaged-offsets"),
    "true": (put([True]), "damaged-offsets"),
    "an axis too many": (put([4, 0]), "damaged-offsets"),
    "no axis": (put([]), "damaged-offsets"),
    "no list": (put("4"), "damaged-offsets"),
    "a number": (put(4), "damaged-offsets"),
    "another type": (retyped, "mixed-shards"),
    "another number of axes": (reshaped, "mixed-shards"),
    "no offsets": (stripped, "mixed-shards"),
    "a name without offsets": (lambda header, offsets: offsets.pop("model.norm.weight"), "damaged-offsets"),
    "offsets without a name": (lambda header, offsets: offsets.update(x={"saved_offsets": [0]}), "damaged-offsets"),
}


@pytest.mark.parametrize("lie", LIES)
def test_shards_that_do_not_make_tensors_are_refused(lie: str, tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    change, code = LIES[lie]
    rewritten(shards(folder)[-1], change)
    error = refusal(sm.inspect, folder)
    assert error.code == code, error.lines()
    assert "shard-00002" in f"{error.where}{error.found}" or "model.norm.weight" in error.where


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", "nan", '{"a": 1, "a": 1}', "[" * 100_000, '{"a": ' * 50_000, "9" * 10_000],
    ids=range(9),
)
def test_offsets_that_are_no_json(text: str, tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    path = shards(folder)[-1]
    save_file(load_file(path), path, metadata={"DCP_SHARDING_INFO": text})
    error = refusal(sm.inspect, folder)
    assert error.code == "damaged-offsets"
    assert error.where == str(path)


def test_all_lies_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    for path in shards(folder):
        rewritten(path, put([-4]))
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(folder)
    assert [error.code for error in caught.value.each()] == ["damaged-offsets"] * 2


def test_two_saves_in_one_directory(tmp_path: Path) -> None:
    """A run that went on with fewer ranks leaves the shards of the others, and another mapping other numbers."""
    folder = copy("fsdp2_parts_w3", tmp_path)
    for path in shards(FOLDER / "fsdp2_w2/ckpt"):
        shutil.copy(path, folder)
    error = refusal(sm.inspect, folder)
    assert (error.code, error.found) == ("mixed-shards", "1 and 2")
    folder = copy("hsdp_2x2", tmp_path / "fewer")
    for path in shards(FOLDER / "fsdp2_w2/ckpt"):
        shutil.copy(path, folder)
    error = refusal(sm.inspect, folder)
    assert error.code == "box-overlap"
    assert "the files of two saves are mixed" in error.hint
    folder = copy("fsdp2_parts_w3", tmp_path / "parts")
    first, second = shards(folder)[:2]
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert refusal(sm.inspect, folder).code == "mixed-shards"


def test_a_name_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    """torchtitan#3764: torch's consolidation writes it with shape [] and no type."""
    case = FOLDER / "unsaved_name_w2"
    error = refusal(sm.inspect, case / "ckpt")
    assert error.code == "damaged-header"
    assert "no rank saved it" in error.what
    assert held(sm.inspect(case / "ckpt/sharded")) == truth(case)


def test_names_that_count_to_a_billion_cost_nothing(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    shards(folder)[1].rename(folder / "shard-999999999-model-00001-of-00001.safetensors")
    start = time.process_time()
    assert refusal(sm.inspect, folder).code == "missing-shard"
    shards(folder)[0].rename(folder / "shard-00001-model-00001-of-999999999.safetensors")
    assert refusal(sm.inspect, folder).code == "mixed-shards"
    assert time.process_time() - start < 2


def test_a_shard_cut_short_is_refused(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    with shards(folder)[0].open("r+b") as file:
        file.truncate(3000)
    assert refusal(sm.inspect, folder).code == "truncated-file"


def test_a_shard_that_is_a_link_out_is_refused(tmp_path: Path) -> None:
    folder = copy("fsdp2_w2", tmp_path)
    path = shards(folder)[0]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert refusal(sm.inspect, folder).code == "link-outside"
