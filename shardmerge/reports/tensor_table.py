"""The table of tensors: a row each, or of many a row for names that differ only in their numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from shardmerge.plan.tables import human_bytes
from shardmerge.reports.groups import Pattern, leaves_text, patterns
from shardmerge.reports.markup import code, escaped, table
from shardmerge.reports.provenance import Origin, Provenance

# More tensors than this share rows, and more rows than this are not shown: the page stays below 1 MB.
MOST_ROWS = 1_000

_HEADS = ("Tensor", "Type", "Shape", "Bytes", "From", "How", "CRC-32", "Rule")
_BYTES = 3


def tensors(found: Provenance) -> str:
    """Returns the table, with what is needed to search it."""
    numbers = _rule_numbers(found.tensors)
    if len(found.tensors) <= MOST_ROWS:
        note, rows = "", [_row(one, numbers) for one in found.tensors]
    else:
        every = patterns(found.tensors)
        rows = [_pattern_row(one, numbers) for one in every[:MOST_ROWS]]
        note = _note(len(found.tensors), len(every))
    body = table(_HEADS, rows, caption="Tensors of the result", numbers=(_BYTES,), short=(1, 2, 6))
    return (
        '<section id="tensors" aria-labelledby="tensors-head"><h2 id="tensors-head">Tensors</h2>'
        f"{note}"
        '<div class="search" id="find" role="search" hidden>'
        '<label class="unseen" for="search">Search the tensors</label>'
        '<input id="search" type="search" placeholder="Name, source, type, operation" autocomplete="off" '
        'spellcheck="false"><output id="count" for="search"></output></div>'
        f"{body}</section>"
    )


def _note(count: int, rows: int) -> str:
    cut = f" The first {MOST_ROWS:,} of {rows:,} rows are shown." if rows > MOST_ROWS else ""
    return (
        f"<p>{count:,} tensors. Those that differ only in the numbers in their names share a row, and a number in a "
        f"search matches any number.{cut} The receipt <code>shardmerge.json</code> lists each tensor with its "
        "checksum.</p>"
    )


def _row(one: Origin, numbers: Mapping[str, int]) -> Sequence[str]:
    proof = f"<code>{escaped(one.crc32)}</code>" if one.crc32 else "cloned: none"
    return _cells(code(one.name), one, one.nbytes, leaves_text([leaf.text for leaf in one.leaves]), proof, numbers)


def _pattern_row(one: Pattern, numbers: Mapping[str, int]) -> Sequence[str]:
    name = code(one.name) + (f' <span class="dim">({one.count:,} tensors)</span>' if one.count > 1 else "")
    proof = "in the receipt" if one.first.crc32 else "cloned: none"
    return _cells(name, one.first, one.nbytes, one.source, proof, numbers)


def _cells(name: str, one: Origin, nbytes: int, source: str, proof: str, numbers: Mapping[str, int]) -> Sequence[str]:
    rule = numbers.get(one.rule)
    return (
        name,
        escaped(one.dtype),
        escaped(list(one.shape)),
        escaped(human_bytes(nbytes)),
        code(source) if source else "",
        escaped(one.how),
        proof,
        f'<a href="#rule-{rule}">{rule}</a>' if rule else "",
    )


# Rules that have a number and a row.
_MOST_RULES = 500


def _rule_numbers(found: Sequence[Origin]) -> dict[str, int]:
    rules = dict.fromkeys(one.rule for one in found)
    return {rule: number for number, rule in enumerate(list(rules)[:_MOST_RULES], 1)}


def rules(found: Provenance) -> str:
    """Returns the rules that asked for the tensors: file, line and column, and the template."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in found.tensors:
        counts[one.rule][0] += 1
        counts[one.rule][1] += one.nbytes
    body = table(
        ("Number", "Rule", "Tensors", "Bytes"),
        _rule_rows(found, counts),
        caption="Rules of the mapping",
        numbers=(2, 3),
    )
    return (
        '<section aria-labelledby="rules"><h2 id="rules">Rules</h2>'
        "<p>The lines of the mapping or preset that asked for the tensors.</p>"
        f"<details><summary>{len(counts):,} rules</summary>{body}</details></section>"
    )


def _rule_rows(found: Provenance, counts: Mapping[str, Sequence[int]]) -> Iterator[Sequence[str]]:
    for rule, number in _rule_numbers(found.tensors).items():
        tensors, nbytes = counts[rule]
        yield f'<span id="rule-{number}">{number}</span>', code(rule), f"{tensors:,}", escaped(human_bytes(nbytes))
