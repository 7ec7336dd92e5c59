"""Reads YAML text as the tree of ``yaml_nodes``.

Nothing is resolved here: a scalar is its text, so ``no``, ``012`` and ``1e3`` stay what the user wrote. What
a mapping file never needs is refused before it can do harm: anchors, aliases and merge keys (a few hundred
bytes of them expand to gigabytes), tags, several documents, deep nesting, and the same key twice, which YAML
libraries pass over in silence.
"""

from __future__ import annotations

from typing import Protocol

import yaml

from shardmerge.errors import MappingError, raise_all
from shardmerge.mapping.yaml_nodes import LARGEST_TEXT, QUOTE_BRACES, Items, Mark, Node, Scalar, Table

# sources -> name -> key is three deep; the rest is room to grow. Composing is recursive.
_DEEPEST = 16


def read_yaml(text: str, file: str) -> Node:
    """Returns the tree of a YAML text; ``file`` is the name that its marks carry.

    Raises
    ------
    MappingError
        ``yaml-too-large``, ``yaml-syntax``, ``yaml-empty``, ``yaml-several-documents``, ``yaml-too-deep``,
        ``yaml-anchor``, ``yaml-alias``, ``yaml-merge-key``, ``yaml-tag``, ``yaml-key``, ``duplicate-key``.
    """
    if len(text) > LARGEST_TEXT:
        raise MappingError(
            "yaml-too-large",
            f"a mapping file of more than {LARGEST_TEXT} characters is not read",
            where=file,
            hint="write one rule for many tensors, such as `layers.{i}.{rest...}`",
        )
    root = _compose(text, file)
    if root is None:
        raise MappingError("yaml-empty", "the file is empty", where=file)
    return _tree(root, file)


class _YamlMark(Protocol):
    line: int
    column: int


class _StrictLoader(yaml.SafeLoader):
    """Composes nodes, and refuses what mapping files never need at the event where it first shows."""

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self.file = file
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event: yaml.NodeEvent = self.peek_event()  # type: ignore[no-untyped-call]  # the stub leaves it bare
        self._refuse(event, _mark(self.file, event.start_mark))
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]  # stub: int
        self.depth -= 1
        return node

    def _refuse(self, event: yaml.NodeEvent, mark: Mark) -> None:
        if self.depth >= _DEEPEST:
            raise MappingError("yaml-too-deep", f"nested more than {_DEEPEST} levels deep", where=str(mark))
        if isinstance(event, yaml.AliasEvent):
            raise _not_taken("yaml-alias", f"the alias `*{event.anchor}`", mark)
        if event.anchor is not None:
            raise _not_taken("yaml-anchor", f"the anchor `&{event.anchor}`", mark)
        if getattr(event, "tag", None) is not None:
            raise _not_taken("yaml-tag", "a tag (`!...`)", mark)


def _not_taken(code: str, thing: str, mark: Mark) -> MappingError:
    hint = "write the value out, or put quotes around text that begins with `&`, `*` or `!`"
    return MappingError(code, f"{thing} is not allowed in a mapping file", where=str(mark), hint=hint)


def _compose(text: str, file: str) -> yaml.Node | None:
    loader = None
    try:
        loader = _StrictLoader(text, file)
        return loader.get_single_node()
    except yaml.composer.ComposerError as error:
        # Aliases and anchors are refused before the composer looks at them: this is its only complaint left.
        raise MappingError(
            "yaml-several-documents",
            "a mapping file is one YAML document",
            where=str(_mark(file, error.problem_mark)),
            hint="remove the second `---`",
        ) from error
    except yaml.MarkedYAMLError as error:
        raise _syntax(text, file, error) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = "a character that YAML does not allow"
        where = f"{file}:{line}:1"
        raise MappingError("yaml-syntax", what, where=where, found=ascii(error.character)) from error
    except (ValueError, OverflowError) as error:
        # PyYAML turns an escape such as "\UFFFFFFFF" into a character without looking whether there is one.
        raise MappingError("yaml-syntax", f"not a YAML value: {error}", where=file) from error
    finally:
        if loader is not None:
            loader.dispose()


def _syntax(text: str, file: str, error: yaml.MarkedYAMLError) -> MappingError:
    mark = error.problem_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark is not None and mark.line < len(lines) else ""
    # The one trap of this language: inside [ ] a brace ends bare text and begins a table.
    braces = "{" in line and "[" in line
    return MappingError(
        "yaml-syntax",
        f"not valid YAML: {error.problem or error.context}",
        where=str(_mark(file, mark)),
        found=line.strip()[:120],
        hint=QUOTE_BRACES if braces else "",
    )


def _mark(file: str, mark: _YamlMark | None) -> Mark:
    # The stubs allow for no mark; PyYAML's own parser always sets one.
    return Mark(file, mark.line + 1, mark.column + 1) if mark is not None else Mark(file, 1, 1)


def _tree(node: yaml.Node, file: str) -> Node:
    mark = _mark(file, node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, mark)
    if isinstance(node, yaml.SequenceNode):
        return Items(tuple(_tree(item, file) for item in node.value), mark)
    entries = tuple((_key(key, file), _tree(value, file)) for key, value in node.value)
    raise_all(_duplicates(entries))
    return Table(entries, mark)


def _scalar(node: yaml.ScalarNode, mark: Mark) -> Scalar:
    text: str = node.value
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        what = "half a character (a lone surrogate)"
        raise MappingError("yaml-syntax", what, where=str(mark), found=ascii(text))
    return Scalar(text, mark, quoted=node.style in {"'", '"'})


def _key(node: yaml.Node, file: str) -> Scalar:
    mark = _mark(file, node.start_mark)
    if not isinstance(node, yaml.ScalarNode):
        hint = 'put quotes around a key that begins with a brace: "{rest...}": src:{rest...}'
        raise MappingError("yaml-key", "a key must be text", where=str(mark), hint=hint)
    if node.value == "<<" and node.style is None:
        raise _not_taken("yaml-merge-key", "the merge key `<<`", mark)
    return _scalar(node, mark)


def _duplicates(entries: tuple[tuple[Scalar, Node], ...]) -> list[MappingError]:
    first: dict[str, Mark] = {}
    errors = []
    for key, _ in entries:
        earlier = first.setdefault(key.text, key.mark)
        if earlier is not key.mark:
            what = f"the key `{key.text}` is there twice: on lines {earlier.line} and {key.mark.line}"
            errors.append(MappingError("duplicate-key", what, where=str(key.mark), hint="keep one of them"))
    return errors
