"""Migration from another trainer: from its configuration to an equivalent command and YAML."""

from gspo_lightning.migrate.convert import Conversion, Verdict, convert
from gspo_lightning.migrate.parse import parse_config, parse_lora

__all__ = ["Conversion", "Verdict", "convert", "parse_config", "parse_lora"]
