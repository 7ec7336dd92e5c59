"""A projector's directory, with the two small files of code that make ``AutoModel.from_pretrained`` load it.

XTuner loads its ``projector/`` with ``trust_remote_code=True``, by the classes that ``auto_map`` in its config.json
names. These have the same class, file and field names, and the same tensors.
"""

from __future__ import annotations

from shardmerge.errors import TargetError
from shardmerge.shown import inspecting
from shardmerge.targets.config_numbers import JsonObject, dump
from shardmerge.targets.llava.official_config import projector_tensors
from shardmerge.targets.llava.wiring import wire
from shardmerge.targets.training_config import TrainingFacts
from shardmerge.tensors import Catalog, Shape, SideFile

# The first layer's weight by the names of XTuner, of Hugging Face's LLaVA and of LLaVA's own code.
_FIRST = ("projector.model.0.weight", "multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight")

_AUTO_MAP = {
    "AutoConfig": "configuration_projector.ProjectorConfig",
    "AutoModel": "modeling_projector.ProjectorModel",
}

_CONFIGURATION = b'''"""The sizes of a projector between a visual encoder and a language model."""

from transformers import PretrainedConfig


class ProjectorConfig(PretrainedConfig):
    model_type = "projector"

    def __init__(
        self, visual_hidden_size=4096, llm_hidden_size=4096, depth=2, hidden_act="gelu", bias=True, **others
    ):
        super().__init__(**others)
        self.visual_hidden_size = visual_hidden_size
        self.llm_hidden_size = llm_hidden_size
        self.depth = depth
        self.hidden_act = hidden_act
        self.bias = bias
'''

_MODELING = b'''"""A projector: a chain of linear layers between a visual encoder and a language model."""

from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from .configuration_projector import ProjectorConfig


class ProjectorModel(PreTrainedModel):
    config_class = ProjectorConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        widths = [config.visual_hidden_size] + [config.llm_hidden_size] * config.depth
        layers = []
        for before, after in zip(widths, widths[1:]):
            if layers:
                layers.append(ACT2FN[config.hidden_act])
            layers.append(nn.Linear(before, after, bias=config.bias))
        self.model = nn.Sequential(*layers)
        self.post_init()

    def forward(self, x):
        return self.model(x)
'''

_FILES = {"configuration_projector.py": _CONFIGURATION, "modeling_projector.py": _MODELING}


def projector_folder(
    facts: TrainingFacts, trained: Catalog, dtype: str
) -> tuple[dict[str, Shape], tuple[SideFile, ...]]:
    """Returns the names and shapes of a projector, and the files beside it; ``dtype`` is ``""`` for the trained one's.

    Raises
    ------
    TargetError
        ``no-projector``.
    """
    first = _first(trained)
    (hidden, columns), depth = trained[first].shape, wire(facts, trained, {}).depth or 2
    config: JsonObject = {
        "architectures": ["ProjectorModel"],
        "auto_map": _AUTO_MAP,
        "bias": True,
        "depth": depth,
        "hidden_act": "gelu",
        "llm_hidden_size": hidden,
        "model_type": "projector",
        "torch_dtype": dtype or trained[first].dtype.torch,
        "visual_hidden_size": columns,
    }
    code = (SideFile(name, (text,)) for name, text in _FILES.items())
    tensors = projector_tensors("model.", depth, columns, hidden)
    return tensors, (SideFile("config.json", (dump(config),)), *code)


def _first(trained: Catalog) -> str:
    """Returns the name of the trained projector's first layer, whose shape are the widths."""
    for name in _FIRST:
        if name in trained and len(trained[name].shape) == 2:
            return name
    raise TargetError(
        "no-projector",
        "the checkpoint has no projector, which XTuner saves with every LLaVA",
        where=trained.path,
        expected=" or ".join(_FIRST),
        hint=f"name the checkpoint of the training; {inspecting(trained.path)} lists what this one holds",
    )
