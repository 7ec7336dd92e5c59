"""What is fuzzed: each target takes bytes, gives them to a reader, and lets only errors of shardmerge pass.

The first byte of an input says in which frame the rest is read: as a whole file, or inside one that is otherwise sound,
with the lengths, digests and magic numbers that a mutation would only break.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shardmerge.dtypes import DTYPES
from shardmerge.errors import ShardmergeError
from shardmerge.formulas import Formula
from shardmerge.mapping.dropping import find_dropped
from shardmerge.mapping.narrower import is_narrower
from shardmerge.mapping.pattern import Template
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.resolve import resolve
from shardmerge.mergekit.config import read_mergekit
from shardmerge.plan.reading import PlanText
from shardmerge.plan.value import Part
from shardmerge.publish.part_receipts import receipt_bytes, receipt_from, receipt_of
from shardmerge.publish.recorded import read_recorded
from shardmerge.shown import shown
from shardmerge.sources.dcp import read_dcp
from shardmerge.sources.hf_folder import read_indexed
from shardmerge.sources.pickle_vm import interpret_at
from shardmerge.sources.safetensors_file import read_safetensors
from shardmerge.sources.state_dict import state_dict
from shardmerge.sources.torch_checkpoint import read_torch_checkpoint
from shardmerge.targets.adapter_config import read_adapter_config
from shardmerge.targets.agreement import Described, disagreements, surplus
from shardmerge.targets.config_numbers import parsed_object
from shardmerge.targets.name_expressions import matches
from shardmerge.targets.older_config import older_config
from shardmerge.targets.quantization_config import read_stated, without_quantization
from shardmerge.targets.tokenizer import add_tokens, token_id
from shardmerge.targets.training_config import read_config_value, read_training_config
from shardmerge.tensors import Catalog, Extent, TensorEntry, dense
from tests.attacks import seeds
from tests.attacks.hostile_zips import STORAGE, build, changed, sound
from tests.attacks.test_hostile_pickles import DAMAGED, HOSTILE

GOLDEN = Path(__file__).parents[1] / "golden"
_FOUND = Path(__file__).with_name("found")
_LLAMA = GOLDEN / "xtuner" / "base_llm"


@dataclass(frozen=True, slots=True)
class Target:
    """A reader.

    Attributes
    ----------
    name
        As ``--target`` takes it.
    about
        What is read, for the table.
    read
        Gives it bytes; raises what the reader raises.
    seeds
        Inputs to begin with.
    most
        Bytes of an input; longer seeds are left out.
    allowed
        What the reader is documented to raise.
    """

    name: str
    about: str
    read: Callable[[bytes], object]
    seeds: Callable[[], Iterator[bytes]]
    most: int = 512
    allowed: tuple[type[Exception], ...] = (ShardmergeError,)


class _Scratch:
    """A directory in memory of a few files that are written again and again."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self._open: dict[str, int] = {}

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        if name not in self._open:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._open[name], 0)
        os.pwrite(self._open[name], data, 0)
        return path


@cache
def _scratch() -> _Scratch:
    return _Scratch()


def _framed(frame: int, *made: bytes) -> Iterator[bytes]:
    return (bytes([frame]) + one for one in made)


# --- torch


def _pickle(data: bytes) -> None:
    value = interpret_at(data[1:], 0, where="file", legacy=bool(data[0] & 1)).value
    shown(value)
    state_dict(value)


def _pickle_seeds() -> Iterator[bytes]:
    yield from _framed(0, seeds.PICKLE, *HOSTILE.values(), *DAMAGED.values(), *_golden_pickles())
    yield from _framed(1, seeds.PICKLE.replace(b"K\x04tQ", b"K\x04NtQ"), seeds.LEGACY[:-16])


def _golden_pickles() -> Iterator[bytes]:
    """Yields ``data.pkl`` of small files that torch wrote."""
    import zipfile

    for path in sorted(GOLDEN.glob("*/*/**/*.pt"))[::40] + sorted(GOLDEN.glob("**/*.pth"))[::6]:
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            name = next(one for one in archive.namelist() if one.endswith("/data.pkl"))
            yield archive.read(name)


# What stands in the fields of a zip where somebody lies.
_LIES: Mapping[str, tuple[object, ...]] = {
    "name": (
        "archive/data.pkl",
        "archive/data/0",
        "archive/data/1",
        "archive/../x",
        "/archive/x",
        "archive",
        "b/x",
        "",
    ),
    "local_name": ("archive/data.pkl", "archive/x", "", None),
    "method": (0, 8, 12, 99),
    "local_method": (0, 8, None),
    "local_size": (0, 1, 15, 16, 17, 0xFFFFFFFE, 0xFFFFFFFF, None),
    "size": (0, 1, 15, 16, 17, 1 << 20, 0xFFFFFFFF, None),
    "packed": (0, 1, 15, 16, 17, 1 << 20, 0xFFFFFFFF, None),
    "crc": (0, 1, None),
    "header": (0, 1, 30, 60, 200, 400, 0xFFFFFFFF, None),
    "flags": (0, 1, 8, 0x0800, 0x0808, 0xFFFF),
    "local_extra": (b"", b"FB\4\0ZZZZ", b"\1\0\x10\0" + b"\0" * 16, b"\1\0\xff\xff"),
    "extra": (b"", b"\1\0\x08\0" + b"\x10" + b"\0" * 7, b"\1\0\x18\0" + b"\x10" + b"\0" * 23, b"\1\0\xff\xff"),
    "disk": (0, 1, 0xFFFF),
    "data": (seeds.PICKLE, STORAGE, b"little", b"big", b"", b"3\n"),
}


def _zip(data: bytes) -> None:
    frame, rest = data[0] % 3, data[1:]
    if frame == 0:
        made = rest
    elif frame == 1:
        made = build(changed(0, data=rest))
    else:
        made = _lying(rest)
    read_torch_checkpoint(_scratch().put("model.pth", made))


def _lying(script: bytes) -> bytes:
    """Returns a zip of which each three bytes change a field of a member, or the members themselves."""
    from dataclasses import replace

    entries, options = sound(), {}
    for which, field, value in zip(script[::3], script[1::3], script[2::3], strict=False):
        at = which % len(entries)
        if field < 200:
            name = [*_LIES][field % len(_LIES)]
            entries[at] = replace(entries[at], **{name: _LIES[name][value % len(_LIES[name])]})
        elif field < 220 and len(entries) < 12:
            entries.insert(value % len(entries), entries[at])
        elif field < 235 and len(entries) > 1:
            del entries[at]
        else:
            key = ("count", "gap", "wide", "shift")[field % 4]
            options[key] = bool(value & 1) if key == "wide" else value
    return build(entries, **options)


def _zip_seeds() -> Iterator[bytes]:
    yield from _framed(0, seeds.ZIP, build(sound()), *_small_files("**/*.pth"), *_small_files("zero/**/*.pt"))
    yield from _framed(1, seeds.PICKLE, *_golden_pickles())
    yield from _framed(2, *(bytes([which, field, 1]) * 2 for which in range(4) for field in range(0, 256, 7)))


def _small_files(pattern: str, most: int = 8, size: int = 4096) -> Iterator[bytes]:
    found = [path for path in sorted(GOLDEN.glob(pattern)) if path.stat().st_size < size]
    return (path.read_bytes() for path in found[:: max(1, len(found) // most)])


_LEGACY_HEAD = seeds.LEGACY[: seeds.LEGACY.index(b"\x80\x02}X\x01\x00\x00\x00w")]


def _legacy(data: bytes) -> None:
    made = data[1:] if data[0] % 3 == 0 else _LEGACY_HEAD + data[1:]
    read_torch_checkpoint(_scratch().put("model.bin", made + (STORAGE if data[0] % 3 == 2 else b"")))


def _legacy_seeds() -> Iterator[bytes]:
    yield from _framed(0, seeds.LEGACY, *_small_files("**/*.bin"))
    yield from _framed(1, seeds.LEGACY[len(_LEGACY_HEAD) :])
    yield from _framed(2, seeds.LEGACY[len(_LEGACY_HEAD) : -16])


# --- safetensors, indexes


def _safetensors(data: bytes) -> None:
    made = data[1:] if data[0] == 0 else seeds.safetensors(data[1:], b"\0" * (data[0] - 1))
    read_safetensors(_scratch().put("model.safetensors", made))


def _safetensors_seeds() -> Iterator[bytes]:
    yield from _framed(0, seeds.WEIGHTS, *_small_files("**/*.safetensors"))
    shards = (
        sorted(GOLDEN.glob("distributed_safetensors/**/*.safetensors"))[::40]
        + sorted(GOLDEN.glob("adapters/**/*.safetensors"))[::9]
    )
    for path in shards:
        raw = path.read_bytes()
        yield from _framed(1, raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    two = {
        "a": {**seeds.ENTRY, "dtype": "BF16", "shape": [1, 2]},
        "b": {"dtype": "F4", "shape": [2, 4], "data_offsets": [4, 8]},
    }
    yield from _framed(9, json.dumps(two).encode(), b'{"__metadata__":{"format":"pt"}}')
    yield from _framed(
        5, json.dumps({"w": seeds.ENTRY, "__metadata__": {"DCP_SHARDING_INFO": '{"w":{"saved_offsets":[0]}}'}}).encode()
    )


def _index(data: bytes) -> None:
    scratch = _scratch()
    scratch.put("model-00001-of-00001.safetensors", seeds.WEIGHTS)
    name = ("model.safetensors.index.json", "pytorch_model.bin.index.json")[data[0] & 1]
    path = scratch.put(name, data[1:])
    read_indexed(path, read_safetensors)


def _index_seeds() -> Iterator[bytes]:
    made = [
        json.dumps({"metadata": size, "weight_map": {"w": name}}).encode()
        for size in ({}, {"total_size": 4}, 7)
        for name in ("model-00001-of-00001.safetensors", "../a.safetensors", "a.bin")
    ]
    yield from _framed(0, *made, *_small_files("**/*.index.json", 20))
    yield from _framed(1, *made)


@cache
def _items() -> bytes:
    return (_FOUND.parent / "seeds" / "two-tensors.distcp").read_bytes()


def _dcp(data: bytes) -> None:
    scratch = _scratch()
    scratch.put("dcp/__0_0.distcp", _items())
    path = scratch.put("dcp/.metadata", data[1:])
    read_dcp(path.parent)


def _dcp_seeds() -> Iterator[bytes]:
    ours = [path.read_bytes() for path in sorted((_FOUND.parent / "seeds" / "dcp").iterdir())]
    yield from _framed(0, seeds.metadata(), *ours, *_small_files("dcp/**/.metadata", 40))


# --- mappings, names


@cache
def known_catalogs() -> dict[str, Catalog]:
    shapes = {
        "w": (4, 4),
        "layers.0.a.weight": (4, 4),
        "layers.1.a.weight": (4, 4),
        "layers.0.b.bias": (4,),
        "e.weight": (8, 4),
    }
    entries, at = {}, 0
    for name, shape in shapes.items():
        numel = 1
        for size in shape:
            numel *= size
        entries[name] = TensorEntry(name, DTYPES["F32"], shape, dense(Extent("m.safetensors", at, 4 * numel), numel))
        at += 4 * numel
    return {name: Catalog(f"{name}.safetensors", "safetensors", entries) for name in ("s", "t")}


def _mapping(data: bytes) -> None:
    spec = parse_spec(data[1:].decode("utf-8", "replace"), "mapping.yaml")
    if data[0] & 1 and not spec.use and not spec.adapters:
        catalogs = {name: known_catalogs()["s"] for name in spec.sources}
        resolve(spec.rules, find_dropped(spec.drops, catalogs), catalogs, user_file="mapping.yaml")


_RULES = (
    '  "{rest...}": s:{rest...}\n',
    '  "l.{i:int}.x": "s:layers.{i}.a.weight"\n',
    '  "w{r}": {op: slice, of: "s:e.weight", start: "r * 4", stop: "r * 4 + 4", for: {r: 2}}\n',
    "  w: {op: scale, of: s:w, factor: 1e400}\n",
    "  w: [s:x, t:w]\n",
)


def _mapping_seeds() -> Iterator[bytes]:
    head = (
        "shardmerge: 1\nsources: {s: m.safetensors, t: {path: n, strip: [module.]}}\noutput: {path: out, dtype: bf16}\n"
    )
    rest = "drop: [s:layers.0.b.bias]\nlet: {heads: 2, dim: heads * 2}\nrest: {'{x...}': 's:{x...}'}\n"
    texts = [f"{head}tensors:\n{rule}{rest}" for rule in _RULES] + [seeds.MAPPING]
    for path in sorted((GOLDEN.parents[1] / "docs" / "examples").glob("*.yaml")):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        texts.append("".join(line for line in lines if not line.lstrip().startswith("#")))
    for frame in (0, 1):
        yield from _framed(frame, *(text.encode() for text in texts))


def _template(data: bytes) -> None:
    texts = data.decode("utf-8", "replace").split("\n")
    templates = [Template.parse(text) for text in texts[:2]]
    for template in templates:
        for name in texts:
            found = template.match(name)
            if found is not None and set(found) >= set(template.captures) and not template.formulas:
                template.format(found)
    for one in templates:
        for other in templates:
            is_narrower(one, other)
    Formula.parse(texts[-1]).value(lambda name: 7)


def _template_seeds() -> Iterator[bytes]:
    texts = (
        "layers.{i:int}.{rest...}",
        "{x:a|b}.{r:02}.weight",
        "{e*}.w{i + 1}",
        "a{{b}}.{x}",
        "layers.{i}.a_{j:int}.b",
        "{i + n * 2}.w",
        "{x:aa|a}b",
    )
    names = ("layers.0.a.weight", "a.07.weight", "aab", "a{b}.x")
    for text in texts:
        for name in names:
            yield f"{text}\n{{rest...}}\n{name}\n(i + 16) * 2 // 3 or x.y".encode()


def _expression(data: bytes) -> None:
    text, _, name = data.decode("utf-8", "replace").partition("\n")
    with suppress(ValueError):  # what it is documented to raise, for whom catches it
        matches(text, name)


def _expression_seeds() -> Iterator[bytes]:
    for text in (
        r"(.*\.)?(q_proj|v_proj)$",
        r"^model\.layers\.[0-9]{1,2}\..*",
        r"(a+)+b",
        r"[^.]*?\bk\B",
        r"(?:x|y){0,3}\d\w\S",
        "a**",
    ):
        yield f"{text}\nmodel.layers.10.q_proj".encode()


def _mergekit(data: bytes) -> None:
    read_mergekit(data.decode("utf-8", "replace"), "config.yml")


def _mergekit_seeds() -> Iterator[bytes]:
    yield from _small_files("mergekit/*.yml", 40)


# --- what shardmerge wrote and somebody may have changed


@cache
def _planned() -> tuple[Path, bytes, Part, bytes, bytes]:
    """Returns the directory of a result, its plan as text, a part of it, that part's receipt, and the result's."""
    import shardmerge as sm
    from shardmerge import api

    folder = _scratch().folder / "made"
    folder.mkdir()
    source = folder / "model.safetensors"
    two = {"w": seeds.ENTRY, "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [4, 8]}}
    source.write_bytes(seeds.safetensors(two, b"\0" * 8))
    (folder / "config.json").write_text(json.dumps({"model_type": "other", "vocab_size": 3}))
    options = sm.Options(sync=False)
    api.write_plan(api.prepare_conversion(source, options=options), folder / "plan.json", folder / "never")
    text = (folder / "plan.json").read_bytes()
    out = sm.convert(source, folder / "out", options=options).path
    part = next(iter(PlanText(text.decode().splitlines(keepends=True), "plan.json").parts([0])))
    from shardmerge.execute.engine import Outcome

    outcome = Outcome({"w": 1}, {tensor.name: 5 for tensor in part.shard.tensors}, 8, 2, 8)
    file = next(out.glob("*.safetensors"))
    receipt = receipt_bytes(receipt_of(part, file, outcome, synced=True, began=1.0, seconds=2.0), part)
    return out, text, part, receipt, (out / "shardmerge.json").read_bytes()


_SEALED = b'"sha256": "'


@cache
def _blob() -> bytes:
    """Returns the header of the plan's file in base64, most of it blanks: in an input it is one character."""
    return re.search(rb'\[0, "([A-Za-z0-9+/=]{99,})"\]', _planned()[1])[1]


def _plan(data: bytes) -> None:
    text = data[1:].replace(b"@", _blob())
    if data[0] & 1:
        body = text.rpartition(_SEALED)[0] or text
        text = body + b'"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    if data[0] & 2:
        for _ in PlanText(lines, "plan.json").parts(range(3)):
            pass
    else:
        PlanText(lines, "plan.json").plan()


def _plan_seeds() -> Iterator[bytes]:
    made = _planned()[1].replace(_blob(), b"@").replace(str(_scratch().folder).encode(), b"/x")
    for frame in range(4):
        yield from _framed(frame, made)


def _receipt(data: bytes) -> None:
    part = _planned()[2]
    if data[0] % 3 == 2:
        receipt_from(data[1:], part)
        return
    text = data[1:]
    if data[0] % 3 == 1:
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith(b' "sha256":')]
        digest = hashlib.sha256(b"".join(lines)).hexdigest().encode()
        at = next((n for n, line in enumerate(lines) if line.startswith(b' "shardmerge":')), len(lines))
        text = b"".join([*lines[:at], b' "sha256": "' + digest + b'",\n', *lines[at:]])
    read_recorded(_scratch().put("made/out/shardmerge.json", text).parent)


def _receipt_seeds() -> Iterator[bytes]:
    _, _, _, of_part, of_all = _planned()
    yield from _framed(0, of_all)
    yield from _framed(1, of_all)
    yield from _framed(2, of_part)


# --- files beside weights


def _config(data: bytes) -> None:
    frame, raw = data[0] % 4, data[1:]
    if frame == 0:
        read_adapter_config(parsed_object(raw, "adapter_config.json"), "adapter_config.json")
    elif frame == 1:
        config = parsed_object(raw, "config.json")
        described = Described(config, "config.json", _llama_shapes())
        disagreements(described)
        surplus(described)
    elif frame == 2:
        config = parsed_object(raw, "config.json")
        without_quantization(config)
        older_config(config, flat=bool(data[0] & 64), where="config.json")
    else:
        path = str(_scratch().put("config.json", raw))
        side = {"config.json": Extent(path, 0, len(raw)), "quant_config.json": Extent(path, 0, len(raw))}
        read_stated(Catalog("x", "safetensors", {}, side_files=side), lambda extent: raw)


@cache
def _llama_shapes() -> dict[str, tuple[int, ...]]:
    catalog = read_safetensors(sorted(_LLAMA.glob("*.safetensors"))[0])
    return {name: entry.shape for name, entry in catalog.entries.items()}


def _config_seeds() -> Iterator[bytes]:
    adapters = [path.read_bytes() for path in sorted(GOLDEN.glob("**/adapter_config.json"))[::3]]
    configs = [path.read_bytes() for path in sorted(GOLDEN.glob("**/config.json"))]
    configs = list({one: None for one in configs if len(one) < 700})[::6]
    yield from _framed(0, *adapters)
    yield from _framed(1, (_LLAMA / "config.json").read_bytes())
    for frame in (1, 2, 3):
        yield from _framed(frame, *configs)
    fp8 = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["a"]},
        "torch_dtype": "bfloat16",
    }
    yield from _framed(3, json.dumps(fp8).encode())


def _tokenizer(data: bytes) -> None:
    names = (
        ("tokenizer.json", "tokenizer_config.json"), ("tokenizer.model", "added_tokens.json"),
        ("vocab.json", "special_tokens_map.json"), ("vocab.txt", "tokenizer_config.json"),
    )[data[0] % 4]  # fmt: skip
    first, _, second = data[1:].partition(b"\n\0\n")
    parts = dict(zip(names, (first, second or b"{}"), strict=True))
    files = {name: Extent(name, 0, len(raw)) for name, raw in parts.items()}

    def read(extent: Extent) -> bytes:
        return parts[extent.file][extent.offset : extent.offset + extent.nbytes]

    token_id(files, read, "<image>")
    add_tokens(files, read, ("<image>", "<b>"), vocab_size=8, default_class="LlamaTokenizer", pad_token="<pad>")


def _tokenizer_seeds() -> Iterator[bytes]:
    tokens = [{"id": 2, "content": "<b>", "special": True}]
    made = (
        {"added_tokens": tokens, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}},
        {"model": {"vocab": [["a", -1.5], ["b", 0.0]]}, "added_tokens": []},
    )
    config = {
        "added_tokens_decoder": {"2": {"content": "<b>"}},
        "tokenizer_class": "LlamaTokenizer",
        "pad_token": {"content": "x"},
    }
    second = b"\n\0\n" + json.dumps(config).encode()
    yield from _framed(
        0, *(json.dumps(one).encode() + second for one in made), *(json.dumps(one, indent=1).encode() for one in made)
    )
    pieces = b"".join(b"\x0a\x07\x0a\x05" + piece for piece in (b"<unk>", b"<s>ab", b"<b>cd"))
    yield from _framed(1, pieces, pieces + b"\n\0\n" + b'{"<b>": 2, "<c>": 3}')
    yield from _framed(2, b'{"a": 0, "<b>": 1}' + second)
    yield from _framed(3, b"a\nb\n<b>\n" + second)


def _training(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    read_training_config(text)
    for name in ("model.llm_lora.r", "model", "betas.0", "a"):
        read_config_value(text, name)


def _training_seeds() -> Iterator[bytes]:
    yield (
        b"model = dict(type='LLaVAModel', freeze_llm=True, llm=dict(pretrained_model_name_or_path='a/b'),\n"
        b" llm_lora=dict(r=8, lora_alpha=16, rank_pattern={'a': 4}), visual_select_layer=-2)\nbetas = (0.9, 0.999)\n"
    )
    yield b"a = 8\nb = a\nmodel = {'lora': {'r': b, 'lora_alpha': float('inf')}}\nmodel.x = 1\n"
    yield b"# c\nx = [\n 1,\n 2]\nmodel = dict(\n  llm_lora=dict(\n   r=1e400,\n   lora_alpha=-0.0))\n"


TARGETS = {
    target.name: target
    for target in (
        Target("pickle", "pickles, and the names in them", _pickle, _pickle_seeds),
        Target("zip", "torch zips: directory, members, tensors", _zip, _zip_seeds, 800),
        Target("legacy", "torch files before 1.6", _legacy, _legacy_seeds),
        Target("safetensors", "safetensors headers", _safetensors, _safetensors_seeds),
        Target("index", "indexes of Hugging Face directories", _index, _index_seeds),
        Target("dcp", "`.metadata` of distributed checkpoints", _dcp, _dcp_seeds, 1500),
        Target("mapping", "YAML mappings, up to their rules", _mapping, _mapping_seeds, 400),
        Target("template", "name templates and formulas", _template, _template_seeds),
        Target("plan", "plans", _plan, _plan_seeds, 2500),
        Target("receipt", "receipts of results and of parts", _receipt, _receipt_seeds, 1700),
        Target("config", "`config.json`, `adapter_config.json`, quantization configs", _config, _config_seeds, 700),
        Target("tokenizer", "tokenizer files", _tokenizer, _tokenizer_seeds),
        Target("training", "training configs of mmengine", _training, _training_seeds),
        Target("mergekit", "configurations of mergekit", _mergekit, _mergekit_seeds),
        Target("expression", "patterns over module names", _expression, _expression_seeds),
    )
}
