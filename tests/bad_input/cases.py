"""The table of bad input. `docs/errors.md` shows it with the lines that were seen (scripts/errors_page.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One mistake: ``python train.py experiment=micro <overrides>`` must refuse it with a line that holds ``says``."""

    area: str
    what: str
    overrides: list[str]
    """``{tmp}`` is an empty folder, in which ``prepare`` may have written something."""
    says: str
    prepare: Callable[[Path], Any] | None = None

    @property
    def name(self) -> str:
        """For test ids."""
        return f"{self.area}: {self.what}"

    def arguments(self, tmp: Path) -> list[str]:
        """Prepares the folder; returns the overrides of a run that must be refused."""
        if self.prepare is not None:
            self.prepare(tmp)
        texts = [text.replace("{tmp}", str(tmp)).replace("{{", "{").replace("}}", "}") for text in self.overrides]
        return [*QUICK, f"hydra.run.dir={tmp}/run", *texts]


QUICK = ["experiment=micro", "max_rollouts=1", "print_config=false", "export.enabled=false"]


def good_rows(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"{number}a:", "letter": "a"} for number in range(count)]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def writes(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Writes one file."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda tmp: (tmp / name).write_bytes(data)


def rows_file(*more: dict[str, Any], count: int = 12) -> Callable[[Path], Any]:
    return writes("rows.jsonl", lines([*good_rows(count), *more]))


BEST = ["validation.every_n_rollouts=1"]
ROWS = ["data=rows", "data.task.num_validation=1", "data.task.conversational=false"]
JSONL = [*ROWS, "data.task.source={tmp}/rows.jsonl"]


def micro_model(tmp: Path) -> Path:
    from gspo_lightning.policy.micro import build_micro_model

    build_micro_model(tmp / "model")
    return tmp / "model"


def model_without(*names: str) -> Callable[[Path], Any]:
    def prepare(tmp: Path) -> None:
        folder = micro_model(tmp)
        for name in names:
            (folder / name).unlink()

    return prepare


def model_with(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda tmp: (micro_model(tmp) / name).write_bytes(content)


def model_in_pickle(tmp: Path) -> None:
    from safetensors.torch import load_file

    folder = micro_model(tmp)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_weights(tmp: Path) -> None:
    file = micro_model(tmp) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def model_with_dropout(tmp: Path) -> None:
    config = micro_model(tmp) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))


def model_of_unknown_type(tmp: Path) -> None:
    config = micro_model(tmp) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "lama"}))


MODEL = ["model.path={tmp}/model"]


def reward(code: str) -> Callable[[Path], Any]:
    return writes("my_rewards.py", code)


MINE = ["reward.functions.letter_share.function.path=my_rewards.f"]


def checkpoint(content: Any) -> Callable[[Path], Any]:
    return lambda tmp: torch.save(content, tmp / "some.ckpt")


class Payload:
    def __reduce__(self) -> Any:
        return print, ("the payload ran",)


CKPT = ["ckpt_path={tmp}/some.ckpt"]

CONFIG = [
    Case("config", "an unknown key", ["rollout.temprature=1"], "rollout.temprature"),
    Case("config", "an unknown key at the root", ["max_rollout=3"], "max_rollout"),
    Case(
        "config",
        "a key of other trainers, added with +",
        ["+max_steps=100"],
        "max_steps: there is no such setting, the nearest name is max_rollouts",
    ),
    Case("config", "a group's key at the root", ["+lora.r=3"], "the nearest name is model.lora"),
    Case(
        "config",
        "a key that checkpoint lacks",
        ["+checkpoint.save_total_limit=3"],
        "checkpoint.save_total_limit: there is no such setting; checkpoint has every_n_rollouts, keep_last, "
        "keep_best, grace_s",
    ),
    Case("config", "a key that export lacks", ["+export.enable=true"], "the nearest name is export.enabled"),
    Case(
        "config",
        "a key that dynamic_sampling lacks",
        ["+dynamic_sampling.draws=1"],
        "the nearest name is dynamic_sampling.max_draws",
    ),
    Case(
        "config",
        "a key that rollout lacks",
        ["+rollout.temprature=1"],
        "the nearest name is rollout.temperature; rollout",
    ),
    Case(
        "config",
        "a key that validation lacks",
        ["+validation.tresholds=1"],
        "the nearest name is validation.threshold; validation has num_generations, reward, threshold, num_samples, "
        "every_n_rollouts",
    ),
    Case("config", "no section at all", ["checkpoint=null"], "checkpoint=None must be a section with every_n_rollouts"),
    Case("config", "an unknown key, added with +", ["+data.max_prompt_len=3"], "data.max_prompt_len"),
    Case("config", "an unknown choice of a group", ["objective=gpso"], "objective/gpso"),
    Case("config", "an unknown group", ["objectives=gspo"], "objectives"),
    Case("config", "an unknown experiment", ["experiment=gspo_qwen"], "experiment/gspo_qwen"),
    Case("config", "an override without a value", ["seed"], "seed"),
    Case("config", "an override that does not parse", ["rollout.stop=[a"], "no viable alternative at input '[a'"),
    Case("config", "an interpolation to nowhere", ["max_rollouts=${nothing}"], "nothing"),
    Case("config", "a mandatory value that is missing", ["data=rows"], "data.task.source: is missing; give it a value"),
    Case("config", "a word for a number", ["update.num_minibatches=two"], "update.num_minibatches='two'"),
    Case(
        "config",
        "a fraction for a count",
        ["rollout.num_generations=2.5"],
        "rollout.num_generations=2.5 must be a whole number",
    ),
    Case(
        "config",
        "a number for a switch",
        ["model.gradient_checkpointing=7"],
        "model.gradient_checkpointing=7 has the wrong type",
    ),
    Case("config", "a word for a switch", ["dry_run=no"], "dry_run='no' has the wrong type; expected true or false"),
    Case(
        "config",
        "a word for a switch of a section",
        ["export.enabled=no"],
        "export.enabled='no' has the wrong type; expected true or false",
    ),
    Case(
        "config", "a word that would count as true", ["allow_no_effect=no"], "allow_no_effect='no' has the wrong type"
    ),
    Case("config", "another one", ["record_tokens=no"], "record_tokens='no' has the wrong type"),
    Case(
        "config",
        "a word for a length",
        ["data.max_prompt_length=long"],
        "data.max_prompt_length='long' must be a whole number",
    ),
    Case(
        "config",
        "a Trainer argument that is ours",
        ["+trainer.max_epochs=3"],
        "trainer.max_epochs is not a setting here: set max_rollouts or num_epochs",
    ),
    Case(
        "config",
        "an interval that is ours",
        ["+trainer.val_check_interval=50"],
        "trainer.val_check_interval is not a setting here: set validation.every_n_rollouts",
    ),
    Case(
        "config",
        "a bar that is ours",
        ["+trainer.enable_progress_bar=true"],
        "trainer.enable_progress_bar is not a setting here: the progress line is callbacks.progress",
    ),
    Case(
        "config",
        "a clip of the gradient by the Trainer",
        ["+trainer.gradient_clip_val=1.0"],
        "trainer.gradient_clip_val is not a setting here: set update.max_grad_norm",
    ),
    Case(
        "config",
        "batches that the Trainer shall add up",
        ["+trainer.accumulate_grad_batches=4"],
        "trainer.accumulate_grad_batches is not a setting here: set update.max_tokens_per_microbatch",
    ),
    Case("config", "a run without an end", ["max_rollouts=null"], "nothing ends the run; set one of them"),
    Case("config", "a seed that no generator takes", ["seed=99999999999999"], "seed=99999999999999 must be below 2^32"),
    Case("config", "a negative seed", ["seed=-1"], "seed=-1 must be at least 0"),
    Case("config", "no rollouts", ["max_rollouts=0"], "max_rollouts=0 must be at least 1"),
    Case("config", "epochs of a task that never ends", ["num_epochs=2"], "num_epochs=2"),
    Case("config", "a negative number of epochs", ["num_epochs=-1"], "num_epochs=-1"),
    Case(
        "config",
        "checkpoints every 0 rollouts",
        ["checkpoint.every_n_rollouts=0"],
        "checkpoint.every_n_rollouts=0 must be at least 1",
    ),
    Case("config", "a target that does not exist", ["optimizer._target_=torch.optim.AdamX"], "optimizer._target_"),
    Case("config", "a target that could do harm", ["optimizer._target_=os.system"], "GSPO_ALLOWED_TARGETS=os"),
    Case("config", "an argument the target lacks", ["+optimizer.momentum=0.9"], "optimizer.momentum"),
    Case(
        "config",
        "null for a choice of a group",
        ["logger=null"],
        "logger=null: not a choice of this group; leave it out, or choose one of csv, mlflow, none, tensorboard, wandb",
    ),
    Case(
        "config",
        "a number for a choice",
        ["validation=1"],
        "validation=1: not a choice of this group; leave it out, or choose one of default",
    ),
    Case(
        "config", "no choice at all", ["scheduler=[]"], "scheduler: is missing; choose one of constant, cosine, linear"
    ),
    Case("config", "a setting taken out", ["~trainer.devices"], "trainer.devices: is missing; give it a value"),
    Case("config", "a number for a path", ["ckpt_path=1"], "ckpt_path=1 has the wrong type; expected text or null"),
    Case(
        "config",
        "optimizer steps for the length of the run",
        ["+trainer.max_steps=0"],
        "trainer.max_steps is not a setting here: set max_rollouts or num_epochs",
    ),
    Case(
        "config",
        "a share of a stream",
        ["+trainer.limit_val_batches=0.5"],
        "trainer.limit_val_batches=0.5 is a fraction, but validation batches are a stream; give their count",
    ),
    Case(
        "config",
        "a switch for a profiler",
        ["+trainer.profiler=true"],
        "trainer.profiler=true has the wrong type; expected a section that builds a Profiler or text or null",
    ),
]

OPTIMIZER = [
    Case("optimizer", "a negative rate", ["optimizer.lr=-1"], "Invalid learning rate: -1"),
    Case("optimizer", "no rate at all", ["optimizer.lr=0"], "optimizer.lr=0 trains nothing: no weight changes"),
    Case("optimizer", "a word for a rate", ["optimizer.lr=abc"], "optimizer: torch.optim.AdamW rejects"),
    Case("optimizer", "no number for a rate", ["optimizer.lr=nan"], "Invalid learning rate: nan"),
    Case("optimizer", "pages without a GPU", ["optimizer=paged_adamw_8bit"], "use optimizer=adamw_8bit"),
    Case("optimizer", "betas above 1", ["optimizer.betas=[2,3]"], "Invalid beta parameter"),
    Case("optimizer", "a single beta", ["optimizer.betas=[0.9]"], "expected a list of 2 values"),
    Case("optimizer", "an infinite rate", ["optimizer.lr=inf"], "with these settings makes weights infinite"),
    Case(
        "optimizer",
        "a step that is differentiated",
        ["optimizer.fused=false", "+optimizer.differentiable=true"],
        "torch.optim.AdamW rejects its settings (a leaf Variable",
    ),
    Case(
        "optimizer",
        "an optimizer before there are parameters",
        ["optimizer._partial_=false"],
        "the parameters are given later: add optimizer._partial_=true",
    ),
]

OBJECTIVE = [
    Case(
        "objective",
        "a ratio level that does not exist",
        ["objective.importance_sampling_level=word"],
        "one of token, sequence, sequence_token",
    ),
    Case("objective", "a loss that does not exist", ["objective.loss_type=gppo"], "choose grpo"),
    Case(
        "objective",
        "a loss of one's own that is a mean over the tokens",
        [
            "objective.loss_type={{_target_: hydra.utils.get_method, path: tests.objective.test_own_losses.mean}}",
            "rollout.max_completion_length=1",
            "update.keep_zero_advantage=true",
        ],
        "objective.loss_type: mean returned shape () for tokens of shape",
    ),
    Case(
        "objective",
        "a loss of one's own without a gradient",
        ["objective.loss_type={{_target_: hydra.utils.get_method, path: tests.objective.test_own_losses.detached}}"],
        "objective.loss_type: detached returned losses without a gradient",
    ),
    Case(
        "objective",
        "a loss that is no function",
        ["objective.loss_type={{function: my_losses.mine}}"],
        "objective.loss_type is of type dict",
    ),
    Case(
        "objective",
        "an average over tokens that does not exist",
        [
            "objective.loss_type={{_target_: gspo_lightning.objective.LossSpec, aggregation: mean, clip: null, function: "
            "{{_target_: hydra.utils.get_method, path: tests.objective.test_own_losses.plain}}}}"
        ],
        "LossSpec.aggregation: there is no 'mean'",
    ),
    Case(
        "objective",
        "a bound of a constant entropy bonus",
        ["objective.entropy_coef=0.1", "objective.entropy_coef_max=0.5"],
        "objective.entropy_coef_max has no effect with objective.entropy_target=null",
    ),
    Case(
        "objective",
        "an entropy bonus that begins out of its bounds",
        ["objective.entropy_target=1", "objective.entropy_coef=2"],
        "objective.entropy_coef=2 must lie between",
    ),
    Case("objective", "a clip that cannot act", ["update.num_minibatches=1"], "objective.epsilon cannot act"),
    Case(
        "objective",
        "a temperature of SAPO that cannot act",
        ["objective=sapo", "objective.tau_positive=2", "update.num_minibatches=1"],
        "objective.tau_positive cannot act: with one optimizer step per rollout the ratio is exactly 1",
    ),
    Case(
        "objective",
        "a lower width for CISPO",
        ["objective=cispo", "objective.epsilon=0.2"],
        "objective.epsilon has no effect on loss_type=cispo",
    ),
    Case(
        "objective",
        "a cap of the ratio for GMPO",
        ["objective=gmpo", "objective.delta=2"],
        "objective.delta has no effect on loss_type=gmpo",
    ),
    Case(
        "objective",
        "completions kept that are kept anyway",
        ["objective.beta=0.1", "update.keep_zero_advantage=true"],
        "update.keep_zero_advantage=true has no effect",
    ),
    Case("objective", "a negative clip width", ["objective.epsilon=-0.1"], "objective.epsilon"),
    Case("objective", "a KL weight below 0", ["objective.beta=-0.1"], "objective.beta"),
    Case(
        "objective",
        "a KL estimator that does not exist",
        ["objective.beta=0.1", "objective.kl_estimator=k4"],
        "objective.kl_estimator",
    ),
    Case("objective", "a KL estimator without a KL term", ["objective.kl_estimator=k1"], "objective.kl_estimator"),
    Case(
        "objective",
        "a KL estimate without a gradient",
        ["objective.beta=0.1", "objective.kl_estimator=k1"],
        "objective.kl_estimator=k1 is not a penalty",
    ),
    Case(
        "objective",
        "tokens of a ratio per sequence",
        ["objective.top_entropy_quantile=0.2"],
        "objective.top_entropy_quantile=0.2 leaves no token out with importance_sampling_level=sequence",
    ),
    Case("objective", "masked tokens of a ratio per sequence", ["mismatch=token_mask"], "or mismatch=sequence_mask"),
    Case("objective", "delta below the clip", ["objective.delta=1.01"], "delta"),
    Case(
        "objective",
        "CISPO with the ratio of a sequence",
        ["objective=cispo", "objective.importance_sampling_level=sequence"],
        "cispo",
    ),
    Case(
        "objective",
        "token selection of nothing",
        ["objective.top_entropy_quantile=0"],
        "objective.top_entropy_quantile",
    ),
    Case(
        "objective",
        "a mismatch correction whose bounds exclude 1",
        ["mismatch=token_mask", "objective.mismatch.high=0.5"],
        "high=0.5",
    ),
    Case(
        "objective",
        "a correction with another support",
        ["mismatch=token_mask", "rollout.top_k=5"],
        "rollout.top_k=5 contradicts objective.mismatch",
    ),
    Case(
        "objective",
        "a ratio to a sampler with another support",
        ["update.old_logprobs=sampler", "rollout.top_p=0.9"],
        "rollout.top_p=0.9 contradicts update.old_logprobs=sampler",
    ),
    Case(
        "objective",
        "a correction of a ratio to the sampler",
        ["update.old_logprobs=sampler", "mismatch=sequence_mask"],
        "update.old_logprobs=sampler contradicts objective.mismatch",
    ),
    Case(
        "objective",
        "a ratio to the sampler for a loss without a ratio",
        ["update.old_logprobs=sampler", "objective=reinforce", "update.num_minibatches=1"],
        "update.old_logprobs=sampler has no effect on loss_type=reinforce",
    ),
    Case(
        "objective", "old log-probabilities of nobody", ["update.old_logprobs=rollout"], "update.old_logprobs='rollout'"
    ),
    Case(
        "objective",
        "a synchronised reference without a KL term",
        ["update.ref_sync_every_n_rollouts=2"],
        "update.ref_sync_every_n_rollouts",
    ),
    Case(
        "objective",
        "a denominator of no tokens",
        ["objective=dr_grpo", "objective.max_completion_length=0"],
        "objective.max_completion_length=0 must be at least 1",
    ),
    Case(
        "objective",
        "a denominator that is not read",
        ["objective.max_completion_length=99"],
        "objective.max_completion_length=99 has no effect on loss_type=grpo",
    ),
    Case("objective", "a width that is no number", ["objective.epsilon=nan"], "objective.epsilon=nan must be a finite"),
    Case(
        "objective",
        "a gate of no temperature",
        ["objective=sapo", "objective.tau_positive=0"],
        "objective.tau_positive=0 must be above 0",
    ),
    Case(
        "objective",
        "a weight that keeps what the policy has left",
        ["objective=vespo", "objective.k_negative=0"],
        "objective.k_negative=0 must be above 0",
    ),
    Case(
        "objective",
        "a correction per completion for VESPO",
        ["objective=vespo", "mismatch=sequence_mask"],
        "objective.mismatch.level=sequence is not defined for loss_type=vespo",
    ),
    Case(
        "objective",
        "a penalty of what cannot have moved",
        ["objective=kl_cov", "update.num_minibatches=1"],
        "objective.loss_type=kl_cov cannot act: with one optimizer step per rollout the ratio is exactly 1",
    ),
    Case(
        "objective",
        "bounds of a covariance with nothing between",
        ["objective=clip_cov", "objective.clip_cov_lb=5"],
        "objective.clip_cov_lb=5 must be below objective.clip_cov_ub=5.0",
    ),
    Case(
        "objective",
        "the best of as many as there are",
        ["advantages=pass_at_k", "advantages.k=8"],
        "advantages.k=8 with rollout.num_generations=8",
    ),
    Case(
        "objective", "the best of one", ["advantages=pass_at_k", "advantages.k=1"], "advantages.k=1 must be at least 2"
    ),
    Case(
        "objective",
        "a group of one against its own mean",
        ["advantages=reinforce_plus_plus_baseline", "rollout.num_generations=1"],
        "advantages.group_baseline=true with rollout.num_generations=1",
    ),
    Case(
        "objective",
        "drawing groups anew that are as good as others",
        ["advantages=reinforce_plus_plus", "dynamic_sampling.max_draws=1"],
        "dynamic_sampling.max_draws draws groups of equal rewards anew, which teach as much as others",
    ),
    Case("objective", "an unknown scale of advantages", ["advantages.scale_rewards=std"], "advantages.scale_rewards"),
]

UPDATE = [
    Case(
        "update",
        "minibatches that do not divide",
        ["update.num_minibatches=3"],
        "data.prompts_per_rollout=8 must be divisible by update.num_minibatches=3",
    ),
    Case("update", "a budget below one sequence", ["update.max_tokens_per_microbatch=50"], "raise it to at least that"),
    Case(
        "update",
        "a clip that turns gradients around",
        ["update.max_grad_norm=-1"],
        "update.max_grad_norm=-1 must be above 0 (inf: no clip)",
    ),
    Case(
        "update",
        "no patience with a healthy run",
        ["update.max_nonfinite_steps=0"],
        "update.max_nonfinite_steps=0 must be at least 1",
    ),
    Case("update", "no passes", ["update.num_iterations=0"], "update.num_iterations=0 must be at least 1"),
    Case(
        "update",
        "full fine-tuning in bfloat16",
        ["trainer.precision=bf16-true"],
        "rounds the updates of full fine-tuning away",
    ),
    Case(
        "update",
        "bfloat16 weights without an adapter",
        ["model.dtype=bfloat16"],
        "model.dtype=bfloat16 rounds the updates",
    ),
    Case(
        "update",
        "weights in half precision",
        ["model.dtype=float16"],
        "model.dtype='float16' is not one of float32, bfloat16, float64",
    ),
    Case("update", "half precision", ["trainer.precision=16-mixed"], "use trainer.precision=bf16-mixed"),
    Case("update", "double precision by halves", ["trainer.precision=64-true"], "set model.dtype=float64"),
    Case(
        "update",
        "minibatches that do not divide the prompts of a rank",
        ["trainer=ddp", "trainer.accelerator=cpu", "data.prompts_per_rollout=6", "update.num_minibatches=2"],
        "update.num_minibatches=2 x 2 ranks = 4",
    ),
    Case(
        "update",
        "merging without an adapter",
        ["export.enabled=true", "export.merge_lora=true"],
        "export.merge_lora=true has no effect",
    ),
    Case(
        "update",
        "merging into four bits",
        ["export.enabled=true", "export.merge_lora=true", "lora=language", "model.quantization=nf4"],
        "the adapter would be rounded away",
    ),
    Case(
        "update",
        "an end of a decay that there is not",
        ["+scheduler.min_ratio=0.3"],
        "scheduler.min_ratio=0.3 has no effect with scheduler.name=constant",
    ),
    Case(
        "update",
        "a scheduler of torch",
        [
            "scheduler._target_=torch.optim.lr_scheduler.StepLR",
            "+scheduler._partial_=true",
            "+scheduler.step_size=2",
            "~scheduler.name",
            "~scheduler.warmup_ratio",
        ],
        "scheduler: it is no Schedule, whose build(optimizer, total, done) makes",
    ),
    Case("update", "an unknown schedule", ["scheduler.name=exponential"], "scheduler.name"),
    Case("update", "a warm-up longer than the run", ["scheduler.warmup_ratio=2"], "warmup_ratio"),
    Case("update", "a precision that does not exist", ["trainer.precision=8-bit"], "8-bit"),
    Case(
        "update",
        "YAML's infinity on a command line",
        ["update.max_grad_norm=.inf"],
        "update.max_grad_norm='.inf' has the wrong type; expected a number (YAML's .inf is inf on a command line)",
    ),
    Case("update", "a GPU where there is none", ["trainer.accelerator=gpu"], "there is no GPU here"),
    Case(
        "update", "Apple's GPU", ["trainer.accelerator=mps"], "trainer.accelerator=mps is not supported; use cuda, cpu"
    ),
    Case(
        "update", "8-bit weights without a GPU", ["model.quantization=int8", "lora=language"], "model.quantization=int8"
    ),
]

ROLLOUT = [
    Case("rollout", "a group of one", ["rollout.num_generations=1"], "rollout.num_generations=1 must be at least 2"),
    Case("rollout", "a temperature that is no number", ["rollout.temperature=nan"], "rollout.temperature=nan must be"),
    Case("rollout", "a temperature of noise", ["rollout.temperature=1e30"], "must be at most 100: every token"),
    Case(
        "rollout",
        "a word for an engine",
        ["rollout.engine=vllm"],
        "rollout.engine='vllm' must be a section with a _target_; choose one with rollout=: replay, transformers, "
        "vllm,",
    ),
    Case("rollout", "greedy rollouts", ["rollout.temperature=0"], "rollout.temperature=0 must be above 0"),
    Case(
        "rollout", "a repetition penalty", ["rollout.repetition_penalty=1.2"], "rollout.repetition_penalty must be 1.0"
    ),
    Case(
        "rollout",
        "a word for a temperature",
        ["rollout.temperature=hot"],
        "rollout.temperature='hot' has the wrong type; expected a number",
    ),
    Case("rollout", "a word for top_p", ["rollout.top_p=x"], "rollout.top_p='x' has the wrong type; expected a number"),
    Case("rollout", "one string for a list", ["rollout.stop=abc"], "rollout.stop='abc' has the wrong type"),
    Case(
        "rollout",
        "nothing for a list",
        ["rollout.stop=null"],
        "rollout.stop=null has the wrong type; expected a list of text",
    ),
    Case(
        "rollout",
        "a number among strings",
        ["rollout.stop=[1]"],
        "rollout.stop=[1] has the wrong type; expected a list of text",
    ),
    Case(
        "rollout",
        "a stop string of nothing",
        ["rollout.stop=['']"],
        "must be a list of strings of at least one character",
    ),
    Case(
        "rollout",
        "no prompt at a time",
        ["rollout=vllm_server", "rollout.engine.max_in_flight=0"],
        "rollout.engine.max_in_flight=0 must be at least 1",
    ),
    Case(
        "rollout",
        "no time for an answer",
        ["rollout=vllm_server", "rollout.engine.request_timeout_s=0"],
        "rollout.engine.request_timeout_s=0 must be above 0",
    ),
    Case("rollout", "top_p above 1", ["rollout.top_p=1.5"], "top_p"),
    Case("rollout", "a negative top_k", ["rollout.top_k=-1"], "top_k"),
    Case(
        "rollout",
        "completions of no tokens",
        ["rollout.max_completion_length=0"],
        "rollout.max_completion_length=0 must be at least 1",
    ),
    Case(
        "rollout",
        "a server's address without http",
        ["rollout=vllm_server", "rollout.engine.urls=[localhost]"],
        "rollout.engine.urls",
    ),
    Case(
        "rollout",
        "an adapter merged into packed weights",
        ["rollout=vllm_server", "rollout.engine.lora_sync=merged", "lora=language", "model.quantization=nf4"],
        "rollout.engine.lora_sync=merged cannot add the adapter to a quantised base",
    ),
    Case("rollout", "no server at all", ["rollout=vllm_server", "rollout.engine.urls=[]"], "rollout.engine.urls=[]"),
    Case("rollout", "negative draws", ["dynamic_sampling.max_draws=-1"], "dynamic_sampling.max_draws=-1"),
]

DATA = [
    Case(
        "data",
        "a file that is not there",
        [*ROWS, "data.task.source=missing.jsonl"],
        "missing.jsonl: cannot read the file",
    ),
    Case(
        "data",
        "an unknown kind of file",
        [*ROWS, "data.task.source={tmp}/rows.xml"],
        "rows.xml",
        writes("rows.xml", "<a/>"),
    ),
    Case("data", "an empty file", JSONL, "the dataset is empty", writes("rows.jsonl", "")),
    Case(
        "data",
        "a line that is no JSON",
        JSONL,
        "rows.jsonl line 13: not valid JSON",
        writes("rows.jsonl", lines(good_rows()) + '{"prompt": '),
    ),
    Case(
        "data",
        "a line that is no object",
        JSONL,
        "line 13: expected an object",
        writes("rows.jsonl", lines([*good_rows(), [1]])),
    ),
    Case("data", "text that is not UTF-8", JSONL, "not UTF-8 text", writes("rows.jsonl", b'{"prompt": "\xff\xfe"}')),
    Case(
        "data",
        "a CSV row with too many fields",
        [*ROWS, "data.task.source={tmp}/rows.csv"],
        "rows.csv line 3",
        writes("rows.csv", "prompt,letter\na,b\na,b,c\n"),
    ),
    Case(
        "data",
        "a Parquet file that is not one",
        [*ROWS, "data.task.source={tmp}/rows.parquet"],
        "not a readable Parquet file",
        writes("rows.parquet", "PAR1"),
    ),
    Case(
        "data",
        "JSON that is no list",
        [*ROWS, "data.task.source={tmp}/rows.json"],
        "expected a list of objects",
        writes("rows.json", "{}"),
    ),
    Case(
        "data",
        "a missing column",
        JSONL,
        "column 'prompt' is missing (data.task.prompt_column)",
        writes("rows.jsonl", lines([{"question": str(n)} for n in range(12)])),
    ),
    Case("data", "an empty prompt", JSONL, "the prompt is empty", rows_file({"prompt": "", "letter": "a"})),
    Case(
        "data",
        "a prompt that is a number",
        JSONL,
        "the prompt must be a string or a list of messages",
        rows_file({"prompt": 5, "letter": "a"}),
    ),
    Case(
        "data",
        "a message that is a number",
        JSONL,
        "message 0: the content must be text, or a list of parts",
        rows_file({"prompt": [{"role": "user", "content": 5}], "letter": "a"}),
    ),
    Case(
        "data",
        "fewer rows than a rollout",
        JSONL,
        "data.prompts_per_rollout=8 is more than the 3 training rows",
        rows_file(count=4),
    ),
    Case(
        "data",
        "nothing left to train on",
        [*JSONL, "data.task.num_validation=12"],
        "data.task.num_validation=12 must be less than the 12 rows",
        rows_file(),
    ),
    Case(
        "data",
        "a template without its column",
        [*JSONL, "data.task.template='{question}?'"],
        "column 'question' is missing (data.task.template)",
        rows_file(),
    ),
    Case(
        "data",
        "a template that does not parse",
        [*JSONL, "data.task.template='{prompt'"],
        "data.task.template",
        rows_file(),
    ),
    Case(
        "data",
        "a mapped column that is not there",
        [*JSONL, "+data.task.columns={{answer: solution}}"],
        "column 'solution' is missing (data.task.columns.answer)",
        rows_file(),
    ),
    Case(
        "data",
        "a pattern that is none",
        [*JSONL, "+data.task.patterns={{letter: '(a'}}"],
        "data.task.patterns.letter",
        rows_file(),
    ),
    Case(
        "data",
        "a pattern that matches nothing",
        [*JSONL, "+data.task.patterns={{letter: '(x)'}}"],
        "does not match data.task.patterns.letter",
        rows_file(),
    ),
    Case(
        "data",
        "a column that the reward needs",
        JSONL,
        "there is no column 'letter', which reward function letter_share needs",
        rows_file({"prompt": "x:"}),
    ),
    Case(
        "data",
        "a prompt that is too long",
        JSONL,
        "has 2000 tokens, more than data.max_prompt_length=1024",
        rows_file({"prompt": "a" * 2000, "letter": "a"}),
    ),
    Case("data", "a limit that no prompt meets", ["data.max_prompt_length=2"], "more than data.max_prompt_length=2"),
    Case(
        "data",
        "a split of a file",
        [*JSONL, "data.task.split=test"],
        "data.task.split=test has no effect on a file",
        rows_file(),
    ),
    Case(
        "data",
        "pixels for a model that reads text",
        ["data.max_pixels=1000"],
        "data.min_pixels and data.max_pixels have no effect",
    ),
    Case(
        "data",
        "an image for a model that reads text",
        [*JSONL, "data.task.conversational=true", "data.task.image_columns=[image]"],
        "takes text only",
        writes("rows.jsonl", lines([{**row, "image": "a.png"} for row in good_rows()])),
    ),
    Case("data", "an unknown way with long prompts", ["data.overlong_prompts=cut"], "data.overlong_prompts='cut'"),
    Case(
        "data",
        "a reasoning-gym task without the package or the task",
        ["data=reasoning_gym", "data.task=nothing", "reward=reasoning_gym"],
        "reasoning",
    ),
    Case(
        "data",
        "a word for a task",
        ["data.task=abc"],
        "data.task='abc' has the wrong type; expected a section that builds a Task",
    ),
    Case(
        "data",
        "held-out rows by no batch",
        ["data.validation_batch_size=0"],
        "data.validation_batch_size=0 must be at least 1",
    ),
    Case(
        "data",
        "fewer than no held-out rows",
        ["data.task.num_validation=-1"],
        "data.task.num_validation=-1 must be at least 0",
    ),
    Case("data", "no letters", ["data.task.letters=''"], "letters"),
]

MODELS = [
    Case("model", "a router's auxiliary loss", ["+model.overrides.output_router_logits=true"], "no effect"),
    Case("model", "a folder that is no model", ["model.path={tmp}"], "config.json"),
    Case(
        "model",
        "a path that does not exist",
        ["model.path=/nowhere/model"],
        "model folder '/nowhere/model' does not exist",
    ),
    Case("model", "an unknown bundled model", ["model.path=bundled:big"], "no bundled model 'big'"),
    Case("model", "no weights", MODEL, "has no weights", model_without("model.safetensors")),
    Case("model", "weights in a pickle alone", MODEL, "safetensors", model_in_pickle),
    Case("model", "weights cut short", MODEL, "model.path=", cut_weights),
    Case("model", "no tokenizer", MODEL, "tokenizer", model_without("tokenizer.json", "tokenizer_config.json")),
    Case("model", "a config that is no JSON", MODEL, "model.path=", model_with("config.json", b'{"model_type": ')),
    Case("model", "an unknown type of model", MODEL, "lama", model_of_unknown_type),
    Case(
        "model",
        "dropout",
        MODEL,
        "add '+model.overrides={attention_dropout: 0.0}' to the command line",
        model_with_dropout,
    ),
    Case(
        "model",
        "an adapter of a trillion columns",
        ["lora=language", "model.lora.r=1000000000000"],
        "model.lora.r=1000000000000 is above 64, the highest rank",
    ),
    Case(
        "model",
        "an estimate for an adapter that is not there",
        ["lora=language", "model.lora.adapter=/nowhere", "dry_run=true"],
        "/nowhere holds no adapter",
    ),
    Case("model", "LoRA dropout", ["lora=language", "+model.lora.dropout=0.1"], "model.lora.dropout must be 0"),
    Case(
        "model",
        "LoRA dropout by peft's name",
        ["lora=language", "+model.lora.lora_dropout=0.1"],
        "lora_dropout must be 0",
    ),
    Case("model", "DoRA", ["lora=language", "+model.lora.use_dora=true"], "without DoRA's magnitudes"),
    Case(
        "model",
        "whole modules next to LoRA",
        ["lora=language", "+model.lora.modules_to_save=[lm_head]"],
        "would not be in what vLLM gets",
    ),
    Case(
        "model",
        "LoRA that begins with another base",
        ["lora=language", "model.lora.init_lora_weights=pissa"],
        "training would not begin at the model",
    ),
    Case(
        "model",
        "LoRA on the output embedding",
        ["lora=language", "model.lora.target_modules=[q_proj,lm_head]"],
        "would never be trained",
    ),
    Case("model", "an adapter that is not there", ["lora=language", "model.lora.adapter={tmp}"], "holds no adapter"),
    Case("model", "LoRA of rank 0", ["lora=language", "model.lora.r=0"], "model.lora.r"),
    Case(
        "model", "LoRA on modules that are not there", ["lora=language", "model.lora.target_modules=[query]"], "query"
    ),
    Case(
        "model",
        "a vision tower that is not there",
        ["model.train_vision=true"],
        "model.train_vision=true has no effect",
    ),
    Case(
        "model",
        "more layers than there are weights",
        ["+model.overrides={{num_hidden_layers: 5}}"],
        "27 weights are missing",
    ),
    Case(
        "model",
        "a size that is not that of the weights",
        ["+model.overrides={{hidden_size: 999}}"],
        "(99, 64), not (99, 999)",
    ),
    Case(
        "model",
        "a conversation for a tokenizer without a template",
        [*MODEL, "data=rows", "data.task.num_validation=1", "data.task.source={tmp}/rows.jsonl"],
        "has no chat template",
        lambda tmp: (rows_file()(tmp), model_without("chat_template.jinja")(tmp)),
    ),
    Case("model", "an override the config lacks", ["+model.overrides={{hidden_sizes: 3}}"], "hidden_sizes"),
]

ENVIRONMENTS = [
    Case(
        "environment",
        "its reward without one",
        ["reward=environment"],
        "reward.functions.environment: there is no environment",
    ),
    Case(
        "environment",
        "dialogues sampled ahead",
        [
            "environment=guess_the_number",
            "data=secret_number",
            "reward=environment",
            "rollout=vllm_server",
            "data.max_prompt_length=256",
            "rollout.engine.staleness=1",
        ],
        "dialogues are not sampled ahead; set rollout.engine.staleness=0",
    ),
    Case("environment", "no turns", ["environment=calculator", "environment.max_turns=0"], "max_turns=0"),
    Case(
        "environment",
        "one environment for all dialogues",
        ["environment=calculator", "environment.make._partial_=false"],
        "environment.make is of type Calculator, but must make",
    ),
    Case(
        "environment",
        "an environment in place of what makes one",
        ["+environment._target_=gspo_lightning.dialogue.Calculator"],
        "environment._target_ creates a Calculator; set it to gspo_lightning.dialogue.Environments",
    ),
    Case(
        "environment",
        "tools without functions",
        ["environment=tools"],
        "environment.functions: is missing; give it a value",
    ),
    Case(
        "environment",
        "a tool that a config may not name",
        ["environment=tools", "environment.functions=[shutil.rmtree]"],
        "environment.functions=shutil.rmtree is not on the list",
    ),
    Case(
        "environment",
        "a function that is no tool",
        ["environment=tools", "environment.functions=[gspo_lightning.dialogue.calculator.call_of]"],
        "environment.functions: call_of needs type hints and a docstring with Args:",
    ),
    Case(
        "environment",
        "a form of calls that there is not",
        [
            "environment=tools",
            "environment.functions=[gspo_lightning.dialogue.calculator.evaluate]",
            "environment.call_form=harmony",
        ],
        "environment.call_form='harmony' must be null or one of mistral, glm, xml, json",
    ),
    Case(
        "environment",
        "a chat template that shows no tools",
        ["environment=tools", "environment.functions=[gspo_lightning.dialogue.calculator.evaluate]"],
        "the model's chat template shows no tools",
    ),
    Case(
        "environment",
        "other tools in the prompts",
        [
            "environment=tools",
            "environment.functions=[gspo_lightning.dialogue.calculator.evaluate]",
            "data.chat_template_kwargs.tools=[{{type: function}}]",
        ],
        "environment.chat_template_kwargs.tools are others than environment.functions",
    ),
    Case(
        "environment",
        "the reward of functions",
        [
            "environment=tools",
            "environment.functions=[gspo_lightning.dialogue.calculator.evaluate]",
            "reward=environment",
        ],
        "reward.functions.environment: functions give no reward",
    ),
    Case("environment", "a row without what it needs", ["environment=calculator"], "KeyError: 'answer' (row"),
    Case(
        "environment",
        "rewards of turns for a ratio of sequences",
        [
            "environment=guess_the_number",
            "environment.make.turn_rewards=true",
            "data=secret_number",
            "reward=environment",
            "data.max_prompt_length=256",
        ],
        "use importance_sampling_level=sequence_token",
    ),
    Case(
        "environment",
        "rewards of turns on the scale of the batch",
        [
            "environment=guess_the_number",
            "environment.make.turn_rewards=true",
            "data=secret_number",
            "reward=environment",
            "data.max_prompt_length=256",
            "objective.importance_sampling_level=sequence_token",
            "advantages=batch",
        ],
        "set it to group or none",
    ),
]

REWARDS = [
    Case(
        "reward",
        "normalised rewards scaled by the group",
        ["reward.combine=normalize_then_sum"],
        "reward.combine=normalize_then_sum contradicts advantages.scale_rewards=group",
    ),
    Case(
        "reward",
        "a reward for a task that is not in the mixture",
        ["data=mixture", "reward=by_task", "reward.functions.sums.function.tasks=[sum]"],
        "reward.functions.sums: ForTasks has no effect for sum",
    ),
    Case("reward", "a module that is not there", ["reward.functions.letter_share.function.path=nowhere.f"], "nowhere"),
    Case("reward", "a function that is not there", MINE, "my_rewards", reward("")),
    Case(
        "reward",
        "a module that raises when imported",
        MINE,
        "my_rewards",
        reward("raise ValueError('broken module')\n"),
    ),
    Case(
        "reward",
        "a function that raises",
        MINE,
        "reward function letter_share raised ZeroDivisionError",
        reward("def f(completions, **_): return [1 / 0]\n"),
    ),
    Case("reward", "too few values", MINE, "must return a list of", reward("def f(completions, **_): return [1.0]\n")),
    Case(
        "reward",
        "a value that is not a number",
        MINE,
        "returned nan for row",
        reward("def f(completions, **_): return [float('nan')] * len(completions)\n"),
    ),
    Case(
        "reward",
        "a value that is text",
        MINE,
        "returned 'good' for row",
        reward("def f(completions, **_): return ['good'] * len(completions)\n"),
    ),
    Case("reward", "a dict", MINE, "must return a list of", reward("def f(completions, **_): return {}\n")),
    Case(
        "reward",
        "a function that does not end",
        [*MINE, "reward.functions.letter_share.timeout_s=0.5"],
        "took longer than its timeout_s=0.5",
        reward("import time\ndef f(completions, **_): time.sleep(99)\n"),
    ),
    Case(
        "reward",
        "an argument that no row has",
        MINE,
        "there is no column 'solution'",
        reward("def f(completions, solution): return [1.0] * len(completions)\n"),
    ),
    Case(
        "reward",
        "an argument that no function is given",
        MINE,
        "it is never given prompt; name the parameter prompts",
        reward("def f(completions, prompt): return [1.0] * len(completions)\n"),
    ),
    Case("reward", "an exit while it is imported", MINE, "exit code 5", reward("import sys\nsys.exit(5)\n")),
    Case("reward", "an exit", MINE, "SystemExit: 5", reward("def f(completions, **_): raise SystemExit(5)\n")),
    Case(
        "reward",
        "an error in an async function",
        MINE,
        "ValueError: no (row",
        reward("async def f(completions, **_): raise ValueError('no')\n"),
    ),
    Case("reward", "something that cannot be called", MINE, "my_rewards.f", reward("f = 3\n")),
    Case(
        "reward",
        "a weight that is not finite",
        ["reward.functions.letter_share.weight=inf"],
        "weight=inf of a reward function must be a finite number",
    ),
    Case("reward", "a limit of no time", ["reward.functions.letter_share.timeout_s=0"], "timeout_s=0"),
    Case(
        "reward",
        "a limit that is none",
        ["reward.functions.letter_share.timeout_s=inf"],
        "RewardSpec.timeout_s=inf must be above 0 and at most 1000000; null means no limit",
    ),
    Case("reward", "no function at all", ["~reward.functions.letter_share"], "reward.functions is empty"),
    Case(
        "reward",
        "no weight at all",
        ["reward.functions.letter_share.weight=0"],
        "reward.functions: the weight of letter_share is 0",
    ),
    Case(
        "reward",
        "the reward of an environment without one, in a function of one's own",
        MINE,
        "reward.functions.letter_share: its parameter environment_reward is what an environment gives",
        reward("def f(completions, environment_reward, **_): return environment_reward\n"),
    ),
    Case("reward", "an unknown combination", ["reward.combine=product"], "reward.combine='product'"),
    Case("reward", "a validation reward that is none", ["validation.reward=nothing"], "validation.reward"),
    Case(
        "reward",
        "an unknown sandbox",
        ["reward=code", "reward.functions.code.function.sandbox=docker"],
        "sandbox='docker'",
    ),
]

RUNS = [
    Case("run", "a checkpoint that is not there", CKPT, "there is no such checkpoint"),
    Case("run", "a dry run from a checkpoint that is not there", [*CKPT, "dry_run=true"], "there is no such checkpoint"),
    Case("run", "a dry run over epochs of a task that never ends", ["num_epochs=2", "dry_run=true"], "num_epochs=2: task "),
    Case("run", "the run's folder as the one that paths count from", ["hydra.job.chdir=true"], "hydra.job.chdir=true: rel"),
    Case("run", "a home folder in the run's", ["hydra.run.dir='~/runs'"], "hydra.run.dir='~/runs': ~ is a folder of that"),
    Case("run", "a checkpoint without a name", ["ckpt_path="], "ckpt_path is empty; name a checkpoint"),
    Case("run", "the folder of a run instead of its checkpoint", ["ckpt_path={tmp}"], "is a folder, not a checkpoint; name "),
    Case("run", "a checkpoint that is no file of ours", CKPT, "some.ckpt", writes("some.ckpt", "not a checkpoint")),
    Case("run", "a checkpoint cut short", CKPT, "damaged", lambda tmp: (checkpoint({"a": torch.zeros(999)})(tmp), (tmp / "some.ckpt").write_bytes((tmp / "some.ckpt").read_bytes()[:900]))),
    Case("run", "a checkpoint that holds code", CKPT, "some.ckpt", checkpoint({"state_dict": Payload()})),
    Case("run", "a checkpoint of something else", CKPT, "some.ckpt", checkpoint({"state_dict": {}})),
    Case("run", "a run folder that is a file", ["hydra.run.dir={tmp}/taken"], "taken", writes("taken", "")),
    Case("run", "a file in the place of its checkpoints", [], "run/checkpoints (File exists); nothing has been saved yet", lambda tmp: ((tmp / "run").mkdir(), (tmp / "run" / "checkpoints").touch())),
    Case("run", "a logger's folder that is a file", ["logger=tensorboard", "logger.tensorboard.save_dir={tmp}/taken"], "/taken: cannot write there (File exists); choose another folder", writes("taken", "")),
    Case("run", "a profiler's folder that is a file", ["+trainer.profiler={_target_: lightning.pytorch.profilers.SimpleProfiler, dirpath: {tmp}/taken}"], "/taken: cannot write there (File exists); choose another folder", writes("taken", "")),
    Case("run", "a limit of time that is none", ["trainer.max_time=soon"], "trainer.max_time='soon': `Timer(duration='soon')` is not a valid duration"),
    Case("run", "a limit of time below 0", ["trainer.max_time={{seconds: -1}}"], "trainer.max_time={'seconds': -1} must be above 0"),
    Case("run", "a negative limit of time", ["trainer.max_time=-5"], "trainer.max_time=-5"),
    Case("run", "a checkpoint of another model", CKPT, "some.ckpt", checkpoint({"state_dict": {"policy.model.w": torch.zeros(2)}})),
    Case("run", "an unknown health check", ["callbacks.health.stop_on=[boredom]", "dry_run=true"], "there is no check 'boredom'"),
    Case("run", "a table of no completions", ["callbacks.completions.num_completions=0"], "callbacks.completions.num_completions=0"),
    Case("run", "a progress line every 0 rollouts", ["callbacks.progress.every_n_rollouts=0"], "callbacks.progress.every_n_rollouts=0 must be at least 1"),
    Case("run", "a validation every 0 rollouts", ["validation.every_n_rollouts=0"], "validation.every_n_rollouts=0 must be at least 1; null: validate before"),
    Case("run", "a best checkpoint without a validation inside the run", ["checkpoint.keep_best=val/accuracy"], "checkpoint.keep_best=val/accuracy has no effect: there is no validation during the run; set validation.every_n_rollouts, to 10"),
    Case("run", "a best checkpoint by what no validation measures", [*BEST, "checkpoint.keep_best=val/acuracy"], "checkpoint.keep_best=val/acuracy must be a validation metric for which higher is better: val/accuracy, val/sampled_accuracy, val/pass@2, val/reward"),
    Case("run", "the longest completions as the best", [*BEST, "checkpoint.keep_best=val/mean_tokens"], "checkpoint.keep_best=val/mean_tokens must be a validation metric for which higher is better"),
    Case("run", "a best checkpoint by a task that is not there", [*BEST, "checkpoint.keep_best=val/accuracy/sums"], "checkpoint.keep_best=val/accuracy/sums: validation does not measure it; it measures val/accuracy, val/sampled_accuracy"),
    Case("run", "a number for the metric of the best checkpoint", [*BEST, "checkpoint.keep_best=3"], "checkpoint.keep_best=3 has the wrong type"),
    Case("run", "a best checkpoint where validation is off", [*BEST, "checkpoint.keep_best=val/reward", "+trainer.limit_val_batches=0"], "checkpoint.keep_best=val/reward has no effect with trainer.limit_val_batches=0"),
    Case("run", "a best checkpoint without held-out rows", [*BEST, "checkpoint.keep_best=val/reward", "data.task.num_validation=0"], "checkpoint.keep_best=val/reward has no effect: there are no held-out rows"),
    Case("run", "a threshold that is a word", ["validation.threshold=x"], "validation.threshold='x' has the wrong type; expected a number"),
    Case("run", "a logger whose package is missing", ["logger=wandb", "dry_run=true"], "logger=wandb is not installed"),
    Case("run", "more processes than a CPU run can have", ["trainer.devices=0"], "trainer: `Trainer(devices=0)`"),
    Case("run", "a trillion processes", ["trainer.devices=1000000000000"], "trainer.devices=1000000000000 must be at most 1024"),
    Case("run", "4-bit weights in parts", ["trainer=fsdp", "model.quantization=nf4", "lora=language"], "trainer=fsdp"),
    Case("run", "8-bit optimizer states in parts", ["trainer=fsdp", "optimizer=adamw_8bit"], "trainer=fsdp"),
    Case("run", "an average of weights in parts", ["trainer=fsdp", "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging}"], "callbacks.ema: EMAWeightAveraging copies whole weights, which trainer=fsdp splits"),
    Case("run", "FSDP1", ["trainer.strategy=fsdp"], "trainer.strategy=fsdp"),
    Case("run", "FSDP1 by its class", ["trainer.strategy={_target_: lightning.pytorch.strategies.FSDPStrategy}"], "trainer.strategy=FSDPStrategy"),
    Case("run", "no node", ["trainer.num_nodes=0"], "trainer.num_nodes=0 must be at least 1"),
    Case("config", "a word for a callback", ["+callbacks.mine=my_callbacks.Mine"], "callbacks.mine='my_callbacks.Mine' must be null, or a section with a _target_"),
    Case("config", "a callback that is none", ["+callbacks.mine._target_=my_rewards.Mine"], "callbacks.mine creates a Mine, which is no callback of Lightning", reward("class Mine: pass\n")),
    Case("config", "a switch for a callback", ["callbacks.health=true"], "callbacks.health=True must be null, or a section"),
    Case("config", "a logger without a class", ["+logger.x={a:1}"], "logger.x={'a': 1} must be null, or a section with a _target_"),
    Case("config", "the name of a reward function alone", ["reward.functions.letter_share.function=my_rewards.f"], "reward.functions.letter_share.function='my_rewards.f' must be a section; for a function of your own"),
    Case("config", "a reward function without its spec", ["+reward.functions.mine={_target_: hydra.utils.get_method, path: my_rewards.f}"], "reward.functions.mine is of type function; give gspo_lightning.rewards.RewardSpec", reward("def f(completions, **_): return [1.0] * len(completions)\n")),
    Case("config", "a reward function with the name of a metric of all", ["+reward.functions.mean=${reward.functions.letter_share}"], "reward.functions.mean: reward/mean is the metric of all functions together"),
    Case("config", "a reward function of null", ["reward.functions.letter_share=null"], "to leave a function out, write ~reward.functions.letter_share"),
    Case("config", "an adapter without a class", ["model.lora={a:1}"], "model.lora={'a': 1} must be null, or a section with a _target_"),
    Case("config", "another model's tokenizer", ["data.model_path=bundled:smollm2-135m-instruct"], "data.model_path=bundled:smollm2-135m-instruct is not model.path="),
    Case("config", "processes of spawn", ["trainer.strategy=ddp_spawn"], "trainer.strategy=ddp_spawn starts processes that cannot be resumed or stopped; use trainer=ddp"),
    Case("config", "one token to draw (top_k)", ["rollout.top_k=1"], "rollout.top_k=1 leaves one token to draw"),
    Case("config", "one token to draw (min_p)", ["rollout.min_p=1"], "rollout.min_p=1"),
    Case("config", "next to no temperature", ["rollout.temperature=1e-300"], "rollout.temperature=1e-300 must be at least 0.001"),
    Case("config", "no row at a time", ["rollout.engine.max_concurrent=0"], "rollout.engine.max_concurrent=0 must be at least 1"),
    Case("config", "no engine", ["rollout.engine=null"], "rollout.engine=None must be a section with a _target_"),
    Case("config", "a trillion held-out rows", ["data.task.num_validation=1000000000000"], "data.task.num_validation=1000000000000 must be at most 1000000"),
    Case("config", "a clipping algorithm of Lightning", ["+trainer.gradient_clip_algorithm=value"], "trainer.gradient_clip_algorithm is not a setting here: set update.max_grad_norm"),
    Case("config", "batches of a test", ["+trainer.limit_test_batches=3"], "trainer.limit_test_batches is not a setting here"),
    Case("config", "early stopping without validations", ["+callbacks.es={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: reward/mean}"], "callbacks.es: EarlyStopping looks at its metric after each validation"),
    Case("config", "early stopping where the best would rise", ["validation.every_n_rollouts=1", "+callbacks.es={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/accuracy}"], "callbacks.es: EarlyStopping with mode=min, its default, ends the run when val/accuracy no longer falls; set callbacks.es.mode=max"),
    Case("config", "a rate monitor without a logger", ["logger=none", "+callbacks.rate={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"], "callbacks.rate: LearningRateMonitor needs a logger"),
    Case("config", "Lightning's checkpoints", ["+callbacks.mine={_target_: lightning.pytorch.callbacks.ModelCheckpoint}"], "callbacks.mine: ModelCheckpoint is replaced by checkpoint.keep_last and keep_best"),
    Case("config", "a module that is none", ["module._target_=gspo_lightning.Objective"], "module._target_=gspo_lightning.Objective is no subclass of gspo_lightning.GSPOModule; name one"),
    Case("config", "an argument of the module that another section sets", ["+module.max_draws=2"], "module.max_draws: dynamic_sampling.max_draws sets this argument of every module; change that instead"),
    Case("config", "an argument that the module does not have", ["+module.anchor=2"], "module.anchor: gspo_lightning.GSPOModule has no such setting; a subclass has those that its __init__ names"),
    Case("config", "a module from anywhere", ["module._target_=numpy.ndarray"], "module._target_=numpy.ndarray is not on the list of what a config may call"),
    Case("config", "an average over epochs", ["+callbacks.swa={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.01}"], "callbacks.swa: StochasticWeightAveraging averages once per epoch"),
    Case("config", "a search for the rate", ["+callbacks.rate={_target_: lightning.pytorch.callbacks.LearningRateFinder}"], "callbacks.rate: LearningRateFinder looks at the loss that training_step returns"),
    Case("config", "a search for the size of batches", ["+callbacks.size={_target_: lightning.pytorch.callbacks.BatchSizeFinder}"], "callbacks.size: BatchSizeFinder would use up max_rollouts in its trials"),
    Case("config", "batches that a callback adds up", ["+callbacks.sums={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 2} }"], "callbacks.sums: GradientAccumulationScheduler adds up the gradients of batches"),
    Case("config", "a bar of Lightning's", ["+callbacks.bar={_target_: lightning.pytorch.callbacks.RichProgressBar}"], "callbacks.bar: RichProgressBar is replaced by callbacks.progress"),
    Case("config", "weights that are pruned", ["+callbacks.prune={_target_: lightning.pytorch.callbacks.ModelPruning, pruning_fn: l1_unstructured}"], "callbacks.prune: ModelPruning looks for weights before the policy is loaded"),
    Case("config", "layers that thaw after an epoch", ["+callbacks.thaw={_target_: lightning.pytorch.callbacks.BackboneFinetuning}"], "callbacks.thaw: BackboneFinetuning unfreezes layers after an epoch"),
    Case("config", "a monitor that asks for a logger when the run begins", ["logger=none", "+callbacks.stats={_target_: lightning.pytorch.callbacks.DeviceStatsMonitor}"], "callbacks, logger or trainer: Cannot use `DeviceStatsMonitor` callback with `Trainer(logger=False)`."),
    Case("config", "an average at every other step", ["+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, update_every_n_steps: 2}"], "callbacks: EMAWeightAveraging(update_every_n_steps=2) is asked once per rollout"),
]  # fmt: skip

CASES = [*CONFIG, *OBJECTIVE, *OPTIMIZER, *UPDATE, *ROLLOUT, *DATA, *MODELS, *ENVIRONMENTS, *REWARDS, *RUNS]
