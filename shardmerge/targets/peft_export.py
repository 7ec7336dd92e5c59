"""The target ``peft/adapter``: the adapters of a training checkpoint as directories that peft loads.

Of several, ``default`` stands at the top and each other one in a folder of its name, as ``PeftModel.save_pretrained``
of peft 0.11 to 0.21 writes them; one that is alone, or that ``adapter`` chooses, stands at the top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shardmerge.errors import TargetError, raise_all
from shardmerge.shown import shown
from shardmerge.targets.adapter_config import read_adapter_config
from shardmerge.targets.adapter_facts import AdapterConfig
from shardmerge.targets.config_numbers import JsonObject, dump, finite, flag, load_object
from shardmerge.targets.expectation import Expectation, FileGroup, Request, Target
from shardmerge.targets.options import positive_number, switch
from shardmerge.targets.peft_adapter import (
    OF_ADAPTERS,
    ROOT,
    STEM,
    adapter_config,
    adapter_of,
    adapter_ranks,
    adapter_tensors,
    part_of,
    tensors_of_the_base,
    trained_tokens,
)  # fmt: skip
from shardmerge.targets.training_config import read_training_config
from shardmerge.tensors import Catalog, Extent, Shape, SideFile
from shardmerge.tensors.file_roles import ADAPTER_CONFIG, LORA_META

_DEFAULT = "default"
# Fields of a config beside the checkpoint whose values are checked; the others are kept as they are.
_READ = ("lora_alpha", "r", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out")


def expect(request: Request) -> Expectation:
    """Returns what the directory must hold.

    Names of an adapter that is not called ``default`` begin with its own, ``style.base_model.model...``: so the rules
    of a mapping tell them apart.

    Raises
    ------
    TargetError
        ``missing-source``, ``no-adapter``, ``unknown-adapter``, ``unknown-adapter-tensor``, ``empty-adapter``,
        ``adapter-alpha``, ``adapter-rank``, ``adapter-tokens``, ``bad-option``, ``bad-json``.
    """
    source = request.roles.get("trained", "trained")
    catalog = request.catalogs.get(source)
    if catalog is None:
        raise TargetError(
            "missing-source", "the mapping has no source for the adapter", expected=f"a source named `{source}`"
        )
    prefix = _prefix(request, catalog)
    raise_all(_unfit(catalog, prefix + ROOT))
    adapters = _chosen(request, catalog, prefix + ROOT)
    names = {adapter.name for adapter in adapters}
    others = {name for name in catalog.names() if (adapter_of(name) or adapters[0].name) not in names}
    base = (tensors_of_the_base(catalog, prefix + ROOT, biases=adapter.biases()) for adapter in adapters)
    tensors = [(adapter, adapter.tensors()) for adapter in adapters]
    return Expectation(
        tensors={f"{one.front}{name}": shape for one, held in tensors for name, shape in held.items()},
        ignored={source: frozenset(others).union(*base)},
        left_out=_not_meant(catalog, prefix + ROOT, names),
        side_files=tuple(SideFile(f"{one.folder}{ADAPTER_CONFIG}", (dump(one.config(held)),)) for one, held in tensors),
        groups=tuple(one.group() for one in sorted(adapters, key=lambda one: not one.front)),
    )


def _chosen(request: Request, catalog: Catalog, start: str) -> list[_Exported]:
    """Returns the adapters that are meant; one without a name where names say none, as save_pretrained writes them."""
    held = _held(catalog, start)
    prefix = start.removesuffix(ROOT)
    wanted = request.options.get("adapter", "")
    if wanted and wanted not in held:
        raise TargetError(
            "unknown-adapter",
            f"the checkpoint holds no adapter called {shown(wanted)}",
            where=catalog.path,
            found=", ".join(held) or "names without an adapter's name, as save_pretrained writes them",
            hint=f"say `adapter: {held[0]}`" if held else "remove `adapter:`",
        )
    names = [wanted] if wanted else held or [""]
    return [_Exported(request, catalog, prefix, name, alone=len(names) == 1) for name in names]


def _held(catalog: Catalog, start: str) -> list[str]:
    return sorted({adapter_of(name) for name in catalog.names() if name.startswith(start)} - {""})


def _not_meant(catalog: Catalog, start: str, names: set[str]) -> dict[str, str]:
    """Returns what rules for any adapter make besides: those that are not meant, and ``default`` in a folder."""
    others = (name for name in _held(catalog, start) if name not in names)
    fronts = {ROOT if name == _DEFAULT else f"{name}." for name in others} | {f"{_DEFAULT}."}
    return dict.fromkeys(sorted(fronts), "of an adapter that is not exported")


@dataclass(frozen=True, slots=True)
class _Exported:
    """One adapter of a source; ``name`` is what peft called it in memory, ``""`` where the names say none."""

    request: Request
    catalog: Catalog
    prefix: str
    name: str
    alone: bool

    @property
    def front(self) -> str:
        """What its names begin with in a mapping."""
        return "" if self.name in ("", _DEFAULT) else f"{self.name}."

    @property
    def folder(self) -> str:
        """Where its files go, ``""`` or with a slash."""
        return "" if self.alone or not self.front else f"{self.name}/"

    def group(self) -> FileGroup:
        """Its file."""
        return FileGroup(self.front, self.folder.rstrip("/"), stem=STEM, sharded=False)

    def tensors(self) -> dict[str, Shape]:
        """Its keys and shapes. What is of no adapter by its name, such as a bias, goes with the one at the top."""
        gone = {*self.request.gone("trained")}
        if self.folder:
            gone |= {name for name in self.catalog.names() if not adapter_of(name)}
        return adapter_tensors(self.catalog, self.prefix, gone, biases=self.biases(), adapter=self.name)

    def biases(self) -> str:
        """Which biases its config says were trained."""
        return str(self._own().get("bias")) if self._file() else "none"

    def _file(self) -> Extent | None:
        """The config beside the checkpoint: in a folder of its name, as peft saves it, or at the top."""
        files = self.catalog.side_files
        top = files.get(ADAPTER_CONFIG) if not self.folder else None
        return files.get(f"{self.name}/{ADAPTER_CONFIG}", top)

    def _own(self) -> JsonObject:
        file = self._file()
        return {} if file is None else load_object(file, self.request.read)

    def config(self, tensors: Mapping[str, Shape]) -> JsonObject:
        """Returns adapter_config.json: the source's own where it has one, with the options over it."""
        own, file = self._own(), self._file()
        where = self.catalog.path if file is None else file.file
        if own and adapter_ranks(tensors):
            raise_all(_agrees({key: own[key] for key in _READ if key in own}, adapter_ranks(tensors), where))
        if not own.get("trainable_token_indices") and trained_tokens(tensors):
            raise TargetError(
                "adapter-tokens",
                "the run trained single tokens, and their ids are unknown",
                where=where,
                expected=f"trainable_token_indices in {ADAPTER_CONFIG}",
                hint=f"put the {ADAPTER_CONFIG} of the run beside the checkpoint",
            )
        stand = self._stand(own, where)
        made = adapter_config(tensors, stand, self.catalog.path, "" if self.alone else self.name)
        changed = {key: made[key] for key in ("base_model_name_or_path", "lora_alpha", "task_type", "use_rslora")}
        return made | own | changed if own else made

    def _stand(self, own: JsonObject, where: str) -> AdapterConfig:
        """What is said beside the tensors: the options, over the config beside the checkpoint, over the run's facts."""
        request, facts = self.request, self.catalog.facts
        run = AdapterConfig() if own else self._trained()
        said = finite(own, "lora_alpha", 0.0, where) if own.get("lora_alpha") is not None else run.alpha
        if said is None and facts.get("lora_alpha") is not None:  # verl's, or of a combination
            said = finite(facts, "lora_alpha", 0.0, f"{self.catalog.path}/{LORA_META}")
        stated = positive_number(request, "alpha")
        base, task = own.get("base_model_name_or_path"), own.get("task_type", facts.get("lora_task_type"))
        return AdapterConfig(
            alpha=said if stated is None else stated,
            alpha_pattern=run.alpha_pattern if stated is None else {},
            fan_in_fan_out=run.fan_in_fan_out or facts.get("lora_fan_in_fan_out") is True,
            rslora=switch(request, "rslora", default=flag(own, "use_rslora", where) or run.rslora),
            base=request.options.get("base", base if isinstance(base, str) else ""),
            task=request.options.get("task_type", task if isinstance(task, str) else ""),
        )

    def _trained(self) -> AdapterConfig:
        """What XTuner's training config says of the part that the names are of."""
        run = read_training_config(self.catalog.training_config)
        found = run.visual_encoder_lora if self.prefix.startswith("visual_encoder.") else run.llm_lora
        return found or AdapterConfig()


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
    found = {name for name in parts if part_of(name) is not None}
    if odd := [name for name in parts if name not in found and OF_ADAPTERS.search(name)]:
        what = f"{len(odd)} tensors of the checkpoint are of an adapter that is no LoRA of peft: {shown(odd)}"
        yield TargetError("unknown-adapter-tensor", what, where=catalog.path)
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


TARGET = Target(
    name="peft/adapter",
    about="LoRA adapters for peft: adapter_model and adapter_config.json.",
    roles={"trained": "the checkpoint with the adapter's tensors"},
    options={
        "alpha": "`lora_alpha`, where the source has no adapter_config.json that says it",
        "adapter": "which adapter, where the source holds several; all of them where nothing is said",
        "base": "`base_model_name_or_path`: hub id or path of the model that the adapter changes",
        "rslora": "`true` where the scale is alpha / sqrt(r)",
        "task_type": "peft's name of the task, e.g. `CAUSAL_LM`",
        "under": "what stands in front of `base_model.model.`, e.g. `llm.`, where there is more than one adapter",
    },
    expect=expect,
)
