"""The words by which messages say how a run goes on after it ended early."""

from __future__ import annotations

from pathlib import Path

WHERE_IT_IS = (
    "where the run's folder is now, its newest checkpoint is checkpoints/last.ckpt: resume with "
    "hydra.run.dir=<that folder> ckpt_path=auto"
)
"""How to resume a run whose folder was moved."""


def resume_line(last: Path | None) -> str:
    """How to resume a run whose newest checkpoint is ``last``."""
    return (
        f"resume with ckpt_path={last}"
        if last is not None and can_resume(last)
        else "no checkpoint has been written yet"
    )


def can_resume(last: Path) -> bool:
    """Whether a run can be resumed from ``last``; ``previous.ckpt`` beside it will do."""
    return last.exists() or last.with_name("previous.ckpt").exists()
