"""The SigLIP inside of a checkpoint of LLaVA's own code, which has fewer layers than the one it started from.

``SigLipVisionTower.load_model`` of LLaVA-VL/LLaVA-NeXT (``siglip_encoder.py``) deletes the last layer and the pooling
head, and takes the output of the layer before, whatever ``mm_vision_select_layer`` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from shardmerge.targets.llava.bases import VisionBase
from shardmerge.targets.llava.wiring import Wiring
from shardmerge.tensors import Catalog

_TOWER = "model.vision_tower.vision_tower.vision_model."
_LAYER = re.compile(re.escape(_TOWER) + r"encoder\.layers\.(\d{1,4})\.")
_REASON = "the checkpoint's own encoder ends before: LLaVA's code deletes the last layer and the head of a SigLIP"


def cut_tower(
    vision: VisionBase, wiring: Wiring, trained: Catalog | None, name: Callable[[str], str]
) -> tuple[VisionBase, Wiring, Mapping[str, str]]:
    """Returns the encoder as the checkpoint has it, the wiring behind it, and what of the pretrained one is left out.

    Parameters
    ----------
    vision, wiring
        As the config of the pretrained encoder and that of the run say.
    trained
        The checkpoint.
    name
        Returns the target name of one of a Hugging Face LLaVA's.
    """
    names = trained.names() if trained is not None else ()
    layers = {int(match[1]) for one in names if (match := _LAYER.match(one))}
    if not layers or "vision_use_head" not in vision.architecture.values:
        return vision, wiring, {}
    count, whole = max(layers) + 1, vision.architecture.num_layers
    head = any(one.startswith(f"{_TOWER}head.") for one in names)
    if count == whole and head == vision.architecture.values["vision_use_head"]:
        return vision, wiring, {}
    stated = {"num_hidden_layers": count, "vision_use_head": head}
    cut = replace(vision, config=vision.config | stated, architecture=vision.architecture.changed(**stated))
    left_out = {name(f"vision_tower.vision_model.encoder.layers.{index}."): _REASON for index in range(count, whole)}
    left_out |= {} if head else {name("vision_tower.vision_model.head."): _REASON}
    return cut, replace(wiring, layer=-1) if count < whole else wiring, left_out
