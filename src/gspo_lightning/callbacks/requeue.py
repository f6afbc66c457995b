"""Preemption on Slurm: the job goes back into the queue, and its next start resumes from the checkpoint."""

from __future__ import annotations

import os
import subprocess


def requeue() -> str:
    """Asks Slurm to run this job again, if this is a Slurm job; returns a line with the outcome."""
    job = os.environ.get("SLURM_JOB_ID")
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        job = f"{array}_{task}"
    if not job:
        return "SIGUSR1 outside a Slurm job: nothing to requeue"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        cause = (getattr(error, "stderr", None) or str(error)).strip()
        return f"Slurm job {job} could not be requeued ({cause}); start it again with ckpt_path=auto"
    return f"Slurm job {job} was requeued; with ckpt_path=auto and the same hydra.run.dir it will resume"
