"""Torch files against torch itself: what it saved and what it loads, bit for bit."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.dtypes import BY_TORCH_NAME
from shardmerge.errors import CheckpointError, UnreadableError, UsageError
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_file import is_torch_file, read_torch_file
from shardmerge.storage.reading import SourceFile
from shardmerge.tensors import Strided

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:.*quantiz"),
    pytest.mark.filterwarnings("ignore:.*[Ss]parse"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

ZIPPED = {"zip": True, "legacy": False}
DTYPES = [name for name in BY_TORCH_NAME if hasattr(torch, name)]


@pytest.fixture(params=ZIPPED)
def save(request, tmp_path):
    """Saves a value in one of the two formats."""

    def _save(value, protocol=2):
        path = tmp_path / "model.pth"
        torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=ZIPPED[request.param])
        return path

    return _save


def read_dense(entry):
    """Reads a tensor's bytes through its pieces, as the engine would, but slowly."""
    out = b""
    for piece in entry.pieces:
        assert piece.start * entry.dtype.itemsize == len(out)
        out += gathered(piece.held, entry.dtype.itemsize)
        assert len(out) == (piece.start + piece.count) * entry.dtype.itemsize
    assert len(out) == entry.nbytes
    return out


def gathered(held, itemsize):
    extent = held.extent if isinstance(held, Strided) else held
    with SourceFile(extent.file) as file:
        data = file.read(extent.offset, extent.nbytes)
    if not isinstance(held, Strided):
        return data
    places = [0]
    for size, stride in zip(held.shape, held.strides, strict=True):
        places = [place + step * stride for place in places for step in range(size)]
    assert max(places) * itemsize + itemsize == extent.nbytes
    return b"".join(data[place * itemsize : (place + 1) * itemsize] for place in places)


def bits(tensor):
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return bytes(dense.untyped_storage().tolist()[: dense.numel() * dense.itemsize])


def assert_same(path, expected, key=""):
    """Checks names, dtypes, shapes and bits of a file against tensors."""
    assert is_torch_file(path)
    file = read_torch_file(path)
    found = state_dict(file.root, key=key)
    assert list(found.tensors) == list(expected)
    for name, tensor in expected.items():
        entry = file.entry(name, found.tensors[name], "here")
        assert (entry.name, entry.origin) == (name, "here")
        assert entry.dtype is BY_TORCH_NAME[str(tensor.dtype).removeprefix("torch.")]
        assert entry.shape == tuple(tensor.shape)
        assert read_dense(entry) == bits(tensor), name
    return found


def filled(shape, dtype):
    size = torch.empty(shape, dtype=dtype)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size.numel() * size.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_element_type(save, protocol):
    torch.manual_seed(0)
    tensors = {name: filled((3, 5), getattr(torch, name)) for name in DTYPES}
    tensors |= {f"{name} scalar": filled((), getattr(torch, name)) for name in DTYPES}
    assert_same(save(tensors, protocol), tensors)


def test_views(save):
    base = torch.arange(60, dtype=torch.int32).reshape(3, 4, 5)
    views = {
        "whole": base, "again": base, "transposed": base.transpose(0, 2), "row": base[1], "column": base[:, 2],
        "element": base[2, 3, 4], "steps": base[::2, ::3, 1:4:2], "expanded": base[:, :1, :1].expand(3, 4, 5),
        "flat": base.view(-1)[7:23], "diagonal": base[0, :, :4].diagonal(), "empty": base[:, 4:],
        "unit": base[1:2, :, 2:3], "other": base.unsqueeze(1), "as_strided": base.as_strided((2, 3), (0, 7), 3),
        "channels": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    assert_same(save(views), views)
    file = read_torch_file(save(views))
    refs = state_dict(file.root).tensors
    assert file.alias_key(refs["whole"]) == file.alias_key(refs["again"])
    others = [file.alias_key(refs[name]) for name in refs if name != "again"]
    assert len(set(others)) == len(others)
    dense = {name for name in refs if not is_strided(file.entry(name, refs[name]))}
    assert dense == {"whole", "again", "row", "element", "flat", "empty", "other"}


def is_strided(entry):
    return any(isinstance(piece.held, Strided) for piece in entry.pieces)


def test_dimensions_of_one_element_do_not_make_a_tensor_strided(save):
    tensor = torch.arange(12).reshape(3, 4)
    odd = {"a": tensor[:, None].as_strided((3, 1, 4), (4, 999, 1)), "b": tensor[:1].as_strided((1, 4), (77, 1))}
    file = read_torch_file(save(odd))
    refs = state_dict(file.root).tensors
    assert not any(is_strided(file.entry(name, ref)) for name, ref in refs.items())
    plain = read_torch_file(save({"a": tensor.reshape(3, 1, 4)}))
    key = plain.alias_key(state_dict(plain.root).tensors["a"])
    assert file.alias_key(refs["a"]) == (refs["a"].storage.key, *key[1:])


def test_empty_tensors_have_no_pieces(save):
    tensors = {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": torch.ones(2)}
    tensors["offset outside of the storage"] = torch.empty(0, 2).narrow(1, 1, 1)
    found = assert_same(save(tensors), tensors)
    assert found.tensors["b"].shape == (3, 0, 2)


def test_a_module_with_tied_and_frozen_weights(save):
    model = torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False), torch.nn.BatchNorm1d(7))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    expected = model.state_dict()
    path = save(expected)
    assert_same(path, expected)
    file = read_torch_file(path)
    refs = state_dict(file.root).tensors
    assert file.alias_key(refs["0.weight"]) == file.alias_key(refs["1.weight"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_parameters_attributes_and_subclasses(save, protocol):
    plain = torch.nn.Parameter(torch.rand(2, 3))
    marked = torch.nn.Parameter(torch.rand(4))
    marked.ds_id = 3
    buffer = torch.rand(5)
    buffer.note = "text"
    tensors = {
        "plain": plain, "marked": marked, "buffer": buffer, "sub": torch.nn.Buffer(torch.rand(2)),
        "frozen": torch.nn.Parameter(torch.arange(3), requires_grad=False),
        "real": torch.rand(3, dtype=torch.complex64).conj().conj(),
    }  # fmt: skip
    assert_same(save(tensors, protocol), tensors)


def test_training_files_around_the_state_dict(save):
    tensors = {"a.weight": torch.rand(2), "b": torch.rand(3)}
    optimizer = {"state": {0: {"exp_avg": torch.rand(9)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    for key in ("state_dict", "module", "model_state_dict", "model", "params", "weights", "net"):
        value = {"optimizer": optimizer, "epoch": 3, key: tensors, "ema_state_dict": {"a": torch.rand(1)}}
        assert assert_same(save(value), tensors).root_key == key
    value = {"model": {"encoder": tensors, "epoch": 2, "name": "x"}, "net": {"a": torch.rand(1)}}
    nested = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    found = assert_same(save(value), nested)
    assert (found.root_key, found.skipped) == ("model", ("epoch", "name"))


def test_tensors_at_the_top_level_win(save):
    value = {
        "bias": torch.rand(2),
        "block": {"weight": torch.rand(3)},
        "optimizer_state": {"m": torch.rand(4)},
        "step": 1,
    }
    found = assert_same(save(value), {"bias": value["bias"], "block.weight": value["block"]["weight"]})
    assert (found.root_key, found.skipped) == ("", ("step",))


def test_a_named_root(save):
    tensors = {"w": torch.rand(2)}
    path = save({"model": {"ema.v2": {"x": tensors}, "w": torch.ones(1)}, "state_dict": {"w": torch.zeros(1)}})
    assert assert_same(path, tensors, key="model.ema.v2.x").root_key == "model.ema.v2.x"
    with pytest.raises(UsageError, match="unknown-root") as caught:
        state_dict(read_torch_file(path).root, key="model.emma")
    assert "ema.v2, w" in caught.value.found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"epoch": 3, "loss": [0.1]}, "epoch, loss"),
        ({}, "an empty dict"),
        ([1], "list"),
        ({"optimizer": {"state_dict": 1}}, "optimizer"),
    ],
)
def test_files_without_tensors_say_what_they_hold(save, value, found):
    with pytest.raises(CheckpointError, match="no-tensors") as caught:
        state_dict(read_torch_file(save(value)).root)
    assert caught.value.found == found


def unsupported():
    yield "sparse", torch.eye(3).to_sparse()
    yield "meta", torch.empty(3, device="meta")
    yield "conjugate", torch.rand(2, dtype=torch.complex64).conj()
    yield "negative", torch.rand(2, dtype=torch.complex64).conj().imag
    yield "complex128", torch.rand(2, dtype=torch.complex128)
    yield "complex32", torch.zeros(2, dtype=torch.complex32)
    yield "nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize("kind", ["sparse", "meta", "conjugate", "negative", "complex128", "complex32", "nested"])
def test_unsupported_tensors_are_named_when_selected(save, kind):
    odd = dict(unsupported())[kind]
    path = save({"good": {"w": torch.ones(2)}, "bad": {"w": odd}})
    assert_same(path, {"w": torch.ones(2)}, key="good")
    with pytest.raises(CheckpointError, match="unsupported-tensor") as caught:
        state_dict(read_torch_file(path).root, key="bad")
    assert caught.value.where == "w"
    assert caught.value.found.startswith("torch._")


shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.builds(
    lambda shape, name, seed: (torch.manual_seed(seed), filled(shape, getattr(torch, name)))[1],
    shapes, st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip


@st.composite
def viewed(draw):
    tensor = draw(tensors)
    if tensor.dim() and draw(st.booleans()):
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    for dim in range(tensor.dim()):
        if tensor.shape[dim] and draw(st.booleans()):
            start = draw(st.integers(0, tensor.shape[dim] - 1))
            tensor = tensor.narrow(dim, start, draw(st.integers(0, tensor.shape[dim] - start)))
    return tensor


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    found=st.dictionaries(st.text(st.characters(categories=("L", "N")), min_size=1), viewed(), min_size=1, max_size=5),
    protocol=st.integers(2, 5), zipped=st.booleans(),
)  # fmt: skip
def test_any_state_dict(found, protocol, zipped, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.pth"
    torch.save(found, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expected = {name: tensor for name, tensor in found.items() if not name.startswith("optimizer")}
    assert_same(path, expected)


def test_large_legacy_pickles_are_read_in_larger_windows(tmp_path):
    tensors = {f"layers.{index}.weight": torch.full((2,), float(index)) for index in range(8000)}
    torch.save(tensors, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    file = read_torch_file(tmp_path / "model.pth")
    refs = state_dict(file.root).tensors
    assert list(refs) == list(tensors)
    assert read_dense(file.entry("x", refs["layers.7999.weight"])) == bits(tensors["layers.7999.weight"])
    assert file.kind == "torch legacy"


@pytest.mark.parametrize("wide", [False, True])
def test_files_stored_again_by_another_zip_tool(wide, tmp_path):
    tensors = {"a": torch.rand(5), "b": torch.arange(3)}
    torch.save(tensors, tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as source,
        zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_STORED) as target,
    ):
        target.writestr("model/", b"")
        for name in source.namelist():
            with target.open(name, "w", force_zip64=wide) as member:
                member.write(source.read(name))
    assert_same(tmp_path / "again.pth", tensors)


def test_stamps_pin_the_header_and_not_the_weights(save):
    weight = torch.zeros(4)  # one storage throughout: a legacy file names storages by their address
    first = read_torch_file(save({"w": weight}))
    weight.fill_(1)
    second = read_torch_file(save({"w": weight}))
    third = read_torch_file(save({"v": weight}))
    assert first.stamp.header == second.stamp.header
    assert first.stamp.header != third.stamp.header
    assert Path(first.path).is_absolute()


def legacy(tmp_path, change):
    path = tmp_path / "model.pth"
    torch.save({"w": torch.arange(4.0), "v": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("truncated-file", lambda data: data[:-1]),
        ("damaged-legacy", lambda data: data + b"\0"),
        ("big-endian", lambda data: data.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")),
        ("damaged-legacy", lambda data: data.replace(b"M\xe9\x03.", b"M\xea\x03.", 1)),
        ("damaged-legacy", lambda data: data.replace(b"\x04\0\0\0\0\0\0\0", b"\x05\0\0\0\0\0\0\0")),
        ("damaged-legacy", lambda data: data.replace(b"\x04\0\0\0\0\0\0\0", b"\xff\xff\xff\xff\xff\xff\xff\xff")),
        ("hostile-pickle", lambda data: data.replace(b"FloatStorage", b"BloatStorage")),
    ],
    ids=["truncated", "trailing", "big-endian", "protocol", "count", "negative count", "class"],
)
def test_damaged_legacy_files(code, change, tmp_path):
    path = legacy(tmp_path, change)
    assert is_torch_file(path)
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert caught.value.code == code


def test_every_truncation_of_a_legacy_file_is_refused(tmp_path):
    whole = legacy(tmp_path, bytes).read_bytes()
    for end in range(len(whole)):
        with pytest.raises(CheckpointError):
            read_torch_file(legacy(tmp_path, lambda data, end=end: data[:end]))


def test_tar_files_of_torch_before_0_1_10_are_refused_by_name(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar".ljust(255, b"\0") + bytes(1024))
    assert is_torch_file(path)
    with pytest.raises(CheckpointError, match="torch-tar"):
        read_torch_file(path)


@pytest.mark.parametrize("data", [b"", b"P", b"PK\3\4", b"{}", b"\x80\x02.", b"\0" * 5000, b"PK\3\4" + b"\xff" * 600])
def test_other_files_are_no_torch_files(data, tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    assert not is_torch_file(path)
    with pytest.raises(CheckpointError):
        read_torch_file(path)


def test_paths_that_are_no_files(tmp_path):
    assert not is_torch_file(tmp_path)
    assert not is_torch_file(Path("/dev/null"))
    for read in (is_torch_file, read_torch_file):  # of which kind it was, nobody can tell
        with pytest.raises(UnreadableError, match="missing-file"):
            read(tmp_path / "missing")


def test_torch_script_archives_are_refused(tmp_path):
    writer = torch._C.PyTorchFileWriter(str(tmp_path / "script.pt"))
    for name in ("data.pkl", "constants.pkl"):
        writer.write_record(name, b"\x80\x02N.", 4)
    writer.write_end_of_file()
    assert is_torch_file(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="torchscript"):
        read_torch_file(tmp_path / "script.pt")


class _Stub:
    """Stands in for classes that are not installed here."""

    def __new__(cls, *_args, **_keywords):
        return object.__new__(cls)

    def __init__(self, *_args, **_keywords):
        pass

    def __setstate__(self, state):
        pass


class _Stubbing:
    """A pickle module for ``torch.load`` that needs no class to exist."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module.split(".")[0] in ("torch", "collections", "_codecs", "numpy"):
                return super().find_class(module, name)
            return set if name == "set" else _Stub


GOLDEN = Path(__file__).parent / "golden"
# Those of `ranks` hold parts of tensors, which test_rank_pickles compares.
GOLDEN_FILES = sorted(
    path
    for end in ("pt", "pth", "bin")
    for path in GOLDEN.rglob(f"*.{end}")
    if path.is_file() and "ranks" not in path.relative_to(GOLDEN).parts
)


def tensor_pairs(ours, theirs, path=""):
    if isinstance(theirs, torch.Tensor):
        yield path, ours, theirs
    elif isinstance(theirs, collections.abc.Mapping):
        assert list(ours) == list(theirs), path
        for name in theirs:
            yield from tensor_pairs(ours[name], theirs[name], f"{path}.{name}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), path
        for index, item in enumerate(theirs):
            yield from tensor_pairs(ours[index], item, f"{path}.{index}")


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: str(path.relative_to(GOLDEN)))
def test_files_of_real_tools_are_what_torch_loads(path):
    file = read_torch_file(path)
    theirs = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_Stubbing)
    for name, ref, tensor in tensor_pairs(file.root, theirs):
        entry = file.entry(name, ref)
        assert (entry.shape, entry.dtype.torch) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        assert read_dense(entry) == bits(tensor), name
