"""Cycles of the TPU kernels, as libtpu schedules them without a TPU: one JSON line a kernel.

    python scripts/bench_bundles.py                              v5e and v5p; extra [tpu-aot]
    python scripts/bench_bundles.py --platforms v5p:2x2x1 --own 1300 --columns 4096

A bundle is what a core starts in one cycle, so the bundles of a loop are the least cycles of a
turn; waiting for memory is not among them. `decode_ring` and `decode_prompts` have the shapes of
one device of a rollout and are held against the time in which the bandwidth brings the keys and
values that are seen; the training kernels against the peak of the matrix units.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from option_types import integer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone needs no installation

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adpo_jax.devices.chips import chip_of
from adpo_jax.devices.topologies import topology_devices
from adpo_jax.engine.group_attention import Reach
from adpo_jax.engine.kernels import decode_tpu
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.model.attention import GLOBAL_WINDOW, LayerInfo
from adpo_jax.model.attention_kernels import stream_tpu
from adpo_jax.model.tile_attention import Stream
from adpo_jax.update.stream_sizes import TPU_TILE

HEAD_DIM = 128
# Products of the training kernels, for each pair of tiles.
PRODUCTS = {"stream_attention": 2, "stream_attention_d_query": 3, "stream_attention_d_key": 4}


@dataclasses.dataclass(frozen=True)
class Cores:
    """The cores of a chip: how many share its memory, and FLOPs that one's matrix units begin in a
    cycle (four units of 128 x 128, as https://cloud.google.com/tpu/docs/v5e and /v5p say)."""

    count: int
    flops: int = 4 * 2 * 128**2


CORES = {"TPU v5e": Cores(1), "TPU v5p": Cores(2)}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--platforms", default="v5e:2x2,v5p:2x2x1")
    parser.add_argument("--rows", type=integer(1), default=256, help="slots of a device")
    parser.add_argument("--columns", type=integer(1), default=1024, help="of the ring")
    parser.add_argument(
        "--own", type=integer(0), default=370, help="tokens that a sample has behind it"
    )
    parser.add_argument("--prompt", type=integer(1), default=256, help="tokens of a prompt")
    parser.add_argument("--samples", type=integer(1), default=8, help="of a prompt")
    parser.add_argument("--heads", type=integer(1), default=2, help="key/value heads of a device")
    parser.add_argument("--sharing", type=integer(1), default=4, help="query heads of one of them")
    parser.add_argument(
        "--tokens", type=integer(1), nargs="+", default=[8192, 32768], help="of a stream"
    )
    return parser.parse_args(argv)


class Loop(NamedTuple):
    """A loop of a kernel; the outermost one goes over its programs.

    Attributes:
      depth: 1 for the outermost.
      bundles: those of a turn that are in no loop within it.
    """

    depth: int
    bundles: int


def loops_of(text: str) -> list[Loop]:
    """The loops of a kernel in the order in which they begin, from its final bundles."""
    loops, latest = [], {}  # [depth, bundles] of all, and the latest one of each depth
    for line in text.splitlines():
        if not re.match(r"\s*0x[0-9a-f]+\s", line):
            continue
        before = line.partition("{")[0]
        depth = before.count(">")
        if " LB:" in before:
            latest[depth] = [depth, 0]
            loops.append(latest[depth])
        # Bundles of a loop may stand among those of one within it.
        if depth in latest:
            latest[depth][1] += 1
    return [Loop(*loop) for loop in loops]


def dumped(folder: Path) -> dict[str, list[Loop]]:
    """The loops of each kernel that libtpu has written down; its files are removed."""
    found = {}
    for path in sorted(folder.iterdir()):
        name = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
        if name and "<" not in name.group(1):
            found[name.group(1)] = loops_of(path.read_text(errors="replace"))
        path.unlink()
    return found


class Compiler:
    """Compiles for one device of a platform, and reads what libtpu wrote down."""

    def __init__(self, platform: str, dump: Path):
        device = topology_devices(platform)[0]
        self.chip, self._dump = chip_of(device), dump
        if self.chip.name not in CORES:
            raise ValueError(f"{platform}: the cycles of {', '.join(CORES)} alone are known")
        self.cores = CORES[self.chip.name]
        self.clock = self.chip.flops / (self.cores.count * self.cores.flops)
        self._sharding = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())

    def loops(self, function, *arguments) -> dict[str, list[Loop]]:
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), arguments
        )
        jax.jit(function).lower(*shapes).compile()
        return dumped(self._dump)


def shape(*sizes, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def decode(compiler: Compiler, name: str, a: argparse.Namespace) -> dict:
    """The attention of a step of one layer to the ring or to prompts."""
    ring = name == "decode_ring"
    rows = a.rows if ring else -(-a.rows // a.samples)
    queries = a.sharing * (1 if ring else a.samples)
    columns, seen = (a.columns, a.own) if ring else (2 * a.prompt, a.prompt)
    layout = CacheLayout(4, a.heads, HEAD_DIM, jnp.bfloat16, stacked=True, transposed_keys=False)
    kv = jax.eval_shape(lambda: layout.zeros(rows, columns))
    q = shape(rows, a.heads, queries, HEAD_DIM, dtype=jnp.bfloat16)

    def attend(q, kv, index, origin, reach, length):
        return decode_tpu.attend_part(q, kv, index, Reach(origin, reach, length, ring))

    found = compiler.loops(
        attend,
        q,
        kv,
        shape(),
        shape(rows, queries),
        shape(rows, queries),
        shape(rows),
    )
    (loops,) = (loops for kernel, loops in found.items() if kernel.startswith(name))
    program, first_fetches, row, visit = (loop.bundles for loop in loops)
    block = decode_tpu.block_of(columns, decode_tpu.BLOCK, is_quantized=False)
    cut = decode_tpu.cut_of(q, block, layout.dtype)
    # What a sample sees begins anywhere in a block, a prompt at the first column.
    starts = range(block if ring else 1)
    blocks = np.mean([min(-(-(seen + first) // block), -(-columns // block)) for first in starts])
    cycles = cut.programs * (program + cut.rows * (row + blocks * visit))
    cycles = (cycles + (cut.buffers - 1) * first_fetches) * 2 / compiler.cores.count
    token = 2 * a.heads * HEAD_DIM * q.dtype.itemsize
    roofline = rows * seen * token / compiler.chip.bandwidth
    fetched = rows * blocks * block * token / compiler.chip.bandwidth
    return {
        "kernel": name,
        "rows": rows,
        "columns": columns,
        "seen": seen,
        "bundles": {
            "program": program,
            "first_fetches": first_fetches,
            "row": row,
            "block": visit,
        },
        "block": block,
        "bundles_us": round(cycles / compiler.clock * 1e6, 1),
        "fetched_us": round(fetched * 1e6, 1),
        "roofline_us": round(roofline * 1e6, 1),
        "time_over_roofline": round(max(cycles / compiler.clock, fetched) / roofline, 2),
    }


def stream(compiler: Compiler, tokens: int, a: argparse.Namespace) -> list[dict]:
    """The three kernels of training attention."""
    tile = TPU_TILE
    heads = a.heads * a.sharing
    layer = LayerInfo(window=GLOBAL_WINDOW, rope=0, index=0)

    def loss(q, k, v, positions, segments, prompts, key_tiles):
        of_stream = Stream(positions, segments, prompts, key_tiles)
        out = stream_tpu.attend(q, k, v, layer, of_stream, scale=HEAD_DIM**-0.5)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    kv = shape(1, tokens, a.heads, HEAD_DIM, dtype=jnp.bfloat16)
    found = compiler.loops(
        jax.grad(loss, (0, 1, 2)),
        shape(1, tokens, heads, HEAD_DIM, dtype=jnp.bfloat16),
        kv,
        kv,
        *(shape(1, tokens) for _ in range(3)),
        shape(1, tokens // tile, tokens // tile),
    )
    lines = []
    for name, products in PRODUCTS.items():
        # The names that gradients get end in underscores and a number.
        (loops,) = (x for kernel, x in found.items() if re.search(rf"{name}_*(\.\d+)?$", kernel))
        program, pair = (max(x.bundles for x in loops if x.depth == depth) for depth in (1, 2))
        flops = products * 2 * tile * tile * HEAD_DIM
        lines.append(
            {
                "kernel": name,
                "tokens": tokens,
                "tile": tile,
                "fetches_tiles": not stream_tpu.is_near(tokens, HEAD_DIM, 2),
                "bundles": {"program": program, "pair_of_tiles": pair},
                "share_of_peak": round(flops / compiler.cores.flops / pair, 3),
            }
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Prints a line a kernel; returns 1 where none could be compiled."""
    a, compiled = arguments(argv), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final"
        )
        for platform in a.platforms.split(","):
            try:
                compiler = Compiler(platform, Path(folder))
            except (RuntimeError, ValueError) as error:
                print(json.dumps({"platform": platform, "missing": str(error)}), flush=True)
                continue
            lines = [decode(compiler, name, a) for name in ("decode_ring", "decode_prompts")]
            for tokens in a.tokens:
                lines += stream(compiler, tokens, a)
            for line in lines:
                print(json.dumps({"platform": platform} | line), flush=True)
            compiled += 1
    return 0 if compiled else 1


if __name__ == "__main__":
    sys.exit(main())
