"""The schedule of rollouts ahead, simulated and with a model: tokens a second of both.

    python scripts/bench_simulation.py

Both are the trainer's own schedule (`adpo_jax.rollouts.pacing`). `simulate_rollouts.py` has in
place of a model what a step and a prefill cost. These costs are measured first, each alone: steps
of full slots with few and with many tokens behind them, and the start of samples with so many
tokens. Then `adpo_jax.rollouts.ahead.Ahead` decodes some iterations of completions whose lengths a
model of random weights draws, geometric and cut off; they are the same at any staleness, since
neither keys nor weights change. It does so twice, the first time to compile. Nothing is fitted to
these runs. One JSON line a staleness; idle_frac is the share of slots that decoded nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from option_types import integer, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import simulate_rollouts as simulation

from adpo_jax.devices.host_memory import tune_malloc
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.generation import LEAST_STEPS
from adpo_jax.engine.past import CHUNK_LENGTHS
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.policy import Policy
from adpo_jax.records import Prompts
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rollouts.ahead import Ahead
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import Sampler

PROMPT = 16
VOCAB = 512
FEW_STEPS = LEAST_STEPS // 4
REWARD = """
def odd(completions, **columns):
    return [float(i % 2) for i in range(len(completions))]
"""


class NoText:
    """A tokenizer whose tokens have no text."""

    eos_token_id = bos_token_id = pad_token_id = None

    def batch_decode(self, rows, skip_special_tokens):
        return ["" for _ in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--staleness", nargs="+", type=integer(0), default=[0, 1, 2, 4])
    parser.add_argument("--iterations", type=integer(1), default=6)
    parser.add_argument("--prompts", type=integer(1), default=8, help="of an iteration")
    parser.add_argument("--samples", type=integer(1), default=4, help="of a prompt")
    parser.add_argument("--slots", type=integer(1), default=8, help="8 never shrink")
    parser.add_argument(
        "--mean", type=real(above=0), default=40.0, help="tokens of a completion, about"
    )
    parser.add_argument("--cap", type=integer(1), default=256)
    parser.add_argument("--width", type=integer(1), default=768, help="of the model")
    parser.add_argument("--layers", type=integer(1), default=8)
    parser.add_argument("--repeats", type=integer(1), default=3)
    return parser.parse_args()


class Bench:
    """A model of random weights and its engine."""

    def __init__(self, a: argparse.Namespace):
        self.a = a
        hf_config = {
            "model_type": "qwen3",
            "hidden_size": a.width,
            "intermediate_size": 3 * a.width,
            "num_hidden_layers": a.layers,
            "num_attention_heads": a.width // 64,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": VOCAB,
        }
        self.policy, self.params = Policy.from_config(hf_config, jax.random.key(0))
        self.engines = {
            steps: Engine(
                self.policy,
                max_prompt_length=PROMPT,
                max_response_length=a.cap,
                num_slots=a.slots,
                steps_per_dispatch=steps,
            )
            for steps in (FEW_STEPS, LEAST_STEPS)
        }
        ends = range(max(1, round(VOCAB / a.mean)))
        self.sampling = SamplingParams(
            n=a.samples, max_tokens=a.cap, stop_token_ids=tuple(ends), temperature=0.1
        )

    def prompts_of(self, batch: int) -> Prompts:
        rng = np.random.default_rng(batch)
        return Prompts(rng.integers(0, VOCAB, (self.a.prompts, PROMPT)).tolist(), {})

    # --- what steps and prefills cost

    def start(self, begun: int, steps: int = LEAST_STEPS) -> tuple[float, list[float]]:
        """Seconds of the first dispatch of full slots, and of each later one.

        Args:
          begun: tokens that each sample has already.
          steps: of a dispatch.
        """
        a, rng = self.a, np.random.default_rng(0)
        endless = SamplingParams(n=a.samples, max_tokens=a.cap, ignore_eos=True)
        engine = self.engines[steps]
        with engine.session(self.params, endless, jax.random.key(0)) as session:
            for _ in range(a.slots // a.samples):
                tokens = rng.integers(0, VOCAB, (a.samples, begun)).tolist()
                session.submit(rng.integers(0, VOCAB, PROMPT).tolist(), tokens)
            seconds = []
            while session.num_decoding:
                began = time.perf_counter()
                session.step()
                seconds.append(time.perf_counter() - began)
        return seconds[0], seconds[1:-1]

    def costs(self) -> dict[str, float]:
        """What `simulate_rollouts.py` wants to know, in its units."""
        a, few, many = self.a, *CHUNK_LENGTHS[:2]
        steady = ((0, FEW_STEPS), (0, LEAST_STEPS), (a.cap // 2, LEAST_STEPS))
        measured = {
            start: [self.start(*start) for _ in range(a.repeats + 1)][1:]
            for start in (*steady, (few, LEAST_STEPS), (many, LEAST_STEPS))
        }
        first = {
            start: statistics.median(seconds for seconds, _ in runs)
            for start, runs in measured.items()
        }
        # A dispatch takes dispatch_s + steps * (step_s + tokens * token_s), by least squares.
        rows, later = [], []
        for begun, steps in steady:
            medians = np.median([seconds for _, seconds in measured[begun, steps]], axis=0)
            behind = a.slots * (begun + steps * (np.arange(len(medians)) + 1.5))
            rows += [[1.0, steps, steps * tokens] for tokens in behind]
            later += medians.tolist()
        dispatch_s, step_s, token_s = np.linalg.lstsq(np.array(rows), np.array(later))[0]

        def start_s(begun: int) -> float:
            """Seconds that samples with so many tokens take before they decode."""
            behind = a.slots * (begun + LEAST_STEPS / 2)
            decoding = dispatch_s + LEAST_STEPS * (step_s + behind * token_s)
            return first[begun, LEAST_STEPS] - decoding

        rate = a.slots * (many - few) / max(start_s(many) - start_s(few), 1e-9)
        # One call for prompts, and one more for what samples have.
        prompts = a.slots // a.samples * PROMPT
        calls = [start_s(0) - prompts / rate, (start_s(few) - (prompts + few * a.slots) / rate) / 2]
        return {
            "step_ms": 1e3 * step_s,
            "dispatch_ms": max(1e3 * dispatch_s, 0.0),
            "token_ns": max(1e9 * token_s, 0.0),
            "prefill_tokens_per_s": rate,
            "prefill_call_ms": max(1e3 * float(np.mean(calls)), 0.0),
        }

    # --- the schedule with the model

    def run(self, staleness: int, folder: Path) -> tuple[float, np.ndarray, float]:
        """Seconds of all iterations, the lengths of the groups [groups, G], and the idle share."""
        a, reward = self.a, folder / "reward.py"
        reward.write_text(REWARD)
        sampler = Sampler(
            self.engines[LEAST_STEPS],
            self.sampling,
            NoText(),
            RewardModel([RewardFunction(str(reward), "odd")]),
            seed=0,
            keep_sample=lambda *_: None,
        )
        source = Ahead(
            sampler,
            self.prompts_of,
            folder / "in_flight",
            Pacing(a.prompts, staleness, staleness * a.prompts, a.iterations),
        )
        seconds, lengths, idle = 0.0, [], []
        for step in range(a.iterations):
            began = time.perf_counter()
            found = source.next(step, self.params)
            seconds += time.perf_counter() - began
            lengths.append(found.sequences.lengths)
            idle.append(found.metrics["ahead/idle_frac"])
        return seconds, np.concatenate(lengths), float(np.mean(idle))


def main() -> None:
    a = arguments()
    bench = Bench(a)
    costs = bench.costs()
    print(json.dumps({name: round(value, 4) for name, value in costs.items()}), flush=True)
    settings = argparse.Namespace(
        **costs, prompts=a.prompts, samples=a.samples, hosts=1, slots=a.slots, ahead=0,
        iterations=a.iterations, dispatch=LEAST_STEPS, prompt_tokens=PROMPT,
    )  # fmt: skip
    in_order = None
    for staleness in a.staleness:
        with tempfile.TemporaryDirectory() as folder:
            bench.run(staleness, Path(folder))
            seconds, lengths, idle = bench.run(staleness, Path(folder))
        in_order = lengths if in_order is None else in_order
        assert lengths.sum() == in_order.sum(), "the completions differ"
        made = simulation.simulated(settings, staleness, in_order)
        measured = lengths.sum() / seconds
        line = {
            "staleness": staleness,
            "tokens_per_s": round(measured, 1),
            "simulated_tokens_per_s": made["tokens_per_s"],
            "simulated_over_measured": round(made["tokens_per_s"] / measured, 3),
            "idle_frac": round(idle, 4),
            "simulated_idle_frac": made["idle_frac"],
            "prefilled_again_frac": made["prefilled_again_frac"],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    tune_malloc()
    main()
