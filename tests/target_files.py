"""Checkpoint directories for the tests of targets: written with the real libraries, read as catalogs."""

import json
from pathlib import Path

import pytest

from shardmerge.dtypes import DTYPES
from shardmerge.tensors import Catalog, Extent, TensorEntry

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")


def read(extent):
    with Path(extent.file).open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def catalog(folder, tensors=(), facts=None, training_config="", **files):
    """A checkpoint directory with these JSON files, and whatever lies there already; tensors are names and shapes."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    side = {path.name: Extent(str(path), 0, path.stat().st_size) for path in sorted(folder.iterdir())}
    entries = {name: TensorEntry(name, DTYPES["BF16"], tuple(shape), ()) for name, shape in dict(tensors).items()}
    return Catalog(
        str(folder), "safetensors", entries, side_files=side, facts=facts or {}, training_config=training_config
    )


def save_tokenizer(folder, size, added=("<unk>", "<s>", "</s>")):
    folder.mkdir(exist_ok=True)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{index}": index for index in range(3, size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(added))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def content(file):
    return b"".join(part if isinstance(part, bytes) else read(part) for part in file.parts)


def written(expectation, folder):
    """The side files of an expectation, in a directory."""
    folder.mkdir()
    for file in expectation.side_files:
        (folder / file.name).parent.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(content(file))
    return folder


def side_file(expectation, name):
    (file,) = [file for file in expectation.side_files if file.name == name]
    return json.loads(content(file))
