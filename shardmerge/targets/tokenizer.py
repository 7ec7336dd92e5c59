"""Adds special tokens to a tokenizer by editing its files; nothing of it is loaded, and no tokenizer library
is needed.

tokenizer.json is not parsed as a whole: LLaMA-3's has 9 MB and would cost ten times that. A scan that knows
strings and brackets finds the two places that matter, and the edited file is the old one with a few bytes
spliced in.

Ids follow the tokenizers library (``added_vocabulary.rs``): a token that the model knows keeps its id; any
other gets the next one after the model's vocabulary and all tokens added before. When a file is loaded its
tokens are added again in order by that rule, whatever ids the file states, and so are they here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets.architectures import JsonObject, dump, load_object
from shardmerge.tensors import Extent, ReadSideFile, SideFile
from shardmerge.tensors.file_roles import left_behind

# The largest in use has 33 MB. The bytes are held while they are scanned, and planning has a memory promise
# to keep.
_MAX_BYTES = 48 << 20

# All that belongs to a tokenizer, by how the name begins or ends.
_PREFIXES = (
    "tokenizer", "special_tokens_map.json", "added_tokens.json", "vocab", "merges.txt", "chat_template", "spiece.model",
    "sentencepiece", "additional_chat_templates/", "tokenization_", "source.spm", "target.spm", "bpe.codes",
)  # fmt: skip
_SUFFIXES = (".tiktoken", ".model", ".bpe")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_VOCABULARIES = ("tokenizer.json", *_SENTENCEPIECE, "vocab.json", "vocab.txt")

_STRING = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_STRING_HERE = re.compile(_STRING, re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^\s,\]}]+")
# One entry of a vocabulary with what follows it: "piece": 17, or ["piece", -3.5],
_PAIR = re.compile(rb"\s*" + _STRING + rb"\s*:\s*(\d+)\s*([,}])", re.DOTALL)
_SCORED = re.compile(rb"\s*\[\s*" + _STRING + rb"\s*,\s*([-+.0-9eE]+)\s*\]\s*([,\]])", re.DOTALL)


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


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What the scan keeps of a model's vocabulary: its size, and the ids of the tokens asked for."""

    size: int
    ids: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Added:
    """The added tokens of a tokenizer after loading: their ids, and which of them are new."""

    ids: Mapping[str, int]
    new: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Names:
    """What tokenizer_config.json is to name; ``""`` for what it names already."""

    pad_token: str
    default_class: str
    processor_class: str


@dataclass(frozen=True, slots=True)
class _Insertion:
    """Where new entries go: the end of the array ``added_tokens``, or the start of a file that has none."""

    position: int
    before: bytes
    after: bytes


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
    stated = _stated_tokens(side_files, read)
    if "tokenizer.json" in side_files:
        tokenizer_json, added = _edit_tokenizer_json(side_files["tokenizer.json"], read, tokens)
        edited = [tokenizer_json]
    else:
        vocabulary = _slow_vocabulary(side_files, read, {*stated, *tokens}) or _Vocabulary(vocab_size, {})
        added = _add_after(stated, vocabulary, tokens)
        edited = []
    names = _Names(pad_token, default_class, processor_class)
    edited += _edit_configs(side_files, read, added, names)
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
        present, vocabulary = _scan_file(side_files["tokenizer.json"], read, (token,))[1:]
        return _number(present, vocabulary, {}).get(token, vocabulary.ids.get(token))
    stated = _stated_tokens(side_files, read)
    known = _slow_vocabulary(side_files, read, {*stated, token})
    return stated.get(token, known.ids.get(token) if known else None)


def has_tokenizer(side_files: Mapping[str, Extent]) -> bool:
    """Whether a tokenizer's vocabulary is among these files."""
    return any(name in side_files for name in _VOCABULARIES)


# ---- tokenizer.json


def _edit_tokenizer_json(extent: Extent, read: ReadSideFile, tokens: Sequence[str]) -> tuple[SideFile, _Added]:
    """Returns tokenizer.json with the new entries, and all added tokens as a loader numbers them."""
    place, present, vocabulary = _scan_file(extent, read, tokens)
    added = _add(present, vocabulary, tokens)
    if not added.new:
        return SideFile("tokenizer.json", (extent,)), added
    entries = [{"id": added.ids[token], "content": token, **_entry()} for token in added.new]
    new = place.before + b",\n".join(map(_indented, entries)) + place.after
    head, tail = extent.slice(0, place.position), extent.slice(place.position, extent.nbytes - place.position)
    return SideFile("tokenizer.json", (head, new, tail)), added


def _scan_file(extent: Extent, read: ReadSideFile, tokens: Sequence[str]) -> tuple[_Insertion, list[str], _Vocabulary]:
    data = _read_capped(extent, read)
    try:
        return _scan(data, tokens)
    except _ScanError as error:
        raise TargetError(
            "bad-tokenizer-json",
            "tokenizer.json is not laid out as the tokenizers library writes it",
            where=f"{extent.file}, byte {error.position}",
            found=repr(data[error.position : error.position + 40]),
            expected=error.expected,
        ) from error


def _read_capped(extent: Extent, read: ReadSideFile) -> bytes:
    if extent.nbytes > _MAX_BYTES:
        raise TargetError(
            "side-file-too-large",
            "a tokenizer file is larger than any such file should be",
            where=extent.file,
            found=f"{extent.nbytes} bytes",
            expected=f"at most {_MAX_BYTES} bytes",
        )
    return read(extent)


def _entry() -> JsonObject:
    """The flags that XTuner gives ``<image>`` and ``<pad>``, in the order of the tokenizers library."""
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _indented(entry: JsonObject) -> bytes:
    """As the tokenizers library indents an element of ``added_tokens``."""
    return b"\n".join(b"    " + line for line in json.dumps(entry, indent=2, ensure_ascii=False).encode().split(b"\n"))


class _ScanError(ValueError):
    """The scan met something that does not belong where it stands."""

    def __init__(self, position: int, expected: str) -> None:
        super().__init__(expected)
        self.position = position
        self.expected = expected


def _scan(data: bytes, tokens: Sequence[str]) -> tuple[_Insertion, list[str], _Vocabulary]:
    """Returns where to insert, the added tokens in order, and what the model's vocabulary knows of all."""
    start = _after_space(data, 0)
    found = _find_members(data, start, ("added_tokens", "model"))
    if "model" not in found:
        raise _ScanError(start, "a member `model`")
    place, present = _added_array(data, start, found.get("added_tokens"))
    inner = _find_members(data, found["model"], ("vocab",))
    if "vocab" not in inner:
        raise _ScanError(found["model"], "a member `vocab` of `model`")
    return place, present, _scan_vocabulary(data, inner["vocab"], {*present, *tokens})


def _added_array(data: bytes, start: int, array: int | None) -> tuple[_Insertion, list[str]]:
    if array is None:
        return _Insertion(start + 1, b'\n  "added_tokens": [\n', b"\n  ],"), []
    end = _value_end(data, array)
    try:
        entries = json.loads(data[array:end])
        contents = [entry["content"] for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _ScanError(array, "a list of added tokens, each with its `content`") from error
    if not isinstance(entries, list) or not all(isinstance(content, str) for content in contents):
        raise _ScanError(array, "a list of added tokens, each with its `content`")
    if not entries:
        return _Insertion(array + 1, b"\n", b"\n  "), []
    last = len(data[array : end - 1].rstrip()) + array  # behind the last entry, before the space of the bracket
    return _Insertion(last, b",\n", b""), contents


def _find_members(data: bytes, start: int, wanted: Sequence[str]) -> dict[str, int]:
    """Returns where the values of an object's members begin, and stops looking once it has all that are
    wanted.
    """
    found: dict[str, int] = {}
    for key, position in _members(data, start):
        name = key.decode("utf-8", "replace")
        if name in wanted:
            found[name] = position
        if len(found) == len(wanted):
            break
    return found


def _members(data: bytes, start: int) -> Iterator[tuple[bytes, int]]:
    """Yields the members of the object at ``start``: the key, and the position of the value."""
    position = _after(data, start, b"{")
    while data[position : position + 1] != b"}":
        key = _STRING_HERE.match(data, position)
        if key is None:
            raise _ScanError(position, "a key")
        value = _after(data, _after_space(data, key.end()), b":")
        yield key[1], value
        position = _after_space(data, _value_end(data, value))
        if data[position : position + 1] == b",":
            position = _after_space(data, position + 1)
        elif data[position : position + 1] != b"}":
            raise _ScanError(position, "a comma or a closing brace")


def _after_space(data: bytes, position: int) -> int:
    match = _SPACE.match(data, position)
    return match.end() if match else position


def _after(data: bytes, position: int, mark: bytes) -> int:
    """Returns the position behind ``mark`` and the space that follows it."""
    if data[position : position + 1] != mark:
        raise _ScanError(position, f"`{mark.decode()}`")
    return _after_space(data, position + 1)


def _value_end(data: bytes, start: int) -> int:
    """Returns the position behind the value at ``start``."""
    if data[start : start + 1] in (b"{", b"["):
        return _bracket_end(data, start)
    match = _STRING_HERE.match(data, start) or _SCALAR.match(data, start)
    if match is None:
        raise _ScanError(start, "a value")
    return match.end()


def _bracket_end(data: bytes, start: int) -> int:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(data, start):
        mark = data[match.start()]
        if mark in b"[{":
            depth += 1
        elif mark in b"]}":
            depth -= 1
            if depth == 0:
                return match.end()
    raise _ScanError(start, "a closing bracket before the end of the file")


def _scan_vocabulary(data: bytes, start: int, wanted: Iterable[str]) -> _Vocabulary:
    """Counts a vocabulary: an object of ids (BPE, WordPiece, WordLevel), or a list of scored pieces
    (Unigram).
    """
    names = {token.encode("utf-8", "surrogatepass"): token for token in wanted}
    opening = data[start : start + 1]
    if opening not in (b"{", b"["):
        raise _ScanError(start, "an object of tokens and ids, or a list of pieces and scores")
    listed = opening == b"["
    ids: dict[str, int] = {}
    size = 0
    for key, number in _vocabulary_entries(data, start, listed=listed):
        if (token := names.get(key)) is not None:
            ids[token] = size if listed else int(number)
        size += 1
    return _Vocabulary(size, ids)


def _vocabulary_entries(data: bytes, start: int, *, listed: bool) -> Iterator[tuple[bytes, bytes]]:
    position = _after_space(data, start + 1)
    if data[position : position + 1] in (b"}", b"]"):
        return
    for match in (_SCORED if listed else _PAIR).finditer(data, position):
        if match.start() != position:
            break
        position = match.end()
        yield _unescaped(match[1]), match[2]
        if match[3] != b",":
            return
    raise _ScanError(position, "an entry of the vocabulary")


def _unescaped(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        return str(json.loads(b'"' + key + b'"')).encode("utf-8", "surrogatepass")
    except ValueError:  # not valid JSON, and so none of the tokens looked for
        return key


# ---- ids


def _add(present: Sequence[str], vocabulary: _Vocabulary, tokens: Sequence[str]) -> _Added:
    """Numbers the tokens of a fast tokenizer in the order in which the library adds them."""
    return _add_after(_number(present, vocabulary, {}), vocabulary, tokens)


def _add_after(stated: Mapping[str, int], vocabulary: _Vocabulary, tokens: Sequence[str]) -> _Added:
    return _Added(_number(tokens, vocabulary, stated), tuple(token for token in tokens if token not in stated))


def _number(tokens: Iterable[str], vocabulary: _Vocabulary, before: Mapping[str, int]) -> dict[str, int]:
    ids = dict(before)
    following = max(vocabulary.size, max(ids.values(), default=-1) + 1)
    for token in tokens:
        if token and token not in ids:
            ids[token] = vocabulary.ids.get(token, following)
            following = max(following, ids[token] + 1)
    return ids


# ---- tokenizers without tokenizer.json


def _stated_tokens(side_files: Mapping[str, Extent], read: ReadSideFile) -> dict[str, int]:
    """Returns the added tokens with the ids that added_tokens.json and tokenizer_config.json state."""
    config = _load(side_files, read, "tokenizer_config.json") or {}
    stated = _load(side_files, read, "added_tokens.json") or {}
    ids = {token: number for token, number in stated.items() if isinstance(number, int)}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(content, str) and str(number).isdecimal():
            ids[content] = int(number)
    return ids


def _slow_vocabulary(side_files: Mapping[str, Extent], read: ReadSideFile, wanted: Iterable[str]) -> _Vocabulary | None:
    """Returns the vocabulary of a tokenizer without tokenizer.json, or ``None`` for a file of another kind.

    It matters that this is the tokenizer's own size: transformers converts such a tokenizer to a fast one by
    counting on from there, and a model whose vocabulary is padded has more rows than the tokenizer has
    tokens.
    """
    for name in _SENTENCEPIECE:
        if name in side_files:
            pieces = _sentencepieces(_read_capped(side_files[name], read))
            return _counted(pieces, wanted) if pieces else None
    if "vocab.json" in side_files:
        data = _read_capped(side_files["vocab.json"], read)
        try:
            return _scan_vocabulary(data, _after_space(data, 0), wanted)
        except _ScanError:
            return None
    return _counted(_read_capped(side_files["vocab.txt"], read).splitlines(), wanted)


def _counted(pieces: Sequence[bytes], wanted: Iterable[str]) -> _Vocabulary:
    names = {token.encode("utf-8", "surrogatepass"): token for token in wanted}
    return _Vocabulary(len(pieces), {names[piece]: index for index, piece in enumerate(pieces) if piece in names})


def _sentencepieces(data: bytes) -> list[bytes]:
    """Returns the pieces of a SentencePiece model, or nothing for a file that is none.

    A ``ModelProto`` (sentencepiece_model.proto) is a protobuf message whose field 1, repeated, is a piece,
    and a piece's field 1 is its text. All fields of the message are length-delimited; so the first bytes of a
    piece are 0x0A, its length, 0x0A, the text's length.
    """
    pieces = []
    position = 0
    try:
        while position < len(data):
            tag, position = _varint(data, position)
            length, position = _varint(data, position)
            if tag & 7 != 2 or position + length > len(data):
                return []
            if tag == 0x0A:
                pieces.append(_piece_text(data, position))
            position += length
    except IndexError:
        return []
    return pieces


def _piece_text(data: bytes, position: int) -> bytes:
    if data[position] != 0x0A:
        return b""
    length, position = _varint(data, position + 1)
    return data[position : position + length]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a protobuf varint and the position behind it: seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            return value, position


# ---- the small files


def _load(side_files: Mapping[str, Extent], read: ReadSideFile, name: str) -> JsonObject | None:
    return load_object(side_files[name], read) if name in side_files else None


def _edit_configs(side_files: Mapping[str, Extent], read: ReadSideFile, added: _Added, names: _Names) -> list[SideFile]:
    slow_only = "tokenizer.json" not in side_files
    special = _load(side_files, read, "special_tokens_map.json")
    legacy = _load(side_files, read, "added_tokens.json")
    config = _load(side_files, read, "tokenizer_config.json") or {}
    if slow_only and "added_tokens_decoder" not in config:
        config = _with_decoder(config, special or {}, legacy or {})
    edited = {"tokenizer_config.json": _edit_config(config, added, names)}
    if special is not None:
        edited["special_tokens_map.json"] = _edit_special_tokens(special, names.pad_token)
    if legacy is not None or slow_only:
        edited["added_tokens.json"] = {**(legacy or {}), **{token: added.ids[token] for token in added.new}}
    return [SideFile(name, (dump(value, sort=False),)) for name, value in edited.items()]


def _with_decoder(config: JsonObject, special: JsonObject, legacy: JsonObject) -> JsonObject:
    """Returns a config with ``added_tokens_decoder``, and with what transformers stops reading once it is
    there.

    Without it, transformers 4.x takes the special tokens from special_tokens_map.json and the added ones from
    added_tokens.json (``PreTrainedTokenizerBase._from_pretrained``).
    """
    texts = {name: _content(token) for name, token in special.items()}
    listed = (value if isinstance(value, list) else [value] for value in texts.values())
    named = {text for texts_of_name in listed for text in texts_of_name if isinstance(text, str)}
    decoder = {
        str(number): _entry() | {"content": token, "normalized": token not in named, "special": token in named}
        for token, number in legacy.items()
    }
    return {**config, **texts, "added_tokens_decoder": decoder}


def _content(token: object) -> object:
    """Returns the text of a special token, or of each in a list; anything else as it is."""
    if isinstance(token, list):
        return [_content(each) for each in token]
    return token.get("content") if isinstance(token, dict) else token


def _edit_config(config: JsonObject, added: _Added, names: _Names) -> JsonObject:
    edited = _without_v5_class(config)
    decoder = edited.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        new = {str(added.ids[token]): {"content": token, **_entry()} for token in added.new}
        edited["added_tokens_decoder"] = {**decoder, **new}
    if names.pad_token:
        edited["pad_token"] = names.pad_token
    # Where no class is named transformers goes by config.json, and that one may now say llava.
    edited.setdefault("tokenizer_class", names.default_class)
    if edited["tokenizer_class"] == "PreTrainedTokenizerFast":
        # The generic class of 4.x also makes token_type_ids, which no LLaVA's generate() takes.
        edited.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if "processor_class" in edited and names.processor_class:
        edited["processor_class"] = names.processor_class
    return edited


def _without_v5_class(config: JsonObject) -> JsonObject:
    """Returns the config of a tokenizer saved by transformers 5 so that 4.x loads it too.

    4.x has no class TokenizersBackend, and no list of ``extra_special_tokens``: that was
    ``additional_special_tokens``, which 5.x still reads.
    """
    edited = dict(config)
    if edited.get("tokenizer_class") == "TokenizersBackend":
        edited["tokenizer_class"] = "PreTrainedTokenizerFast"
        edited.pop("backend", None)
    if isinstance(edited.get("extra_special_tokens"), list):
        edited.setdefault("additional_special_tokens", edited.pop("extra_special_tokens"))
    return edited


def _edit_special_tokens(special: JsonObject, pad_token: str) -> JsonObject:
    """Sets the pad token in the style of the file: bare strings, or objects with flags."""
    if not pad_token:
        return special
    if not any(isinstance(value, dict) for value in special.values()):
        return {**special, "pad_token": pad_token}
    flags = {key: value for key, value in _entry().items() if key != "special"}
    return {**special, "pad_token": {"content": pad_token, **flags}}
