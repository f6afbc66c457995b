"""`python scripts/merge_adapter.py RUN/model OUT`: an exported adapter and its base as one ordinary model folder."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import transformers
import yaml
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home
from gspo_lightning.policy.adapter import KEEP_THE_BASE, REPEATABLE, adapter_config, fill
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.export import export_policy
from gspo_lightning.policy.load import Dtype, PolicyLoader
from gspo_lightning.policy.model import without_adapter
from gspo_lightning.policy.quantization import is_mxfp4
from gspo_lightning.policy.reading import load_config, reading
from gspo_lightning.report.model_card import whole_card


def merge_adapter(adapter: Path, target: Path, base: str | None = None, dtype: Dtype | None = None) -> str:
    """Writes the base with the adapter folded in to ``target``, as ``export.merge_lora=true`` would have.

    Args:
        adapter: folder with ``adapter_config.json``, such as ``model`` of a run's folder. If ``config.yaml`` of the
            run is next to it, the dtype and `PolicyLoader.overrides` are those of the run.
        target: is made; weights, config, tokenizer, processor, generation config and model card go there.
        base: folder, hub name or ``bundled:NAME``; None takes what the adapter names.
        dtype: in which weights are added and saved; None takes the run's, else float32.

    Returns:
        What was merged, in one line.

    Raises:
        UserError: there is no adapter, its base is not there or quantised, they do not fit, or ``target`` exists.
    """
    adapter, target = from_home(adapter), from_home(target)
    stored, run = adapter_config(adapter), _settings_of_run(adapter)
    _refuse_unmergeable(adapter, stored)
    if target.exists():
        raise UserError(f"{target} is there already; name a folder that is not")
    loader = PolicyLoader(
        _base(adapter, stored, base), dtype=dtype or _dtype(run), overrides=run["model"].get("overrides") or {}
    )
    _refuse_quantised(loader.path)
    if bits := run["model"].get("quantization"):
        warnings.warn(
            f"the adapter was trained on its base in {bits}, and is merged into weights that were not quantised: the "
            "model is near the trained one, not equal to it",
            stacklevel=2,
        )
    model = _merged(loader, adapter)
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a merge that was killed
    try:
        policy = loader.as_policy(model, _tokenizer(adapter, loader))
        export_policy(policy, temporary, merge_lora=False)
        _write_card(adapter, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target}: cannot write there ({error.strerror}); choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"merged {adapter} into {loader.path} in {loader.dtype}: {target}"


def _settings_of_run(adapter: Path) -> dict[str, Any]:
    """``config.yaml`` of the run that exported the adapter; empty sections if it is not there."""
    file = adapter.resolve().parent / "config.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = " ".join(str(error).split())
        raise UserError(f"{file} of the adapter's run cannot be read ({cause}); restore it, or move it away") from error
    content = content if isinstance(content, dict) else {}
    sections = {key: content.get(key) or {} for key in ("model", "trainer")}
    return {key: section if isinstance(section, dict) else {} for key, section in sections.items()}


def _dtype(run: dict[str, Any]) -> Dtype:
    """The dtype that the run's weights had when it exported them."""
    if run["trainer"].get("precision") == "bf16-true":
        return "bfloat16"
    dtype: Dtype = run["model"].get("dtype", "float32")
    if dtype not in get_args(Dtype):
        raise UserError(f"config.yaml of the adapter's run has model.dtype={dtype}, which is none; give --dtype")
    return dtype


def _base(adapter: Path, stored: dict[str, Any], base: str | None) -> str:
    named = base or stored.get("base_model_name_or_path")
    if not named:
        raise UserError(f"{adapter} does not say which model it is for; name it with --base")
    try:
        resolve_model(named)
        load_config(named)
    except UserError as error:
        line = str(error).removeprefix(f"model.path={named}: ")
        raise UserError(f"the base of {adapter}, {named}, cannot be used: {line}; --base names another") from error
    return str(named)


def _refuse_quantised(base: str) -> None:
    config = load_config(base)
    if getattr(config, "quantization_config", None) and not is_mxfp4(config):
        raise UserError(
            f"{base} holds quantised weights, in which the adapter would be rounded away; name the unquantised model "
            "with --base, or keep the adapter"
        )


def _refuse_unmergeable(adapter: Path, stored: dict[str, Any]) -> None:
    """Refuses an adapter that is no change of its base's weights, or began at a base that cannot be made again."""
    for name in ("alora_invocation_tokens", "layer_replication", "arrow_config"):
        if stored.get(name):
            raise UserError(f"{adapter}: an adapter with {name}={stored[name]} cannot be merged; keep the adapter")
    first = stored.get("init_lora_weights", True)
    if first not in (*KEEP_THE_BASE, *REPEATABLE):
        raise UserError(
            f"{adapter} began with init_lora_weights={first}, which changed the base in a way that cannot be repeated; "
            "merge it where it was trained"
        )


def _refuse_tied(wrapped: nn.Module, adapter: Path) -> None:
    """Refuses an adapter on embeddings that are one matrix, to which peft would add what belongs to one of them."""
    model: Any = without_adapter(wrapped)
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    matrices = {id(getattr(end, "base_layer", end).weight) for end in ends}
    if len(matrices) < len(ends) and any(hasattr(end, "base_layer") for end in ends):
        raise UserError(
            f"{adapter} has an adapter on an embedding of {model.name_or_path}, whose two embeddings are one matrix "
            "(tied), so that it cannot be merged; keep the adapter"
        )


def _merged(loader: PolicyLoader, adapter: Path) -> nn.Module:
    """The base in memory with the adapter added to its weights: there is no other use for it here."""
    from peft import PeftConfig, get_peft_model

    model = loader.load_model()
    try:
        wrapped: Any = get_peft_model(model, PeftConfig.from_pretrained(str(adapter)))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        cause = " ".join(str(error).split())[:160]
        raise UserError(f"adapter {adapter} does not fit {loader.path} ({cause}); --base names another") from error
    _refuse_tied(wrapped, adapter)
    fill(wrapped, adapter, "name the model that it was trained on with --base")
    merged: nn.Module = wrapped.merge_and_unload()
    return merged


def _tokenizer(adapter: Path, loader: PolicyLoader) -> PreTrainedTokenizerBase:
    """The tokenizer next to the adapter, which has the template it was trained with; else that of the base."""
    if (adapter / "tokenizer_config.json").is_file():
        try:
            with reading(str(adapter), "the tokenizer next to the adapter", "restore it, or move it away"):
                return AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False)
        except UserError as error:
            raise UserError(str(error).removeprefix("model.path=")) from error
    return loader.load_tokenizer()


def _write_card(adapter: Path, target: Path) -> None:
    card = adapter / "README.md"
    text = whole_card(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if text is not None:
        (target / "README.md").write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Merges and prints what was merged; returns the exit code (2 for a user's mistake)."""
    parser = argparse.ArgumentParser(prog="merge_adapter.py", description=merge_adapter.__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("adapter", type=Path, help="folder of the adapter, such as outputs/<day>/<time>/model")
    parser.add_argument("target", type=Path, help="folder to write; must not exist")
    parser.add_argument("--base", help="folder, hub name or bundled:NAME (default: what the adapter names)")
    parser.add_argument("--dtype", choices=get_args(Dtype), help="of the weights (default: the run's, else float32)")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft")  # about names that a pattern leaves out, in any case
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        print(merge_adapter(options.adapter, options.target, options.base, options.dtype))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
