"""What a user may say about a source."""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.sources.deepspeed_files import DeepSpeedView


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """What a user may say about a source.

    Attributes
    ----------
    view
        Of a DeepSpeed checkpoint: ``fp32`` master weights or the 16-bit ``module``.
    root
        Dotted path of the state dict inside a torch file; empty to find it.
    download
        Whether a hub id that is not in the cache may be downloaded.
    """

    view: DeepSpeedView = "fp32"
    root: str = ""
    download: bool = False
