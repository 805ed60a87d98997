"""Simulates rollouts ahead of the update: tokens a second and idle slots by staleness, no model.

    python scripts/simulate_rollouts.py                        the first table of docs/ahead.md
    python scripts/simulate_rollouts.py --hosts 1 --slots 64 --step-ms 2 --token-ns 0
    python scripts/simulate_rollouts.py --metrics RUN/metrics.jsonl        lengths like a run's

The schedule is the trainer's own (`adpo_jax.rollouts.pacing`): hosts decode their own groups, and
after each window of steps wait for each other and look whether the iteration has its groups. A
group has a prefix row of its host until its last sample ends, and there are as many rows as the
engine has. The slots of a host take a step together, in `--step-ms` milliseconds and `--token-ns`
nanoseconds for each token that its live samples have; after `--dispatch` steps, or when samples of
an eighth of the slots have ended and others wait, the host is asked for more, in `--dispatch-ms`.
Lengths are lognormal with `--mean` and `--sigma`, cut off at `--cap`. What goes on under new
weights is prefilled again in pieces, as the engine cuts and pads them, at `--prefill-tokens-per-s`
a host and `--prefill-call-ms` a call; so are prompts, of `--prompt-tokens` each, when the first of
their samples gets a slot. The update is not counted.
One JSON line a staleness. `scripts/bench_simulation.py` holds it against the schedule with a model.

The defaults are an 8B model on v5p-128: 16 hosts of 4 chips, each with weights of 16.4 GB read once
a step and 147 kB of keys and values a token, at 80% of the bandwidth of 4 x 2.765 TB/s.
"""

import argparse
import heapq
import json
import sys
from pathlib import Path

import numpy as np
from option_types import integer, listed, real

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adpo_jax.engine.cache_plan import prefix_rows
from adpo_jax.engine.generation import LEAST_STEPS
from adpo_jax.engine.past import CHUNK_LENGTHS, chunk_length
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.rollouts.pacing import WINDOW, Pacing, shared_out


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--staleness", type=listed(integer(0)), default="0,1,2,4")
    parser.add_argument("--iterations", type=integer(1), default=40)
    parser.add_argument(
        "--prompts", type=integer(1), default=64, help="of an iteration, on all hosts"
    )
    parser.add_argument("--samples", type=integer(1), default=16, help="of a prompt")
    parser.add_argument("--hosts", type=integer(1), default=16)
    parser.add_argument("--slots", type=integer(1), default=64, help="of a host")
    parser.add_argument("--mean", type=real(above=0), default=8000.0, help="tokens of a completion")
    parser.add_argument(
        "--sigma", type=real(least=0), default=0.8, help="of the logarithm of the lengths"
    )
    parser.add_argument("--cap", type=integer(1), default=30_000)
    parser.add_argument("--step-ms", type=real(least=0), default=1.85)
    parser.add_argument("--token-ns", type=real(least=0), default=16.6)
    parser.add_argument("--prefill-tokens-per-s", type=real(above=0), default=60_000.0)
    parser.add_argument("--prefill-call-ms", type=real(least=0), default=0.0)
    parser.add_argument("--prompt-tokens", type=real(least=0), default=0.0)
    parser.add_argument("--ahead", type=integer(0), default=0, help="groups; 0 for all that it may")
    parser.add_argument(
        "--dispatch", type=integer(1), default=LEAST_STEPS, help="the most steps of one"
    )
    parser.add_argument("--dispatch-ms", type=real(least=0), default=0.0)
    parser.add_argument("--seed", type=integer(0), default=0)
    parser.add_argument("--metrics", default="", help="a run's file, whose lengths are taken")
    a = parser.parse_args()
    if a.step_ms == a.token_ns == 0:
        parser.error("--step-ms and --token-ns are both 0, and a step takes some time; set one")
    return a


def fit_lengths(a) -> None:
    """Sets the mean and the cap of the lengths to those of a run."""
    lengths = {"rollout/length_mean", "rollout/length_max"}
    try:
        rows = [row for row in read_jsonl(a.metrics) if lengths <= row.keys()]
    except OSError as error:
        raise SystemExit(f"--metrics: {error}") from None
    if not rows:
        raise SystemExit(
            f"--metrics: {a.metrics} has no row with {' and '.join(sorted(lengths))}; give a "
            "trainer's metrics.jsonl"
        )
    a.mean = float(np.mean([row["rollout/length_mean"] for row in rows]))
    a.cap = int(max(row["rollout/length_max"] for row in rows))


class Host:
    """The slots of a host and its groups in flight.

    Args:
      lengths: [groups of the run, G] int, tokens of each completion.
    """

    def __init__(self, a, lengths: np.ndarray):
        self.a, self.lengths = a, lengths
        self.left: dict[int, list[int]] = {}  # of each sample of a group in flight, 0 at its end
        self.slot_steps = self.live_steps = self.prefilled = 0
        self.rows = prefix_rows(a.slots, a.samples)

    def begin(self, new: list[int]) -> None:
        """Takes new groups in; what goes on waits for its slot before them."""
        self.left |= {n: self.lengths[n].tolist() for n in new}
        self.waiting = [(n, i) for n, group in self.left.items() for i in range(len(group))]
        self.waiting = [(n, i) for n, i in self.waiting if self.left[n][i]][::-1]
        self.now, self.live, self.tokens = 0, [], 0  # live: a heap of (last step, group, sample)
        self.in_rows: dict[int, int] = {}  # of groups with a row, how many samples have not ended

    def _there(self, n: int, i: int) -> int:
        """Tokens that a sample has."""
        return int(self.lengths[n][i]) - self.left[n][i]

    def window(self, most_steps: int) -> float:
        """Decodes so many steps, or as long as anything is left; returns the seconds."""
        a, until, seconds = self.a, self.now + most_steps, 0.0
        while self.now < until:
            seconds += self._fill()
            if not self.live:
                break
            steps = min(a.dispatch, until - self.now)
            if self.waiting:
                ends = heapq.nsmallest(max(1, a.slots // 8), self.live)
                steps = min(steps, ends[-1][0] - self.now)
            mean_tokens = self.tokens + len(self.live) * steps / 2
            seconds += steps * (a.step_ms / 1e3 + mean_tokens * a.token_ns / 1e9)
            seconds += a.dispatch_ms / 1e3
            self.slot_steps += steps * a.slots
            self.live_steps += steps * len(self.live)
            self.tokens += steps * len(self.live)
            self.now += steps
            while self.live and self.live[0][0] <= self.now:
                last, n, i = heapq.heappop(self.live)
                self.live_steps -= self.now - last
                self.tokens -= int(self.lengths[n][i]) + self.now - last
                self.left[n][i] = 0
                self.in_rows[n] -= 1
                if not self.in_rows[n]:
                    del self.in_rows[n]
        return seconds

    def _fill(self) -> float:
        """Starts samples in free slots; returns the seconds that their prefill takes."""
        a, prompts, again, padded, calls = self.a, 0, 0, 0, set()
        while self.waiting and len(self.live) < a.slots:
            n, i = self.waiting[-1]
            if n not in self.in_rows:
                if len(self.in_rows) == self.rows:
                    break
                self.in_rows[n] = sum(left > 0 for left in self.left[n])
                prompts += 1
            self.waiting.pop()
            heapq.heappush(self.live, (self.now + self.left[n][i], n, i))
            there = self._there(n, i)
            again += there
            rounds, rest = divmod(there, CHUNK_LENGTHS[-1])
            lengths = [CHUNK_LENGTHS[-1]] * rounds + [chunk_length(rest)] * bool(rest)
            calls |= set(enumerate(lengths))
            padded += sum(lengths)
        self.prefilled += again
        self.tokens += again
        tokens = prompts * a.prompt_tokens + padded
        num_calls = len(calls) + bool(prompts)
        return num_calls * a.prefill_call_ms / 1e3 + tokens / a.prefill_tokens_per_s

    @property
    def whole(self) -> list[int]:
        return [n for n, group in self.left.items() if not any(group)]

    def end(self, chosen: list[int]) -> None:
        """Ends the iteration: what is not chosen stays in flight."""
        for last, n, i in self.live:
            self.left[n][i] = last - self.now
        for n in set(chosen) & self.left.keys():
            del self.left[n]


def drawn_lengths(a) -> np.ndarray:
    """[groups of the run, G] int, tokens of each completion."""
    rng = np.random.default_rng(a.seed)
    mu = np.log(a.mean) - a.sigma**2 / 2
    lengths = rng.lognormal(mu, a.sigma, (a.prompts * a.iterations, a.samples))
    return np.clip(lengths, 1, a.cap).astype(int)


def simulated(a, staleness: int, lengths: np.ndarray) -> dict:
    """The figures of one run.

    Args:
      lengths: [groups of the run, G] int, tokens of each completion.
    """
    P = a.prompts
    ahead = min(a.ahead or staleness * P, staleness * P)
    pacing = Pacing(P, staleness, ahead, num_steps=a.iterations)
    hosts = [Host(a, lengths) for _ in range(a.hosts)]
    admitted_at, owners, following, seconds, ages = {}, {}, 0, 0.0, []
    for step in range(a.iterations):
        new = pacing.admitted(step, following, len(admitted_at))
        following += len(new)
        admitted_at |= dict.fromkeys(new, step)
        owners |= shared_out(new, owners.values(), a.hosts)
        for number, host in enumerate(hosts):
            host.begin([n for n in new if owners[n] == number])
        while True:
            whole = [n for host in hosts for n in host.whole]
            chosen = pacing.chosen(step, admitted_at, whole)
            if chosen is not None:
                break
            seconds += max(host.window(WINDOW if a.hosts > 1 else a.dispatch) for host in hosts)
        for host in hosts:
            host.end(chosen)
        for n in chosen:
            ages.append(step - admitted_at.pop(n))
            del owners[n]
    live, all_slots = (sum(getattr(h, n) for h in hosts) for n in ("live_steps", "slot_steps"))
    return {
        "staleness": staleness,
        "ahead": ahead,
        "tokens_per_s": round(lengths.sum() / seconds, 1),
        "seconds_an_iteration": round(seconds / a.iterations, 2),
        "idle_frac": round(1 - live / all_slots, 4),
        "staleness_mean": round(float(np.mean(ages)), 3),
        "staleness_max": max(ages),
        "prefilled_again_frac": round(sum(h.prefilled for h in hosts) / lengths.sum(), 4),
    }


def main():
    a = arguments()
    if a.metrics:
        fit_lengths(a)
    names = ("prompts", "samples", "hosts", "slots", "mean", "sigma", "cap")
    base = None
    for staleness in a.staleness:
        found = simulated(a, staleness, drawn_lengths(a))
        base = base or found["tokens_per_s"]
        ratio = {"ratio": round(found["tokens_per_s"] / base, 3) if base else None}
        print(json.dumps({name: getattr(a, name) for name in names} | found | ratio))


if __name__ == "__main__":
    main()
