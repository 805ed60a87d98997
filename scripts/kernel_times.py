"""The kernels of a profile by the time that they took on the GPU.

    python scripts/bench_device.py --parts update --trace /tmp/trace
    python scripts/kernel_times.py /tmp/trace --steps 1

FOLDER is what `jax.profiler.trace` wrote, as a run does for `trainer.profile_steps`.
One JSON line for all (milliseconds a step in which a kernel ran, and between the first and the last
of them), then one a kind of kernel, the dearest first: its launches and milliseconds a step.
Kernels of one kind differ in the number behind their name. At last the longest times in which none
ran, and which kernels ran before and after; shorter ones are launches.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import jax
from option_types import integer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=integer(1), default=1, help="that the profile holds")
    parser.add_argument("--most", type=integer(1), default=30, help="kinds that are told")
    parser.add_argument("--gaps", type=integer(0), default=5, help="idle times that are told")
    return parser.parse_args()


def kernels_of(folder: Path) -> list[tuple[int, int, str]]:
    """(start, duration, name) of all kernels of all GPUs, nanoseconds, in order of start."""
    found = []
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            streams = [line for line in plane.lines if "Stream" in line.name]
            if "GPU" in plane.name:
                events = (event for line in streams for event in line.events)
                found += [(e.start_ns, e.duration_ns, e.name) for e in events]
    return sorted(found)


def main() -> int:
    a = arguments()
    kernels = kernels_of(a.folder)
    if not kernels:
        print(f"{a.folder} has no profile of a GPU: give what jax.profiler.trace wrote on one")
        return 2
    busy, end, last, gaps = 0, kernels[0][0], "", []
    kinds: dict[str, list[int]] = collections.defaultdict(list)
    for start, duration, name in kernels:
        if start > end:
            gaps.append((start - end, last, name))
        busy, end = busy + max(0, start + duration - max(end, start)), max(end, start + duration)
        last = name
        kinds[re.sub(r"[_.\d]+$", "", name)].append(duration)
    per_step = 1e6 * a.steps
    whole = {"busy_ms": busy / per_step, "span_ms": (end - kernels[0][0]) / per_step}
    print(json.dumps({name: round(value, 2) for name, value in whole.items()}))
    for name, each in sorted(kinds.items(), key=lambda kind: -sum(kind[1]))[: a.most]:
        line = {"kernel": name, "launches": len(each) / a.steps}
        print(json.dumps(line | {"ms": round(sum(each) / per_step, 3)}))
    for gap, before, after in sorted(gaps, reverse=True)[: a.gaps]:
        print(json.dumps({"idle_ms": round(gap / 1e6, 3), "after": before, "before": after}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
