"""Writes a policy as a Hugging Face folder: `adpo-jax export` for a clone that is not installed.

python scripts/export_hf.py --model runs/gsm8k/mine --out my-model
"""

import sys

from adpo_jax.export import run

if __name__ == "__main__":
    sys.exit(run())
