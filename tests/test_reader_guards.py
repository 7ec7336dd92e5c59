"""What a reader refuses although nothing else would notice: each test here is the only one of its guard.

Files are made by the real writer and then damaged, or contradict each other.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta

import shardmerge as sm
from shardmerge.errors import CheckpointError
from shardmerge.sources.hub import is_hub_id
from shardmerge.sources.safetensors_file import is_safetensors, read_header
from shardmerge.sources.torch_file import is_torch_file
from tests.conftest import GOLDEN
from tests.test_dcp import FSDP2, NAME, edited, tensor_of
from tests.test_rank_pickles import FSDP2 as RANKS
from tests.test_rank_pickles import assert_is_truth, copied, rewritten
from tests.test_rank_sets import assert_holds, write_megatron


def refused(path: Path, **options: Any) -> sm.ShardmergeError:
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(path, **options)
    return caught.value.each()[0]


def all_refused(path: Path) -> sm.ShardmergeError:
    """The error itself, of several at once."""
    with pytest.raises(sm.ShardmergeError) as caught:
        sm.inspect(path)
    return caught.value


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of many zeros, of which the disk holds none."""
    path.write_bytes(start)
    os.truncate(path, size)
    return path


# --- safetensors ---


@pytest.mark.parametrize(
    ("size", "start", "what"),
    [
        (7, b"", "shorter than the 8 bytes"),
        ((100 << 20) + 64, struct.pack("<Q", (100 << 20) + 1), "header length is impossible"),
    ],
)
def test_a_header_length_is_looked_at_before_it_is_read(size: int, start: bytes, what: str, tmp_path: Path) -> None:
    """As of a shard that an index names."""
    path = sparse(tmp_path / "model.safetensors", size, start)
    with pytest.raises(CheckpointError, match=what):
        read_header(path)


# --- shards and their index ---


def sharded(folder: Path, **changes: Any) -> Path:
    """Two shards and an index of theirs, some of whose fields are changed."""
    for number, name in enumerate("ab", 1):
        save_file({name: torch.ones(2)}, folder / f"model-0000{number}-of-00002.safetensors")
    names = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate("ab", 1)}
    index = {"metadata": {}, "weight_map": names} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SECOND = "model-00002-of-00002.safetensors"
INDEXES = {
    "the shard does not hold 1 tensors: c": {"a": "model-00001-of-00002.safetensors", "b": SECOND, "c": SECOND},
    "the index leaves out 1 tensors: a": {"a": SECOND, "b": SECOND, "c": "model-00001-of-00002.safetensors"},
    "1 of 3 shards are not there: z.safetensors": {"a": "model-00001-of-00002.safetensors", "b": SECOND,
                                                   "c": "z.safetensors"},
    "weight_map is not an object of strings": {"a": 1},
    "weight_map names no shard": {},
    "the index names '../z.safetensors' as a shard": {"a": "../z.safetensors"},
    "the index names 'z.bin' as a shard": {"a": "z.bin"},
}  # fmt: skip


@pytest.mark.parametrize("what", INDEXES)
def test_what_an_index_that_lies_is_told(what: str, tmp_path: Path) -> None:
    assert what in str(all_refused(sharded(tmp_path, weight_map=INDEXES[what])))


def test_an_index_of_a_list(tmp_path: Path) -> None:
    assert "not an object of strings" in refused(sharded(tmp_path, weight_map=["a"])).what


def test_an_index_larger_than_any(tmp_path: Path) -> None:
    sparse(sharded(tmp_path) / "model.safetensors.index.json", (1 << 32) - 1)
    assert "too large for an index" in refused(tmp_path).what


def test_an_index_with_a_key_twice(tmp_path: Path) -> None:
    path = sharded(tmp_path) / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"b"', '"a"'))
    assert "a key stands twice" in refused(tmp_path).what


def test_two_indexes(tmp_path: Path) -> None:
    """Neither of which has the name that transformers looks for."""
    path = sharded(tmp_path) / "model.safetensors.index.json"
    shutil.copy(path, tmp_path / "one.safetensors.index.json")
    path.rename(tmp_path / "two.safetensors.index.json")
    assert refused(tmp_path).code == "several-files"


def test_shards_without_an_index_that_hold_one_tensor(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    assert set(sm.inspect(tmp_path).names()) == {"a", "b"}
    save_file({"a": torch.zeros(2)}, tmp_path / SECOND)
    assert refused(tmp_path).code == "duplicate-name"
    (tmp_path / SECOND).unlink()
    assert refused(tmp_path).code == "missing-shard"


def test_two_files_of_weights_and_no_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    assert refused(tmp_path).code == "several-files"


# --- state dicts of torch files ---


def saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "model.pt")
    return folder / "model.pt"


ONE = torch.ones(2)


@pytest.mark.parametrize("value", [{"a": {"b": ONE}, "a.b": torch.zeros(2), "c": ONE}, {1: ONE, "1": torch.zeros(2)}])
def test_two_tensors_of_one_dotted_name(value: object, tmp_path: Path) -> None:
    assert refused(saved(tmp_path, value)).code == "duplicate-name"


def test_a_root_without_a_tensor(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, {"w": ONE, "ema": {"step": 3}}), root="ema").code == "no-tensors"


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    """Under a short name, and first: it would be entered a thousand times before the names are too long."""
    value: dict[str, object] = {}
    value |= {"a": value, "w": ONE}
    assert refused(saved(tmp_path, value)).code == "hostile-pickle"


def test_one_tensor_under_more_names_than_any(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, {f"w{number}": ONE for number in range(4097)})).code == "hostile-pickle"


def test_more_names_than_any_checkpoint_of_its_size(tmp_path: Path) -> None:
    """One dict of numbers under many names."""
    inner = dict.fromkeys(map(str, range(100)), 0)
    assert (
        refused(saved(tmp_path, {"w": ONE} | {f"d{number}": inner for number in range(300)})).code == "hostile-pickle"
    )


def test_a_name_longer_than_any(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, {"w" * 4097: ONE})).code == "hostile-pickle"


def test_names_that_are_longer_together_than_any(tmp_path: Path) -> None:
    value = {"model": {"w" * 4000: {str(number): ONE for number in range(400)}}}
    assert refused(saved(tmp_path, value)).code == "hostile-pickle"


# --- files of ranks ---


def rank_file(folder: Path, state: object, rank: int = 0, world: int = 1) -> None:
    torch.save(state, folder / f"model_world_size_{world}_rank_{rank}.pt")


def test_a_rank_without_a_tensor(tmp_path: Path) -> None:
    rank_file(tmp_path, {"w": ONE, "ema": {"step": 3}})
    assert refused(tmp_path, root="ema").code == "no-tensors"


def test_one_name_twice_in_a_ranks_file(tmp_path: Path) -> None:
    rank_file(tmp_path, {"a": {"b": torch.zeros(2)}, "a.b": torch.ones(2), "c": torch.ones(2)})
    assert refused(tmp_path).code == "duplicate-name"


def test_a_sparse_tensor_in_a_ranks_file_is_not_left_out(tmp_path: Path) -> None:
    rank_file(tmp_path, {"a": torch.ones(2), "b": torch.eye(2).to_sparse()})
    error = refused(tmp_path)
    assert error.code == "unsupported-tensor"
    assert error.where.endswith(", b")


def test_a_list_of_items_larger_than_any(tmp_path: Path) -> None:
    """torch_checkpointing's metadata.pkl beside the files of two ranks."""
    for rank in range(2):
        torch.save({"a": torch.ones(2)}, tmp_path / f"model_{rank}.pt")
    sparse(tmp_path / "metadata.pkl", (256 << 20) + 1)
    assert refused(tmp_path).code == "hostile-pickle"


# --- Megatron ---


def test_iterations_without_a_tracker(tmp_path: Path) -> None:
    for step in (3, 7):
        write_megatron(tmp_path / f"iter_{step:07d}", 1, 1)
    error = refused(tmp_path)
    assert error.code == "several-tags"
    assert "iter_0000003" in f"{error.hint}{error.found}"


# --- the .metadata of torch's distributed checkpoints ---


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


METADATA = {
    "a frame nests in another or is longer": [
        b"\x80\x04\x95" + u64(1 << 40) + b"N.",
        b"\x80\x04\x95" + u64(10) + b"\x95" + u64(0) + b"N" * 9 + b".",
    ],
    "an opcode reaches over the end of its frame": [b"\x80\x04\x95" + u64(2) + b"J\1\0\0\0."],
    "the pickle is cut short": [b"\x80\x02N"],
    "not a pickle of protocol 2 to 5": [b"\x80\x06N.", b"\x80\x01N.", b"\x80\x02\x80\x02N.", b"(lp0\n.", b""],
    "it refers to a memo entry that was never written": [b"\x80\x02h\x07.", b"\x80\x02j\x07\0\0\0."],
    "this is no Metadata": [b"\x80\x02}.", b"\x80\x02cos\nsystem\n)\x81."],
}


@pytest.mark.parametrize("what", METADATA)
def test_what_a_malformed_metadata_is_told(what: str, tmp_path: Path) -> None:
    for data in METADATA[what]:
        (tmp_path / ".metadata").write_bytes(data)
        error = refused(tmp_path)
        assert error.code == "damaged-pickle"
        assert what in error.what


def test_a_metadata_larger_than_any(tmp_path: Path) -> None:
    sparse(tmp_path / ".metadata", (1 << 32) - 1, b"\x80\x02N")
    assert (refused(tmp_path).code, "larger than any" in refused(tmp_path).what) == ("hostile-pickle", True)


def no_items(metadata: Metadata) -> None:
    metadata.storage_data = None


def another_entry(metadata: Metadata) -> None:
    metadata.state_dict_metadata["model.more"] = StorageMeta()  # type: ignore[assignment]


def dtype_of_another_module(metadata: Metadata) -> None:
    tensor_of(metadata).properties.dtype = torch.strided  # type: ignore[assignment]


def a_chunk_that_is_none(metadata: Metadata) -> None:
    tensor_of(metadata).chunks[0] = "chunk"  # type: ignore[call-overload]


def one_axis_less(metadata: Metadata) -> None:
    first = tensor_of(metadata).chunks[0]
    tensor_of(metadata).chunks[0] = ChunkStorageMetadata(first.offsets[:1], first.sizes)


def no_sizes(metadata: Metadata) -> None:
    tensor_of(metadata).chunks[0].sizes = None  # type: ignore[assignment]


def no_shape(metadata: Metadata) -> None:
    tensor_of(metadata).size = None  # type: ignore[assignment]


def flat_chunks(metadata: Metadata) -> None:
    """Chunks of one axis, as many numbers in all as two chunks of two axes have."""
    tensor_of(metadata).chunks[:] = [ChunkStorageMetadata(torch.Size((at,)), torch.Size((8,))) for at in range(4)]


def two_items(metadata: Metadata) -> None:
    """Of one name and place: a dict takes both keys while they differ."""
    first = MetadataIndex(NAME, tensor_of(metadata).chunks[0].offsets)
    second = MetadataIndex("second", first.offset)
    metadata.storage_data[second] = replace(metadata.storage_data[first])
    object.__setattr__(second, "fqn", NAME)


def no_file(metadata: Metadata) -> None:
    for one in metadata.storage_data.values():
        one.relative_path = None


def no_offset(metadata: Metadata) -> None:
    for one in metadata.storage_data.values():
        one.offset = None


def a_key_of_text(metadata: Metadata) -> None:
    metadata.storage_data["more"] = replace(next(iter(metadata.storage_data.values())))


def an_index_of_text(metadata: Metadata) -> None:
    first = metadata.storage_data[MetadataIndex(NAME, tensor_of(metadata).chunks[0].offsets)]
    key = MetadataIndex(NAME, torch.Size((1, 0)), "1")  # type: ignore[arg-type]
    metadata.storage_data[key] = replace(first)


def a_chunk_more(metadata: Metadata) -> None:
    first = metadata.storage_data[MetadataIndex(NAME, tensor_of(metadata).chunks[0].offsets)]
    metadata.storage_data[MetadataIndex(NAME, torch.Size((1, 0)))] = replace(first)


def negative_offsets(metadata: Metadata) -> None:
    """In the last of several chunks, which are read in rows."""
    tensor_of(metadata).chunks[-1].offsets = torch.Size((-1, 0))


def a_text_as_size(metadata: Metadata) -> None:
    """In the last of several chunks: one that was in the pickle before, and is referred to."""
    tensor_of(metadata).chunks[-1].sizes = NAME  # type: ignore[assignment]


CONTRADICTIONS = {
    "this is no Metadata": [no_items],
    "an entry is neither a tensor nor an object": [another_entry],
    "a tensor of an unknown element type": [dtype_of_another_module],
    "a chunk is something else": [a_chunk_that_is_none],
    "a chunk's offsets and sizes have different numbers of axes": [one_axis_less],
    "a chunk has no offsets and sizes": [no_sizes, a_text_as_size],
    "torch.Size is made of something else than sizes": [negative_offsets],
    "a tensor has no name, size or list of chunks": [no_shape],
    "a tensor has chunks of another number of axes": [flat_chunks],
    "two items hold one chunk": [two_items],
    "an item has no name, file, offset or length": [no_file, no_offset],
    "an item has no name": [a_key_of_text],
    "an item's key is no place in a tensor": [an_index_of_text],
    "an item holds a chunk that its tensor does not have": [a_chunk_more],
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_a_metadata_that_contradicts_itself_is_told(what: str, tmp_path: Path) -> None:
    for edit in CONTRADICTIONS[what]:
        folder = shutil.copytree(FSDP2 / "ckpt", tmp_path / edit.__name__)
        edited(folder, edit)
        assert what in refused(folder).what


def test_two_tensors_of_one_name_in_a_metadata(tmp_path: Path) -> None:
    def double(metadata: Metadata) -> None:
        metadata.state_dict_metadata[NAME.replace("weight", "weighX")] = replace(
            tensor_of(metadata), chunks=[replace(chunk) for chunk in tensor_of(metadata).chunks]
        )

    folder = shutil.copytree(FSDP2 / "ckpt", tmp_path / "ckpt")
    edited(folder, double)
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes().replace(b"weighX", b"weight"))
    assert refused(folder).what == "two tensors have the same name"


def test_the_size_of_a_chunk_that_is_a_text_of_elsewhere(tmp_path: Path) -> None:
    """Which the pickle names by its number in the memo."""

    def text(metadata: Metadata) -> None:
        tensor_of(metadata).chunks[-1].sizes = next(iter(metadata.state_dict_metadata))

    folder = shutil.copytree(FSDP2 / "ckpt", tmp_path / "ckpt")
    edited(folder, text)
    assert refused(folder).what == "a chunk has no offsets and sizes"


def test_more_chunks_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardmerge.sources.dcp_table._MOST_CHUNKS", 30)
    assert refused(FSDP2 / "ckpt").code == "hostile-pickle"


def test_an_object_before_its_file(tmp_path: Path) -> None:
    """A setting of the optimizer, which only a view of its moments asks for."""

    def move(metadata: Metadata) -> None:
        for key, place in metadata.storage_data.items():
            place.offset = -1 if key.offset is None else place.offset

    folder = shutil.copytree(FSDP2 / "ckpt", tmp_path / "ckpt")
    edited(folder, move)
    sm.inspect(folder)
    assert "begins before its file" in refused(folder, view="exp_avg").what


@pytest.mark.parametrize("world", [0, "2", None, True])
def test_items_of_ranks_that_nobody_counted(world: object, tmp_path: Path) -> None:
    """What torch_checkpointing writes beside the files of the ranks."""
    torch.save({"a": ONE}, tmp_path / "model_0.pt")
    (tmp_path / "metadata.pkl").write_bytes(pickle.dumps({"metadata": {"model": {}}, "world_size": world}, 2))
    assert "does not say how many ranks" in refused(tmp_path).what


# --- ranks that describe one tensor differently ---


@pytest.mark.parametrize("other", [torch.ones(2).double(), torch.ones(3)], ids=["type", "shape"])
def test_a_tensor_that_ranks_describe_differently(other: torch.Tensor, tmp_path: Path) -> None:
    rank_file(tmp_path, {"a": ONE}, 0, 2)
    rank_file(tmp_path, {"a": other}, 1, 2)
    error = refused(tmp_path)
    assert (error.code, error.what) == ("mixed-ranks", "two ranks describe one tensor differently")


def test_a_tensor_that_one_rank_has_whole(tmp_path: Path) -> None:
    folder = copied(RANKS, tmp_path)

    def gather(state: dict[str, Any]) -> None:
        name, held = next((name, held) for name, held in state.items() if hasattr(held, "placements"))
        state[name] = torch.zeros(held.shape, dtype=held.dtype)

    rewritten(folder / "model_world_size_2_rank_1.pt", gather)
    assert refused(folder).what == "two ranks describe one tensor differently"


def test_metadata_of_two_ranks_that_differ_in_a_type(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "dcp/no_collectives_w2_bf16/ckpt", tmp_path / "ckpt")
    metadata = pickle.loads((folder / "__1.metadata").read_bytes())
    tensor_of(metadata).properties.dtype = torch.float16
    (folder / "__1.metadata").write_bytes(pickle.dumps(metadata))
    assert refused(folder).code == "mixed-ranks"


# --- files of torch before 1.6 ---


def legacy(
    *, machine: object = None, keys: object = None, view: bytes = b"N", protocol: int = 1001, more: bytes = b""
) -> bytes:
    """As torch.save wrote them: five pickles, then the storages."""
    facts = {"protocol_version": protocol, "little_endian": True, "type_sizes": {}} if machine is None else machine
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6" + view + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\6\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
    parts = [pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, protocol, facts)]
    parts += [b"\x80\x02}X\1\0\0\0w" + tensor + b"s.", pickle.dumps(["0"] if keys is None else keys, 2)]
    return b"".join([*parts, struct.pack("<q", 6), bytes(24), more])


LEGACY: dict[str, list[bytes]] = {
    "not a torch file of the known protocol": [legacy(protocol=1002)],
    "the file does not say its byte order": [
        legacy(machine={}), legacy(machine=[]), legacy(machine={"little_endian": 1}),
    ],
    "written on a big-endian machine": [legacy(machine={"little_endian": False})],
    "the list of storages is not a list": [legacy(keys=("0",))],
    "the list of storages is not that of the storages in use": [
        legacy(keys=[]), legacy(keys=["1"]), legacy(keys=["0", "0"]), legacy(keys=["0", "1"]), legacy(keys=[0]),
    ],
    "storage views of torch before 0.4": [legacy(view=b"X\1\0\0\x001K\0K\6\x87")],
    "bytes follow the last storage": [legacy(more=b"x")],
}  # fmt: skip


@pytest.mark.parametrize("what", LEGACY)
def test_what_a_malformed_legacy_file_is_told(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(legacy())
    assert list(sm.inspect(path).names()) == ["w"]
    assert torch.load(path)["w"].tolist() == [0.0] * 6
    for data in LEGACY[what]:
        path.write_bytes(data)
        assert what in refused(path).what


def test_the_link_to_a_checkpoint_that_leads_to_itself(tmp_path: Path) -> None:
    """What the system does not open is said, and not taken for another kind of file."""
    path = tmp_path / "model.safetensors"
    path.symlink_to(path.name)
    with pytest.raises(CheckpointError) as caught:
        is_safetensors(path)
    assert caught.value.code == "unreadable-file"
    with pytest.raises(CheckpointError) as caught:
        is_torch_file(path)
    assert caught.value.code == "unreadable-file"


# --- which of several is read ---


def test_the_iteration_that_the_tracker_names(tmp_path: Path) -> None:
    held = {step: write_megatron(tmp_path / f"iter_{step:07d}", 1, 1) for step in (3, 7)}
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    catalog = sm.inspect(tmp_path)
    assert_holds(catalog, held[3])
    assert "iter_0000007 is newer" in "".join(catalog.warnings)


def test_a_rank_under_another_name_is_the_model_if_it_is_all_of_it(tmp_path: Path) -> None:
    for case, whole in (("fsdp2_w1_bf16", True), ("fsdp2_w2_bf16", False)):
        path = next((GOLDEN / f"ranks/{case}/actor").glob("*_rank_0.pt"))
        shutil.copy(path, tmp_path / "model.pt")
        if whole:
            assert_is_truth(sm.inspect(tmp_path / "model.pt"), GOLDEN / "ranks" / case)
        else:
            assert refused(tmp_path / "model.pt").code == "one-rank"


@pytest.mark.parametrize("text", ["./model", "../model", "/model/x", "~/model", ".hidden/model", "a/b/c", "a"])
def test_a_path_is_no_hub_id(text: str) -> None:
    assert is_hub_id("org/model")
    assert not is_hub_id(text)
