"""Models of many families, saved by transformers, come out as they went in, whether or not they are known by name.

Each is converted, cast, unwrapped and renamed there and back, and loaded by its own class: nothing missing, unexpected
or mismatched, the values bit for bit, and all that lay beside the weights.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge as sm
from shardmerge.errors import ShardmergeError
from shardmerge.prepare.load_check import check_plan
from shardmerge.targets.agreement import Described, disagreements
from shardmerge.tensors import Shape
from tests.families import FAMILIES, complaints, made, raised

transformers = pytest.importorskip("transformers")

# What shardmerge writes itself; everything else is a copy.
_WRITTEN = ("config.json", "model.safetensors.index.json", "shardmerge.json")


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives, by the class, the directory of a tiny model, made once; every third is sharded."""

    @cache
    def saved(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("families") / kind
        sharded = list(FAMILIES).index(kind) % 3 == 0
        made(kind).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
        _beside(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def values(checkpoint: Any) -> Any:
    """Gives, by the class, what that class loads from the directory."""
    return cache(lambda kind: loaded(checkpoint(kind), kind))


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


def test_there_are_many_families_that_are_not_known_by_name() -> None:
    """Every tensor of the others is compared elsewhere; here they stand for what every model has in common."""
    from shardmerge.targets.tables import every_table

    known = {kind for table in every_table() for kind in table.classes}
    assert len({model_type for kind, (model_type, _) in FAMILIES.items() if kind not in known}) >= 40


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_converts_and_loads(kind: str, checkpoint: Any, values: Any, tmp_path: Path) -> None:
    source, expected = checkpoint(kind), values(kind)
    for dtype in ("", "bfloat16"):
        options = sm.Options(dtype=dtype or None, sync=False)
        result = sm.convert(source, tmp_path / f"out{dtype}", options=options)
        assert result.plan.warnings == ()
        assert files(result.path) == files(source)
        assert same(loaded(result.path, kind), expected, getattr(torch, dtype or "float32"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_wrapped_family_is_unwrapped_and_renamed(kind: str, checkpoint: Any, values: Any, tmp_path: Path) -> None:
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
    expected = values(kind)
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


def test_a_head_that_one_of_two_configs_unties(tmp_path: Path) -> None:
    """Versions of transformers differ in which of the two they ask; 5.24 saves them as they are."""
    kind = "Gemma3ForConditionalGeneration"
    model = made(kind, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ShardmergeError) as refused:
        sm.convert(tmp_path / "model", tmp_path / "out")
    assert refused.value.code == "config-disagrees"
    key = "text_config.tie_word_embeddings"
    assert f"`{key}` to false" in refused.value.hint
    config = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    config["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), "utf-8")
    sm.convert(tmp_path / "model", tmp_path / "out", options=sm.Options(sync=False))
    assert same(loaded(tmp_path / "out", kind), dict(model.state_dict()), torch.float32)


# ---- what is not one model


def layer_away(tensors: dict[str, Shape]) -> dict[str, Shape]:
    """Returns the tensors without the last layer of the longest stack."""
    numbered = [
        match for name in tensors if (match := re.match(r"(.*?\.(?:layers|layer|h|blocks|block)\.)(\d+)\.", name))
    ]
    count = Counter(match[1] for match in {match[0]: match for match in numbered}.values())
    if not count:
        return {}
    prefix, layers = count.most_common(1)[0]
    return {name: shape for name, shape in tensors.items() if not name.startswith(f"{prefix}{layers - 1}.")}


def loads(config: dict[str, Any], tensors: dict[str, Shape]) -> bool:
    """Whether transformers would load it as it is: what `--check transformers` asks in a child process."""
    try:
        found = check_plan(config, {name: ("float32", list(shape)) for name, shape in tensors.items()})
    except Exception:  # noqa: BLE001  # whatever loading raises
        return False
    return not (found["missing"] or found["unexpected"] or found["mismatched"])


def shapes_of(kind: str, config: dict[str, Any]) -> dict[str, Shape] | None:
    """Returns the names and shapes of the real class, None where the library refuses the config."""
    try:
        made_config = transformers.AutoConfig.for_model(**deepcopy(config))
        with torch.device("meta"):
            model = getattr(transformers, kind)(made_config)
    except Exception:  # noqa: BLE001  # whatever its validation raises
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# Not a size of any tensor, and yet a statement: Swin's is the length of `depths`, which says it already.
_NOT_SHOWN = {("SwinModel", "num_layers")}
# Layers and vocabularies that go by other names than anywhere else: only transformers knows them.
_ONLY_TRANSFORMERS = {
    ("RwkvForCausalLM", "layer"), ("RwkvForCausalLM", "num_hidden_layers"), ("RwkvForCausalLM", "vocab_size"),
    ("MambaForCausalLM", "vocab_size"), ("MarianMTModel", "vocab_size"), ("SegformerForSemanticSegmentation", "layer"),
    ("Blip2ForConditionalGeneration", "qformer_config.num_hidden_layers"),
    ("Blip2ForConditionalGeneration", "text_config.vocab_size"),
}  # fmt: skip
_LAYERS_AND_WORDS = re.compile(r"layer|depth|vocab_size")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_not_one_model_is_refused(kind: str, checkpoint: Any) -> None:
    """With transformers all of it. Without: layers and vocabulary, and never a size that no tensor shows."""
    config = json.loads((checkpoint(kind) / "config.json").read_text("utf-8"))
    catalog = sm.inspect(checkpoint(kind))
    tensors = {name: catalog[name].shape for name in catalog.names()}
    real = shapes_of(kind, config)
    assert loads(config, tensors)
    middle = sorted(tensors)[len(tensors) // 2]
    assert not loads(config, {name: shape for name, shape in tensors.items() if name != middle})
    cases = [(key, other, tensors, shapes_of(kind, other) != real) for key, other in raised(config)]
    fewer = layer_away(tensors)
    cases += [("layer", config, fewer, True)] if fewer else []
    for key, other, given, shown in cases:
        assert loads(other, given) == (not shown), key
        refused = bool(disagreements(Described(other, "config.json", given)))
        assert shown or not refused or (kind, key) in _NOT_SHOWN, key
        if shown and _LAYERS_AND_WORDS.search(key):
            assert refused == ((kind, key) not in _ONLY_TRANSFORMERS), key
