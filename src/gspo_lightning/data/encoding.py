"""What a model reads of a prompt: token ids, and the tensors of its images."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gspo_lightning.data.templating import encode_prompt
from gspo_lightning.data.vision import VisionSettings, encode_conversation, image_parts
from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.processor import load_processor
from gspo_lightning.policy.reading import load_config, load_tokenizer
from gspo_lightning.policy.vision import has_vision
from gspo_lightning.types import Messages


class Encoder:
    """The tokenizer and the image processor of a model, each loaded when it is first needed.

    Args:
        model_path: the model, as `gspo_lightning.policy.load.PolicyLoader` takes it.
    """

    def __init__(self, model_path: str) -> None:
        self.model_path = model_path

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        load_config(self.model_path)  # its error names in one line what is missing
        tokenizer = load_tokenizer(self.model_path)
        if not tokenizer.chat_template and self.processor is not None:  # LLaVA-NeXT: chat_template.json
            tokenizer.chat_template = self.processor.chat_template
        return tokenizer

    @cached_property
    def processor(self) -> Any:
        """The model's image processor; None for a model that reads text alone."""
        path = resolve_model(self.model_path)
        return load_processor(path) if has_vision(load_config(self.model_path)) else None

    def encode(
        self, prompt: str | Messages, template_kwargs: dict[str, Any], settings: VisionSettings, where: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Token ids ``(P,)`` of a prompt, and the tensors of its images by name.

        Raises:
            UserError: the chat template refuses the prompt, or the model takes no images; begins with ``where``.
        """
        if not image_parts(prompt):
            return encode_prompt(prompt, self.tokenizer, template_kwargs, where), {}
        if self.processor is None:
            raise UserError(
                f"{where}: the prompt has images, but {self.model_path} takes text only; use a vision-language model"
            )
        assert not isinstance(prompt, str)
        return encode_conversation(prompt, self.processor, settings, template_kwargs, where)
