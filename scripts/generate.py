"""Samples completions from a model: `adpo-jax generate` for a clone that is not installed.

python scripts/generate.py --model Qwen/Qwen3-0.6B --prompt "What is 12 x 13?" --n 8
"""

import sys

from adpo_jax.generate import run

if __name__ == "__main__":
    sys.exit(run())
