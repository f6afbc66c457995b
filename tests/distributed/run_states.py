"""Runs with a state of its own on each rank, whole and resumed after two of four rollouts. Run as a script."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.types import PromptBatch
from tests.scripted import scripted_prompts, trainer, weights
from tests.training.test_one_step_off import Data
from tests.training.test_part_states import Saving, made


class Calls:
    """The same on every rank: how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completion_ids, **columns):
        self.calls += 1
        return [(sum(ids) % 5) / self.calls for ids in completion_ids]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Shares(Data):
    """Each rank's share of every rollout."""

    def batch_at(self, cursor):
        rows = scripted_prompts(seed=cursor)
        share = len(rows) // world_size()
        return PromptBatch(rows[rank() * share : (rank() + 1) * share], cursor + 1)


def main(model: str, folder: Path) -> None:
    warnings.filterwarnings("ignore")
    for strategy in ("ddp", "fsdp"):
        found = []
        for ckpt in (None, folder / f"{strategy}.ckpt"):
            module = made(model, rewards={"calls": Calls()})
            saving = [] if ckpt else [Saving(folder / f"{strategy}.ckpt")]
            runner = trainer(devices=2, strategy=FSDP2Strategy() if strategy == "fsdp" else "ddp", callbacks=saving)
            runner.fit(module, datamodule=Shares(), ckpt_path=ckpt, weights_only=True)
            assert module.rewards.functions["calls"].function.calls == module.rollouts_done == 4
            found.append((weights(module), module.advantages.total.item()))
        (whole, total), (resumed, total_resumed) = found
        assert torch.equal(whole, resumed) and total == total_resumed
        (folder / f"{strategy}-{rank()}.done").write_text(repr(total))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
