"""The decode kernel and a whole decode step compiled by the TPU's own compiler, without a TPU."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adpo_jax import Engine, Policy, SamplingParams
from adpo_jax.devices.sharding import make_mesh
from adpo_jax.dry_run.hlo import Program
from adpo_jax.engine.decode_state import Sizes
from adpo_jax.engine.group_attention import Reach
from adpo_jax.engine.kernels import decode_tpu
from adpo_jax.engine.kv_cache import CacheLayout
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model import grouped
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.rope import Rope
from adpo_jax.update.stream_sizes import tile_of

pytestmark = pytest.mark.slow


@pytest.fixture
def v5e(monkeypatch):
    """The four chips of a v5e:2x2."""
    pytest.importorskip("libtpu", reason='needs pip install "libtpu==0.0.42.*"')
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@pytest.fixture
def on_tpu(v5e):
    """Places the shapes of a tree on one chip of a v5e."""
    sharding = NamedSharding(Mesh(np.array(v5e[:1]), ("chip",)), PartitionSpec())
    return functools.partial(
        jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    )


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize(
    ("rows", "queries", "columns", "ring"),
    [(64, 2, 1024, True), (8, 16, 512, False), (17, 3, 160, True), (17, 8, 96, False)],
)
def test_the_kernel_compiles_for_a_v5e_and_copies_no_cache(
    on_tpu, dtype, rows, queries, columns, ring
):
    layout = CacheLayout(4, 8, 128, dtype, stacked=True, transposed_keys=False)
    kv = jax.eval_shape(lambda: layout.zeros(rows, columns))
    q = jax.ShapeDtypeStruct((rows, 8, queries, 128), jnp.bfloat16)
    per_query = ints(rows, queries)

    def attend(q, kv, index, origin, reach, length):
        return decode_tpu.attend_part(q, kv, index, Reach(origin, reach, length, ring))

    arguments = on_tpu((q, kv, ints(), per_query, per_query, ints(rows)))
    compiled = jax.jit(attend).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize("page", [64, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_the_kernel_reads_pages_in_place_on_a_v5e(on_tpu, dtype, page):
    layout = CacheLayout(4, 8, 128, dtype, stacked=True, transposed_keys=False)
    kv = jax.eval_shape(lambda: layout.zeros(300, page))
    rows, most = 256, 118  # the slots of a device, the pages of 30,000 tokens
    q = jax.ShapeDtypeStruct((rows, 8, 4, 128), jnp.bfloat16)

    def attend(q, kv, index, origin, reach, length, table):
        return decode_tpu.attend_part(q, kv, index, Reach(origin, reach, length, False), table)

    places = ints(rows, 4), ints(rows, 4), ints(rows), ints(rows, most)
    compiled = jax.jit(attend).lower(*on_tpu((q, kv, ints(), *places))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**24


def qwen3_06b(layers: int = 28) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=layers,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        windows=(None,) * layers,
        ropes=(Rope(1e6),),
        layer_ropes=(0,) * layers,
        attention_scale=128**-0.5,
        qk_norm=True,
        tie_embeddings=True,
    )


def test_decoding_qwen3_06b_compiles_for_a_v5e_with_the_cache_in_place(on_tpu):
    policy = Policy(qwen3_06b(), jnp.bfloat16, jnp.bfloat16)
    layout = CacheLayout(28, 8, 128, jnp.bfloat16, stacked=True, transposed_keys=False)
    verbs = Verbs(policy, layout, "pallas_tpu")
    sampling = SamplingParams(n=8, max_tokens=512)
    sizes = Sizes(64, 512, rows=16, width=8, prefix=512)
    state = jax.eval_shape(lambda: verbs.init_decode_state(sizes))
    verbs_params = policy.abstract_params()
    knobs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), sampling.knobs())
    compiled = Verbs.generate.lower(
        verbs,
        on_tpu(verbs_params),
        on_tpu(state),
        on_tpu(knobs),
        sampling.method,
        32,
        on_tpu(ints()),
        on_tpu(ints()),
    ).compile()
    prefill = Verbs.prefill.lower(
        verbs, on_tpu(verbs_params), on_tpu(ints(8, 512)), on_tpu(ints(8))
    ).compile()
    # No [8, 16, 512, 512] float32 scores.
    assert prefill.memory_analysis().temp_size_in_bytes < 8 * 16 * 512 * 512 * 4
    memory = compiled.memory_analysis()
    cache = layout.token_bytes() * (64 * 512 + 16 * 512)
    assert memory.alias_size_in_bytes > cache
    assert memory.temp_size_in_bytes < cache / 8


@pytest.mark.parametrize(("longest", "expected"), [(512, None), (8192, 1024)])
def test_the_engine_compiles_with_its_kernels_on_a_mesh_of_four_chips(v5e, longest, expected):
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=v5e)
    engine = Engine(
        Policy(qwen3_06b(layers=4), jnp.bfloat16, jnp.bfloat16),
        max_prompt_length=512,
        max_response_length=longest,
        num_slots=64,
        group_size=8,
        mesh=mesh,
        attention="pallas_tpu",
        expected_response_length=expected,
    )
    traced = engine.trace(SamplingParams(n=8, max_tokens=longest))
    prefill, decode = (traced[name].lower().compile() for name in ("prefill", "decode"))
    # Attention to the prompt, the ring and the pages, in a loop over the layers.
    stores = 2 if expected is None else 3
    assert decode.as_text().count('custom_call_target="tpu_custom_call"') == stores
    assert prefill.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # Each chip's share of the cache is updated in place, and none is gathered.
    share = engine.plan.device_bytes
    memory = decode.memory_analysis()
    assert memory.alias_size_in_bytes >= share
    assert memory.temp_size_in_bytes < share


@pytest.mark.parametrize(("tokens", "longest"), [(2048, 256), (8192, 1024), (65536, 16384)])
def test_training_attention_over_a_stream_compiles_for_a_v5e_without_scores(
    on_tpu, tokens, longest
):
    from test_kernels_stream import gradient, shapes

    arguments = on_tpu(shapes(tokens, tile_of("tpu", longest), 8, heads=4, kv_heads=2))
    compiled = jax.jit(gradient).lower(*arguments).compile()
    # Less than the scores of one head.
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * tokens * 4


def test_kernels_take_few_cycles_on_a_v5p():
    """The figures of `scripts/bench_bundles.py`, in a process that libtpu is not loaded in yet."""
    pytest.importorskip("libtpu", reason='needs pip install "libtpu==0.0.42.*"')
    script = Path(__file__).resolve().parents[1] / "scripts" / "bench_bundles.py"
    command = [sys.executable, script, "--platforms", "v5p:2x2x1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    ring, prompts = (line for line in lines if line["kernel"].startswith("decode"))
    times = [max(line["bundles_us"], line["fetched_us"]) for line in (ring, prompts)]
    assert sum(times) < 1.5 * (ring["roofline_us"] + prompts["roofline_us"])
    shares = [line for line in lines if "share_of_peak" in line]
    assert len(shares) == 6
    for line in shares:
        of_forward = 0.22 if line["fetches_tiles"] else 0.24
        wanted = of_forward if line["kernel"] == "stream_attention" else 0.5
        assert line["share_of_peak"] >= wanted, line


def test_replicas_alone_reach_over_two_slices(v5e):
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2", num_slices=2)
    mesh = make_mesh(fsdp=2, tensor=2, devices=topology.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    for number, devices in enumerate(mesh.devices):
        assert {device.slice_index for device in devices.flat} == {number}
    assert dict(make_mesh(devices=topology.devices, dcn_data=1).shape)["fsdp"] == 8


def test_products_of_experts_multiply_each_row_once_on_a_v5e(on_tpu):
    """XLA alone would sum outer products over all rows for each of the experts."""
    x, g = (jax.ShapeDtypeStruct((4096, width), jnp.bfloat16) for width in (2048, 768))
    w = jax.ShapeDtypeStruct((16, 2048, 768), jnp.bfloat16)
    for function, arguments in (
        (grouped.grouped_outer, (x, g, ints(16))),
        (grouped.grouped_product, (x, w, ints(16))),
    ):
        compiled = function.lower(*on_tpu(arguments)).compile()
        assert Program(compiled.as_text()).flops == 0  # what is left is a kernel's
    # Of adapters, and of a width that is no multiple of the lanes.
    for rows, D, F in ((4096, 2048, 32), (1000, 2880, 2880)):
        x, g = (jax.ShapeDtypeStruct((rows, width), jnp.bfloat16) for width in (D, F))
        grouped.grouped_outer.lower(*on_tpu((x, g, ints(16)))).compile()
    x, g = (jax.ShapeDtypeStruct((4096, width), jnp.bfloat16) for width in (2048, 768))
    plain = jax.jit(grouped.outer_by_ragged_dot).lower(*on_tpu((x, g, ints(16)))).compile()
    assert Program(plain.as_text()).flops == 16 * 2 * 4096 * 2048 * 768
