"""From a TRL GRPOConfig to a command of ours: `python scripts/from_trl.py config.json`."""

import sys

from gspo_lightning.migrate.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
