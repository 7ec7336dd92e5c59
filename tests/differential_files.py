"""Random files of torch and safetensors, sound and broken, and how each reader reads them."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import safetensors
import torch

from shardmerge.dtypes import BY_TORCH_NAME, DTYPES
from shardmerge.errors import ShardmergeError
from shardmerge.execute.gather import gather
from shardmerge.sources.safetensors_file import read_safetensors
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from shardmerge.storage.reading import FilePool
from shardmerge.tensors import Catalog

warnings.simplefilter("ignore")

# Element type, shape and bytes.
Value: TypeAlias = "tuple[str, tuple[int, ...], bytes]"


@dataclass(frozen=True, slots=True)
class Read:
    """Tensors by name, and the dotted path of the dict that they were looked for in; ``""`` is all of the file."""

    tensors: dict[str, Value]
    root: str = ""

    def below(self, root: str) -> dict[str, Value]:
        """Returns those of one dict, by their names in it; of the whole file without the optimizer's."""
        if not root:
            return {name: value for name, value in self.tensors.items() if not name.startswith("optimizer")}
        start = f"{root}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


class Refused(Exception):
    """A reader refuses a file; ``documented`` unless it fell over it."""

    def __init__(self, code: str, *, documented: bool = True) -> None:
        super().__init__(code)
        self.code = code
        self.documented = documented


@dataclass(frozen=True, slots=True)
class File:
    """A file as made.

    Attributes
    ----------
    name, data
        Of it.
    mutation
        How it was broken; ``""`` for a sound one.
    special
        What it holds that is documented not to be read; ``""`` for an ordinary one.
    saved
        Of a sound one: what was given to the writer. torch does not load all that it saves: protocols 4 and 5, and
        types such as float8 in the format before 1.6.
    """

    name: str
    data: bytes
    mutation: str = ""
    special: str = ""
    saved: Callable[[], Read] | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A format: what makes files, the two readers, and whether what is accepted here must be accepted there."""

    make: Callable[[random.Random], File]
    ours: Callable[[Path], Read]
    theirs: Callable[[Path], Read]
    subset: bool


# --- torch: values

_DTYPES = [getattr(torch, name) for name in BY_TORCH_NAME if hasattr(torch, name)]
_UNREAD = [torch.complex128, torch.complex32]
_WORDS = ("layers", "weight", "bias", "q_proj", "mlp", "norm", "embed", "0", "1", "17", "ß", "a b", "x" * 60)


class _Values:
    """Makes state dicts whose tensors share storages as those of models do, and more than that."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.bases: list[torch.Tensor] = []
        self.special = ""

    def root(self) -> object:
        dice = self.dice
        state = self._state(depth=dice.choice((0, 0, 1, 2)))
        state["first"] = self._base()  # a state dict has a tensor
        match dice.randrange(6):
            case 0:
                return {
                    "state_dict": state,
                    "epoch": 3,
                    "args": self._other(),
                    "optimizer": {"state": {0: self._base()}},
                }
            case 1:
                return {"model": state, "lr": 1e-4, "config": {"a": self._other()}}
            case 2:
                return {"meta": {"cfg": "model = dict(type='x')"}, "state_dict": state, "message_hub": self._other()}
            case _:
                return state

    def _state(self, depth: int) -> dict[object, object]:
        dice = self.dice
        state: dict[object, object] = dice.choice((dict, OrderedDict))()
        for _ in range(dice.randrange(1, 6)):
            state[self._name()] = self._leaf(depth)
        if isinstance(state, OrderedDict) and dice.random() < 0.3:
            state._metadata = OrderedDict({"": {"version": 1}})
        return state

    def _name(self) -> object:
        dice = self.dice
        if dice.random() < 0.04:
            return dice.choice((3, 3.5, True, None, (1, "a"), b"x"))
        return ".".join(dice.choices(_WORDS, k=dice.randrange(1, 4)))

    def _leaf(self, depth: int) -> object:
        dice = self.dice
        if depth and dice.random() < 0.3:
            return self._state(depth - 1)
        if dice.random() < 0.12:
            return self._other()
        tensor = self._view(self._base())
        if dice.random() < 0.02:
            return self._unread(tensor)
        if tensor.is_floating_point() and dice.random() < 0.2:
            parameter = torch.nn.Parameter(tensor, requires_grad=dice.random() < 0.5)
            if dice.random() < 0.2:
                parameter.tag = "x"
            return parameter
        return tensor

    def _other(self) -> object:
        return self.dice.choice((
            1, -5, 1 << 40, 1 << 100, 2.5, float("nan"), "text", b"raw", None, True, (1, 2), [1, "a"], {"k": 1}, {1, 2},
            torch.Size([2, 3]), torch.float16, torch.device("cpu"), 1j, Counter(a=1), bytearray(b"x"), [torch.ones(2)],
        ))  # fmt: skip

    def _base(self) -> torch.Tensor:
        dice = self.dice
        if self.bases and dice.random() < 0.35:
            return dice.choice(self.bases)
        dtype = dice.choice(_DTYPES)
        shape = [dice.choice((1, 2, 3, 4, 7)) for _ in range(dice.randrange(4))]
        if dice.random() < 0.04:
            shape = [*shape, 0]
        size = torch.empty(shape, dtype=dtype)
        raw = torch.tensor(
            [dice.randrange(2 if dtype is torch.bool else 256) for _ in range(size.numel() * size.itemsize)],
            dtype=torch.uint8,
        )
        self.bases.append(raw.view(dtype).reshape(shape))
        return self.bases[-1]

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        dice = self.dice
        for _ in range(dice.choice((0, 0, 0, 1, 2))):
            if not tensor.dim() or not tensor.numel():
                return tensor
            axis = dice.randrange(tensor.dim())
            size = tensor.shape[axis]
            match dice.randrange(7):
                case 0:
                    tensor = tensor.transpose(0, axis)
                case 1:
                    start = dice.randrange(size)
                    tensor = tensor.narrow(axis, start, dice.randrange(size - start + 1))
                case 2:
                    tensor = tensor.select(axis, dice.randrange(size))
                case 3:
                    tensor = tensor.unsqueeze(axis).expand(
                        *tensor.shape[:axis], dice.randrange(1, 4), *tensor.shape[axis:]
                    )
                case 4:
                    tensor = tensor[(slice(None),) * axis + (slice(dice.randrange(size), None, dice.randrange(1, 3)),)]
                case 5:
                    held = tensor.untyped_storage().nbytes() // tensor.itemsize - tensor.storage_offset()
                    count = dice.randrange(1, min(held, 4) + 1)
                    tensor = tensor.as_strided((2, count), (0, 1), tensor.storage_offset())
                case 6:
                    tensor = tensor.detach()
        return tensor

    def _unread(self, tensor: torch.Tensor) -> object:
        """Returns what is documented not to be read."""
        made = {
            "conj": lambda: torch.ones(2, 2, dtype=torch.complex64).conj(),
            "neg": lambda: torch.ones(2, dtype=torch.complex64).conj().imag,
            "sparse": lambda: torch.eye(3).to_sparse(),
            "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
            "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 2, torch.qint8),
            "meta": lambda: torch.empty(2, device="meta"),
            "element type": lambda: torch.zeros(2, dtype=self.dice.choice(_UNREAD)),
        }
        self.special = self.dice.choice([*made])
        return made[self.special]()


def make_torch(dice: random.Random) -> File:
    """Returns a file that ``torch.save`` wrote, half of the time broken afterwards."""
    values = _Values(dice)
    root, protocol, zipped = values.root(), dice.choice((2, 2, 2, 3, 4, 5)), dice.random() < 0.6
    stream = io.BytesIO()
    special = values.special
    try:
        torch.save(root, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    except (RuntimeError, NotImplementedError, AttributeError):  # a kind of tensor that the old format does not know
        return make_torch(dice)
    data = stream.getvalue()
    name = "model.pth"
    if dice.random() < 0.5:
        return File(name, data, special=special or _collides(root), saved=lambda: _tensors(root))
    mutate = dice.choice([*(_OF_ZIP if zipped else _OF_LEGACY), *_OF_ANY])
    return File(name, mutate(data, dice), mutate.__name__.strip("_").replace("_", " "), special)


def _collides(root: object) -> str:
    """Tells whether two tensors come to the same dotted name, which is refused."""
    names = [name for name, value in _leaves(root, "") if isinstance(value, torch.Tensor)]
    return "the same dotted name twice" if len(set(names)) < len(names) else ""


# --- torch: mutations


def _flipped(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        out[dice.randrange(len(out))] ^= 1 << dice.randrange(8)
    return bytes(out)


def _cut_off(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def _doubled(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    end = start + dice.randrange(1, 200)
    return data[:end] + data[start:end] + data[end:]


def _removed(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    return data[:start] + data[start + dice.randrange(1, 40) :]


def _appended(data: bytes, dice: random.Random) -> bytes:
    return data + dice.randbytes(dice.randrange(1, 64))


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def _packed(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    return stream.getvalue()


def _stored_again(data: bytes, dice: random.Random) -> bytes:
    return _packed(_members(data))


def _deflated(data: bytes, dice: random.Random) -> bytes:
    return _packed(_members(data), zipfile.ZIP_DEFLATED)


def _members_swapped(data: bytes, dice: random.Random) -> bytes:
    members = _members(data)
    a, b = dice.randrange(len(members)), dice.randrange(len(members))
    members[a], members[b] = (members[a][0], members[b][1]), (members[b][0], members[a][1])
    return _packed(members)


def _member_twice(data: bytes, dice: random.Random) -> bytes:
    members = _members(data)
    name, raw = dice.choice(members)
    members.insert(dice.randrange(len(members)), (name, _flipped(raw, dice) if raw else b"x"))
    return _packed(members)


def _member_removed(data: bytes, dice: random.Random) -> bytes:
    members = _members(data)
    del members[dice.randrange(len(members))]
    return _packed(members) if members else b""


def _storage_resized(data: bytes, dice: random.Random) -> bytes:
    members = _members(data)
    at = dice.choice([k for k, (name, _) in enumerate(members) if "/data/" in name] or [0])
    name, raw = members[at]
    members[at] = name, raw[:-1] if dice.random() < 0.5 else raw + b"\0" * dice.choice((1, 8))
    return _packed(members)


def _pickle_edited(data: bytes, dice: random.Random) -> bytes:
    members = _members(data)
    return _packed([(name, edited(raw, dice) if name.endswith("data.pkl") else raw) for name, raw in members])


def _byte_order(data: bytes, dice: random.Random) -> bytes:
    order = dice.choice((b"big", b"little", b"", b"BIG"))
    return _packed([(name, order if name.endswith("byteorder") else raw) for name, raw in _members(data)])


def edited(raw: bytes, dice: random.Random) -> bytes:
    """Returns a pickle with a small number, an opcode, or a word of torch changed, its lengths kept."""
    out = bytearray(raw)
    places = [at for at in range(2, len(raw) - 2) if raw[at] in b"KhqM\x88\x89\x85\x86\x87RXN"]
    for _ in range(dice.choice((1, 1, 2))):
        at = dice.choice(places)
        match raw[at]:
            case 0x4B | 0x68 | 0x71 | 0x4D:  # a number of one byte, a memo
                out[at + 1] = dice.choice((0, 1, 2, 3, 4, 5, 7, 8, out[at + 1] ^ 1, 255))
            case 0x85 | 0x86 | 0x87:
                out[at] = dice.choice((0x85, 0x86, 0x87))
            case _:
                out[at] = dice.choice(b"\x88\x89N)]}R0\x81b.")
    text = bytes(out)
    if dice.random() < 0.2:
        old, new = dice.choice(_SWAPS)
        text = text.replace(old, new, 1)
    return text


_SWAPS = (
    (b"FloatStorage", b"ShortStorage"), (b"HalfStorage", b"LongStorage"), (b"LongStorage", b"HalfStorage"),
    (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"), (b"_rebuild_tensor_v3", b"_rebuild_tensor_v2"),
    (b"OrderedDict", b"defaultdict"), (b"cpu", b"\0pu"), (b"storage", b"storagE"), (b"float8_e4m3fn", b"float8_e5m2xx"),
)  # fmt: skip


def _storages_swapped(data: bytes, dice: random.Random) -> bytes:
    """Exchanges two stretches of the raw bytes at the end of an old file."""
    size = dice.choice((4, 8, 16))
    if len(data) < 4 * size:
        return data[:-1]
    at = len(data) - 2 * size
    return data[:at] + data[at + size :] + data[at : at + size]


def _old_pickle_edited(data: bytes, dice: random.Random) -> bytes:
    start = data.index(b"little_endian")
    end = len(data) - dice.randrange(0, len(data) - start - 40)
    return data[:start] + edited(data[start:end], dice) + data[end:]


class Stateful:
    """Pickles as a tensor, or a parameter, that gets attributes when it is loaded."""

    def __init__(self, tensor: torch.Tensor, state: dict[str, object], parameter: bool = False) -> None:
        self.tensor, self.state, self.parameter = tensor, state, parameter

    def __reduce_ex__(self, protocol: int) -> tuple[object, ...]:
        if self.parameter:
            return torch._utils._rebuild_parameter_with_state, (self.tensor, False, OrderedDict(), self.state)
        function, args = self.tensor.__reduce_ex__(protocol)[:2]
        return torch._tensor._rebuild_from_type_v2, (function, torch.Tensor, args, self.state)


def _attributes(data: bytes, dice: random.Random) -> bytes:
    """Makes another file: of a tensor whose attributes are set after it is made, some of which are its values."""
    first, second = torch.arange(4.0), torch.arange(4.0) + 10
    key = dice.choice(("data", "real", "tag", "grad", "requires_grad"))
    value = second if key in ("data", "real", "grad") else True
    stream = io.BytesIO()
    torch.save({"w": Stateful(first, {key: value}, dice.random() < 0.5), "v": second}, stream)
    return stream.getvalue()


_OF_ANY = (_flipped, _flipped, _cut_off, _doubled, _removed, _appended)
_OF_ZIP = (
    _stored_again, _deflated, _members_swapped, _member_twice, _member_removed, _storage_resized, _pickle_edited,
    _pickle_edited, _pickle_edited, _byte_order, _attributes,
)  # fmt: skip
_OF_LEGACY = (_storages_swapped, _old_pickle_edited, _old_pickle_edited, _old_pickle_edited)


# --- torch: readers


def torch_theirs(path: Path) -> Read:
    """Returns what ``torch.load(weights_only=True)`` gives."""
    try:
        root = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what it likes
        raise Refused(type(error).__name__) from error
    try:
        return _tensors(root)
    except RecursionError as error:  # a dict that holds itself
        raise Refused("endless") from error


def _tensors(root: object) -> Read:
    return Read({name: _of_torch(value) for name, value in _leaves(root, "") if isinstance(value, torch.Tensor)})


def _leaves(value: object, prefix: str) -> Iterator[tuple[str, object]]:
    """Yields leaves of nested dicts with dotted names, as the documentation of names says."""
    for key, item in value.items() if isinstance(value, dict) else ():
        name = f"{prefix}{key}" if isinstance(key, str | int) else f"{prefix}<{type(key).__name__}>"
        if isinstance(item, dict):
            yield from _leaves(item, f"{name}.")
        else:
            yield name, item


def _of_torch(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return (str(tensor.layout), tuple(tensor.shape), b"")
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    raw = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw


def torch_ours(path: Path) -> Read:
    """Returns what shardmerge reads, and below which dict. A bool of any byte but 0 is 1, as torch copies it."""
    found = _ours(read_torch_checkpoint, path)
    same = {
        name: (kind, shape, bytes(map(bool, raw)) if kind == "bool" else raw)
        for name, (kind, shape, raw) in found.tensors.items()
    }
    return Read(same, found.root)


def _ours(read: Callable[[Path], Catalog], path: Path) -> Read:
    try:
        catalog = read(path)
        pool, tensors, root = FilePool(), {}, ""
        for name in catalog.names():
            entry = catalog[name]
            raw = bytearray(entry.nbytes)
            if raw:
                gather(pool, entry, 0, memoryview(raw))
            tensors[name] = (entry.dtype.torch, tuple(entry.shape), bytes(raw))
            root = entry.origin.rpartition(" of ")[0]
        pool.close()
    except ShardmergeError as error:
        raise Refused(error.code) from error
    except Exception as error:  # what the command line calls a bug
        raise Refused(f"{type(error).__name__}: {error}"[:200], documented=False) from error
    return Read(tensors, "" if root == "top level" else root)


# --- safetensors

_SAFE = {row.torch: row.name for row in DTYPES.values()}


def make_safetensors(dice: random.Random) -> File:
    """Returns a file that safetensors wrote, half of the time broken afterwards."""
    tensors, kept = {}, []
    for _ in range(dice.randrange(0, 6)):
        row = dice.choice([*DTYPES.values()])
        shape = [
            dice.choice((0, 1, 1, 2, 3, 5)) if dice.random() < 0.3 else dice.randrange(1, 5)
            for _ in range(dice.randrange(4))
        ]
        numel = 1
        for size in shape:
            numel *= size
        raw = (
            bytes(dice.randrange(2) for _ in range(numel))
            if row.name == "BOOL"
            else dice.randbytes(numel * row.itemsize)
        )
        held = np.frombuffer(raw, np.uint8)
        kept.append(held)
        spec = safetensors.TensorSpec(dtype=row.torch, shape=shape, data_ptr=held.ctypes.data, data_len=len(raw))
        tensors[".".join(dice.choices(_WORDS, k=dice.randrange(1, 4)))] = spec
    metadata = dice.choice((None, None, {"format": "pt"}, {"a": "b", "ü": ""}))
    data = bytes(safetensors.serialize(tensors, metadata))
    if dice.random() < 0.5:
        return File("model.safetensors", data)
    mutate = dice.choice(
        (*_OF_ANY, _header_edited, _header_edited, _header_edited, _entry_edited, _entry_edited, _entry_edited)
    )
    return File("model.safetensors", mutate(data, dice), mutate.__name__.strip("_").replace("_", " "))


def _apart(data: bytes) -> tuple[bytes, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def _joined(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def _header_edited(data: bytes, dice: random.Random) -> bytes:
    """Changes the text of the header, its length kept right."""
    header, rest = _apart(data)
    at = dice.randrange(len(header) + 1)
    word = dice.choice(
        (
            b" ",
            b"\n",
            b",",
            b"{",
            b"}",
            b"0",
            b"1",
            b"-",
            b".0",
            b"e0",
            b'"',
            b"\\",
            b"\\u0000",
            b"\xc3",
            b"null",
            b"true",
            b"\xef\xbb\xbf",
            b"\0",
        )
    )
    kept = at + dice.choice((0, 0, 1, len(word)))
    return _joined(header[:at] + word + header[kept:], rest)


def _entry_edited(data: bytes, dice: random.Random) -> bytes:
    """Changes what the header says of a tensor."""
    header, rest = _apart(data)
    value = json.loads(header)
    names = [name for name in value if name != "__metadata__"]
    if not names:
        return _joined(dice.choice((b"", b"{}", b"[]", b'{"__metadata__":{"a":1}}', b'{"__metadata__":null}')), rest)
    name = dice.choice(names)
    one = value[name]
    match dice.randrange(9):
        case 0:
            one["dtype"] = dice.choice((*DTYPES, "F4", "F6_E2M3", "f32", "", None))
        case 1:
            one["shape"] = dice.choice(
                (
                    [],
                    [*one["shape"], 1],
                    one["shape"][::-1],
                    [0],
                    [-1],
                    [1 << 63],
                    [2.0],
                    one["shape"] or [1],
                    "1",
                    None,
                )
            )
        case 2:
            one["data_offsets"] = dice.choice(
                ([0, 4], one["data_offsets"][::-1], [*one["data_offsets"], 0], [1 << 63, 1 << 63], None)
            )
        case 3:
            one["data_offsets"] = [offset + dice.choice((-1, 0, 1, 4)) for offset in one["data_offsets"]]
        case 4:
            other = value[dice.choice(names)]
            one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
        case 5:
            one[dice.choice(("extra", "dtypes"))] = 1
        case 6:
            del one[dice.choice([*one])]
        case 7:
            value["__metadata__"] = dice.choice((None, {}, {"a": 1}, {"a": None}, [], "x", {"a": {}}))
        case _:
            text = json.dumps(value)
            again = json.dumps({name: dice.choice([value[other] for other in names])})
            return _joined((text[:-1] + "," + again[1:]).encode(), rest)
    return _joined(json.dumps(value, ensure_ascii=dice.random() < 0.5).encode(), rest)


def safetensors_theirs(path: Path) -> Read:
    """Returns what the reference parser gives."""
    try:
        found = safetensors.deserialize(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        raise Refused(type(error).__name__) from error
    return Read({name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in found})


def safetensors_ours(path: Path) -> Read:
    """Returns what shardmerge reads."""
    return Read({name: (_SAFE[value[0]], *value[1:]) for name, value in _ours(read_safetensors, path).tensors.items()})


KINDS = {
    "torch": Kind(make_torch, torch_ours, torch_theirs, subset=False),
    "safetensors": Kind(make_safetensors, safetensors_ours, safetensors_theirs, subset=True),
}
