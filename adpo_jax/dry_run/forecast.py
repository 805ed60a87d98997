"""How long an iteration may take: a bound that no run beats, and a forecast beside it.

The *bound* counts the least that the devices have to do: the arithmetic of the programs and of the
kernels within them, every weight read once a step, and of the cache the columns that a sample sees.
The *forecast* takes the programs as they are compiled, kernel after kernel, each at the peak or at
the bandwidth of the chip, and adds what a kernel costs to start, what collectives move over the
links while nothing else runs, and slots that wait for the longest sample. It knows neither hosts
nor the grading of answers.

How long completions are decides much of it. `Lengths` is a lognormal distribution, cut off at the
longest that is allowed, from a text that the user gives or from the metrics of a run.
"""

import dataclasses
import heapq
import json
import math
import os
import re
import statistics
from pathlib import Path

import numpy as np

# Seconds from one kernel of a GPU to the next, assumed and not measured; a program of a TPU is one
# kernel.
LAUNCH_S = {"gpu": 2e-6}
# Iterations at the end of metrics.jsonl that lengths are taken from.
RECENT = 10


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of completions, in tokens: lognormal and cut off.

    Attributes:
      mean: of the lengths before they are cut off.
      deviation: their standard deviation; 0 for one length.
      most: the length limit.
      source: where they are from, as text.
    """

    mean: float
    deviation: float
    most: int
    source: str

    def draw(self, count: int) -> np.ndarray:
        """`count` lengths, [count] int64: evenly spaced quantiles in a fixed random order."""
        spread = math.sqrt(math.log1p((self.deviation / self.mean) ** 2))
        middle = math.log(self.mean) - spread**2 / 2
        normal = statistics.NormalDist()
        z = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
        drawn = np.clip(np.rint(np.exp(middle + spread * z)), 1, self.most).astype(np.int64)
        return np.random.default_rng(0).permutation(drawn)


def read_lengths(text: str, most: int, samples: int) -> Lengths:
    """The lengths that a text means.

    Args:
      text: "" where every completion has the longest length, "MEAN" or "MEAN:DEVIATION" in tokens,
        or the path of a run's folder or metrics.jsonl.
      most: the longest length.
      samples: completions of an iteration of that run.

    Raises:
      ValueError: for another text, or a file without these metrics.
    """
    if not text:
        return Lengths(most, 0.0, most, "every completion has the longest length")
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(?::(\d{1,9}(?:\.\d{1,9})?))?", text):
        mean, deviation = (float(part or 0) for part in match.groups())
        if not 1 <= mean <= most:
            raise ValueError(
                f"the mean length of completions is 1 to data.max_response_length, {most}; given "
                f"{mean:g}"
            )
        return Lengths(mean, deviation, most, f"lengths of {mean:g} +- {deviation:g} tokens")
    path = Path(os.path.expanduser(text))
    path = path / "metrics.jsonl" if path.is_dir() else path
    return _of_metrics(path, most, samples)


def _of_metrics(path: Path, most: int, samples: int) -> Lengths:
    """The lengths of the last iterations of a run, from their mean and their longest."""
    names = ("rollout/length_mean", "rollout/length_max")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            "the lengths of completions are a mean, MEAN:DEVIATION, or the metrics.jsonl of a run; "
            f"given {str(path)!r:.200}: {type(error).__name__}"
        ) from error
    found = [
        [row[name] for name in names]
        for row in rows
        if isinstance(row, dict) and all(_is_length(row.get(name)) for name in names)
    ]
    if not found:
        raise ValueError(f"{str(path)!r:.200} has no iterations with {' and '.join(names)}")
    mean, longest = (statistics.fmean(each) for each in zip(*found[-RECENT:]))
    mean = min(max(mean, 1.0), most)
    # The longest of n lies where the distribution leaves 1/n above: top = middle + spread z with
    # middle = log(mean) - spread^2 / 2, of which the smaller solution is taken.
    z = statistics.NormalDist().inv_cdf(1 - 1 / max(samples, 2))
    above = math.log(max(longest, mean) / mean)
    spread = z - math.sqrt(max(z * z - 2 * above, 0.0))
    deviation = mean * math.sqrt(math.expm1(spread**2))
    return Lengths(mean, deviation, most, f"lengths of the last iterations of {path.name}")


def _is_length(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def decode_steps(lengths: np.ndarray, slots: int) -> int:
    """Steps until the last sample ends, where each free slot takes the next sample."""
    ends = [0] * slots
    for length in lengths.tolist():
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


@dataclasses.dataclass(frozen=True)
class Least:
    """What one call of a program cannot do without, on one device.

    Attributes:
      kernel_flops: operations within kernels, which the compiled program does not show.
      moved: bytes; None for the arguments and results of the program.
    """

    kernel_flops: int = 0
    moved: int | None = None


def causal_pairs(prompt: int, completion: int, samples: int) -> int:
    """Pairs of a token and one that it sees, in a prompt and its completions."""
    own = completion * (completion + 1) // 2 + completion * prompt
    return prompt * (prompt + 1) // 2 + samples * own
