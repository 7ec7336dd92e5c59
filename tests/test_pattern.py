"""Name templates: what they match, what they refuse, and that no name makes them slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.errors import MappingError
from shardmerge.mapping.pattern import Template, escape
from shardmerge.mapping.yaml_nodes import Mark
from tests.counting import calls

MATCHES = [
    # template, name, bindings
    ("lm_head.weight", "lm_head.weight", {}),
    ("llm.{rest...}", "llm.model.norm.weight", {"rest": "model.norm.weight"}),
    ("llm.{rest...}", "llm.w", {"rest": "w"}),
    ("{rest...}", "a", {"rest": "a"}),
    ("{rest...}.inv_freq", "m.layers.0.rotary.inv_freq", {"rest": "m.layers.0.rotary"}),
    ("a.{rest...}.z.{p}", "a.b.c.z.w", {"rest": "b.c", "p": "w"}),
    ("a.{rest...}.z", "a.z.z.z", {"rest": "z.z"}),
    ("h.{i:int}.attn", "h.12.attn", {"i": "12"}),
    ("h.{i:int}.attn", "h.007.attn", {"i": "007"}),
    ("h.{i:int}.attn", "h.123456789.attn", {"i": "123456789"}),
    ("e.w{x}", "e.w1", {"x": "1"}),
    ("e.w{x}_{k:a|b}", "e.wq_k_a", {"x": "q_k", "k": "a"}),
    ("{x:q|qk}_proj", "qk_proj", {"x": "qk"}),
    ("v.{top:encoder|embeddings}.{rest...}", "v.encoder.layers.0", {"top": "encoder", "rest": "layers.0"}),
    ("{x}.{x}", "a.a", {"x": "a"}),
    ("{x}.{rest...}.{x}", "a.b.a", {"x": "a", "rest": "b"}),
    ("a{{b}}.{x}", "a{b}.c", {"x": "c"}),
    ("{{{x}}}", "{y}", {"x": "y"}),
    ("a*b.(c)[d]$.{x}", "a*b.(c)[d]$.^", {"x": "^"}),
    ("é.{x}", "é.線\n", {"x": "線\n"}),
    ("a..b", "a..b", {}),
]

MISSES = [
    ("lm_head.weight", "lm_head.weights"),
    ("lm_head.weight", "x.lm_head.weight"),
    ("llm.{rest...}", "llm"),
    ("llm.{rest...}", "llm."),
    ("llm.{rest...}", "llmx.w"),
    ("llm.{rest...}", "llm.a..b"),
    ("a.{rest...}.z", "a.z"),
    ("{rest...}.inv_freq", "inv_freq"),
    ("p.model.2.{p}", "p.model.20.weight"),
    ("p.model.2.{p}", "p.model.2.a.weight"),
    ("{x}", "a.b"),
    ("e.w{x}", "e.w"),
    ("h.{i:int}.attn", "h.x.attn"),
    ("h.{i:int}.attn", "h.-1.attn"),
    ("h.{i:int}.attn", "h.1234567890.attn"),
    ("h.{i:int}.attn", "h.٣.attn"),
    ("h.{i:int}", "h.1\n"),
    ("{k:a|b}", "c"),
    ("{k:a|b}", "ab"),
    ("{x}.{x}", "a.b"),
    ("{x}.{rest...}.{x}", "a.b.c"),
]

REFUSED = [
    # template, code, column (from 1)
    ("", "empty-template", 1),
    ("a.{b", "unpaired-brace", 3),
    ("a.b}", "unpaired-brace", 4),
    ("a.{}", "bad-capture", 3),
    ("a.{b c}", "bad-capture", 3),
    ("a.{1}", "bad-capture", 3),
    ("a.{0.__class__}", "bad-capture", 3),
    ("a.{b...:int}", "bad-capture", 3),
    ("a.{b*:int}", "bad-capture", 3),
    ("a.{i:integer}", "bad-capture", 3),
    ("a.{i:}", "bad-capture", 3),
    ("a.{k:a|}", "bad-capture", 3),
    ("a.{k:a.b|c}", "bad-capture", 3),
    ("a.{b}{c}", "adjacent-captures", 6),
    ("a.{b...}{c}", "adjacent-captures", 9),
    ("{a...}.x.{b...}", "two-rests", 10),
    ("{a...}.{a...}", "two-rests", 8),
    ("a.w{b...}", "rest-not-whole", 4),
    ("a.{b...}w", "rest-not-whole", 3),
    ("a.{x}_{y}", "ambiguous-segment", 7),
    ("a.{x}_{y:q|qk}_w", "ambiguous-segment", 7),
    ("a.{x}_{i:int}0", "ambiguous-segment", 7),
]


@pytest.mark.parametrize(("template", "name", "bindings"), MATCHES)
def test_a_match_binds_and_formats_back(template, name, bindings):
    parsed = Template.parse(template)
    assert parsed.match(name) == bindings
    assert parsed.format(bindings) == name
    assert parsed.fits(bindings)
    assert parsed.captures == tuple(bindings)


@pytest.mark.parametrize(("template", "name"), MISSES)
def test_whole_names_only(template, name):
    assert Template.parse(template).match(name) is None


@pytest.mark.parametrize(("template", "code", "column"), REFUSED)
def test_refused_with_the_column(template, code, column):
    with pytest.raises(MappingError) as caught:
        Template.parse(template, Mark("m.yaml", 7, 5))
    assert (caught.value.code, caught.value.where) == (code, f"m.yaml:7:{4 + column}")
    assert caught.value.hint


def test_without_a_place_the_column_of_the_template_is_told():
    with pytest.raises(MappingError) as caught:
        Template.parse("ab.{")
    assert caught.value.where == "column 4"


def test_collecting_is_parsed_for_later():
    template = Template.parse("m.{e*}.w")
    assert template.collects
    assert not Template.parse("m.{e}.w").collects


@pytest.mark.parametrize(
    ("template", "bindings", "fits"),
    [
        ("{i:int}", {"i": "1"}, True),
        ("{i:int}", {"i": "one"}, False),
        ("{k:a|b}", {"k": "b"}, True),
        ("{k:a|b}", {"k": "c"}, False),
        ("{x}", {"x": "a.b"}, False),
        ("{x...}", {"x": "a.b"}, True),
    ],
)
def test_a_target_takes_only_what_its_own_captures_allow(template, bindings, fits):
    assert Template.parse(template).fits(bindings) is fits


_segments = st.text(st.characters(exclude_characters="."), min_size=1, max_size=6)
_names = st.lists(_segments, min_size=1, max_size=6).map(".".join)


@st.composite
def _cases(draw):
    """A name, and a template made of it: some segments captured, a run of them by ``...``."""
    segments = draw(_names).split(".")
    parts = [draw(st.sampled_from([escape(text), f"{{c{at}}}"])) for at, text in enumerate(segments)]
    if draw(st.booleans()):
        start = draw(st.integers(0, len(parts) - 1))
        parts[start : draw(st.integers(start + 1, len(parts)))] = ["{rest...}"]
    return ".".join(parts), ".".join(segments)


@given(_cases())
def test_a_template_made_from_a_name_matches_it_and_makes_it_again(case):
    text, name = case
    template = Template.parse(text)
    bindings = template.match(name)
    assert bindings is not None
    assert template.format(bindings) == name
    assert template.fits(bindings)


_pieces = st.sampled_from(
    ["a", "b", ".", "{x}", "{y}", "{i:int}", "{k:a|ab}", "{r...}", "{{", "}}", "{", "}", "1", "_"]
)


@given(st.lists(_pieces, min_size=1, max_size=8).map("".join), st.text("ab.1_{}", max_size=12))
def test_any_text_is_a_template_or_an_error_and_a_match_always_formats_back(text, name):
    try:
        template = Template.parse(text)
    except MappingError:
        return
    bindings = template.match(name)
    if bindings is not None:
        assert template.format(bindings) == name
        assert template.fits(bindings)


@given(_names)
def test_an_escaped_name_matches_itself_only(name):
    template = Template.parse(escape(name))
    assert template.match(name) == {}
    assert template.match(name + "x") is None


_TEMPLATES = ["{x}_a{i:int}a.z", "w{x}a{k:a|aa}", "{rest...}.b.{x}.c", "{x}.{x}", "{x}.{r...}.{x}", "a{x:a|aa|aaa}a.b"]


@pytest.mark.parametrize("text", _TEMPLATES)
@pytest.mark.parametrize("unit", ["a", "a.", "a.b.", "_a1a", "a1", ".", "wa"])
def test_a_long_name_takes_no_more_steps_than_a_short_one(text, unit):
    """What is left to one regular expression has one way to match: quadratic work would not end for minutes."""
    template = Template.parse(text)

    def match(length):
        template.match("w" + unit * (length // len(unit)))
        template.match(unit * (length // len(unit)) + "!")

    assert calls(lambda: match(100_000)) == calls(lambda: match(1_000))
