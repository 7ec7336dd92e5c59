"""The picture at the head of each guide: what goes in, what shardmerge does, what comes out. Drawn as SVG.

A new guide needs a line in ``FLOWS``. The pictures follow the reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

# A box: its title, and what is in it.
Box = tuple[str, str]


@dataclass(frozen=True)
class Flow:
    """What goes in, the command or op that is used and what it does, and what comes out."""

    inputs: Sequence[Box]
    via: Box
    outputs: Sequence[Box]


_MODEL = ("Hugging Face model", "safetensors, config, tokenizer")

FLOWS = {
    "xtuner-llava": Flow(
        [("iter_5198.pth", "language model and projector"), ("CLIP ViT-L/14-336", "visual encoder, frozen")],
        ("xtuner/llava-to-hf", "new names, new rows, casts"),
        [("LlavaForConditionalGeneration", "safetensors, config, processor")],
    ),
    "deepspeed": Flow(
        [("model states", "names, shapes, frozen weights"), ("optimizer states", "fp32 partitions of every rank")],
        ("shardmerge convert", "partitions joined, cast"),
        [_MODEL],
    ),
    "fsdp": Flow(
        [(".metadata", "which chunk lies where"), ("__0_0.distcp ...", "the chunks of every rank")],
        ("shardmerge convert", "chunks joined, cast"),
        [_MODEL],
    ),
    "megatron": Flow(
        [("iter_0001000/", "torch_dist, or a file a rank"), ("configuration", "from the run, or a base")],
        ("llama/megatron-dist-to-hf", "QKV and experts split, layers renamed"),
        [_MODEL],
    ),
    "resume-elsewhere": Flow(
        [("ZeRO-3 of 4 ranks", "weights and Adam's moments")],
        ("--with-optimizer", "resharded on the way"),
        [("DCP for FSDP2", "any number of ranks"), ("universal checkpoint", "DeepSpeed, any number of ranks")],
    ),
    "mapping-language": Flow(
        [("source a", "any checkpoint"), ("source b", "any checkpoint")],
        ("mapping.yaml", "rules: names, ops, types"),
        [("target", "what must be there is checked")],
    ),
    "layouts": Flow(
        [("a checkpoint", "names of any framework")],
        ("shardmerge init", "recognises the layout"),
        [("mapping.yaml", "with the preset that leads on")],
    ),
    "generations": Flow(
        [("saved by transformers 4.51", "model.language_model...")],
        ("hf/to-5.6", "names, experts fused"),
        [("names of 5.6", "loads without renames")],
    ),
    "adapters": Flow(
        [("base model", "as it was trained on"), ("adapter", "LoRA, DoRA, LoHa, ...")],
        ("adapters:", "W + B A, rounded once"),
        [("merged model", "needs no peft")],
    ),
    "merging": Flow(
        [("base", ""), ("model a", ""), ("model b", "")],
        ("op: ties", "or another method, a tile at a time"),
        [("one model", "with a model card")],
    ),
    "vocabulary": Flow(
        [("embed_tokens, lm_head", "128,256 rows")],
        ("vocabulary: 128320", "new rows: the mean"),
        [("embed_tokens, lm_head", "128,320 rows")],
    ),
    "architectures": Flow(
        [("config.json", "model_type and sizes")],
        ("a table a model type", "names and shapes as YAML"),
        [("expected tensors", "checked before anything is written")],
    ),
    "cloning": Flow(
        [("model.safetensors", "other names")],
        ("reflink", "XFS, btrfs: blocks are shared"),
        [("renamed model", "no data copied")],
    ),
    "python": Flow(
        [("any checkpoint", "or a mapping, never written")],
        ("open_checkpoint", "reads what is asked for"),
        [("numpy, torch", "rows, tensors, state dicts"), ("transformers", "from_pretrained(state_dict=...)")],
    ),
    "plans": Flow(
        [("mapping.yaml", "and the headers of its sources")],
        ("shardmerge plan -o", "every output byte decided"),
        [("plan.json", "carried out now, later, elsewhere")],
    ),
    "report": Flow(
        [("out/model/", "and its receipt, shardmerge.json"), ("run --report", "bytes and memory over time")],
        ("shardmerge report", "where each byte is from"),
        [("model.report.html", "one file, no network")],
    ),
    "signing": Flow(
        [("out/model/", "and its receipt, shardmerge.json")],
        ("shardmerge attest", "verifies all bytes"),
        [("model.intoto.json", "SHA-256 of every file, provenance"), ("model.sig", "by model_signing")],
    ),
    "cluster": Flow(
        [("mapping.yaml", "or plan.json")],
        ("run --part I/N", "on any number of nodes"),
        [("files of the result", "each made once"), ("shardmerge finish", "checks all, publishes")],
    ),
    "stages": Flow(
        [("sources", "checkpoints: headers are read"), ("mapping.yaml", "rules, ops, target")],
        ("plan", "a value: every output byte decided"),
        [("execute", "each byte read once, in tiles"), ("publish", "checked, then renamed in one step")],
    ),
    "flow": Flow(
        [
            ("training checkpoints", "ZeRO, FSDP, Megatron, XTuner"),
            ("frozen or base models", "CLIP, LLaMA, SigLIP"),
            ("adapters", "LoRA, DoRA"),
        ],
        ("shardmerge", "plan, then stream tensor by tensor"),
        [_MODEL, ("receipt", "from where each tensor came")],
    ),
}

_BOX, _GAP, _ROW, _PAD = 226, 52, 62, 12
_COLUMNS = (_PAD, _PAD + _BOX + _GAP, _PAD + 2 * (_BOX + _GAP))
_WIDTH = 3 * _BOX + 2 * _GAP + 2 * _PAD
_STYLE = """
  text { font: 13px sans-serif; fill: #1d2433 } .title { font-weight: bold }
  .via { font: bold 13px monospace; fill: #fff }
  .small { font-size: 12px; fill: #5b6475 } .via-small { font-size: 12px; fill: #dfe6ff }
  .ground { fill: #fff } .box { fill: #f3f5fb; stroke: #b8c0d6 } .step { fill: #3f51b5; stroke: none }
  path { fill: none; stroke: #8791ab; stroke-width: 1.6 } .head { fill: #8791ab; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6e9f0 } .small { fill: #a2abbd } .ground { fill: #16181d } .box { fill: #22262f; stroke: #3d4453 }
    .step { fill: #5566c9 } .via { fill: #fff }
  }
"""


def flow_pictures() -> dict[str, str]:
    """Returns the SVG of every flow by its path below ``docs``."""
    return {f"pictures/{name}.svg": flow_picture(flow) for name, flow in FLOWS.items()}


def flow_picture(flow: Flow) -> str:
    """Returns the SVG of a flow: inputs at the left, the step in the middle, outputs at the right."""
    rows = max(len(flow.inputs), len(flow.outputs))
    height = rows * _ROW + _PAD
    middle = height / 2
    said = f"{_listed(flow.inputs)} become {_listed(flow.outputs)} through {flow.via[0]}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(said)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="8"/>',
        *(_curve(_COLUMNS[0] + _BOX, y, _COLUMNS[1], middle) for y in _centres(flow.inputs, height)),
        *(_curve(_COLUMNS[1] + _BOX, middle, _COLUMNS[2], y) for y in _centres(flow.outputs, height)),
        *_column(flow.inputs, _COLUMNS[0], height),
        *_box(flow.via, _COLUMNS[1], middle, step=True),
        *_column(flow.outputs, _COLUMNS[2], height),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _listed(boxes: Sequence[Box]) -> str:
    return " and ".join(title for title, _ in boxes)


def _centres(boxes: Sequence[Box], height: float) -> list[float]:
    top = height / 2 - len(boxes) * _ROW / 2
    return [top + (index + 0.5) * _ROW for index in range(len(boxes))]


def _column(boxes: Sequence[Box], x: float, height: float) -> Iterator[str]:
    for box, y in zip(boxes, _centres(boxes, height), strict=True):
        yield from _box(box, x, y, step=False)


def _box(box: Box, x: float, middle: float, *, step: bool) -> Iterator[str]:
    title, small = box
    tall = _ROW - 12
    kind, first, second = ("step", "via", "via-small") if step else ("box", "title", "small")
    yield f'<rect class="{kind}" x="{x}" y="{middle - tall / 2:g}" width="{_BOX}" height="{tall}" rx="7"/>'
    yield _text(x + _BOX / 2, middle + (-4 if small else 5), title, first)
    if small:
        yield _text(x + _BOX / 2, middle + 14, small, second)


def _curve(x: float, y: float, to_x: float, to_y: float) -> str:
    bend, tip = (to_x - x) / 2, to_x - 7
    line = f'<path d="M{x:g} {y:g} C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {tip:g} {to_y:g}"/>'
    return line + f'<path class="head" d="M{to_x:g} {to_y:g} l-9 -4.5 v9 Z"/>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" class="{kind}">{escape(words)}</text>'
