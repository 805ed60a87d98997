"""Which mesh for which model, length and machine: a table made by the dry run.

    python scripts/mesh_table.py --topologies h100:8 --models qwen3-0.6b,qwen3-8b \\
        --lengths 4096,32768

For each model of configs/models, machine and length of completions, every cut of the machine's
devices into `fsdp` and `sequence` is compiled, with as many completions a micro-batch as make
--tokens tokens a device, at least one. All take the same optimizer step of 8 prompts x 8
completions with gradient_checkpointing=full. A row says what the update takes of a device's memory,
by its compiler, and the forecast of its speed: completion tokens a second of the whole machine. The
fastest that fits is bold. Nothing runs. Needs the compilers of the machines ([tpu-aot], [gpu-aot]).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from adpo_jax.config import default_config
from adpo_jax.devices.topologies import topology_devices
from adpo_jax.dry_run import dry_run
from adpo_jax.engine.cache_plan import readable

PROMPTS = GENERATIONS = 8
HEADER = ["model", "machine", "completion", "mesh", "tokens a device", "peak", "tokens/s"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", default="h100:8")
    parser.add_argument("--models", default="qwen3-0.6b,qwen3-8b")
    parser.add_argument("--lengths", default="4096,32768")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch, a device")
    return parser.parse_args()


def config_of(model: str, length: int, fsdp: int, sequence: int, tokens: int) -> ConfigDict:
    """An iteration with one optimizer step."""
    config = default_config()
    config.mesh.fsdp, config.mesh.sequence = fsdp, sequence
    config.data.train_files = "embedded:arithmetic"
    config.data.train_batch_size = PROMPTS
    config.data.max_response_length = length
    config.algorithm.num_generations = GENERATIONS
    config.trainer.gradient_checkpointing = "full"
    config.trainer.per_device_train_batch_size = completions(length, sequence, tokens)
    config.trainer.test_freq = -1
    rollout = config.actor_rollout_ref.rollout
    config.actor_rollout_ref.model.path = f"configs/models/{model}"
    rollout.num_slots, rollout.tensor_model_parallel_size = GENERATIONS, 0
    return config


def completions(length: int, sequence: int, tokens: int) -> int:
    """Those of a micro-batch."""
    return max(min(sequence * tokens // length, PROMPTS * GENERATIONS), 1)


def rows(model: str, topology: str, length: int, tokens: int) -> Iterator[list[str]]:
    """A row of cells for each mesh, the fastest that fits in bold; they come when all are known."""
    count, found = len(topology_devices(topology)), []
    for sequence in (2**i for i in range(count.bit_length())):
        fsdp = count // sequence
        if fsdp > PROMPTS:
            continue  # fewer prompts than devices that want one
        report = dry_run(config_of(model, length, fsdp, sequence, tokens), topology)
        update = next((p for p in report.programs if p.name == "update"), None)
        mesh = f"fsdp {fsdp}, sequence {sequence}" if sequence > 1 else f"fsdp {fsdp}"
        held = completions(length, sequence, tokens) * length // sequence
        cells = [model, topology, f"{length:,}", mesh, f"{held:,}"]
        if update is None:
            found.append((0, [*cells, "too much for the compiler", "-"]))
            continue
        peak, speed = report.peaks["update"], PROMPTS * GENERATIONS * length / update.forecast_s
        fits = report.memory is None or peak <= report.memory
        shown = readable(peak) if fits else f"{readable(peak)} of {readable(report.memory)}"
        found.append((speed * fits, [*cells, shown, f"{speed:,.0f}" if fits else "does not fit"]))
    best = max(speed for speed, _ in found)
    for speed, cells in found:
        yield [f"**{cell}**" for cell in cells] if speed and speed == best else cells


def main() -> None:
    a = arguments()
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER), flush=True)
    for topology in a.topologies.split(","):
        for model in a.models.split(","):
            for length in map(int, a.lengths.split(",")):
                for cells in rows(model, topology, length, a.tokens):
                    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
