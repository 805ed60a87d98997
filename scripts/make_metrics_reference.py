"""Writes the table of the algorithms' metrics in docs/metrics.md, from what they declare.

    python scripts/make_metrics_reference.py

The rest of the page is written by hand.
"""

import sys
from pathlib import Path

from adpo_jax.losses import ALGORITHMS, Algorithm, Metric
from adpo_jax.losses.algorithm import OVER

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"

BEGIN = "<!-- Written by scripts/make_metrics_reference.py; do not edit it here. -->\n"
END = "<!-- End of what is written by a script. -->\n"


def table() -> str:
    """The rows of all algorithms; what means the same as under the first is told once."""
    first, *_ = ALGORITHMS
    known = ALGORITHMS[first].declared_metrics()
    lines = ["| name | unit | when | meaning |", "| --- " * 4 + "|"]
    for algorithm in ALGORITHMS.values():
        told = {}
        for metric in algorithm.declared_metrics():
            name = f"`{algorithm.name}/{metric.name}`"
            if algorithm.name != first and metric in known:
                told.setdefault(_when(algorithm, metric), []).append(name)
            else:
                meaning = f"{metric.meaning} ({OVER[metric.over]})"
                lines.append(f"| {name} | {metric.unit} | {_when(algorithm, metric)} | {meaning} |")
        for when, names in told.items():
            lines.append(f"| {', '.join(names)} | | {when} | as under {first} |")
    return "\n".join(lines) + "\n"


def _when(algorithm: type[Algorithm], metric: Metric) -> str:
    return algorithm.name + (f", with `{metric.needs}`" if metric.needs else "")


def reference() -> str:
    """The text of docs/metrics.md."""
    before, _, rest = REFERENCE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    REFERENCE.write_text(reference(), encoding="utf-8")
    print(f"{REFERENCE}: metrics of {', '.join(ALGORITHMS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
