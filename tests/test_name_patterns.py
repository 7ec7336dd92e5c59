"""Patterns of names: each stands for exactly the names it was made of, and thousands of names cost a few steps each."""

from __future__ import annotations

import sys
from collections import Counter
from types import FrameType

from hypothesis import given
from hypothesis import strategies as st

from shardmerge.plan.catalog_tree import human_count
from shardmerge.plan.name_patterns import NamePattern, name_patterns, segment_text

SEGMENTS = st.sampled_from(
    [
        "0",
        "1",
        "2",
        "7",
        "10",
        "31",
        "007",
        "01",
        "-1",
        "1-3",
        "",
        "a",
        "b",
        "q_proj",
        "k_proj",
        "weight",
        "bias",
        "{a,b}",
    ]
)
NAMES = st.dictionaries(
    st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join), st.sampled_from(["F32", "BF16"]), max_size=60
)


def texts(patterns: list[NamePattern[str]]) -> list[str]:
    return [".".join(map(segment_text, one.segments)) for one in patterns]


def expanded(patterns: list[NamePattern[str]]) -> Counter[tuple[str, str]]:
    return Counter((name, one.kind) for one in patterns for name in one.names())


@given(NAMES)
def test_patterns_stand_for_each_name_once(kinds: dict[str, str]) -> None:
    patterns = name_patterns(kinds.items())
    assert expanded(patterns) == Counter(kinds.items())
    assert sum(one.count for one in patterns) == len(kinds)


@given(NAMES, st.randoms())
def test_the_order_of_the_names_decides_no_more_than_the_order_of_the_patterns(kinds: dict[str, str], random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(kinds.items())
    random.shuffle(shuffled)

    def products(pairs: object) -> set[tuple[object, ...]]:
        return {(tuple(map(frozenset, one.segments)), one.kind, one.usual) for one in name_patterns(pairs)}  # type: ignore[arg-type]

    assert products(shuffled) == products(kinds.items())


LAYERS = {
    f"model.layers.{i}.{rest}": "F32"
    for i in range(4)
    for rest in ("attn.q_proj.weight", "attn.k_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight")
}


def test_equal_layers_are_a_line_for_each_module() -> None:
    patterns = name_patterns(LAYERS.items())
    assert texts(patterns) == ["model.layers.0-3.attn.{q,k}_proj.weight", "model.layers.0-3.mlp.{gate,up}_proj.weight"]
    assert [one.count for one in patterns] == [8, 8]


def test_a_layer_of_another_kind_stands_alone_and_says_what_the_others_are() -> None:
    patterns = name_patterns((LAYERS | {"model.layers.2.mlp.up_proj.weight": "BF16"}).items())
    assert texts(patterns) == [
        "model.layers.0-3.attn.{q,k}_proj.weight",
        "model.layers.0-3.mlp.gate_proj.weight",
        "model.layers.{0-1,3}.mlp.up_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
    ]
    assert [one.usual for one in patterns] == [None, None, None, "F32"]


def test_two_halves_of_a_model_are_no_oddity() -> None:
    kinds = {f"stages.{i}.weight": "small" if i < 2 else "large" for i in range(4)}
    assert [(one, *texts([one])) for one in name_patterns(kinds.items())] == [
        (NamePattern((("stages",), ("0", "1"), ("weight",)), "small"), "stages.0-1.weight"),
        (NamePattern((("stages",), ("2", "3"), ("weight",)), "large"), "stages.2-3.weight"),
    ]


def test_a_layer_that_is_missing_is_a_gap() -> None:
    kinds = {name: kind for name, kind in LAYERS.items() if not name.startswith("model.layers.1.mlp")}
    assert texts(name_patterns(kinds.items()))[1] == "model.layers.{0,2-3}.mlp.{gate,up}_proj.weight"


def test_numbers_inside_numbers() -> None:
    experts = [(f"layers.{i}.experts.{e}.w{w}.weight", "") for i in range(3) for e in range(8) for w in (1, 3)]
    assert texts(name_patterns(experts)) == ["layers.0-2.experts.0-7.w{1,3}.weight"]
    patterns = name_patterns([pair for pair in experts if not pair[0].startswith("layers.1.experts.5")])
    assert texts(patterns) == ["layers.{0,2}.experts.0-7.w{1,3}.weight", "layers.1.experts.{0-4,6-7}.w{1,3}.weight"]


def test_numbers_with_zeros_before_them_are_words() -> None:
    assert texts(name_patterns([("w.007", ""), ("w.008", ""), ("w.9", ""), ("w.10", "")])) == ["w.00{7,8}", "w.9-10"]


def test_modules_of_an_adapter_stand_together_inside_their_layer_only() -> None:
    names = [f"layers.{i}.attn.{p}_proj.lora_A.default.weight" for i in range(2) for p in "qk"]
    assert texts(name_patterns((one, "") for one in names)) == ["layers.0-1.attn.{q,k}_proj.lora_A.default.weight"]
    towers = [("llm.model.embed.weight", ""), ("vision.model.embed.weight", "")]
    assert texts(name_patterns(towers)) == ["llm.model.embed.weight", "vision.model.embed.weight"]


def test_words_are_cut_where_a_part_of_a_word_ends() -> None:
    assert segment_text(("input_layernorm", "post_attention_layernorm")) == "{input,post_attention}_layernorm"
    assert segment_text(("weight", "height")) == "{weight,height}"
    assert segment_text(("layer_norm1", "layer_norm2")) == "layer_norm{1,2}"
    assert segment_text(("q_proj", "q_proj_b")) == "q_{proj,proj_b}"
    assert segment_text(tuple("abcdefghijk")) == "{a,b,c,d,e,f,g,... 4 more}"


def calls(layers: int) -> tuple[int, int]:
    """Returns how many calls it takes to group the names of a mixture of experts, and how many names there are."""
    kinds = [
        (f"model.layers.{i}.mlp.experts.{e}.{w}_proj.weight", "F32" if (i, e) != (1, 3) else "BF16")
        for i in range(layers)
        for e in range(128)
        for w in ("gate", "up", "down")
    ]
    found = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        name_patterns(kinds)
    finally:
        sys.setprofile(before)
    return found, len(kinds)


def test_a_hundred_thousand_names_cost_a_few_steps_each() -> None:
    (few, some), (many, names) = calls(26), calls(260)
    assert names == 10 * some == 99_840
    assert many < 11 * few
    assert many < 60 * names


def test_as_many_words_as_names_cost_no_more() -> None:
    patterns = name_patterns((f"part_{index}x.weight", "F32") for index in range(50_000))
    assert texts(patterns) == ["part_{0x,1x,2x,3x,4x,5x,6x,... 49993 more}.weight"]


def test_parameters_have_three_digits() -> None:
    counts = {0: "0", 131: "131", 999: "999", 1_000: "1.00 K", 6_290: "6.29 K", 525_336_576: "525 M"}
    counts |= {999_600: "1.00 M", 8_030_261_248: "8.03 B", 671_026_419_200: "671 B", 1_570_000_000_000: "1.57 T"}
    assert {number: human_count(number) for number in counts} == counts
