"""Runs a scenario the plain way, as the guard's yardstick: ``generate``, padded forwards, torch's optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.scenarios import Scenario, reward, template
from benchmarks.worker import Clock, job, report


def rollout(model: Any, scenario: Scenario, prompts: list[list[int]], pad: int) -> Tensor:
    """Token ids ``(B * G, P + C)``; the prompts are of one length."""
    ids = torch.tensor(prompts).repeat_interleave(scenario.generations, dim=0)
    return model.generate(  # type: ignore[no-any-return]
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.9, top_k=0, pad_token_id=pad,
        max_new_tokens=scenario.completion_tokens, min_new_tokens=scenario.completion_tokens,
    )  # fmt: skip


def update(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, prompt_tokens: int, advantages: Tensor) -> None:
    """One policy-gradient step over all sequences at once."""
    logits = model(ids).logits[:, prompt_tokens - 1 : -1] / 0.9
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[:, prompt_tokens:, None]).squeeze(2)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -(ratio * advantages[:, None]).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    scenario, folder, steps = job()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    rows, clock, size = scenario.rows(tokenizer, steps), Clock(), scenario.prompts
    for step in range(steps):
        prompts = [template(tokenizer, row["prompt"][0]["content"]) for row in rows[step * size : (step + 1) * size]]
        length = min(map(len, prompts))
        with torch.autocast("cpu", torch.bfloat16, enabled=scenario.precision == "bf16"):
            with clock("rollout"):
                ids = rollout(model, scenario, [ids[-length:] for ids in prompts], tokenizer.eos_token_id)
            rewards = torch.tensor(reward(ids[:, length:].tolist(), [False] * len(ids))).view(size, -1)
            advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
            with clock("update"):
                update(model, optimizer, ids, length, advantages.flatten())
        clock.end_step(completion_tokens=ids[:, length:].numel(), processed_tokens=ids.numel())
    report(clock)


if __name__ == "__main__":
    main()
