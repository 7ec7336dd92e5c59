"""A plan is carried out only if what it publishes is one model: config.json and tensors agree.

Every plan goes through here, whoever made it, before anything is written. A finished directory is checked by the same
comparison (``verify``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from shardmerge.errors import MappingError, TargetError, raise_all
from shardmerge.plan.moments import is_moment
from shardmerge.plan.universal_layout import weight_at
from shardmerge.plan.value import Plan
from shardmerge.prepare.beside_config import read_config
from shardmerge.targets.agreement import INCOMPLETE, Described, differing_head, disagreements, surplus
from shardmerge.targets.config_edits import ConfigEdits, counted, edited
from shardmerge.targets.config_numbers import JsonObject, dump, readable_object
from shardmerge.targets.stated_sizes import config_levels, contradictions
from shardmerge.tensors import Catalog, Extent, Made, ReadSideFile, SideFile, TensorEntry, composed
from shardmerge.tensors.file_roles import CONFIG
from shardmerge.tensors.packed import packed_weights

# How the warning of a directory that is not a whole model begins; `verify` knows it by this.
PARTIAL = "only a part of the model that config.json describes"
_HEAD, _EMBEDDING = re.compile(r"(?:^|\.)lm_head\.weight$"), re.compile(r"(?:^|\.)(?:embed_tokens|wte)\.weight$")
# Values of head and embedding that are compared: bytes at a place, and places.
_SAMPLE, _PLACES = 4096, 8


@dataclass(frozen=True, slots=True)
class Conditions:
    """What is asked of the directory beside its tensors.

    Attributes
    ----------
    partial
        Whether only a part of the model is wanted.
    edits
        What the mapping says of config.json.
    counts
        Whether counts that the rules changed are filled in: where the mapping's own rules decide what is written.
    source
        The checkpoint whose config.json is published, if it is one. What it contradicts itself is not filled in.
    editable
        Whether a mapping says what is done.
    """

    partial: bool = False
    edits: ConfigEdits = field(default_factory=ConfigEdits)
    counts: bool = False
    source: Catalog | None = None
    editable: bool = False


def publishable(plan: Plan, read: ReadSideFile, conditions: Conditions) -> Plan:
    """Returns the plan with the config.json that its conditions ask for, once all of it agrees.

    Raises
    ------
    TargetError
        ``incomplete-model``, ``config-disagrees``, ``odd-config``, ``no-such-key``, all at once.
    MappingError
        ``no-config``: the mapping edits a config.json that is not written.
    """
    plan = _with_edits(plan, read, conditions)
    problems: list[TargetError] = []
    warnings: list[str] = []
    for one in described(plan, read, conditions):
        for error in (*disagreements(one), *_two_heads(plan, one, read)):
            if conditions.partial and error.code == INCOMPLETE:
                warnings.append(f"{PARTIAL}: {error.what}")
            else:
                problems.append(error)
        extra = surplus(one)
        if extra:
            names = ", ".join(extra[:3]) + (", ..." if len(extra) > 3 else "")
            warnings.append(f"{len(extra)} tensors are not of the model that {one.where} describes: {names}")
    raise_all(problems)
    return replace(plan, warnings=(*plan.warnings, *warnings))


def described(plan: Plan, read: ReadSideFile, conditions: Conditions | None = None) -> Iterator[Described]:
    """Yields every directory of the output that has a config.json and weights, with what its files will hold."""
    conditions = conditions or Conditions()
    for side in plan.side_files:
        folder, _, name = side.name.rpartition("/")
        config = readable_object(side, read) if name == CONFIG else None
        entries = {stored: entry for place, stored, entry in _placed(plan) if place == folder}
        if config is not None and entries:
            yield describe(config, _origin(side, conditions.source), entries, editable=conditions.editable)


def _placed(plan: Plan) -> Iterator[tuple[str, str, TensorEntry]]:
    """Yields every weight with its name and the folder in which its model lies."""
    for shard in plan.shards:
        place, weight = weight_at(shard.name)
        place = place if weight else shard.name.rpartition("/")[0]
        weights = (tensor for tensor in shard.tensors if not is_moment(tensor))
        yield from ((place, weight or tensor.stored, tensor.entry) for tensor in weights)


def describe(
    config: JsonObject, where: str, entries: Mapping[str, TensorEntry], *, editable: bool = False
) -> Described:
    """Returns a config and the tensors of its directory, by their names in the files, to be compared."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    return Described(config, where, shapes, editable, bool(packed_weights(Catalog("", "", entries))))


def _origin(side: SideFile, source: Catalog | None) -> str:
    """Returns the file that the user would correct: the one that is copied or edited, else the one to be written."""
    copied = next((part.file for part in side.parts if isinstance(part, Extent)), "")
    if not copied and source is not None and side.name == CONFIG and CONFIG in source.side_files:
        return source.side_files[CONFIG].file
    return copied or side.name


# ---- what the mapping says of it


def _with_edits(plan: Plan, read: ReadSideFile, conditions: Conditions) -> Plan:
    side = next((side for side in plan.side_files if side.name == CONFIG), None)
    config = readable_object(side, read) if side is not None else None
    asked = conditions.edits != ConfigEdits()
    if config is None or side is None:
        if asked:
            raise _no_config(conditions.edits)
        return plan
    tensors = {stored: entry.shape for place, stored, entry in _placed(plan) if not place}
    written = edited(config, conditions.edits, tensors) if asked else config
    lines: tuple[str, ...] = ()
    if conditions.counts:
        own = _own_contradictions(conditions, read)
        told = [one for one in contradictions(written, tensors) if (*_outer(conditions.edits), *one.path) not in own]
        written, lines = counted(written, told, conditions.edits.set)
    if written == config:
        return plan
    made = SideFile(CONFIG, (dump(written, sort=False),))
    sides = tuple(made if one is side else one for one in plan.side_files)
    return replace(plan, side_files=sides, warnings=(*plan.warnings, *lines))


def _own_contradictions(conditions: Conditions, read: ReadSideFile) -> frozenset[tuple[str, ...]]:
    """Returns the keys that the source's own tensors contradict already: an incomplete source is no smaller model."""
    source = conditions.source
    config = read_config(source, read) if source is not None else None
    if source is None or config is None:
        return frozenset()
    shapes = {name: source[name].shape for name in source.names()}
    return frozenset(one.path for one in contradictions(config, shapes))


def _outer(edits: ConfigEdits) -> tuple[str, ...]:
    return tuple(edits.take.split(".")) if edits.take else ()


def _no_config(edits: ConfigEdits) -> MappingError:
    return MappingError(
        "no-config",
        "`config` edits the config.json of the result, and none is written",
        where=edits.where,
        hint="add `target: {name: hf/model, text: SOURCE}`, where SOURCE has the config.json",
    )


# ---- tied and yet two


def _two_heads(plan: Plan, one: Described, read: ReadSideFile) -> Iterator[TargetError]:
    """A head beside the embedding that it is said to be: transformers 4 puts the embedding in its place, 5 does not."""
    said = [
        level.path
        for level in config_levels(one.config)
        if level.is_text and level.values.get("tie_word_embeddings") is True
    ]
    if not said:
        return
    entries = {tensor.stored: tensor.entry for tensor in plan.tensors() if tensor.stored in one.tensors}
    heads = [name for name in entries if _HEAD.search(name)]
    embeddings = [name for name in entries if _EMBEDDING.search(name)]
    if len(heads) == len(embeddings) == 1 and _differ(entries[heads[0]], entries[embeddings[0]], read):
        yield differing_head(heads[0], embeddings[0], one, said)


def _differ(a: TensorEntry, b: TensorEntry, read: ReadSideFile) -> bool:
    """Whether two tensors certainly have different values, as far as headers and a few samples tell."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False  # of shapes the comparison with the config speaks; a type alone is no other value
    left, right = composed(a), composed(b)
    if left is not None and right is not None:
        alike = left.recipe.label == right.recipe.label and len(left.bases) == len(right.bases) == 1
        return alike and _differ(left.bases[0], right.bases[0], read)
    if left is not None or right is not None:  # changed by arithmetic, beside one that is as it was
        made = left or right
        return isinstance(made, Made) and not made.recipe.label.startswith("cast")
    one, other = _extent(a), _extent(b)
    if one is None or other is None or one == other:
        return False
    step = max(1, (one.nbytes - 1) // _PLACES)
    spans = [(start, min(_SAMPLE, one.nbytes - start)) for start in range(0, one.nbytes, step)]
    return any(read(one.slice(*span)) != read(other.slice(*span)) for span in spans)


def _extent(entry: TensorEntry) -> Extent | None:
    """Returns where a tensor lies, if it lies in one place."""
    held = entry.pieces[0].held if len(entry.pieces) == 1 else None
    return held if isinstance(held, Extent) else None
