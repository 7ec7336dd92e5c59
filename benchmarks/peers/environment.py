"""Builds the environments that peers run in, away from ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HOME = ROOT / ".envs"
# A CPU build, named outright: a range may pull gigabytes of CUDA.
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
DEEPSPEED, MERGEKIT, TORCH, VERL = "0.19.8", "0.1.5", "torch==2.13.0", "0.9.1"
# What DeepSpeed needs to be built and imported; it comes without its own list, which has packages for GPUs.
_NEEDED = (
    "numpy", "safetensors", "packaging", "wheel", "setuptools<81", "ninja", "psutil", "py-cpuinfo", "hjson", "msgpack",
    "tqdm", "pydantic", "einops", "huggingface_hub",
)  # fmt: skip


def deepspeed() -> Path:
    """Returns the Python that has DeepSpeed; makes the environment if it is not there whole.

    Raises
    ------
    subprocess.CalledProcessError
        pip could not.
    """
    home = HOME / "deepspeed"
    if not (home / "ready").is_file():
        python = _bare(home)
        _install(python, TORCH, *_NEEDED)
        _install(python, "--no-build-isolation", "--no-deps", f"deepspeed=={DEEPSPEED}")
        (home / "ready").touch()
    return home / "bin" / "python"


def mergekit() -> Path:
    """Returns the Python that has mergekit, and shares torch and transformers with ours; raises as ``deepspeed``."""
    home = HOME / f"mergekit-{MERGEKIT}"  # as the tests call it
    if not (home / "ready").is_file():
        python = _bare(home)
        own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        _install(python, f"mergekit=={MERGEKIT}")
        (home / "ready").touch()
    return home / "bin" / "python"


def verl() -> Path:
    """Returns the Python that has verl's merger, and shares torch and transformers with ours; raises as ``deepspeed``.

    verl pins another transformers and wants GPUs' packages: it comes without its list, with what its merger imports.
    """
    home = HOME / "verl"
    if not (home / "ready").is_file():
        python = _bare(home)
        own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
        _install(python, "ray", "tensordict", "accelerate", "codetiming", "hydra-core", "pandas", "datasets", "dill")
        _install(python, "--no-deps", f"verl=={VERL}")
        (home / "ready").touch()
    return home / "bin" / "python"


def versions(python: Path | str, names: Sequence[str]) -> dict[str, str]:
    """Returns the versions of packages that a Python has."""
    program = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", program, *names], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _bare(home: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    return home / "bin" / "python"


def _install(python: Path, *what: str) -> None:
    env = {**os.environ, "DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *what]
    subprocess.run(command, check=True, env=env)
