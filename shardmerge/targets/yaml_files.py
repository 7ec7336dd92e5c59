"""YAML files beside the weights: litgpt's ``model_config.yaml``."""

from __future__ import annotations

import yaml

from shardmerge.errors import TargetError
from shardmerge.targets.config_numbers import JsonObject
from shardmerge.tensors import Extent, ReadSideFile

# A config of a model is a few kilobytes; PyYAML takes seconds for a megabyte.
_LARGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """Reads no alias of a list or a table: a few hundred bytes of them say 10^9 values, and a walk never ends."""

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stub leaves it bare
        if isinstance(event, yaml.AliasEvent) and not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
            raise yaml.YAMLError(f"the alias `*{event.anchor}` of a list or a table is not read")
        return super().compose_node(parent, index)  # type: ignore[arg-type]  # stub: int


def load_yaml(extent: Extent, read: ReadSideFile) -> JsonObject:
    """Returns the table that a small side file holds, its values as PyYAML's safe loader has them.

    Raises
    ------
    TargetError
        ``bad-yaml``: too large, not YAML, or no table.
    """
    problem = "it is too large" if extent.nbytes > _LARGEST else ""
    value: object = None
    if not problem:
        try:
            value = yaml.load(read(extent), _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problem = str(error)[:200]
    if not isinstance(value, dict):
        raise TargetError(
            "bad-yaml",
            "a file beside the weights is not a YAML table",
            where=extent.file,
            found=problem or type(value).__name__,
        )
    return {str(key): item for key, item in value.items()}
