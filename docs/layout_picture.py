"""The picture of the layouts: boxes are layouts, arrows are presets. Drawn as SVG, so that it needs no script to show.

A new preset needs a line in ``ARROWS``, and a new layout one in ``BOXES``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from shardmerge.mapping.preset_files import list_presets

_WIDTH, _ROW = 200, 58
_LEFT, _MIDDLE, _RIGHT = 10, 480, 950


@dataclass(frozen=True)
class Box:
    """A layout: its words, its column, and the rows it stands on."""

    text: str
    x: int
    row: float
    rows: int = 1

    @property
    def top(self) -> float:
        """Its upper edge."""
        return 10 + self.row * _ROW

    @property
    def height(self) -> float:
        """A little less than its rows."""
        return self.rows * _ROW - 16


BOXES = {
    "meta": Box("Meta: consolidated.NN.pth", _LEFT, 0),
    "torchtune": Box("torchtune LLaMA", _LEFT, 1),
    "litgpt": Box("litgpt LLaMA", _LEFT, 2),
    "megatron": Box("Megatron-Core GPT", _LEFT, 3),
    "torchtune-lora": Box("torchtune LLaMA + adapter", _LEFT, 4),
    "megatron-dist": Box("Megatron torch_dist, NeMo", _LEFT, 5),
    "megatron-moe": Box("the same of a Qwen3-MoE", _LEFT, 6),
    "llama": Box("Hugging Face LLaMA,|Mistral, Mixtral,|Qwen2, Qwen3", _MIDDLE, 0, 7),
    "llama-changed": Box("the same: cast, merged,|resized, tied", _RIGHT, 1),
    "delta": Box("delta weights + base", _RIGHT, 3),
    "phi3": Box("Hugging Face Phi-3", _MIDDLE, 8),
    "torchtune-phi3": Box("torchtune Phi-3", _LEFT, 8),
    "xtuner": Box("XTuner / mmengine|LLaVA .pth", _LEFT, 9.5, 6),
    "llava": Box("Hugging Face LLaVA, and|models of any version", _MIDDLE, 9.5, 4),
    "4.51": Box("names that all load", _RIGHT, 9.5),
    "4.52": Box("names of 4.52 in memory", _RIGHT, 10.5),
    "5.0": Box("names of 5.0 in memory", _RIGHT, 11.5),
    "5.6": Box("names of 5.6 in memory", _RIGHT, 12.5),
    "official": Box("LLaVA's own code", _MIDDLE, 13.5),
    "next": Box("Hugging Face LLaVA-NeXT", _RIGHT, 13.5),
    "onevision": Box("Hugging Face LLaVA-OneVision", _RIGHT, 14.5),
    "tree": Box("XTuner's own tree", _MIDDLE, 14.5),
    "run": Box("checkpoint of a LoRA run", _LEFT, 16),
    "peft": Box("PEFT directory", _MIDDLE, 16),
    "merged": Box("its base, merged", _RIGHT, 16),
    "clip": Box("OpenAI, open_clip CLIP", _LEFT, 17),
    "hf-clip": Box("Hugging Face CLIP", _MIDDLE, 17),
    "vision": Box("CLIP vision tower", _RIGHT, 17),
    "internvl": Box("original InternVL", _LEFT, 18),
    "hf-internvl": Box("Hugging Face InternVL", _MIDDLE, 18),
    "internlm2": Box("the original with InternLM2", _RIGHT, 18),
}

ARROWS = {
    "llama/meta-to-hf": ("meta", "llama"),
    "llama/hf-to-meta": ("llama", "meta"),
    "llama/torchtune-to-hf": ("torchtune", "llama"),
    "llama/hf-to-torchtune": ("llama", "torchtune"),
    "llama/litgpt-to-hf": ("litgpt", "llama"),
    "llama/hf-to-litgpt": ("llama", "litgpt"),
    "llama/megatron-to-hf": ("megatron", "llama"),
    "llama/megatron-dist-to-hf": ("megatron-dist", "llama"),
    "llama/megatron-dist-to-hf-qwen3-moe": ("megatron-moe", "llama"),
    "llama/torchtune-lora-to-hf": ("torchtune-lora", "llama"),
    "llama/hf-to-hf": ("llama", "llama-changed"),
    "llama/apply-delta": ("delta", "llama"),
    "llama/phi3-to-llama": ("phi3", "llama"),
    "llama/torchtune-phi3-to-hf": ("torchtune-phi3", "phi3"),
    "llama/hf-to-torchtune-phi3": ("phi3", "torchtune-phi3"),
    "xtuner/llava-to-hf": ("xtuner", "llava"),
    "xtuner/llava-to-official": ("xtuner", "official"),
    "xtuner/llava-to-xtuner": ("xtuner", "tree"),
    "llava/official-to-hf": ("official", "llava"),
    "llava/hf-to-official": ("llava", "official"),
    "llava/official-to-hf-next": ("official", "next"),
    "llava/official-to-hf-onevision": ("official", "onevision"),
    "hf/to-4.51": ("llava", "4.51"),
    "hf/to-4.52": ("llava", "4.52"),
    "hf/to-5.0": ("llava", "5.0"),
    "hf/to-5.6": ("llava", "5.6"),
    "peft/export": ("run", "peft"),
    "peft/merge": ("peft", "merged"),
    "peft/extract": ("merged", "peft"),
    "clip/open-clip-to-hf": ("clip", "hf-clip"),
    "clip/hf-to-open-clip": ("hf-clip", "clip"),
    "clip/hf-to-vision": ("hf-clip", "vision"),
    "internvl/original-to-hf": ("internvl", "hf-internvl"),
    "internvl/hf-to-original": ("hf-internvl", "internvl"),
    "internvl/hf-to-original-internlm2": ("hf-internvl", "internlm2"),
}

_STYLE = """
  text { font: 13px sans-serif; fill: #222 }
  .preset { font: 11.5px monospace; fill: #33489e }
  rect { fill: #eef1fb; stroke: #5566aa }
  line { stroke: #5566aa; stroke-width: 1.4; marker-end: url(#end) }
  .ground { fill: #fff; stroke: none } marker path { fill: #5566aa }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e6ea } .preset { fill: #a9b8ff } rect { fill: #22262f; stroke: #8a97d6 }
    line { stroke: #8a97d6 } marker path { fill: #8a97d6 } .ground { fill: #16181d }
  }
"""


def picture() -> str:
    """Returns the SVG.

    Raises
    ------
    KeyError
        A preset that has no arrow, or an arrow without a preset.
    """
    odd = set(ARROWS) ^ set(list_presets())
    if odd:
        raise KeyError(f"docs/layout_picture.py and the presets differ: {', '.join(sorted(odd))}")
    height = max(box.top + box.height for box in BOXES.values()) + 10
    width = _RIGHT + _WIDTH + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" role="img" '
        'aria-label="Layouts as boxes, presets as arrows between them">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="end" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0,0 L9,4 L0,8 Z"/></marker></defs>',
        f'<rect class="ground" width="{width}" height="{height:g}"/>',
        *(line for box in BOXES.values() for line in _box(box)),
        *(line for preset, ends in ARROWS.items() for line in _arrow(preset, *ends)),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _box(box: Box) -> Iterator[str]:
    yield f'<rect x="{box.x}" y="{box.top:g}" width="{_WIDTH}" height="{box.height:g}" rx="6"/>'
    words = box.text.split("|")
    first = box.top + box.height / 2 - 8 * (len(words) - 1) + 4
    for index, text in enumerate(words):
        yield _text(box.x + _WIDTH / 2, first + 16 * index, text, "middle", "")


def _arrow(preset: str, start: str, end: str) -> Iterator[str]:
    one, other = BOXES[start], BOXES[end]
    both = (end, start) in ARROWS.values()
    if one.x == other.x:
        yield from _upright(preset, one, other, 12 if both else 0)
        return
    small = min(one, other, key=lambda box: box.height)
    right = one.x < other.x
    y = small.top + small.height / 2 + (0 if not both else -11 if right else 13)
    x1, x2 = (one.x + _WIDTH, other.x) if right else (one.x, other.x + _WIDTH)
    yield f'<line x1="{x1}" y1="{y:g}" x2="{x2}" y2="{y:g}"/>'
    yield _text((x1 + x2) / 2, y - 4, preset, "middle", "preset")


def _upright(preset: str, one: Box, other: Box, shift: int) -> Iterator[str]:
    down = one.top < other.top
    x = one.x + _WIDTH / 2 + (shift if down else -shift)
    y1, y2 = (one.top + one.height, other.top) if down else (one.top, other.top + other.height)
    yield f'<line x1="{x:g}" y1="{y1:g}" x2="{x:g}" y2="{y2:g}"/>'
    side = ("start", 7) if down or not shift else ("end", -7)
    yield _text(x + side[1], (y1 + y2) / 2 + 4, preset, side[0], "preset")


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    word = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{word}>{escape(text)}</text>'
