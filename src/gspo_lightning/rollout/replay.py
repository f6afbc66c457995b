"""Completions of an earlier run instead of sampling: for studying an update repeatedly.

With the settings of that run the weights are bit-identical to it. With other settings (a rate, a loss) the policy moves
away from the sampler: `sampler_mismatch/abs_mean` says how far, and a ``mismatch`` correction weighs it.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import torch
import yaml

from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout.seeds import rollout_of_seed
from gspo_lightning.rollout.text import answer_and_thinking
from gspo_lightning.rollout.transformers_engine import TransformersEngine
from gspo_lightning.types import Completion, Prompt, Rollout, SamplingParams

Record = dict[str, Any]

_DISTRIBUTION = ("temperature", "top_p", "top_k", "min_p")


class ReplayEngine:
    """Gives each prompt the completions it had in the same rollout of another run.

    Held-out prompts are sampled by the policy itself: they are not recorded.

    Args:
        run: folder of a run that was made with ``record_tokens=true``.
    """

    def __init__(self, run: str) -> None:
        self.run = from_home(run)
        if not (self.run / "completions.jsonl").is_file():
            raise UserError(f"rollout.engine.run={run}: there is no completions.jsonl; give the folder of a run")

    def generate(self, policy: Policy, prompts: list[Prompt], sampling: SamplingParams, seed: int) -> Rollout:
        """See `RolloutEngine.generate`."""
        if all(":validation:" in prompt.uid for prompt in prompts):
            return TransformersEngine().generate(policy, prompts, sampling, seed)
        self._check_run(sampling)
        step = rollout_of_seed(seed) + 1
        return Rollout(prompts, [self._completions(policy, step, prompt, sampling) for prompt in prompts])

    def _completions(self, policy: Policy, step: int, prompt: Prompt, sampling: SamplingParams) -> list[Completion]:
        records = self._records.get((step, prompt.uid), [])
        if not records:
            raise UserError(
                f"rollout=replay: row {prompt.uid} is not in rollout {step} of {self.run}; replay with the data, seed "
                "and data.prompts_per_rollout of that run, without dynamic sampling, and no more rollouts than it has"
            )
        if len(records) != sampling.num_generations:
            raise UserError(
                f"rollout=replay: {self.run} has {len(records)} completions of a prompt; set "
                f"rollout.num_generations={len(records)}"
            )
        return [
            Completion(
                torch.tensor(record["token_ids"]),
                record["completion"],
                torch.tensor(record["sampler_logprobs"], dtype=torch.float32),
                record["finish_reason"],
                thinking=answer_and_thinking(policy.tokenizer, record["token_ids"])[1],
            )
            for record in records
        ]

    @cached_property
    def _records(self) -> dict[tuple[int, str], list[Record]]:
        found: dict[tuple[int, str], list[Record]] = {}
        with (self.run / "completions.jsonl").open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                if "token_ids" not in record:
                    raise UserError(
                        f"rollout.engine.run={self.run}: that run did not record tokens; record_tokens=true does"
                    )
                if "messages" in record:
                    raise UserError(
                        f"rollout.engine.run={self.run}: its completions are dialogues, whose records do not say which "
                        "tokens are the policy's; they cannot be replayed"
                    )
                found.setdefault((record["step"], record["uid"]), []).append(record)
        return found

    @cached_property
    def _config(self) -> dict[str, Any]:
        """Config of that run; empty if there is none."""
        file = self.run / "config.yaml"
        found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def _check_run(self, sampling: SamplingParams) -> None:
        """Refuses a run that sampled from another distribution or was not recorded completely."""
        for key, then in self._config.get("rollout", {}).items():
            if key in _DISTRIBUTION and then != getattr(sampling, key):
                raise UserError(
                    f"rollout.{key}={getattr(sampling, key)}: {self.run} was sampled at {then}; set it to that"
                )
        if self._config.get("dynamic_sampling", {}).get("max_draws"):
            raise UserError(
                f"rollout.engine.run={self.run}: it replaced prompts (dynamic_sampling.max_draws), and the replaced "
                "ones are not recorded; it cannot be replayed"
            )
