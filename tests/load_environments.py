"""Builds one environment a version of transformers, and one of other tools each, for the tests that need them.

Each gets its own library and shares torch with the environment that runs this script, through a .pth file. A
version that cannot be installed is said loudly, and the tests that need it are skipped with the same words.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSIONS = ("4.51.3", "4.57.1", "5.23.0")
DEEPSPEED, MERGEKIT, MODEL_SIGNING = "0.19.8", "0.1.5", "1.1.1"
ROOT = Path(__file__).parent.parent / ".envs"

# What DeepSpeed imports, and what its setup.py wants.
_OF_DEEPSPEED = (
    "einops", "hjson", "msgpack", "ninja", "packaging", "psutil", "py-cpuinfo", "pydantic", "setuptools", "tqdm",
    "wheel",
)  # fmt: skip


def interpreter(version: str, library: str = "transformers") -> Path:
    """Returns the Python of an environment, whether or not it is there."""
    return ROOT / f"{library}-{version}" / "bin" / "python"


def ready(version: str, library: str = "transformers") -> bool:
    """Tells whether the environment was built whole."""
    return (interpreter(version, library).parent.parent / "ready").is_file()


def build(version: str, library: str = "transformers") -> None:
    """Makes the environment of one version; raises CalledProcessError if pip cannot."""
    python = interpreter(version, library)
    home = python.parent.parent
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    constraints = Path(__file__).with_name("constraints.txt")
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints)]
    if library == "deepspeed":
        subprocess.run([*install, *_OF_DEEPSPEED], check=True)
        of_python = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}  # compiles nothing
        command = [*install, "--no-build-isolation", "--no-deps", f"deepspeed=={version}"]
        subprocess.run(command, check=True, env=of_python)
    elif library == "mergekit":
        subprocess.run([*install, f"mergekit=={version}"], check=True)
    elif library == "model-signing":
        # It imports pyOpenSSL, and counts on another library to bring it.
        subprocess.run([*install, f"model-signing=={version}", "pyopenssl"], check=True)
    else:
        subprocess.run([*install, f"transformers=={version}", "pillow"], check=True)
    (home / "ready").touch()


def main() -> None:
    """Builds what is missing."""
    others = (("deepspeed", DEEPSPEED), ("mergekit", MERGEKIT), ("model-signing", MODEL_SIGNING))
    for library, version in (*(("transformers", version) for version in VERSIONS), *others):
        if ready(version, library):
            continue
        print(f"building the environment of {library} {version}", flush=True)
        try:
            build(version, library)
        except subprocess.CalledProcessError as error:
            print(f"WARNING: {library} {version} could not be installed ({error}): its tests are SKIPPED", flush=True)


if __name__ == "__main__":
    main()
