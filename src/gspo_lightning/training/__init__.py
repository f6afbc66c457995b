"""A rollout and the update on it: what `gspo_lightning.module.GSPOModule` does in a training step."""
