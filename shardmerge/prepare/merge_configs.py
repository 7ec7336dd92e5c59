"""`init` of a configuration of mergekit."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import UsageError
from shardmerge.mergekit.config import is_mergekit
from shardmerge.mergekit.mapping import propose_merge
from shardmerge.prepare.inspection import inspect
from shardmerge.prepare.merge_templates import chat_template
from shardmerge.prepare.merge_tokens import joint_vocabulary
from shardmerge.prepare.proposing import relative
from shardmerge.prepare.side_files import SideFiles
from shardmerge.recognition.proposal import Proposal
from shardmerge.system_errors import about


def proposed_merge(config: Path, folder: Path, idle: object, *, download: bool) -> Proposal:
    """Returns the mapping of a configuration of mergekit, whose paths are relative to the current folder.

    Parameters
    ----------
    folder
        Where the mapping will lie.
    idle
        What was said besides, of which there is no use.

    Raises
    ------
    UsageError
        ``unknown-layout``: another YAML file. ``no-effect``.
    """
    with about(config):
        text = config.read_text("utf-8")
    if not is_mergekit(text):
        what = "a YAML file is no checkpoint, and this one no configuration of mergekit: it has no `merge_method`"
        raise UsageError("unknown-layout", what, where=str(config), hint="name a checkpoint, or run a mapping")
    if idle:
        hint = "leave --base and --to out: the configuration names its models"
        raise UsageError("no-effect", "a configuration of mergekit says all there is", where=str(config), hint=hint)
    read = SideFiles().read
    return propose_merge(
        text,
        str(config),
        lambda path: relative(path, folder),
        lambda path: inspect(path, download=download),
        lambda merge, catalogs: joint_vocabulary(merge, catalogs, read),
        lambda merge, catalogs: chat_template(merge, catalogs, read),
    )
