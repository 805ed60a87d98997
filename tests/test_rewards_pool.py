"""The worker pool: deadlines, deaths, memory, recycling, threads and a clean end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from adpo_jax.rewards import RewardError, RewardFunction, RewardModel
from adpo_jax.rewards.pool import WorkerPool

SOURCE = '''
import asyncio
import os
import subprocess
import sys
import time

def obeys(completions, solution, **columns):
    """Does what the completion says."""
    text = completions[0][0]["content"]
    if text == "hang":
        while True:
            pass
    if text == "hang deaf":
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if text == "spawn":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open(columns["pid_file"][0], "w").write(str(child.pid))
        time.sleep(1000)
    if text == "daemon":
        # The child leaves the worker's session, and its parent ends, so that init would adopt it.
        code = (
            "import os, subprocess, sys; "
            "os.setsid(); os.environ.clear(); "
            "os.fork() and os._exit(0); os.setsid(); "
            "child = subprocess.Popen(['setsid', 'sleep', '1000']); "
            f"open({columns['pid_file'][0]!r}, 'a').write(f'{{os.getpid()}} {{child.pid}} '); "
            "child.wait()"
        )
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PATH": "/usr/bin:/bin"})
        if solution[0] == "hang":
            time.sleep(1000)
    if text == "die":
        os._exit(3)
    if text == "segfault":
        os.kill(os.getpid(), 11)
    if text == "exit":
        sys.exit("bye")
    if text == "memory":
        bytearray(1 << 40)
    if text == "raise":
        raise KeyError("no such thing")
    if text == "pid":
        return [float(os.getpid())]
    if text == "nap":
        time.sleep(0.2)
    if text == "modules":
        return [float("jax" in sys.modules or "sympy" in sys.modules)]
    return [1.0]

def on_cpu(completions):
    return [float(os.environ.get("JAX_PLATFORMS") == "cpu")]

def meets(completions, folder):
    """Whether another call is there at the same time."""
    text = completions[0][0]["content"]
    open(os.path.join(folder[0], text), "w").close()
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        if len(os.listdir(folder[0])) == 2:
            return [1.0]
        time.sleep(0.01)
    return [0.0]

ASLEEP, UNDER_WAY = [], []

async def waits(completions, solution):
    ASLEEP.append(1)
    await asyncio.sleep(0.1)
    together = float(len(ASLEEP))
    if completions[0][0]["content"] == "hang":
        await asyncio.sleep(1000)
    await asyncio.sleep(0.1)
    ASLEEP.pop()
    return [together]

async def judges(completions):
    text = completions[0][0]["content"]
    if text in ("hang", "die"):
        obeys(completions, ["5"])
    await asyncio.sleep(0.3)
    return [1.0]

async def imports_first(completions):
    if not ASLEEP:
        time.sleep(0.4)
    ASLEEP.append(1)
    UNDER_WAY.append(1)
    await asyncio.sleep(0.1)
    together = float(len(UNDER_WAY))
    UNDER_WAY.pop()
    return [together]

async def cancels(completions):
    raise asyncio.CancelledError

async def waits_too_briefly(completions):
    await asyncio.wait_for(asyncio.sleep(5), 0.01)

async def thinks(completions):
    text = completions[0][0]["content"]
    for _ in range(3):
        time.sleep(0.0 if text == "a" else 0.26)
        await asyncio.sleep(0.01)
    print(text)
    return [1.0]
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "obeys.py"
    path.write_text(SOURCE)
    return str(path)


def make(file, name="obeys", num_workers=2, timeout_s=1.0, **settings):
    return RewardModel(
        [RewardFunction(file, name)], num_workers=num_workers, timeout_s=timeout_s, **settings
    )


def columns(completions, **more):
    return {"solution": ["5"] * len(completions)} | more


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_give_what_this_process_gives():
    functions = [
        RewardFunction(),
        RewardFunction(name="format_reward", weight=0.5, kwargs={"pattern": ".*box.*"}),
        RewardFunction(name="exact_match"),
        RewardFunction(name="length_penalty", kwargs={"max_length": 10, "buffer_length": 5}),
    ]
    completions = [
        f"\\boxed{{{i % 7}}}" if i % 3 else "so it goes on and on and on" for i in range(500)
    ]
    data = {
        "solution": [str(i % 5) for i in range(500)],
        "completion_tokens": [i % 12 for i in range(500)],
        "unused": [object()] * 500,
    }
    with RewardModel(functions) as here, RewardModel(functions, num_workers=2) as pooled:
        expected, scores = here.score(completions, data), pooled.score(completions, data)
    np.testing.assert_array_equal(scores.total, expected.total)
    assert scores.components.keys() == expected.components.keys()
    for name, values in expected.components.items():
        np.testing.assert_array_equal(scores.components[name], values)
    assert scores.counts == expected.counts
    assert expected.counts["unparsed"] > 0


def test_what_hangs_is_killed_counted_and_scores_zero_and_the_rest_is_graded(file):
    completions = ["a", "hang", "b", "hang deaf", "c", "d"]
    with make(file) as model:
        started = time.monotonic()
        scores = model.score(completions, columns(completions))
        assert time.monotonic() - started < 60.0
        np.testing.assert_array_equal(scores.total, [1, 0, 1, 0, 1, 1])
        assert scores.counts["timeouts"] == 2
        np.testing.assert_array_equal(model.score(["a"], columns(["a"])).total, [1])


def test_what_hangs_stops_the_run_when_asked_to(file):
    with (
        make(file, on_timeout="stop") as model,
        pytest.raises(RewardError, match="ran past its deadline") as caught,
    ):
        model.score(["a", "hang"], columns(["a", "hang"]))
    assert caught.value.sample["completion"] == "hang"


@pytest.mark.parametrize("death", ["die", "segfault", "memory"])
def test_a_worker_that_dies_is_replaced_and_its_sample_scores_zero(file, death):
    completions = ["a", death, "b"]
    with make(file, num_workers=1, memory_limit_mb=1024) as model:
        scores = model.score(completions, columns(completions))
    np.testing.assert_array_equal(scores.total, [1, 0, 1])
    assert scores.counts["crashes"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_killed_from_outside_costs_nothing(file):
    completions = ["nap"] * 6
    with make(file, num_workers=1, timeout_s=5.0) as model:
        model.score(["a"], columns(["a"]))
        handle = model.submit(completions, columns(completions))
        time.sleep(0.3)
        (pid,) = model._backend.pool.worker_ids()
        os.kill(pid, signal.SIGKILL)
        scores = handle.result()
    np.testing.assert_array_equal(scores.total, [1] * 6)
    assert scores.counts["crashes"] == 0


@pytest.mark.parametrize("how", ["raise", "exit"])
def test_a_function_that_raises_stops_the_run_with_its_traceback_and_the_sample(file, how):
    completions = ["a"] * 30 + [how] + ["a"] * 30
    with make(file) as model:
        with pytest.raises(RewardError) as caught:
            model.score(completions, columns(completions))
        assert caught.value.sample["index"] == 30
        assert caught.value.sample["completion"] == how
        assert "in obeys" in caught.value.traceback_text
        # The pool is still of use.
        np.testing.assert_array_equal(model.score(["a"], columns(["a"])).total, [1])


def test_async_functions_wait_together_and_are_cut_off_one_by_one(file):
    completions = ["a"] * 15 + ["hang"]
    with make(file, name="waits", num_workers=1) as model:
        scores = model.score(completions, columns(completions))
    # 4 chunks of 4, each of which sleeps together; the last sample is cut off.
    np.testing.assert_array_equal(scores.total, [4] * 15 + [0])
    assert scores.counts["timeouts"] == 1


def test_what_async_functions_do_between_their_waits_is_not_the_others_time(file, capfd):
    # Each of the first chunk takes 0.8 of the second that it may, and more beside another one.
    completions = ["\x1b[2J"] * 4 + ["a"] * 12
    with make(file, name="thinks", num_workers=1) as model:
        scores = model.score(completions, columns(completions))
    np.testing.assert_array_equal(scores.total, [1] * 16)
    out = capfd.readouterr().out
    assert out.count("[2J") == 4
    assert "\x1b" not in out


@pytest.mark.parametrize(("end", "count"), [("hang", "timeouts"), ("die", "crashes")])
def test_a_blocked_or_crashed_async_function_costs_no_other_completion(file, end, count):
    completions = ["a", "a", end, "a"] + ["a"] * 12
    with make(file, name="judges", num_workers=1) as model:
        scores = model.score(completions, columns(completions))
    np.testing.assert_array_equal(scores.total, [1, 1, 0, 1] + [1] * 12)
    assert scores.counts[count] == 1


def test_a_slow_first_call_of_an_async_function_does_not_have_the_others_wait(file):
    with make(file, name="imports_first", num_workers=1) as model:
        scores = model.score(["a"] * 16, columns(["a"] * 16))
    assert scores.total[1:4].max() > 1  # of the first chunk, after the slow one


@pytest.mark.parametrize(
    ("name", "error"), [("cancels", "CancelledError"), ("waits_too_briefly", "TimeoutError")]
)
def test_an_async_function_that_cancels_or_limits_itself_has_raised(file, name, error):
    with (
        make(file, name=name, num_workers=1) as model,
        pytest.raises(RewardError, match=error),
    ):
        model.score(["a"], columns(["a"]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_of_a_killed_worker_are_killed_too(file, tmp_path):
    pid_file = tmp_path / "pid"
    with make(file, num_workers=1) as model:
        model.score(["spawn"], columns(["spawn"], pid_file=[str(pid_file)]))
        pid = int(pid_file.read_text())
        assert wait_until(lambda: not is_alive(pid))


def pids_in(path) -> list[int]:
    """The two processes that a daemon wrote down; they may still be on their way."""
    found: list[int] = []

    def are_there():
        found[:] = map(int, path.read_text().split()) if path.exists() else []
        return len(found) == 2

    assert wait_until(are_there)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="needs subreapers")
@pytest.mark.parametrize("end", ["runs past its deadline", "is closed"])
def test_daemons_that_a_reward_started_end_with_its_worker(file, tmp_path, end):
    path, solution = tmp_path / "pids", "hang" if end == "runs past its deadline" else "5"
    with make(file, num_workers=1, timeout_s=3.0) as model:
        scores = model.score(["daemon"], {"solution": [solution], "pid_file": [str(path)]})
        assert scores.counts["timeouts"] == (solution == "hang")
        pids = pids_in(path)
        if solution == "hang":
            assert not any(map(is_alive, pids))  # the score came after they were gone
        else:
            assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))


def test_workers_are_recycled(file):
    functions = [RewardFunction(file, "obeys")]
    pool = WorkerPool(functions, num_workers=1, timeout_s=5.0, recycle_after=3)
    try:
        pids = set()
        for _ in range(4):
            job = pool.submit(["pid"] * 3, columns(["pid"] * 3), [None])
            job.wait()
            pids |= {reply["parts"][""][0] for reply in job.outcomes.values()}
        assert len(pids) == 4
    finally:
        pool.close()


def test_workers_start_lazily_and_import_neither_jax_nor_sympy(file):
    with RewardModel([RewardFunction()], num_workers=1) as lazy:
        assert lazy._backend.pool.worker_ids() == []
    with make(file, num_workers=1) as model:
        np.testing.assert_array_equal(model.score(["modules"], columns(["modules"])).total, [0])


def test_a_function_that_imports_jax_cannot_take_the_accelerator(file, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with make(file, "on_cpu", num_workers=1) as model:
        np.testing.assert_array_equal(model.score(["a"], {}).total, [1])


def test_odd_characters_reach_the_workers(file):
    completions = ["\ud83d \x00 \\boxed{5}", "\udcff" * 10, "\n" * 1000]
    functions = [RewardFunction(), RewardFunction(file, "obeys")]
    with RewardModel(functions, num_workers=1) as model:
        scores = model.score(completions, columns(completions))
    np.testing.assert_array_equal(scores.total, [2, 1, 1])


def test_batches_overlap_and_come_from_any_thread(file, tmp_path):
    with make(file, "meets", timeout_s=30.0) as model:
        (folder := tmp_path / "meeting").mkdir()
        handles = [model.submit([text], {"folder": [str(folder)]}) for text in "ab"]
        results = []
        threads = [
            threading.Thread(target=lambda h=h: results.append(h.result().total)) for h in handles
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    np.testing.assert_array_equal(results, np.ones((2, 1)))


def test_a_handle_gives_the_same_scores_twice():
    with RewardModel([RewardFunction()], num_workers=1) as model:
        handle = model.submit(["\\boxed{5}"], {"solution": ["5"]})
        assert handle.result() is handle.result()


def test_a_column_that_cannot_be_sent_is_named(file):
    with make(file, num_workers=1) as model, pytest.raises(ValueError, match="column 'lock'"):
        model.score(["a"], columns(["a"], lock=[threading.Lock()]))


def test_closing_kills_the_workers_even_while_they_hang(file):
    model = make(file, timeout_s=1000.0)
    handle = model.submit(["hang"] * 2, columns(["hang"] * 2))
    assert wait_until(lambda: len(model._backend.pool.worker_ids()) == 2)
    pids = model._backend.pool.worker_ids()
    started = time.monotonic()
    model.close()
    model.close()
    assert time.monotonic() - started < 60.0
    with pytest.raises(RuntimeError, match="closed"):
        handle.result()
    assert all(wait_until(lambda p=p: not is_alive(p)) for p in pids)
    with pytest.raises(RuntimeError, match="closed"):
        model.score(["a"], columns(["a"]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["returns", "raises", "is killed"])
def test_nothing_that_a_reward_started_outlives_the_run(file, tmp_path, end):
    pids_file = tmp_path / "pids"
    code = f"""
import json, os, signal, time
from adpo_jax.rewards import RewardFunction, RewardModel
model = RewardModel([RewardFunction({file!r}, "obeys")], num_workers=2, timeout_s=1000.0)
daemon = {str(tmp_path / "daemon")!r}
model.submit(["hang", "daemon"], {{"solution": ["hang"] * 2, "pid_file": [daemon] * 2}})
while len(model._backend.pool.worker_ids()) < 2:
    time.sleep(0.05)
while not os.path.exists(daemon) or len(open(daemon).read().split()) < 2:
    time.sleep(0.05)
open({str(pids_file)!r}, "w").write(json.dumps(model._backend.pool.worker_ids()))
end = {end!r}
if end == "raises":
    raise SystemExit("as asked")
if end == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    pids = [*json.loads(pids_file.read_text()), *pids_in(tmp_path / "daemon")]
    assert len(pids) == 4
    assert all(wait_until(lambda p=p: not is_alive(p)) for p in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["returns", "is killed", "is killed while grading"])
def test_nothing_that_a_reward_started_in_process_outlives_the_run(tmp_path, end):
    rewards = tmp_path / "starts.py"
    rewards.write_text("""
import os, signal, subprocess, time

def starts(completions, solution, end, pid_file, **columns):
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    forked = os.fork()
    if not forked:
        os.setsid()
        time.sleep(1000)
    time.sleep(0.1)
    open(pid_file[0], "w").write(f"{child.pid} {forked}")
    if end[0] == "is killed while grading":
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)
""")
    pid_file = tmp_path / "pids"
    code = f"""
import os, signal, subprocess
from adpo_jax.rewards import RewardFunction, RewardModel
model = RewardModel([RewardFunction({str(rewards)!r}, "starts")])
columns = {{"solution": ["1"], "end": [{end!r}], "pid_file": [{str(pid_file)!r}]}}
own = subprocess.Popen(["sleep", "1000"])
open({str(tmp_path / "own")!r}, "w").write(str(own.pid))
assert model.score(["a"], columns).total == [1.0]
if {end!r} == "is killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, stdout=subprocess.DEVNULL)
    pids = pids_in(pid_file)
    assert all(wait_until(lambda p=p: not is_alive(p)) for p in pids)
    own = int((tmp_path / "own").read_text())  # the run's own child is nobody's to kill
    assert is_alive(own)
    os.kill(own, signal.SIGKILL)
