"""Small files that ask for much: memory, time, depth, names; and numbers that are none."""

from __future__ import annotations

import json
import struct

from tests.attacks.hostile_zips import PICKLE
from tests.attacks.seeds import CONFIG, ENTRY, INDEX, MAPPING, safetensors

_TENSOR = PICKLE[PICKLE.index(b"ctorch._utils") : -2]
_SHARD = INDEX["weight_map"]["w"]


def _text(raw: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(raw)) + raw


def pickles(times: int = 1) -> dict[str, bytes]:
    """Returns pickles of some 100 KB, or so many times as much, which deflate to a thousandth."""
    many = 100_000 * times
    return {
        "empty dicts": b"\x80\x02](" + b"}" * many + b"e.",
        "empty lists": b"\x80\x02](" + b"]" * many + b"e.",
        "None": b"\x80\x02](" + b"N" * many + b"e.",
        "memos": b"\x80\x04N" + b"\x94" * many + b".",
        "memos under large numbers": b"\x80\x02N" + _far_memos(many // 5),
        "texts": b"\x80\x04](" + b"\x8c\2ab" * (many // 4) + b"e.",
        "tuples": b"\x80\x02](" + b"K\1\x85" * (many // 3) + b"e.",
        "names of classes": b"\x80\x02](" + b"ca\nb\n" * (many // 5) + b"e.",
        "sets": b"\x80\x04](" + b"\x8f" * many + b"e.",
        "calls": b"\x80\x02](" + b"ca\nb\n)R" * (many // 7) + b"e.",
        "one tensor under many names": _many_names(many // 14),
        "dicts that share dicts": _shared(5, 16, 3),
        "dicts that share dicts, long names": _shared(4, 20, 900),
        "a long name above many": _prefixed(many // 20),
    }  # fmt: skip


def _far_memos(count: int) -> bytes:
    return b"".join(b"r" + struct.pack("<I", number * 997) for number in range(count)) + b"."


def _many_names(count: int) -> bytes:
    names = b"".join(_text(b"%07d" % number) + b"h\5" for number in range(count))
    return b"\x80\x02}(" + _text(b"w") + _TENSOR + b"q\5" + names + b"u."


def _shared(levels: int, keys: int, length: int) -> bytes:
    """A tuple of dicts, each holding the one before under many names, and the last as the model."""
    out = b"}(" + _text(b"w") + _TENSOR + b"uq\0"
    for level in range(1, levels + 1):
        held = b"".join(_text((b"%d" % key).rjust(length, b"a")) + b"h" + bytes([level - 1]) for key in range(keys))
        out += b"}(" + held + b"uq" + bytes([level])
    return b"\x80\x02}(" + _text(b"state") + b"(" + out + b"t" + _text(b"model") + b"h" + bytes([levels]) + b"u."


def _prefixed(count: int) -> bytes:
    names = b"".join(_text(b"%05d" % number) + b"h\5" for number in range(count))
    return b"\x80\x02}(" + _text(b"a" * 4000) + b"}(" + _text(b"w") + _TENSOR + b"q\5" + names + b"uu."


def headers() -> dict[str, bytes]:
    """Returns safetensors files with headers that ask for much, or say what no tensor has."""
    entry = json.dumps({**ENTRY, "shape": [0], "data_offsets": [0, 0]})
    many = ",".join(f'"n{number}":{entry}' for number in range(3_000))
    fields = {
        "dtype": ["F33", "", None, 1, [], {}, "F" * 100_000],
        "shape": [None, -1, [-1], [1.0], [True], [1 << 62, 1 << 62], [1] * 65, ["1"], [[1]], [1e999], {}, 1],
        "data_offsets": [None, [0], [0, 4, 8], [4, 0], [-4, 0], [0, 1 << 70], [0.0, 4], [False, 4], [8, 12], "04"],
    }
    odd = {
        f"{key} {json.dumps(value)[:20]}": {"w": {**ENTRY, key: value}}
        for key, values in fields.items()
        for value in values
    }
    raw = {
        "the last of many twice": b"{" + f'{many},"n2999":{entry}'.encode() + b"}",
        "the first of many twice": b"{" + f'{many},"n0":{entry}'.encode() + b"}",
        "empty dicts": b'{"a":[' + b"{}," * 400_000 + b"{}]}",
        "integers": b'{"a":[' + b"1," * 300_000 + b"1]}",
        "long integers": b'{"a":[' + b"123456789," * 30_000 + b"1]}",
        "an integer of a million digits": b'{"a":' + b"1" * 1_000_000 + b"}",
        "deep lists": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep dicts": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "NaN": b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}',
        "not UTF-8": b'{"\xff":1}', "a lone surrogate": b'{"\\ud800":1}', "blanks": b" " * 1000, "a list": b"[]",
        "a long name": json.dumps({"n" * 200_000: ENTRY}).encode(), "no name": json.dumps({"": ENTRY}).encode(),
    }  # fmt: skip
    made = {name: safetensors(header) for name, header in {**odd, **raw}.items()}
    lengths = {
        f"a header of {length} bytes": struct.pack("<Q", length) + b"{}"
        for length in (0, 1, 3, 1 << 26, 1 << 40, (1 << 64) - 1)
    }
    metadata = {
        f"__metadata__ {value!r}"[:30]: safetensors({"w": ENTRY, "__metadata__": value})
        for value in (1, [], {"a": 1}, {"a": {}}, "x")
    }
    return {**made, **lengths, **metadata}


def indexes() -> dict[str, bytes]:
    """Returns indexes that ask for much, name what is no shard, or are none."""
    names = (
        "../a.safetensors",
        "/a.safetensors",
        "C:a.safetensors",
        "a/b.safetensors",
        "a\0.safetensors",
        "",
        "a.bin",
        "a" * 100_000,
    )
    weight_maps = (
        [{"w": name} for name in names] + [{"w": value} for value in (None, 1, [], {})] + [None, [], 1, "x", {}]
    )
    made = {f"weight_map {json.dumps(value)[:30]}": json.dumps({**INDEX, "weight_map": value}) for value in weight_maps}
    sizes = (-1, 1.5, "4", None, [], 10**400, {"a": 1}, True)
    made |= {
        f"total_size {str(value)[:20]}": json.dumps({**INDEX, "metadata": {"total_size": value}}) for value in sizes
    }
    return {name: text.encode() for name, text in made.items()} | {
        "empty dicts": json.dumps(INDEX).encode()[:-1] + b',"x":[' + b"{}," * 1_000_000 + b"{}]}",
        "many shards": json.dumps({"weight_map": {f"n{n}": f"m{n}.safetensors" for n in range(20_000)}}).encode(),
        "many odd shards": json.dumps({"weight_map": {f"n{n}": f"../m{n}" for n in range(5_000)}}).encode(),
        "a name twice": b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}',
        "deep": b"[" * 200_000 + b"]" * 200_000,
    }  # fmt: skip


def json_texts() -> dict[str, bytes]:
    """Returns texts for any JSON file beside weights."""
    return {
        "empty": b"", "a list": b"[]", "a number": b"1", "null": b"null", "cut": b'{"a":', "not UTF-8": b'{"a":"\xff"}',
        "empty dicts": b'{"a":[' + b"{}," * 1_000_000 + b"{}]}",
        "small dicts": b'{"a":[' + b'{"a":1},' * 250_000 + b"{}]}",
        "deep lists": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        "deeper lists": b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
        "deep dicts": b'{"a":' * 400 + b"1" + b"}" * 400,
        "odd numbers": b'{"model_type":"llama","hidden_size":' + b"9" * 4000 + b',"num_hidden_layers":-1,'
        b'"vocab_size":1e999,"r":NaN,"lora_alpha":Infinity,"peft_type":"LORA","target_modules":[]}',
        "odd types": b'{"model_type":[],"hidden_size":{},"num_hidden_layers":"1","vocab_size":true,'
        b'"r":null,"lora_alpha":[],"peft_type":1,'
        b'"target_modules":7,"architectures":{},"auto_map":[],"added_tokens":1,"model":2}',
        "a text of megabytes": json.dumps({"model_type": "m" * 3_000_000}).encode(),
    }  # fmt: skip


def numbers() -> dict[str, bytes]:
    """Returns texts for config.json with a number that is none."""
    values = ("NaN", "Infinity", "-1", "1.5", "true", '"8"', "1e400", "9" * 400)
    start = json.dumps(CONFIG)[:-1]
    return {
        f"{key} {value[:20]}": f'{start}, "{key}": {value}}}'.encode()
        for key in ("vocab_size", "rope_theta")
        for value in values
        if (key, value) != ("rope_theta", "1.5")
    }


def steering() -> dict[str, bytes]:
    """Returns names that would steer a terminal, or are longer than any line."""
    return {
        "escapes": b"\x1b[31mred\x1b[2J", "a line break": b"w\nerror: forged [fine]", "a carriage return": b"w\r\x07v",
        "right to left": "w\u202ev\u2066".encode(), "long": b"w" * 3000,
    }  # fmt: skip


def mappings() -> dict[str, bytes]:
    """Returns mappings that ask for much."""
    start = MAPPING.split("  ")[0]
    rule = '  "{r}.{q}": {op: slice, of: "s:w", for: {r: %s, q: %s}}\n'
    counts = (
        ("2000", "2000"),
        ("500", "500"),
        ("1e9", "1"),
        ("-1", "1"),
        ("9" * 400, "1"),
        ("9**9**9", "1"),
        ("[]", "1"),
        ("1/0", "1"),
        ("nan", "inf"),
    )
    made = {f"for {r[:20]} by {q}": start + rule % (r, q) for r, q in counts}
    made |= {
        "many loops": start + "".join(rule.replace("{r}.", f"a{n}.{{r}}.") % (500, 500) for n in range(20)),
        "many rules": start + "".join(f"  a{n}: s:w\n" for n in range(5_000)),
        "deep": "a: " + "[" * 5_000 + "]" * 5_000, "deep blocks": "".join(" " * n + "a:\n" for n in range(500)),
        "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "a tag": "a: !!python/object/apply:os.system [id]\n",
        "a long scalar": "a: " + "x" * 900_000, "two megabytes": "a: [" + "x," * 1_000_000 + "]",
        "not UTF-8": "a: \udcff",
        "a million brackets": "[" * 900_000, "many keys": "".join(f"k{n}: 1\n" for n in range(5_000)),
        "captures": start + '  "' + "".join(f"{{c{n}}}" for n in range(500)) + '": s:w\n',
    }  # fmt: skip
    return {name: text.encode("utf-8", "surrogateescape") for name, text in made.items()}
