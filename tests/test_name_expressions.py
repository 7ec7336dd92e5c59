"""Expressions over module names: Python's own answer, and never for ever."""

from __future__ import annotations

import random
import re
import time

import pytest

from shardmerge.targets.name_expressions import compiled, matches

EXPRESSIONS = (
    r"(.*\.)?(q_proj)$", r"(.*\.)?(^model\.layers\.0\.q)$", r".*\.(q|k|v)_proj", r"model.layers.[0-3].x", r"a{2,3}b*c?",
    r"(?:ab|cd)+", r"[^.]+\.\d+\.w", r"(?P<x>a)b", r"a{,2}", r"[]a]b", r"[a-c\d-]x", r"layers\.(1[0-9]|2)\..*",
    r"x\w*\W", "", r"a|", r"(a|b)*abb", r"a{2}", r"{a}", r"(|a)b", r"^a$|b",
    r".*layers\.[0-9]+\.self_attn\.(q|v)_proj$", r"a+?b??", r"\Aa\.b\Z", r"[\w.]+\S", r".*\bq.*", r".+\Bb", r"\b\b.*",
)  # fmt: skip
NAMES = (
    "q_proj", "model.layers.0.q", "a.b.q_proj", "xq_proj", "model.layers.1.self_attn.q_proj", "aab", "aaac", "abcd",
    "abab", "k.12.w", "ab", "aa", "", "]b", "ax", "3x", "-x", "layers.15.q", "layers.2.", "x_a1.", "abb", "babb", "{a}",
    "a.b",
)  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_answer_is_that_of_re(expression: str) -> None:
    rng = random.Random(0)
    names = [*NAMES, *("".join(rng.choice("ab.1x]") for _ in range(rng.randrange(6))) for _ in range(200))]
    for name in names:
        assert matches(expression, name) == bool(re.fullmatch(expression, name)), name


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*b", "(a*)*b", "(.*a){20}"])
def test_what_takes_re_for_ever_takes_a_moment(expression: str) -> None:
    begin = time.process_time()
    assert not matches(expression, "a" * 300 + "c")
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    "expression",
    ["(", ")", "a**", "(?=a)", "(?i)a", r"(a)\1", "[a", "a{9999}", "((((a{50}){50}){50}){50})", "*", "a\\", "(" * 2000],
)
def test_what_is_no_plain_expression_is_said(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        compiled(expression)


def test_groups_are_nested_so_deep_and_no_deeper() -> None:
    assert matches("(" * 50 + "a" + ")" * 50 + "(b)" * 60, "a" + "b" * 60)
    with pytest.raises(ValueError, match="nested too deep"):
        compiled("(" * 51 + "a" + ")" * 51)
