"""Measures loading of large data files: seconds before the first iteration, and peak memory.

    python scripts/bench_data.py [--rows 300000 1000000] [--source gsm8k/train.jsonl]
        [--tokenizer FOLDER] [--keep FOLDER]

Prints one JSON line a result. Each is measured in a process of its own, which loads the training
prompts, digests them as a run does, and takes those of the first iteration; the first time nothing
is in the cache, the second time everything is. The rows are those of `--source` over and over, each
with a number before its question; without `--source` they are made up, in GSM8K's lengths. The
tokenizer is that of a Hugging Face folder, or a byte-level one with a chat template.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from option_types import integer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(source: str | None, num_rows: int, path: Path) -> None:
    """Writes a .jsonl file of so many rows."""
    if source:
        lines = Path(source).read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
        originals = [json.loads(line) for line in lines if line.strip()]
        if not originals:
            raise ValueError(f"--source {source} has no rows")
    else:
        text = "A baker sells rolls and loaves on a market day. "
        originals = [
            {"question": text * (3 + n % 5), "answer": f"{'So. ' * 60}#### {n}"}
            for n in range(1000)
        ]
    with path.open("w") as file:
        for number in range(num_rows):
            row = dict(originals[number % len(originals)])
            row["question"] = f"{number}: {row['question']}"
            file.write(json.dumps(row) + "\n")


def name_of(source: str | None) -> str:
    """What the name of a file of rows says of the rows that they are made of."""
    return f"-{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]}" if source else ""


def make_tokenizer(folder: str | None):
    """The tokenizer of a folder, or a byte-level one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder:
        return AutoTokenizer.from_pretrained(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        vocab_size=4000,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["How many apples are there in a week? "] * 10, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def measure(path: str, tokenizer_folder: str | None, cache: str) -> dict:
    """Seconds and memory of everything that a run does with its prompts before iteration 1."""
    from adpo_jax.config import default_config
    from adpo_jax.data.order import prompt_indices
    from adpo_jax.run import datasets

    tokenizer = make_tokenizer(tokenizer_folder)
    config = default_config()
    config.data.train_files = path
    if "cache_dir" in config.data:
        config.data.cache_dir = cache
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started, cpu = time.perf_counter(), time.process_time()
    prompts = datasets.load_prompts(config, tokenizer, path, split="train")
    prompts.digest()
    rows = prompt_indices(0, seed=0, num_rows=len(prompts), batch_size=128)
    prompts.select(rows)
    return {
        "rows": len(prompts),
        "file_mb": round(Path(path).stat().st_size / 1e6),
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "of_imports_gib": round(before, 2),
    }


def main() -> None:
    """Runs the measurements that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=integer(1), nargs="+", default=[300_000, 1_000_000])
    parser.add_argument("--source")
    parser.add_argument("--tokenizer")
    parser.add_argument("--keep", help="the folder for the files; a temporary one if not given")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], args.tokenizer, args.measure[1])))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for num_rows in args.rows:
            path = folder / f"rows-{num_rows}{name_of(args.source)}.jsonl"
            if not path.exists():
                unfinished = path.with_suffix(".tmp")
                make_rows(args.source, num_rows, unfinished)
                unfinished.rename(path)
            for cached in (False, True):
                argv = [sys.executable, __file__, "--measure", str(path), f"{temporary}/cache"]
                argv += ["--tokenizer", args.tokenizer] if args.tokenizer else []
                result = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(result.stdout.splitlines()[-1])
                print(json.dumps({"cached": cached} | found), flush=True)


if __name__ == "__main__":
    main()
