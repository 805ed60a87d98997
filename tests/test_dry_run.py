"""Dry runs: what is read from compiled programs, and an iteration compiled for a TPU slice."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from parsing import parse

from adpo_jax import dry_run
from adpo_jax.devices import chips, sharding, topologies
from adpo_jax.dry_run import forecast
from adpo_jax.dry_run.cures import cures_of, smaller_micro
from adpo_jax.dry_run.device_groups import device_groups
from adpo_jax.dry_run.hlo import Program
from adpo_jax.dry_run.programs import least_of
from adpo_jax.dry_run.report import ProgramCost, Report
from adpo_jax.engine.cache_plan import readable
from adpo_jax.run import loading
from adpo_jax.run.config_checks import finalized

TINY = (
    "--config.actor_rollout_ref.model.hf_config="
    "{'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'head_dim': 8}",
    "--config.data.train_batch_size=8",
    "--config.algorithm.num_generations=2",
    "--config.trainer.bf16=true",
)


def test_flops_and_collectives_count_every_turn_of_a_loop():
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])

    def put(shape, *spec):
        layout = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)

    def layers(weights, x):
        def body(x, w):
            return jnp.tanh(x @ w[0]) @ w[1], None

        return jax.lax.scan(body, x, weights)[0]

    weights = put((5, 2, 64, 64), None, None, "fsdp", "tensor")
    lowered = jax.jit(layers).lower(weights, put((8, 64), "fsdp"))
    whole = Program(lowered.compiler_ir("hlo").as_hlo_text())
    assert whole.flops == 5 * 2 * (2 * 8 * 64 * 64)
    program = Program(lowered.compile().as_text())
    assert program.flops * 4 == whole.flops
    assert program.collectives
    assert all(c.calls % 5 == 0 for c in program.collectives)
    assert program.collectives[0].bytes >= program.collectives[-1].bytes > 0


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("channel_id=1, replica_groups={{0,4},{1,5}}, to_apply=%add", [[0, 4], [1, 5]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_the_devices_that_exchange_are_read_however_they_are_written(attributes, groups):
    assert device_groups(attributes, 8) == groups


def test_what_a_tpu_sends_between_slices_through_its_hosts_crosses():
    text = """HloModule m
ENTRY %main (a: f32[128,8]) -> token[] {
  %a = f32[128,8]{1,0} parameter(0)
  %t = token[] after-all()
  %g = f32[256,8]{1,0} all-gather(%a), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  %s = (f32[128,8]{1,0:T(8,128)}, u32[], token[]) send(%a, %t), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), channel_id=2, is_host_transfer=true
}"""
    gathered, sent = Program(text, slices=[0, 0, 1, 1]).collectives
    assert (gathered.kind, gathered.crosses) == ("all-gather", False)
    assert (sent.kind, sent.shape, sent.crosses) == ("all-reduce", "f32[128,8]", True)


def test_the_flops_of_a_convolution_are_those_of_the_product_it_stands_for():
    """A TPU's compiler writes a batched product as a convolution over a dilated batch."""
    text = """HloModule m
ENTRY %main (a: bf16[4,4,128,32], b: bf16[4,4,128,32]) -> bf16[4,4,128,128] {
  %a = bf16[4,128,4,32]{3,2,1,0} parameter(0)
  %b = bf16[4,128,4,32]{3,2,1,0} parameter(1)
  ROOT %c = bf16[4,4,128,128]{2,3,1,0} convolution(%a, %b), window={size=4x4 stride=3x3 \
lhs_dilate=4x4}, dim_labels=0b1f_0o1i->01bf
}
"""
    assert Program(text).flops == 2 * 4 * 4 * 128 * 128 * 32


def test_a_loop_that_takes_two_turns_at_once_turns_half_as_often():
    """As a TPU's compiler writes products whose operand travels round the devices meanwhile."""
    text = """HloModule m
%cond (p.1: (f32[4,4], u32[])) -> pred[] {
  %p.1 = (f32[4,4], u32[]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=1
  %end = u32[] constant(8)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}
%body (p: (f32[4,4], u32[])) -> (f32[4,4], u32[]) {
  %p = (f32[4,4], u32[]) parameter(0)
  %x = f32[4,4] get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %one = u32[] constant(1)
  %j = u32[] add(%i, %one)
  %k = u32[] add(%j, %one)
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[4,4], u32[]) tuple(%y, %k)
}
ENTRY %main (a: (f32[4,4], u32[])) -> (f32[4,4], u32[]) {
  %a = (f32[4,4], u32[]) parameter(0)
  ROOT %w = (f32[4,4], u32[]) while(%a), condition=%cond, body=%body
}
"""
    assert Program(text).flops == 8 // 2 * 2 * 4 * 4 * 4


def test_what_a_call_does_once_is_told_from_what_it_does_at_every_step():
    text = """HloModule m
%more (s.1: (s32[], pred[], f32[64])) -> pred[] {
  %s.1 = (s32[], pred[], f32[64]) parameter(0)
  ROOT %going = pred[] get-tuple-element(%s.1), index=1
}
%step (s: (s32[], pred[], f32[64])) -> (s32[], pred[], f32[64]) {
  %s = (s32[], pred[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %p = pred[] get-tuple-element(%s), index=1
  %x = f32[64] get-tuple-element(%s), index=2
  %y = f32[64] exponential(%x)
  ROOT %t = (s32[], pred[], f32[64]) tuple(%i, %p, %y)
}
ENTRY %main (a: (s32[], pred[], f32[64])) -> f32[64] {
  %a = (s32[], pred[], f32[64]) parameter(0)
  %w = (s32[], pred[], f32[64]) while(%a), condition=%more, body=%step
  %z = f32[64] get-tuple-element(%w), index=2
  ROOT %n = f32[64] negate(%z)
}
"""
    assert Program(text).traffic() == 2 * 2 * 64 * 4
    call = Program(text, outer_turns=16)
    assert (call.launches, call.traffic()) == (17, 17 * 2 * 64 * 4)


def test_a_dry_run_compiles_every_step_and_accounts_for_the_memory():
    report = dry_run.dry_run(parse(*TINY, "--config.anchor.mode=fixed", "--config.mesh.tensor=2"))
    assert [p.name for p in report.programs] == ["prefill", "decode", "anchor", "update"]
    parameters = report.resident["parameters"]
    assert report.resident["anchor"] == parameters
    assert 2 * parameters < report.resident["optimizer"] < 2 * parameters + 100
    assert report.rollout["cache"] > 0
    programs = {p.name: p for p in report.programs}
    assert programs["decode"].calls == 28
    state = sum(report.resident.values())
    sampling = state + sum(report.rollout.values())
    loading = state + report.rollout["parameters to sample with"] + report.loading
    assert report.peaks == {"loading": loading} | {
        name: (sampling if name in ("prefill", "decode") else state) + p.temporary
        for name, p in programs.items()
    }
    assert 0 < report.loading < 8 * parameters
    assert min(p.temporary for p in report.programs) > 0
    assert all(p.balance == pytest.approx(1.0, abs=0.1) for p in report.programs)
    text = "\n".join(report.lines())
    for part in ("| optimizer |", "| update |", "all-gather", "8 x cpu", "FLOPs balance"):
        assert part in text


@pytest.fixture(scope="module")
def with_anchor(tmp_path_factory):
    """A config with a fixed anchor and a reference of another size, and its report."""
    config = parse(*TINY, "--config.anchor.mode=fixed", "--config.algorithm.beta_reference_kl=0.1")
    folder = tmp_path_factory.mktemp("reference")
    source = loading.find_architecture(config)
    source.tokenizer.save_pretrained(folder)
    larger = source.hf_config | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(larger))
    config.actor_rollout_ref.ref.path = str(folder)
    return config, dry_run.dry_run(config, lengths="9:4")


def test_what_does_not_fit_says_which_setting_frees_how_much(with_anchor):
    config, report = with_anchor
    of_update = [p.name for p in report.programs[2:]]
    assert of_update == ["anchor", "reference", "update"]
    assert report.programs[3].flops > 1.4 * report.programs[2].flops
    small = dataclasses.replace(report, memory=report.peak // 2)
    mesh = sharding.make_mesh(2, 4, 1)
    model = types.SimpleNamespace(linear_attention=None)
    policy = types.SimpleNamespace(mesh=mesh, config=model)
    engine = types.SimpleNamespace(policy=policy, shards=2, num_slots=8, free_cache_engine=True)
    cures = "\n".join(cures_of(config, small, mesh, engine))
    assert not small.fits
    assert "trainer.per_device_train_batch_size=1 frees about" in cures
    assert "gradient_checkpointing=full" in cures
    assert "mesh.sequence=2, devices of mesh.fsdp, frees about" in cures
    assert f"anchor.mode=on_policy frees {readable(report.resident['anchor'])}" in cures
    assert "mesh.data=1" in cures
    assert "sequence_exchange=ring" not in cures
    model.linear_attention = object()  # which runs through a sequence in order
    assert "mesh.sequence=2" not in "\n".join(cures_of(config, small, mesh, engine))
    shared = sharding.make_mesh(fsdp=4, sequence=2)
    assert "sequence_exchange=ring" in "\n".join(cures_of(config, small, shared, engine))
    optimizer = readable(report.resident["optimizer"])
    assert f"optimizer_offload=True frees {optimizer} but for the update" not in cures
    rollout_alone = dataclasses.replace(small, programs=small.programs[:2])
    cures = "\n".join(cures_of(config, rollout_alone, mesh, engine))
    assert f"optimizer_offload=True frees {optimizer} but for the update" in cures
    assert "Does not fit: 2" in "\n".join(small.lines())


def test_what_waits_on_the_host_and_a_kept_cache_count_where_they_are(with_anchor):
    _, report = with_anchor
    moved = dataclasses.replace(
        report, on_host=frozenset({"optimizer", "anchor"}), keeps_cache=True
    )
    less = {name: report.peaks[name] - moved.peaks[name] for name in report.peaks}
    optimizer, anchor = report.resident["optimizer"], report.resident["anchor"]
    cache = report.rollout["cache"]
    assert less == {
        "loading": optimizer + anchor - cache,
        "prefill": optimizer + anchor,
        "decode": optimizer + anchor,
        "anchor": optimizer - cache,
        "reference": optimizer + anchor - cache,
        "update": anchor - cache,
    }
    assert "optimizer (on the host but for the update)" in "\n".join(moved.lines())


def test_bound_and_forecast_are_those_of_hand_arithmetic():
    """8 prompts x 2 completions of up to 28 tokens, prompts of up to 26; 8 devices."""
    config = finalized(parse(*TINY))
    assert (config.data.max_prompt_length, config.data.max_response_length) == (26, 28)
    model = types.SimpleNamespace(
        num_heads=4, head_dim=8, num_layers=2, global_layers=None, is_linear=lambda layer: False
    )
    layout = types.SimpleNamespace(token_bytes=lambda: 128, linear=None)
    mesh = types.SimpleNamespace(size=8)
    weights = {"w": jax.ShapeDtypeStruct((10,), jnp.float32)}
    engine = types.SimpleNamespace(
        policy=types.SimpleNamespace(config=model, mesh=mesh),
        verbs=types.SimpleNamespace(layout=layout, abstract_params=lambda: weights),
        num_slots=16,
        prefill_rows=8,
        prefill_pieces=1,
    )
    larger = types.SimpleNamespace(**vars(model) | {"num_layers": 3})
    least = least_of(config, engine, mesh, {"teacher": types.SimpleNamespace(config=larger)})
    # A step reads the weights once, of each of 16 rings 14 tokens of 1 to 28, and 8 prompts of 25.
    assert least["decode"].moved == 40 + 128 * (16 * 14 + 8 * 25) // 8
    assert least["decode"].kernel_flops == 4 * 4 * 8 * 2 * 16 * (14 + 26) // 8
    pairs = 8 * (26 * 27 // 2 + 2 * (28 * 29 // 2 + 28 * 26))
    assert least["anchor"].kernel_flops == 256 * pairs // 8
    assert least["teacher"].kernel_flops == 384 * pairs // 8
    assert least["update"].kernel_flops == int(3.5 * 256 * pairs * 8 / 8) // 8

    chip = chips.Chip("a chip", 2**30, flops=1e9, bandwidth=1e8)
    decode = ProgramCost(
        "decode", 28, 0, 10**6, 10**6, 1.0, [], 9, 0.0, kernel_s=0.02, linked_s=0.01
    )
    assert decode.floor_s(chip) == pytest.approx(28 * 0.01)  # reading takes longer than computing
    half = dataclasses.replace(decode, expected_calls=14, expected_share=0.5)
    assert decode.forecast_s == pytest.approx(28 * 0.03)
    assert half.forecast_s == pytest.approx(14 * 0.5 * 0.03)
    rollout = {"parameters to sample with": 0, "cache": 0}
    parts = {"parameters": 0, "optimizer": 0, "anchor": 0}
    lengths = forecast.read_lengths("9:4", 28, 16).source
    fixed = (parts, rollout, 0, frozenset(), False, [half], {}, [], lengths)
    report = Report("a run", "a chip", chip, None, *fixed)
    assert report.fits
    text = "\n".join(report.lines())
    assert "An iteration takes 280 ms or more" in text
    assert "Forecast: 210 ms, of which 70 ms is for collectives" in text
    assert "lengths of 9 +- 4 tokens" in text


def test_slots_wait_for_the_longest_sample_and_lengths_come_from_the_user_or_a_run(tmp_path):
    assert forecast.decode_steps(np.array([5, 3, 3, 1]), 2) == 6
    assert forecast.decode_steps(np.array([5, 3, 3, 1]), 4) == 5
    assert set(forecast.read_lengths("", 28, 16).draw(9)) == {28}
    drawn = forecast.read_lengths("300:200", 1024, 512).draw(512)
    assert drawn.mean() == pytest.approx(300, rel=0.02)
    assert drawn.std() == pytest.approx(200, rel=0.1)
    capped = forecast.read_lengths("900:900", 1024, 512).draw(512)
    assert capped.max() == 1024

    rows = [{"step": i, "rollout/length_mean": 300.0, "rollout/length_max": 900} for i in (0, 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lengths = forecast.read_lengths(str(tmp_path), 1024, 512)
    assert lengths.mean == 300
    assert lengths.draw(512).max() == pytest.approx(900, rel=0.1)
    (tmp_path / "other.jsonl").write_text('{"rollout/length_mean": "\\u001b[31m"}')
    for text, message in (
        ("0", "is 1 to data.max_response_length, 1024; given 0"),
        ("2000", "given 2000"),
        (str(tmp_path / "none.jsonl"), "or the metrics.jsonl of a run; given .*FileNotFound"),
        (str(tmp_path / "other.jsonl"), "has no iterations with rollout/length_mean and"),
    ):
        with pytest.raises(ValueError, match=message):
            forecast.read_lengths(text, 1024, 512)


def test_a_smaller_micro_batch_is_one_that_works():
    packed = parse(*TINY, "--config.actor_rollout_ref.actor.ppo_mini_batch_size=4")
    mesh = sharding.make_mesh(2, 1, 1, devices=jax.devices()[:2])
    G = packed.algorithm.num_generations
    assert smaller_micro(packed, mesh) == 4 * G // 2 // 2
    rows = parse(
        *TINY,
        "--config.actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "--config.actor_rollout_ref.actor.layout=rows",
    )
    assert smaller_micro(rows, mesh) == G
    rows.trainer.per_device_train_batch_size = G
    assert smaller_micro(rows, mesh) == 0


def test_a_topology_without_libtpu_or_of_no_known_name_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"pip install 'adpo-jax\[tpu-aot\]'"):
        dry_run.dry_run(parse(*TINY), "v5e:2x2")


def test_published_figures_are_known_for_every_generation_that_can_be_compiled_for():
    kinds = ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", "NVIDIA H200")
    assert all(chips.CHIPS[kind].flops > 1e14 for kind in kinds)


def test_gpus_that_no_machine_has_are_refused_with_the_names_that_are_known(monkeypatch):
    for wrong in ("h100:", "h100:0", "h100:12", "h100:-1", "h100:1x8"):
        with pytest.raises(ValueError, match=r"h100:1, h100:8 or h100:16; given " + wrong):
            topologies.topology_devices(wrong)
    with pytest.raises(ValueError, match="h100:16 for two of eight; given 2xh100:8"):
        topologies.topology_devices("2xh100:8")
    monkeypatch.setattr(topologies, "has_gpu_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"pip install 'adpo-jax\[gpu-aot\]'"):
        topologies.topology_devices("h200:1")
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(ValueError, match="names of GPUs are a100, .*h100, .*h200"):
        topologies.topology_devices("h300:1")


def test_jax_takes_three_quarters_of_a_gpu_or_what_the_environment_says(monkeypatch):
    card = chips.CHIPS["NVIDIA H100 80GB HBM3"]
    monkeypatch.delenv(chips.PREALLOCATED_VARIABLE, raising=False)
    assert card.usable == 60 * 10**9
    monkeypatch.setenv(chips.PREALLOCATED_VARIABLE, ".9")
    assert card.usable == 72 * 10**9
    monkeypatch.setenv(chips.PREALLOCATED_VARIABLE, "most")
    with pytest.raises(ValueError, match="is a share of a GPU's memory such as 0.75; given 'most'"):
        _ = card.usable
    assert chips.CHIPS["TPU v5e"].usable == 16 * 2**30


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.filterwarnings("ignore:attention 'pallas_gpu' of ")
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_an_iteration_compiles_for_a_gpu_and_two_machines_have_eight_each():
    if not topologies.has_gpu_compiler():
        pytest.skip("needs the extra [gpu-aot]")
    two = topologies.topology_devices("h100:16")
    assert [d.process_index for d in two] == [0] * 8 + [1] * 8
    assert len(topologies.one_host("h100:16", two)) == 8
    report = dry_run.dry_run(parse(*TINY), "h200:1")
    assert [p.name for p in report.programs] == ["prefill", "decode", "update"]
    assert report.fits
    assert report.memory == 0.75 * 141 * 10**9
    assert all(p.launches > 10 and not p.collectives for p in report.programs)


def test_what_moves_and_what_computes_are_told_apart_and_an_update_in_place_counts_its_part():
    text = """HloModule m
%slice (p: bf16[28,64,64], i: s32[]) -> bf16[1,64,64] {
  %p = bf16[28,64,64] parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = bf16[1,64,64] dynamic-slice(%p, %i, %z, %z), dynamic_slice_sizes={1,64,64}
}
%update (c: bf16[28,64,64], n: bf16[64,64], j: s32[]) -> bf16[28,64,64] {
  %c = bf16[28,64,64] parameter(0)
  %n = bf16[64,64] parameter(1)
  %t = bf16[64,64] tanh(%n)
  %b = bf16[1,64,64] bitcast(%t)
  %j = s32[] parameter(2)
  %y = s32[] constant(0)
  ROOT %u = bf16[28,64,64] dynamic-update-slice(%c, %b, %j, %y, %y)
}
%end (q: (s32[], bf16[28,64,64])) -> pred[] {
  %q = (s32[], bf16[28,64,64]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %last = s32[] constant(28)
  ROOT %less = pred[] compare(%k, %last), direction=LT
}
%body (s: (s32[], bf16[28,64,64])) -> (s32[], bf16[28,64,64]) {
  %s = (s32[], bf16[28,64,64]) parameter(0)
  %l = s32[] get-tuple-element(%s), index=0
  %w = bf16[28,64,64] get-tuple-element(%s), index=1
  %one = bf16[1,64,64] fusion(%w, %l), kind=kLoop, calls=%slice
  %flat = bf16[64,64] bitcast(%one)
  %x = bf16[64,64] custom-call(%flat), custom_call_target="gpu", backend_config={name = "mine"}
  %new = bf16[28,64,64] fusion(%w, %x, %l), kind=kLoop, calls=%update
  %c1 = s32[] constant(1)
  %m = s32[] add(%l, %c1)
  ROOT %r = (s32[], bf16[28,64,64]) tuple(%m, %new)
}
ENTRY %main (a: (s32[], bf16[28,64,64])) -> (s32[], bf16[28,64,64]) {
  %a = (s32[], bf16[28,64,64]) parameter(0)
  ROOT %loop = (s32[], bf16[28,64,64]) while(%a), condition=%end, body=%body
}
"""
    program, layer = Program(text), 64 * 64 * 2
    # A turn: a slice, a kernel, an update, a sum, and the comparison of the loop.
    assert program.launches == 28 * 5
    (copy,) = program.copies(layer)
    assert (copy.shape, copy.calls, copy.bytes) == ("bf16[1,64,64]", 28, 28 * layer)
    scalars = 4 + 4 + (4 + 4 + 4) + (4 + 4 + 1)
    assert program.kernel_calls == {"mine": 28}
    assert program.traffic({"mine": 5}) == 28 * (2 * layer + 5 + 2 * layer + scalars)


def test_a_slice_in_a_fusion_within_a_fusion_is_all_that_is_read():
    """As a TPU's compiler puts the slice of stacked weights into the product."""
    text = """
HloModule m
%tiles (t: bf16[28,64,64]) -> bf16[28,64,64] {
  %t = bf16[28,64,64] parameter(0)
  ROOT %copied = bf16[28,64,64] copy(%t)
}
%slice (p: bf16[28,64,64], i: s32[]) -> bf16[64,64] {
  %i = s32[] parameter(1)
  %p = bf16[28,64,64] parameter(0)
  %in = bf16[28,64,64] fusion(%p), output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  %z = s32[] constant(0)
  %d = bf16[1,64,64] dynamic-slice(%in, %i, %z, %z), dynamic_slice_sizes={1,64,64}
  ROOT %b = bf16[64,64] bitcast(%d)
}
%product (x: bf16[8,64], w: bf16[28,64,64], j: s32[]) -> bf16[8,64] {
  %x = bf16[8,64] parameter(0)
  %w = bf16[28,64,64] parameter(1)
  %j = s32[] parameter(2)
  %one = bf16[64,64] fusion(%w, %j), kind=kLoop, calls=%slice
  ROOT %y = bf16[8,64] convolution(%x, %one), dim_labels=bf_io->bf
}
ENTRY %main (a: bf16[8,64], s: bf16[28,64,64], l: s32[]) -> bf16[8,64] {
  %a = bf16[8,64] parameter(0)
  %s = bf16[28,64,64] parameter(1)
  %l = s32[] parameter(2)
  ROOT %out = bf16[8,64] fusion(%a, %s, %l), kind=kOutput, calls=%product
}
"""
    assert Program(text).traffic() == 2 * 8 * 64 * 2 + 64 * 64 * 2 + 4


def test_an_array_in_another_shape_within_a_fusion_is_read_whole():
    text = """
HloModule m
%view (p: f32[8,64]) -> f32[512] {
  %p = f32[8,64] parameter(0)
  ROOT %b = f32[512] bitcast(%p)
}
%sum (x: f32[8,64]) -> f32[512] {
  %x = f32[8,64] parameter(0)
  %flat = f32[512] fusion(%x), kind=kLoop, calls=%view
  ROOT %e = f32[512] exponential(%flat)
}
ENTRY %main (a: f32[8,64]) -> f32[512] {
  %a = f32[8,64] parameter(0)
  ROOT %out = f32[512] fusion(%a), kind=kLoop, calls=%sum
}
"""
    assert Program(text).traffic() == 2 * 512 * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_an_iteration_compiles_for_a_v5e_slice_with_its_kernels():
    pytest.importorskip("libtpu", reason="needs the extra [tpu-aot]")
    config = parse(
        *TINY[1:],
        "--config.actor_rollout_ref.model.hf_config={'hidden_size': 256, 'intermediate_size': 512,"
        " 'num_hidden_layers': 2, 'head_dim': 128}",
        "--config.data.max_prompt_length=128",
        "--config.data.max_response_length=128",
        "--config.mesh.tensor=2",
    )
    report = dry_run.dry_run(config, "v5e:2x2")
    assert "attention pallas_tpu" in report.title
    assert [p.name for p in report.programs] == ["prefill", "decode", "update"]
    assert report.fits
    assert report.memory == 16 * 2**30
    # Products within a kernel are not seen, in the cut program nor before.
    assert all(p.balance == pytest.approx(1.0, abs=0.1) for p in report.programs)
    with pytest.raises(ValueError, match="libtpu has no topology 'v5e:banana'"):
        dry_run.dry_run(config, "v5e:banana")
    two = topologies.topology_devices("2xv5e:2x4")
    assert sharding.slice_numbers(two) == [0] * 8 + [1] * 8
    assert len(topologies.one_host("2xv5e:2x4", two)) == 4
    assert dict(sharding.make_mesh(devices=two).shape) == {"data": 2, "fsdp": 8, "tensor": 1}
