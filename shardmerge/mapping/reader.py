"""Reads mapping.yaml: text in, a ``Spec`` out, everything that is wrong with it at once."""

from __future__ import annotations

from pathlib import Path

from shardmerge.errors import MappingError, UsageError, raise_all
from shardmerge.mapping.input_reader import read_adapters, read_sources, read_variables
from shardmerge.mapping.near import did_you_mean
from shardmerge.mapping.node_reader import NodeReader
from shardmerge.mapping.output_reader import read_config_edits, read_output, read_target, read_vocabulary
from shardmerge.mapping.rule_reader import read_drops, read_rest, read_rules
from shardmerge.mapping.spec import KEYS, Spec
from shardmerge.mapping.yaml_nodes import LARGEST_TEXT
from shardmerge.mapping.yaml_text import read_yaml
from shardmerge.system_errors import advice
from shardmerge.targets.config_edits import ConfigEdits


def load_spec(path: Path) -> Spec:
    """Reads a mapping file.

    Raises
    ------
    UsageError
        ``missing-path``: no such file. ``unreadable-mapping``: no regular file, or not UTF-8.
    MappingError
        ``unreadable-mapping``: the system refused. Or everything that is wrong with it, at once.
    """
    if path.exists() and not path.is_file():  # opening a FIFO waits for who writes to it
        hint = "write the mapping to a file"
        raise UsageError("unreadable-mapping", "cannot read the mapping: no regular file", where=str(path), hint=hint)
    try:
        with path.open("rb") as file:
            # A checkpoint given by mistake is not read to its end; what is too long is refused with the YAML.
            text = file.read(4 * LARGEST_TEXT + 4).decode("utf-8-sig")
    except FileNotFoundError as error:
        near = sorted(item.name for item in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = did_you_mean(path.name, near)
        raise UsageError("missing-path", "no such mapping", where=str(path), hint=hint) from error
    except OSError as error:
        what = f"cannot read the mapping: {error.strerror}"
        raise MappingError("unreadable-mapping", what, where=str(path), hint=advice(error)) from error
    except UnicodeDecodeError as error:
        hint = f"to convert a checkpoint without a mapping: shardmerge convert {path} OUT"
        what = "the mapping is not a text in UTF-8"
        raise UsageError("unreadable-mapping", what, where=str(path), hint=hint) from error
    return parse_spec(text, str(path))


def parse_spec(text: str, file: str) -> Spec:
    """Returns the mapping that a YAML text says; ``file`` is its name in messages.

    Raises
    ------
    MappingError
        As ``load_spec``.
    """
    reader = NodeReader(file)
    root = reader.table(read_yaml(text, file), "the mapping")
    fields = reader.fields(root, KEYS)
    reader.version(fields.get("shardmerge"), "shardmerge", root.mark)
    sources = read_sources(reader, fields.get("sources"), root.mark)
    use = reader.text(fields["use"], "use") if "use" in fields else ""
    known = None if use else frozenset(sources)  # a preset may bring sources of its own
    spec = Spec(
        file,
        sources,
        read_output(reader, fields["output"]) if "output" in fields else None,
        use,
        read_target(reader, fields["target"]) if "target" in fields else None,
        (*read_rules(reader, fields.get("tensors"), known), *read_rest(reader, fields.get("rest"), known)),
        read_drops(reader, fields["drop"], known) if "drop" in fields else (),
        read_variables(reader, fields["let"]) if "let" in fields else {},
        read_adapters(reader, fields["adapters"], known) if "adapters" in fields else (),
        read_vocabulary(reader, fields["vocabulary"]) if "vocabulary" in fields else None,
        config=read_config_edits(reader, fields["config"]) if "config" in fields else ConfigEdits(),
    )
    if not use and not spec.rules and not reader.problems:
        reader.add(
            "no-rules",
            "the mapping says neither `use:` nor `tensors:`",
            root.mark,
            "add `use: PRESET`, one of `shardmerge presets list`",
        )
    raise_all(reader.problems)
    return spec
