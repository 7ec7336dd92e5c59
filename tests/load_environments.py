"""Builds one environment a version of transformers, for the tests that load results with it.

Each gets its own transformers and shares torch with the environment that runs this script, through a .pth file. A
version that cannot be installed is said loudly, and the tests that need it are skipped with the same words.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

VERSIONS = ("4.51.3", "4.57.1", "5.23.0")
ROOT = Path(__file__).parent.parent / ".envs"


def interpreter(version: str) -> Path:
    """Returns the Python of an environment, whether or not it is there."""
    return ROOT / f"transformers-{version}" / "bin" / "python"


def ready(version: str) -> bool:
    """Tells whether the environment was built whole."""
    return (interpreter(version).parent.parent / "ready").is_file()


def build(version: str) -> None:
    """Makes the environment of one version; raises CalledProcessError if pip cannot."""
    python = interpreter(version)
    home = python.parent.parent
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    own = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    constraints = Path(__file__).with_name("constraints.txt")
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), f"transformers=={version}", "pillow"],
        check=True,
    )
    (home / "ready").touch()


def main() -> None:
    """Builds what is missing."""
    for version in VERSIONS:
        if ready(version):
            continue
        print(f"building the environment of transformers {version}", flush=True)
        try:
            build(version)
        except subprocess.CalledProcessError as error:
            print(
                f"WARNING: transformers {version} could not be installed ({error}): its tests are SKIPPED", flush=True
            )


if __name__ == "__main__":
    main()
