"""A finished directory as an in-toto statement: what its files are, and what they were made of.

Statement v1 and the provenance of SLSA, version 1.0 (in-toto/attestation ``spec/v1``, slsa.dev/spec/v1.0/provenance).
Subjects need digests that are cryptographic, and a receipt has those of files of weights only where the run took them:
so a statement is not the receipt. It has the receipt's own digest, and with it all that the receipt says of tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from shardmerge.errors import OutputError, UsageError
from shardmerge.plan.json_values import fields, text
from shardmerge.plan.value import Plan
from shardmerge.prepare.options import Options
from shardmerge.publish.receipt import read_receipt
from shardmerge.publish.recorded import read_recorded
from shardmerge.publish.remaking import check_plan
from shardmerge.publish.verify import Verdict
from shardmerge.storage.reading import SourceFile, read_whole
from shardmerge.storage.writing import write_lines
from shardmerge.tensors.file_roles import RECEIPT

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "https://shardmerge.github.io/shardmerge/guides/signing/#the-build-type"
BUILDER = "https://github.com/shardmerge/shardmerge"

_SUFFIX = ".intoto.json"

# A statement is known by its first bytes.
_HEAD = 64

# Options that are parameters of a result, as `run` and `convert` take them.
_PARAMETERS = ("dtype", "shard_size", "format", "root", "files", "partial")


def statement(folder: Path, verdict: Verdict, mapping: Mapping[str, object] | None = None) -> dict[str, object]:
    """Returns the statement of a directory that was just verified; no times, hosts or absolute paths.

    Parameters
    ----------
    folder
        The directory.
    verdict
        With the digests of all files of weights.
    mapping
        What ``mapping_parameters`` returns, where the mapping is known.
    """
    receipt, recorded = read_receipt(folder), read_recorded(folder)
    own = hashlib.sha256(read_whole(folder / RECEIPT)).hexdigest()
    digests = {**recorded.side_files, **verdict.digests, RECEIPT: own}
    sources = [(name, fields(source)) for name, source in sorted(fields(receipt["sources"]).items())]
    parameters: dict[str, object] = {"target": text(receipt["target"]), **(mapping or {})}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": parameters,
                "internalParameters": {"plan": recorded.plan},
                "resolvedDependencies": [_source(name, source) for name, source in sources],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"shardmerge": text(receipt["shardmerge"])}}},
        },
    }


def _source(name: str, source: Mapping[str, object]) -> dict[str, object]:
    """A source: nobody read all of its bytes, so it has no digest, but that of its names, types, shapes and headers."""
    return {"name": name, "annotations": {"kind": source["kind"], "headersSha256": source["fingerprint"]}}


def mapping_parameters(folder: Path, path: Path, plan: Plan, options: Options) -> dict[str, object]:
    """Returns the mapping of a run, and the options that were given with it, as parameters.

    Raises
    ------
    VerificationError
        ``plan-differs``: the directory is not the result of this mapping with these options.
    """
    check_plan(folder, read_recorded(folder).plan, plan)
    given = {name: getattr(options, name) for name in _PARAMETERS}
    said = {name: value if isinstance(value, (bool, int)) else str(value) for name, value in given.items() if value}
    digest = hashlib.sha256(read_whole(path)).hexdigest()
    return {"mapping": {"name": path.name, "digest": {"sha256": digest}}, "options": said}


def statement_path(folder: Path, given: str | Path | None) -> Path:
    """Returns where the statement of a directory goes: beside it, unless another path is given.

    Raises
    ------
    UsageError
        ``missing-path``: no such directory.
    OutputError
        ``output-exists``: what is there is no statement.
    """
    path = Path(given).expanduser().absolute() if given else folder.with_name(f"{folder.name}{_SUFFIX}")
    if not path.parent.is_dir():
        hint, what = f"make it first: mkdir -p {path.parent}", "there is no such directory for the statement"
        raise UsageError("missing-path", what, where=str(path.parent), hint=hint)
    if path.exists() and not _is_statement(path):
        what = "there is something at this path, and it is no statement"
        raise OutputError(
            "output-exists", what, where=str(path), hint="write the statement to another file: --out FILE"
        )
    return path


def _is_statement(path: Path) -> bool:
    if not path.is_file():
        return False
    with SourceFile(path) as file:
        return STATEMENT.encode() in file.read(0, min(_HEAD, file.size))


def write_statement(path: Path, value: Mapping[str, object]) -> None:
    """Writes a statement, in the place of an earlier one."""
    write_lines(path, [json.dumps(value, indent=1, sort_keys=True), "\n"])
