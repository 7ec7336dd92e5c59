"""Statements that in-toto's own package reads, and results that OpenSSF model signing signs."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

import shardmerge as sm
from tests import load_environments
from tests.conftest import GOLDEN, shardmerge

MODEL = GOLDEN / "xtuner" / "base_llm"
GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "signing.md"
MAPPING = """\
shardmerge: 1
sources: {llm: base}
output: {path: out/model, dtype: bfloat16}
tensors: {"{rest...}": "llm:{rest...}"}
"""


def read(path: Path) -> Statement:
    """Reads a statement as in-toto does, field by field, its predicate as SLSA describes it; validates it."""
    value = json.loads(path.read_bytes())
    statement = Statement.copy_from_pb(json_format.ParseDict(value, statement_pb2.Statement()))
    statement.validate()
    json_format.ParseDict(value["predicate"], provenance_pb2.Provenance())
    return statement


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(MODEL, tmp_path / "base")
    (tmp_path / "mapping.yaml").write_text(MAPPING)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["safetensors", "bin", "dcp"])
@pytest.mark.parametrize("sha256", [False, True])
def test_a_statement_names_all_files(form: str, sha256: bool, tmp_path: Path) -> None:
    """Whether the run took digests or not; equal results have equal statements, wherever they are."""
    texts = set()
    for number in range(2):
        out = sm.convert(
            MODEL, tmp_path / str(number) / "out", format=form, shard_size="8KB", sync=False, sha256=sha256
        )
        path, verdict = sm.attest(out.path)
        assert path == out.path.with_name("out.intoto.json")
        assert not verdict.unchecked
        subjects = {one.name: one.digest["sha256"] for one in read(path).pb.subject}
        assert subjects == digests(out.path)
        texts.add(path.read_text())
    assert len(texts) == 1
    assert str(tmp_path) not in texts.pop()


def test_a_statement_has_the_mapping(here: Path) -> None:
    result = sm.run("mapping.yaml", sync=False, shard_size="8KB")
    sm.attest(result.path, mapping="mapping.yaml", shard_size="8KB")
    made = json.loads((here / "out" / "model.intoto.json").read_bytes())["predicate"]["buildDefinition"]
    assert made["externalParameters"] == {
        "target": "state-dict",
        "mapping": {"name": "mapping.yaml", "digest": {"sha256": hashlib.sha256(MAPPING.encode()).hexdigest()}},
        "options": {"shard_size": 8000},
    }
    assert made["internalParameters"] == {"plan": result.plan.id}
    source = result.plan.sources[0]
    assert made["resolvedDependencies"] == [
        {"name": "llm", "annotations": {"kind": source.kind, "headersSha256": source.fingerprint}}
    ]
    with pytest.raises(sm.VerificationError) as caught:
        sm.attest(result.path, mapping="mapping.yaml")  # without the option
    assert caught.value.code == "plan-differs"
    assert "[no-effect]" in shardmerge("attest", result.path, "--dtype", "bfloat16", code=2).stderr


def test_only_what_is_right_is_attested(here: Path) -> None:
    out = sm.run("mapping.yaml", sync=False).path
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(9000)
        file.write(b"~")
    with pytest.raises(sm.VerificationError) as caught:
        sm.attest(out)
    assert caught.value.code == "checksum-differs"
    assert not out.with_name("model.intoto.json").exists()


def test_a_statement_replaces_a_statement_alone(here: Path) -> None:
    out = sm.run("mapping.yaml", sync=False).path
    (here / "notes").write_text("mine")
    for place, code in (("notes", "output-exists"), ("nowhere/x", "missing-path")):
        with pytest.raises(sm.ShardmergeError) as caught:
            sm.attest(out, place)
        assert caught.value.code == code
    assert (here / "notes").read_text() == "mine"
    shardmerge("attest", out, "--out", here / "other.json")
    for _ in range(2):
        assert sm.attest(out)[0] == out.with_name("model.intoto.json")
    assert json.loads(shardmerge("attest", out, "--json").stdout)["path"] == f"{out}.intoto.json"


@pytest.fixture(scope="module")
def signing() -> Callable[..., subprocess.CompletedProcess[str]]:
    version = load_environments.MODEL_SIGNING
    if not load_environments.ready(version, "model-signing"):
        pytest.skip(
            f"WARNING: model-signing {version} IS NOT INSTALLED, signatures are not tested: make test builds it"
        )
    program = load_environments.interpreter(version, "model-signing").with_name("model_signing")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)

    return run


@pytest.mark.load
def test_the_guide_is_carried_out(here: Path, signing: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its commands, in its order, with what they print; what was signed has our digests; a flipped bit is refused."""
    blocks = re.findall(r"```console\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    steps = [step for block in blocks for step in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)]
    commands = [command for command, _ in steps]
    assert sum(command.startswith("model_signing") for command in commands) == 2
    for command, shown in steps:
        program, *arguments = command.split()
        if program == "model_signing":
            ran = signing(*arguments)
        elif program == "shardmerge":
            ran = shardmerge(*arguments)
        else:
            ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, (command, ran.stderr)
        printed = re.sub(rf"{re.escape(str(here))}/", "", ran.stdout)
        assert [line for line in shown.splitlines() if line != "..." and line not in printed] == []
    out = here / "out" / "model"
    payload = json.loads(base64.b64decode(json.loads((out / "model.sig").read_bytes())["dsseEnvelope"]["payload"]))
    signed = {one["name"]: one["digest"] for one in payload["predicate"]["resources"]}
    ours = {one.name: one.digest["sha256"] for one in read(here / "out" / "model.intoto.json").pb.subject}
    assert signed == ours
    assert sm.verify(out).unlisted == ("model.sig",)
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    check = next(command for command in commands if command.startswith("model_signing verify"))
    assert signing(*check.split()[1:]).returncode == 1
