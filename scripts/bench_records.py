"""Host memory of an iteration's completions, and of what an optimizer step is packed into.

    python scripts/bench_records.py
    python scripts/bench_records.py --prompts=64 --mean=1000 --cap=8000

No model runs. Lengths are lognormal. One JSON line: bytes that the process grew by, over the bytes
of the fields of the tokens that there are (`records.token_fields`, without the log-probs that only
truncated sampling keeps), and the same for the rectangle of repeated prompts that `records.Batch`
would be.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from adpo_jax.devices import host_memory
from adpo_jax.records import Completion, Completions, GradedGroups, Prompts, token_fields
from adpo_jax.rewards import Scores
from adpo_jax.update.packing import Packing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompts", type=integer(1), default=512)
    parser.add_argument("--gens", type=integer(1), default=16, help="completions of a prompt")
    parser.add_argument("--prompt_len", type=integer(1), default=512)
    parser.add_argument("--mean", type=real(above=0), default=4000, help="tokens of a completion")
    parser.add_argument(
        "--sigma", type=real(least=0), default=1.0, help="of the logarithm of the length"
    )
    parser.add_argument(
        "--cap", type=integer(1), default=33_000, help="tokens of the longest completion"
    )
    parser.add_argument(
        "--steps", type=integer(1), default=8, help="optimizer steps of the iteration"
    )
    a = parser.parse_args()
    if a.prompts % a.steps:
        parser.error(
            f"--prompts is a multiple of --steps; given {a.prompts} prompts in {a.steps} steps"
        )
    return a


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def lognormal(prompts: int, gens: int, mean: float, sigma: float, cap: int) -> np.ndarray:
    """Lengths [prompts, gens] of completions, the same every time."""
    median = mean / np.exp(sigma**2 / 2)
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, (prompts, gens))
    return np.clip(drawn, 1, cap).astype(int)


def field_bytes() -> int:
    """Bytes of the fields of a token, without the log-probs that only truncated sampling keeps."""
    fields = token_fields()
    return sum(dtype.itemsize for name, dtype in fields.items() if name != "full_log_probs")


def graded(lengths: np.ndarray, prompt_len: int) -> GradedGroups:
    """Records of completions with these lengths."""
    groups = [
        [
            Completion.sampled(np.full(n, 7, np.int32), np.full(n, -1.0, np.float32), "stop")
            for n in row
        ]
        for row in lengths
    ]
    columns = {"solution": [""] * len(lengths)}
    prompts = Prompts([[1] * prompt_len for _ in lengths], columns)
    scores = Scores(np.zeros(lengths.size, np.float32), {}, {})
    return GradedGroups(prompts, Completions(groups), [""] * lengths.size, scores)


def main() -> None:
    a = arguments()
    host_memory.tune_malloc()
    lengths = lognormal(a.prompts, a.gens, a.mean, a.sigma, a.cap)
    wanted = int(lengths.sum()) * field_bytes()
    host_memory.give_back()
    before = resident()
    batch = graded(lengths, a.prompt_len)
    host_memory.give_back()
    records = resident() - before

    size = a.prompts // a.steps
    sequences = batch.sequences.select(range(size))
    started = time.perf_counter()
    before = resident()
    packing = Packing(sequences, completions_per_micro=a.gens, full_length=a.cap)
    packed = packing.batch(sequences)
    step_bytes = resident() - before
    result = {
        "prompts": a.prompts,
        "gens": a.gens,
        "tokens": int(lengths.sum()),
        "field_bytes_a_token": wanted // int(lengths.sum()),
        "records_mb": round(records / 1e6),
        "records_ratio": round(records / wanted, 3),
        "step_mb": round(step_bytes / 1e6),
        "step_ratio": round(step_bytes / (wanted * sequences.lengths.sum() / lengths.sum()), 3),
        "step_pack_s": round(time.perf_counter() - started, 2),
        "step_micro_batches": int(packed.num_micro_B[0]),
        "rectangle_mb": round(lengths.size * ((a.prompt_len + a.cap) * 8 + a.cap * 8) / 1e6),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
