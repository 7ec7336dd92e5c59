"""The names of a Hugging Face LLaVA's parts, in three generations of transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LlavaNames:
    """Where the parts of the model stand among the target names; ``without`` what the encoder's own begin with."""

    language: str
    head: str
    vision: str
    projector: str
    newline: str
    without: str = ""

    @property
    def embedding(self) -> str:
        """The embedding's name."""
        return f"{self.language}embed_tokens.weight"

    def text(self, name: str) -> str:
        """Returns the target name of a tensor of the language model."""
        return self.language + name.removeprefix("model.") if name.startswith("model.") else self.head

    def tower(self, name: str) -> str:
        """Returns the target name of a tensor of the encoder; CLIP's and SigLIP's have ``vision_model.`` in front."""
        return self.vision + name.removeprefix(self.without)


# Facts of 4.51, 4.52, 4.57 and 5.23, executed: 4.52 moved all parts under `model.` (transformers PR 37033), and 5.6
# took `vision_model.` out of CLIPVisionModel.
NAMES = {
    "legacy": LlavaNames(
        "language_model.model.",
        "language_model.lm_head.weight",
        "vision_tower.",
        "multi_modal_projector.",
        "image_newline",
    ),
    "4.52": LlavaNames(
        "model.language_model.",
        "lm_head.weight",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.image_newline",
    ),
    "5.6": LlavaNames(
        "model.language_model.",
        "lm_head.weight",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.image_newline",
        "vision_model.",
    ),
}
