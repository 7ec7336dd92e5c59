"""The target ``meta/llama``: ``consolidated.NN.pth`` and params.json, as Meta's own code loads them.

Names and the way that tensors are cut over ranks follow ``llama/model.py`` of meta-llama (fairscale's
``ColumnParallelLinear`` cuts rows, ``RowParallelLinear`` columns, ``ParallelEmbedding`` columns until LLaMA 3, whose
``VocabParallelEmbedding`` cuts rows). A target name has the rank in front: ``00.norm.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.architecture import Architecture
from shardmerge.targets.architecture_reader import read_architecture
from shardmerge.targets.config_numbers import JsonObject, dump
from shardmerge.targets.expectation import Expectation, FileGroup, Request, Target, described_by
from shardmerge.targets.foreign_configs import feed_forward_width, llama_3_scaling
from shardmerge.targets.options import choice, whole_number
from shardmerge.targets.text_config import rope_scaling
from shardmerge.targets.text_sources import TextSource, read_text_source
from shardmerge.targets.vocabulary import VocabularyRows, rows
from shardmerge.tensors import Shape, SideFile

_MAX_RANKS = 64
_FACTORS = (8, 32)  # LLaMA 3.1 and 3.2
# Meta's own choices first: LLaMA 1 and 2, 3 8B, 3 70B; then whatever divides.
_MULTIPLES = (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1)


def expect(request: Request) -> Expectation:
    """Returns what the finished directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``unsupported-architecture``, ``odd-config``, ``odd-ranks``, ``bad-option``,
        ``vocabulary-rows``.
    """
    text = read_text_source(request)
    ranks = whole_number(request, "ranks", 1, most=_MAX_RANKS)
    by_columns = choice(request, "embedding_dim", ("0", "1")) == "1"
    counted = rows(request, text.architecture.vocab_size)
    _check(text, ranks, counted, by_columns=by_columns)
    shapes = dict(_tensors(text.architecture, counted.count, ranks, by_columns=by_columns))
    names = [f"{rank:02}" for rank in range(ranks)]
    tokenizer = text.catalog.side_files.get("tokenizer.model")
    # Rows are added to a whole matrix, before it is cut: with several ranks the rules have to do it.
    resizable = [f"{rank}.{name}.weight" for rank in names[: ranks == 1] for name in ("tok_embeddings", "output")]
    return Expectation(
        tensors={f"{rank}.{name}": shape for rank in names for name, shape in shapes.items()},
        resized=counted.resized(resizable),
        side_files=(
            SideFile("params.json", (dump(params(text, counted.count)),)),
            *((SideFile("tokenizer.model", (tokenizer,)),) if tokenizer else ()),
        ),
        beside=text.catalog.side_files,
        components=(described_by("", text.where),),
        warnings=_window(text),
        groups=tuple(FileGroup(f"{rank}.", "", f"consolidated.{rank}", ".pth", sharded=False) for rank in names),
    )


# What a LLaMA has beside its sizes: nothing of this.
_PLAIN = {"model_type": "llama", "architectures": None, "attention_bias": False, "mlp_bias": False}


def _window(text: TextSource) -> tuple[str, ...]:
    window = text.config.get("sliding_window")
    if text.architecture.model_type != "mistral" or not isinstance(window, int):
        return ()
    return (f"this Mistral looks back {window} tokens at most, Meta's LLaMA at all: the two differ for longer texts",)


def _check(text: TextSource, ranks: int, counted: VocabularyRows, *, by_columns: bool) -> None:
    model = text.architecture
    plain = read_architecture({**text.config, **_PLAIN}, text.where).changed(tie_word_embeddings=model.tied)
    if model.tensors() != plain.tensors() or model.head_dim * model.heads != model.hidden_size:
        raise TargetError(
            "unsupported-architecture",
            "Meta's LLaMA cannot hold biases, norms of queries and keys, or experts, nor for heads that do not "
            "share the hidden size evenly",
            where=text.where,
            found=f"{model.model_type}: {model.heads} heads of {model.head_dim}, hidden size {model.hidden_size}",
            expected="a plain LLaMA, and heads times their size equal to the hidden size",
        )
    _check_arithmetic(text)
    sizes = {
        "attention heads": model.heads,
        "key and value heads": model.kv_heads,
        "feed-forward rows": model.intermediate_size,
        "vocabulary rows": counted.count,
        **({"hidden size": model.hidden_size} if by_columns else {}),
    }
    for what, size in sizes.items():
        if size % ranks:
            raise TargetError(
                "odd-ranks",
                "the model cannot be cut into this many ranks",
                where=text.where,
                found=f"{size} {what}, {ranks} ranks",
                expected="a number of ranks that divides it",
            )


def _check_arithmetic(text: TextSource) -> None:
    """Checks what params.json has no field for: Meta's code has one activation and one stretched rotary embedding."""
    odd: JsonObject = {}
    scaling = rope_scaling(text.config)
    usual = llama_3_scaling(text.architecture.hidden_size)
    if scaling and (scaling | {"factor": 8.0} != usual | {"factor": 8.0} or scaling["factor"] not in _FACTORS):
        odd["rope_scaling"] = scaling
    act = text.config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        odd["hidden_act"] = act
    if odd:
        raise TargetError(
            "unsupported-architecture",
            "Meta's LLaMA cannot hold settings of this model",
            where=text.where,
            found=shown(odd),
            expected=f"hidden_act 'silu', and no rope_scaling or {shown(usual)}",
        )


def _tensors(model: Architecture, vocabulary: int, ranks: int, *, by_columns: bool) -> Iterator[tuple[str, Shape]]:
    """Yields the names and shapes of one rank; all ranks are alike."""
    hidden, inner = model.hidden_size, model.intermediate_size // ranks
    queries, keys = model.heads * model.head_dim // ranks, model.kv_heads * model.head_dim // ranks
    embedding = (vocabulary, hidden // ranks) if by_columns else (vocabulary // ranks, hidden)
    yield "tok_embeddings.weight", embedding
    for index in range(model.num_layers):
        prefix = f"layers.{index}"
        for name, shape in (
            ("attention.wq", (queries, hidden)),
            ("attention.wk", (keys, hidden)),
            ("attention.wv", (keys, hidden)),
            ("attention.wo", (hidden, queries)),
            ("feed_forward.w1", (inner, hidden)),
            ("feed_forward.w2", (hidden, inner)),
            ("feed_forward.w3", (inner, hidden)),
        ):
            yield f"{prefix}.{name}.weight", shape
        yield f"{prefix}.attention_norm.weight", (hidden,)
        yield f"{prefix}.ffn_norm.weight", (hidden,)
    yield "norm.weight", (hidden,)
    yield "output.weight", (vocabulary // ranks, hidden)


def params(text: TextSource, vocabulary: int) -> JsonObject:
    """Returns params.json; ``ffn_dim_multiplier`` only where rounding up alone does not give the width."""
    model = text.architecture
    multiple, multiplier = _feed_forward(model.hidden_size, model.intermediate_size)
    rope = text.config.get("rope_parameters")
    nested = rope if isinstance(rope, dict) else {}
    made: JsonObject = {
        "dim": model.hidden_size,
        "multiple_of": multiple,
        "n_heads": model.heads,
        "n_kv_heads": model.kv_heads,
        "n_layers": model.num_layers,
        "norm_eps": text.config.get("rms_norm_eps", 1e-6),
        "rope_theta": nested.get("rope_theta", text.config.get("rope_theta", 10000.0)),
        "vocab_size": vocabulary,
    }
    scaling = rope_scaling(text.config)
    if scaling:
        if scaling["factor"] != llama_3_scaling(model.hidden_size)["factor"]:
            made["rope_scale_factor"] = scaling["factor"]
        made["use_scaled_rope"] = True
    return made if multiplier is None else made | {"ffn_dim_multiplier": multiplier}


def _feed_forward(hidden: int, inner: int) -> tuple[int, float | None]:
    """Returns ``multiple_of`` and ``ffn_dim_multiplier`` that give this width by Meta's formula."""
    for multiple in _MULTIPLES:
        if feed_forward_width(hidden, 1.0, multiple) == inner:
            return multiple, None
    for multiple in _MULTIPLES:
        for tenths in range(11, 41):
            if feed_forward_width(hidden, tenths / 10, multiple) == inner:
                return multiple, tenths / 10
    # Half a row more, so that rounding down cannot lose one.
    return 1, (inner + 0.5) / int(8 * hidden / 3)


TARGET = Target(
    name="meta/llama",
    about="A LLaMA for Meta's own code: consolidated.NN.pth and params.json.",
    roles={"text": "what describes the model: a Hugging Face config.json"},
    options={
        "ranks": "into how many tensor-parallel files it is cut; 1 where not said",
        "embedding_dim": "`0`: the embedding is cut by rows, as in LLaMA 3; `1`: by columns, as in LLaMA 1 and 2",
    },
    expect=expect,
)
