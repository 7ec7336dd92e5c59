"""Models of many families, saved by transformers, come out as they went in: no family is known to shardmerge by name.

Each is converted, cast, unwrapped and renamed there and back, and loaded by its own class: nothing missing, unexpected
or mismatched, the values bit for bit, and all that lay beside the weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from tests.families import FAMILIES, complaints, made

transformers = pytest.importorskip("transformers")

# What shardmerge writes itself; everything else is a copy.
_WRITTEN = ("config.json", "model.safetensors.index.json", "shardmerge.json")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    """Gives, by the class, the directory of a tiny model, made once; every third is sharded."""

    @cache
    def saved(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("families") / kind
        sharded = list(FAMILIES).index(kind) % 3 == 0
        made(kind).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
        _beside(folder)
        return folder

    return saved


def _beside(folder: Path) -> None:
    """Puts the files of a model's tokenizer and processors beside it, as their own classes write them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(folder)
    (folder / "README.md").write_text("# tiny\n", "utf-8")


def loaded(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Loads a directory by its class and returns its values; fails on any key that is not as it should be."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert complaints(info) == {}
    return dict(model.state_dict())


def same(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    return values.keys() == expected.keys() and all(
        torch.equal(values[name].to(dtype).double(), one.to(dtype).double()) for name, one in expected.items()
    )


def files(folder: Path) -> dict[str, bytes]:
    """Returns the files beside the weights that are copies."""
    sides = (path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors")
    return {path.name: path.read_bytes() for path in sides if path.name not in _WRITTEN}


def run(folder: Path, text: str) -> sm.Result:
    folder.mkdir(exist_ok=True)
    mapping = folder / "mapping.yaml"
    mapping.write_text("shardmerge: 1\noutput: out\n" + text)
    return sm.run(mapping, options=sm.Options(sync=False))


def test_there_are_many_families() -> None:
    """None of those that are known by name, whose every tensor is compared elsewhere."""
    from shardmerge.targets.known_models import KNOWN_CLASSES

    assert len({model_type for model_type, _ in FAMILIES.values()}) >= 50
    assert not FAMILIES.keys() & set(KNOWN_CLASSES)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_converts_and_loads(kind: str, checkpoint: Any, tmp_path: Path) -> None:  # noqa: ANN401
    source = checkpoint(kind)
    expected = loaded(source, kind)
    for dtype in ("", "bfloat16"):
        options = sm.Options(dtype=dtype or None, sync=False)
        result = sm.convert(source, tmp_path / f"out{dtype}", options=options)
        assert result.plan.warnings == ()
        assert files(result.path) == files(source)
        assert same(loaded(result.path, kind), expected, getattr(torch, dtype or "float32"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_wrapped_family_is_unwrapped_and_renamed(kind: str, checkpoint: Any, tmp_path: Path) -> None:  # noqa: ANN401
    """A trainer's prefix and head in a file of their own, the config of the family in another place."""
    source = checkpoint(kind)
    tensors = {name: value for file in sorted(source.glob("*.safetensors")) for name, value in load_file(file).items()}
    wrapped = {f"module.{name}": value for name, value in tensors.items()} | {"module.v_head.weight": torch.ones(1, 2)}
    save_file(wrapped, tmp_path / "trained.safetensors")
    result = run(
        tmp_path / "unwrapped",
        f'sources: {{trained: {{path: {tmp_path}/trained.safetensors, strip: "module."}}, base: {source}}}\n'
        "target: {name: hf/model, text: base}\ndrop: [trained:v_head.weight]\n"
        'tensors: {"{n...}": ["trained:{n...}", "base:{n...}"]}\n',
    )
    assert files(result.path) == files(source)
    expected = loaded(source, kind)
    assert same(loaded(result.path, kind), expected, torch.float32)
    first = next(iter(tensors))
    renamed = run(
        tmp_path / "renamed",
        f'sources: {{a: {source}}}\ntensors: {{other: "a:{first}"}}\nrest: {{"inner.{{n...}}": "a:{{n...}}"}}\n',
    )
    back = run(
        tmp_path / "back",
        f"sources: {{a: {renamed.path}, base: {source}}}\ntarget: {{name: hf/model, text: base}}\n"
        f'drop: ["base:{{n...}}"]\ntensors: {{{first}: "a:other", "{{n...}}": "a:inner.{{n...}}"}}\n',
    )
    assert same(loaded(back.path, kind), expected, torch.float32)
