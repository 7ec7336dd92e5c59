"""Records the pictures of terminals that the pages show: ``python -m docs.recordings``. Real runs, on small models.

Times and rates in them are of the day of the recording, so ``make docs`` does not make them anew; a test compares what
they say, numbers aside, with what the commands print.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  # numpy learns bfloat16
import numpy as np
from safetensors.numpy import load_file, save_file

from docs.terminal import Recorder, picture, recording, shardmerge

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
GOLDEN = ROOT / "tests" / "golden" / "xtuner"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture: its title, the width of its terminal, what is typed, and whether it moves."""

    title: str
    columns: int
    commands: tuple[str, ...]
    moves: bool = False
    prepare: Callable[[Path], None] | None = None


def _mistake(folder: Path) -> None:
    """Writes the mapping with a typing error in the name of a source."""
    text = (folder / "mapping.yaml").read_text("utf-8")
    (folder / "mapping.yaml").write_text(text.replace("vision:", "vison:"), "utf-8")


def _train_on(folder: Path) -> None:
    """Writes ``tuned``: the language model with another dtype, and other values in two tensors."""
    source = folder / "base_llm"
    shutil.copytree(source, folder / "tuned")
    tensors = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.1.mlp.down_proj.weight"):
        tensors[name][:2] += 0.25
    save_file(
        {name: values.astype(np.float32) for name, values in tensors.items()}, folder / "tuned" / "model.safetensors"
    )


_RUN = "shardmerge run mapping.yaml"

SCENES = {
    "run": Scene(
        "The primary use case: an XTuner LLaVA",
        100,
        ("shardmerge inspect iter_2.pth", _RUN, "shardmerge verify out/llava"),
        moves=True,
    ),
    **{
        f"{name}-{columns}": Scene(f"{name}, {columns} columns", columns, commands, prepare=prepare)
        for columns in (80, 120)
        for name, commands, prepare in (
            ("plan", ("shardmerge plan mapping.yaml",), None),
            ("inspect", ("shardmerge inspect iter_2.pth",), None),
            ("error", (_RUN,), _mistake),
            ("diff", ("shardmerge diff base_llm tuned --limit 6",), _train_on),
        )
    },
}


def lay_out(folder: Path) -> None:
    """Puts the run, its base models and its mapping into a folder, as a user has them."""
    shutil.copytree(GOLDEN / "frozen_z2" / "work_dirs", folder, dirs_exist_ok=True)
    for name in ("base_llm", "base_clip"):
        shutil.copytree(GOLDEN / name, folder / name)
    (folder / "mapping.yaml").write_text(
        "shardmerge: 1\n"
        "sources: {trained: iter_2.pth, llm: base_llm, vision: base_clip}\n"
        "output: {path: out/llava, dtype: bfloat16}\n"
        "use: xtuner/llava-to-hf\n",
        "utf-8",
    )


def record(scene: Scene, folder: Path) -> Recorder:
    """Types a scene's commands in a folder that is laid out."""
    if scene.prepare:
        scene.prepare(folder)
    recorder = Recorder(scene.columns, 48, folder, {"PYTHONPATH": str(ROOT)})
    for command in scene.commands:
        recorder.run(command, shardmerge(*command.split()[1:]))
    return recorder


def main() -> None:
    """Records every scene."""
    for name, scene in SCENES.items():
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder))
            frames = record(scene, Path(folder)).frames
        draw = recording if scene.moves else picture
        (PICTURES / f"{name}.svg").write_text(draw(frames, scene.columns, scene.title), "utf-8")
        print(f"docs/pictures/{name}.svg")


if __name__ == "__main__":
    main()
