"""The console command, installed or in a clone: its help, its configs, its refusals."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags
from parsing import parse

from adpo_jax import evaluate, export, generate, losses
from adpo_jax.__main__ import COMMANDS
from adpo_jax.config import default_config
from adpo_jax.run import command_line, config_checks, config_files
from adpo_jax.run.config_checks import finalized
from adpo_jax.run.exit_codes import SECOND_INTERRUPT
from adpo_jax.run.identity import as_json
from adpo_jax.serve import __main__ as serve

ROOT = Path(__file__).resolve().parents[1]


def parsed(*argv: str, monkeypatch, **options):
    """The config that a command line gives."""
    values, argv = flags.FlagValues(), ["adpo-jax", *argv]
    monkeypatch.setattr(sys, "argv", argv)
    holder = config_flags.DEFINE_config_file("config", None, flag_values=values)
    flags.DEFINE_string("model", None, "", flag_values=values)
    command_line.parse_flags(argv, values, **options)
    return finalized(command_line.load_config(holder))


@pytest.mark.parametrize("text", ["[]", "{'a': None}", "3", "", "[" * 100_000])
@pytest.mark.parametrize("command", [export, generate, serve])
def test_an_override_that_is_no_json_object_is_refused_in_one_sentence(command, text, capsys):
    with pytest.raises(SystemExit) as ended:
        command.arguments(["--model", "m", "--override-config", text])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert ': wanted a JSON object, such as {"use_qk_clip": null}; given' in error
    assert error.count("\n") == 1


def write_run(folder: Path, config) -> Path:
    """A run's folder, as far as its config goes."""
    folder.mkdir()
    content = as_json(finalized(config), None, {"train_prompts": "6 prompts"})
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("nothing", ["None", "null"])
def test_a_key_that_may_have_no_value_is_unset(nothing, monkeypatch):
    steps = f"--config.trainer.total_training_steps={nothing}"
    epochs = "--config.trainer.total_epochs=3"
    config = parsed("--config=arithmetic", steps, epochs, monkeypatch=monkeypatch)
    assert config.trainer.total_training_steps is None
    assert config.trainer.total_epochs == 3
    again = steps.replace(nothing, "7")
    config = parsed("--config=arithmetic", steps, again, monkeypatch=monkeypatch)
    assert config.trainer.total_training_steps == 7
    scale = "--config.algorithm.scale_rewards=none"
    argv = (
        "--config=arithmetic",
        again,
        *steps.split("="),
        "--config.algorithm.adv_estimator=grpo",
    )
    config = parsed(*argv, scale, monkeypatch=monkeypatch)
    assert config.trainer.total_training_steps is None
    assert config.algorithm.scale_rewards == "none"


# --- an installed package


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what `pip install` puts on the path."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # building writes beside the sources
    source.mkdir()
    for name in ("adpo_jax", "configs", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "-q", "--no-deps"]
    command += ["--no-build-isolation", "--no-cache-dir", "-w", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (setuptools.__version__, result.stderr)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_there(code: str, site: Path, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(site), "GLIBC_TUNABLES": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


HELP = """
import os, sys, adpo_jax
from adpo_jax.__main__ import COMMANDS, main
for command in COMMANDS:
    if os.fork():  # each in a process of its own, since two of them have flags of one name
        os.wait()
        continue
    sys.argv = ["adpo-jax", command, "--help"]
    try:
        main()
    except SystemExit as leaving:
        print("exit", leaving.code, "jax" in sys.modules, "matplotlib" in sys.modules)
    break
print(adpo_jax.__file__)
"""


def test_an_installed_package_has_its_configs_and_tells_the_flags_of_each_command_quickly(
    installed, tmp_path
):
    result = run_there(HELP, installed, tmp_path)
    assert result.stdout.splitlines()[-1] == f"{installed}/adpo_jax/__init__.py", result.stderr
    assert result.stdout.count("exit 0 False False") == len(COMMANDS), result.stderr
    for words in ("--workdir: the run's folder", "--max-tokens", "--push-to-hub", "--drain-sec"):
        assert words in result.stdout
    assert result.stdout.count("`adpo-jax keys [WORD]` lists them") == 2
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
    assert f"Configs that come with the package: {names}.\n" in result.stdout
    assert "adpo-jax = adpo_jax.__main__:main" in next(
        installed.glob("*.dist-info/entry_points.txt")
    ).read_text(encoding="utf-8")


def test_an_installed_package_trains_by_a_configs_name_from_any_folder(installed, tmp_path):
    code = "import sys; from adpo_jax.__main__ import main; sys.argv = {}; main()"
    argv = ["adpo-jax", "train", "--config=gsm8k_grpo", "--config.algorithm.clip_low=-1"]
    result = run_there(code.format(argv), installed, tmp_path)
    assert result.returncode == 2, result.stderr
    assert "algorithm.clip_low must be" in result.stderr
    assert list(tmp_path.iterdir()) == []


# --- what --config may name


@pytest.mark.parametrize("name", config_files.shipped())
def test_a_run_gives_its_config_again(name, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", parse(name=name))
    for given in (f"--config={run}", f"--config={run / 'config.json'}"):
        config = parsed(given, "--config.trainer.seed=7", monkeypatch=monkeypatch)
        assert config.trainer.seed == 7
        with config.unlocked():
            config.trainer.seed = 0
        assert config.to_dict() == parse(name=name).to_dict()
    by_name = parsed("--config", name, monkeypatch=monkeypatch)
    assert by_name.to_dict() == parse(name=name).to_dict()


@pytest.mark.parametrize("name", losses.ALGORITHMS)
def test_a_key_that_a_run_derived_is_unset_where_the_run_gives_its_config_again(name, tmp_path):
    given = default_config()
    given.algorithm.adv_estimator = name
    final = given.copy_and_resolve_references()
    with final.unlocked():
        config_checks.fill_in(final)
    assert final != given
    (tmp_path / "config.json").write_text(json.dumps(as_json(final, None, {})))
    assert config_files.get_config(str(tmp_path / "config.json")) == given


OTHER_KEYS = {  # algorithm of the run -> overrides that its derived defaults follow
    "adpo": [
        ("--config.algorithm.adv_estimator=tpo", "--config.data.train_batch_size=8"),
        ("--config.algorithm.adv_estimator=grpo", "--config.data.train_batch_size=64"),
        ("--config.actor_rollout_ref.rollout.cache_dtype=int8",),
    ],
    "grpo": [("--config.algorithm.adv_estimator=gspo",)],
    "dr_grpo": [("--config.data.max_response_length=32",)],
}


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_an_override_of_a_runs_config_has_the_effect_that_it_has_on_the_first_config(
    name, tmp_path, monkeypatch
):
    named = f"--config.algorithm.adv_estimator={name}"
    run = write_run(tmp_path / "run", parse(named))
    for overrides in OTHER_KEYS[name]:
        config = parsed(f"--config={run}", *overrides, monkeypatch=monkeypatch)
        assert config.to_dict() == parse(named, *overrides).to_dict()


def test_a_config_of_a_run_has_lists_of_objects_too(tmp_path, monkeypatch):
    functions = "({'name': 'good_accuracy', 'weight': 2.0}, {'name': 'exact_match'})"
    given = parse(f"--config.reward_functions={functions}", "--config.data.val_files=")
    run = write_run(tmp_path / "run", given)
    config = parsed(f"--config={run}", monkeypatch=monkeypatch)
    assert config.to_dict() == given.to_dict()
    assert config.reward_functions[0]["weight"] == 2.0


def damage(folder: Path, change) -> Path:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


HOSTILE = {
    "another's": (lambda f: f.write_text('{"model_type": "qwen3"}'), "is not the config of a run"),
    "not UTF-8": (lambda f: f.write_bytes(b"\xff\xfe{"), "cannot be read as JSON"),
    "deep": (lambda f: f.write_text("[" * 200_000), "cannot be read as JSON"),
    "a list": (lambda f: f.write_text("[]"), "is no JSON object"),
    "a FIFO": (lambda f: (f.unlink(), os.mkfifo(f)), "there is no file"),
    "of a newer version": (
        lambda f: damage(f.parent, lambda c: c["trainer"].update(warp=1)),
        "sets trainer.warp, which this version does not have",
    ),
    "a text for a number": (
        lambda f: damage(f.parent, lambda c: c["algorithm"].update(tau="__import__('os')")),
        "algorithm.tau is a number; given",
    ),
    "an object for a number": (
        lambda f: damage(f.parent, lambda c: c["data"].update(train_batch_size={"a": 1})),
        "data.train_batch_size is a whole number; given {'a': 1}",
    ),
    "a number for a section": (
        lambda f: damage(f.parent, lambda c: c.update(data=3)),
        "data holds keys of its own; given 3",
    ),
    "without its secret": (
        lambda f: damage(
            f.parent, lambda c: c["reward_model"].update(reward_kwargs={"key": "<redacted>"})
        ),
        "reward_model.reward_kwargs.key held a secret",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_of_a_run_that_is_damaged_is_refused_in_one_sentence(
    case, tmp_path, monkeypatch, capsys
):
    change, words = HOSTILE[case]
    change(write_run(tmp_path / "run", parse()) / "config.json")
    with pytest.raises((SystemExit, ValueError)) as raised:
        parsed(f"--config={tmp_path / 'run'}", monkeypatch=monkeypatch)
    (line,) = (capsys.readouterr().err or str(raised.value)).splitlines()
    assert words in line
    assert "Traceback" not in line


def test_evaluate_takes_data_and_settings_from_the_run_and_runs_no_code_that_it_names(
    tmp_path, monkeypatch, capsys
):
    given = parse(
        "--config.eval.n=3",
        "--config.custom_reward_function.path=theirs.py",
        "--config.actor_rollout_ref.model.trust_remote_code=true",
    )
    run = write_run(tmp_path / "run", given)
    options = {"monkeypatch": monkeypatch, "default_config": evaluate.settings_of_model}
    model = f"--model={run / 'checkpoints' / '20'}"
    config = parsed(model, "--config.eval.ks=(1,2)", **options)
    assert (config.eval.n, config.eval.ks, config.data.val_files) == (
        3,
        (1, 2),
        "embedded:arithmetic",
    )
    assert not config.actor_rollout_ref.model.trust_remote_code
    assert config.custom_reward_function.path == ""
    with pytest.raises(SystemExit):
        parsed(model, "--config.eval.graded_by=reward", **options)
    err = capsys.readouterr().err
    assert f"theirs.py: give --config={run} if you trust it" in err
    trusted = parsed(model, f"--config={run}", "--config.eval.graded_by=reward", **options)
    assert trusted.custom_reward_function.path == "theirs.py"
    (run / "metrics.jsonl").touch()
    (run / "config.json").write_text("{")
    with pytest.raises(SystemExit):
        parsed(model, **options)
    assert f"{run / 'config.json'} cannot be read as JSON" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["keys"], ["train", "--help"]])
def test_a_command_whose_output_nobody_reads_ends_quietly(arguments):
    command = [sys.executable, "-m", "adpo_jax", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


INTERRUPTED_AT_ONCE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
from adpo_jax.log import printable
printable.guard = lambda: signal.raise_signal(signal.SIGINT)
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""
MODULES = ["adpo_jax", *("adpo_jax." + name for name in COMMANDS if name not in ("train", "keys"))]


@pytest.mark.parametrize("module", [*MODULES, "adpo_jax.main"])
def test_an_interrupt_before_a_command_is_at_work_is_told_in_one_line(module):
    command = [sys.executable, "-c", INTERRUPTED_AT_ONCE, module]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (SECOND_INTERRUPT, "interrupted\n")


def test_an_interrupt_while_a_config_is_read_is_told_in_one_line(tmp_path):
    config = tmp_path / "config.py"
    heeding = "signal.signal(signal.SIGINT, signal.default_int_handler)"
    config.write_text(f"import signal\n{heeding}\nsignal.raise_signal(signal.SIGINT)\n")
    command = [sys.executable, "-m", "adpo_jax", "train", f"--config={config}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (SECOND_INTERRUPT, "interrupted\n")
