"""Single updates on 1 or 2 ranks; writes weights, metrics and counters of each. Run as a script by test_ranks.py."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.module import GSPOModule
from gspo_lightning.objective.losses import LOSSES
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.types import PromptBatch
from tests.scripted import Before, Settings, build_module, scripted_prompts, trainer, weights
from tests.vision.models import image_prompt

ONE_RANK_SEES = "one rank without images"


def prompts(case: str):
    rows = scripted_prompts(count=4)
    if case == "one rank without signal":
        for row in rows[2:]:
            row.sample["scripted"] = [(number, 0.25) for number, _ in row.sample["scripted"]]
    if case == "no signal at all":
        for row in rows:
            row.sample["scripted"] = [(number, 0.25) for number, _ in row.sample["scripted"]]
    if case == "truncated":  # more of the second rank's than of the first one's
        for place, group in enumerate(rows):
            for number, completion in enumerate(group.sample["completions"]):
                reason = "length" if number < place - 1 else "stop"
                group.sample["completions"][number] = replace(completion, finish_reason=reason)
    if case == ONE_RANK_SEES:
        images = [image_prompt(row.uid, 3, (4, 2 + 2 * n), 2, seed=n) for n, row in enumerate(rows[:2])]
        seeing = [replace(p, sample=row.sample) for p, row in zip(images, rows, strict=False)]
        return [*seeing, *rows[2:]]
    return rows


class WithNorm(GSPOModule):
    """With a term that does not depend on the rollout: on every rank the same, so its mean over ranks is itself."""

    def auxiliary_loss(self, minibatch):
        return 1e-3 * sum(p.square().sum() for p in self.policy.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=json.loads, help="folders by name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--model", default="micro", help="its name")
    parser.add_argument("--case", default="plain")
    parser.add_argument("--runs", type=json.loads, default=[[]], help="more arguments for each of several updates")
    parser.add_argument("--loss", default="grpo")
    parser.add_argument("--dtype", default="float64")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--quantile", type=float, default=1.0, help="of the tokens of highest entropy")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--level", default="")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL to the weights before the update")
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--advantages", default="group", help="what their scale is measured on")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--keep", action="store_true", help="forward completions without an advantage too")
    parser.add_argument("--entropy", action="store_true", help="log it")
    parser.add_argument("--auxiliary", action="store_true", help="add the squared norm of the weights")
    warnings.filterwarnings("ignore")
    for number, more in enumerate(parser.parse_args().runs):
        update(parser.parse_args([*sys.argv[1:], *more]), number)


def update(a: argparse.Namespace, number: int) -> None:
    levels = LOSSES[a.loss].levels or ("sequence",)
    level = a.level or ("sequence" if "sequence" in levels else levels[0])
    settings = Settings(
        objective={
            "loss_type": a.loss,
            "importance_sampling_level": level,
            "top_entropy_quantile": a.quantile,
            "beta": a.beta,
            "mask_truncated_completions": a.case == "truncated",
        },  # fmt: skip
        update={
            "max_tokens_per_microbatch": a.budget,
            "num_minibatches": a.minibatches,
            "keep_zero_advantage": a.keep,
            "log_entropy": a.entropy,
        },
        advantages=a.advantages,
        dtype=a.dtype,
        lora=LoraSettings(r=2) if a.lora else None,
        train_vision=a.case == ONE_RANK_SEES,
        compile=a.compile,
        gradient_checkpointing=a.checkpointing,
    )
    torch.manual_seed(0)  # of the adapter
    module = build_module(a.models[a.model], settings)
    if a.auxiliary:
        module.__class__ = WithNorm

    class Loader:
        def __iter__(self):
            rows = prompts(a.case)
            share = len(rows) // world_size()
            yield PromptBatch(rows[rank() * share : (rank() + 1) * share], cursor=0)

    class Rows(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Loader())

    several = DDPStrategy(gradient_as_bucket_view=True) if a.devices > 1 else "auto"  # as in conf/trainer/ddp.yaml
    strategy = FSDP2Strategy() if a.strategy == "fsdp" else several
    before = Before()
    runner = trainer(devices=a.devices, strategy=strategy, max_epochs=1, precision=a.precision, callbacks=[before])
    runner.fit(module, DataLoader(Rows(), batch_size=None))
    after = weights(module)
    if runner.is_global_zero:
        out = a.out.with_name(f"{a.out.stem}-{number}.pt")
        torch.save({"before": before.weights, "after": after}, out)
        metrics = {k: v for k, v in module.last_metrics.items() if not k.startswith(("time/", "perf/", "count/"))}
        out.with_suffix(".json").write_text(json.dumps({"metrics": metrics, "counts": module.counts}))


if __name__ == "__main__":
    main()
