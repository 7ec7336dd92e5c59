"""The two small files of code that make ``AutoModel.from_pretrained`` load a projector's directory.

XTuner loads its ``projector/`` with ``trust_remote_code=True``, by the classes that ``auto_map`` in its config.json
names. These have the same class, file and field names, and the same tensors.
"""

from __future__ import annotations

AUTO_MAP = {
    "AutoConfig": "configuration_projector.ProjectorConfig",
    "AutoModel": "modeling_projector.ProjectorModel",
}

CONFIGURATION = b'''"""The sizes of a projector between a visual encoder and a language model."""

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

MODELING = b'''"""A projector: a chain of linear layers between a visual encoder and a language model."""

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

FILES = {"configuration_projector.py": CONFIGURATION, "modeling_projector.py": MODELING}
