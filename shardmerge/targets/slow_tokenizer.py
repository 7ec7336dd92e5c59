"""Tokenizers without tokenizer.json: their vocabulary, and the added tokens that the small files state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shardmerge.targets.token_ids import TokenVocabulary
from shardmerge.targets.tokenizer_configs import load_side_object
from shardmerge.targets.tokenizer_json import ScanError, after_space, read_capped, scan_vocabulary
from shardmerge.tensors import Extent, ReadSideFile

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def stated_tokens(side_files: Mapping[str, Extent], read: ReadSideFile) -> dict[str, int]:
    """Returns the added tokens with the ids that added_tokens.json and tokenizer_config.json state."""
    config = load_side_object(side_files, read, "tokenizer_config.json") or {}
    stated = load_side_object(side_files, read, "added_tokens.json") or {}
    ids = {token: number for token, number in stated.items() if isinstance(number, int)}
    decoder = config.get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        content = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(content, str) and str(number).isdecimal():
            ids[content] = int(number)
    return ids


def slow_vocabulary(
    side_files: Mapping[str, Extent], read: ReadSideFile, wanted: Iterable[str]
) -> TokenVocabulary | None:
    """Returns the vocabulary of a tokenizer without tokenizer.json, or ``None`` for a file of another kind.

    It matters that this is the tokenizer's own size: transformers converts such a tokenizer to a fast one by
    counting on from there, and a model whose vocabulary is padded has more rows than the tokenizer has
    tokens.
    """
    for name in SENTENCEPIECE:
        if name in side_files:
            pieces = _sentencepieces(read_capped(side_files[name], read))
            return _counted(pieces, wanted) if pieces else None
    if "vocab.json" in side_files:
        data = read_capped(side_files["vocab.json"], read)
        try:
            return scan_vocabulary(data, after_space(data, 0), wanted)
        except ScanError:
            return None
    return _counted(read_capped(side_files["vocab.txt"], read).splitlines(), wanted)


def _counted(pieces: Sequence[bytes], wanted: Iterable[str]) -> TokenVocabulary:
    names = {token.encode("utf-8", "surrogatepass"): token for token in wanted}
    return TokenVocabulary(len(pieces), {names[piece]: index for index, piece in enumerate(pieces) if piece in names})


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
