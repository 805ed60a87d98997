"""Writes a trained policy as a Hugging Face folder, and uploads it if asked to.

    adpo-jax export --model runs/gsm8k/mine --out my-model
    adpo-jax export --model runs/gsm8k/mine/checkpoints/50 --out my-model
    HF_TOKEN=... adpo-jax export --model runs/mine --out m --push-to-hub me/my-model

`--model` is the folder of a run, one of its checkpoints, or a Hugging Face folder. What comes out
is the layout of transformers; tests load it there and compare the logits. vLLM and others read that
layout too, which has not been tried. An upload goes to a private repository, made if it is not
there; the token is that of the environment variable HF_TOKEN or of `hf auth login`.
"""

import argparse
import sys

from adpo_jax.log.printable import say_error
from adpo_jax.run.command_line import Parser, begin, json_object, unless_interrupted, with_cure
from adpo_jax.run.config_files import run_of, user_path
from adpo_jax.run.exit_codes import USER_ERROR


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = Parser(prog="adpo-jax export", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="run, checkpoint or Hugging Face folder")
    parser.add_argument(
        "--out", required=True, type=user_path, help="a folder that is not there yet"
    )
    parser.add_argument(
        "--dtype",
        help="of the weights: float32 or bfloat16; if not given, float32, or bfloat16 where the "
        "model came in MXFP4",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run its tokenizer's own code"
    )
    parser.add_argument(
        "--override-config",
        type=json_object,
        metavar="JSON",
        help="keys of config.json with other values; null leaves a key out",
    )
    parser.add_argument("--push-to-hub", metavar="NAME", help="user/model to upload to")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    return parser.parse_args(argv)


def export(a: argparse.Namespace) -> None:
    """Reads, writes, uploads.

    Raises:
      ValueError: for a model that cannot be read, a folder that is there, a failed upload.
      OSError: for a folder that cannot be written.
    """
    import jax  # after the arguments, so that --help is quick

    from adpo_jax import pretrained
    from adpo_jax.hf import folders

    if a.dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is float32 or bfloat16; given {a.dtype!r}")
    if a.out.exists():
        raise ValueError(f"{a.out} is there already; give another --out")
    if run := run_of(str(a.out)):
        raise ValueError(
            f"{a.out} is a folder that the run in {run} writes itself; give another --out"
        )
    model = pretrained.load(
        a.model,
        dtype=a.dtype or "float32",
        trust_remote_code=a.trust_remote_code,
        override_config=a.override_config,
        keep_base_dtype=True,
        for_prompts=False,
    )
    dtype = a.dtype or model.policy.dtype_on_disk.name
    model.policy.save_pretrained(a.out, model.params, model.tokenizer, dtype=dtype)
    if model.policy.lora:
        print(f"the adapters were merged into base weights of {model.policy.param_dtype}")
    size = sum(x.size for x in jax.tree.leaves(model.params))
    print(f"{a.out}: {size:,} parameters in {dtype}, from {model.source}")
    if a.push_to_hub:
        print(folders.push_folder(a.out, a.push_to_hub, private=not a.public))


def main() -> int:
    """Exports what the command line names; returns the exit code."""
    a = arguments()
    try:
        export(a)
    except OSError as error:
        say_error(with_cure(error, a.out, "writes it"))
        return USER_ERROR
    except ValueError as error:
        say_error(error)
        return USER_ERROR
    return 0


def run() -> int:
    """Runs `adpo-jax export`; returns the exit code."""
    begin()
    return main()


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
