"""A parameter of a subclass beside split weights: split by `fully_shard`, and whole. Run as a script."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from examples.auxiliary_loss import AnchoredModule
from gspo_lightning.distributed.ranks import rank, whole
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from tests.distributed.run_sharded import Prompts
from tests.scripted import Settings, build_module, trainer

START = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


class Headed(GSPOModule):
    split = True

    def configure_model(self) -> None:
        super().configure_model()
        if self.split:
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])

    def auxiliary_loss(self, minibatch):
        return self.head(torch.full((1, 4), 1.0 + rank(), dtype=torch.float64)).square().mean()


def train(model: str, split: bool) -> GSPOModule:
    module = build_module(model, Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.1)))
    module.__class__, module.split = Headed, split
    module.head = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
    module.head.weight.data.copy_(START)
    trainer(devices=2, strategy=FSDP2Strategy()).fit(
        module, torch.utils.data.DataLoader(Prompts(module), batch_size=None)
    )
    return module


def anchored(model: str, **changes) -> torch.Tensor:
    """The output embedding after two rollouts with the term of the example, which is 0 in the first."""
    module = build_module(model, Settings(optimizer=functools.partial(torch.optim.SGD, lr=0.1), rollouts=2))
    module.__class__, module.anchor_weight = AnchoredModule, 1000.0
    module.register_buffer("start", None, persistent=False)
    trainer(**changes).fit(module, torch.utils.data.DataLoader(Prompts(module), batch_size=None))
    return whole(module.policy.output_weight.detach())


def main() -> None:
    warnings.filterwarnings("ignore")
    model, file = sys.argv[1:]
    step = ((START - whole(train(model, split=True).head.weight.detach())) / 0.1).flatten().tolist()
    refusal = ""
    try:
        train(model, split=False)
    except UserError as error:
        refusal = str(error)
    held = anchored(model, devices=2, strategy=FSDP2Strategy())
    if rank() == 0:
        Path(file).write_text(json.dumps({"step": step, "refusal": refusal}))
        torch.save(held, Path(file).with_suffix(".pt"))


if __name__ == "__main__":
    main()
