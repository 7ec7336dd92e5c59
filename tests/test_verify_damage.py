"""Whatever happens to a finished directory by accident, ``verify`` names it; an edited receipt is never a bug."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shardmerge as sm
from shardmerge.publish.receipt import SCHEMA
from tests import bit_flips
from tests.conftest import GOLDEN, shardmerge
from tests.receipts import RECEIPT, receipt_of, write_receipt


@pytest.mark.parametrize("form", bit_flips.FORMATS)
def test_a_flipped_bit_of_any_file_is_named(form: str, tmp_path: Path) -> None:
    """``python -m tests.bit_flips`` does the same with thousands."""
    out = bit_flips.scene(tmp_path, form)
    counts = bit_flips.flipped(out, 70)
    assert {"weights", "index", "receipt", "plan"} <= counts.keys()
    for count in counts.values():
        assert count.flips >= 14
        assert (count.unseen, count.bugs, count.unnamed) == ([], [], [])
    sm.verify(out)
    sm.run(tmp_path / "plan.json")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return bit_flips.scene(tmp_path, "safetensors")


def test_every_byte_of_a_receipt_counts(out: Path) -> None:
    """White space too: the digest is of the text."""
    path = out / RECEIPT
    sound = path.read_bytes()
    for at in range(0, len(sound), 97):
        path.write_bytes(sound[:at] + b" " + sound[at:])
        with pytest.raises(sm.VerificationError, match="receipt") as caught:
            sm.verify(out)
        assert caught.value.code == "damaged-receipt"


def test_a_shell_computes_the_digest_of_a_receipt(out: Path) -> None:
    line = f"grep -v '^ \"sha256\":' {out / RECEIPT} | sha256sum"
    found = subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout.split()[0]
    assert found == receipt_of(out)["sha256"]


def test_a_tensor_without_its_checksum_is_not_a_cloned_one(out: Path) -> None:
    sound = receipt_of(out)
    name = next(iter(sound["tensors"]))
    for change in ("nothing", "cloned", "counted"):
        value = json.loads(json.dumps(sound))
        del value["tensors"][name]["crc32"]
        if change != "nothing":
            value["tensors"][name]["cloned"] = {"file": "model.safetensors", "offset": 0}
        if change == "counted":  # what a run writes that did clone it
            value["cloned"] = {"nbytes": value["tensors"][name]["nbytes"], "tensors": 1}
        write_receipt(out, value)
        if change == "counted":
            assert "cloned from their source" in sm.verify(out).unchecked[0]
            continue
        with pytest.raises(sm.VerificationError) as caught:
            sm.verify(out)
        assert caught.value.code == "damaged-receipt"


def _both(value: dict[str, Any], row: dict[str, Any]) -> None:
    row["cloned"] = {"file": "model.safetensors", "offset": 0}
    value["cloned"] = {"nbytes": row["nbytes"], "tensors": 1}


def _outside(value: dict[str, Any], row: dict[str, Any]) -> None:
    value["side_files"]["../plan.json"] = hashlib.sha256((row["out"] / "../plan.json").read_bytes()).hexdigest()


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "a checksum and a clone": (_both, "damaged-receipt"),
    "a file elsewhere": (_outside, "damaged-receipt"),
    "one place for two": (lambda value, row: row.update(offset=_other(value, row)["offset"]), "lies where another"),
    "a shorter tensor": (lambda value, row: row.update(shape=[1]), "damaged-receipt"),
    "another type": (
        lambda value, row: row.update(dtype={"F32": "U32", "BF16": "U16"}[row["dtype"]]),
        "tensors-differ",
    ),
    "another name": (lambda value, row: row.update(stored="x"), "tensors-differ"),
}


def _other(value: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Returns another tensor of the same file."""
    rows: list[dict[str, Any]] = list(value["tensors"].values())
    return next(one for one in rows if one["shard"] == row["shard"] and one is not row)


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_a_receipt_that_contradicts_itself_or_the_files(change: str, out: Path) -> None:
    value, (edit, code) = receipt_of(out), CONTRADICTIONS[change]
    shards = [row["shard"] for row in value["tensors"].values()]
    row = next(row for row in value["tensors"].values() if shards.count(row["shard"]) > 1)
    edit(value, row | {"out": out} if edit is _outside else row)
    write_receipt(out, value)
    with pytest.raises(sm.VerificationError) as caught:
        sm.verify(out)
    assert code in str(caught.value)


def test_a_receipt_of_the_first_versions_is_read(out: Path) -> None:
    value = receipt_of(out)
    del value["sha256"], value["cloned"]
    (out / RECEIPT).write_text(json.dumps(value | {"schema": 4}))
    assert "the receipt itself" in shardmerge("verify", out).stdout
    row = next(iter(value["tensors"].values()))
    without = {key: field for key, field in row.items() if key != "crc32"}
    tensors = value["tensors"] | {name: without for name, one in value["tensors"].items() if one is row}
    (out / RECEIPT).write_text(json.dumps(value | {"schema": 4, "tensors": tensors}))
    assert "does not state 'cloned'" in shardmerge("verify", out, code=3).stderr
    (out / RECEIPT).write_text(json.dumps(value))  # one of now has a digest
    assert "[damaged-receipt]" in shardmerge("verify", out, code=3).stderr


def test_a_receipt_of_a_later_version_is_not_judged(out: Path) -> None:
    write_receipt(out, receipt_of(out) | {"schema": 7, "shardmerge": "9.0"})
    assert "[newer-receipt]" in shardmerge("verify", out, code=3).stderr


ODD = (None, True, -1, 10**40, 1.5, "x", "../x", "/x", "\udc80", [], [None], {}, {"x": {}})


def _edits(value: Any) -> Iterator[Any]:
    """Yields a JSON value with each value in it taken away, and replaced by each odd one."""
    if isinstance(value, dict):
        for key in value:
            rest = {name: other for name, other in value.items() if name != key}
            yield rest
            yield from ({**rest, key: odd} for odd in ODD)
            yield from ({**rest, key: inner} for inner in _edits(value[key]))
    elif isinstance(value, list):
        yield from ([odd, *value[1:]] for odd in ODD)


def test_an_edited_receipt_is_never_a_bug(out: Path) -> None:
    """With the digest made anew. What ``verify`` does not compare, such as notes, may be anything."""
    sound = receipt_of(out)
    sound["tensors"] = {name: {**row, "made": {}} for name, row in sound["tensors"].items()}
    first = next(iter(sound["tensors"]))
    refused = passed = 0
    for number, row in enumerate(_edits(sound["tensors"][first])):
        edited = sound | {"tensors": sound["tensors"] | {first: row}}
        refused, passed = _tried(out, edited, refused, passed)
        assert number < 500
    for edited in _edits({key: value for key, value in sound.items() if key != "tensors"}):
        refused, passed = _tried(out, {"tensors": sound["tensors"]} | edited, refused, passed)
    assert refused > 300
    assert passed > 20  # notes, warnings, versions


def _tried(out: Path, edited: dict[str, Any], refused: int, passed: int) -> tuple[int, int]:
    write_receipt(out, edited)
    try:
        sm.verify(out)
    except sm.ShardmergeError as error:
        assert error.each()[0].exit_code in {2, 3}  # noqa: PT017
        return refused + 1, passed
    return refused, passed + 1


def test_a_receipt_of_a_later_version_says_which(out: Path) -> None:
    write_receipt(out, {**receipt_of(out), "schema": SCHEMA + 1})
    with pytest.raises(sm.VerificationError) as raised:
        sm.verify(out)
    assert raised.value.code == "newer-receipt"
    assert raised.value.where == str(out / RECEIPT)
    assert raised.value.found.startswith(f"schema {SCHEMA + 1}")


@pytest.mark.parametrize("folder", ["", "projector/"])
def test_a_config_of_another_model_is_named_in_every_folder(folder: str, tmp_path: Path) -> None:
    """The receipt was made anew for it: what it says of the tensors is compared with the tensors."""
    for name in ("base_llm", "base_clip"):
        shutil.copytree(GOLDEN / "xtuner" / name, tmp_path / name)
    shutil.copy(GOLDEN / "xtuner" / "single_frozen" / "iter_2.pth", tmp_path)
    (tmp_path / "mapping.yaml").write_text(
        "shardmerge: 1\nsources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}\nuse: xtuner/llava-to-xtuner\n"
    )
    out = tmp_path / "out"
    sm.run(tmp_path / "mapping.yaml", out)
    config = {**json.loads((out / "config.json").read_text()), "intermediate_size": 24}
    (out / f"{folder}config.json").write_text(json.dumps(config))
    receipt = receipt_of(out)
    receipt["side_files"][f"{folder}config.json"] = hashlib.sha256(json.dumps(config).encode()).hexdigest()
    write_receipt(out, receipt)
    with pytest.raises(sm.ShardmergeError) as raised:
        sm.verify(out)
    for error in raised.value.each():
        assert error.where == str(out / f"{folder}config.json")
        assert error.found
        assert error.hint
