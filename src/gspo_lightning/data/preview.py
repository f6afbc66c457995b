"""Shows the first prompts exactly as the model sees them: `python -m gspo_lightning.data.preview data=gsm8k`.

Takes the overrides of ``train.py``; needs the model's tokenizer but not its weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gspo_lightning.config.groups import check_overrides, check_own_files
from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.errors import UserError
from gspo_lightning.screen import counted, visible
from gspo_lightning.types import Prompt


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> None:
    """Prints prompts of the data config; ``arguments`` as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m gspo_lightning.data.preview",
        description="Shows the first prompts as the model sees them.",
    )
    parser.add_argument("--num", type=int, default=3, help="how many prompts (default: 3)")
    parser.add_argument("--validation", action="store_true", help="held-out prompts instead of training prompts")
    parser.add_argument("--config-dir", "-cd", help="a folder with your own configs, as for train.py")
    parser.add_argument("overrides", nargs="*", help="as for train.py, such as data=largest_of_four model=micro")
    options = parser.parse_intermixed_args(arguments)  # overrides may stand before and after a flag, as for train.py
    check_overrides(options.overrides)
    show(build_datamodule(options.overrides, options.config_dir), options.num, options.validation, console or Console())


def build_datamodule(overrides: Sequence[str], config_dir: str | None = None) -> PromptDataModule:
    """The data module of the training config under these overrides, with custom configs in ``config_dir``.

    Raises:
        UserError: what a run would refuse of its section ``data``, ``config_dir`` is no folder, or a chosen file in it
            has a name of ours.
    """
    from hydra import compose, initialize_config_module
    from hydra.core.hydra_config import HydraConfig

    from gspo_lightning.config.build import build
    from gspo_lightning.config.resolve import resolve_data

    own = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir={config_dir}: there is no such folder")
        own = [f"hydra.searchpath=['file://{Path(config_dir).absolute()}']"]
    with initialize_config_module("gspo_lightning.conf", version_base="1.3"):
        cfg = compose("train", overrides=[*own, *overrides], return_hydra_config=True)
    check_own_files(cfg.hydra.runtime.config_sources, cfg.hydra.runtime.choices, "train")
    of_hydra: Any = HydraConfig.instance()
    earlier = of_hydra.cfg
    try:
        of_hydra.cfg = cfg  # for settings such as ${hydra:runtime.cwd}/my.jsonl
        data = resolve_data(cfg)
    finally:
        of_hydra.cfg = earlier
    datamodule: PromptDataModule = build(data)
    return datamodule


def show(datamodule: PromptDataModule, num: int, validation: bool, console: Console) -> None:
    """Prints ``num`` prompts with uid, token count, text after the chat template, and the other columns.

    Raises:
        UserError: for whatever would stop a training run on this data, or if there is nothing to show.
    """
    if num < 1:
        raise UserError(f"--num={num} must be at least 1")
    datamodule.check()
    prompts = first_prompts(datamodule, num, validation)
    if not prompts:
        raise UserError("--validation: there are no held-out rows; raise data.task.num_validation")
    for prompt in prompts:
        console.print(_panel(prompt, datamodule.tokenizer))
    lengths = [len(prompt.input_ids) for prompt in prompts]
    rows, held_out = datamodule.task.num_train_rows, datamodule.num_held_out
    console.print(
        f"{counted(len(prompts), 'prompt')} of {min(lengths)} to {max(lengths)} tokens "
        f"(max_prompt_length {datamodule.max_prompt_length}); "
        f"training rows: {'endless' if rows is None else rows}; held-out rows: {held_out}",
        highlight=False,
    )


def first_prompts(datamodule: PromptDataModule, num: int, validation: bool) -> list[Prompt]:
    """Up to ``num`` prompts in the order in which a run sees them (training order, or the held-out set's)."""
    rows = datamodule.task.num_train_rows
    if rows is not None and not validation:
        num = min(num, rows // datamodule.prompts_per_rollout * datamodule.prompts_per_rollout)
    loader = datamodule.val_dataloader() if validation else datamodule.train_dataloader()
    prompts: list[Prompt] = []
    for batch in loader:
        prompts += batch.prompts
        if len(prompts) >= num:
            break
    return prompts[:num]


def _panel(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Panel:
    seen = Text(visible(str(tokenizer.decode(prompt.input_ids))))
    columns = {name: value for name, value in prompt.sample.items() if name != "prompt"}
    rest = Text(visible("\n".join(f"{name}: {_short(value)}" for name, value in columns.items())), style="dim")
    body: Any = Group(seen, Text(), rest) if columns else seen
    return Panel(
        body, title=Text(visible(prompt.uid)), subtitle=counted(len(prompt.input_ids), "token"), title_align="left"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"


if __name__ == "__main__":
    from gspo_lightning.program.ending import run

    run(main, of_hydra=False)
