"""Files of torch that are damaged, of another kind, or of other contents."""

from __future__ import annotations

import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.following import Call, Row, argument, by_hand
from tests.hint_rows.checkpoints import ONES
from tests.hint_rows.given import (
    CONVERT,
    Given,
    back,
    made,
    stored,
)


def torch_file(
    state: object, *args: str, name: str = "ck.pth", change: Callable[[bytes], bytes] | None = None
) -> Given:
    """A file of torch, its bytes changed; the one that was not changed lies aside."""

    def make(call: Call) -> None:
        path, aside = call.folder / name, call.folder / "aside"
        aside.mkdir()
        torch.save(state, path, _use_new_zipfile_serialization=change is None)
        shutil.copy(path, aside)
        if change is not None:
            path.write_bytes(change(path.read_bytes()))

    return made(make, *CONVERT, name, "out", *args)


def again(call: Call) -> None:
    back(".")(call)


def rezipped(path: Path, method: int, *, big_endian: bool = False) -> None:
    """Packs the members of a torch file anew."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, b"big" if big_endian and name.endswith("/byteorder") else data)


def saved_anew(change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.contiguous) -> Callable[[Call], object]:
    """Loads a file with torch and saves it, as who trusts it does."""

    def do(call: Call) -> None:
        state = torch.load(call.folder / "ck.pth", weights_only=False)
        torch.save({name: change(tensor) for name, tensor in state.items()}, call.folder / "ck.pth")

    return do


def scripted(call: Call) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(call.folder / "ck.pt"))


def run_python(call: Call) -> None:
    """Runs the line of Python that the hint has, and converts the file that it saves."""
    words = shlex.split(call.hint.partition("where it is trusted: ")[2].partition(", and pass")[0])
    exec(words[words.index("-c") + 1], {})  # ours
    written = next(path for path in sorted(call.folder.iterdir()) if path.name not in ("ck.pt", "out"))
    call.change("ck.pt", str(written))


def flipped(call: Call, at: bytes = b"PK\x01\x02") -> None:
    """Changes a byte of a torch file."""
    torch.save(ONES, "ck.pth")
    Path("aside").mkdir()
    shutil.copy("ck.pth", "aside")
    data = bytearray(Path("ck.pth").read_bytes())
    data[data.index(at) + 3] ^= 1
    Path("ck.pth").write_bytes(data)


TORCH = [
    Row(
        "a legacy file cut short",
        torch_file(ONES, change=lambda data: data[:-4]),
        "truncated-file",
        by_hand("copy or download the file again", again),
    ),
    Row(
        "a legacy file whose pickle is cut short",
        torch_file(ONES, change=lambda data: data[: len(data) // 3]),
        "damaged-pickle",
        by_hand("copy or download the file again", again),
    ),
    Row(
        "a zip with a flipped byte",
        made(flipped, *CONVERT, "ck.pth", "out"),
        "damaged-zip",
        by_hand("copy or download the file again", again),
    ),
    Row(
        "a zip with a flipped bit in its weights",
        made(lambda call: flipped(call, b"\0\0\x80\x3f"), *CONVERT, "ck.pth", "out"),
        "damaged-record",
        by_hand("copy or download it again", again),
    ),
    Row(
        "a zip that was compressed",
        made(
            lambda call: (torch.save(ONES, "ck.pth"), rezipped(call.folder / "ck.pth", zipfile.ZIP_DEFLATED)),
            *CONVERT,
            "ck.pth",
            "out",
        ),
        "compressed-storage",
        by_hand(
            "store it again without compression", lambda call: rezipped(call.folder / "ck.pth", zipfile.ZIP_STORED)
        ),
    ),
    Row(
        "a file of a big-endian machine",
        made(
            lambda call: (
                torch.save(ONES, "ck.pth"),
                rezipped(call.folder / "ck.pth", zipfile.ZIP_STORED, big_endian=True),
            ),
            *CONVERT,
            "ck.pth",
            "out",
        ),
        "big-endian",
        by_hand("load and save it once with torch", saved_anew()),
    ),
    Row(
        "a TorchScript archive",
        made(scripted, *CONVERT, "ck.pt", "out"),
        "torchscript",
        by_hand("python -c", run_python),
    ),
    Row(
        "a sparse tensor",
        torch_file({"w": torch.ones(4).to_sparse()}),
        "unsupported-tensor",
        by_hand("to_dense()", saved_anew(torch.Tensor.to_dense)),
    ),
    Row(
        "a misspelt root",
        torch_file({"generator": {"ema": ONES}}, "--root", "generator.emma"),
        "unknown-root",
        lambda call: call.change("generator.emma", call.hint.split()[2].rstrip(",")),
    ),
    Row(
        "weights where no checkpoint has them",
        torch_file({"generator": {"ema": ONES}}),
        "no-tensors",
        lambda call: call.args.extend(call.hint.partition(",")[0].split()[1:]),
    ),
    Row(
        "an optimizer as a model",
        made(
            lambda call: (
                stored(call.folder / "ck.safetensors", {"l.w.exp_avg": torch.ones(2), "l.w.exp_avg_sq": torch.ones(2)}),
                stored(call.folder / "model.safetensors", ONES),
            ),
            *CONVERT,
            "ck.safetensors",
            "out",
        ),
        "not-a-model",
        argument("ck.safetensors", "model.safetensors", "pass the model's weights"),
    ),
]


ROWS = [*TORCH]
