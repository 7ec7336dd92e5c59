"""Results as distributed checkpoints of torch: torch resumes from them, at any number of ranks, with the bits that were
written.
"""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import example, given, settings
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import Metadata

import shardmerge as sm
from shardmerge import api
from shardmerge.dtypes import DTYPES
from shardmerge.errors import TargetError
from shardmerge.plan.dcp_layout import item_span, lay_out_items
from shardmerge.sources.pickle_vm import interpret
from tests import load_dcp
from tests.conftest import GOLDEN, shardmerge
from tests.counting import calls
from tests.killing import KILL, Machine, Trap
from tests.receipts import receipt_of, write_receipt
from tests.scene import claim
from tests.test_torch_layout import KNOWN, TENSORS, as_tensors, assert_tiles, bits, contents, of, write

CASE = GOLDEN / "zero" / "bag_z2_w3_bf16" / "ckpt"
OPTIONS = sm.Options(format="dcp", sync=False)


@contextmanager
def one_process() -> Iterator[None]:
    """torch warns where there is no process group: the state dict is whole then, as it is meant."""
    with pytest.warns(UserWarning, match="single process"):
        yield


def loaded(folder: Path, state: dict[str, object]) -> dict[str, object]:
    """Lets torch load a checkpoint into a state dict, whose tensors are cleared before."""
    for tensor in torch.utils._pytree.tree_leaves(state):
        tensor.untyped_storage().fill_(0)
    with one_process():
        dcp.load(state, checkpoint_id=folder)
    return state


def as_saved(folder: Path, into: Path) -> dict[str, object]:
    """Returns the state dict that torch itself makes of a checkpoint that it knows nothing of."""
    dcp_to_torch_save(folder, into)
    found: dict[str, object] = torch.load(into, weights_only=True)
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name].clone()) == bits(tensor.clone()), name


def weights() -> dict[str, torch.Tensor]:
    """Every type and odd shape, dots and digits in names, and two names for one value."""
    tensors = [(f"{dtype.name}.{n}", dtype, shape) for dtype in KNOWN for n, shape in enumerate([(3, 5), (), (4, 0)])]
    tensors.append(("layers.10.w", DTYPES["F32"], (1, 2, 3, 1, 2)))
    made = dict(as_tensors(tensors, contents(tensors)))
    return made | {"tied": made["layers.10.w"].clone(), "0": torch.arange(7)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


# ---- the files


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path for a property test, which a fixture made per test would not allow."""
    return tmp_path_factory.mktemp("items") / "__0_0.distcp"


@settings(max_examples=40, deadline=None)
@given(TENSORS.filter(bool))
@example({f"{dtype} {shape}": (dtype, shape) for dtype in KNOWN for shape in [(), (0,), (3, 5), (2, 0, 3), (1, 1)]})
def test_every_item_is_what_torch_saves(place: Path, tensors: dict[str, tuple[object, tuple[int, ...]]]) -> None:
    """Byte for byte, up to the last record, `.data/serialization_id`, which is left out as in torch files."""
    listed = of(tensors)
    data = contents(listed)
    layout = lay_out_items(listed)
    assert_tiles(layout, data)
    assert all(offset % 64 == 0 for offset in layout.offsets)
    whole = write(place, layout, data).read_bytes()
    for (name, dtype, shape), at in zip(listed, layout.offsets, strict=True):
        start, nbytes = item_span(dtype, shape, at)
        item = whole[start : start + nbytes]
        (tensor,) = as_tensors([(name, dtype, shape)], [whole[at : at + prod(shape) * dtype.itemsize]]).values()
        found = torch.load(io.BytesIO(item), weights_only=True)
        assert_same({"": found}, {"": tensor})
        stream = io.BytesIO()
        torch.save(tensor, stream)
        theirs, ours = stream.getvalue(), item[: item.index(b"PK\x01\x02")]
        if b"/.storage_alignment" in theirs:
            assert theirs.startswith(ours)
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None


def test_a_shape_that_torch_cannot_hold() -> None:
    with pytest.raises(TargetError) as caught:
        lay_out_items([("large", DTYPES["F32"], (1 << 40, 1 << 40, 0))])
    assert (caught.value.code, caught.value.where) == ("shape-too-large", "large")


def test_the_work_of_a_layout_grows_with_its_tensors() -> None:
    tensors = [(f"layers.{n}.weight", DTYPES["BF16"], (4096, 1024)) for n in range(3_000)]
    small, large = (calls(lambda some=tensors[:number]: lay_out_items(some)) for number in (1_000, 3_000))
    assert large < 3.3 * small
    blobs = lay_out_items(tensors).blobs
    assert len({id(blob) for _, blob in blobs}) == 2  # before the data and after it, shared by all of a kind


# ---- what torch makes of a result


@pytest.mark.parametrize("size", [None, 200])
def test_torch_loads_it(size: int | None, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sm.convert(source, out, options=sm.Options(format="dcp", shard_size=size, sync=False))
    files = sorted(path.name for path in out.iterdir())
    parts = sum(name.endswith(".distcp") for name in files)
    assert files == sorted([".metadata", "shardmerge.json", *(f"__0_{n}.distcp" for n in range(parts))])
    assert (parts > 1) == bool(size)
    assert_same(loaded(out, {"model": weights()})["model"], load_file(source))
    saved = as_saved(out, tmp_path / "saved.pt")
    assert saved.keys() == {"model"}
    assert_same(saved["model"], load_file(source))
    sm.verify(out)


@pytest.mark.parametrize("world", [2])
def test_fsdp2_resumes_at_another_number_of_ranks(world: int, tmp_path: Path) -> None:
    torch.manual_seed(world)
    expected = {name: torch.randn(t.shape).to(t.dtype) for name, t in load_dcp.model().state_dict().items()}
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    sm.convert(tmp_path / "model.safetensors", tmp_path / "out", options=sm.Options(format="dcp", shard_size=100))
    script = [sys.executable, load_dcp.__file__, tmp_path / "out", str(world), tmp_path / "found.pt"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_same(torch.load(tmp_path / "found.pt", weights_only=True), expected)


def test_a_zero_checkpoint_becomes_one(tmp_path: Path) -> None:
    """The whole way of elastic resume, for the weights: ranks of ZeRO in, any ranks out."""
    sm.convert(CASE, tmp_path / "hf", options=sm.Options(sync=False))
    sm.convert(CASE, tmp_path / "out", options=OPTIONS)
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same(as_saved(tmp_path / "out", tmp_path / "saved.pt")["model"], expected)


ROOTS = {
    "nothing said": ("", ("model",)),
    "two keys": (", root: app.model", ("app", "model")),
    "none": (', root: ""', ()),
}


@pytest.mark.parametrize("name", ROOTS)
def test_the_keys_around_the_model(name: str, source: Path, tmp_path: Path) -> None:
    said, keys = ROOTS[name]
    text = f"shardmerge: 1\nsources: {{a: {source}}}\noutput: {{path: out, format: dcp{said}}}\n"
    (tmp_path / "mapping.yaml").write_text(text + 'tensors: {"{rest...}": "a:{rest...}"}\n')
    sm.run(tmp_path / "mapping.yaml")
    state: dict[str, object] = weights()
    for key in reversed(keys):
        state = {key: state}
    for key in ((), keys):
        found = loaded(tmp_path / "out", state) if key else as_saved(tmp_path / "out", tmp_path / "saved.pt")
        for one in keys:
            assert found.keys() == {one}
            found = found[one]
        assert_same(found, load_file(source))


def test_the_command_line_says_the_keys(source: Path, tmp_path: Path) -> None:
    for keys in ("", "app.model"):
        shardmerge("convert", source, tmp_path / f"out{keys}", "--format", "dcp", "--dcp-root", keys)
    assert as_saved(tmp_path / "out", tmp_path / "a.pt").keys() == weights().keys()
    assert as_saved(tmp_path / "outapp.model", tmp_path / "b.pt")["app"].keys() == {"model"}


def test_a_tree_of_folders_has_a_checkpoint_in_each(tmp_path: Path) -> None:
    """The targets that write several directories."""
    for name in ("base_llm", "base_clip"):
        shutil.copytree(GOLDEN / "xtuner" / name, tmp_path / name)
    shutil.copy2(GOLDEN / "xtuner" / "single_frozen" / "iter_2.pth", tmp_path)
    text = "shardmerge: 1\nsources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}\n"
    (tmp_path / "mapping.yaml").write_text(
        f"{text}use: xtuner/llava-to-xtuner\noutput: {{path: out, shard_size: 12KB}}\n"
    )
    sm.run(tmp_path / "mapping.yaml", tmp_path / "hf")
    sm.run(tmp_path / "mapping.yaml", options=OPTIONS)
    tables = sorted((tmp_path / "out").rglob(".metadata"))
    assert len(tables) > 1
    for table in tables:
        files = (tmp_path / "hf" / table.parent.relative_to(tmp_path / "out")).glob("*.safetensors")
        expected = {name: tensor for path in files for name, tensor in load_file(path).items()}
        assert_same(as_saved(table.parent, tmp_path / "saved.pt")["model"], expected)
    sm.verify(tmp_path / "out")


# ---- the table


def test_the_table_is_inert_and_names_what_torch_names(source: Path, tmp_path: Path) -> None:
    sm.convert(source, tmp_path / "out", options=OPTIONS)
    with one_process():
        dcp.save({"model": weights()}, checkpoint_id=tmp_path / "theirs")
    raw = (tmp_path / "out" / ".metadata").read_bytes()
    interpret(raw, where=".metadata")
    ours, theirs = (pickle.loads((tmp_path / name / ".metadata").read_bytes()) for name in ("out", "theirs"))
    assert isinstance(ours, Metadata)
    assert ours.planner_data == theirs.planner_data
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.version == theirs.version
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    items = sorted((one.offset, one.length) for one in ours.storage_data.values())
    assert all(offset % 64 == 0 for offset, _ in items)
    assert all(at + length <= later for (at, length), (later, _) in pairwise(items))


# ---- the laws that hold for every format


def digests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_workers_memory_and_io_never_change_a_byte(source: Path, tmp_path: Path) -> None:
    ways = [{}, {"workers": 1}, {"workers": 4}, {"io": "mmap"}, {"memory": 72 << 20, "workers": 1}]
    for number, way in enumerate(ways):
        options = sm.Options(format="dcp", shard_size=200, sync=False, **way)
        sm.convert(source, tmp_path / str(number), options=options)
    found = [digests(tmp_path / str(number)) for number in range(len(ways))]
    assert all(one == found[0] for one in found)


def test_a_plan_that_is_read_is_the_plan(source: Path, tmp_path: Path) -> None:
    prepared = api.prepare_conversion(source, options=OPTIONS)
    api.write_plan(prepared, tmp_path / "plan.json", tmp_path / "out")
    read = api.prepare(tmp_path / "plan.json", OPTIONS)
    assert (read.plan, read.plan.id) == (prepared.plan, prepared.plan.id)
    api.carry_out(read, tmp_path / "out", OPTIONS)
    assert_same(loaded(tmp_path / "out", {"model": weights()})["model"], load_file(source))


def test_a_plan_has_decided_the_keys(source: Path, tmp_path: Path) -> None:
    api.write_plan(api.prepare_conversion(source, options=OPTIONS), tmp_path / "plan.json", tmp_path / "out")
    done = shardmerge("run", tmp_path / "plan.json", "--dcp-root", "other", code=2)
    assert "[no-effect] " in done.stderr.replace("\n", " ")
    assert "--dcp-root is decided in the plan" in done.stderr


def test_a_run_that_is_stopped_is_gone_on_with(runs: Machine, tmp_path: Path) -> None:
    expected = {f"w{n}": torch.randn(256, 512) for n in range(4)}
    save_file(expected, tmp_path / "model.safetensors", {"format": "pt"})
    command = ["convert", tmp_path / "model.safetensors", tmp_path / "out", "--format", "dcp", "--shard-size", "600KB"]
    command += ["--workers", "1", "--json"]
    assert runs.run(*command).code == 0
    undisturbed = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert runs.run(*command, trap=Trap(KILL, at=claim(runs.calls))).code == -9
    (root,) = tmp_path.glob("out.partial-*")
    assert not (tmp_path / "out").exists()
    (root / "parts" / "00001.json").unlink()
    ran = runs.run(*command)
    assert ran.json()["parts_made"] == 1
    assert digests(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_flipped_bit_is_found(file: str, tmp_path: Path) -> None:
    sm.convert(CASE, tmp_path / "out", options=OPTIONS)
    path = tmp_path / "out" / file
    sound = path.read_bytes()
    for at in range(0, len(sound), 331):
        damaged = bytearray(sound)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(sm.VerificationError):
            sm.verify(tmp_path / "out")
    path.write_bytes(sound)
    sm.verify(tmp_path / "out")


def test_a_second_reader_sees_what_a_receipt_hides(tmp_path: Path) -> None:
    """Another type in the receipt is no damage of the files; an item says its own."""
    sm.convert(CASE, tmp_path / "out", options=OPTIONS)
    value = receipt_of(tmp_path / "out")
    name = next(name for name, row in value["tensors"].items() if row["dtype"] == "F32" and row["nbytes"] > 4)
    value["tensors"][name]["dtype"] = "I32"
    write_receipt(tmp_path / "out", value)
    with pytest.raises(sm.VerificationError, match=r"reference|says another type") as caught:
        sm.verify(tmp_path / "out")
    assert caught.value.code in {"reference-differs", "reference-refuses"}


def test_transformers_is_not_asked_of_what_it_cannot_load(tmp_path: Path) -> None:
    source = GOLDEN / "xtuner" / "base_llm"
    assert (source / "config.json").is_file()
    done = shardmerge("convert", source, tmp_path / "out", "--format", "dcp", "--check", "transformers", code=2)
    assert "transformers loads no checkpoint" in done.stderr
    assert "[no-effect]" in done.stderr
    assert "leave --check out" in done.stderr
