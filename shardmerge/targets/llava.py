"""The target ``hf/llava``: a directory that ``LlavaForConditionalGeneration.from_pretrained`` loads.

Names are the legacy ones, the only layout that transformers 4.51 to 5.23 all load. Config, tokenizer and
processor files come from the pretrained text and vision models, edited as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from shardmerge.dtypes import DType
from shardmerge.errors import ShardmergeError, TargetError, raise_all
from shardmerge.targets import clip, llama, tokenizer
from shardmerge.targets.architectures import JsonObject, dump, load_object, stored_dtype
from shardmerge.targets.clip import VisionArchitecture
from shardmerge.targets.expectation import Component, Expectation, ReadSideFile, SideFile
from shardmerge.targets.llama import TextArchitecture
from shardmerge.targets.tokenizer import TokenizerFiles
from shardmerge.targets.training_config import TrainingFacts, read_training_config
from shardmerge.tensors import Catalog, Extent, Shape

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

# XTuner rounds a vocabulary up to this many rows when its new tokens do not fit (`to_huggingface_llava`).
_ROW_MULTIPLE = 64

_DEFAULT_ROLES = {"text": "llm", "vision": "vision", "trained": "trained"}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Part:
    """A pretrained part of the model, and what the training config says of it."""

    title: str
    prefix: str
    source: str
    path: str
    frozen: bool | None
    lora: bool

    @property
    def reason(self) -> str:
        return f"the checkpoint was trained with the {self.title} frozen" if self.frozen else ""

    @property
    def line(self) -> str:
        """The line of mapping.yaml that names the part's source."""
        placeholder = f"<directory or hub id of the pretrained {self.title}>"
        return f"{self.source}: {_yaml_scalar(self.path or placeholder)}"


@dataclass(frozen=True, slots=True)
class _Model:
    """The two bases, read: what the directory will describe."""

    text_catalog: Catalog
    text_config: JsonObject
    text: TextArchitecture
    text_where: str
    vision_catalog: Catalog
    vision_config: JsonObject
    vision: VisionArchitecture


def expect(
    roles: Mapping[str, str], catalogs: Mapping[str, Catalog], read: ReadSideFile, dtype: DType | None
) -> Expectation:
    """Returns what the finished LLaVA directory must hold.

    Parameters
    ----------
    roles
        The source that plays ``text``, ``vision`` and ``trained``; `llm`, `vision` and `trained` where not
        said.
    catalogs
        The sources by name.
    read
        Reads the bytes of a side file.
    dtype
        What the tensors are cast to, or ``None`` where each keeps its own.

    Raises
    ------
    TargetError
        ``missing-source``, ``lora-not-yet``, ``projector-depth``, ``unsupported-architecture``,
        ``odd-config``, or what the tokenizer and JSON files raise; all of one stage together.
    """
    names = {**_DEFAULT_ROLES, **roles}
    trained = catalogs.get(names["trained"])
    facts = read_training_config(trained.training_config if trained else "")
    parts = _parts(names, facts)
    raise_all([*_refusals(trained, parts, facts), *_missing_sources(parts, catalogs)])
    model = _read_model(catalogs[names["text"]], catalogs[names["vision"]], read)
    tokens = tokenizer.add_tokens(
        model.text_catalog.side_files,
        read,
        (IMAGE_TOKEN, PAD_TOKEN),
        pad_token=PAD_TOKEN,
        vocab_size=model.text.vocab_size,
        default_class=model.text.tokenizer_class,
    )
    rows = _rows(model.text.vocab_size, tokens.ids.values())
    processors, warnings = _processor_files(model, read)
    config = dump(_config(model, tokens.ids, rows, facts, dtype))
    return Expectation(
        tensors=_tensors(model, rows),
        grown=_grown(model.text, rows),
        tied={HEAD: EMBEDDING} if model.text.tied else {},
        side_files=(
            SideFile("config.json", (config,)),
            *_generation_config(model, read, tokens.ids[PAD_TOKEN]),
            *tokens.files,
            *processors,
        ),
        components=_components(parts, names["trained"]),
        warnings=(*_tokenizer_warnings(model.text_catalog, tokens), *_base_warnings(model), *warnings),
    )


# ---- what the training left out


def _parts(names: Mapping[str, str], facts: TrainingFacts) -> tuple[_Part, _Part]:
    language = _Part(
        title="language model",
        prefix="language_model.",
        source=names["text"],
        path=facts.llm_path,
        frozen=facts.freeze_llm,
        lora=facts.llm_lora is not None,
    )
    vision = _Part(
        title="visual encoder",
        prefix="vision_tower.",
        source=names["vision"],
        path=facts.vision_path,
        frozen=facts.freeze_visual_encoder,
        lora=facts.visual_encoder_lora is not None,
    )
    return language, vision


def _yaml_scalar(text: str) -> str:
    """Returns the text as YAML reads it back: plain where it is a path or hub id, else quoted as in JSON."""
    return text if re.fullmatch(r"[\w.~/<][\w./<> -]*", text) else json.dumps(text)


def _refusals(trained: Catalog | None, parts: Iterable[_Part], facts: TrainingFacts) -> list[ShardmergeError]:
    where = trained.path if trained else ""
    adapted = [part.title for part in parts if part.lora]
    if not adapted and trained and any(".lora_" in name for name in trained.names()):
        adapted = ["model"]
    problems = [_lora_refused(title, where) for title in adapted]
    if facts.projector_depth not in (None, 2):
        problems.append(
            TargetError(
                "projector-depth",
                "the projector does not fit: a Hugging Face LLaVA has exactly two linear layers",
                where=where,
                found=f"projector_depth {facts.projector_depth} in the training config",
                expected="projector_depth 2",
                hint="write `tensors:` rules for another layout, without the target hf/llava",
            )
        )
    return problems


def _lora_refused(title: str, where: str) -> ShardmergeError:
    return TargetError(
        "lora-not-yet",
        f"the {title} was trained as a LoRA adapter, and adapters are not merged yet",
        where=where,
        hint="merge the adapter into its base with peft first (merge_and_unload), then convert the result",
    )


def _missing_sources(parts: Iterable[_Part], catalogs: Mapping[str, Catalog]) -> list[ShardmergeError]:
    return [problem for part in parts if (problem := _missing_source(part, catalogs.get(part.source))) is not None]


def _missing_source(part: _Part, catalog: Catalog | None) -> ShardmergeError | None:
    if catalog is not None and "config.json" in catalog.side_files:
        return None
    if catalog is None:
        count = clip.published_tensor_count(part.path)
        if count and part.frozen:
            what = f"{count} tensors of {part.prefix}* have no source: {part.reason}. Add `{part.line}`"
        else:
            what = f"the mapping has no source for the {part.title}{_because(part)}"
        return TargetError("missing-source", what, expected=f"a source named `{part.source}`", hint=part.line)
    return TargetError(
        "missing-source",
        f"the source `{part.source}` has no config.json to describe the {part.title}{_because(part)}",
        where=catalog.path,
        expected="a directory with config.json beside the weights",
        hint=part.line,
    )


def _because(part: _Part) -> str:
    if part.frozen:
        return f": {part.reason}" + (f", from {part.path!r}" if part.path else "")
    return f": the training started from {part.path!r}" if part.path else ""


def _components(parts: Iterable[_Part], trained: str) -> tuple[Component, ...]:
    bases = [Component(part.prefix, part.reason, f"Add `{part.line}`") for part in parts]
    remedy = f"Check that `{trained}` is the checkpoint of the training: XTuner always saves the projector with it"
    return (*bases, Component("multi_modal_projector.", "", remedy))


# ---- the two bases


def _read_model(text_catalog: Catalog, vision_catalog: Catalog, read: ReadSideFile) -> _Model:
    """Reads both configs; what is wrong with one does not hide what is wrong with the other."""
    problems: list[ShardmergeError] = []
    text = _attempt(lambda: _read_text(text_catalog, read), problems)
    vision = _attempt(lambda: _read_vision(vision_catalog, read), problems)
    raise_all(problems)
    if text is None or vision is None:
        raise AssertionError("a part without a problem was read")
    text_where = text_catalog.side_files["config.json"].file
    return _Model(text_catalog, *text, text_where, vision_catalog, *vision)


def _attempt(reads: Callable[[], _T], problems: list[ShardmergeError]) -> _T | None:
    try:
        return reads()
    except ShardmergeError as error:
        problems += error.each()
        return None


def _read_text(catalog: Catalog, read: ReadSideFile) -> tuple[JsonObject, TextArchitecture]:
    extent = catalog.side_files["config.json"]
    config = load_object(extent, read)
    nested = config.get("text_config")  # another LLaVA can serve as the text base
    config = nested if isinstance(nested, dict) else config
    return config, llama.read_architecture(config, extent.file)


def _read_vision(catalog: Catalog, read: ReadSideFile) -> tuple[JsonObject, VisionArchitecture]:
    extent = catalog.side_files["config.json"]
    config = clip.unwrap(load_object(extent, read))
    return config, clip.read_architecture(config, extent.file)


# ---- names and shapes


def _rows(vocab_size: int, ids: Iterable[int]) -> int:
    """Returns the rows of the vocabulary: as they are if all ids fit, else rounded up as XTuner does.

    XTuner asks for one row less than it needs, and only the rounding makes up for it; where that falls short
    of the highest id, this is 64 rows more, and in all other cases the same number.
    """
    needed = max(ids) + 1
    return vocab_size if needed <= vocab_size else -(-needed // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _tensors(model: _Model, rows: int) -> dict[str, Shape]:
    tensors = {f"language_model.{name}": shape for name, shape in llama.expected(model.text, rows)}
    tensors |= {f"vision_tower.{name}": shape for name, shape in clip.expected(model.vision)}
    hidden = model.text.hidden_size
    for layer, columns in ((1, model.vision.hidden_size), (2, hidden)):
        tensors[f"multi_modal_projector.linear_{layer}.weight"] = (hidden, columns)
        tensors[f"multi_modal_projector.linear_{layer}.bias"] = (hidden,)
    return tensors


def _grown(text: TextArchitecture, rows: int) -> frozenset[str]:
    if rows == text.vocab_size:
        return frozenset()
    return frozenset({EMBEDDING} if text.tied else {EMBEDDING, HEAD})


# ---- config.json and generation_config.json


def _config(model: _Model, ids: Mapping[str, int], rows: int, facts: TrainingFacts, dtype: DType | None) -> JsonObject:
    """Returns config.json. Every value is stated, since defaults changed between versions of transformers.

    The tie flag stands in both places: 4.x reads it in ``text_config``, 5.x at the top.
    """
    text_dtype = dtype.torch if dtype else stored_dtype(model.text_config)
    vision_dtype = dtype.torch if dtype else stored_dtype(model.vision_config)
    layer = facts.visual_select_layer
    config: JsonObject = {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_seq_length": model.vision.patches,
        "image_token_index": ids[IMAGE_TOKEN],
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "pad_token_id": ids[PAD_TOKEN],
        "projector_hidden_act": "gelu",
        "text_config": llama.text_config(model.text_config, model.text, rows, text_dtype, model.text_where),
        "tie_word_embeddings": model.text.tied,
        "vision_config": clip.vision_config(model.vision_config, vision_dtype),
        "vision_feature_layer": -2 if layer is None else layer,
        "vision_feature_select_strategy": "default",
    }
    return config | ({"torch_dtype": text_dtype} if text_dtype else {})


def _generation_config(model: _Model, read: ReadSideFile, pad_id: int) -> tuple[SideFile, ...]:
    """Returns generation_config.json: the text base's, or its special tokens; with the pad token that was
    added.
    """
    extent = model.text_catalog.side_files.get("generation_config.json")
    if extent is not None:
        config = load_object(extent, read)
        config.pop("_from_model_config", None)  # lets transformers replace the file by what config.json says
    else:
        config = {key: model.text_config.get(key) for key in ("bos_token_id", "eos_token_id")}
        config = {key: value for key, value in config.items() if value is not None}
    return (SideFile("generation_config.json", (dump(config | {"pad_token_id": pad_id}),)),)


# ---- tokenizer and processor


def _tokenizer_warnings(catalog: Catalog, tokens: TokenizerFiles) -> tuple[str, ...]:
    if "tokenizer.json" in catalog.side_files:
        return ()
    if tokens.files:
        # 4.51, 4.57 and 5.23 compared: 5.x takes its generic class for every LLaVA, whatever class is named,
        # and that one neither puts a space in front of a text nor keeps a newline.
        warning = (
            f"{catalog.path} has no tokenizer.json, and transformers 5 reads such a LLaVA's tokenizer differently "
            "from 4.x. Save the base's tokenizer with transformers 4 first: "
            "`AutoTokenizer.from_pretrained(BASE).save_pretrained(BASE)`"
        )
        return (warning,)
    numbered = " and ".join(f"`{token}` as {number}" for token, number in tokens.ids.items())
    warning = (
        f"{catalog.path} has no tokenizer files, so none are written, and {numbered} are assumed. Name a "
        "text source with a tokenizer, or copy one into the finished directory and add these tokens in order"
    )
    return (warning,)


def _base_warnings(model: _Model) -> tuple[str, ...]:
    bases = (
        (model.text_catalog, model.text_config, "language model"),
        (model.vision_catalog, model.vision_config, "visual encoder"),
    )
    return tuple(
        f"{catalog.path} is a quantized {title}: tensors taken from it are not what the output's config says"
        for catalog, config, title in bases
        if config.get("quantization_config")
    )


def _processor_files(model: _Model, read: ReadSideFile) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    side_files: Mapping[str, Extent] = model.vision_catalog.side_files
    images, warnings = clip.image_processor(side_files, read, model.vision)
    # Without this file the processor of 4.51 to 5.23 loads and fails when called, and without the additional
    # token, which is CLIP's class token, it counts one image token too few.
    processor: JsonObject = {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": 1,
        "patch_size": model.vision.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    files = (
        SideFile("preprocessor_config.json", (dump(images | {"processor_class": "LlavaProcessor"}),)),
        SideFile("processor_config.json", (dump(processor),)),
    )
    return files, warnings
