"""Pickles made to run code, to exhaust the reader, or to mean different things to different readers."""

from __future__ import annotations

import pickletools
import struct

import pytest

from shardmerge.errors import CheckpointError
from shardmerge.sources.pickle_storages import persistent
from shardmerge.sources.pickle_values import Global, Opaque, TensorRef
from shardmerge.sources.pickle_vm import interpret
from tests.counting import refusal

STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6tQ"
HOOKS = b"\x89ccollections\nOrderedDict\n)R"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def two(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def four(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def tensor(rest: bytes) -> bytes:
    return two(REBUILD + STORAGE + rest + b"tR")


def doubling(levels: int) -> bytes:
    return b"K\1" + b"q\0h\0\x86" * levels


def colliding_integers(number: int) -> bytes:
    """``hash(int)`` is taken modulo 2^61 - 1."""
    keys = ((at * (2**61 - 1)).to_bytes(16, "little") for at in range(1, number))
    return two(b"}(" + b"".join(b"\x8a\x10" + key + b"N" for key in keys) + b"u")


def colliding_tuples(number: int) -> bytes:
    return two(b"}(" + b"".join(struct.pack("<BiBiBB", 0x4A, at, 0x4A, at, 0x86, 0x4E) for at in range(number)) + b"u")


HOSTILE = {
    # running code
    "INST": two(b"(X\2\0\0\0idios\nsystem\n"),
    "OBJ": two(b"(cos\nsystem\nX\2\0\0\0ido"),
    "OBJ hidden by POP": two(b"(cos\nsystem\nX\2\0\0\0ido0N"),
    "EXT1": two(b"\x82\1"),
    "EXT2": two(b"\x83\1\0"),
    "EXT4": two(b"\x84\1\0\0\0"),
    "PERSID": two(b"Pstorage\n"),
    "persistent id of another kind": two(b"X\1\0\0\0aQ"),
    "persistent id that is a number": two(b"K\1Q"),
    "persistent id of a module": two(b"(X\6\0\0\0moduleNNNtQ"),
    "persistent id of five others": two(b"(X\6\0\0\0modulectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\6tQ"),
    "persistent id in legacy form": two(STORAGE[:-2] + b"NtQ"),
    "BUILD on a global": two(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__)sb"),
    "BUILD on a list": two(b"]}b"),
    "BUILD on a tensor": two(REBUILD + STORAGE + b"K\0K\6\x85K\1\x85" + HOOKS + b"tR}b"),
    "call of a text": two(b"X\2\0\0\0id)R"),
    "call of a tensor": two(REBUILD + STORAGE + b"K\0K\6\x85K\1\x85" + HOOKS + b"tR)R"),
    "SETITEM on a global": two(b"cos\nenviron\nK\1K\2s"),
    "SETITEM on a list": two(b"]K\0K\1s"),
    "SETITEMS on a tuple": two(b")(K\0K\1u"),
    "SETITEMS on a tensor": two(REBUILD + STORAGE + b"K\0K\6\x85K\1\x85" + HOOKS + b"tR(K\0K\1u"),
    "APPEND to a dict": two(b"}K\1a"),
    "APPENDS to a text": two(b"X\1\0\0\0a(K\1e"),
    "ADDITEMS to a dict": four(b"}(K\1\x90"),
    "DUP": two(b"K\x012"),
    "POP": two(b"K\1K\x020"),
    "POP_MARK": two(b"K\1(K\x021"),
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "READONLY_BUFFER": b"\x80\x05N\x98.",
    "unknown opcode": two(b"\xff"),
    "unknown opcode 0": two(b"\0"),
    "text INT": two(b"I1\n"),
    "text LONG": two(b"L1L\n"),
    "text FLOAT": two(b"F1\n"),
    "text STRING": two(b"S'a'\n"),
    "text UNICODE": two(b"Va\n"),
    "trailing bytes": two(b"N") + b"cos\nsystem\n",
    "second pickle": two(b"N") + two(b"N"),
    # storages and tensors
    "unknown storage class": two(STORAGE.replace(b"FloatStorage", b"EvilStorage")),
    "storage class of another module": two(STORAGE.replace(b"ctorch\n", b"cevil\n")),
    "one key, two lengths": two(STORAGE + STORAGE.replace(b"K\6", b"K\7") + b"\x86"),
    "one key, two types": two(STORAGE + STORAGE.replace(b"Float", b"Half") + b"\x86"),
    # exhausting the reader
    "deep tuple": two(b"K\1" + b"\x85" * 500_000),
    "deep tuple as a key": two(b"}K\1" + b"\x85" * 500_000 + b"Ns"),
    "deep list": two(b"]" * 300_000 + b"a" * 299_999),
    "deep arguments": two(b"cos\nsystem\n" * 2000 + b")" + b"R\x85" * 2000),
    "doubling tuple as a key": two(b"}" + doubling(60) + b"Ns"),
    "tuple of nine as a key": two(b"}(" + b"K\1" * 9 + b"tNs"),
    "doubling tuple in a set": four(b"\x8f(" + doubling(60) + b"\x90"),
    "doubling tuple in a frozenset": four(b"(" + doubling(60) + b"\x91"),
    "doubling tuple in a key of OrderedDict": two(b"ccollections\nOrderedDict\n](" + doubling(60) + b"N\x86e\x85R"),
    "open marks": two(b"(" * 1000),
    "long integer": two(b"\x8a\xff" + b"\x7f" * 255),
    "LONG4": two(b"\x8b" + struct.pack("<i", 1 << 30)),
    "colliding integers as keys": colliding_integers(50_000),
    "many tuples as keys": colliding_tuples(50_000),
    "a memo a byte": four(b"N" + b"\x94" * 200_000),
    "a dict a byte": two(b"(" + b"}" * 1_500_000 + b"t"),
    "copies of a large text": two(
        b"c_codecs\nencode\nq\0X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\1("
        + b"h\0h\1X\6\0\0\0latin1\x86R" * 2000 + b"t"
    ),
    "copies of a large set": two(
        b"c__builtin__\nset\nq\0](" + b"K\1" * 100_000 + b"eq\1(" + b"h\0h\1\x85R" * 2000 + b"t"
    ),
}  # fmt: skip

DAMAGED = {
    "empty": b"",
    "protocol 0": b"(lp0\n.",
    "protocol 6": b"\x80\x06N.",
    "protocol 1": b"\x80\x01N.",
    "protocol twice": two(b"\x80\x02N"),
    "no STOP": b"\x80\x02N",
    "nothing to return": two(b""),
    "two values": two(b"NN"),
    "mark left open": two(b"(N"),
    "mark never made": two(b"t"),
    "stack runs empty": two(b"K\1\x86"),
    "pops over a mark": two(b"K\1(K\2\x86"),
    "memo never written": two(b"h\x07"),
    "odd dict": two(b"}(K\1u"),
    "list as a key": two(b"}]Ns"),
    "dict in a set": four(b"\x8f(}\x90"),
    "text longer than the pickle": two(b"X\xff\xff\xff\xffab"),
    "text of 2^60 bytes": four(b"\x8d" + u64(1 << 60) + b"ab"),
    "bytes of 2^40 bytes": four(b"\x8e" + u64(1 << 40) + b"ab"),
    "bytearray of 2^63 bytes": b"\x80\x05\x96" + u64(1 << 63) + b"ab.",
    "text that is not UTF-8": two(b"X\2\0\0\0\xff\xfe"),
    "name without an end": two(b"c" + b"a" * 5000),
    "name that is not UTF-8": two(b"cos\n\xff\n"),
    "STACK_GLOBAL of numbers": four(b"K\1K\2\x93"),
    "arguments are a list": two(b"cos\nsystem\n]R"),
    "frame longer than the pickle": four(b"\x95" + u64(1 << 40) + b"N"),
    "frame ends inside an opcode": four(b"\x95" + u64(3) + b"X\1\0\0\0aN"),
    "frame ends inside a number": four(b"\x95" + u64(2) + b"J\1\0\0\0"),
    "frame in a frame": four(b"\x95" + u64(20) + b"\x95" + u64(2) + b"N"),
    "frame reaches past STOP": four(b"\x95" + u64(9) + b"N") + b"N" * 7,
    "storage of a negative length": two(STORAGE.replace(b"K\6", b"J\xff\xff\xff\xff")),
    "storage of a true length": two(STORAGE.replace(b"K\6", b"\x88")),
    "storage key is a number": two(STORAGE.replace(b"X\1\0\0\x000", b"K\0")),
    "tensor of too few arguments": tensor(b"K\0K\6\x85"),
    "tensor of too many arguments": tensor(b"K\0K\6\x85K\1\x85" + HOOKS + b"}}"),
    "tensor of torch 0.x with an argument more": two(
        b"ctorch._utils\n_rebuild_tensor\n(" + STORAGE + b"K\0K\6\x85K\1\x85\x89tR"
    ),
    "tensor of no storage": two(REBUILD + b"NK\0K\6\x85K\1\x85" + HOOKS + b"tR"),
    "negative size": tensor(b"K\0J\xff\xff\xff\xff\x85K\1\x85" + HOOKS),
    "negative stride": tensor(b"K\0K\6\x85J\xff\xff\xff\xff\x85" + HOOKS),
    "negative offset": tensor(b"J\xff\xff\xff\xffK\6\x85K\1\x85" + HOOKS),
    "size that is true": tensor(b"K\0\x88\x85K\1\x85" + HOOKS),
    "size of 2^100": tensor(b"K\0\x8a\x0d" + (1 << 100).to_bytes(13, "little") + b"\x85K\1\x85" + HOOKS),
    "more sizes than strides": tensor(b"K\0K\2K\3\x86K\1\x85" + HOOKS),
    "65 dimensions": tensor(b"K\0(" + b"K\1" * 65 + b"t(" + b"K\1" * 65 + b"t" + HOOKS),
}  # fmt: skip


@pytest.mark.parametrize("case", [*HOSTILE, *DAMAGED])
def test_hostile_pickles_are_refused_with_little_work(case):
    code = "hostile-pickle" if case in HOSTILE else "damaged-pickle"
    data = {**HOSTILE, **DAMAGED}[case]
    error, count = refusal(lambda: interpret(data, where="evil.pth"))
    assert error.code == code, error
    assert error.where.startswith("evil.pth, byte ")
    assert count < 25 * len(data) + 10_000  # a few calls a byte; 20 for `copies of a large set`


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b"cos\nsystem\nX\2\0\0\0id\x85R", "os.system"),
        (b"cbuiltins\neval\nX\2\0\0\x0012\x85R", "builtins.eval"),
        (b"cpkgutil\nresolve_name\nX\t\0\0\0os:system\x85R", "pkgutil.resolve_name"),
        (b"c__builtin__\ngetattr\ncos\nsystem\nX\1\0\0\0a\x86R", "__builtin__.getattr"),
        (b"csubprocess\nPopen\n)\x81}b", "subprocess.Popen"),
        (b"ctorch.storage\n_load_from_bytes\nC\1a\x85R", "torch.storage._load_from_bytes"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "torch._utils._rebuild_tensor_v2"),
        (b"c_codecs\nencode\nX\1\0\0\0aX\x08\0\0\0punycode\x86R", "_codecs.encode"),
    ],
)
def test_calls_are_carried_as_data(body, name):
    found = interpret(two(body), where="evil.pth")
    assert isinstance(found, Opaque)
    assert found.type.path == name


def test_a_pickle_larger_than_any(monkeypatch):
    monkeypatch.setattr("shardmerge.sources.pickle_frames.MOST_PICKLE_BYTES", 64)
    assert interpret(two(b"N\x85" + b"\x85" * 59)[:63] + b".", where="large.pth") is not None
    with pytest.raises(CheckpointError, match="larger than any checkpoint's"):
        interpret(two(b"N\x85" + b"\x85" * 80), where="large.pth")


@pytest.mark.parametrize("pid", [5, "module", ("module", 1), ("modula", 1, 2, 3), ("storage", 1, 2, 3, 4)], ids=repr)
def test_a_persistent_id_of_before_torch_1_6_that_is_none(pid):
    with pytest.raises(CheckpointError, match="not that of a storage"):
        persistent(pid, {}, legacy=True)
    assert persistent(("module", 1, 2, 3), {}, legacy=True) == 1


def test_names_are_never_looked_up():
    assert interpret(two(b"cno.such.module\nno name\n"), where="evil.pth") == Global("no.such.module", "no name")


def test_values_that_double_cost_nothing_until_written_out():
    found = interpret(two(b"K\1\x85" + b"q\0h\0\x86" * 60), where="evil.pth")
    assert isinstance(found, tuple)
    assert found[0] is found[1]


TEXTS = {
    "a dict is made of something else than pairs": [
        two(b"ccollections\nOrderedDict\nK\1\x85R"),
        two(b"ccollections\nOrderedDict\n](K\1K\2e\x85R"),
        two(b"ccollections\nOrderedDict\n](K\1K\2K\3\x87e\x85R"),
        two(b"ccollections\nOrderedDict\n]N\x86R"),
    ],
    "torch.Size is made of something else than sizes": [
        two(b"ctorch\nSize\nX\1\0\0\0a\x85\x85R"),
        two(b"ctorch\nSize\nK\1\x85R"),
        two(b"ctorch\nSize\nK\1\x85N\x86R"),
    ],
    "a tensor's element type is not named": [
        two(b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\0K\6\x85K\1\x85" + HOOKS + b"K\1tR"),
        two(b"ctorch._utils\n_rebuild_tensor_v3\n(" + STORAGE + b"K\0K\6\x85K\1\x85" + HOOKS + b"tR"),
    ],
    "a length is larger than what is left": [two(b"X\xff\xff\xff\xffab")],
    "a frame nests in another or is longer than the pickle": [
        four(b"\x95" + u64(11) + b"\x95" + u64(2) + b"N"), four(b"\x95" + u64(1 << 40) + b"N"),
    ],
    "a class is named by something that is not text": [
        four(b"K\1X\1\0\0\0a\x93"), four(b"X\1\0\0\0aK\1\x93"),
    ],
    "a storage is described by something else than class, key and length": [
        two(STORAGE.replace(b"ctorch\nFloatStorage\n", b"X\5\0\0\0Float")),
    ],
    "a dict entry has no value": [two(b"}(K\1u"), two(b"ccollections\nCounter\n)\x81(K\1u")],
    "arguments are not a tuple": [four(b"cos\nsystem\n]}\x92"), two(b"cos\nsystem\n]R")],
    "the pickle is cut short": [b"\x80\x02N"],
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_what_a_malformed_pickle_is_told(what):
    """A guard, and not an accident of Python's behind it."""
    for data in TEXTS[what]:
        error, _ = refusal(lambda data=data: interpret(data, where="evil.pth"))
        assert error.code == "damaged-pickle"
        assert what in error.what


@pytest.mark.parametrize("name", ["INST", "OBJ", "EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"])
def test_an_opcode_that_no_checkpoint_needs_is_named(name):
    assert name in refusal(lambda: interpret(HOSTILE[name], where="evil.pth"))[0].found


def test_refused_opcodes_have_the_names_that_python_gives_them():
    refused = 0
    for opcode in pickletools.opcodes:
        data = b"\x80\x02" + opcode.code.encode("latin-1")
        error, _ = refusal(lambda data=data: interpret(data, where="evil.pth"))
        if "no checkpoint needs" in error.what:
            assert error.found == f"{opcode.name}, {ord(opcode.code):#04x}"
            refused += 1
    assert refused == 21


def test_a_tensor_of_another_device_is_its_tensor():
    """And one that would be cast is none."""
    made = tensor(b"K\0K\6\x85K\1\x85" + HOOKS)[2:-1]
    start = b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n(" + made
    rest = b"X\3\0\0\0xla\x89tR"
    assert isinstance(interpret(two(start + b"ctorch\nfloat32\n" + rest), where="x"), TensorRef)
    for other in (b"ctorch\nfloat16\n", b"cevil\nfloat32\n", b"N"):
        assert isinstance(interpret(two(start + other + rest), where="x"), Opaque)
