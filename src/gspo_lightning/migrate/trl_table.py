"""What becomes of each field of TRL 1.16.0's GRPOConfig (its own, and those of transformers' TrainingArguments).

Every field is in exactly one of four tables; `convert.py` knows how those in ``COMPUTED`` depend on each other.
"""

from __future__ import annotations

from typing import Any

from gspo_lightning.migrate.vllm import KEYS as VLLM

RENAMED: dict[str, str] = {
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "update.max_grad_norm",
    "seed": "seed",
    "data_seed": "data.seed",
    "num_generations": "rollout.num_generations",
    "num_generations_eval": "validation.num_generations",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "rollout.max_completion_length",
    "temperature": "rollout.temperature",
    "top_p": "rollout.top_p",
    "top_k": "rollout.top_k",
    "repetition_penalty": "rollout.repetition_penalty",
    "importance_sampling_level": "objective.importance_sampling_level",
    "beta": "objective.beta",
    "entropy_coef": "objective.entropy_coef",
    "mask_truncated_completions": "objective.mask_truncated_completions",
    "num_iterations": "update.num_iterations",
    "top_entropy_quantile": "objective.top_entropy_quantile",
    "off_policy_mask_threshold": "objective.off_policy_mask_threshold",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "torch_compile": "model.compile",
    "per_device_eval_batch_size": "data.validation_batch_size",
    "output_dir": "hydra.run.dir",
}
"""TRL's key -> our key, with the same value."""

COMPUTED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
    "num_train_epochs", "max_steps", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "lr_scheduler_kwargs",
    "optim", "adam_beta1", "adam_beta2", "bf16", "fp16", "save_strategy", "save_steps", "eval_strategy", "eval_steps",
    "report_to", "loss_type", "epsilon", "epsilon_high", "delta", "sapo_temperature_neg", "sapo_temperature_pos",
    "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
    "scale_rewards", "multi_objective_aggregation", "use_bias_correction_kl", "min_p", "chat_template_kwargs",
    "resume_from_checkpoint", "use_cpu", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "push_to_hub", "hub_model_id", "hub_private_repo", "use_adaptive_entropy", "entropy_target", "entropy_coef_delta",
    "entropy_coef_min", "entropy_coef_max", *VLLM,
)  # fmt: skip
"""Keys whose translation depends on the value or on other keys."""

BETTER: dict[str, str] = {
    "logging_steps": "every rollout is logged, to metrics.csv and the logger",
    "logging_strategy": "every rollout is logged",
    "logging_first_step": "every rollout is logged",
    "log_completions": "every completion is written to completions.jsonl",
    "num_completions_to_print": "every completion is written to completions.jsonl; the report shows held-out ones",
    "log_unique_prompts": "completions.jsonl has all prompts with their uid",
    "log_multimodal": "completions.jsonl names images by type",
    "use_liger_kernel": "log-probabilities never hold all logits; no switch is needed",
    "liger_kernel_config": "log-probabilities never hold all logits; no switch is needed",
    "cast_lm_head_to_fp32": "the vocabulary product and its softmax are always in float32",
    "disable_dropout": "dropout is refused, because it makes old and new log-probabilities differ by noise",
    "pad_to_multiple_of": "there is no padding: a micro-batch is one packed row",
    "torch_empty_cache_steps": "no step of ours needs it; memory is bounded by update.max_tokens_per_microbatch",
    "auto_find_batch_size": "update.max_tokens_per_microbatch bounds memory and never changes the gradient",
    "gradient_checkpointing_kwargs": "non-reentrant, always",
    "remove_unused_columns": "all columns stay and go to the reward functions",
    "average_tokens_across_devices": "denominators are always those of all ranks",
    "eval_on_start": "there is always a validation before training and one after it",
    "eval_delay": "validation is every validation.every_n_rollouts rollouts, and before and after",
    "save_total_limit": "the newest checkpoint and the one before it are kept, more with checkpoint.keep_last",
    "save_only_model": "a checkpoint resumes bit-identically; the model alone is exported at the end of the run",
    "restore_callback_states_from_checkpoint": "always restored",
    "ignore_data_skip": "the position in the data is one integer in the checkpoint; no batches are skipped to reach it",
    "enable_jit_checkpoint": "SIGTERM and SIGINT always finish and save the current rollout (checkpoint.grace_s)",
    "shuffle_dataset": "a finite task is reshuffled in each epoch, by (seed, epoch)",
    "full_determinism": "sampling and data order derive from the seed; a resumed run is bit-identical",
    "dataloader_drop_last": "no prompt comes twice in a rollout; the rows left over come up in other epochs",
    "dataloader_num_workers": "prompts are tokenized in the training process; that is never the bottleneck",
    "dataloader_pin_memory": "a batch is token ids, which move to the device when they are packed",
    "dataloader_persistent_workers": "there are no worker processes",
    "dataloader_prefetch_factor": "there are no worker processes",
    "dataloader_multiprocessing_context": "there are no worker processes",
    "dataloader_in_order": "there are no worker processes; order is fixed",
    "logging_nan_inf_filter": "steps with a non-finite gradient are skipped and counted (count/nonfinite_steps)",
    "include_num_input_tokens_seen": "count/train_tokens and count/rollout_tokens are always logged",
    "skip_memory_metrics": "perf/peak_rss_gb is always logged",
    "ddp_find_unused_parameters": "never needed: every rank runs the same forwards",
    "ds3_gather_for_generation": "no DeepSpeed",
    "use_transformers_paged": "prompts are forwarded and kept once for all; finished rows leave the batch",
    "use_transformers_continuous_batching": "finished rows leave the batch during sampling",
    "transformers_continuous_batching_config": "finished rows leave the batch during sampling",
    "cache_implementation": "prompts are forwarded and kept once for all their completions",
    "use_cache": "generation always caches, training never does",
    "do_train": "train.py trains, evaluate.py evaluates",
    "do_eval": "there is always a validation before training and one after it",
    "do_predict": "evaluate.py evaluates",
    "disable_tqdm": "one line per rollout where the output is no terminal",
    "run_name": "the run's folder is its name; with a logger, set its name there",
    "project": "logger.wandb.project or logger.mlflow.experiment_name",
    "vllm_model_impl": "vLLM chooses",
    "vllm_group_port": "weights travel through a folder (rollout.engine.sync_dir), not through a process group",
    "vllm_max_model_length": "data.max_prompt_length + rollout.max_completion_length, set automatically",
}
"""Key -> what happens here instead. Nothing is lost by leaving it out."""

_ACCELERATOR = {
    "split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True,
    "non_blocking": False, "gradient_accumulation_kwargs": None,
}  # fmt: skip

NONE: dict[str, tuple[Any, str]] = {
    "trust_remote_code": (False, "code of a model repository is never run"),
    "model_init_kwargs": (None, "set the fields of the group model: dtype, lora, overrides of the model's config"),
    "router_aux_loss_coef": (None, "a product of batch means depends on the micro-batch, so it is left out"),
    "generation_kwargs": (None, "each sampling setting has its own key under rollout; others would bias the ratio"),
    "reward_weights": (None, "a weight is set at its function: reward.functions.<name>.weight"),
    "max_tool_calling_iterations": (None, "a GRPOConfig has no tools: environments are set up on our side"),
    "vllm_structured_outputs_regex": (None, "a grammar changes the distribution that is sampled, and so the ratio"),
    "log_completions_hub_repo": (None, "nothing is uploaded; completions.jsonl is a file to upload"),
    "optim_args": (None, "an optimizer is a config group: write one with its arguments"),
    "optim_target_modules": (None, "an optimizer is a config group: write one"),
    "label_smoothing_factor": (0.0, "there is no cross-entropy here"),
    "neftune_noise_alpha": (None, "noise would make old and new log-probabilities differ"),
    "bf16_full_eval": (False, "validation runs in the precision of training"),
    "fp16_full_eval": (False, "validation runs in the precision of training"),
    "tf32": (None, "set torch.backends.cuda.matmul.fp32_precision in your own entry script"),
    "torch_compile_backend": (None, "model.compile takes torch's default"),
    "torch_compile_mode": (None, "model.compile takes torch's default"),
    "log_on_each_node": (True, "only rank 0 writes"),
    "log_level": ("passive", "Python's logging is left as it is"),
    "log_level_replica": ("warning", "Python's logging is left as it is"),
    "trackio_space_id": (None, "no trackio; logger=csv, tensorboard, wandb or mlflow"),
    "trackio_bucket_id": (None, "no trackio"),
    "trackio_static_space_id": (None, "no trackio"),
    "prediction_loss_only": (False, "validation measures rewards and accuracy"),
    "eval_do_concat_batches": (True, "validation accumulates means"),
    "eval_use_gather_object": (False, "validation accumulates means"),
    "eval_accumulation_steps": (None, "validation accumulates means"),
    "include_for_metrics": ([], "validation measures rewards and accuracy"),
    "batch_eval_metrics": (False, "validation accumulates means"),
    "save_on_each_node": (False, "only rank 0 writes"),
    "hub_token": (None, "HF_TOKEN or hf auth login: a token in a config ends up in files"),
    "hub_strategy": ("every_save", "the export at the end is uploaded, checkpoints are not"),
    "hub_always_push": (False, "there is one upload, at the end"),
    "hub_revision": (None, "the upload goes to the main branch"),
    "load_best_model_at_end": (
        False,
        "the last policy is exported; compare exports: evaluate.py model=path model.path=<run>/model",
    ),
    "metric_for_best_model": (
        None,
        "the last policy is exported; checkpoint.keep_best=val/accuracy keeps the best one too",
    ),
    "greater_is_better": (None, "the last policy is exported"),
    "accelerator_config": (_ACCELERATOR, "devices and strategies are the group trainer"),
    "parallelism_config": (None, "devices and strategies are the group trainer"),
    "label_names": (None, "there are no labels"),
    "train_sampling_strategy": ("random", "prompts come in shuffled order; packing needs no grouping by length"),
    "length_column_name": ("length", "packing needs no grouping by length"),
    "ddp_bucket_cap_mb": (None, "set trainer.strategy to a strategy object"),
    "ddp_broadcast_buffers": (None, "set trainer.strategy to a strategy object"),
    "ddp_static_graph": (None, "set trainer.strategy to a strategy object"),
    "ddp_backend": (None, "set trainer.strategy to a strategy object"),
    "ddp_timeout": (1800, "set trainer.strategy to a strategy object"),
    "fsdp": (None, "sharding is trainer=fsdp"),
    "fsdp_config": (None, "sharding is trainer=fsdp"),
    "deepspeed": (None, "no DeepSpeed"),
    "debug": ("", "debug= chooses debugging aids such as debug=overfit, which is something else"),
    "local_rank": (-1, "Lightning starts the ranks: trainer.devices"),
}
"""Key -> (TRL's default, why there is no counterpart). At its default a key asks for nothing."""

HARMLESS = (
    "log_", "hub_", "trackio_", "save_", "eval_", "ddp_", "local_rank", "debug", "label_names", "tf32",
    "torch_compile_",
)  # fmt: skip
"""Prefixes of the keys that do not change what is trained, with or without a counterpart."""

DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
    "optim": "adamw_torch_fused", "lr_scheduler_type": "linear", "max_grad_norm": 1.0, "seed": 42,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0,
    "num_generations": 8, "max_completion_length": 512, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    "num_iterations": 1, "loss_type": "dapo", "importance_sampling_level": "token", "epsilon": 0.2, "beta": 0.0,
    "scale_rewards": "group",
}  # fmt: skip
"""TRL's defaults of the keys that affect the result, for configs that do not give them."""

COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations", "num_iterations")
"""Counts that batch sizes and steps are computed from; at least 1."""

SWITCHED_OFF_BY_NONE = ("max_grad_norm", "top_k")
"""Numbers for which older releases take None: no clip, and the whole vocabulary."""

KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "steps_per_generation", "generation_batch_size", "max_steps", "warmup_steps", "warmup_ratio", "save_steps",
            "eval_steps", "ref_model_sync_steps", "vllm_server_timeout", "vllm_tensor_parallel_size",
            "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
            "sapo_temperature_neg", "sapo_temperature_pos",
            "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
            "entropy_target", "entropy_coef_delta", "entropy_coef_min", "entropy_coef_max", "top_entropy_quantile",
            "entropy_coef",
        ),
        (int, float),
    ),
    "reward_weights": (list,), "report_to": (str, list), "scale_rewards": (str, bool), "vllm_server_base_url": (str,),
}  # fmt: skip
"""Types of keys that are used in computations and have no default above; None means that a key is not given."""

MAPPINGS = ("chat_template_kwargs", "lr_scheduler_kwargs")
"""Keys that TRL also takes as JSON."""
