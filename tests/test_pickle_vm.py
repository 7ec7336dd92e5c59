"""The opcode interpreter against Python's own pickle, which wrote every input here."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import enum
import math
import operator
import os
import pathlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardmerge.errors
from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_values import Global, Opaque, StorageRef, TensorRef
from shardmerge.sources.pickle_vm import interpret, interpret_at

PROTOCOLS = (2, 3, 4, 5)


def read(value, protocol=2):
    return interpret(pickle.dumps(value, protocol), where="test.pt")


class Stage(enum.IntEnum):
    GRADIENTS = 2


class Bag:
    def __init__(self):
        self.content = {"a": [1, 2]}


class Words(list):
    pass


class Config(dict):
    pass


class Calls:
    """Pickles as whatever call it is given."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


keys = st.one_of(
    st.text(max_size=12), st.integers(-(2**60), 2**60), st.booleans(), st.none(), st.binary(max_size=6),
    st.tuples(st.integers(0, 9), st.text(max_size=3)),
)  # fmt: skip
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**120), 2**120), st.floats(allow_nan=False), st.text(),
    st.binary(max_size=400),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.dictionaries(keys, inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.sets(keys, max_size=4),
    ),
    max_leaves=25,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(value=values, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_come_back_equal_and_of_the_same_type(value, protocol):
    found = read(value, protocol)
    assert found == value
    assert repr(found) == repr(value) or "{" in repr(value)  # sets have no order; else True is True and not 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_large_values_cross_frames_and_long_opcodes(protocol):
    value = {"text": "x" * 300_000, "bytes": b"y" * 300_000, "numbers": list(range(70_000)), "pad": "z" * 70_000}
    assert read(value, protocol) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_infinities_and_nan(protocol):
    found = read([math.inf, -math.inf, math.nan, -0.0], protocol)
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])
    assert math.copysign(1, found[3]) == -1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_values_keep_their_identity(protocol):
    shared = [1]
    loop = {"a": shared, "b": shared}
    loop["self"] = loop
    found = read(loop, protocol)
    assert found["a"] is found["b"]
    assert found["self"] is found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (collections.defaultdict(list, {"x": [1]}), {"x": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        ({1, 2, "three"}, {1, 2, "three"}),
        (frozenset({b"x", None}), {b"x", None}),
        (b"", b""),
        (bytes(range(256)), bytes(range(256))),
    ],
)
def test_containers_become_plain_ones(value, expected, protocol):
    found = read(value, protocol)
    assert found == expected
    assert isinstance(expected, set) or (type(found), list(found)) == (type(expected), list(expected))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_attributes_of_a_dict_are_dropped(protocol):
    value = collections.OrderedDict(a=1)
    value._metadata = {"version": 1}
    assert read(value, protocol) == {"a": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        Stage.GRADIENTS, Bag(), argparse.Namespace(lr=1.0), datetime.date(2024, 1, 2), pathlib.PurePosixPath("a/b"),
        np.float32(1.5), np.arange(4), np.dtype("int64"), 1 + 2j, Words("ab"), Config(a=1),
        np.random.default_rng(0), operator.attrgetter("x"), int, print, [].append,
    ],
)  # fmt: skip
def test_objects_are_carried_and_never_built(value, protocol):
    found = read({"object": value, "after": 1}, protocol)
    assert found["after"] == 1
    assert isinstance(found["object"], Opaque | Global)
    assert type(found["object"]) is not type(value)


def test_the_parts_of_an_object_are_kept():
    stage = read(Stage.GRADIENTS)
    assert (stage.type, stage.args) == (Global(__name__, "Stage"), (2,))
    bag = read(Bag())
    assert (bag.type.name, bag.args, bag.state) == ("Bag", (), {"content": {"a": [1, 2]}})
    assert read(Words("ab")).items == ["a", "b"]
    assert read(Config(a=1)).items == [("a", 1)]
    assert read(argparse.Namespace(lr=1.0)).state == {"lr": 1.0}


def test_a_call_is_recorded_and_not_made(tmp_path):
    victim = tmp_path / "victim"
    found = read(Calls(Path.touch, victim))
    assert isinstance(found, Opaque)
    assert not victim.exists()


def test_getattr_is_not_made_and_its_result_can_be_called_in_vain():
    found = read(Calls(getattr, "text", "upper"))
    assert (found.type.path, found.args) == ("__builtin__.getattr", ("text", "upper"))
    data = b"\x80\x02c__builtin__\ngetattr\n(c__main__\nA\nX\x04\x00\x00\x00maketR)R."
    called = interpret(data, where="test.pt")
    assert isinstance(called, Opaque)
    assert isinstance(called.args[0], Opaque)


@pytest.mark.parametrize("codec", ["punycode", "rot13", "zlib_codec", "utf_16"])
def test_codecs_that_are_looked_up_by_name_stay_unread(codec):
    data = f"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX{chr(len(codec))}\x00\x00\x00{codec}\x86R."
    found = interpret(data.encode("latin-1"), where="test.pt")
    assert isinstance(found, Opaque)
    assert found.args == ("a", codec)


def test_names_with_dots_stay_text():
    data = b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93."
    assert interpret(data, where="test.pt") == Global("torch", "serialization.os.system")


def test_python_2_strings():
    assert interpret(b"\x80\x02]q\x00(U\x03abcU\x01\xffe.", where="test.pt") == ["abc", b"\xff"]


def tensor(arguments: bytes, function: bytes = b"_rebuild_tensor_v2") -> bytes:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    return b"\x80\x02ctorch._utils\n" + function + b"\n(" + storage + arguments + b"tR."


HOOKS = b"\x89ccollections\nOrderedDict\n)R"


def test_a_tensor_is_a_view_of_a_storage():
    found = interpret(tensor(b"K\x01K\x02K\x01\x86K\x02K\x01\x86" + HOOKS), where="test.pt")
    assert isinstance(found, TensorRef)
    assert isinstance(found.storage, StorageRef)
    assert (found.storage.key, found.storage.numel, found.dtype.name) == ("0", 6, "F32")
    assert (found.offset, found.shape, found.strides) == (1, (2, 1), (2, 1))


def test_tensors_of_torch_0_x():
    found = interpret(tensor(b"K\x00K\x06\x85K\x01\x85", b"_rebuild_tensor"), where="test.pt")
    assert isinstance(found, TensorRef)
    assert found.shape == (6,)


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        (b"}", TensorRef), (b"N", TensorRef), (b"}X\x03\x00\x00\x00neg\x89s", TensorRef),
        (b"}X\x04\x00\x00\x00conj\x88s", Opaque), (b"}X\x03\x00\x00\x00odd\x89s", Opaque),
    ],
)  # fmt: skip
def test_metadata_that_changes_values_makes_a_tensor_opaque(metadata, kind):
    assert isinstance(interpret(tensor(b"K\x00K\x06\x85K\x01\x85" + HOOKS + metadata), where="test.pt"), kind)


def test_errors_name_the_byte_in_the_file():
    with pytest.raises(CheckpointError) as caught:
        interpret(b"\x80\x02]i", where="model.pth", base=1000)
    assert (caught.value.code, caught.value.where) == ("hostile-pickle", "model.pth, byte 1003")
    assert "INST" in caught.value.found


def test_pickles_in_a_row():
    data = pickle.dumps([1], 2) + pickle.dumps("two", 4) + b"rest"
    first = interpret_at(data, 0, where="test.pt")
    second = interpret_at(data, first.end, where="test.pt")
    assert (first.value, second.value, data[second.end :]) == ([1], "two", b"rest")
    assert interpret(data, where="test.pt", allow_trailing=True) == [1]
    with pytest.raises(CheckpointError, match="hostile-pickle"):
        interpret(memoryview(data), where="test.pt")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_an_error_of_ours(protocol):
    data = pickle.dumps({"a": [1, 2.5, "text", b"bytes", (1, 2, 3, 4), {3}], "b": 2**70, "c": Bag()}, protocol)
    for end in range(len(data)):
        with pytest.raises(CheckpointError):
            interpret(data[:end], where="test.pt")


@settings(max_examples=300, derandomize=True, deadline=None)
@given(data=st.binary(max_size=200), at=st.integers(0, 400), protocol=st.sampled_from(PROTOCOLS))
def test_any_bytes_give_a_value_or_an_error_of_ours(data, at, protocol):
    sound = pickle.dumps({"a": [1, 2.5, "text", b"bytes", (1, 2, 3, 4)], "n": Bag(), "o": Stage.GRADIENTS}, protocol)
    at %= len(sound)
    for hostile in (b"\x80\x02" + data, sound[:at] + data + sound[at + len(data) :]):
        with contextlib.suppress(CheckpointError):
            interpret(hostile, where="test.pt")


# The package itself is stood in for, so that only what reading needs is imported.
_WATCHED = """
import sys, types
package = types.ModuleType("shardmerge")
package.__path__ = [sys.argv.pop(1)]
sys.modules["shardmerge"] = package
from pathlib import Path
from shardmerge.errors import ShardmergeError
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_file import is_torch_file, read_torch_file

events = []
sys.addaudithook(lambda event, args: events.append((event, repr(args)[:200], args[0] if args else "")))
for name in sys.argv[1:]:
    assert is_torch_file(Path(name))
    try:
        state_dict(read_torch_file(Path(name)).root)
    except ShardmergeError as error:
        assert error.code == "no-tensors", error
opened = [event for event in events if event[0] == "open" and event[2] in sys.argv[1:]]
found = [event for event in events if event not in opened and event[0] != "builtins.id"]
assert len(opened) == 2 * len(sys.argv[1:]), opened
assert not found, found
assert not {"pickle", "torch", "numpy"} & set(sys.modules), sorted(sys.modules)
print("read", len(sys.argv) - 1)
"""


def test_reading_imports_calls_and_opens_nothing(tmp_path):
    torch = pytest.importorskip("torch")
    values = [
        {"weight": torch.ones(3), "evil": Calls(os.system, "touch pwned"), "np": np.arange(3), "b": b"\xff"},
        {"weight": torch.ones(3), "method": Calls(getattr, "x", "upper"), "codec": Calls(eval, "1")},
        {"weight": Calls(exec, "raise SystemExit(3)")},
    ]
    names = []
    for index, value in enumerate(values):
        for zipped in (True, False):
            names.append(str(tmp_path / f"{index}{zipped}.pt"))
            torch.save(value, names[-1], _use_new_zipfile_serialization=zipped)
    package = str(Path(shardmerge.errors.__file__).parent)
    command = [sys.executable, "-c", _WATCHED, package, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "read 6\n"), done.stderr
    assert not (tmp_path / "pwned").exists()
