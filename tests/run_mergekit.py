"""Runs configurations of mergekit by mergekit itself; started by its own interpreter, of which ours knows nothing.

    python tests/run_mergekit.py CONFIG OUT [CONFIG OUT ...]

in the folder that the paths of the configurations are relative to. Several documents run as ``mergekit-multi`` runs
them. A merge that mergekit refuses leaves ``OUT.error`` with the message.
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.scripts import multimerge

OPTIONS = MergeOptions(write_model_card=False, quiet=True, random_seed=1)


def merge(text: str, out: Path) -> None:
    """Runs one document, or several that name each other; the last is the result."""
    if "---" not in text:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), OPTIONS)
        return
    between = out.with_name(f"{out.name}-between")
    configs, needs = multimerge.load_config(text, str(between))
    tasks = multimerge.make_tasks(configs, needs, OPTIONS, str(between), str(out), False)
    multimerge.Executor(tasks, math_device="cpu", storage_device="cpu").execute(desc="")
    if not out.exists():  # all have names
        (between / list(configs)[-1]).rename(out)


def main() -> None:
    """Runs all pairs of arguments."""
    given = sys.argv[1:]
    for config, out in zip(map(Path, given[::2]), map(Path, given[1::2]), strict=True):
        try:
            merge(config.read_text("utf-8"), out)
        except Exception as error:  # noqa: BLE001 whatever it is, the test shows it
            out.with_suffix(".error").write_text(f"{type(error).__name__}: {error}", "utf-8")


if __name__ == "__main__":
    main()
