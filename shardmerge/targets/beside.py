"""Side files of a result, by one rule for all targets: what goes along, what is left behind and why, what is missing.

All small files of a model's directory go where the model goes, but for weights, indexes, state and records of a
training run. A target that makes another model of it writes config and processor itself, and takes the tokenizer; the
card (README) describes the other model and stays behind, a license goes along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.json_limits import shallow, weighed
from shardmerge.targets.expectation import Expectation, FileChoice
from shardmerge.tensors import Extent, ReadSideFile, SideFile
from shardmerge.tensors.file_roles import CONFIG, comes_along, left_behind

_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
# JSON files that name classes of the model's own code, as ``module.Class`` (transformers, ``dynamic_module_utils.py``).
_WITH_CODE = (
    CONFIG, "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "image_processor_config.json",
)  # fmt: skip
# ``from .module import x`` at the start of a line; one inside of `try` may be missing.
_RELATIVE = re.compile(rb"^from \.([A-Za-z_]\w*)(?:\.\w+)* import ", re.MULTILINE)
# transformers reads a tokenizer from one of these; ``*.tiktoken`` and what the model's own code reads come on top.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab*", "*.spm", "*.tiktoken", "tokenization_*.py", "sentencepiece*")


def is_legal(path: str) -> bool:
    """Tells whether a file holds terms of use: they go with a model and with what is made of it."""
    return any(fnmatchcase(path, pattern) for pattern in _LEGAL)


def with_side_files(
    expectation: Expectation, read: ReadSideFile, choice: FileChoice | None = None, where: str = ""
) -> Expectation:
    """Returns the expectation with all side files that go along, those left behind, and warnings for missing ones.

    Parameters
    ----------
    expectation
        As the target made it: ``beside`` and ``same_model`` say what there is and what the target makes of it.
    read
        Reads a side file.
    choice
        What the user says of files; None for the rule alone.
    where
        The place in the mapping where that is said.

    Raises
    ------
    TargetError
        ``file-matches-nothing``: a pattern that fits no file. ``needed-file``: config.json is left out.
    """
    choice = choice or FileChoice()
    raise_all(_idle(expectation, choice, where))
    files = {file.name: file for file in expectation.side_files}
    behind: dict[str, str] = {}
    for name, extent in expectation.beside.items():
        reason = "" if name in files else _reason(expectation, name)
        if choice.mode == "all" or _fits(name, choice.include):
            reason = ""
        if reason:
            behind[name] = reason
        elif name not in files:
            files[name] = SideFile(name, (extent,))
    for name in [name for name, file in files.items() if _is_refused(file, choice)]:
        del files[name]
        behind[name] = "as the mapping says"
    kept = tuple(files.values())
    warnings = (*expectation.warnings, *_missing_texts(kept, read))
    return replace(expectation, side_files=kept, left_behind=tuple(sorted(behind.items())), warnings=warnings)


def _reason(expectation: Expectation, name: str) -> str:
    """Returns why a file does not go along, or ``""``."""
    if left_behind(name):
        return left_behind(name)
    if not expectation.same_model:
        return "" if is_legal(name) else "not part of what this target writes"
    return "" if comes_along(name, model_folder=CONFIG in expectation.beside) else "not known as part of a model"


def _is_refused(file: SideFile, choice: FileChoice) -> bool:
    if _fits(file.name, choice.exclude):
        return True
    copied = all(isinstance(part, Extent) for part in file.parts)
    return choice.mode == "none" and copied and file.name != CONFIG and not _fits(file.name, choice.include)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _idle(expectation: Expectation, choice: FileChoice, where: str) -> Iterator[ShardmergeError]:
    names = {*expectation.beside, *(file.name for file in expectation.side_files)}
    for pattern in (*choice.include, *choice.exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            yield TargetError(
                "file-matches-nothing",
                f"`files` names {pattern!r}, which matches no file beside the weights",
                where=where,
                found=", ".join(sorted(names)[:12]),
                hint="remove the pattern, or correct it; weights are not side files",
            )
    if _fits(CONFIG, choice.exclude) and CONFIG in names:
        yield TargetError(
            "needed-file",
            "`files` leaves out config.json, which is needed to load the model",
            where=where,
            hint=f"write patterns that do not fit {CONFIG}",
        )


# ---- texts that the result names and does not have


@dataclass(frozen=True, slots=True)
class _Named:
    """A file that another one names."""

    file: str
    by: str


def _missing_texts(files: Sequence[SideFile], read: ReadSideFile) -> Iterator[str]:
    names = {file.name for file in files}
    found = {file.name: _object(file, read) for file in files if file.name in (*_WITH_CODE, "modules.json")}
    for named in (*_named(found), *_imported(files, read)):
        if named.file not in names and not any(name.startswith(f"{named.file}/") for name in names):
            yield f"{named.by} names {named.file}, which does not lie beside it: the result does not load without it"
    tokenizer = "tokenizer_config.json" in names
    if tokenizer and not any(_fits(name, _VOCABULARIES) for name in names):
        yield "tokenizer_config.json comes without a vocabulary: no tokenizer.json, *.model, vocab.* or *.tiktoken"


def _named(found: Mapping[str, object]) -> Iterator[_Named]:
    for file, value in found.items():
        if file == "modules.json":
            yield from (_Named(path, file) for path in _module_folders(value))
        elif isinstance(value, dict):
            for reference in sorted(set(_references(value))):
                yield _Named(f"{reference.rpartition('.')[0]}.py", f"{file} (auto_map)")


def _imported(files: Sequence[SideFile], read: ReadSideFile) -> Iterator[_Named]:
    """Yields the modules beside it that a model's code imports, as transformers looks for them."""
    for file in files:
        if file.name.endswith(".py") and "/" not in file.name:
            for match in _RELATIVE.finditer(file.content(read)):
                name = match[1].decode("ascii")
                if not any(other.name.startswith(f"{name}/") for other in files):
                    yield _Named(f"{name}.py", file.name)


def _references(value: Mapping[str, object]) -> Iterator[str]:
    """Yields ``module.Class`` of ``auto_map`` and custom pipelines; ``repository--module.Class`` lies elsewhere."""
    table = value.get("auto_map")
    pipelines = value.get("custom_pipelines")
    texts = list(table.values()) if isinstance(table, dict) else []
    texts += (
        [one.get("impl") for one in pipelines.values() if isinstance(one, dict)] if isinstance(pipelines, dict) else []
    )
    for text in texts:
        for each in text if isinstance(text, list) else (text,):
            if isinstance(each, str) and "--" not in each and "." in each and len(each) < 200:
                yield each


def _module_folders(value: object) -> Iterator[str]:
    """Yields the folders that modules.json of sentence-transformers names; its first module is the model itself."""
    for module in value if isinstance(value, list) else ():
        path = module.get("path") if isinstance(module, dict) else None
        kind = module.get("type") if isinstance(module, dict) else None
        if isinstance(path, str) and path and not str(kind).endswith(".Normalize"):
            yield path


def _object(file: SideFile, read: ReadSideFile) -> object:
    try:
        return shallow(json.loads(weighed(file.content(read))))
    except (ValueError, RecursionError):
        return None
