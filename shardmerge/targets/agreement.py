"""A config.json against the tensors beside it: whether they describe one model.

Models that are known here are compared name by name and shape by shape, others by what the config says of sizes. Only
names and shapes are read, so that a plan, a finished directory and another library's model can be compared alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardmerge.errors import TargetError
from shardmerge.shown import shown
from shardmerge.targets.known_models import Known, known_model
from shardmerge.targets.stated_numbers import odd_numbers
from shardmerge.targets.stated_sizes import Contradiction, KeyPath, contradictions
from shardmerge.targets.uneven_layers import lost
from shardmerge.tensors import Shape

INCOMPLETE, DISAGREES = "incomplete-model", "config-disagrees"
# Names in a message.
_FEW = 6


@dataclass(frozen=True, slots=True)
class Described:
    """A directory of weights that a config.json describes.

    Attributes
    ----------
    config
        Its content.
    where
        The file that it is copied from, or its name in the output.
    tensors
        Names as in the files of weights of the same directory, and shapes.
    editable
        Whether the mapping can say what config.json says (``config:``), or only the file itself.
    packed
        Whether some weights are quantized codes, whose shapes say nothing of the model's sizes.
    """

    config: Mapping[str, object]
    where: str
    tensors: Mapping[str, Shape]
    editable: bool = False
    packed: bool = False

    def known(self) -> Known | None:
        """Returns what the weights must be, or None for a model that is not known here, or whose weights are packed."""
        return None if self.packed else known_model(self.config, self.tensors, self.where)


@dataclass(frozen=True, slots=True)
class LoadedKeys:
    """What a library says after loading: its class, and the keys that are not as they should be.

    Attributes
    ----------
    kind
        The class that was loaded.
    missing, unexpected, mismatched
        As transformers' ``output_loading_info``, by the names inside of the model.
    """

    kind: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


def disagreements(described: Described) -> tuple[TargetError, ...]:
    """Returns everything in which config.json and tensors disagree.

    Returns
    -------
    tuple of TargetError
        ``incomplete-model``: tensors that the config implies are not there. ``config-disagrees``: it describes another
        model. ``odd-config``: a number that is none; then of these alone.
    """
    config, tensors = described.config, described.tensors
    odd = odd_numbers(config, described.where)
    if odd:
        return odd
    told = tuple(contradictions(config, tensors, packed=described.packed))
    try:
        known = described.known()
    except TargetError as error:
        return (error, *(_as_error(one, described) for one in told))
    if known is None:
        return (*(_as_error(one, described) for one in told), *_uneven(described))
    return tuple(_against_known(known, described, told))


def surplus(described: Described) -> tuple[str, ...]:
    """Returns the tensors that a known model does not have and that loading it ignores, such as a value head."""
    try:
        known = described.known()
    except TargetError:
        return ()
    if known is None:
        return ()
    own = {*known.tensors, *known.optional}
    named = ((name, known.canonical(name)) for name in described.tensors)
    return tuple(name for name, canonical in named if canonical not in own and known.is_foreign(canonical))


# ---- a known model


def _against_known(known: Known, described: Described, told: Sequence[Contradiction]) -> Iterator[TargetError]:
    named = {known.canonical(name): name for name in described.tensors}
    shapes = {canonical: described.tensors[name] for canonical, name in named.items()}
    expected = {**known.optional, **known.tensors}
    missing = [name for name in known.tensors if name not in shapes]
    foreign = [named[name] for name in shapes if name not in expected and known.is_own(name)]
    misfits = [name for name, shape in shapes.items() if name in expected and expected[name] != shape]
    stated = tuple(one for one in told if one.path[-1] != "architectures")
    if missing:
        yield _incomplete(missing, len(expected), described, stated)
    if foreign:
        yield _foreign(foreign, described, stated)
    if misfits:
        yield _misfit(misfits, named, shapes, expected, described, stated)
    if not (missing or foreign or misfits):  # `layer_types` and the like, which no tensor shows
        yield from (_as_error(one, described) for one in told if one.path[-1] == "layer_types")


def _incomplete(missing: Sequence[str], count: int, described: Described, told: Sequence[Contradiction]) -> TargetError:
    return TargetError(
        INCOMPLETE,
        f"{_are(len(missing))} missing: {_few(missing)}",
        where=described.where,
        found=f"{count - len(missing)} of {count} tensors of a {_model_type(described)}"
        + "".join(f"; {one.detail}" for one in told[:3]),
        expected="; ".join(_says(one) for one in told[:3]),
        hint=_completing(described, told),
    )


def _foreign(names: Sequence[str], described: Described, told: Sequence[Contradiction]) -> TargetError:
    return TargetError(
        DISAGREES,
        f"config.json describes a model without {_few(names)}",
        where=described.where,
        found=f"{len(names)} tensors that it does not have" + "".join(f"; {one.detail}" for one in told[:3]),
        expected="; ".join(_says(one) for one in told[:3]),
        hint=_correcting(described, told),
    )


def _misfit(
    misfits: Sequence[str],
    named: Mapping[str, str],
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    described: Described,
    told: Sequence[Contradiction],
) -> TargetError:
    first = misfits[0]
    more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    return TargetError(
        DISAGREES,
        f"config.json describes another shape of {named[first]}{more}",
        where=described.where,
        found="; ".join([str(list(shapes[first])), *(one.detail for one in told[:3])]),
        expected="; ".join([str(list(expected[first])), *(_says(one) for one in told[:3])]),
        hint=_correcting(described, told),
    )


# ---- any model


def _as_error(one: Contradiction, described: Described) -> TargetError:
    if one.missing:
        what, hint = "tensors of the model that config.json describes are missing", _completing(described, (one,))
    else:
        what, hint = "config.json describes another model than these tensors", _correcting(described, (one,))
    code = INCOMPLETE if one.missing else DISAGREES
    return TargetError(code, what, where=described.where, found=one.detail, expected=_says(one), hint=hint)


def differing_head(head: str, embedding: str, described: Described, said: Sequence[KeyPath]) -> TargetError:
    """Returns the error of a model that these parts of its config call tied, and that has two different matrices."""
    keys = [".".join((*path, "tie_word_embeddings")) for path in said]
    return TargetError(
        DISAGREES,
        "config.json ties head and embedding, and they differ",
        where=described.where,
        found=f"{head} has other values than {embedding}",
        expected="; ".join(f"{key} True" for key in keys),
        hint="; ".join(_set_line(described, key, "false") for key in keys),
    )


def _uneven(described: Described) -> Iterator[TargetError]:
    if described.packed or "quantization_config" in described.config:
        return  # a layer that is left as it was has no scales
    names = list(lost(described.tensors))
    if names:
        what, found = (
            f"{_are(len(names))} missing: {_few(names)}",
            "one layer without, and the others of its stack with",
        )
        yield TargetError(INCOMPLETE, what, where=described.where, found=found, hint=_completing(described, ()))


# ---- a model that another library loads


def loading_errors(described: Described, keys: LoadedKeys, says: str) -> tuple[TargetError, ...]:
    """Returns an error for each kind of keys that are not as they should be; ``says`` tells who loaded it as what."""
    return tuple(_loading_errors(described, keys, says))


def _loading_errors(described: Described, keys: LoadedKeys, says: str) -> Iterator[TargetError]:
    where, told = described.where, tuple(contradictions(described.config, described.tensors))
    if keys.missing:
        what = f"{_are(len(keys.missing))} missing: {_few(keys.missing)}"
        yield TargetError(INCOMPLETE, what, where=where, found=says, hint=_completing(described, told))
    if keys.unexpected:
        what = f"config.json describes a model without {_few(keys.unexpected)}"
        found = f"{says}, and ignores {len(keys.unexpected)} tensors"
        yield TargetError(DISAGREES, what, where=where, found=found, hint=_dropping(described, keys.unexpected))
    if keys.mismatched:
        what = f"config.json describes another shape of {_few(keys.mismatched)}"
        yield TargetError(DISAGREES, what, where=where, found=says, hint=_correcting(described, told))


# ---- words


def _model_type(described: Described) -> str:
    return shown(described.config.get("model_type") or "model", 60).strip("'")


def _says(one: Contradiction) -> str:
    return f"{'.'.join(one.path)} {shown(one.stated, 60)}"


def _completing(described: Described, told: Sequence[Contradiction]) -> str:
    base = (
        'name the model it was trained on as another source of a mapping: `tensors: {"{rest...}": '
        '["trained:{rest...}", "base:{rest...}"]}`, `target: {name: hf/model, text: base}`'
    )
    rest = "if only a part is wanted: --partial, in a mapping `output: {partial: true}`"
    counts = [f"or, if it is whole, {_set_line(described, *_line(one))}" for one in told if one.found is not None]
    return "; ".join((base, *counts[:2], rest))


def _correcting(described: Described, told: Sequence[Contradiction]) -> str:
    lines = [_set_line(described, *_line(one)) for one in told if one.found is not None]
    if lines:
        return "; ".join(lines)
    keys = ", ".join(f"`{'.'.join(one.path)}`" for one in told) or "it"
    place = "under `config: {set: {...}}`" if described.editable else f"in {described.where}"
    return f"correct {keys} {place}, or name the config.json that belongs to these tensors"


def _dropping(described: Described, names: Sequence[str]) -> str:
    stored = [name for name in names if name in described.tensors]
    how = f"drop them in a mapping: `drop: [SOURCE:{stored[0]}, ...]`; or " if stored else ""
    return f"{how}name the config.json that belongs to these tensors"


def _line(one: Contradiction) -> tuple[str, str]:
    return ".".join(one.path), str(one.found)


def _set_line(described: Described, key: str, value: str) -> str:
    if described.editable:
        return f"write `config: {{set: {{{key}: {value}}}}}` into the mapping"
    return f"correct `{key}` to {value} in {described.where}"


def _are(number: int) -> str:
    if number == 1:
        return "1 tensor of the model that config.json describes is"
    return f"{number} tensors of the model that config.json describes are"


def _few(names: Sequence[str]) -> str:
    return ", ".join(shown(name, 100).strip("'") for name in names[:_FEW]) + (", ..." if len(names) > _FEW else "")
