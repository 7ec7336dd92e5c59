"""Loads a finished directory with transformers and says which keys were missing, unexpected or mismatched.

A script of its own, for a child process: it needs transformers and torch and nothing of shardmerge, so it runs in any
environment, and their memory never counts in a conversion.

    python load_check.py DIRECTORY    prints one line of JSON
"""

from __future__ import annotations

import json
import sys


def check(path: str) -> dict[str, object]:
    """Returns the class loaded, the versions, and the three lists of keys."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.from_pretrained(path)
    name = (config.architectures or ["AutoModel"])[0]
    kind = getattr(transformers, name)
    _, info = kind.from_pretrained(path, output_loading_info=True, low_cpu_mem_usage=True)
    return {
        "class": name,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "missing": sorted(map(str, info["missing_keys"])),
        "unexpected": sorted(map(str, info["unexpected_keys"])),
        "mismatched": sorted(map(str, info["mismatched_keys"])),
    }


if __name__ == "__main__":
    print(json.dumps(check(sys.argv[1])))  # noqa: T201  # its answer
