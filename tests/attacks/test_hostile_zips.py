"""Zips that are damaged, or made so that two readers see different models."""

from __future__ import annotations

import struct
from dataclasses import replace

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


# ---- what each guard says: the table above asks for codes, which several guards share


END, END_64 = "<4sHHHHIIH", "<4sQHHIIQQQQ"
WIDE, FOLLOW = build(sound(), wide=True), 0x0808


def patched(data, layout, back, **fields):
    """Data whose end record, or the one of zip64 so far from the end, says something else."""
    at = len(data) - back
    values = list(struct.unpack_from(layout, data, at))
    for index, value in fields.items():
        values[int(index[1:])] = value
    return data[:at] + struct.pack(layout, *values) + data[at + struct.calcsize(layout) :]


def end(data=None, **fields):
    return patched(data or build(sound()), END, 22, **fields)


def wide_end(**fields):
    return patched(WIDE, END_64, 22 + 20 + 56, **fields)


def behind_a_member():
    """A zip whose directory leaves out the member that it begins with."""
    first = build([Entry("archive/x", b"xx")])
    junk = first[: first.index(b"PK\1\2")]
    whole = build(sound())
    starts = [at for at in range(len(whole)) if whole[at : at + 4] == b"PK\3\4"]
    moved = build([replace(entry, header=at + len(junk)) for entry, at in zip(sound(), starts, strict=True)])
    return end(junk + moved, f6=struct.unpack(END, whole[-22:])[6] + len(junk))


DEFLATED = changed(0, method=8, flags=FOLLOW)
SAYS = {
    "the zip directory is larger than any": [
        build(sound(), count=0), end(wide_end(f6=1_000_001, f7=1_000_001), f3=0xFFFF, f4=0xFFFF),
    ],
    "the zip spans several files, or has a comment": [end(f1=1), end(f2=1), end(f3=3), end(f7=4)],
    "the two end records of the zip disagree": [end(WIDE, f4=3), end(WIDE, f5=7), end(WIDE, f6=7)],
    "the zip64 locator does not point": [
        build(sound(), wide=True, shift=-4), patched(WIDE, "<4sIQI", 42, f1=1), patched(WIDE, "<4sIQI", 42, f3=2),
    ],
    "the zip64 end record is malformed": [
        wide_end(f0=b"PK\6\5"), wide_end(f1=45), wide_end(f4=1), wide_end(f5=1), wide_end(f6=3),
    ],
    "the zip directory does not reach to its end record": [build(sound(), gap=7), build(sound(), gap=7, wide=True)],
    "the zip directory is malformed": [
        build(sound()).replace(b"PK\1\2", b"PK\1\3"), build(changed(3, extra=b"x" * 9))[:-31] + build(sound())[-22:],
    ],
    "the members of the zip do not share one directory": [build(named("other/x"))],
    "the zip does not begin with its first member": [behind_a_member()],
    "a member has no local header": [build(changed(3, header=build(sound()).rindex(b"PK\3\4") + 1))],
    "a stored member has two sizes": [build(changed(2, flags=FOLLOW, size=64))],
    "a member inflates to more than any": [build(changed(0, method=8, flags=FOLLOW, size=1 << 25))],
    "a member inflates to another size": [
        build(changed(0, method=8, flags=FOLLOW, size=len(PICKLE) + 1)),
        build(changed(0, method=8, flags=FOLLOW, size=len(PICKLE) - 1)),
        build(changed(0, method=8, flags=FOLLOW, packed=len(DEFLATED[0].raw) - 1)),
        build(changed(0, method=8, flags=FOLLOW, packed=len(DEFLATED[0].raw) + 1)),
    ],
    "a member cannot be inflated": [build(DEFLATED).replace(DEFLATED[0].raw, b"\xff" * len(DEFLATED[0].raw))],
}  # fmt: skip


@pytest.mark.parametrize("what", SAYS)
def test_what_a_malformed_zip_is_told(what, tmp_path):
    path = tmp_path / "model.pth"
    for data in SAYS[what]:
        path.write_bytes(data)
        assert what in refusal(lambda: read(path))[0].what


def test_an_error_about_the_whole_zip_names_its_first_byte(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(build(named("other/x")))
    assert refusal(lambda: read(path))[0].where == f"{path}, byte 0"
