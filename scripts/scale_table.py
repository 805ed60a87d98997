"""What a dry run says of models on machines that are not there: the table of docs/scale.md.

    python scripts/scale_table.py                          all rows, about half an hour of CPU time
    python scripts/scale_table.py --machines h100:1,h100:8

A row is configs/gsm8k.py with a model of configs/models, of which the shapes alone are read: what
one device holds at the peak, how evenly products are spread, the floor of an iteration and its
forecast. Needs the compilers of the machines ([tpu-aot], [gpu-aot]); a row whose compiler is
missing says so. Nothing runs.
"""

import argparse
import gc
import runpy
import sys
import time
from pathlib import Path

from option_types import among, listed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from ml_collections import ConfigDict

from adpo_jax.dry_run import dry_run
from adpo_jax.engine.cache_plan import readable

ROOT = Path(__file__).resolve().parents[1]
MICRO, BATCH = "trainer.per_device_train_batch_size", "data.train_batch_size"
TENSOR = "actor_rollout_ref.rollout.tensor_model_parallel_size"
LORA = "actor_rollout_ref.model.lora_rank"
# Machine, model, and what differs from configs/gsm8k.py.
ROWS = [
    ("h100:1", "qwen3-0.6b", {}),
    ("h100:1", "qwen3-1.7b", {}),
    ("h100:8", "qwen3-8b", {}),
    ("h100:8", "qwen3-8b", {LORA: 32}),
    ("v5e:2x4", "qwen3-0.6b", {}),
    ("v5p:4x4x4", "qwen3-8b", {TENSOR: 4, MICRO: 8}),
    ("v6e:8x8", "qwen3-8b", {TENSOR: 4, MICRO: 8}),
    ("v5p:4x4x8", "qwen3-32b", {TENSOR: 4, MICRO: 8, BATCH: 128}),
    ("v6e:16x16", "qwen3-32b", {TENSOR: 4, MICRO: 8, BATCH: 256}),
    ("tpu7x:4x4x4", "qwen3-32b", {TENSOR: 4, MICRO: 8, BATCH: 128}),
]
MACHINES = tuple(dict.fromkeys(row[0] for row in ROWS))
HEADER = ["machine", "model", "changes", "fits", "peak of a device", "FLOPs balance"]
HEADER += ["floor", "forecast", "launches", "built"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--machines", type=listed(among(MACHINES)), default=",".join(MACHINES))
    return parser.parse_args()


def config_of(model: str, changes: dict) -> ConfigDict:
    config = runpy.run_path(str(ROOT / "configs" / "gsm8k.py"))["get_config"]()
    config.actor_rollout_ref.model.path = str(ROOT / "configs" / "models" / model)
    config.update_from_flattened_dict(changes)
    return config


def seconds(found: float) -> str:
    return f"{found:.3g} s"


def cells(machine: str, model: str, changes: dict) -> list[str]:
    """The cells of a row."""
    shown = ", ".join(f"`{key.rpartition('.')[2]}={value}`" for key, value in changes.items())
    started = time.perf_counter()
    try:
        report = dry_run(config_of(model, changes), machine)
    except ValueError as error:
        return [machine, model, shown, str(error)]
    finally:
        jax.clear_caches()
        gc.collect()
    built = time.perf_counter() - started
    if report.failed:
        return [machine, model, shown, "no: " + "; ".join(report.failed.values())]
    at = max(report.peaks, key=report.peaks.get)
    forecasts = [p.forecast_s for p in report.programs]
    return [
        machine,
        model,
        shown,
        "yes" if report.fits else "no",
        f"{readable(report.peak)} of {readable(report.memory)}, in {at}",
        ", ".join(f"{p.balance:.3f} ({p.name})" for p in report.programs),
        seconds(sum(p.floor_s(report.chip) for p in report.programs)),
        "-" if None in forecasts else seconds(sum(forecasts)),
        ", ".join(f"{p.launches:,} ({p.name})" for p in report.programs) if report.chip.gpu else "",
        f"{built:.0f} s",
    ]


def main() -> None:
    machines = arguments().machines
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER), flush=True)
    for machine, model, changes in ROWS:
        if machine in machines:
            print("| " + " | ".join(cells(machine, model, changes)) + " |", flush=True)


if __name__ == "__main__":
    main()
