"""Coming from another trainer: its configuration in, an equivalent command and YAML out."""

from gspo_lightning.migrate.convert import Conversion, Verdict, convert
from gspo_lightning.migrate.parse import parse_config

__all__ = ["Conversion", "Verdict", "convert", "parse_config"]
