"""Writes a trained policy as a Hugging Face folder, and uploads it if asked to.

    python scripts/export_hf.py --model runs/gsm8k/mine --out my-model
    python scripts/export_hf.py --model runs/gsm8k/mine/checkpoints/50 --out my-model
    HF_TOKEN=... python scripts/export_hf.py --model runs/mine --out m --push-to-hub me/my-model

`--model` is the folder of a run, one of its checkpoints, or a Hugging Face folder. What comes out
is the layout of transformers; tests load it there and compare the logits. vLLM and others read that
layout too, which has not been tried. An upload goes to a private repository, made if it is not
there; the token is that of the environment variable HF_TOKEN or of `hf auth login`.
"""

import argparse
import json
import sys
from pathlib import Path

import jax

from adpo_jax import pretrained
from adpo_jax.hf import folders


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="run, checkpoint or Hugging Face folder")
    parser.add_argument("--out", required=True, type=Path, help="a folder that is not there yet")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 or bfloat16")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run its tokenizer's own code"
    )
    parser.add_argument(
        "--override-config",
        type=_json_object,
        metavar="JSON",
        help="keys of config.json with other values; null leaves a key out",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="user/model to upload to")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser.parse_args(argv)


def _json_object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"wanted a JSON object, given {text!r}")
    return value


def export(a: argparse.Namespace) -> None:
    """Reads, writes, uploads.

    Raises:
      ValueError: for a model that cannot be read, a folder that is there, a failed upload.
    """
    if a.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"--dtype is float32 or bfloat16; given {a.dtype!r}")
    if a.out.exists():
        raise ValueError(f"{a.out} is there already; give another --out")
    model = pretrained.load(
        a.model,
        dtype=a.dtype,
        trust_remote_code=a.trust_remote_code,
        override_config=a.override_config,
        keep_base_dtype=True,
    )
    model.policy.save_pretrained(a.out, model.params, model.tokenizer, dtype=a.dtype)
    if model.policy.lora:
        print(f"the adapters were merged into base weights of {model.policy.param_dtype}")
    size = sum(x.size for x in jax.tree.leaves(model.params))
    print(f"{a.out}: {size:,} parameters in {a.dtype}, from {model.source}")
    if a.push_to_hub:
        print(folders.push_folder(a.out, a.push_to_hub, private=not a.public))


def main() -> int:
    try:
        export(arguments())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
