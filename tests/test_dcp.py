"""Checkpoints of torch's distributed checkpoint: what torch saved, bit for bit, and what is no whole checkpoint."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils import serialization

import shardmerge as sm
from shardmerge import api
from shardmerge.errors import CheckpointError, ShardmergeError
from shardmerge.sources.checksums import read_records
from shardmerge.sources.dcp_metadata import read_metadata
from shardmerge.sources.pickle_stream import LONGEST_STRETCH
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Extent
from tests.conftest import GOLDEN, read_entry, shardmerge

CASES = sorted(path.parent for path in GOLDEN.glob("dcp/*/case.json"))
FSDP2 = GOLDEN / "dcp" / "fsdp2_w2_bf16"
SEVERAL = GOLDEN / "dcp" / "several_models_w2_fp32" / "ckpt"


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def assert_holds(catalog: sm.Catalog, truth: dict[str, torch.Tensor]) -> None:
    assert set(catalog.names()) == set(truth)
    for name, tensor in truth.items():
        entry = catalog[name]
        assert (entry.dtype.torch, entry.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), name
        assert read_entry(entry).tobytes() == bits(tensor), name


def refused(path: Path, **options: Any) -> ShardmergeError:
    with pytest.raises(ShardmergeError) as found:
        sm.inspect(path, **options)
    return found.value.each()[0]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FSDP2 / "ckpt", tmp_path / "ckpt"))


def test_the_golden_folder_is_whole() -> None:
    assert len(CASES) >= 18


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_tensor_has_the_bits_that_torch_gathered(case: Path) -> None:
    assert_holds(sm.inspect(case / "ckpt"), load_file(case / "truth.safetensors"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_comes_back_and_is_carried_out(case: Path, tmp_path: Path) -> None:
    options = sm.Options(sync=False)
    (tmp_path / "mapping.yaml").write_text(
        f'shardmerge: 1\nsources: {{m: "{case}/ckpt"}}\noutput: {{path: out}}\ntensors: {{"{{x...}}": "m:{{x...}}"}}\n'
    )
    prepared = api.prepare(tmp_path / "mapping.yaml", options)
    api.write_plan(prepared, tmp_path / "plan.json")
    assert api.prepare(tmp_path / "plan.json", options).plan == prepared.plan
    api.run(tmp_path / "plan.json", tmp_path / "out", options)
    truth = load_file(case / "truth.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(t) for name, t in truth.items()}


@pytest.mark.parametrize("case", ["fsdp2_bag_w3_fp32", "views_w1"])
def test_what_is_written_as_a_distributed_checkpoint_is_read(case: str, tmp_path: Path) -> None:
    """Whose items have zeros between them, and whose .metadata has no frames."""
    options = sm.Options(format="dcp", sync=False)
    sm.convert(GOLDEN / "dcp" / case / "ckpt", tmp_path / "out", options=options)
    truth = load_file(GOLDEN / "dcp" / case / "truth.safetensors")
    assert_holds(sm.inspect(tmp_path / "out"), truth)
    (written,) = (tmp_path / "out").glob("*.distcp")
    assert sum(record.nbytes for record in read_records(SourceFile(written))) == sum(
        map(len, map(bits, truth.values()))
    )


def test_a_flipped_bit_is_found_by_the_checksum_of_its_item(checkpoint: Path) -> None:
    """In the last item but one: they are found from the end of the file."""
    entry = sm.inspect(checkpoint)["lm_head.weight"]
    extent = entry.pieces[0].held
    assert isinstance(extent, Extent)
    with Path(extent.file).open("r+b") as file:
        file.seek(extent.offset)
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        sm.convert(checkpoint, checkpoint.parent / "out", options=sm.Options(sync=False))
    assert caught.value.code == "damaged-record"
    assert not (checkpoint.parent / "out").exists()


# --- ways in ---


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_one_file_stands_for_the_checkpoint(name: str) -> None:
    catalog = sm.inspect(FSDP2 / "ckpt" / name)
    assert_holds(catalog, load_file(FSDP2 / "truth.safetensors"))
    assert any("one part of a checkpoint" in note for note in catalog.notes)


@pytest.mark.parametrize("inner", ["pytorch_model_fsdp_0", "model_and_optim", "weights", "any"])
def test_the_directory_above_stands_for_the_model_in_it(inner: str, tmp_path: Path) -> None:
    """As Accelerate, OLMo-core, NeMo 2 and others nest it, the optimizer's own checkpoint beside."""
    for folder in (inner, "optimizer_0"):
        shutil.copytree(FSDP2 / "ckpt", tmp_path / "checkpoint-2" / folder)
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    catalog = sm.inspect(tmp_path / "checkpoint-2")
    assert Path(catalog.path).name == inner
    assert_holds(catalog, load_file(FSDP2 / "truth.safetensors"))


def test_several_checkpoints_are_listed(tmp_path: Path) -> None:
    for step in ("step-1", "step-2"):
        shutil.copytree(FSDP2 / "ckpt", tmp_path / "run" / step)
    error = refused(tmp_path / "run")
    assert error.code == "several-checkpoints"
    assert str(tmp_path / "run" / "step-2") in error.hint


def test_files_that_the_metadata_does_not_name_do_not_count(checkpoint: Path) -> None:
    """A run on fewer ranks saved into the directory of one on more."""
    shutil.copy(checkpoint / "__1_0.distcp", checkpoint / "__3_0.distcp")
    (checkpoint / "__2_0.distcp").write_bytes(b"stale")
    catalog = sm.inspect(checkpoint)
    assert_holds(catalog, load_file(FSDP2 / "truth.safetensors"))
    assert catalog.kind == "torch distributed checkpoint, 2 ranks"


# --- roots ---


def test_the_most_telling_root_is_read_and_the_others_are_named() -> None:
    (said,) = sm.inspect(SEVERAL).warnings
    assert "ema (21)" in said
    assert "teachers.0 (1)" in said


def test_another_root_is_asked_for() -> None:
    truth = load_file(SEVERAL.parent / "truth.safetensors")
    assert_holds(sm.inspect(SEVERAL, root="ema"), {name: tensor * 2 for name, tensor in truth.items()})
    assert_holds(sm.inspect(SEVERAL, root="teachers.0"), {"deep.key": torch.arange(5)})


def test_a_root_that_is_not_there() -> None:
    error = refused(SEVERAL, root="teacher")
    assert error.code == "unknown-root"
    assert error.found == "model, ema, teachers.0"
    assert error.hint.startswith("say --root teachers.0, ")


def test_a_root_that_nothing_tells(tmp_path: Path) -> None:
    save({"student": {"w": torch.ones(2)}, "critic": {"w": torch.ones(3)}}, tmp_path)
    error = refused(tmp_path)
    assert error.code == "several-roots"
    assert error.hint.startswith("choose one: --root ")
    assert_holds(sm.inspect(tmp_path, root="critic"), {"w": torch.ones(3)})


def test_dicts_in_the_model_are_part_of_it(tmp_path: Path) -> None:
    """As in a torch file: their names are joined with dots."""
    save(
        {"model": {"w": torch.ones(2), "head": {"w": torch.ones(3), "deep": {"b": torch.ones(4)}}}, "step": 1}, tmp_path
    )
    truth = {"w": torch.ones(2), "head.w": torch.ones(3), "head.deep.b": torch.ones(4)}
    assert_holds(sm.inspect(tmp_path), truth)
    assert_holds(sm.inspect(tmp_path, root="model"), truth)
    assert not sm.inspect(tmp_path).warnings


@pytest.mark.parametrize(
    "name", ["optimal_transport.w", "optimus.h.w", "rngs.w", "dataloading.w", "schedule.w", "step"]
)
def test_modules_whose_names_begin_like_an_optimizers_are_read(name: str, tmp_path: Path) -> None:
    save({name: torch.ones(2), "w": torch.ones(3)}, tmp_path)
    assert set(sm.inspect(tmp_path).names()) == {name, "w"}


@pytest.mark.parametrize("root", ["", "model"])
def test_two_names_that_are_one_when_they_are_joined(root: str, checkpoint: Path) -> None:
    """Torch itself refuses to save such a state dict, so its classes are made to say it."""
    names = ("model.model.norm.weight", "model.lm_head.weight")

    def edit(metadata: Any) -> None:
        metadata.planner_data |= {names[0]: ("model", "a.b"), names[1]: ("model", "a", "b")}

    edited(checkpoint, edit)
    assert refused(checkpoint, root=root).code == "duplicate-name"


def test_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    save({"optimizer": {"state": {"w": {"exp_avg": torch.ones(2)}}}}, tmp_path)
    assert refused(tmp_path).code == "not-a-model"


def test_what_is_left_out_is_counted() -> None:
    assert sm.inspect(FSDP2 / "ckpt").notes == ("63 tensors of the optimizer and of other state are left out",)


def save(state: dict[str, Any], folder: Path, **how: Any) -> None:
    writer = dcp.FileSystemWriter(folder, **how)
    with warnings.catch_warnings():  # that nobody else saves
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer, no_dist=True)


# --- what is no whole checkpoint ---


def edited(checkpoint: Path, edit: Callable[[Metadata], object]) -> None:
    """Has torch's own classes say something else."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


NAME = "model.model.embed_tokens.weight"


def tensor_of(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata[NAME]
    assert isinstance(found, TensorStorageMetadata)
    return found


def without_chunk(metadata: Metadata) -> None:
    chunk = tensor_of(metadata).chunks.pop()
    del metadata.storage_data[MetadataIndex(NAME, chunk.offsets)]


def moved_chunk(metadata: Metadata) -> None:
    chunk = tensor_of(metadata).chunks.pop()
    there = torch.Size((chunk.offsets[0] - 1, 0))
    tensor_of(metadata).chunks.append(ChunkStorageMetadata(there, chunk.sizes))
    metadata.storage_data[MetadataIndex(NAME, there)] = metadata.storage_data.pop(MetadataIndex(NAME, chunk.offsets))


def larger_tensor(metadata: Metadata) -> None:
    tensor_of(metadata).size = torch.Size((40, 8))


def smaller_tensor(metadata: Metadata) -> None:
    tensor_of(metadata).size = torch.Size((30, 8))


def other_type(metadata: Metadata) -> None:
    tensor_of(metadata).properties.dtype = torch.float16


def other_sizes(metadata: Metadata) -> None:
    first, second = tensor_of(metadata).chunks
    tensor_of(metadata).chunks[:] = [
        replace(first, sizes=torch.Size((first.sizes[0] - 1, 8))),
        replace(second, offsets=torch.Size((second.offsets[0] - 1, 0)), sizes=torch.Size((second.sizes[0] + 1, 8))),
    ]
    where = metadata.storage_data.pop(MetadataIndex(NAME, second.offsets))
    metadata.storage_data[MetadataIndex(NAME, torch.Size((second.offsets[0] - 1, 0)))] = where


def at(index: int, **change: Any) -> Callable[[Metadata], None]:
    def edit(metadata: Metadata) -> None:
        key = MetadataIndex(NAME, tensor_of(metadata).chunks[index].offsets)
        metadata.storage_data[key] = replace(metadata.storage_data[key], **change)

    return edit


def without_item(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex(NAME, tensor_of(metadata).chunks[1].offsets)]


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (without_chunk, "box-hole"),
        (moved_chunk, "box-overlap"),
        (larger_tensor, "box-hole"),
        (smaller_tensor, "box-outside"),
        (other_type, "item-mismatch"),
        (other_sizes, "item-mismatch"),
        (without_item, "missing-chunk"),
        (at(0, offset=1), "item-format"),
        (at(0, length=100), "item-format"),
        (at(0, length=900), "item-mismatch"),
        (at(0, length=1 << 40), "truncated-file"),
        (at(0, offset=-1), "damaged-pickle"),
        (at(0, relative_path="../other/__0_0.distcp"), "hostile-pickle"),
        (at(0, relative_path="/etc/passwd"), "hostile-pickle"),
        (at(0, relative_path=".."), "hostile-pickle"),
        (at(0, relative_path="__5_0.distcp"), "missing-rank"),
        (at(0, transform_descriptors=["stream.zstd/1"]), "packed-item"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_metadata_that_does_not_fit_is_refused(
    edit: Callable[[Metadata], object], code: str, checkpoint: Path
) -> None:
    edited(checkpoint, edit)
    error = refused(checkpoint)
    assert error.code == code
    assert "embed_tokens" in f"{error.where} {error.found}" or code in ("hostile-pickle", "missing-rank")
    assert not list(checkpoint.parent.glob("out*"))


def test_a_missing_file_of_a_rank_is_named(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    error = refused(checkpoint)
    assert error.code == "missing-rank"
    assert "__1_0.distcp" in error.what


def test_a_file_that_was_cut_off_is_named(checkpoint: Path) -> None:
    with (checkpoint / "__1_0.distcp").open("r+b") as file:
        file.truncate(5000)
    error = refused(checkpoint)
    assert error.code == "truncated-file"
    assert "__1_0.distcp" in error.where


def test_the_hidden_file_is_missed(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    error = refused(checkpoint)
    assert error.code == "missing-metadata"
    assert "hidden" in error.expected


def test_a_rank_whose_metadata_is_missing(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "dcp" / "no_collectives_w2_bf16" / "ckpt", tmp_path / "ckpt")
    (folder / "__1.metadata").unlink()
    assert refused(folder).code == "box-hole"


def test_metadata_of_two_saves(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "dcp" / "no_collectives_w2_bf16" / "ckpt", tmp_path / "ckpt")
    path = folder / "__1.metadata"
    metadata = pickle.loads(path.read_bytes())
    tensor_of(metadata).size = torch.Size((12, 8))
    path.write_bytes(pickle.dumps(metadata))
    assert refused(folder).code == "mixed-ranks"


def test_items_that_are_safetensors(tmp_path: Path) -> None:
    """Their .metadata says offset 0 for every tensor, so torch itself cannot read what it wrote."""
    save({"w": torch.ones(3)}, tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    error = refused(tmp_path)
    assert error.code == "item-format"
    assert "safetensors" in error.what


@pytest.mark.parametrize("length", [0, 1, 40, 2000, -1])
def test_a_metadata_that_was_cut_off(length: int, checkpoint: Path) -> None:
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:length])
    assert refused(checkpoint).code == "damaged-pickle"


def test_another_pickle_is_no_metadata(checkpoint: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    assert refused(checkpoint).code == "damaged-pickle"


def test_the_command_line_says_it_without_a_traceback(checkpoint: Path) -> None:
    (checkpoint / "__1_0.distcp").unlink()
    done = shardmerge("convert", checkpoint, checkpoint.parent / "out", code=1)
    assert "[missing-rank]" in done.stderr
    assert not (checkpoint.parent / "out").exists()


# --- the metadata, beside what pickle makes of it ---


@st.composite
def metadatas(draw: st.DrawFn) -> Metadata:
    """Tensors of zero to five axes in rows of chunks, with names of any script, sizes shared or not."""
    tensors: dict[str, Any] = {}
    items: dict[MetadataIndex, _StorageInfo] = {}
    shared = draw(st.booleans())
    names = draw(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=4, unique=True))
    for name in names:
        inner = tuple(draw(st.lists(st.sampled_from([1, 3, 300, 70_000]), max_size=4)))
        count = draw(st.sampled_from([1, 2, 40])) if draw(st.booleans()) else 0
        rows = draw(st.sampled_from([1, 200, 100_000, 3 << 31]))
        shape = torch.Size((rows * count, *inner)) if count else torch.Size(())
        boxes = [(torch.Size((rows * k, *(0,) * len(inner))), torch.Size((rows, *inner))) for k in range(count)]
        chunks = [ChunkStorageMetadata(*box) for box in boxes or [(torch.Size(()), torch.Size(()))]]
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), shape, chunks)
        for number, chunk in enumerate(chunks):
            offsets = chunk.offsets if shared else torch.Size(list(chunk.offsets))
            index = draw(st.sampled_from([number, None, 7]))
            where = _StorageInfo(
                f"__{number % 3}_0.distcp", draw(st.integers(0, 1 << 45)), draw(st.integers(1, 1 << 35))
            )
            items[MetadataIndex("".join(list(name)), offsets, index)] = where
    tensors["an object"] = BytesStorageMetadata()
    items[MetadataIndex("an object")] = _StorageInfo("__0_0.distcp", 0, 5)
    return Metadata(tensors, {name: (name,) for name in tensors}, items, StorageMeta(), "1.0.0")


@given(metadatas(), st.sampled_from([2, 3, 4, 5]))
def test_a_metadata_is_what_pickle_makes_of_it(
    tmp_path_factory: pytest.TempPathFactory, made: Metadata, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / ".metadata"
    path.write_bytes(pickle.dumps(made, protocol))
    found = read_metadata(path, lambda name: True)
    assert found.objects == {"an object"}
    assert found.paths == made.planner_data
    assert set(found.table.tensors) == set(made.state_dict_metadata) - {"an object"}
    for name in found.table.tensors:
        tensor = made.state_dict_metadata[name]
        assert isinstance(tensor, TensorStorageMetadata)
        expected = []
        for chunk in tensor.chunks:
            one = made.storage_data[MetadataIndex(name, chunk.offsets)]
            expected.append((tuple(chunk.offsets), tuple(chunk.sizes), one.relative_path, one.offset, one.length, ""))
        assert [tuple(chunk) for chunk in found.table.chunks(name)] == expected
        assert found.table.tensors[name].shape == tuple(tensor.size)


def large(tensors: int, ranks: int) -> Metadata:
    """A model on many ranks, with a moment of its optimizer."""
    names = [f"{kind}.layers.{n}.weight" for n in range(tensors) for kind in ("model", "optim.state")]
    made = Metadata({}, {}, {}, StorageMeta(), "1.0.0")
    for name in names:
        offsets = [torch.Size((300 * rank, 0)) for rank in range(ranks)]
        chunks = [ChunkStorageMetadata(offset, torch.Size((300, 4096))) for offset in offsets]
        size = torch.Size((300 * ranks, 4096))
        made.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), size, chunks)
        for rank, offset in enumerate(offsets):
            key = MetadataIndex("".join(list(name)), torch.Size(list(offset)), rank)
            made.storage_data[key] = _StorageInfo(f"__{rank}_0.distcp", 70_000 * rank, 2_459_000)
    return made


def test_a_large_metadata_is_read_in_rows_and_held_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 chunks, of which half is kept: what is held, and how many opcodes are stepped through one by one."""
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(large(tensors=150, ranks=100)))
    monkeypatch.setattr("shardmerge.sources.dcp_metadata.MOST_OPCODES", 70_000)  # 71 a chunk are 2 million
    tracemalloc.start()
    found = read_metadata(path, lambda name: not name.startswith("optim"))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.table.tensors) == len(found.table.dropped) == 150
    assert held < 2 << 20
    assert peak < 24 << 20  # two windows of 4 MiB, the stretches' places, what a frame holds


@pytest.mark.parametrize("protocol", [2, 4])
def test_windows_end_anywhere(protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles with frames and without, at every place of an opcode."""
    path = tmp_path / ".metadata"
    made = large(tensors=3, ranks=40)
    path.write_bytes(pickle.dumps(made, protocol))
    for window in range(9_000, 9_080):
        monkeypatch.setattr("shardmerge.sources.pickle_stream._WINDOW", window)
        found = read_metadata(path, lambda name: True)
        assert [one.chunks for one in found.table.tensors.values()] == [40] * 6
        assert [chunk.begin for chunk in found.table.chunks("model.layers.2.weight")] == [70_000 * n for n in range(40)]


def test_rows_are_no_longer_than_what_is_read_again() -> None:
    """The longest that the patterns match: 64 axes of nine bytes three times, a name of 255, and what is around it."""
    assert LONGEST_STRETCH > 3 * 64 * 10 + 300


def test_a_pickle_that_refers_to_itself_in_passing_comes_to_an_end(tmp_path: Path) -> None:
    """Every memo number of every row replaced by every other one: refused, or the same tensors; never more."""
    path = tmp_path / ".metadata"
    data = pickle.dumps(large(tensors=1, ranks=4), 4)
    gets = [n for n in range(len(data) - 1) if data[n : n + 1] == b"h"]
    codes = set()
    for position in gets[:: max(len(gets) // 60, 1)]:
        for number in (data[position + 1] + 1, 200, 255, 3):
            path.write_bytes(data[: position + 1] + bytes([number % 256]) + data[position + 2 :])
            try:
                read_metadata(path, lambda name: True)
            except CheckpointError as error:
                codes.add(error.code)
    assert "damaged-pickle" in codes
    assert codes <= {"damaged-pickle", "hostile-pickle", "unsupported-tensor"}


# --- pickles that call something ---

# The package itself is stood in for, so that only what reading needs is imported.
_WATCHED = """
import sys, types
package = types.ModuleType("shardmerge")
package.__path__ = [sys.argv[1]]
sys.modules["shardmerge"] = package
from pathlib import Path
from shardmerge.errors import ShardmergeError
from shardmerge.sources.dcp import read_dcp

events = []
sys.addaudithook(lambda event, args: events.append((event, repr(args)[:200])))
try:
    said = read_dcp(Path(sys.argv[2])).kind
except ShardmergeError as error:
    said = error.code
files = ("open", "os.listdir", "os.scandir", "pathlib.Path.glob", "builtins.id", "array.__new__")
strange = [event for event in events if event[0] not in files]
assert not strange, strange
assert not {"pickle", "torch", "numpy"} & set(sys.modules), sorted(sys.modules)
print(said)
"""


class Calls:
    """Pickles as a call of ``os.system``."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("where", ["beside", "a chunk", "a tensor", "nothing", "an item", "the head of an item"])
def test_whatever_a_pickle_calls_nothing_is_run(where: str, checkpoint: Path) -> None:
    """Read in a process of its own, under an audit hook: no event but those of files and arrays."""

    def edit(metadata: Any) -> None:
        key = MetadataIndex(NAME, tensor_of(metadata).chunks[0].offsets)
        if where == "beside":
            metadata.evil = Calls()
        elif where == "a chunk":
            tensor_of(metadata).chunks[0] = Calls()
        elif where == "nothing":
            metadata.state_dict_metadata[NAME] = None
        elif where == "a tensor":
            metadata.state_dict_metadata[NAME] = Calls()
        else:
            metadata.storage_data[key] = Calls()

    if where == "the head of an item":
        buffer = io.BytesIO()
        torch.save(Calls(), buffer)
        with (checkpoint / "__0_0.distcp").open("r+b") as file:
            file.write(buffer.getvalue()[:400])
    else:
        edited(checkpoint, edit)
    package = str(Path(sm.__file__).parent)
    command = [sys.executable, "-c", _WATCHED, package, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkpoint.parent)
    assert done.returncode == 0, done.stderr
    expected = {"beside": "torch distributed checkpoint, 2 ranks", "the head of an item": "item-format"}
    assert done.stdout.strip() in (expected.get(where, ""), "damaged-pickle", "missing-chunk")
    assert not (checkpoint.parent / "pwned").exists()


def test_items_whose_storages_begin_on_a_page(tmp_path: Path) -> None:
    """An option of torch.save; the head of an item is then as long as a page."""
    truth = {"a": torch.arange(6.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)}
    with serialization.config.patch({"save.storage_alignment": 4096}):
        save(truth, tmp_path)
    assert_holds(sm.inspect(tmp_path), truth)


# --- the guide ---


def test_the_guide_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the page, on the golden checkpoints; numbers of time and bytes aside."""
    page = (Path(__file__).parent.parent / "docs" / "guides" / "fsdp.md").read_text("utf-8")
    shown = re.findall(r"```console\n\$ shardmerge (.*)\n((?:.*\n)*?)```", page)
    assert len(shown) == 2
    shutil.copytree(FSDP2 / "ckpt", tmp_path / "step-2")
    shutil.copytree(SEVERAL, tmp_path / "step-3")
    monkeypatch.chdir(tmp_path)
    for command, expected in shown:
        printed = shardmerge(*command.split())
        lines = {_numberless(line) for line in f"{printed.stdout}{printed.stderr}".splitlines()}
        assert {_numberless(line) for line in expected.splitlines()} <= lines


def _numberless(line: str) -> str:
    return re.sub(r"plan \w+", "plan", re.sub(r"\d[\d.]*", "N", line.replace("...", str(Path.cwd()))))


def test_the_table_of_a_checkpoint_is_read_and_not_left_behind(checkpoint: Path) -> None:
    (checkpoint / ".hidden").write_text("by hand")
    plan = api.prepare_conversion(checkpoint, options=sm.Options(files="all", sync=False)).plan
    assert not {".metadata", "__0.metadata"} & {side.name for side in plan.side_files}
    plan = api.prepare_conversion(checkpoint, options=sm.Options(sync=False)).plan
    assert dict(plan.left_behind) == {".hidden": "a hidden file"}
