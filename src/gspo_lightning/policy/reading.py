"""Reading a model's files, with what libraries say about broken ones in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from gspo_lightning.errors import UserError
from gspo_lightning.policy.bundled import resolve_model


@contextmanager
def reading(path: str, what: str, fix: str) -> Iterator[None]:
    """Around calls of transformers, peft and safetensors: what they raise becomes one line.

    Args:
        path: the model, as the user named it.
        what: what is being read, such as ``the weights``.
        fix: what to do about it.

    Raises:
        UserError: names both, and the cause.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is wrong is raised; its tables of weights say it in many lines
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"model.path={path}: {what} cannot be used ({type(error).__name__}: {cause}); {fix}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: there is none that can be read.
    """
    with reading(path, "the tokenizer", "copy tokenizer.json and tokenizer_config.json into the model's folder"):
        return AutoTokenizer.from_pretrained(resolve_model(path))
