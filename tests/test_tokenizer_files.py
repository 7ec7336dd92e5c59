"""Tokenizer files edited as text, against the libraries that add the same tokens themselves."""

import contextlib
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from shardmerge.errors import TargetError
from shardmerge.targets.tokenizer import add_tokens
from shardmerge.tensors import Extent

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

NEW = ("<image>", "<pad>")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
WORDS = ["<unk>", "<s>", "</s>", "a", "b", "Ġc", 'say "', "\\", "{", "]", "\u00e9", "\U0001f600", "<", "image"]
TEXTS = ["a <image> b", "<image><pad>", "a<pad>image b \U0001f600", "<s>a</s>"]


def read(extent):
    with Path(extent.file).open("rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def side_files(folder):
    return {path.name: Extent(str(path), 0, path.stat().st_size) for path in sorted(folder.iterdir())}


def add(folder, tokens=NEW, vocab_size=1000, default_class="LlamaTokenizer"):
    return add_tokens(
        side_files(folder),
        read,
        tokens,
        pad_token="<pad>",
        vocab_size=vocab_size,
        default_class=default_class,
        processor_class="LlavaProcessor",
    )


def write(files, folder):
    folder.mkdir()
    for file in files:
        content = b"".join(part if isinstance(part, bytes) else read(part) for part in file.parts)
        (folder / file.name).write_bytes(content)
    return folder


def entry(content, number):
    return {"id": number, "content": content, **FLAGS}


def word_level(words=WORDS, added=()):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def bpe():
    vocab = {word: index for index, word in enumerate([*"abcdeimg<>", "ab", "abc", "im"])}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), ("ab", "c"), ("i", "m")], unk_token="a"))


def unigram():
    pieces = [(word, -0.5 * index) for index, word in enumerate([*WORDS, "<pad>"])]
    return tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))


def word_piece():
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "<pad>": 3}
    return tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))


KINDS = {
    "word level": word_level,
    "word level, tokens added before": lambda: word_level(added=["<unk>", "<s>", "</s>", "<extra>"]),
    "word level, image known": lambda: word_level(words=[*WORDS, "<image>"]),
    "word level, pad added": lambda: word_level(added=["<pad>"]),
    "word level, both added": lambda: word_level(added=["<pad>", "<image>"]),
    "bpe": bpe,
    "unigram": unigram,
    "word piece": word_piece,
}


@pytest.mark.parametrize("pretty", [True, False], ids=["indented", "one line"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_file_as_the_tokenizers_library_writes(tmp_path, kind, pretty):
    base = tmp_path / "base"
    base.mkdir()
    tokenizer = KINDS[kind]()
    tokenizer.save(str(base / "tokenizer.json"), pretty=pretty)
    result = add(base)
    edited = write(result.files, tmp_path / "edited") / "tokenizer.json"
    ours = tokenizers.Tokenizer.from_file(str(edited))

    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in NEW])
    assert result.ids == {token: tokenizer.token_to_id(token) for token in NEW}
    assert ours.to_str() == tokenizer.to_str()
    for text in TEXTS:
        assert ours.encode(text).ids == tokenizer.encode(text).ids
    if pretty and kind in ("word level, tokens added before", "word level, both added"):
        assert edited.read_text() == tokenizer.to_str(pretty=True)


def test_the_bulk_of_the_file_stays_where_it_is(tmp_path):
    word_level(added=["<s>"]).save(str(tmp_path / "tokenizer.json"))
    extent = side_files(tmp_path)["tokenizer.json"]
    head, new, tail = add(tmp_path).files[0].parts
    assert head.offset == 0
    assert tail.offset == head.nbytes
    assert head.nbytes + tail.nbytes == extent.nbytes
    assert isinstance(new, bytes)
    assert len(new) < 500


def test_nothing_to_add_copies_the_file(tmp_path):
    word_level(added=NEW).save(str(tmp_path / "tokenizer.json"))
    assert add(tmp_path).files[0].parts == (side_files(tmp_path)["tokenizer.json"],)


@pytest.mark.parametrize(
    "text",
    [
        '{"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}',
        '{"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"},"added_tokens":[]}',
        '{"added_tokens" : [ ] , "model" : {"type" : "WordLevel" , "vocab" : { "a" : 0 , "b" : 1 },"unk_token":"a"}}',
        '{"model":{"type":"WordLevel","vocab":{"a":0,"\\u003cimage\\u003e":1,"\\ud83d\\ude00":2},"unk_token":"a"}}',
        '{"model":{"unk_token":"a","vocab":{"a":0,"b":7},"type":"WordLevel"},"truncation":null}',
        '\n\t{"added_tokens":[],"model":{"type":"WordLevel","vocab":{},"unk_token":"a"}}\n',
    ],
)
def test_layouts_no_library_writes(tmp_path, text):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(text)
    result = add(base)
    ours = tokenizers.Tokenizer.from_file(str(write(result.files, tmp_path / "edited") / "tokenizer.json"))
    oracle = tokenizers.Tokenizer.from_file(str(base / "tokenizer.json"))
    oracle.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in NEW])
    assert result.ids == {token: oracle.token_to_id(token) for token in NEW}
    assert ours.to_str() == oracle.to_str()


def test_ids_that_a_loader_would_not_keep_are_not_believed(tmp_path):
    """The library adds the tokens again when it loads a file, and numbers them itself."""
    document = json.loads(word_level().to_str())
    document["added_tokens"] = [entry("<s>", 1), entry("<late>", 500)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    oracle = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    oracle.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in NEW])
    assert add(tmp_path).ids == {token: oracle.token_to_id(token) for token in NEW}


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 0),
        ("[]", 0),
        ('"tokenizer"', 0),
        ("{}", 0),
        ('{"model": {"type": "BPE"}}', 10),
        ('{"model": 3}', 10),
        ('{"model": {"vocab": 3}}', 20),
        ('{"model": {"vocab": {"a": "b"}}}', 21),
        ('{"model": {"vocab": {"a": 0, "b"}}}', 28),
        ('{"model": {"vocab": {"a": 0', 10),
        ('{"added_tokens": [], "model": {"vocab": {"a": 0', 41),
        ('{"model": {"vocab": [["a", "b"]]}}', 21),
        ('{"added_tokens": [, "model": {}}', 32),
        ('{"added_tokens": [,], "model": {"vocab": {}}}', 17),
        ('{"added_tokens": {"a": 1}, "model": {"vocab": {}}}', 17),
        ('{"added_tokens": [{"id": 3}], "model": {"vocab": {}}}', 17),
        ('{"added_tokens": [{"content": 3}], "model": {"vocab": {}}}', 17),
        ('{"version" "1.0"}', 11),
        ('{"version": "1.0" "model": {}}', 18),
        ('{"version": "1.0, "model": {}}', 19),
        ("{" * 100_000, 1),
        ('{"x": ' + "[" * 100_000, 6),
    ],
    ids=lambda value: str(value)[:30],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, text, position):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TargetError) as caught:
        add(tmp_path)
    assert caught.value.code == "bad-tokenizer-json"
    assert caught.value.where == f"{tmp_path / 'tokenizer.json'}, byte {position}"


def test_any_cut_of_a_file_is_refused_or_harmless(tmp_path):
    """A scan that stops early may not see the end of a file; it must never loop, or raise anything of its own."""
    text = word_level(added=["<s>", "<x>"]).to_str()
    accepted = set()
    for length in range(0, len(text), 7):
        (tmp_path / "tokenizer.json").write_text(text[:length])
        with contextlib.suppress(TargetError):
            add(tmp_path)
            accepted.add(length)
    assert not accepted or min(accepted) > text.index('"vocab"')


def test_a_large_file_costs_little_more_than_its_bytes(tmp_path):
    random.seed(0)
    words = {"".join(random.choices("abcdefghij{}[]\u0120\u00e9", k=9)): None for _ in range(60_000)}
    vocab = {word: index for index, word in enumerate(words)}
    merges = [[word[:4], word[4:]] for word in words]
    document = {"added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document, indent=2, ensure_ascii=False))
    size = (tmp_path / "tokenizer.json").stat().st_size
    del document, merges, words
    tracemalloc.start()
    try:
        result = add(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.ids["<image>"] == len(vocab)
    assert peak < size + (1 << 20)


def test_a_file_beyond_all_measure_is_refused(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(TargetError) as caught:
        add(tmp_path)
    assert caught.value.code == "side-file-too-large"


# ---- the files beside tokenizer.json, with transformers as the judge


def saved_by_transformers(folder, **named):
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_level(added=["<unk>", "<s>", "</s>"]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **named,
    )
    fast.save_pretrained(folder)
    return folder


def edited_json(result, name):
    (file,) = [file for file in result.files if file.name == name]
    return json.loads(b"".join(file.parts))


def test_transformers_loads_what_it_would_have_made(tmp_path):
    base = saved_by_transformers(tmp_path / "base", additional_special_tokens=["<extra>"])
    result = add(base)
    ours = transformers.AutoTokenizer.from_pretrained(write(result.files, tmp_path / "edited"))
    oracle = transformers.AutoTokenizer.from_pretrained(base)
    for token in NEW:
        oracle.add_tokens(tokenizers.AddedToken(token, special=True, normalized=False), special_tokens=True)
    oracle.pad_token = "<pad>"
    assert result.ids == dict(zip(NEW, oracle.convert_tokens_to_ids(list(NEW)), strict=True))
    assert (ours.pad_token_id, len(ours)) == (result.ids["<pad>"], len(oracle))
    assert ours.get_vocab() == oracle.get_vocab()
    assert "<extra>" in ours.all_special_tokens
    for text in TEXTS:
        assert ours(text).input_ids == oracle(text).input_ids


def test_no_class_that_only_transformers_5_has(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    word_level().save(str(base / "tokenizer.json"))
    config = {
        "backend": "tokenizers", "extra_special_tokens": ["<x>"], "tokenizer_class": "TokenizersBackend",
        "processor_class": "Other", "model_max_length": 8192,
    }  # fmt: skip
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert edited_json(add(base), "tokenizer_config.json") == {
        "additional_special_tokens": ["<x>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "pad_token": "<pad>",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_added_tokens_decoder_is_extended_where_there_is_one(tmp_path):
    word_level().save(str(tmp_path / "tokenizer.json"))
    old = {"0": {"content": "<unk>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": old, "chat_template": "{{é}}"}))
    config = edited_json(add(tmp_path), "tokenizer_config.json")
    first = len(WORDS)
    assert config["added_tokens_decoder"] == old | {
        str(first): {"content": "<image>", **FLAGS},
        str(first + 1): {"content": "<pad>", **FLAGS},
    }
    assert config["chat_template"] == "{{é}}"
    assert config["tokenizer_class"] == "LlamaTokenizer"


@pytest.mark.parametrize(
    ("before", "pad"),
    [
        ({"eos_token": "</s>"}, "<pad>"),
        ({}, "<pad>"),
        (
            {"eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<unk>"},
            {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False},
        ),
    ],
)
def test_special_tokens_map_keeps_its_style(tmp_path, before, pad):
    word_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(before))
    assert edited_json(add(tmp_path), "special_tokens_map.json") == before | {"pad_token": pad}


def test_everything_else_is_copied_or_left(tmp_path):
    word_level().save(str(tmp_path / "tokenizer.json"))
    for name in (
        "tokenizer.model",
        "chat_template.jinja",
        "README.md",
        "modeling_x.py",
        "model.safetensors.index.json",
    ):
        (tmp_path / name).write_bytes(b"{}")
    files = {file.name: file for file in add(tmp_path).files}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"}
    assert files["chat_template.jinja"].parts == (side_files(tmp_path)["chat_template.jinja"],)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize("text", ["[]", "{", "\x00", '"x"', "[" * 100_000])
def test_damaged_small_files_are_refused(tmp_path, name, text):
    word_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(text)
    with pytest.raises(TargetError) as caught:
        add(tmp_path)
    assert (caught.value.code, caught.value.where) == ("bad-json", str(tmp_path / name))


def test_no_tokenizer_at_all(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = add(tmp_path, vocab_size=32000)
    assert (result.ids, result.files) == ({"<image>": 32000, "<pad>": 32001}, ())


# ---- tokenizers without tokenizer.json


def varint(value):
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def sentencepiece(pieces, *, text_first=True):
    """A ModelProto: field 1 is a piece {1: text, 2: score, 3: type}, field 2 the trainer, field 3 the normalizer."""
    model = b""
    for piece in pieces:
        text, score = b"\x0a" + varint(len(piece.encode())) + piece.encode(), b"\x15\x00\x00\x80\xbf"
        body = text + score if text_first else score + text
        model += b"\x0a" + varint(len(body)) + body
    return model + b"\x12\x03\x20\x80\x7d" + b"\x1a\x02\x08\x01"


def test_sentencepiece_is_counted_not_guessed(tmp_path):
    """A padded vocabulary has more rows than the tokenizer has tokens, and ids go on from the tokenizer's."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(["<unk>", "<s>", "</s>", *(f"p{i}" for i in range(300))]))
    result = add(tmp_path, vocab_size=320)
    assert result.ids == {"<image>": 303, "<pad>": 304}
    assert edited_json(result, "added_tokens.json") == {"<image>": 303, "<pad>": 304}
    config = edited_json(result, "tokenizer_config.json")
    assert config["added_tokens_decoder"]["303"] == {"content": "<image>", **FLAGS}


def test_sentencepiece_that_has_a_pad_token(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(["<pad>", "<unk>", "a"]))
    assert add(tmp_path).ids == {"<image>": 3, "<pad>": 0}


@pytest.mark.parametrize("data", [b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff\xff", b"\x0a\x80", b"\xff" * 40])
def test_another_kind_of_tokenizer_model_counts_as_the_models_vocabulary(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert add(tmp_path, vocab_size=128).ids == {"<image>": 128, "<pad>": 129}


def test_stated_ids_come_after(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(["<unk>", "a"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 2, "<x>": 3}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<x>"}, "additional_special_tokens": ["<y>", {"content": "<z>"}]})
    )
    result = add(tmp_path)
    assert result.ids == {"<image>": 4, "<pad>": 2}
    assert edited_json(result, "added_tokens.json") == {"<pad>": 2, "<x>": 3, "<image>": 4}
    config = edited_json(result, "tokenizer_config.json")
    decoder = config["added_tokens_decoder"]
    assert {number: token["content"] for number, token in decoder.items()} == {"2": "<pad>", "3": "<x>", "4": "<image>"}
    assert [decoder[number]["special"] for number in "234"] == [False, True, True]
    assert (config["bos_token"], config["additional_special_tokens"]) == ("<x>", ["<y>", "<z>"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("vocab.json", '{"a": 0, "<pad>": 1, "c": 2}'), ("vocab.txt", "a\n<pad>\nc\n")],
)
def test_other_vocabularies(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert add(tmp_path).ids == {"<image>": 3, "<pad>": 1}
