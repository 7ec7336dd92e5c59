"""The chat template that a merge asks for: one by name, one that stands there, or that of most of its models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from shardmerge.mapping.yaml_nodes import Scalar
from shardmerge.mergekit.chat_templates import CHAT_TEMPLATES
from shardmerge.mergekit.config import MergeConfig, not_sayable
from shardmerge.targets.config_numbers import load_object
from shardmerge.tensors import Catalog, ReadSideFile


def chat_template(config: MergeConfig, catalogs: Mapping[str, Catalog], read: ReadSideFile) -> str:
    """Returns the Jinja text of the template; ``""`` where none of the models has one.

    Parameters
    ----------
    config
        Its ``chat_template`` is ``auto``, a name of mergekit's, or the text itself.
    catalogs
        By model; looked at for ``auto``, where of templates that as many models have the first one is taken.

    Raises
    ------
    MappingError
        ``not-sayable``: neither a name nor a template.
    """
    node = config.chat_template
    text = node.text if isinstance(node, Scalar) else ""
    if text == "auto":
        own = [found for catalog in catalogs.values() if (found := _own(catalog, read).strip())]
        return Counter(own).most_common(1)[0][0] if own else ""
    if text not in CHAT_TEMPLATES and "{" not in text:
        hint = f"write one of {', '.join(('auto', *CHAT_TEMPLATES))}, or a Jinja template"
        raise not_sayable(f"the chat template {text!r}", node.mark if node else config.mark, hint)
    return CHAT_TEMPLATES.get(text, text)


def _own(catalog: Catalog, read: ReadSideFile) -> str:
    """Returns a model's template, which transformers looks for in a file of its own first."""
    if "chat_template.jinja" in catalog.side_files:
        return read(catalog.side_files["chat_template.jinja"]).decode("utf-8", "replace")
    if "tokenizer_config.json" not in catalog.side_files:
        return ""
    stated = load_object(catalog.side_files["tokenizer_config.json"], read).get("chat_template")
    if isinstance(stated, list):  # several, each with a name
        stated = next((one.get("template") for one in stated if one.get("name") == "default"), None)
    return stated if isinstance(stated, str) else ""
