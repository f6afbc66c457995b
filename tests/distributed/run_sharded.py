"""Runs of four rollouts with sampling and AdamW under FSDP2, or the first or last two of them. Run as a script."""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import sys
import warnings
from pathlib import Path

import lightning as L
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.distributed.ranks import rank, whole, world_size
from gspo_lightning.distributed.sharding import FSDP2Strategy, whole_policy
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.program.resume import find_checkpoint
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.types import PromptBatch
from tests.scripted import Settings, build_module, scripted_prompts, trainer, weights

ROLLOUTS = 4


class Stop(L.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop |= pl_module.rollouts_done >= self.after


class Prompts(torch.utils.data.IterableDataset):
    def __init__(self, module) -> None:
        self.module = module

    def __iter__(self):
        rows = scripted_prompts(count=4)
        share = len(rows) // world_size()
        while True:
            yield PromptBatch(rows[rank() * share : (rank() + 1) * share], cursor=0)


def main() -> None:
    # One of these processes once ended by SIGABRT: should it come again, it says where.
    faulthandler.enable()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, help="what a run leaves goes by its name there")
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--runs", type=json.loads, required=True, help="more arguments for each of several, by name")
    parser.add_argument("--stop-after", type=int, default=ROLLOUTS)
    parser.add_argument("--resume", help="the name of a run with a checkpoint")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--gather", choices=["yes", "no"], default="yes")
    warnings.filterwarnings("ignore")
    for name, more in parser.parse_args().runs.items():
        train(parser.parse_args([*sys.argv[1:], *more]), name)


def train(a: argparse.Namespace, name: str) -> None:
    settings = Settings(
        # A reference that follows the policy is part of a checkpoint too.
        objective={"beta": 0.04},
        update={"max_tokens_per_microbatch": 40, "num_minibatches": 2}
        | ({} if a.lora else {"ref_sync_every_n_rollouts": 2}),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
        lora=LoraSettings(r=2) if a.lora else None,
        rollouts=ROLLOUTS,
    )
    torch.manual_seed(0)
    module = build_module(a.model, settings)
    module.engine = TransformersEngine(max_concurrent=4)
    strategy = FSDP2Strategy(gather_for_rollouts=a.gather == "yes")
    saving = RolloutCheckpoint(a.folder / name, every_n_rollouts=1)
    runner = trainer(devices=a.devices, strategy=strategy, callbacks=[saving, Stop(a.stop_after)])
    ckpt = find_checkpoint(str(a.folder / a.resume / "last.ckpt"), a.folder, sharded=True) if a.resume else None
    runner.fit(module, torch.utils.data.DataLoader(Prompts(module), batch_size=None), ckpt_path=ckpt, weights_only=True)
    (optimizer,) = runner.optimizers
    moments = {
        name: {k: whole(v).clone() for k, v in optimizer.state[p].items()}
        for name, p in module.policy.named_parameters()
        if p.requires_grad
    }
    final, policy = weights(module), whole_policy(module.policy, module.policy_loader)
    if runner.is_global_zero:
        exported = torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])
        assert torch.equal(exported, final)
        found = {"weights": final, "moments": moments, "rollouts": module.rollouts_done}
        torch.save(found, a.folder / f"{name}.pt")


if __name__ == "__main__":
    main()
