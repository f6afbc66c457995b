"""Probes of every ``_target_`` in ``conf/``, see `base`."""

from tests.conf.probes import data, dialogue, engines, others, rewards
from tests.conf.probes.base import Probe

PROBES = [*rewards.PROBES, *data.PROBES, *engines.PROBES, *others.PROBES, *dialogue.PROBES]

__all__ = ["PROBES", "Probe"]
