"""Makes the tiny vision-language model of `experiment=gspo_qwen_vl_tiny` once and prints its folder.

    python scripts/make_tiny_vlm.py

It goes into the model cache (GSPO_CACHE, else ~/.cache/gspo_lightning); a run of the experiment makes it too.
"""

from __future__ import annotations

import argparse
import sys

from gspo_lightning.policy.bundled import main

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main(["tiny-vlm"]))
