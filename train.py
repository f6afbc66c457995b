"""`python train.py experiment=... key=value`: trains a policy. See conf/train.yaml for every setting."""

from gspo_lightning.program.imports import objects_that_stay
from gspo_lightning.program.interrupt import end_at_interrupt
from gspo_lightning.program.threads import configure_threads, keep_freed_memory

if __name__ == "__main__":
    end_at_interrupt()
configure_threads()
keep_freed_memory()

with objects_that_stay():
    import hydra
    from omegaconf import DictConfig

    from gspo_lightning import cli


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One run; returns the held-out sampled accuracy, for sweeps."""
    return cli.train(cfg)


if __name__ == "__main__":
    cli.run(main)
