"""A whole run written out: advantages, passes, minibatches, losses, steps and metrics, one unpadded sequence at a time.

It shares nothing with the package but the types of its inputs (`Prompt`, `Completion`). No packing, no shared prompts,
no micro-batches, nothing left out to save time: what the package leaves out must then have changed nothing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from fractions import Fraction
from os.path import commonprefix

import torch
from torch import Tensor

from gspo_lightning.types import Completion, Prompt
from tests.whole_update import reference_advantages as advantages
from tests.whole_update import reference_losses as losses
from tests.whole_update.case import Case
from tests.whole_update.reference_advantages import Numbers
from tests.whole_update.reference_losses import Terms
from tests.whole_update.reference_metrics import (
    Means,
    add_loss_metrics,
    add_rollout_metrics,
    add_sampler_metrics,
    quantile,
)
from tests.whole_update.reference_model import Network, Optimizer, Trained, Weights, clipped, learning_rate

Member = tuple[int, int]
"""(prompt of the rollout, completion of the prompt)."""


@dataclass
class Rollout:
    """One rollout and what stays fixed while it is trained on."""

    prompts: list[Prompt]
    groups: list[list[Completion]]
    beta: float
    temperature: float
    longest: int
    """Limit of its completions."""
    behaviour: Weights
    """The weights that sampled."""
    stale: bool
    """Whether these are not the weights it is first trained with."""
    advantages: dict[Member, Tensor] = field(default_factory=dict)
    """Of every trained token."""
    old: dict[Member, Tensor] = field(default_factory=dict)
    entropy: dict[Member, Tensor] = field(default_factory=dict)
    """Both under the weights that sampled."""
    entropy_before: dict[Member, Tensor] = field(default_factory=dict)
    """Under the weights before the first step."""
    reference: dict[Member, Tensor] = field(default_factory=dict)
    means: Means = field(default_factory=Means)
    ratios: list[float] = field(default_factory=list)


class Run:
    """Trains like docs/design.md, docs/objectives and docs/metrics.md say; see `rollout`."""

    def __init__(self, case: Case, network: Network, trained: Trained, stream: list[Prompt]) -> None:
        self.case, self.network, self.trained = case, network, trained
        self.stream = iter(stream)
        # The reference is the model as it was loaded, with LoRA without its adapter.
        self.reference: Weights = dict(network.start)
        self.optimizer = Optimizer(case, trained.tensors)
        self.before = self._weights()
        """The weights before the first step on the rollout before."""
        self.rollouts_done = 0
        self.steps_seen = 0
        self.seed, self.iteration = 0, 0
        """Of the rollout, and the pass over it: what draws are made from."""
        self.bonus, self.last_entropy = case.entropy_coef, math.inf
        """Weight of the entropy bonus, where it follows the entropy of the last step."""
        names = ("optimizer_steps", "skipped_steps", "nonfinite_steps", "rollout_tokens", "train_tokens")
        self.counts = dict.fromkeys(names, 0)

    def rollout(self, seed: int) -> dict[str, float]:
        """Trains on the next rollout; returns its metrics. ``seed`` decides which prompts make a minibatch."""
        rollout = self._sampled()
        self._compare(rollout)
        minibatches = minibatch_members(len(rollout.prompts), self.case.minibatches, seed)
        self._fix(rollout, minibatches)
        self.seed = seed
        for iteration in range(self.case.iterations):
            self.iteration = iteration
            for number, of_minibatch in enumerate(minibatches):
                first = iteration == 0 and number == 0 and not rollout.stale
                self._step(rollout, of_minibatch, first)
        self._move_reference()
        self.rollouts_done += 1
        return self._metrics(rollout)

    def _sampled(self) -> Rollout:
        """The next rollout, as it was sampled: by which weights, and with which settings."""
        case, now = self.case, self._weights()
        stale = case.stale and self.rollouts_done > 0
        # What is set after a rollout finds the next one sampled, if that happens ahead.
        settings = case.later if case.later and self.rollouts_done > int(case.stale) else None
        temperature, longest = settings or (case.temperature, case.max_length)
        prompts = [next(self.stream) for _ in range(case.prompts)]
        weights = self.before if stale else now
        self.before = now
        return Rollout(prompts, completions_of(prompts), self.beta(), temperature, longest, weights, stale)

    def _weights(self) -> Weights:
        """A copy of the network's weights as they are now."""
        return {name: value.detach().clone() for name, value in self.trained.weights().items()}

    def beta(self) -> float:
        """Linear over the rollouts from ``beta`` to ``beta_end``."""
        case = self.case
        if case.beta_end is None:
            return case.beta
        return case.beta + self.rollouts_done / max(1, case.rollouts - 1) * (case.beta_end - case.beta)

    def _compare(self, rollout: Rollout) -> None:
        """Gives every trained token its advantage."""
        case = self.case
        by_function = [self._rewards(prompt) for prompt in rollout.prompts]
        self._count_sampled(rollout.groups)
        if case.max_draws:
            self._draw_anew(rollout, by_function)
        rewards = [advantages.combined(own, case.weights, case.combine) for own in by_function]
        of_turns = advantages.rollout_advantages(rollout.groups, rewards, case)
        for b, group in enumerate(rollout.groups):
            for g, completion in enumerate(group):
                own = advantages.token_advantages(completion, of_turns[b][g])
                rollout.advantages[b, g] = torch.tensor(own, dtype=torch.float64)
        add_rollout_metrics(rollout.means, case, rollout.groups, by_function, rewards, of_turns)

    def _rewards(self, prompt: Prompt) -> list[Numbers]:
        """Of the completions of a prompt, by every function."""
        rows = zip(prompt.sample["completions"], prompt.sample["rewards"], strict=True)
        return [[*scripted, *advantages.length_reward(completion, self.case)] for completion, scripted in rows]

    def _draw_anew(self, rollout: Rollout, by_function: list[list[Numbers]]) -> None:
        """DAPO (arXiv 2503.14476), section 3.2: groups without signal give their place to the next prompts."""
        case, everything, draws, drawn = self.case, list(by_function), 0, 0
        while (silent := self._silent(rollout, by_function)) and draws < case.max_draws:
            for place in silent:
                rollout.prompts[place] = prompt = next(self.stream)
                rollout.groups[place] = prompt.sample["completions"]
                by_function[place] = self._rewards(prompt)
                everything.append(by_function[place])
                self._count_sampled([rollout.groups[place]])
            draws, drawn = draws + 1, drawn + len(silent)
        for own in everything:
            for reward in advantages.combined(own, case.weights, "weighted_sum"):
                rollout.means.add("dynamic_sampling/sampled_reward", reward, 1)
        rollout.means.add("dynamic_sampling/silent_frac", drawn + len(silent), len(everything))
        rollout.means.add("dynamic_sampling/draws", draws, 1)
        rollout.means.add("dynamic_sampling/extra_prompts", drawn, 1)
        rollout.means.add("dynamic_sampling/silent_left", len(silent), 1)

    def _silent(self, rollout: Rollout, by_function: list[list[Numbers]]) -> list[int]:
        """Places of the groups whose completions are worth the same."""
        rewards = [advantages.combined(own, self.case.weights, self.case.combine) for own in by_function]
        return [b for b, group in enumerate(rollout.groups) if advantages.is_silent(group, rewards[b], self.case)]

    def _count_sampled(self, groups: list[list[Completion]]) -> None:
        self.counts["rollout_tokens"] += sum(int(trained_mask(c).sum()) for group in groups for c in group)

    @torch.no_grad()
    def _fix(self, rollout: Rollout, minibatches: list[list[int]]) -> None:
        """Old and reference log-probabilities, and entropies, before the first step of the rollout."""
        weights = self._weights()
        members = [(b, g) for b, group in enumerate(rollout.groups) for g in range(len(group))]
        for member in members:
            rollout.old[member], rollout.entropy[member] = self._forward(rollout, member, rollout.behaviour)
            rollout.entropy_before[member] = self._forward(rollout, member, weights)[1]
            if rollout.beta:
                rollout.reference[member], _ = self._forward(rollout, member, self.reference)
        # Of one sampled ahead, all old log-probabilities are computed, or none; else those of the first minibatch are
        # measured.
        everything = range(len(rollout.groups)) if self.case.old == "policy" else ()
        compared = everything if rollout.stale else minibatches[0]
        for member in self._in_denominator(rollout, list(compared)):
            if self._is_measured(rollout, member) and self.case.full_support:
                add_sampler_metrics(rollout.means, rollout.old[member], sampler_logprobs(rollout, member))

    def _forward(self, rollout: Rollout, member: Member, weights: Weights) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the trained tokens and entropies of their distributions, at the training temperature."""
        b, g = member
        completion = rollout.groups[b][g]
        every = self.network.log_distributions(
            weights, rollout.prompts[b], completion.token_ids, rollout.temperature, self.case.padded
        )
        trained = trained_mask(completion)
        chosen = every.gather(1, completion.token_ids[:, None])[:, 0]
        return chosen[trained], -(every.exp() * every).sum(dim=1)[trained]

    def _in_denominator(self, rollout: Rollout, prompts: list[int]) -> list[Member]:
        """All completions of a minibatch but those masked as truncated."""
        members = [(b, g) for b in prompts for g in range(len(rollout.groups[b]))]
        if not self.case.mask_truncated:
            return members
        return [(b, g) for b, g in members if rollout.groups[b][g].finish_reason != "length"]

    def _step(self, rollout: Rollout, prompts: list[int], first: bool) -> None:
        """One optimizer step on the mean over a minibatch; none where nothing in it has a gradient."""
        case, members = self.case, self._in_denominator(rollout, prompts)
        selected = self._selected(rollout, members)
        chosen = self._chosen(rollout, members, selected, first)
        weights, total = self.trained.weights(), torch.zeros((), dtype=torch.float64)
        entropies: list[float] = []
        bonus = self._bonus()
        for member in members:
            total = total + self._loss(
                rollout, member, weights, selected[member], chosen[member], first, bonus, entropies
            )
        if case.entropy_target is not None and entropies:
            rollout.means.add("entropy_coef", bonus, 1)
            self._move_bonus(sum(entropies) / len(entropies))
        self._count_forwards(rollout, members)
        if any(self._has_gradient(rollout, m, bonus) for m in members) or case.auxiliary or case.balance:
            tokens = sum(len(rollout.advantages[m]) for m in members)
            # Of no completions at all the sum is 0, whatever it is divided by.
            loss = total / (
                losses.denominator(case, len(members), tokens, case.constant_length or rollout.longest) or 1
            )
            if case.auxiliary or case.balance:
                extra = self._auxiliary([rollout.prompts[b] for b in prompts], weights)
                rollout.means.add("loss/auxiliary", extra.item(), 1)
                loss = loss + extra
            # Without any image nothing is seen: the gradient of that half is 0.
            loss = loss + 0 * sum(tensor.sum() for tensor in self.trained.tensors.values())
            found = torch.autograd.grad(loss, list(self.trained.tensors.values()))
            gradients, norm = clipped(dict(zip(self.trained.tensors, found, strict=True)), case.max_grad_norm)
            rollout.means.add("grad_norm", norm, 1)
            self.optimizer.step(gradients, learning_rate(case, self.steps_seen))
            self.counts["optimizer_steps"] += 1
        else:
            self.counts["skipped_steps"] += 1
        self.steps_seen += 1

    def _bonus(self) -> float:
        """Weight of the entropy in a step; with a target, Skywork-OR1's (arXiv 2505.22312)."""
        target = self.case.entropy_target
        if target is None:
            return self.case.entropy_coef
        return 0.0 if self.last_entropy > target else self.bonus

    def _move_bonus(self, entropy: float) -> None:
        case = self.case
        assert case.entropy_target is not None
        moved = self.bonus + case.entropy_coef_delta * (-1 if entropy > case.entropy_target else 1)
        self.bonus = sorted((case.entropy_coef_min, moved, case.entropy_coef_max))[1]
        self.last_entropy = entropy

    def _auxiliary(self, prompts: list[Prompt], weights: Weights) -> Tensor:
        """What a subclass adds to the loss of a minibatch."""
        total = torch.zeros((), dtype=torch.float64)
        if self.case.auxiliary:
            total = total + self.case.auxiliary * sum((t * t).sum() for t in self.trained.tensors.values())
        return total + self.case.balance * self.network.balance(weights, prompts) if self.case.balance else total

    def _has_gradient(self, rollout: Rollout, member: Member, bonus: float) -> bool:
        """Whether the completion can move the weights: by an advantage, or by a term of every completion."""
        everyone = rollout.beta != 0 or bonus != 0 or not losses.is_free_of_zeros(self.case)
        return everyone or bool((rollout.advantages[member] != 0).any())

    def _is_measured(self, rollout: Rollout, member: Member) -> bool:
        """Whether metrics of the loss count the completion: docs/metrics.md leaves out those without a gradient."""
        case = self.case
        everyone = case.keep_zero_advantage or case.entropy_target is not None
        return everyone or self._has_gradient(rollout, member, case.entropy_coef)

    def _selected(self, rollout: Rollout, members: list[Member]) -> dict[Member, Tensor | None]:
        """The tokens of highest entropy (arXiv 2506.01939, section 5) among those of a minibatch with an advantage.

        ``ceil(quantile N)`` of N; entropies within a relative 1e-5 of the least of these are ties, and kept.
        """
        if self.case.top_entropy_quantile == 1:
            return dict.fromkeys(members)
        competing = sorted(
            entropy
            for m in members
            for entropy, advantage in zip(rollout.entropy[m].tolist(), rollout.advantages[m].tolist(), strict=True)
            if advantage != 0
        )
        count = max(1, math.ceil(Fraction(str(self.case.top_entropy_quantile)) * len(competing)))
        threshold = competing[-count] * (1 - 1e-5) if competing else math.inf
        return {m: rollout.entropy[m] >= threshold for m in members}

    @torch.no_grad()
    def _chosen(
        self, rollout: Rollout, members: list[Member], selected: dict[Member, Tensor | None], first: bool
    ) -> dict[Member, list[bool] | None]:
        """The tokens of high covariance (arXiv 2505.22617) among those of a minibatch with an advantage.

        ``(log pi - mean log pi) (A - mean A)``. KL-Cov: the ``floor(ratio N)`` highest, at least one, and their ties.
        Clip-Cov: as many, drawn among those between the bounds that the clip leaves.
        """
        case = self.case
        if case.loss not in ("clip_cov", "kl_cov"):
            return dict.fromkeys(members)
        now = {m: self._forward(rollout, m, self.trained.weights())[0].tolist() for m in members}
        advantages = {m: rollout.advantages[m].tolist() for m in members}
        tokens = [
            (m, t)
            for m in members
            for t, advantage in enumerate(advantages[m])
            if advantage != 0 and (selected[m] is None or selected[m][t])  # type: ignore[index]
        ]
        chosen: dict[Member, list[bool] | None] = {m: [False] * len(now[m]) for m in members}
        if not tokens:
            return chosen
        centre = sum(now[m][t] for m, t in tokens) / len(tokens)
        level = sum(advantages[m][t] for m, t in tokens) / len(tokens)
        covariance = {(m, t): (now[m][t] - centre) * (advantages[m][t] - level) for m, t in tokens}
        share = Fraction(str(case.kl_cov_ratio if case.loss == "kl_cov" else case.clip_cov_ratio))
        count = max(1, math.floor(share * len(tokens)))
        if case.loss == "kl_cov":
            least = sorted(covariance.values())[-count]
            picked = [token for token, c in covariance.items() if c >= least - 1e-5 * abs(least)]
        else:
            inside = [token for token, c in covariance.items() if case.clip_cov_lb < c < case.clip_cov_ub]
            free = [(m, t) for m, t in inside if not self._is_clipped(rollout, m, t, now[m], first)]
            picked = sorted(free, key=lambda token: self._uniforms(rollout, token[0])[token[1]])[:count]
        for m, t in picked:
            chosen[m][t] = True  # type: ignore[index]
        return chosen

    def _is_clipped(self, rollout: Rollout, member: Member, t: int, now: list[float], first: bool) -> bool:
        """Whether the clip of the ratio acts on a token, whose ratio is 1 under the weights that sampled."""
        sampler, old = sampler_logprobs(rollout, member)[t].item(), rollout.old[member][t].item()
        old = sampler if self.case.old == "sampler" else now[t] if first else old
        ratio, (low, high) = math.exp(now[t] - old), losses.clip_widths(self.case)
        return ratio > 1 + high if rollout.advantages[member][t] > 0 else ratio < 1 - low

    def _uniforms(self, rollout: Rollout, member: Member) -> list[float]:
        """One for each trained token, by seed, pass, prompt and completion."""
        name = f"{self.seed}|covariance|{self.iteration}|{rollout.prompts[member[0]].uid}|{member[1]}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        count = len(rollout.advantages[member])
        drawn: list[float] = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        return drawn

    def _loss(
        self, rollout: Rollout, member: Member, weights: Weights, selected: Tensor | None, chosen: list[bool] | None,
        first: bool, bonus: float, entropies: list[float],
    ) -> Tensor:  # fmt: skip
        """The summed loss of one completion: ``sum_t weight (policy_t + beta KL_t - bonus H_t)``; adds its ``H_t``."""
        case = self.case
        logprobs, entropy = self._forward(rollout, member, weights)
        sampler = sampler_logprobs(rollout, member)
        old = logprobs.detach() if first else rollout.old[member]  # the same numbers; exactly so for the ratio 1
        x = Terms(
            logprobs,
            sampler if case.old == "sampler" else old,
            rollout.advantages[member],
            sampler,
            rollout.reference.get(member),
            entropy,
            selected,
            chosen,
        )
        w = losses.ratios(case, x)
        policy = losses.policy_losses(case, x, w)
        if selected is not None:
            policy = policy * selected
        if case.off_policy_threshold is not None:
            policy = policy * ~torch.tensor(losses.off_policy(case, x))
        if case.mismatch is not None and case.loss != "vespo":  # whose own ratio takes them in
            policy = policy * torch.tensor(losses.mismatch_weights(case, x)[0], dtype=torch.float64)
        loss = policy
        if rollout.beta:
            loss = loss + rollout.beta * losses.kl_terms(case, x)
        loss = loss - bonus * entropy
        entropies += entropy.tolist()
        if self._is_measured(rollout, member):
            add_loss_metrics(rollout.means, case, x, w, policy)
            rollout.ratios += [value.item() for value in (w if case.level == "token" else w[:1])]
        elif case.log_entropy:  # of all in the denominator; these before the first step
            rollout.means.add("entropy", rollout.entropy_before[member].sum().item(), x.length)
        return losses.token_weight(case, x.length) * loss.sum()

    def _count_forwards(self, rollout: Rollout, members: list[Member]) -> None:
        """Tokens forwarded if no group is split: each prompt once, and of a completion those that predict another.

        What all prompts begin with is forwarded once, unless it is short, one of them has images, or rows are padded.
        """
        forwarded = [m for m in members if self._is_measured(rollout, m)]
        for b in {b for b, _ in forwarded}:
            own = [len(rollout.groups[b][g].token_ids) - 1 for prompt, g in forwarded if prompt == b]
            self.counts["train_tokens"] += len(rollout.prompts[b].input_ids) + sum(own)
        prompts = [rollout.prompts[b] for b in {b for b, _ in forwarded}]
        shares = not self.case.padded and not any(prompt.mm_inputs for prompt in prompts)
        if len(prompts) > 1 and shares:
            shared = len(commonprefix([prompt.input_ids.tolist()[:-1] for prompt in prompts]))
            self.counts["train_tokens"] -= shared * (len(prompts) - 1) if shared >= 16 else 0

    def _move_reference(self) -> None:
        """TR-DPO (arXiv 2404.09656): every so many rollouts ``alpha policy + (1 - alpha) reference``."""
        every, alpha = self.case.ref_sync_every, self.case.ref_mixup_alpha
        if every and (self.rollouts_done + 1) % every == 0:
            now = self._weights()
            self.reference = {name: alpha * now[name] + (1 - alpha) * old for name, old in self.reference.items()}

    def _metrics(self, rollout: Rollout) -> dict[str, float]:
        values = rollout.means.values()
        if "gspo/ratio_noise_var" in values:
            values["gspo/ratio_noise_floor"] = math.sqrt(values.pop("gspo/ratio_noise_var"))
        if rollout.ratios:
            values |= {f"ratio/p{100 * q:g}": quantile(rollout.ratios, q) for q in (0.01, 0.5, 0.99)}
        values |= {f"count/{name}": float(count) for name, count in self.counts.items()}
        return values | {"lr": learning_rate(self.case, self.steps_seen)}


def completions_of(prompts: list[Prompt]) -> list[list[Completion]]:
    return [prompt.sample["completions"] for prompt in prompts]


def sampler_logprobs(rollout: Rollout, member: Member) -> Tensor:
    """``(n,)`` of the trained tokens, as the sampler reported them."""
    completion = rollout.groups[member[0]][member[1]]
    return completion.sampler_logprobs[trained_mask(completion)].double()


def trained_mask(completion: Completion) -> Tensor:
    """``(C,)`` bool: the tokens that the policy sampled."""
    if completion.dialogue is not None:
        return completion.dialogue.trained
    return torch.ones(len(completion.token_ids), dtype=torch.bool)


def minibatch_members(prompts: int, minibatches: int, seed: int) -> list[list[int]]:
    """Of as many prompts in a row as there are minibatches, each goes to another one, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    members: list[list[int]] = [[] for _ in range(minibatches)]
    for start in range(0, prompts, minibatches):
        for number, offset in enumerate(torch.randperm(minibatches, generator=generator).tolist()):
            members[number].append(start + offset)
    return members
