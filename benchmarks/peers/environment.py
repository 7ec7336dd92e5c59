"""Builds the environment that DeepSpeed runs in, away from ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VERSION = "0.19.8"
_TORCH = "torch==2.13.0"
# What DeepSpeed needs to be built and imported; it comes without its own list, which has packages for GPUs.
_NEEDED = (
    "numpy", "safetensors", "packaging", "wheel", "setuptools<81", "ninja", "psutil", "py-cpuinfo", "hjson", "msgpack",
    "tqdm", "pydantic", "einops",
)  # fmt: skip


def build(home: Path) -> Path:
    """Makes the environment if it is not there whole, and returns its Python.

    Raises
    ------
    subprocess.CalledProcessError
        pip could not.
    """
    python = home / "bin" / "python"
    if (home / "ready").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    constraints = home / "constraints.txt"
    constraints.write_text(_TORCH + "\n", "utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, "-c", str(constraints), _TORCH, *_NEEDED], check=True)
    env = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    subprocess.run([*install, "--no-build-isolation", "--no-deps", f"deepspeed=={VERSION}"], check=True, env=env)
    (home / "ready").touch()
    return python
