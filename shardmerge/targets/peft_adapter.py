"""The target ``peft/adapter``: the trained tensors of an adapter as a directory that peft loads.

File names, keys and fields follow peft 0.11 to 0.21 (``get_peft_model_state_dict``, ``LoraConfig``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from shardmerge.errors import TargetError, raise_all
from shardmerge.shown import shown
from shardmerge.targets.adapter_config import read_adapter_config
from shardmerge.targets.config_numbers import JsonObject, dump, finite, flag, load_object
from shardmerge.targets.expectation import Expectation, FileGroup, Request, Target
from shardmerge.targets.options import positive_number, switch
from shardmerge.tensors import Catalog, Shape, SideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG

ROOT = "base_model.model."
STEM = "adapter_model"

# ...q_proj.lora_A.default.weight and its kin: the module, the kind, the adapter's name where the key has one.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
_WHOLE = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<leaf>[^.]+)")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.[^.]+\.(?P<leaf>[^.]+)")
# Fields of a config beside the checkpoint whose values are checked; the others are kept as they are.
_READ = ("lora_alpha", "r", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")
# Rows of an embedding that were trained, and whatever else is no weight of the model.
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_OF_ADAPTERS = re.compile(r"\.(?:lora_\w+|modules_to_save|token_adapter\.(?!base_layer\.)\w+)(?:\.|$)")
# What a full dump holds beside an adapter: the base's own weights under the names of the wrapped module.
_BASE = (".base_layer.weight", ".original_module.weight", ".original_module.bias")


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What the weights of an adapter do not say.

    Attributes
    ----------
    alpha
        ``lora_alpha``; ``None`` where nobody says.
    use_rslora
        The scale is ``alpha / sqrt(r)``, not ``alpha / r``.
    base
        Hub id or path of the model that it changes, ``""`` where nobody says.
    task_type
        peft's name of the task, ``""`` for none.
    alpha_pattern
        Other alphas, by the name of a module or a pattern of names.
    fan_in_fan_out
        The adapted weights are stored transposed, as in GPT-2.
    """

    alpha: float | None = None
    use_rslora: bool = False
    base: str = ""
    task_type: str = ""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False


def holds_adapter(names: Iterable[str]) -> bool:
    """Whether any of these names is one of a LoRA adapter."""
    return any(".lora_" in name for name in names)


def saved_name(name: str) -> str:
    """Returns the key that peft saves for a parameter of a wrapped model: without the adapter's name.

    ``base_model.model.x.lora_A.default.weight`` is saved as ``base_model.model.x.lora_A.weight``, and a module of
    ``modules_to_save`` under its plain name. A magnitude vector has no ``.weight``, whichever peft trained it.
    """
    if (match := _SAVED.fullmatch(name)) is not None:
        return f"{match['module']}.{match['leaf']}"
    if (match := _TOKENS.fullmatch(name)) is not None:
        return f"{match['module']}.token_adapter.trainable_tokens_delta"
    if (match := _PART.fullmatch(name)) is not None:
        leaf = "" if match["kind"] == "lora_magnitude_vector" else match["leaf"] or ""
        return f"{match['module']}.{match['kind']}{leaf}"
    return name


def adapter_tensors(
    catalog: Catalog, prefix: str = "", gone: Collection[str] = (), *, biases: str = "none"
) -> dict[str, Shape]:
    """Returns the keys and shapes that peft saves for an adapter.

    Parameters
    ----------
    catalog
        Of the training: the wrapped model's parameters, or keys as peft saves them.
    prefix
        What stands in front of ``base_model.model.``, e.g. ``llm.``.
    gone
        Names that the user drops.
    biases
        peft's ``bias``: ``none``, ``lora_only`` or ``all`` of the base's were trained.
    """
    start = prefix + ROOT
    base = _of_the_base(catalog, start, biases=biases)
    names = [name for name in catalog.names() if name.startswith(start) and name not in base and name not in gone]
    return {saved_name(name.removeprefix(prefix)): catalog[name].shape for name in names}


def _of_the_base(catalog: Catalog, start: str, *, biases: str = "none") -> frozenset[str]:
    """Returns the tensors of a run that are its base's: what the files call frozen, and what peft has below an adapter.

    Where a run's whole state holds the weights below its adapters and nothing says what was frozen, peft's rule is
    that what no adapter has was: it unfreezes ``modules_to_save``, and biases where the config says so.
    """
    names = [name for name in catalog.names() if name.startswith(start)]
    frozen = {name for name in names if catalog[name].origin.startswith("frozen")}
    below = {name for name in names if name.endswith(_BASE)}
    if frozen or not _holds_base(names):
        return frozenset(frozen | below)
    plain = {name for name in names if _OF_ADAPTERS.search(name) is None}
    trained = {"all": (".bias",), "lora_only": (".base_layer.bias",)}.get(biases, ())
    return frozenset(below | {name for name in plain if not name.endswith(trained)})


def _holds_base(names: Collection[str]) -> bool:
    """Whether the weight below every adapter is there (before peft 0.6 without ``base_layer``)."""
    there = set(names)
    modules = {match["module"] for name in names if (match := _PART.fullmatch(name)) is not None}
    return bool(modules) and all({f"{one}.base_layer.weight", f"{one}.weight"} & there for one in modules)


def adapter_config(tensors: Mapping[str, Shape], facts: AdapterFacts, where: str) -> JsonObject:
    """Returns adapter_config.json: ranks, modules and kinds as the tensors say, the rest as ``facts`` say.

    Raises
    ------
    TargetError
        ``adapter-alpha`` where nobody says alpha, ``no-adapter`` where no tensor is one of LoRA, ``adapter-incomplete``
        where a module has half of a pair.
    """
    ranks = _ranks(tensors)
    if not ranks:
        raise TargetError("no-adapter", "the checkpoint has no tensor of a LoRA adapter", where=where)
    if facts.alpha is None:
        raise TargetError(
            "adapter-alpha",
            "nobody says the adapter's alpha, and its weights cannot tell",
            where=where,
            expected="`lora_alpha` in the training config or in adapter_config.json",
            hint="say the run's in the target: `target: {name: peft/adapter, trained: SOURCE, alpha: 16}`",
        )
    halves = _halves(tensors)
    if halves:
        raise TargetError(
            "adapter-incomplete",
            f"{len(halves)} modules of the adapter have A without B, or B without A: {', '.join(halves[:3])}",
            where=where,
            hint="fetch the checkpoint again, whole; a line under `drop:` that takes one half must take both",
        )
    rank = Counter(ranks.values()).most_common(1)[0][0]
    odd = {module: found for module, found in ranks.items() if found != rank}
    return {
        "alpha_pattern": dict(facts.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": facts.base or None,
        "bias": _bias(tensors, ranks),
        "fan_in_fan_out": facts.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(facts.alpha) if facts.alpha == int(facts.alpha) else facts.alpha,
        "lora_bias": any(name.endswith(".lora_B.bias") for name in tensors),
        "lora_dropout": 0.0,
        "modules_to_save": _whole_modules(tensors) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": odd,
        "revision": None,
        "target_modules": _targets(ranks),
        "task_type": facts.task_type or None,
        "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        "use_rslora": facts.use_rslora,
    }


def _ranks(tensors: Mapping[str, Shape]) -> dict[str, int]:
    """Returns the rank of each adapted module. A is [r, in] for a linear layer, and for an embedding [r, rows]."""
    ranks: dict[str, int] = {}
    for name, shape in tensors.items():
        match = _PART.fullmatch(name)
        if match is not None and match["kind"] in ("lora_A", "lora_embedding_A") and shape:
            ranks[match["module"].removeprefix(ROOT)] = shape[0]
    return ranks


def _halves(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the modules that have one of A and B and not the other."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for name in tensors:
        match = _PART.fullmatch(name)
        if match is not None and match["leaf"] != ".bias" and match["kind"] != "lora_magnitude_vector":
            family, _, half = match["kind"].rpartition("_")
            kinds.setdefault((match["module"], family), set()).add(half)
    return sorted(module for (module, _), found in kinds.items() if len(found) == 1)


def _targets(ranks: Mapping[str, int]) -> list[str]:
    """Returns ``target_modules``: last names where each is adapted in every layer, else whole names.

    peft takes a last name for every module that ends so, and an untrained adapter there would be news to the user.
    """
    layers: dict[str, set[int]] = {}
    for module in ranks:
        numbers = [int(part) for part in module.split(".") if part.isdecimal()]
        layers.setdefault(re.sub(r"\d+", "#", module), set()).update(numbers[:1])
    everywhere = [numbers for numbers in layers.values() if numbers]
    count = max((len(numbers) for numbers in everywhere), default=0)
    if all(numbers == set(range(count)) for numbers in everywhere):
        return sorted({module.rsplit(".", 1)[-1] for module in ranks})
    return sorted(ranks)


def _plain(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the names of trained tensors that are not LoRA's, without the root."""
    return [name.removeprefix(ROOT) for name in tensors if ".lora_" not in name]


def _bias(tensors: Mapping[str, Shape], ranks: Mapping[str, int]) -> str:
    """Returns peft's ``bias``: which of the base's own biases were trained."""
    whole = set(_whole_modules(tensors))
    biased = {name.rsplit(".", 1)[0] for name in _plain(tensors) if name.endswith(".bias")}
    modules = {module.removesuffix(".base_layer") for module in biased if module.rsplit(".", 1)[-1] not in whole}
    if not modules:
        return "none"
    return "lora_only" if modules <= set(ranks) else "all"


def _whole_modules(tensors: Mapping[str, Shape]) -> list[str]:
    """Returns the last names of modules that were trained whole."""
    return sorted(
        {name.rsplit(".", 2)[-2] for name in _plain(tensors) if name.endswith(".weight") and "." in name[:-7]}
    )


# ---- the target


def expect(request: Request) -> Expectation:
    """Returns what the adapter's directory must hold.

    Raises
    ------
    TargetError
        ``missing-source``, ``no-adapter``, ``adapter-alpha``, ``adapter-tokens``, ``bad-option``, ``bad-json``.
    """
    source = request.roles.get("trained", "trained")
    catalog = request.catalogs.get(source)
    if catalog is None:
        raise TargetError(
            "missing-source", "the mapping has no source for the adapter", expected=f"a source named `{source}`"
        )
    prefix = _prefix(request, catalog)
    raise_all(_unfit(catalog, prefix + ROOT))
    biases = _biases(request, catalog)
    tensors = adapter_tensors(catalog, prefix, request.gone("trained"), biases=biases)
    config = _config(request, catalog, tensors)
    frozen = _of_the_base(catalog, prefix + ROOT, biases=biases)
    return Expectation(
        tensors=tensors,
        ignored={source: frozen},
        side_files=(SideFile(ADAPTER_CONFIG, (dump(config),)),),
        groups=(FileGroup(stem=STEM, sharded=False),),
    )


def _prefix(request: Request, catalog: Catalog) -> str:
    """Returns what stands in front of the adapter's names: as said, else what the names themselves have there."""
    stated = request.options.get("under")
    if stated is not None:
        return stated if not stated or stated.endswith(".") else f"{stated}."
    found = {name.split(ROOT, 1)[0] for name in catalog.names() if ".lora_" in name and ROOT in name}
    if len(found) > 1:
        raise TargetError(
            "no-adapter",
            "the checkpoint has more than one adapter",
            where=catalog.path,
            found=", ".join(sorted(repr(prefix) for prefix in found)),
            hint=f"say which one: `target: {{name: peft/adapter, trained: SOURCE, under: {min(found)}}}`",
        )
    return next(iter(found), "")


def _unfit(catalog: Catalog, start: str) -> Iterator[TargetError]:
    """Yields what keeps the tensors from being one whole adapter."""
    parts = [name for name in (*catalog.names(), *catalog.absent) if name.startswith(start)]
    found = {
        name: match
        for name in parts
        if (match := _PART.fullmatch(name) or _WHOLE.fullmatch(name) or _TOKENS.fullmatch(name))
    }
    if odd := [name for name in parts if name not in found and _OF_ADAPTERS.search(name)]:
        what = f"{len(odd)} tensors of the checkpoint are of an adapter that is no LoRA of peft: {shown(odd)}"
        yield TargetError("unknown-adapter-tensor", what, where=catalog.path)
    adapters = sorted({match["adapter"] for match in found.values() if match["adapter"]})
    if len(adapters) > 1:
        yield TargetError(
            "several-adapters",
            f"the checkpoint holds {len(adapters)} adapters: {shown(adapters)}",
            where=catalog.path,
            hint="save the one that is meant: model.save_pretrained(OUT, selected_adapters=[NAME])",
        )
    empty = [name for name in found if name in catalog.absent or not catalog[name].numel]
    if empty:
        yield TargetError(
            "empty-adapter",
            f"{len(empty)} tensors of the adapter have no elements: placeholders [0], saved under ZeRO-3 before they "
            f"were gathered: {shown(empty)}",
            where=catalog.path,
            hint="name the directory of the DeepSpeed checkpoint beside it: it has the numbers",
        )


def _agrees(own: JsonObject, ranks: Mapping[str, int], where: str) -> Iterator[TargetError]:
    """Yields an error where a config beside the checkpoint is that of another run."""
    said = read_adapter_config(own, where)
    if said.rank is not None and not said.rank_pattern and set(ranks.values()) != {said.rank}:
        yield TargetError(
            "adapter-rank",
            "adapter_config.json says another rank than the tensors have",
            where=where,
            found=", ".join(map(str, sorted(set(ranks.values()))[:5])),
            expected=f"r = {said.rank}",
            hint="config and tensors are of different runs: put the right adapter_config.json beside the checkpoint",
        )


def _biases(request: Request, catalog: Catalog) -> str:
    """Returns which biases a config beside the checkpoint says were trained."""
    if ADAPTER_CONFIG not in catalog.side_files:
        return "none"
    return str(load_object(catalog.side_files[ADAPTER_CONFIG], request.read).get("bias"))


def _config(request: Request, catalog: Catalog, tensors: Mapping[str, Shape]) -> JsonObject:
    """Returns adapter_config.json: the source's own where it has one, with the options over it."""
    own = load_object(catalog.side_files[ADAPTER_CONFIG], request.read) if ADAPTER_CONFIG in catalog.side_files else {}
    stated = positive_number(request, "alpha")
    where = catalog.side_files[ADAPTER_CONFIG].file if own else catalog.path
    if own and _ranks(tensors):
        raise_all(_agrees({key: own[key] for key in _READ if key in own}, _ranks(tensors), where))
    if not own.get("trainable_token_indices") and any(_TOKENS.fullmatch(name) for name in tensors):
        raise TargetError(
            "adapter-tokens",
            "the run trained single tokens, and nobody says which",
            where=where,
            expected=f"trainable_token_indices in {ADAPTER_CONFIG}",
            hint=f"put the {ADAPTER_CONFIG} of the run beside the checkpoint",
        )
    alpha = finite(own, "lora_alpha", 0.0, where) if stated is None and own.get("lora_alpha") is not None else stated
    base = own.get("base_model_name_or_path")
    task = own.get("task_type")
    facts = AdapterFacts(
        alpha=alpha,
        use_rslora=switch(request, "rslora", default=flag(own, "use_rslora", where)),
        base=request.options.get("base", base if isinstance(base, str) else ""),
        task_type=request.options.get("task_type", task if isinstance(task, str) else ""),
    )
    made = adapter_config(tensors, facts, catalog.path)
    changed = {key: made[key] for key in ("base_model_name_or_path", "lora_alpha", "task_type", "use_rslora")}
    return made | own | changed if own else made


TARGET = Target(
    name="peft/adapter",
    about="A LoRA adapter for peft: adapter_model and adapter_config.json.",
    roles={"trained": "the checkpoint with the adapter's tensors"},
    options={
        "alpha": "`lora_alpha`, where the source has no adapter_config.json that says it",
        "base": "`base_model_name_or_path`: hub id or path of the model that the adapter changes",
        "rslora": "`true` where the scale is alpha / sqrt(r)",
        "task_type": "peft's name of the task, e.g. `CAUSAL_LM`",
        "under": "what stands in front of `base_model.model.`, e.g. `llm.`, where there is more than one adapter",
    },
    expect=expect,
)
