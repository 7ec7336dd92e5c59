"""The pages of the ops, from what the ops say of themselves and from their examples, which are run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from docs.markdown import link, table
from docs.tiny import Ran, run_example
from shardmerge.mapping.reader import parse_spec
from shardmerge.mapping.spec import OpTerm
from shardmerge.ops.arrays import Array
from shardmerge.ops.contract import Gathered, Inverse, Mirror, Move, OpKind, Param, Scattered
from shardmerge.ops.registry import OPS

_FAMILIES = {
    "rearranging": "Shapes and parts",
    "cutting": "Shapes and parts",
    "joining": "Shapes and parts",
    "heads": "Attention heads",
    "casts": "Types",
    "dequantize": "Types",
    "pointwise": "Sums and comparisons",
    "fill": "New tensors",
    "vocabulary": "Vocabularies",
    "lora": "Adapters",
    "dora": "Adapters",
    "extract": "Adapters",
    "merging_kinds": "Merging models",
    "spherical": "Merging models",
    "stock": "Merging models",
    "swapping": "Merging models",
    "agreement": "Merging models",
}
# What is shown whole; larger tensors are shown by their shape.
_MOST_SHOWN = 32


def op_pages() -> dict[str, str]:
    """Returns every page of the ops by its path below docs/, the index included."""
    pages = {f"ops/{name}.md": _page(kind) for name, kind in OPS.items()}
    return {"ops/index.md": _index(), **pages}


def _index() -> str:
    lines = [
        "# Ops",
        "",
        "An op makes one target tensor from one or more source tensors. Write it in place of a source name:",
        "",
        "```yaml",
        'q_proj.weight: {op: chunk, of: "src:qkv.weight", chunks: 3, take: 0}',
        "```",
        "",
        "Ops can be nested, candidates of a rule can be ops, and numbers can be formulas: see [the mapping language]"
        "(../guides/mapping-language.md).",
        "",
        "An op of kind *copy* only moves source bytes. It costs no more than reading them, and its",
        "result is bit-identical to the source. An op of kind *compute* uses float32 (float64 if an input is float64),",
        "and the result is rounded once, at the end.",
        "",
        "If every op of a mapping has an inverse, [`shardmerge invert`](../reference/commands.md#shardmerge-invert)",
        "writes the inverse mapping.",
    ]
    for title, kinds in _families().items():
        rows = [
            (link(f"`{kind.name}`", f"{kind.name}.md"), _sentence(kind.about), _inverse_words(kind), _family_word(kind))
            for kind in kinds
        ]
        lines += ["", f"## {title}", "", *table(("op", "what it does", "inverse", "kind"), rows)]
    return "\n".join(lines) + "\n"


def _families() -> dict[str, list[OpKind]]:
    found: dict[str, list[OpKind]] = {}
    for kind in OPS.values():
        title = _FAMILIES.get(kind.build.__module__.rsplit(".", 1)[-1], "Others")
        found.setdefault(title, []).append(kind)
    return found


def _sentence(about: str) -> str:
    """The first sentence: up to a point with a capital letter behind it."""
    match = re.match(r".*?[^.]\.(?=$|\s+[A-Z`])", about, re.DOTALL)
    return match[0] if match else about


def _page(kind: OpKind) -> str:
    return (
        "\n".join(
            [
                f"# {kind.name}",
                "",
                kind.about,
                "",
                "```yaml",
                kind.example,
                "```",
                "",
                "## Parameters",
                "",
                *table(("parameter", "type", "default", "meaning"), list(_rows(kind))),
                "",
                "## On tiny tensors",
                "",
                "The result of the example:",
                "",
                "```",
                *_shown(run_example(kind.name)),
                "```",
                "",
                "## Inverse",
                "",
                _inverse_sentence(kind),
            ]
        )
        + "\n"
    )


def _rows(kind: OpKind) -> Iterator[tuple[str, ...]]:
    for term in kind.terms:
        yield f"`{term}`", "a tensor", "required", "A `source:name`, or an op."
    for term in kind.optional_terms:
        yield f"`{term}`", "a tensor", "none", "A `source:name`, or an op: the base of the other models."
    if kind.takes_of:
        takes, about = (
            "tensors",
            "A list of `source:name` or ops, or one name with `{e*}`, which stands for all matches.",
        )
        yield (
            "`of`",
            *((takes, "required", about) if kind.many else ("a tensor", "required", "A `source:name`, or an op.")),
        )
    for param in kind.params:
        yield f"`{param.name}`", _takes(param), _default(param), param.about


def _takes(param: Param) -> str:
    words = {
        "int": "a whole number or formula",
        "number": "a number or formula",
        "flag": "`true` or `false`",
        "text": "text",
        "ints": "a list of whole numbers or formulas",
        "numbers": "a list of numbers or formulas",
        "dtype": "a float type",
    }
    return " or ".join(f"`{choice}`" for choice in param.choices) if param.choices else words[param.kind]


def _default(param: Param) -> str:
    if param.default is None:
        return "none" if param.optional else "required"
    if isinstance(param.default, float):
        return f"`{np.format_float_positional(param.default, trim='-')}`"
    return f"`{str(param.default).lower() if isinstance(param.default, bool) else param.default}`"


def _shown(ran: Ran) -> Iterator[str]:
    given = {f"{source}:{name}": value for source, tensors in ran.sources.items() for name, value in tensors.items()}
    texts = {**{name: _tensor(value) for name, value in given.items()}}
    yield from _block(texts)
    if given:
        yield ""
    yield from _block({name: _tensor(value) for name, value in ran.made.items()})


def _block(texts: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, texts), default=0)
    for name, text in texts.items():
        first, *others = text.splitlines()
        yield f"{name:{width}}  {first}"
        yield from (f"{'':{width}}  {line}" for line in others)


def _tensor(values: Array) -> str:
    head = f"{_dtype(values)} {list(values.shape)}"
    if values.size > _MOST_SHOWN:
        return f"{head}  {_some(values)}"
    if math.prod(values.shape[:-1]) <= 1 or (values.shape[-1] == 1 and values.ndim == 2):
        return f"{head}  {_numbers(values.reshape(-1))}"
    return f"{head}\n" + "\n".join(_numbers(line) for line in values.reshape(-1, values.shape[-1]))


def _some(values: Array) -> str:
    flat = values.reshape(-1)
    if (flat == flat[0]).all():
        return f"all {_number(flat[0])}"
    return f"{', '.join(map(_number, flat[:4]))}, ..., {_number(flat[-1])}"


def _numbers(values: Array) -> str:
    return ", ".join(map(_number, values))


def _number(value: float) -> str:
    return f"{float(value):.6g}"


def _dtype(values: Array) -> str:
    names = {"float32": "F32", "bfloat16": "BF16", "int64": "I64", "float64": "F64", "float8_e4m3fn": "F8_E4M3"}
    return names[np.dtype(values.dtype).name]


def _inverse_words(kind: OpKind) -> str:
    if kind.inverse is None:
        return "none"
    name = kind.inverse.name
    return "itself" if name == kind.name else link(f"`{name}`", f"{name}.md")


def _inverse_sentence(kind: OpKind) -> str:
    if kind.inverse is None:
        return f"None: {kind.lossy}."
    return _how(kind, kind.inverse)


def _how(kind: OpKind, inverse: Inverse) -> str:
    other = link(f"`{inverse.name}`", f"{inverse.name}.md") if inverse.name != kind.name else f"`{inverse.name}` itself"
    match inverse:
        case Mirror():
            return f"{other}, one tensor for one tensor."
        case Gathered():
            return f"{other}, if rules take all other parts of the same tensor."
        case Scattered(needs=needs):
            return f"{other}, one rule for each input, if `{needs}` is given."


def _family_word(kind: OpKind) -> str:
    return "copy" if is_move(kind) else "compute"


def is_move(kind: OpKind) -> bool:
    """Tells whether an op moves bytes only: its example is built and asked."""
    text = "\n".join(f"  {line}" for line in kind.example.splitlines())
    spec = parse_spec(f"shardmerge: 1\nsources: {{src: a, adapter: b}}\ntensors:\n{text}\n", kind.name)
    term = next(one for rule in spec.rules for one in rule.candidates)
    while isinstance(term, OpTerm) and term.kind.name != kind.name:
        term = next(one for one in term.inputs if isinstance(one, OpTerm))
    assert isinstance(term, OpTerm)
    values = {param.name: param.default for param in kind.params if param.default is not None}
    for name, argument in term.arguments.items():
        numbers = tuple(formula.value(lambda _: None) for formula in argument.formulas)
        single = {param.name for param in kind.params if param.kind in ("int", "number")}
        values[name] = (numbers[0] if name in single else numbers) if numbers else argument.text
    return isinstance(kind.build({"salt": "0", **values}), Move)
