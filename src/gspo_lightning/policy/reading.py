"""Reads a model's files, with library errors about broken ones in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model


@contextmanager
def reading(path: str, what: str, fix: str) -> Iterator[None]:
    """For calls of transformers, peft and safetensors: turns what they raise into one line.

    Args:
        path: the model, as the user named it.
        what: what is being read, such as ``the weights``.
        fix: what to do about it.

    Raises:
        UserError: names model, ``what`` and the cause.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is wrong is raised; its tables of weights say it in many lines
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:  # of a GPU
        raise UserError(
            f"model.path={path}: out of memory while loading {what} onto the GPU; take less of it (an adapter, "
            "lora=language, on model.dtype=bfloat16 or model.quantization=nf4), or split it over GPUs (trainer=fsdp)"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        refuse_own_code(path, what, error)
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"model.path={path}: {what} cannot be used ({type(error).__name__}: {cause}); {fix}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def refuse_own_code(path: str, what: str, error: Exception) -> None:
    """Replaces transformers' message about a model that cannot be read without its own code.

    Unless told not to, transformers would ask at the terminal whether to run that code.

    Raises:
        UserError: if that is what ``error`` is about.
    """
    if "trust_remote_code" in str(error):
        raise UserError(
            f"model.path={path}: {what} needs code from the model's repository, which is never run; choose a model "
            "that transformers supports itself"
        ) from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none that can be read.
    """
    with reading(path, "the tokenizer", "copy tokenizer.json and tokenizer_config.json into the model's folder"):
        return AutoTokenizer.from_pretrained(resolve_model(path), trust_remote_code=False)


def load_config(path: str) -> Any:
    """The config of a model folder or of a model on the hub.

    Raises:
        UserError: it is not cached and cannot be downloaded, or cannot be read.
    """
    folder = resolve_model(path)
    with reading(path, "config.json", "check the folder, or the version of transformers"):
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except OSError as error:
            if Path(folder).is_dir():
                raise
            raise UserError(
                f"model.path={path}: not in the cache and the hub cannot be reached; give model.path=/my/folder with "
                "the weights. Offline examples: experiment=gspo_qwen_vl_tiny, model=smollm2_135m"
            ) from error
