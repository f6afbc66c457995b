"""`objective` and `packing` alone in a bare PyTorch loop, no Lightning: `python examples/bare_loop.py`.

Scores fixed completions of two prompts and takes four GSPO steps: every prompt is forwarded once, nothing is padded,
and the loss is normalised over both micro-batches together.
"""

import torch

from gspo_lightning.objective import Objective
from gspo_lightning.packing import pack, plan_micro_batches
from gspo_lightning.policy.load import PolicyLoader


def main(steps: int = 4, max_tokens: int = 24) -> list[float]:
    """The probability-weighted reward of the completions after each step."""
    torch.manual_seed(0)
    policy = PolicyLoader("bundled:micro").load()
    encode = policy.tokenizer
    prompts = ["2+3=", "10-4="]
    texts = [["5", "6", "55", "five"], ["6", "7", "14", "six"]]
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 0.5]])
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ids = [torch.tensor(encode(prompt)["input_ids"]) for prompt in prompts]
    completions = [[torch.tensor([*encode(text)["input_ids"], encode.eos_token_id]) for text in row] for row in texts]

    lengths = [[(number, len(completion) - 1) for number, completion in enumerate(row)] for row in completions]
    plan = plan_micro_batches([len(prompt) for prompt in ids], lengths, max_tokens)
    parts = [[(s.group, number) for s in micro for number in s.completions] for micro in plan]
    packed = [
        pack([(ids[s.group], [completions[s.group][n] for n in s.completions]) for s in m], policy.device) for m in plan
    ]

    objective = Objective(max_completion_length=8, epsilon=0.03, epsilon_high=0.04)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    with torch.no_grad():
        old = [policy(micro)[0] for micro in packed]
    denominator = objective.denominator(num_sequences=8, num_tokens=sum(len(micro.target_ids) for micro in packed))
    scores = []
    for _ in range(steps):
        optimizer.zero_grad()
        score = 0.0
        for micro, part, before in zip(packed, parts, old, strict=True):
            logprobs, _ = policy(micro)
            advantage = torch.stack([advantages[place] for place in part])[micro.sequence_index]
            loss = objective(logprobs, before, advantage, micro.sequence_index, micro.lengths).loss
            (loss / denominator).backward()
            total = torch.zeros(len(part)).index_add_(0, micro.sequence_index, logprobs.detach())
            score += sum(float(total[row].exp() * rewards[place]) for row, place in enumerate(part))
        optimizer.step()
        scores.append(score)
    return scores


if __name__ == "__main__":
    print("expected reward:", " ".join(f"{score:.6f}" for score in main()))
