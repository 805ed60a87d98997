"""Samplers in other processes: who samples what, what is sent, and that nothing is lost."""

import asyncio
import contextlib
import dataclasses
import io
import os
import queue
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import jax
import numpy as np
import pytest
import tiny
from sampler_process import KEY, LENGTHS, SAMPLING
from test_ahead import PROMPTS, Letters, at_step, log_probs
from test_processes import OVERRIDES, finish, start_two

from adpo_jax.engine.engine import Engine
from adpo_jax.log.metrics import read_jsonl
from adpo_jax.model import lora
from adpo_jax.model.lora import Lora
from adpo_jax.policy import Policy
from adpo_jax.records import Completion, Prompts
from adpo_jax.rewards import RewardFunction, RewardModel
from adpo_jax.rollouts import elsewhere, recording, wire
from adpo_jax.rollouts.dispatch import Dispatch, Work
from adpo_jax.rollouts.elsewhere import FilteredBatches, Reception, RemoteBatches
from adpo_jax.rollouts.elsewhere_ahead import RemoteAhead
from adpo_jax.rollouts.filtering import GroupFilter, has_spread
from adpo_jax.rollouts.flight import ExpertLimits
from adpo_jax.rollouts.pacing import Pacing
from adpo_jax.rollouts.sampler import OnTheSpot, Sampler
from adpo_jax.rollouts.sieve import Sieve
from adpo_jax.run import roles, sampler_line
from adpo_jax.serve import samplers
from adpo_jax.serve.samplers import SamplersHost

ROOT = Path(__file__).parents[1]

# --- who samples what


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def dispatch(clock):
    return Dispatch(lease_s=30.0, clock=clock)


def works(*numbers):
    return [Work(number, [1, 2], np.zeros((1, 2), np.uint32)) for number in numbers]


def asked(dispatch, name, holds=(), room=100, version=0):
    order = dispatch.order(name, holds, room, version, timeout=0)
    return [work.number for work in order.works]


def group(token):
    return [Completion.sampled([token], [-1.0], "stop")]


def test_samplers_share_what_waits_and_the_oldest_groups_go_first(dispatch):
    assert asked(dispatch, "a") == asked(dispatch, "b") == []
    dispatch.publish(0, works(3, 1, 0, 2))
    assert asked(dispatch, "a") == [0, 1]
    assert asked(dispatch, "b", room=1) == [2]
    assert asked(dispatch, "a", [0, 1]) == [3]
    assert dispatch.deliver("a", 1, group(7))
    assert dispatch.whole() == [1]
    assert dispatch.take([1])[1][0].tokens.tolist() == [7]
    assert dispatch.whole() == []


def test_shares_stay_even_and_grow_where_others_have_no_room(dispatch):
    for name in "abcd":
        asked(dispatch, name)
    dispatch.publish(0, works(*range(16)))
    assert [len(asked(dispatch, name)) for name in "abcd"] == [4, 4, 4, 4]
    dispatch.publish(1, works(*range(16, 20)))
    held = {"a": range(4), "b": range(4, 8), "c": range(8, 12), "d": range(12, 16)}
    for name in "bcd":
        assert asked(dispatch, name, held[name], room=0) == []
    assert asked(dispatch, "a", held["a"]) == [16, 17, 18, 19]


def test_the_groups_of_a_sampler_that_falls_silent_are_others_and_count_once(dispatch, clock):
    dispatch.publish(0, works(0, 1))
    assert asked(dispatch, "a") == [0, 1]
    clock.now = 20.0
    assert asked(dispatch, "b") == []
    assert asked(dispatch, "a", [0, 1]) == []  # a sign of life
    clock.now = 49.0
    assert asked(dispatch, "b") == []
    clock.now = 51.0
    assert asked(dispatch, "b") == [0, 1]
    assert dispatch.num_samplers == 1
    # It comes back with one of them, before the other has it; that one need not go on with it.
    assert dispatch.deliver("a", 0, group(5))
    order = dispatch.order("b", [0, 1], 0, 0, timeout=0)
    assert order.dropped == [0]
    assert not dispatch.deliver("b", 0, group(6))
    assert dispatch.num_doubles == 1
    assert dispatch.take([0])[0][0].tokens.tolist() == [5]
    assert dispatch.num_taken_back == 2


def test_a_sampler_that_lost_its_groups_gets_them_again_at_once(dispatch):
    dispatch.publish(0, works(0, 1))
    assert asked(dispatch, "a") == [0, 1]
    assert asked(dispatch, "a", [1]) == [0]


def test_no_group_is_handed_out_before_there_are_weights_and_all_hear_of_the_end(dispatch):
    order = dispatch.order("a", [], 5, -1, timeout=0)
    assert (order.version, order.works, order.finished) == (None, [], False)
    found = []
    waiting = threading.Thread(target=lambda: found.append(dispatch.order("a", [], 5, -1, 30)))
    waiting.start()
    dispatch.publish(4, works(0))
    waiting.join(10)
    assert (found[0].version, [work.number for work in found[0].works]) == (4, [0])
    dispatch.finish(timeout=0)
    assert dispatch.order("a", [0], 0, 4, timeout=30).finished


def test_a_group_that_says_the_experts_of_another_prompt_is_not_taken(dispatch):
    dispatch.publish(0, works(0))
    experts = np.zeros((1, 3, 2), np.uint8)
    for of_prompt in (np.zeros((2, 3, 2), np.uint8), None):
        told = Completion.sampled([7], [-1.0], "stop", experts=experts, prompt_experts=of_prompt)
        with pytest.raises(ValueError, match="group 0 says the experts of . tokens of its prompt"):
            dispatch.deliver("a", 0, [told])
    assert dispatch.whole() == []
    assert dispatch.deliver("a", 0, [dataclasses.replace(told, prompt_experts=experts)])


def test_a_sampler_is_told_why_its_experts_are_not_taken(dispatch):
    dispatch.publish(3, works(5))
    limits = {name: LIMITS[name] for name in LIMITS if name != "last_version"}
    reception = Reception(dispatch, None, {}, {}, limits | {"experts": EXPERTS})
    with pytest.raises(
        samplers.Refused, match="group 5 says the experts of 7 tokens of its prompt"
    ):
        reception.deliver("a", reception.run, wire.packed_groups(with_experts()))


def test_a_sampler_that_asks_again_ends_its_earlier_question(dispatch):
    found = []
    waiting = threading.Thread(target=lambda: found.append(dispatch.order("a", [], 5, -1, 30)))
    waiting.start()
    while dispatch.num_samplers < 1:
        time.sleep(0.001)
    assert asked(dispatch, "a") == []
    waiting.join(10)
    assert (found[0].works, found[0].finished) == ([], False)


def test_nothing_is_handed_to_a_line_that_its_sampler_has_lost(dispatch):
    dispatch.publish(0, [])
    found = []
    waiting = threading.Thread(target=lambda: found.append(dispatch.order("a", [], 5, 0, 30)))
    waiting.start()
    while dispatch.num_samplers < 1:
        time.sleep(0.001)
    with dispatch._changed:  # both before the earlier question wakes
        dispatch.publish(0, works(0, 1))
        assert asked(dispatch, "a", room=1) == [0]
    waiting.join(10)
    assert found[0].works == []
    assert asked(dispatch, "a", [0]) == [1]


def test_a_sampler_waits_while_what_is_left_is_kept_for_another(dispatch, clock):
    for name in "ab":
        asked(dispatch, name)
    dispatch.publish(0, works(0, 1, 2))
    assert asked(dispatch, "a") == [0, 1]
    found = []

    def ask():
        order = dispatch.order("a", [0, 1], 2, 0, timeout=20)
        found.append([work.number for work in order.works])

    waiting = threading.Thread(target=ask)
    waiting.start()
    waiting.join(0.2)
    assert found == []
    asked(dispatch, "b", room=0)  # it has no room for it any more
    waiting.join(10)
    assert found == [[2]]


# --- what is sent

LIMITS = {
    "n": 2,
    "max_response_length": 4,
    "vocab_size": 32,
    "has_full_log_probs": False,
    "last_version": 3,
}


def two():
    return {
        5: [
            Completion.sampled([1, 2, 3], [-0.5, -0.25, -1.0], "stop", version=3),
            Completion.sampled([4], [-2.0], "length", version=3),
        ]
    }


def test_groups_come_back_as_they_were_sent():
    (read,) = wire.read_groups(wire.packed_groups(two()), **LIMITS).values()
    for found, sent in zip(read, two()[5], strict=True):
        assert found.finish_reason == sent.finish_reason
        for name in ("tokens", "log_probs", "trained", "versions", "turns"):
            np.testing.assert_array_equal(getattr(found, name), getattr(sent, name))


EXPERTS = ExpertLimits((3, 2), 6, np.uint8)


def with_experts():
    rng = np.random.default_rng(0)
    of_prompt = rng.integers(0, 6, (7, 3, 2)).astype(np.uint8)
    return {
        5: [
            dataclasses.replace(
                completion,
                experts=rng.integers(0, 6, (len(completion), 3, 2)).astype(np.uint8),
                prompt_experts=of_prompt,
            )
            for completion in two()[5]
        ]
    }


@pytest.mark.parametrize("experts", [None, EXPERTS, ExpertLimits((94, 8), 128, np.uint8)])
@pytest.mark.parametrize("has_full_log_probs", [False, True])
def test_the_largest_group_is_let_in(experts, has_full_log_probs):
    n, prompt, response = 3, 11, 200
    more = {"full_log_probs": [-1.0] * response} if has_full_log_probs else {}
    if experts is not None:
        more["experts"] = np.zeros((response, *experts.shape), experts.dtype)
    group = []
    for _ in range(n):
        if experts is not None:
            more["prompt_experts"] = np.zeros((prompt, *experts.shape), experts.dtype)
        sampled = Completion.sampled([1] * response, [-1.0] * response, "length", **more)
        group.append(sampled)
    settings = {"n": n, "max_prompt_length": prompt, "max_response_length": response}
    settings |= {"has_full_log_probs": has_full_log_probs, "experts": experts}
    size, most = len(wire.packed_groups({0: group})), wire.most_bytes(**settings)
    assert size <= most < 1.2 * size + wire._MOST_DIRECTORY
    if experts is not None and experts.shape == (94, 8):
        for n, size in ((128, r"[56]\.\d"), (48, r"2\.\d")):
            settings |= {"n": n, "max_response_length": 32768}
            refusal = rf"may take {size} GiB, 1,5.. bytes .* up to 2 GiB"
            with pytest.raises(ValueError, match=refusal):
                wire.most_bytes(**settings)


def test_a_trainer_takes_as_large_a_group_as_its_settings_allow(trainer):
    source = trainer(0)
    source._host.start()
    most = source._host._max_group_bytes
    asked = {"headers": {"Authorization": f"Bearer {KEY}"}, "timeout": 30}
    for size, status in ((most, 410), (most + 1, 413)):  # 410: it is of no run
        at = f"http://{source.address}/sampler/groups"
        assert httpx.post(at, content=bytes(size), **asked).status_code == status


def test_experts_come_back_as_they_were_sent_and_others_are_refused():
    sent = wire.packed_groups(with_experts())
    (read,) = wire.read_groups(sent, **LIMITS, experts=EXPERTS).values()
    for found, wanted in zip(read, with_experts()[5], strict=True):
        assert found.experts.dtype == found.prompt_experts.dtype == np.uint8
        np.testing.assert_array_equal(found.experts, wanted.experts)
        np.testing.assert_array_equal(found.prompt_experts, wanted.prompt_experts)
    content = dict(np.load(io.BytesIO(sent)))
    for arrays in (
        {"experts": content["experts"] + 6},
        {"experts": content["experts"][:, :1]},
        {"experts_lengths": np.array([2, 2])},
        {"prompt_experts_of": np.array([0, 1])},
        {"prompt_experts_lengths": np.array([-1])},
    ):
        with pytest.raises(wire.WireError):
            wire.read_groups(changed(**content | arrays), **LIMITS, experts=EXPERTS)
    with pytest.raises(wire.WireError):
        wire.read_groups(wire.packed_groups(two()), **LIMITS, experts=EXPERTS)
    many = content | {"prompt_experts_lengths": np.zeros(1 << 16, np.int64)}
    with pytest.raises(wire.WireError, match="experts of more prompts than there are completions"):
        wire.read_groups(changed(**many), **LIMITS, experts=EXPERTS)


def changed(**arrays):
    content = dict(np.load(io.BytesIO(wire.packed_groups(two()))))
    buffer = io.BytesIO()
    np.savez(buffer, **content | arrays)
    return buffer.getvalue()


def npz(compression=zipfile.ZIP_STORED, **members):
    """A file of groups, with members that are arrays or the bytes of such."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(wire.packed_groups(two()))) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        contents = {name.removesuffix(".npy"): old.read(name) for name in old.namelist()}
        for name, content in (contents | members).items():
            with new.open(f"{name}.npy", "w") as member:
                if isinstance(content, bytes):
                    member.write(content)
                else:
                    np.lib.format.write_array(member, content)
    return buffer.getvalue()


def header_of(shape):
    """The header of an array of which nothing comes."""
    buffer = io.BytesIO()
    told = {"descr": "<i4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, told)
    return buffer.getvalue()


def overlapping():
    """A file of groups of which a member says that it goes on through the others."""
    content = bytearray(changed(tokens=np.zeros(1000, np.int32)))
    directory = content.index(b"PK\x01\x02")
    size = (len(content) - 1).to_bytes(4, "little")
    content[directory + 20 : directory + 28] = size + size
    return bytes(content)


def with_second_end(content):
    """A file of groups that says the size of its directory in a further record, as long ones do."""
    end = len(content) - 22
    fields = struct.unpack("<4s4H2LH", content[end:])
    *_, size, at, _ = fields
    count = fields[4]
    further = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, at)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    return content[:end] + further + locator + content[end:]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no file of groups"),
        (b"PK\x03\x04 nothing", "no file of groups"),
        (changed(tokens=np.array([1, 2, 3, 32], np.int32)), r"token ids outside \[0, 32\)"),
        (changed(tokens=np.array([1, 2, 3, 4.0])), "tokens has the shape"),
        (changed(log_probs=np.array([1, 2, 3, np.nan], np.float32)), "not finite"),
        (changed(lengths=np.array([4, 1])), "has the shape"),
        (changed(versions=np.array([3, 3, 4, 3], np.int32)), r"versions .* outside \[0, 3\]"),
        (changed(lengths=np.array([-1, 5])), "completions of -1 to 5 tokens"),
        (changed(numbers=np.array([1, 2])), "2 completions of 2 groups of 2"),
        (changed(tokens=np.array([{}], object)), "no file of groups"),
        (changed(reasons=np.array([0, 9], np.int8)), "not sampled in one turn"),
        (changed(reasons=np.array([0, -1], np.int8)), "not sampled in one turn"),
        (changed(trained=np.zeros(4, bool)), "not sampled in one turn"),
        (changed(log_probs=np.ones(4, np.float32)), "log-probs above 0"),
        (changed(numbers=np.array([np.nan])), "numbers that are none"),
        (changed(more=np.zeros(1)), "more.npy.* are wanted"),
        (npz(zipfile.ZIP_DEFLATED, tokens=np.zeros(1 << 20, np.int32)), "compressed"),
        (npz(tokens=b"\x93NUMPY\x01\x00"), "no file of groups"),
        (npz(tokens=header_of((1 << 40,))), "another size than its header tells"),
        (overlapping(), r"arrays of \d+ bytes in a file of"),
        (npz(**{f"a{i}": b"" for i in range(2000)}), "its directory is too large"),
        (with_second_end(npz()), "does not end as a zip file without a comment"),
        (changed(numbers=np.arange(1025)), "1025 groups, where up to 1024 come at once"),
    ],
)
def test_what_is_no_file_of_groups_is_refused(content, why):
    with pytest.raises(wire.WireError, match=why):
        wire.read_groups(content, **LIMITS)


# --- a trainer and its samplers

P, STEPS = 2, 4


@pytest.fixture(scope="module")
def policy_and_params():
    return tiny.policy_and_params()


@pytest.fixture(scope="module")
def engines(policy_and_params):
    """An engine for each of two samplers, and the trainer's."""
    return [Engine(policy_and_params[0], steps_per_dispatch=2, **LENGTHS) for _ in range(3)]


def prompts_of(batch):
    numbers = range(P * batch, P * batch + P)
    return Prompts(
        [PROMPTS[i % len(PROMPTS)] for i in numbers], {"solution": list(map(str, numbers))}
    )


@pytest.fixture
def sampler(engines, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def letters(completions, **columns):\n    return [float(len(set(c))) for c in completions]"
    )
    model = RewardModel([RewardFunction(str(reward), "letters")])
    return Sampler(engines[2], SAMPLING, Letters(), model, seed=0, keep_sample=lambda *_: None)


@pytest.fixture
def trainer(policy_and_params, sampler, tmp_path, monkeypatch):
    """Makes the source of a trainer at a port that stays; they are closed at the end."""
    monkeypatch.setattr(elsewhere, "POLL_S", 0.5)  # samplers that are lost hear of no end
    policy, _ = policy_and_params
    verbs = sampler.engine.verbs
    with contextlib.ExitStack() as stack:

        def make(staleness, port=0, host="127.0.0.1", num_steps=STEPS, weights="", sieve=None):
            settings = {
                "fits": roles.fits_of(policy, sampler.engine, SAMPLING),
                "fits_of_params": lambda params: roles.fits_of_params(verbs, params),
                "weights_of": lambda params: roles.sent_weights(verbs, params),
                "address": (host, port),
                "key": KEY,
                "weights_folder": weights,
            }
            given = (sampler, prompts_of, tmp_path / "in_flight")
            if staleness:
                pacing = Pacing(P, staleness, staleness * P, num_steps)
                source = RemoteAhead(*given, pacing, **settings, sieve=sieve)
            else:
                source = RemoteBatches(*given, **settings, batch_size=P)
            stack.callback(source.close)
            stack.callback(source.end)
            return source

        yield make


def start(policy_and_params, engine, address, key=KEY):
    """A sampler in a thread; returns the thread, and what it raised."""
    made = roles.SamplerRole(policy_and_params[0], engine, SAMPLING, address=address, key=key)
    raised = []

    def run():
        try:
            made.run()
        except (roles.TrainerLost, roles.Refusal) as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


@pytest.mark.parametrize("by", ["http", "folder"])
def test_one_sampler_without_staleness_gives_the_very_bits_of_sampling_here(
    policy_and_params, engines, sampler, trainer, tmp_path, by
):
    _, params = policy_and_params
    source = trainer(0, weights=str(tmp_path) if by == "folder" else "")
    thread, _ = start(policy_and_params, engines[0], source.address)
    here = OnTheSpot(sampler, prompts_of)
    for step in range(2):
        weights = at_step(params, step) | {"embed": params["embed"]}  # which is sent once
        found, wanted = source.next(step, weights), here.next(step, weights)
        assert_same_groups(found, wanted)
    assert found.metrics["samplers/connected"] == 1
    source.end()
    thread.join(30)
    assert not thread.is_alive()
    assert len(list(tmp_path.glob("*.safetensors"))) == (2 if by == "folder" else 0)


def assert_same_groups(found, wanted):
    assert found.texts == wanted.texts
    np.testing.assert_array_equal(found.rewards, wanted.rewards)
    for one, other in zip(found.completions.flat, wanted.completions.flat, strict=True):
        for name in ("tokens", "log_probs", "full_log_probs", "versions", "trained"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_groups_without_a_spread_are_replaced_as_where_sampling_is_done_here(
    policy_and_params, engines, sampler, trainer, tmp_path
):
    _, params = policy_and_params
    # So few of the groups are left that batches follow each other.
    rules = {"num_generations": sampler.sampling.n, "max_attempts": 3, "min_reward_std": 0.8}
    source = FilteredBatches(trainer(0), prompts_of, tmp_path / "there", **rules)
    thread, _ = start(policy_and_params, engines[0], source.address)
    here = GroupFilter(sampler, prompts_of, tmp_path / "here", **rules)
    attempts = []
    for step in range(2):
        weights = at_step(params, step)
        found, wanted = source.next(step, weights), here.next(step, weights)
        assert_same_groups(found, wanted)
        for name, value in wanted.metrics.items():
            if name.startswith("filter/"):
                assert found.metrics[name] == value
        versions = np.concatenate([c.versions for c in found.completions.flat])
        assert found.metrics["ahead/staleness_max"] == step - versions.min()
        attempts.append(found.metrics["filter/attempts"])
        for each in (source, here):
            each.save(step + 1)
    assert max(attempts) > 1
    source.end()
    thread.join(30)


def test_a_group_that_comes_while_others_are_graded_is_not_waited_for(trainer, monkeypatch):
    source, whole, waited = trainer(1), [0], []
    monkeypatch.setattr(source._dispatch, "whole", lambda: list(whole))
    monkeypatch.setattr(
        source, "_wait_for_more", lambda step, num_seen, last: waited.append(num_seen)
    )

    def grade(numbers, graded):
        if len(whole) == 1:
            whole.append(1)  # comes now

    now = types.SimpleNamespace(
        step=0,
        judging=types.SimpleNamespace(grade=grade, without_spread=[]),
        drop=lambda numbers: [],
        chosen=lambda numbers: [1] if 1 in numbers else None,
    )
    assert source._until_chosen(now) == [1]
    assert waited == [1]  # for more than the one that was seen, of which there are two by now


def test_groups_without_a_spread_make_room_for_others_ahead_of_the_update(
    policy_and_params, engines, sampler, trainer, monkeypatch
):
    _, params = policy_and_params
    graded, looked_at = Sampler.graded, []

    def counted(self, step, answers):
        looked_at.extend(answers.prompts.columns["solution"])
        return graded(self, step, answers)

    monkeypatch.setattr(Sampler, "graded", counted)

    def spread(rewards):
        return has_spread(rewards, 0.8)

    source = trainer(1, sieve=Sieve(spread, most_dropped=40))
    thread, _ = start(policy_and_params, engines[0], source.address)
    dropped = []
    for step in range(3):
        found = source.next(step, at_step(params, step))
        assert has_spread(found.rewards, 0.8).all()
        assert found.metrics["filter/fillers"] == 0
        assert found.metrics["ahead/staleness_max"] <= 1
        sampled = found.metrics["rollout/tokens_per_s"] * found.seconds[0]
        of_dropped = sampled - found.completions.lengths.sum()
        assert (of_dropped > 0.5) == (found.metrics["filter/dropped_frac"] > 0)
        dropped.append(found.metrics["filter/dropped_frac"])
    assert max(dropped) > 0  # in which step depends on how fast the samplers are
    assert len(looked_at) == len(set(looked_at))
    source.end()
    thread.join(30)


def test_samplers_come_and_go_and_every_prompt_is_trained_on_once(
    policy_and_params, engines, trainer, monkeypatch
):
    monkeypatch.setattr(elsewhere, "LEASE_S", 3.0)
    monkeypatch.setattr(elsewhere, "POLL_S", 0.5)
    policy, params = policy_and_params
    source = trainer(2)
    port = int(source.address.rpartition(":")[2])
    for engine in engines[:2]:
        start(policy_and_params, engine, source.address)
    # A third one takes groups with it when it dies.
    dead = threading.Timer(0.2, lambda: source._dispatch.order("dead", [], 2, -1, timeout=60).works)
    dead.start()
    groups = []
    for step in range(2):
        groups.append(source.next(step, at_step(params, step)))
    source.save(2)
    # The trainer dies too, with a group half done, and finds its samplers again.
    source._host.close()
    source = trainer(2, port)
    source.check(2)
    source.restore(2)
    for step in range(2, STEPS):
        groups.append(source.next(step, at_step(params, step)))
    trained = [int(s) for g in groups for s in g.prompts.columns["solution"]]
    assert sorted(trained) == list(range(len(PROMPTS)))
    for step, found in enumerate(groups):
        assert 0 <= found.metrics["ahead/staleness_max"] <= 2
        for ids, group in zip(found.prompts.token_ids, found.completions.groups, strict=True):
            for c in group:
                assert step - 2 <= c.versions[0] <= c.versions[-1] <= step
                # The log-probs of each token are those of the weights that drew it.
                tokens = np.array([[*ids, *c.tokens]], np.int32)
                for version in set(c.versions.tolist()):
                    wanted = log_probs(policy, at_step(params, version), tokens)[0, len(ids) :]
                    drawn = c.versions == version
                    np.testing.assert_allclose(c.full_log_probs[drawn], wanted[drawn], atol=2e-5)
    dead.join()


@contextlib.contextmanager
def bad_line(address):
    """An address that leads to another one by a slow line, on which connections break."""
    host, _, port = address.rpartition(":")
    rng, ends, transports = random.Random(0), [], set()

    async def copied(reader, writer):
        with contextlib.suppress(OSError):
            while part := await reader.read(1 << 16):
                await asyncio.sleep(0.02)
                if rng.random() < 0.1:
                    break
                writer.write(part)
                await writer.drain()
        writer.transport.abort()

    async def connected(reader, writer):
        try:
            there = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        transports.update((writer.transport, there[1].transport))
        await asyncio.gather(copied(reader, there[1]), copied(there[0], writer))

    async def serve(ready):
        ends.append((asyncio.get_running_loop(), asyncio.current_task()))
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        server.close()
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0.1)

    ready = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(serve(ready)))
    thread.start()
    try:
        yield f"127.0.0.1:{ready.get()}"
    finally:
        loop, task = ends[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join()


def test_a_slow_line_on_which_connections_break_loses_nothing(
    policy_and_params, engines, trainer, monkeypatch
):
    monkeypatch.setattr(elsewhere, "POLL_S", 0.2)
    monkeypatch.setattr(sampler_line, "_RETRY_S", 0.05)
    _, params = policy_and_params
    source = trainer(1)
    with bad_line(source.address) as address:
        thread, _ = start(policy_and_params, engines[0], address)
        groups = [source.next(step, at_step(params, step)) for step in range(STEPS)]
        source.end()
        thread.join(30)
    trained = [int(s) for g in groups for s in g.prompts.columns["solution"]]
    assert sorted(trained) == list(range(P * STEPS))


def test_a_group_that_is_dropped_and_handed_out_again_is_sampled_once(
    policy_and_params, engines, trainer, monkeypatch
):
    monkeypatch.setattr(elsewhere, "POLL_S", 0.1)
    _, params = policy_and_params
    source = trainer(2)
    start(policy_and_params, engines[0], source.address)
    stop = threading.Event()

    def take_back():
        """Gives the sampler's groups back under its hands, again and again."""
        dispatch = source._dispatch
        while not stop.is_set():
            with dispatch._changed:
                for known in dispatch._samplers.values():
                    for number in list(known.holds):
                        dispatch._give_back(known, number)
            time.sleep(0.15)

    taking = threading.Thread(target=take_back)
    taking.start()
    try:
        groups = [source.next(step, at_step(params, step)) for step in range(STEPS)]
    finally:
        stop.set()
        taking.join()
    policy, _ = policy_and_params
    for found in groups:
        for ids, group in zip(found.prompts.token_ids, found.completions.groups, strict=True):
            for c in group:
                assert len(c) <= 12
                tokens = np.array([[*ids, *c.tokens]], np.int32)
                for version in set(c.versions.tolist()):
                    wanted = log_probs(policy, at_step(params, version), tokens)[0, len(ids) :]
                    drawn = c.versions == version
                    np.testing.assert_allclose(c.full_log_probs[drawn], wanted[drawn], atol=2e-5)


def test_decoding_goes_on_when_the_trainer_drops_what_was_delivered(policy_and_params, engines):
    policy, params = policy_and_params
    role = roles.SamplerRole(policy, engines[0], SAMPLING, address="127.0.0.1:1", key=KEY)
    role._params, role._version = params, 0
    keys = np.arange(8, dtype=np.uint32).reshape(2, 2, 2)
    role._on_works([{"number": n, "prompt": PROMPTS[n], "keys": keys[n - 4]} for n in (4, 5)])
    with mock.patch.object(roles, "_STEPS", 0):
        role._decode()
    decoding = role._decoding
    role._on_dropped([3])
    assert role._decoding is decoding is not None
    role._on_dropped([3, 4])
    assert role._decoding is None
    assert list(role._works) == list(role._groups) == list(role._fresh) == [5]


def test_what_was_begun_for_an_earlier_start_is_not_delivered_to_a_later_one(
    policy_and_params, engines, trainer
):
    source = trainer(0)
    source._host.start()
    source._started = True
    reception, dispatch = source._reception, source._dispatch
    fits = roles.fits_of(policy_and_params[0], engines[0], SAMPLING)
    line = sampler_line.Line(source.address, KEY, fits, None)
    assert line._say_hello()
    dispatch.publish(0, works(0))
    order = dispatch.order(line._name, [], 1, 0, timeout=0)
    line._take({"dropped": [], "works": [{"number": 0}], "version": -1}, line._run, [])
    old = {"number": 0, "run": line._run}
    assert [work.number for work in order.works] == [0]
    reception.run = "another start"
    line.deliver(old, [Completion.sampled([1], [-1.0], "stop")] * 2)
    threading.Thread(target=line._guarded, args=(line._deliver,), daemon=True).start()
    deadline = time.monotonic() + 20
    while line._run and time.monotonic() < deadline:
        time.sleep(0.01)
    assert line._run == ""
    assert dispatch.whole() == []


def test_strangers_and_samplers_of_another_run_are_refused(policy_and_params, engines, trainer):
    source = trainer(0)
    source._host.start()
    source._started = True
    thread, raised = start(policy_and_params, engines[0], source.address, key="another")
    thread.join(60)
    assert "the key is missing or wrong" in str(raised[0])
    other = Engine(policy_and_params[0], max_prompt_length=8, max_response_length=12, num_slots=4)
    thread, raised = start(policy_and_params, other, source.address)
    thread.join(60)
    assert "its longest prompt is '8', the trainer's '4'" in str(raised[0])
    address = f"http://{source.address}"
    headers = {"Authorization": f"Bearer {KEY}"}
    for content in (b"[]", b"{", b'{"name": "a", "holds": [1.5], "room": 1, "version": 0}'):
        answer = httpx.post(f"{address}/sampler/order", content=content, headers=headers)
        assert answer.status_code == 400
    asked = {"name": "a", "holds": [], "room": 1, "version": 0, "run": "an earlier one"}
    assert httpx.post(f"{address}/sampler/order", json=asked, headers=headers).status_code == 410
    assert httpx.get(f"{address}/sampler/weights/7", headers=headers).status_code == 404
    for names, status in (["a"], 404), ("a", 400), (["a", "a"], 400), ([1], 400):
        asked = {"names": names}
        answer = httpx.post(f"{address}/sampler/tensors/7", json=asked, headers=headers)
        assert answer.status_code == status
    run = {"x-sampler": "a", "x-run": source._reception.run}
    answer = httpx.post(f"{address}/sampler/groups", content=b"x", headers=headers | run)
    assert answer.status_code == 400
    assert "no file of groups" in answer.json()["error"]


def test_a_sampler_whose_frozen_weights_are_others_is_refused(tmp_path):
    def made(seed):
        policy, params = Policy.from_config(tiny.CONFIG, jax.random.key(seed))
        policy, params = policy.with_adapters(params, Lora(2, 4.0), jax.random.key(1))
        return policy, params, Engine(policy, steps_per_dispatch=2, **LENGTHS)

    def role(seed, address):
        policy, params, engine = made(seed)
        frozen = lora.split(engine.verbs.cast(params))[1]
        return roles.SamplerRole(policy, engine, SAMPLING, frozen=frozen, address=address, key=KEY)

    policy, params, engine = made(0)
    model = RewardModel([RewardFunction(name="good_accuracy")])
    sampler = Sampler(engine, SAMPLING, Letters(), model, seed=0, keep_sample=lambda *_: None)
    source = RemoteBatches(
        sampler,
        prompts_of,
        tmp_path / "in_flight",
        fits=roles.fits_of(policy, engine, SAMPLING),
        fits_of_params=lambda params: roles.fits_of_params(engine.verbs, params),
        weights_of=lambda params: roles.sent_weights(engine.verbs, params),
        address=("127.0.0.1", 0),
        key=KEY,
        batch_size=P,
    )
    with ThreadPoolExecutor(3) as pool:
        try:
            training = pool.submit(source.next, 0, params)
            with pytest.raises(roles.Refusal, match="its digest of the frozen weights is '"):
                pool.submit(role(1, source.address).run).result(60)
            pool.submit(role(0, source.address).run)
            assert len(training.result(60)) == P
        finally:
            source.end()
            source.close()


@contextlib.contextmanager
def hosted(desk):
    """The server for samplers of this desk; yields its address."""
    host = SamplersHost(desk, host="127.0.0.1", port=0, key=KEY)
    host.start()
    try:
        yield f"http://{host.address}"
    finally:
        host.close()


def test_a_head_that_is_half_sent_to_the_samplers_port_ends(monkeypatch):
    monkeypatch.setattr(samplers, "_HEAD_S", 0.2)
    monkeypatch.setattr(samplers, "_CONNECTIONS", 1)
    with hosted(mock.Mock()) as address, contextlib.ExitStack() as stack:
        at = address.removeprefix("http://").split(":")
        first, second = (stack.enter_context(socket.create_connection(at, 20)) for _ in range(2))
        first.sendall(b"POST /sampler/order HTTP/1.1\r\n")
        assert b" 503 " in second.recv(4096)
        with contextlib.suppress(ConnectionError):
            assert first.recv(4096) == b""


def test_samplers_that_wait_for_orders_keep_nothing_else_waiting(monkeypatch):
    monkeypatch.setattr(samplers, "MAX_SAMPLERS", 2)
    monkeypatch.setattr(samplers, "_THREADS", 1)
    asked, release = threading.Semaphore(0), threading.Event()

    def order(_):
        asked.release()
        release.wait(30)
        return {}

    desk = mock.Mock(order=order, alive=lambda _: {})
    headers = {"Authorization": f"Bearer {KEY}"}
    with hosted(desk) as address, ThreadPoolExecutor(2) as pool:

        def ask(what):
            return httpx.post(f"{address}/sampler/{what}", json={}, headers=headers, timeout=30)

        try:
            waiting = [pool.submit(ask, "order") for _ in range(2)]
            assert all(asked.acquire(timeout=20) for _ in waiting)
            refused = ask("order")
            assert refused.status_code == 503
            assert "wait for orders; come back later" in refused.json()["error"]
            assert ask("alive").status_code == 200
        finally:
            release.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert ask("order").status_code == 200


def test_roles_that_cannot_work_are_refused_in_a_sentence(monkeypatch):
    for text in ("8470", "host", "host:", "host:70000", ":80"):
        with pytest.raises(ValueError, match="--listen is HOST:PORT"):
            roles.parsed_address(text, "--listen")
    assert roles.parsed_address("[::1]:80", "--listen") == ("::1", 80)
    monkeypatch.delenv(roles.KEY_VARIABLE, raising=False)
    with pytest.raises(ValueError, match="set ADPO_JAX_RUN_KEY to the same"):
        roles.read_key()


# --- processes


@contextlib.contextmanager
def another_host():
    """A network namespace, joined to this one by a cable: (command prefix, our address, the cable).

    Skips the test where this machine's user may not make one.
    """
    name = f"adpo{os.getpid() % 10000}"
    ours, theirs = f"{name}a", f"{name}b"
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("a host of its own is a network namespace, which needs root and iproute2")

    def ip(*command):
        subprocess.run(["ip", *command], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespace can be made here: {error.stderr.decode()[:100]}")
    try:
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        ip("addr", "add", "10.213.7.1/24", "dev", ours)
        ip("link", "set", ours, "up")
        ip("-n", name, "addr", "add", "10.213.7.2/24", "dev", theirs)
        ip("-n", name, "link", "set", theirs, "up")
        yield ["ip", "netns", "exec", name], "10.213.7.1", ours
    finally:
        subprocess.run(["ip", "link", "del", ours], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def sampler_process(on_it, address):
    """A sampler of the trainer at `address`, in a process begun by the prefix `on_it`."""
    program = str(Path(__file__).with_name("sampler_process.py"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*on_it, sys.executable, program, address], env=env)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def lossy(cable):
    """Makes our end of a cable slow and has it lose packets; returns a reader of how many it lost.

    Where the kernel has netem, packets are late by 100 ms and one in twenty is lost. Otherwise the
    cable takes 1 Mbit/s and loses what its queue of 6 kB has no room for. Skips the test where the
    kernel has neither.
    """
    kinds = ["netem delay 100ms 20ms loss 5%", "tbf rate 1mbit burst 4kb limit 6kb"]
    if shutil.which("tc") is None:
        pytest.skip("a line that loses packets needs tc (iproute2)")

    def tc(*command):
        return subprocess.run(["tc", *command], capture_output=True, text=True, check=False)

    def put(kind):
        return tc("qdisc", "add", "dev", cable, "root", *kind.split()).returncode == 0

    if not any(put(kind) for kind in kinds):
        pytest.skip("a line that loses packets needs a kernel with sch_netem or sch_tbf")
    try:
        yield lambda: int(
            re.search(r"dropped (\d+)", tc("-s", "qdisc", "show", "dev", cable).stdout)[1]
        )
    finally:
        tc("qdisc", "del", "dev", cable, "root")


@pytest.mark.long
def test_a_sampler_on_a_host_behind_a_slow_line_that_loses_packets_loses_nothing(
    policy_and_params, trainer, monkeypatch
):
    monkeypatch.setattr(elsewhere, "POLL_S", 1.0)
    _, params = policy_and_params
    steps, trained = 15, []

    def train(source, some):
        for step in some:
            found = source.next(step, at_step(params, step % 5))
            trained.extend(int(s) for s in found.prompts.columns["solution"])

    with another_host() as (on_it, address, cable):
        source = trainer(1, host=address, num_steps=steps)
        with sampler_process(on_it, source.address):
            with lossy(cable) as lost:
                train(source, range(10))
                assert lost() > 0
            train(source, range(10, steps))  # the line is well again
    assert sorted(trained) == list(range(P * steps))


@pytest.mark.long
def test_a_sampler_on_a_host_that_is_cut_off_for_a_minute_comes_back(
    policy_and_params, engines, trainer, monkeypatch
):
    monkeypatch.setattr(elsewhere, "LEASE_S", 4.0)
    monkeypatch.setattr(elsewhere, "POLL_S", 1.0)
    monkeypatch.setattr(elsewhere, "_TELL_S", 1e9)
    _, params = policy_and_params
    steps = 4000
    with another_host() as (on_it, address, cable):
        source = trainer(1, host=address, num_steps=steps)
        start(policy_and_params, engines[0], source.address)
        trained, step = [], 0

        def until(holds, seconds):
            nonlocal step
            deadline = time.monotonic() + seconds
            while not holds():
                assert time.monotonic() < deadline
                assert step < steps
                found = source.next(step, at_step(params, step % 5))
                trained.extend(int(s) for s in found.prompts.columns["solution"])
                step += 1
                time.sleep(0.2)

        def connected(count):
            return lambda: source._dispatch.num_samplers == count

        with sampler_process(on_it, source.address):
            until(lambda: step and connected(2)(), 120)
            subprocess.run(["ip", "link", "set", cable, "down"], check=True)
            cut = time.monotonic()
            until(connected(1), 30)
            until(lambda: time.monotonic() - cut > 60, 90)
            subprocess.run(["ip", "link", "set", cable, "up"], check=True)
            until(connected(2), 120)
            began = step
            until(lambda: step >= began + 10, 120)
    assert len(trained) == len(set(trained)) == step * P


def start_process(folder, *arguments, name):
    """A process of a run; its log is NAME.log."""
    command = [sys.executable, "-m", "adpo_jax.main", "--config=configs/arithmetic.py", *arguments]
    env = os.environ | {roles.KEY_VARIABLE: KEY}
    with (folder / f"{name}.log").open("a") as log:
        return subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log)


@pytest.mark.long
def test_a_sampler_that_is_killed_ten_times_loses_and_doubles_nothing(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = [s for s in OVERRIDES if "mesh" not in s and "reward" not in s]
    settings += ["--config.actor_rollout_ref.rollout.max_staleness=1", "--config.sft.steps=0"]
    settings += ["--config.trainer.total_training_steps=40", "--config.trainer.save_freq=-1"]
    settings += ["--config.trainer.rollout_data_dir=rollouts", "--config.trainer.test_freq=-1"]
    settings += ["--config.data.max_response_length=24", "--config.data.max_val_samples=0"]
    settings += ["--config.data.val_files="]
    sampler = ("--role=sampler", f"--trainer={address}", *settings)
    trainer = start_process(
        tmp_path,
        "--role=trainer",
        f"--listen={address}",
        f"--workdir={tmp_path / 'run'}",
        *settings,
        name="trainer",
    )
    staying = start_process(tmp_path, *sampler, name="staying")
    kills = 0
    try:
        while trainer.poll() is None and kills < 10:
            victim = start_process(tmp_path, *sampler, name="victim")
            time.sleep(8 + kills % 3)
            victim.kill()
            victim.wait()
            kills += 1
        assert trainer.wait(600) == 0, (tmp_path / "trainer.log").read_text()
        assert staying.wait(60) == 0, (tmp_path / "staying.log").read_text()
    finally:
        for process in (trainer, staying, victim):
            process.kill()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["step"] > 0]
    assert len(rows) == 40
    found = [recording.read(tmp_path / "run" / "rollouts", step) for step in range(1, 41)]
    asked = [q for groups in found for q in groups.prompts.columns["question"]]
    assert len(asked) == len(set(asked)) == 40 * 8


@pytest.mark.long
def test_two_trainer_processes_hand_out_groups_and_go_on_after_a_restart(tmp_path, monkeypatch):
    monkeypatch.setenv(roles.KEY_VARIABLE, KEY)
    settings = [s for s in OVERRIDES if "mesh" not in s and "reward" not in s]
    settings += ["--config.actor_rollout_ref.rollout.max_staleness=1", "--config.sft.steps=0"]
    settings += ["--config.trainer.rollout_data_dir=rollouts", "--config.trainer.test_freq=-1"]
    settings += ["--config.data.max_val_samples=0", "--config.data.val_files="]
    (tmp_path / "weights").mkdir()
    for number_of_steps, more in (2, []), (4, [f"--weights={tmp_path / 'weights'}"]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        steps = f"--config.trainer.total_training_steps={number_of_steps}"
        role = ("--role=trainer", f"--listen={address}")
        trainers = start_two(tmp_path / "run", *settings, steps, *role, *more)
        sampling = ("--role=sampler", f"--trainer={address}", *settings, steps)
        sampler = start_process(tmp_path, *sampling, name="sampler")
        try:
            finish(tmp_path / "run", trainers)
            assert sampler.wait(60) == 0, (tmp_path / "sampler.log").read_text()
        finally:
            sampler.kill()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["samplers/connected"] == 1 and row["update/skipped"] == 0 for row in rows)
    found = [recording.read(tmp_path / "run" / "rollouts", step) for step in range(1, 5)]
    asked = [q for groups in found for q in groups.prompts.columns["question"]]
    assert len(asked) == len(set(asked)) == 4 * 8
    assert len(list((tmp_path / "weights").iterdir())) == 2
