"""A reward model: a sequence classifier of transformers with one output."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from gspo_lightning.data.templating import with_joined_text
from gspo_lightning.errors import UserError


@dataclass
class RewardModel:
    """The classifier's one logit for prompt and completion, as `transformers` loads it, frozen.

    Conversations go through the chat template of the model's own tokenizer, plain text is joined. The model is loaded
    at the first call, which may take long: allow for it in ``timeout_s``. Its weights are safetensors, and no code in
    its folder is run.

    Args:
        path: folder or hub name of the model and its tokenizer.
        batch_size: sequences per forward.
        max_length: longest sequence in tokens; a longer one is refused, because a cut text has another reward.
        device: where it runs: ``cpu``, ``cuda:1``, or ``cuda`` for the GPU of its rank.
        dtype: of its weights.
    """

    path: str
    batch_size: int = 8
    max_length: int = 4096
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"RewardModel.{name}={getattr(self, name)} must be at least 1")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"RewardModel.dtype={self.dtype!r} must be float32, bfloat16 or float16")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise UserError(f"RewardModel.device={self.device!r} is not a device; use cpu or cuda:0") from error
        self._model: Any = None
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: getattr(self, name) for name in ("path", "batch_size", "max_length", "device", "dtype")}
        if self.device == "cuda" and torch.cuda.is_initialized():  # the current GPU of another process is the first one
            state["device"] = f"cuda:{torch.cuda.current_device()}"
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """One logit per completion."""
        with self._lock:
            if self._model is None:
                self._load()
        ids = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        # Sequences of similar length share a batch, so that there is little padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        rewards = [0.0] * len(ids)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            for row, reward in zip(rows, self._forward([ids[i] for i in rows]), strict=True):
                rewards[row] = reward
        return rewards

    def _load(self) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            folder = os.path.expanduser(self.path)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise UserError(
                f"RewardModel.path={self.path} cannot be used ({cause}); give a folder or hub name of a sequence "
                "classifier of transformers, its weights in safetensors, with its tokenizer"
            ) from error
        if info["missing_keys"]:
            raise UserError(
                f"RewardModel.path={self.path} is not a trained classifier: it lacks {info['missing_keys']}"
            )
        if model.config.num_labels != 1:
            raise UserError(f"RewardModel.path={self.path} has {model.config.num_labels} outputs; a reward model has 1")
        self._pad = model.config.get_text_config().pad_token_id
        self._tokenizer, self._model = tokenizer, model.to(self.device).eval().requires_grad_(False)

    def _encode(self, prompt: Any, completion: Any) -> list[int]:
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt + completion)["input_ids"]
        else:
            talk = with_joined_text([*prompt, *completion], self._tokenizer)
            text = self._tokenizer.apply_chat_template(talk, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not 0 < len(ids) <= self.max_length:
            raise UserError(f"RewardModel: a sequence has {len(ids)} tokens; max_length is {self.max_length}")
        return list(ids)

    @torch.no_grad()
    def _forward(self, ids: list[list[int]]) -> list[float]:
        longest, config = max(map(len, ids)), self._model.config.get_text_config()
        pad = self._pad if self._pad is not None else _unused(ids)
        # The classifier reads the last token that is not this one.
        config.pad_token_id = self._model.config.pad_token_id = pad
        tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self.device)
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        mask = (torch.arange(longest, device=self.device) < lengths[:, None]).long()
        logits = self._model(input_ids=tokens, attention_mask=mask).logits
        return [float(x) for x in logits[:, 0].float().cpu()]


def _unused(ids: list[list[int]]) -> int:
    """A token id that no sequence holds, as padding for a model without a padding token."""
    present = set().union(*ids)
    return next(i for i in range(len(present) + 1) if i not in present)
