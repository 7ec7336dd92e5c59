"""tokenizer.json, edited where new tokens go.

It is not parsed as a whole: LLaMA-3's has 9 MB and would cost ten times that. A scan that knows strings and
brackets finds the two places that matter, and the edited file is the old one with a few bytes spliced in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.targets.token_ids import AddedTokens, TokenVocabulary, add_in_order, special_flags
from shardmerge.tensors import Extent, ReadSideFile, SideFile

# The largest in use has 33 MB. The bytes are held while they are scanned, and planning has a memory promise
# to keep.
_MAX_BYTES = 48 << 20

_STRING = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
_STRING_HERE = re.compile(_STRING, re.DOTALL)
_STRING_OR_BRACKET = re.compile(_STRING + rb"|[\[\]{}]", re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")
_SCALAR = re.compile(rb"[^\s,\]}]+")
# One entry of a vocabulary with what follows it: "piece": 17, or ["piece", -3.5],
_PAIR = re.compile(rb"\s*" + _STRING + rb"\s*:\s*(\d+)\s*([,}])", re.DOTALL)
_SCORED = re.compile(rb"\s*\[\s*" + _STRING + rb"\s*,\s*([-+.0-9eE]+)\s*\]\s*([,\]])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Insertion:
    """Where new entries go: the end of the array ``added_tokens``, or the start of a file that has none."""

    position: int
    before: bytes
    after: bytes


def edit_tokenizer_json(extent: Extent, read: ReadSideFile, tokens: Sequence[str]) -> tuple[SideFile, AddedTokens]:
    """Returns tokenizer.json with the new entries, and all added tokens as a loader numbers them."""
    place, present, vocabulary = scan_file(extent, read, tokens)
    added = add_in_order(present, vocabulary, tokens)
    if not added.new:
        return SideFile("tokenizer.json", (extent,)), added
    entries = [{"id": added.ids[token], "content": token, **special_flags()} for token in added.new]
    new = place.before + b",\n".join(map(_indented, entries)) + place.after
    head, tail = extent.slice(0, place.position), extent.slice(place.position, extent.nbytes - place.position)
    return SideFile("tokenizer.json", (head, new, tail)), added


def scan_file(
    extent: Extent, read: ReadSideFile, tokens: Sequence[str]
) -> tuple[_Insertion, list[str], TokenVocabulary]:
    """Returns where to insert, the added tokens in order, and what the vocabulary knows of them and of ``tokens``."""
    data = read_capped(extent, read)
    try:
        return _scan(data, tokens)
    except ScanError as error:
        raise TargetError(
            "bad-tokenizer-json",
            "tokenizer.json is not laid out as the tokenizers library writes it",
            where=f"{extent.file}, byte {error.position}",
            found=repr(data[error.position : error.position + 40]),
            expected=error.expected,
        ) from error


def read_capped(extent: Extent, read: ReadSideFile) -> bytes:
    """Returns the bytes of a tokenizer's file, or raises ``side-file-too-large``."""
    if extent.nbytes > _MAX_BYTES:
        raise TargetError(
            "side-file-too-large",
            "a tokenizer file is too large",
            where=extent.file,
            found=f"{extent.nbytes} bytes",
            expected=f"at most {_MAX_BYTES} bytes",
        )
    return read(extent)


def _indented(entry: JsonObject) -> bytes:
    """As the tokenizers library indents an element of ``added_tokens``."""
    return b"\n".join(b"    " + line for line in json.dumps(entry, indent=2, ensure_ascii=False).encode().split(b"\n"))


class ScanError(ValueError):
    """The scan met something that does not belong where it stands."""

    def __init__(self, position: int, expected: str) -> None:
        super().__init__(expected)
        self.position = position
        self.expected = expected


def _scan(data: bytes, tokens: Sequence[str]) -> tuple[_Insertion, list[str], TokenVocabulary]:
    """Returns where to insert, the added tokens in order, and what the model's vocabulary knows of all."""
    start = after_space(data, 0)
    found = _find_members(data, start, ("added_tokens", "model"))
    if "model" not in found:
        raise ScanError(start, "a member `model`")
    place, present = _added_array(data, start, found.get("added_tokens"))
    inner = _find_members(data, found["model"], ("vocab",))
    if "vocab" not in inner:
        raise ScanError(found["model"], "a member `vocab` of `model`")
    return place, present, scan_vocabulary(data, inner["vocab"], {*present, *tokens})


def _added_array(data: bytes, start: int, array: int | None) -> tuple[_Insertion, list[str]]:
    if array is None:
        return _Insertion(start + 1, b'\n  "added_tokens": [\n', b"\n  ],"), []
    end = _value_end(data, array)
    try:
        entries = json.loads(data[array:end])
        contents = [entry["content"] for entry in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ScanError(array, "a list of added tokens, each with its `content`") from error
    if not isinstance(entries, list) or not all(isinstance(content, str) for content in contents):
        raise ScanError(array, "a list of added tokens, each with its `content`")
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
            raise ScanError(position, "a key")
        value = _after(data, after_space(data, key.end()), b":")
        yield key[1], value
        position = after_space(data, _value_end(data, value))
        if data[position : position + 1] == b",":
            position = after_space(data, position + 1)
        elif data[position : position + 1] != b"}":
            raise ScanError(position, "a comma or a closing brace")


def after_space(data: bytes, position: int) -> int:
    """Returns the position of the next byte that is no space."""
    match = _SPACE.match(data, position)
    return match.end() if match else position


def _after(data: bytes, position: int, mark: bytes) -> int:
    """Returns the position behind ``mark`` and the space that follows it."""
    if data[position : position + 1] != mark:
        raise ScanError(position, f"`{mark.decode()}`")
    return after_space(data, position + 1)


def _value_end(data: bytes, start: int) -> int:
    """Returns the position behind the value at ``start``."""
    if data[start : start + 1] in (b"{", b"["):
        return _bracket_end(data, start)
    match = _STRING_HERE.match(data, start) or _SCALAR.match(data, start)
    if match is None:
        raise ScanError(start, "a value")
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
    raise ScanError(start, "a closing bracket before the end of the file")


def scan_vocabulary(data: bytes, start: int, wanted: Iterable[str]) -> TokenVocabulary:
    """Counts a vocabulary: an object of ids (BPE, WordPiece, WordLevel), or a list of scored pieces
    (Unigram).
    """
    names = {token.encode("utf-8", "surrogatepass"): token for token in wanted}
    opening = data[start : start + 1]
    if opening not in (b"{", b"["):
        raise ScanError(start, "an object of tokens and ids, or a list of pieces and scores")
    listed = opening == b"["
    ids: dict[str, int] = {}
    size = 0
    for key, number in _vocabulary_entries(data, start, listed=listed):
        if (token := names.get(key)) is not None:
            ids[token] = size if listed else int(number)
        size += 1
    return TokenVocabulary(size, ids)


def _vocabulary_entries(data: bytes, start: int, *, listed: bool) -> Iterator[tuple[bytes, bytes]]:
    position = after_space(data, start + 1)
    if data[position : position + 1] in (b"}", b"]"):
        return
    for match in (_SCORED if listed else _PAIR).finditer(data, position):
        if match.start() != position:
            break
        position = match.end()
        yield _unescaped(match[1]), match[2]
        if match[3] != b",":
            return
    raise ScanError(position, "an entry of the vocabulary")


def _unescaped(key: bytes) -> bytes:
    if b"\\" not in key:
        return key
    try:
        return str(json.loads(b'"' + key + b'"')).encode("utf-8", "surrogatepass")
    except ValueError:  # not valid JSON, and so none of the tokens looked for
        return key
