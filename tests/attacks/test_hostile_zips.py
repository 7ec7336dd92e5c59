"""Zips that are damaged, or made so that two readers see different models."""

from __future__ import annotations

import struct

import pytest
from hostile_zips import PICKLE, STORAGE, Entry, build, changed, sound

from shardmerge.errors import CheckpointError
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_file import is_torch_file, read_torch_file
from tests.counting import refusal


def wide(*numbers: int) -> bytes:
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def storage_numel(numel: int) -> bytes:
    return PICKLE.replace(b"cpuK\x04", b"cpuK" + bytes([numel]))


def named(name: str) -> list[Entry]:
    return [*sound(), Entry(name, b"x")]


HUGE = 0xFFFFFFFF
HOSTILE = {
    "duplicate member": ("hostile-zip", build([*sound(), Entry("archive/data/0", b"\0" * 16)])),
    "duplicate data.pkl": ("hostile-zip", build([*sound(), Entry("archive/data.pkl", PICKLE)])),
    "second data.pkl elsewhere": ("hostile-zip", build(named("archive/x/data.pkl"))),
    "second data.pkl, second prefix": ("hostile-zip", build(named("other/data.pkl"))),
    "names differ by case": ("hostile-zip", build(named("archive/DATA/0"))),
    "names differ by normal form": ("hostile-zip", build([*named("archive/\u00e9"), Entry("archive/e\u0301", b"")])),
    "parent directory": ("hostile-zip", build(named("archive/../evil"))),
    "absolute name": ("hostile-zip", build(named("/archive/evil"))),
    "backslash": ("hostile-zip", build(named("archive\\evil"))),
    "NUL in a name": ("hostile-zip", build(named("archive/a\0b"))),
    "no data.pkl": ("hostile-zip", build(sound()[1:])),
    "members overlap": ("hostile-zip", build(changed(3, header=10))),
    "two members in one place": ("hostile-zip", build([*sound(), Entry("archive/data/1", b"", header=0)])),
    "member reaches into the next": ("hostile-zip", build(changed(2, size=60, packed=60, local_size=60))),
    "member reaches into the directory": ("hostile-zip", build(changed(3, size=99, packed=99, local_size=99))),
    "member beyond the file": ("truncated-file", build(changed(3, header=1 << 30))),
    "other local name": ("hostile-zip", build(changed(2, local_name="archive/data/1"))),
    "longer local name": ("hostile-zip", build(changed(2, local_name="archive/data/000"))),
    "other local method": ("hostile-zip", build(changed(0, local_method=8))),
    "other local size": ("hostile-zip", build(changed(2, local_size=8))),
    "stored with two sizes": ("hostile-zip", build(changed(2, size=64))),
    "storage is deflated": ("compressed-storage", build(changed(2, method=8))),
    "storage of an unknown method": ("compressed-storage", build(changed(2, method=12))),
    "pickle of an unknown method": ("damaged-zip", build(changed(0, method=12))),
    "pickle inflates to more": ("hostile-zip", build(changed(0, method=8, data=b"\0" * 100_000, size=100))),
    "pickle inflates to less": ("hostile-zip", build(changed(0, method=8, size=1000))),
    "pickle announces gigabytes": ("hostile-zip", build(changed(0, method=8, size=1 << 31))),
    "wrong checksum of the pickle": ("damaged-zip", build(changed(0, crc=1))),
    "encrypted": ("damaged-zip", build(changed(2, flags=0x0801))),
    "second disk": ("damaged-zip", build(changed(2, disk=1))),
    "big-endian": ("big-endian", build(changed(1, data=b"big"))),
    "middle-endian": ("damaged-zip", build(changed(1, data=b"middle"))),
    "byte order of megabytes": ("hostile-zip", build(changed(1, data=b"little" * 100_000))),
    "TorchScript": ("torchscript", build(named("archive/constants.pkl"))),
    "TorchScript code": ("torchscript", build(named("archive/code/model.py"))),
    "more entries than counted": ("damaged-zip", build(sound(), count=3)),
    "fewer entries than counted": ("damaged-zip", build(sound(), count=5)),
    "gap before the end": ("damaged-zip", build(sound(), gap=7)),
    "trailing bytes": ("hostile-zip", build(sound()) + b"junk"),
    "second zip behind": ("damaged-zip", build(sound()) + build(changed(2, data=b"\0" * 16))),
    "zip64 locator points elsewhere": ("hostile-zip", build(sound(), wide=True, shift=-4)),
    "zip64 field is missing": ("damaged-zip", build(changed(2, size=HUGE, packed=HUGE))),
    "zip64 field is short": ("damaged-zip", build(changed(2, size=HUGE, packed=HUGE, extra=wide(16)))),
    "zip64 field lies": ("hostile-zip", build(changed(2, size=HUGE, packed=HUGE, extra=wide(1 << 60, 1 << 60)))),
    "extra field is cut": ("damaged-zip", build(changed(2, size=HUGE, packed=HUGE, extra=b"\1\0\xff\xff"))),
    "only an end record": ("damaged-zip", b"PK\3\4" + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0, 0, 0, 4, 0)),
    "empty zip": ("truncated-file", b"PK\3\4"),
}  # fmt: skip

HOSTILE_TENSORS = {
    "storage shorter than announced": ("storage-size", build(changed(0, data=storage_numel(5)))),
    "storage longer than announced": ("storage-size", build(changed(0, data=storage_numel(3)))),
    "storage is not there": ("missing-storage", build([entry for entry in sound() if "data/0" not in entry.name])),
    "view is too long": ("view-out-of-storage", build(changed(0, data=PICKLE.replace(b"K\x04\x85", b"K\x05\x85")))),
    "view begins too late": ("view-out-of-storage", build(changed(0, data=PICKLE.replace(b"QK\0", b"QK\1")))),
    "strides reach too far": ("view-out-of-storage", build(changed(0, data=PICKLE.replace(b"K\1\x85", b"K\2\x85")))),
    "offset of 2^60": (
        "view-out-of-storage", build(changed(0, data=PICKLE.replace(b"QK\0", b"Q\x8a\x08\0\0\0\0\0\0\0\x10")))
    ),
}  # fmt: skip


def read(path):
    file = read_torch_file(path)
    return {name: file.entry(name, ref) for name, ref in state_dict(file.root).tensors.items()}


@pytest.mark.parametrize("case", [*HOSTILE, *HOSTILE_TENSORS])
def test_hostile_zips_are_refused(case, tmp_path):
    code, data = {**HOSTILE, **HOSTILE_TENSORS}[case]
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    is_torch_file(path)
    error, count = refusal(lambda: read(path))
    assert error.code == code, error
    assert error.where.startswith(str(path))
    assert count < 5_000


@pytest.mark.parametrize(
    "data",
    [
        build(sound()),
        build(sound(), wide=True),
        build(changed(0, method=8)),
        build(changed(2, flags=0x0808)),
        build(changed(2, crc=0)),
        build(changed(2, local_extra=b"FB\x05\0ZZZZZ")),
        build(changed(2, size=HUGE, packed=HUGE, local_size=HUGE, extra=b"\x99\0\0\0" + wide(16, 16)), wide=True),
        build([entry for entry in sound() if "byteorder" not in entry.name]),
        build([*named("archive/.data/serialization_id"), Entry("archive/unknown", b"?")]),
    ],
    ids=["plain", "zip64 end", "deflated pickle", "descriptor", "no checksum", "padding", "zip64", "old", "more"],
)
def test_sound_variants_are_read(data, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    assert is_torch_file(path)
    (piece,) = read(path)["w"].pieces
    assert data[piece.held.offset : piece.held.offset + piece.held.nbytes] == STORAGE


@pytest.mark.parametrize("keep_end", [True, False])
def test_every_truncation_is_refused(keep_end, tmp_path):
    """``keep_end``: bytes are missing in the middle, and the end record is whole."""
    data = build(sound(), wide=True)
    path = tmp_path / "model.pth"
    for end in range(1, len(data) - 1):
        path.write_bytes(data[:end] + data[end + 1 :] if keep_end else data[:end])
        try:
            entries = read(path)
        except CheckpointError:
            continue
        pytest.fail(f"byte {end} is missing, and {list(entries)} was read")
