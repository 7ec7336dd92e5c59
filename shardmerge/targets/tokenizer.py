"""Adds special tokens to a tokenizer by editing its files; none is loaded, and no tokenizer library is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardmerge.targets.slow_tokenizer import SENTENCEPIECE, slow_vocabulary, stated_tokens
from shardmerge.targets.token_ids import TokenVocabulary, add_after, numbered
from shardmerge.targets.tokenizer_configs import ConfigNames, edit_configs
from shardmerge.targets.tokenizer_json import edit_tokenizer_json, scan_file
from shardmerge.tensors import Extent, ReadSideFile, SideFile
from shardmerge.tensors.file_roles import left_behind

# All that belongs to a tokenizer, by how the name begins or ends.
_PREFIXES = (
    "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab", "merges.txt", "chat_template", "spiece.model",
    "sentencepiece", "additional_chat_templates/", "tokenization_", "source.spm", "target.spm", "bpe.codes",
)  # fmt: skip
_SUFFIXES = (".tiktoken", ".model", ".bpe")
_VOCABULARIES = ("tokenizer.json", *SENTENCEPIECE, "vocab.json", "vocab.txt")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """A tokenizer with its new tokens.

    Attributes
    ----------
    ids
        The id of every token asked for.
    files
        What to write; empty where the source has no tokenizer.
    """

    ids: Mapping[str, int]
    files: tuple[SideFile, ...]


def copies(side_files: Mapping[str, Extent]) -> tuple[SideFile, ...]:
    """Returns a tokenizer's files as they are."""
    return tuple(SideFile(name, (extent,)) for name, extent in side_files.items() if is_tokenizer_file(name))


def is_tokenizer_file(name: str) -> bool:
    """Tells whether a side file belongs to a tokenizer: its vocabulary, templates, or its own code."""
    return not left_behind(name) and (name.startswith(_PREFIXES) or name.endswith(_SUFFIXES))


def add_tokens(
    side_files: Mapping[str, Extent],
    read: ReadSideFile,
    tokens: Sequence[str],
    *,
    vocab_size: int,
    default_class: str,
    pad_token: str = "",
    processor_class: str = "",
) -> TokenizerFiles:
    """Returns a tokenizer's files with special tokens added, in order, and a pad token set.

    Parameters
    ----------
    side_files, read
        The files beside the base's weights.
    tokens
        What to add; a token that the tokenizer has keeps its id.
    vocab_size
        The model's, which stands in for the tokenizer's where that cannot be read.
    default_class
        The tokenizer class that the base's model type implies where tokenizer_config.json names none.
    pad_token
        ``""`` leaves it as it is.
    processor_class
        Replaces the one that tokenizer_config.json may name, ``""`` leaves it.

    Raises
    ------
    TargetError
        ``bad-tokenizer-json``, ``bad-json``, ``side-file-too-large``.
    """
    if not has_tokenizer(side_files):
        return TokenizerFiles({token: vocab_size + index for index, token in enumerate(tokens)}, ())
    stated = stated_tokens(side_files, read)
    if "tokenizer.json" in side_files:
        tokenizer_json, added = edit_tokenizer_json(side_files["tokenizer.json"], read, tokens)
        edited = [tokenizer_json]
    else:
        vocabulary = slow_vocabulary(side_files, read, {*stated, *tokens}) or TokenVocabulary(vocab_size, {})
        added = add_after(stated, vocabulary, tokens)
        edited = []
    names = ConfigNames(pad_token, default_class, processor_class)
    edited += edit_configs(side_files, read, added, names)
    made = {file.name for file in edited}
    copied = [file for file in copies(side_files) if file.name not in made]
    return TokenizerFiles({token: added.ids[token] for token in tokens}, tuple(edited + copied))


def token_id(side_files: Mapping[str, Extent], read: ReadSideFile, token: str) -> int | None:
    """Returns the id of a token as a loader has it; ``None`` where the tokenizer has none, or where there is none.

    Raises
    ------
    TargetError
        ``bad-tokenizer-json``, ``bad-json``, ``side-file-too-large``.
    """
    if not has_tokenizer(side_files):
        return None
    if "tokenizer.json" in side_files:
        present, vocabulary = scan_file(side_files["tokenizer.json"], read, (token,))[1:]
        return numbered(present, vocabulary, {}).get(token, vocabulary.ids.get(token))
    stated = stated_tokens(side_files, read)
    known = slow_vocabulary(side_files, read, {*stated, token})
    return stated.get(token, known.ids.get(token) if known else None)


def has_tokenizer(side_files: Mapping[str, Extent]) -> bool:
    """Whether a tokenizer's vocabulary is among these files."""
    return any(name in side_files for name in _VOCABULARIES)
