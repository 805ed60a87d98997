"""Names of metrics, trackers, the terminal, and where time goes."""

import contextlib
import io
import re
import runpy
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import PartitionSpec
from parsing import parse

from adpo_jax.devices import sharding
from adpo_jax.devices.flops import traced_flops
from adpo_jax.devices.meter import Meter
from adpo_jax.log import progress, trackers
from adpo_jax.log.metrics import JsonlWriter, make_writer, markdown_table, read_jsonl
from adpo_jax.log.progress import Progress
from adpo_jax.log.trackers import TRACKERS
from adpo_jax.losses import ALGORITHMS, Adpo
from adpo_jax.run import metric_names, setup
from adpo_jax.run.cold_start import ColdStart
from adpo_jax.update import sft

DOCS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"


def documented() -> dict[str, str]:
    """Name pattern -> when it appears, from the table of docs/metrics.md."""
    found = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[0].startswith("`"):
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), cells[2])
    return found


def check_documented(written: set[str], whens: set[str]) -> None:
    """Checks a run's names against the documentation, both ways."""
    patterns = {
        re.compile(re.sub(r"<[a-z]+>", "[^ ]+", re.escape(name))): (name, when)
        for name, when in documented().items()
    }
    unknown = {name for name in written if not any(p.fullmatch(name) for p in patterns)}
    assert not unknown, f"not in docs/metrics.md: {sorted(unknown)}"
    silent = [
        name
        for p, (name, when) in patterns.items()
        if when in whens and not any(p.fullmatch(w) for w in written)
    ]
    assert not silent, f"in docs/metrics.md, but not written: {silent}"


def test_an_undocumented_or_missing_metric_is_noticed():
    with pytest.raises(AssertionError, match=r"not in docs.*'reward/a b'"):
        check_documented({"reward/a b"}, set())
    with pytest.raises(AssertionError, match=r"not written: .*adpo/mean_tau"):
        check_documented({"adpo/loss"}, {"adpo"})


def test_the_names_of_metrics_in_the_code_are_the_documented_ones():
    changing = {"eval", "sft"}  # eval has the numbers of samples in its names, sft is before
    listed = {f"{group}/{n}" for group, names in metric_names.NAMES.items() for n in names.split()}
    for algorithm in ALGORITHMS.values():
        listed |= {f"{algorithm.name}/{metric.name}" for metric in algorithm.declared_metrics()}
    named = {name for name in documented() if name.split("/")[0] not in changing}
    assert listed == {name.replace("<component>", "*") for name in named}
    evaluated = metric_names.of_rows(
        [m.name for m in Adpo().metrics],
        filtered=False,
        ahead=False,
        evaluated=True,
        num_samples=4,
        ks=(1, 2),
        by_category=True,
    )
    check_documented(
        {name.replace("*", "x") for name in evaluated},
        {"always", "adpo", "evaluation", "samples"},
    )


def test_the_table_of_the_algorithms_metrics_is_as_they_declare_them():
    made = runpy.run_path(str(DOCS.parents[1] / "scripts" / "make_metrics_reference.py"))
    written = made["REFERENCE"].read_text()
    assert written == made["reference"](), "stale: run python scripts/make_metrics_reference.py"


BEST = {
    "adpo/reference_kl": (None, ("--config.algorithm.beta_reference_kl=0.1",)),
    "eval/acuracy": ("did you mean eval/accuracy?", ()),
    "reward/mean": (None, ()),
    "reward/my_own": (None, ()),
    "eval/pass@4": (None, ("--config.eval.n=8", "--config.eval.ks=(1, 4)")),
    "eval/pass@2": ("did you mean eval/", ("--config.eval.n=8",)),
    "eval/algebra/accuracy": (None, ("--config.eval.category_key=question",)),
    "eval/algebra/acuracy": ("did you mean", ("--config.eval.category_key=question",)),
    "grpo/loss": ("did you mean adpo/loss?", ()),
    "filter/attempts": (None, ("--config.algorithm.filter_groups=true",)),
    "filter/fillers": ("no row of this run has", ()),
}


@pytest.mark.parametrize("name", BEST)
def test_the_best_checkpoint_is_by_a_metric_that_there_is(name):
    text, more = BEST[name]
    wrong = rf"best_metric={name}.*{re.escape(text or '')}"
    with pytest.raises(ValueError, match=wrong) if text else contextlib.nullcontext():
        parse(f"--config.trainer.best_metric={name}", *more)


class StandIn:
    """A tracker's module that writes down what it is told."""

    def __init__(self):
        self.calls = []
        self.config = types.SimpleNamespace(update=self.note("config"))
        self.entities = types.SimpleNamespace(Metric=lambda *args: args)
        for name in ("log", "finish", "log_batch", "log_text", "set_terminated"):
            setattr(self, name, self.note(name))

    def note(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def init(self, **kwargs):
        self.calls.append(("init", (), kwargs))
        return self

    def MlflowClient(self):
        return self

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment {name}"

    def create_run(self, experiment, run_name):
        self.calls.append(("create_run", (experiment, run_name), {}))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run 1"))


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_gets_metrics_samples_and_the_config_without_secrets(
    tracker, tmp_path, monkeypatch
):
    module = StandIn()
    monkeypatch.setitem(sys.modules, tracker, module)
    for _ in range(2):  # the second time is a resumed run
        config = parse(f"--config.trainer.logger=('{tracker}',)")
        writer = make_writer(tmp_path, None, *setup.make_trackers(config, tmp_path))
        writer.write_hparams({"tau": 0.8, "kwargs": {"api_key": "hunter2"}})
        writer.write_scalars(3, {"reward/mean": jnp.float32(0.5), "adpo/loss": np.nan})
        writer.write_table(3, "samples", [{"prompt": "2+2", "completion": "<b>4", "reward": 1.0}])
        writer.write_table(4, "samples", [])
        writer.close()
    told = repr(module.calls)
    assert "hunter2" not in told
    assert all(text in told for text in ("0.8", "reward/mean", "<b>4", "adpo_jax"))
    assert "adpo/loss" not in told  # NaN is no value to plot
    starts = [call for call in module.calls if call[0] in ("init", "create_run")]
    assert len(starts) == (1 if tracker == "mlflow" else 2)
    assert all(start == starts[0] for start in starts)
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert rows[0]["adpo/loss"] is None


@pytest.mark.parametrize(
    ("logger", "text"),
    [("('tensorboard2',)", "is made of wandb, mlflow, trackio"), ("('wandb',)", "pip install")],
)
def test_a_tracker_that_is_unknown_or_not_installed_is_refused(logger, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = parse(f"--config.trainer.logger={logger}")
    with pytest.raises(ValueError, match=text):
        setup.build(config)


def test_a_tracker_that_fails_is_told_of_once_and_counted_and_ends_nothing(
    tmp_path, monkeypatch, capsys
):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    config = parse("--config.trainer.logger=('mlflow',)")
    (tracker,) = setup.make_trackers(config, tmp_path)
    writer = make_writer(tmp_path, None, tracker)
    attempts = []

    def unreachable(*_, **__):
        attempts.append(clock[0])
        clock[0] += 2.0
        raise ConnectionError("no route\nto the host")

    clock = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock[0])
    module.log_batch = module.log_text = module.set_terminated = unreachable
    for step in range(1, 5):
        writer.write_scalars(step, {"reward/mean": 0.5})
        clock[0] += 9.0
    writer.write_table(4, "samples", [{"prompt": "2+2"}])
    writer.close()
    # Left alone for ten times as long as an attempt takes.
    assert attempts == [100.0, 129.0]
    err = capsys.readouterr().err
    assert err == "warning: mlflow failed, and the run goes on: ConnectionError: no route\n"
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row.get("tracker/failures") for row in rows] == [None, 1, 2, 3]


NAMES_FOR_MLFLOW = {
    "eval/pass@4": "eval/pass_at_4",
    "eval/Counting & Probability/accuracy": "eval/Counting _ Probability/accuracy",
    "eval/Älgebra: a-b.c_d/accuracy": "eval/Älgebra: a-b.c_d/accuracy",
    "eval//accuracy": "eval/_/accuracy",
    "eval/../accuracy": "eval/_/accuracy",
    "reward/f": "reward/f/value",
    "reward/f/len": "reward/f/len",
}


class Refused(Exception):
    error_code = "INVALID_PARAMETER_VALUE"


class Clash(Exception):
    error_code = "INTERNAL_ERROR"


def test_mlflow_gets_every_metric_that_it_takes_under_a_name_that_it_takes(
    tmp_path, monkeypatch, capsys
):
    module = StandIn()
    logged = []

    def log_batch(run, metrics):
        if len(metrics) > 1000 or any(len(metric.key) > 250 for metric in metrics):
            raise Refused("too many, or too long")
        if any(metric.key.startswith("step/") for metric in metrics):
            raise Clash("[Errno 20] Not a directory: '/mlruns/1/2/metrics/step/time'")
        logged.extend((metric.key, metric.value) for metric in metrics)

    module.log_batch = log_batch
    module.entities.Metric = lambda key, value, time, step: types.SimpleNamespace(
        key=key, value=value
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    config = parse("--config.trainer.logger=('mlflow',)")
    (tracker,) = setup.make_trackers(config, tmp_path)
    tracker.write_scalars(1, {"step/time": 1.0, "reward/mean": 2.0})
    assert logged == [("reward/mean", 2.0)]
    assert "mlflow gets no metric 'step/time'" in capsys.readouterr().err
    for name, taken in NAMES_FOR_MLFLOW.items():
        logged.clear()
        both = dict.fromkeys((name, "reward/f/len"), 1.0)
        tracker.write_scalars(1, both)
        assert (taken, 1.0) in logged
        assert len(logged) == len(both)
    for _ in range(2):
        logged.clear()
        many = {f"eval/{i}/accuracy": 0.5 for i in range(1001)} | {"x" * 251: 0.5, "reward/f": 0.2}
        tracker.write_scalars(2, many)
        assert len(logged) == 1002
        assert ("reward/f/value", 0.2) in logged
    assert tracker.num_failures == 0
    assert capsys.readouterr().err.count("warning: mlflow gets no metric 'xxx") == 1


def test_metrics_that_cannot_be_written_to_the_run_folder_are_no_small_matter(
    tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space left")

    writer = make_writer(tmp_path)
    monkeypatch.setattr(JsonlWriter, "write_scalars", full)
    with pytest.raises(OSError, match="no space left"):
        writer.write_scalars(1, {"reward/mean": 0.5})
    writer.close()


def test_a_tracker_that_cannot_start_is_refused_in_a_new_run_and_not_missed_in_an_old_one(
    tmp_path, monkeypatch, capsys
):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = parse("--config.trainer.logger=('wandb',)")
    start = module.init
    monkeypatch.setattr(module, "init", without_account)
    with pytest.raises(ValueError, match=r"wandb, which cannot be started: .*no API key.*leave it"):
        setup.make_trackers(config, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "init", start)
    setup.make_trackers(config, tmp_path)
    monkeypatch.setattr(module, "init", without_account)
    (tracker,) = setup.make_trackers(config, tmp_path)
    tracker.write_scalars(1, {"reward/mean": 0.5})
    assert tracker.num_failures == 1
    assert "goes on without: RuntimeError: no API key" in capsys.readouterr().err
    for damaged in ('{"wandb"', "null", '{"wandb": 3}'):
        (tmp_path / "trackers.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"trackers.json is not what a run wrote.* remove it"):
            setup.make_trackers(config, tmp_path)


def without_account(**_):
    raise RuntimeError("no API key")


def test_samples_are_a_table_in_tensorboard_with_their_text_as_it_is():
    table = markdown_table([{"completion": "<script>|\n`x`", "reward": 0.123456}])
    assert table.splitlines()[0] == "| completion | reward |"
    assert "&lt;script&gt;&#124;<br>&#96;x&#96; | 0.123 |" in table


SAMPLES = [
    {
        "prompt": "2+2",
        "completion": "[red]4[/red]\x1b[2J",
        "reward": 1.5,
        "components": {"accuracy": 1.0, "format": None},
    }
]


def shown(terminal: bool) -> str:
    out = io.StringIO()
    options = {"highlight": False, "soft_wrap": not terminal, "_environ": {"TERM": "xterm"}}
    console = rich.console.Console(file=out, force_terminal=terminal, width=100, **options)
    with Progress("iteration", total=4, done=1, console=console) as bar:
        with bar.doing("updating"):
            pass
        bar.update(2, "reward 0.5  100 tokens/s")
        bar.print_samples(SAMPLES)
    return out.getvalue()


def test_samples_are_a_table_with_each_score_in_a_terminal_and_lines_elsewhere():
    plain, table = shown(terminal=False), shown(terminal=True)
    assert "iteration 2/4  reward 0.5  100 tokens/s  eta 0:0" in plain
    assert "[+1.50 accuracy 1.00] 2+2" in plain
    assert all(name in table for name in ("accuracy", "format", "1.50", "2/4"))
    for text in (plain, table):
        assert "[red]4[/red]" in text
        assert "\x1b[2J" not in text


def test_a_slow_step_says_every_ten_seconds_what_is_being_done(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_S", 0.05)  # ten seconds, for a test
    out = io.StringIO()
    console = rich.console.Console(file=out, soft_wrap=True)
    with Progress("iteration", total=4, done=1, console=console) as bar:
        with bar.doing("compiling, sampling, grading"):
            time.sleep(0.3)
        bar.update(2, "reward 0.5")
        with bar.doing("updating"):
            time.sleep(0.2)
    lines = out.getvalue().splitlines()
    first = lines.index(next(line for line in lines if "reward 0.5" in line))
    said = "iteration 2/4: compiling, sampling, grading, 0:00 so far"
    assert lines[:first].count(said) == first >= 2
    assert "iteration 3/4: updating, 0:00 so far" in lines[first + 1 :]
    with progress.telling("reading the weights"):
        time.sleep(0.2)
    assert capsys.readouterr().err.count("reading the weights: 0:00 so far\n") >= 2


def test_a_fast_step_says_nothing_but_its_line():
    plain = shown(terminal=False)
    assert "so far" not in plain


def test_a_cold_start_of_slow_steps_is_told_by_time_and_logged_by_steps(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_S", 0.05)

    def make_sft_step(*_, **options):
        def step(state, batch):
            time.sleep(0.03)
            return state + 1, {"sft/loss": 1.0, "update/skipped": 0.0}

        return step

    rows = []
    stage = ColdStart(None, None, [], [], 12, 1, 1, 1, seed=0, save_freq=0)
    monkeypatch.setattr(sft, "make_sft_step", make_sft_step)
    monkeypatch.setattr(ColdStart, "_batches", lambda self, first: range(first, self.num_steps))
    writer = SimpleNamespace(write_scalars=lambda step, row: rows.append((step, row)))
    checkpoints = SimpleNamespace(is_due=lambda *_, **__: False)
    stop = SimpleNamespace(check=lambda: None)
    stage.train(StepCount(0), writer, checkpoints, stop)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss 1.000" in line]
    assert len(lines) >= 4
    assert lines[-1].startswith("cold start 12/12  loss 1.000")
    assert rows == [(0, {"sft/step": 12, "sft/loss": 1.0})]  # the files know nothing of time


class StepCount(int):
    """Stands in for a state, which knows its step alone."""

    @property
    def step(self) -> int:
        return int(self)

    def __add__(self, more):
        return StepCount(int(self) + more)


def test_flops_are_those_of_matrix_products_with_loops_counted_as_often_as_they_run():
    w, x = jnp.ones((16, 16)), jnp.ones((8, 16))

    def loss(w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=10)[0].sum()

    forward = 2 * 8 * 16 * 16 * 10
    assert traced_flops(jax.jit(loss).trace(w)) == forward
    # Backward: two products for each of the forward; the first step's input needs no gradient,
    # which the loop computes all the same.
    assert traced_flops(jax.jit(jax.grad(loss)).trace(w)) == 3 * forward
    again = jax.jit(jax.value_and_grad(jax.checkpoint(loss)))
    assert traced_flops(again.trace(w)) == 4 * forward
    # What nothing needs is not done: here the loss itself.
    assert traced_flops(jax.jit(jax.grad(jax.checkpoint(loss))).trace(w)) == 3 * forward
    shape = jax.ShapeDtypeStruct(w.shape, w.dtype)
    assert traced_flops(jax.jit(loss).trace(shape)) == forward

    def until(n):
        return jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] @ w), (0, x))[1]

    assert traced_flops(jax.jit(until).trace(3), unknown_turns=4) == 4 * forward // 10


def test_flops_of_a_shard_map_are_those_of_all_parts_but_not_of_devices_with_the_same_part():
    mesh = sharding.make_mesh(2, 2, 2)
    rows = PartitionSpec(("data", "fsdp"))

    def product(x):
        split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=rows, out_specs=rows)
        return split(x)

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    assert traced_flops(jax.jit(product).trace(x)) == 4 * (2 * 2 * 16 * 2)


def test_a_device_without_a_published_peak_has_no_mfu():
    program = jax.jit(lambda x: x @ x)
    args = (jnp.ones((4, 4)),)
    assert not Meter(program, None, jax.devices()[:1]).count(args, 1)
    chip = types.SimpleNamespace(device_kind="TPU v5 lite")
    meter = Meter(program, lambda: program, [chip, chip])
    counted = meter.count(args, 1)
    assert counted == {"update/mfu": 128, "update/hfu": 128}
    meter._update = None  # what is counted once is not traced again
    assert meter.count((jnp.zeros((4, 4)),), 1) == counted
    with pytest.raises(AttributeError):
        meter.count((jnp.ones((8, 8)),), 1)
    assert meter.shares(counted, 2.0)["update/mfu"] == 128 / 2.0 / (2 * 197e12)
