"""Malformed checkpoints and mappings, over 600, the same each time: ``python -m tests.attacks.corpus DIRECTORY``."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.attacks import exhausting, seeds
from tests.attacks.hostile_zips import build, changed
from tests.attacks.test_hostile_pickles import DAMAGED
from tests.attacks.test_hostile_pickles import HOSTILE as PICKLES
from tests.attacks.test_hostile_zips import HOSTILE, HOSTILE_TENSORS

SIDE_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json",
    "special_tokens_map.json",
)  # fmt: skip
ADAPTERS = ("adapter_config.json",)


@dataclass(frozen=True, slots=True)
class Case:
    """A malformed input: files by their path in its directory; which of them is given to the commands."""

    kind: str
    name: str
    files: dict[str, bytes | Callable[[Path], None]]
    given: str = ""

    def written(self, root: Path) -> list[list[str]]:
        """Writes the files into a directory of the case's own; returns the commands to run."""
        folder = root / self.kind / "".join(letter if letter.isalnum() else "-" for letter in self.name)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                content(path)
        given = str(folder / self.given)
        if self.given.endswith(".yaml"):
            return [["plan", given], ["run", given, "--no-sync"]]
        return [["inspect", given], ["convert", given, str(folder / "out"), "--no-sync"]]


def cases() -> list[Case]:
    """Returns all cases."""
    made = [*_pickles(), *_zips(), *_legacy(), *_headers(), *_indexes(), *_metadata(), *_json(), *_yaml(), *_odd()]
    return [*made, *_numbers(), *_steering()]


def _broken(kind: str, data: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Yields a file cut short, with bytes changed, with a run of bytes doubled, removed or set to one value."""
    dice = random.Random(f"{kind} of the corpus")  # the same numbers each time
    for number in range(count):
        at = dice.randrange(len(data))
        end = min(len(data), at + dice.choice((1, 2, 4, 8, 16)))
        made = (
            data[:at],
            data[:at] + bytes(dice.randrange(256) for _ in range(end - at)) + data[end:],
            data[:at] + data[at:end] * dice.choice((2, 50)) + data[end:],
            data[:at] + data[end:],
            data[:at] + dice.choice((b"\0", b"\xff", b"\x7f")) * (end - at) + data[end:],
        )
        yield f"broken {number}", made[number % len(made)]


def _pickles() -> Iterator[Case]:
    for name, data in {**PICKLES, **DAMAGED, **exhausting.pickles()}.items():
        yield Case("pickle", name, {"model.pth": build(changed(0, data=data))}, "model.pth")
    for name, data in exhausting.pickles(20).items():
        yield Case("pickle", f"deflated {name}", {"model.pth": build(changed(0, data=data, method=8))}, "model.pth")
    for name, data in _broken("pickle", seeds.PICKLE, 60):
        yield Case("pickle", name, {"model.pth": build(changed(0, data=data))}, "model.pth")


def _zips() -> Iterator[Case]:
    for name, (_, data) in {**HOSTILE, **HOSTILE_TENSORS}.items():
        yield Case("zip", name, {"model.pth": data}, "model.pth")
    for name, data in _broken("zip", seeds.ZIP, 40):
        yield Case("zip", name, {"model.pth": data}, "model.pth")


def _legacy() -> Iterator[Case]:
    for name, data in _broken("legacy", seeds.LEGACY, 50):
        yield Case("legacy", name, {"model.pth": data}, "model.pth")


def _headers() -> Iterator[Case]:
    for name, data in exhausting.headers().items():
        yield Case("header", name, {"model.safetensors": data}, "model.safetensors")
    for name, data in _broken("header", seeds.WEIGHTS, 50):
        yield Case("header", name, {"model.safetensors": data}, "model.safetensors")


def _indexes() -> Iterator[Case]:
    broken = dict(_broken("index", json.dumps(seeds.INDEX).encode(), 40))
    for name, data in {**exhausting.indexes(), **broken}.items():
        files = {"model.safetensors.index.json": data, "model-00001-of-00001.safetensors": seeds.WEIGHTS}
        yield Case("index", name, files)


def _metadata() -> Iterator[Case]:
    broken = dict(_broken(".metadata", seeds.metadata(), 60))
    for name, data in {**exhausting.pickles(), **broken}.items():
        yield Case(".metadata", name, {".metadata": data, "__0_0.distcp": seeds.ZIP})


def _json() -> Iterator[Case]:
    for file in (*SIDE_FILES, *ADAPTERS):
        weights = "adapter_model.safetensors" if file in ADAPTERS else "model.safetensors"
        for name, data in exhausting.json_texts().items():
            config = json.dumps(seeds.CONFIG).encode()
            yield Case("JSON", f"{file} {name}", {"config.json": config, weights: seeds.WEIGHTS, file: data})


def _yaml() -> Iterator[Case]:
    broken = dict(_broken("YAML", seeds.MAPPING.encode(), 40))
    for name, data in {**exhausting.mappings(), **broken}.items():
        yield Case("YAML", name, {"m.safetensors": seeds.WEIGHTS, "mapping.yaml": data}, "mapping.yaml")


def _numbers() -> Iterator[Case]:
    for name, data in exhausting.numbers().items():
        yield Case("JSON", f"config.json {name}", {"model.safetensors": seeds.WEIGHTS, "config.json": data})


def _steering() -> Iterator[Case]:
    """Names that would reach the terminal: of tensors, of shards, of keys."""
    for what, name in exhausting.steering().items():
        text = json.dumps(name.decode()).encode()
        named = seeds.PICKLE.replace(b"X\1\0\0\0w", b"X" + struct.pack("<I", len(name)) + name, 1)
        broken = named.replace(b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor")
        index = b'{"weight_map": {' + text + b": " + text + b"}}"
        header = seeds.safetensors(b"{" + text + b": " + json.dumps(seeds.ENTRY).encode() + b"}")
        mapping = seeds.MAPPING.encode() + text + b": 1\n"
        yield Case("pickle", f"a name, {what}", {"model.pth": build(changed(0, data=named))}, "model.pth")
        yield Case("pickle", f"a name of none, {what}", {"model.pth": build(changed(0, data=broken))}, "model.pth")
        yield Case("index", f"a name, {what}", {"model.safetensors.index.json": index})
        yield Case("header", f"a name, {what}", {"model.safetensors": header}, "model.safetensors")
        yield Case("YAML", f"a key, {what}", {"m.safetensors": seeds.WEIGHTS, "mapping.yaml": mapping}, "mapping.yaml")


def _odd() -> Iterator[Case]:
    """FIFOs, sockets, devices and sparse files where a file is expected; given itself, and beside sound weights."""
    for what, make in {"FIFO": os.mkfifo, "socket": _socket, "device": _device, "sparse": _sparse}.items():
        for name in ("model.pth", "model.safetensors", "mapping.yaml"):
            yield Case("no file", f"{what} {name}", {name: make}, name)
        for name in ("config.json", "tokenizer.json", "latest", "last_checkpoint", "latest_checkpointed_iteration.txt"):
            yield Case("no file", f"{what} beside {name}", {"model.safetensors": seeds.WEIGHTS, name: make})
        for name in ("model.safetensors.index.json", ".metadata"):
            yield Case("no file", f"{what} alone {name}", {name: make})


def _socket(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


if __name__ == "__main__":
    for one in cases():
        one.written(Path(sys.argv[1]))
