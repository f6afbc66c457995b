"""An exported adapter and its base as one ordinary model folder.

    python scripts/merge_adapter.py outputs/<day>/<time>/model merged

Settings: `python scripts/merge_adapter.py --help`.
"""

from __future__ import annotations

import sys

from gspo_lightning.policy.merge import main

if __name__ == "__main__":
    sys.exit(main())
