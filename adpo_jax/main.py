"""Trains a policy, or goes on with a run.

    python -m adpo_jax.main --config=configs/gsm8k.py [--workdir=DIR] [--config.key=value ...]

`--config` is a Python file, the name of a config that comes with the package (`gsm8k`), or a run's
folder, whose settings are taken. `adpo-jax train` is the same command. The exit code is one of
`exit_codes`.
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from adpo_jax.environments.pool import EnvironmentFailed
from adpo_jax.log.printable import say, say_error
from adpo_jax.run.command_line import begin, load_config, parse_flags, unless_interrupted, with_cure
from adpo_jax.run.exit_codes import (
    DISK_ERROR,
    DOES_NOT_FIT,
    HOST_LOST,
    INTERRUPTED,
    STOPPED,
    USER_ERROR,
)

_CONFIG_HELP = "a Python file, a config that comes with the package, or a run's folder"
_CONFIG = config_flags.DEFINE_config_file("config", None, _CONFIG_HELP, lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "the run's folder; runs/<project_name>/<experiment_name> if not given"
)
_RESUME = flags.DEFINE_string(
    "resume", "auto", "auto: go on with the run in the folder if there is one | never | must"
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "resume under a config that changes what the run is"
)
_REPLAY = flags.DEFINE_string(
    "replay", None, "a folder of recorded rollouts to train from, in place of a sampler"
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "one process a host; found out where not given (TPU pod, SLURM, JAX_*)"
)
_HOST_TIMEOUT_S = flags.DEFINE_integer(
    "host_timeout_s", 100, "seconds after which a host that is lost stops the others", lower_bound=5
)
_HERE = "127.0.0.1:8470"
_ROLE = flags.DEFINE_enum(
    "role",
    "",
    ["", "trainer", "sampler"],
    "trainer: samplers elsewhere sample for this run | sampler: samples for the run of a trainer",
)
_LISTEN = flags.DEFINE_string(
    "listen", "", f"HOST:PORT at which samplers find a --role=trainer; {_HERE} if not given"
)
_TRAINER = flags.DEFINE_string("trainer", "", "HOST:PORT of the trainer of a --role=sampler")
_WEIGHTS = flags.DEFINE_string(
    "weights",
    "",
    "with --role=trainer: a folder on shared storage that samplers read the weights from, which "
    "are sent to them if not given | with --role=sampler: where that folder lies there, if at "
    "another place than for the trainer",
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "compile the steps for sequences of full length and say what they need; run nothing",
)
_DRY_RUN_TOPOLOGY = flags.DEFINE_string(
    "dry_run_topology", "", "a dry run for devices that are not there, such as v5e:2x4 or h100:8"
)
_DRY_RUN_LENGTHS = flags.DEFINE_string(
    "dry_run_lengths",
    "",
    "lengths of completions for a dry run's forecast: MEAN, MEAN:DEVIATION or a run's folder",
)
_DEBUG = flags.DEFINE_bool("debug", False, "show the traceback of a mistake")
_FLAGS = tuple(value for value in list(globals().values()) if isinstance(value, flags.FlagHolder))


def main(argv: list[str], build: Callable | None = None) -> int:
    """Trains what the config says; returns the exit code.

    Args:
      build: makes the parts of the run from the config; None for `setup.build`.
    """
    if len(argv) > 1:
        return _failed(f"unknown arguments {argv[1:]}; keys are set as --config.key=value")
    try:
        config = load_config(_CONFIG)
    except ValueError as error:
        return _failed(error)
    if config is None:
        return _failed("--config is missing, for example --config=arithmetic")
    logging.set_verbosity(logging.WARNING)
    # The import comes after the flags, so that --help is quick.
    import jax

    from adpo_jax import train
    from adpo_jax.devices import compilation_cache, distributed
    from adpo_jax.devices.host_network import HostLost
    from adpo_jax.log.progress import telling
    from adpo_jax.rewards import RewardError
    from adpo_jax.rollouts.source import SourceError
    from adpo_jax.run import preparation, setup
    from adpo_jax.run.checkpoint_files import CheckpointError
    from adpo_jax.run.guard import TrainingStopped
    from adpo_jax.run.interruption import Interrupted

    if _DRY_RUN.value or _DRY_RUN_TOPOLOGY.value:
        return _dry_run(config)
    if _DRY_RUN_LENGTHS.value:
        return _failed("--dry_run_lengths belongs to --dry_run and --dry_run_topology: give one")
    try:
        _check_role()
        if _ROLE.value == "sampler":
            return _sample(config)
        samplers = _for_samplers() if _ROLE.value == "trainer" else None
    except ValueError as error:
        return _failed(error)
    try:
        with telling("waiting for the other processes"):
            distributed.initialize(_DISTRIBUTED.value, timeout_s=_HOST_TIMEOUT_S.value)
    except ValueError as error:
        return _failed(error)
    with setup.make_interruption(config) as interruption:
        try:
            with interruption.abandonable():
                compilation_cache.use(config.trainer.compilation_cache_dir)
                prepared = preparation.prepare(
                    config,
                    _WORKDIR.value or None,
                    resume=_RESUME.value,
                    allow_config_change=_ALLOW_CONFIG_CHANGE.value,
                    replay=_REPLAY.value or None,
                    build=build or setup.build,
                    samplers=samplers,
                )
        except (ValueError, OSError) as error:  # another user's folder, too long a name
            return _failed(error)
        except Interrupted as reason:
            return _failed(f"stopped by {reason}; nothing had been begun", INTERRUPTED)
        except HostLost as error:
            _leave(error, interruption.what_is_left)
        try:
            train.run(prepared, interruption)
        except (RewardError, EnvironmentFailed, CheckpointError, SourceError) as error:
            return _failed(error)
        except TrainingStopped as error:
            return _failed(error, STOPPED)
        except OSError as error:
            outcome = "goes on" if prepared.folder.has_checkpoint else "starts again"
            return _failed(with_cure(error, prepared.folder.root, outcome), DISK_ERROR)
        except Interrupted:
            distributed.wait_for_all("stopped")  # else the last process takes the others for dead
            return INTERRUPTED
        except (jax.errors.JaxRuntimeError, HostLost) as error:
            if jax.process_count() == 1:
                raise
            _leave(error, interruption.what_is_left)
    return 0


def _leave(error: Exception, what_is_left: str) -> NoReturn:
    """Ends this process at once: leaving in good order would wait for the host that is lost."""
    _failed(
        f"another host has stopped or cannot be reached; {what_is_left}. "
        f"What was seen here: {error}"
    )
    os._exit(HOST_LOST)


def _check_role() -> None:
    """Refuses flags that belong to another role than the one that is given.

    Raises:
      ValueError: naming the flag.
    """
    for name, value, role in (
        ("listen", _LISTEN.value, "trainer"),
        ("trainer", _TRAINER.value, "sampler"),
    ):
        if value and _ROLE.value != role:
            raise ValueError(f"--{name} belongs to --role={role}: give both or neither")
    if _WEIGHTS.value and not _ROLE.value:
        raise ValueError(
            "--weights belongs to --role=trainer and --role=sampler: give one of them too"
        )
    if _ROLE.value:
        from adpo_jax.run.extras import need_serve

        need_serve(f"--role={_ROLE.value}")


def _for_samplers():
    """Where samplers find this trainer.

    Raises:
      ValueError: for an address that is none, or without a key.
    """
    from adpo_jax.run import preparation, roles

    return preparation.ForSamplers(
        roles.parsed_address(_LISTEN.value or _HERE, "--listen"), roles.read_key(), _WEIGHTS.value
    )


def _sample(config: ConfigDict) -> int:
    """Samples for a trainer; returns the exit code.

    Raises:
      ValueError: for flags or a config that cannot work, or where the trainer refuses this sampler.
    """
    from adpo_jax.devices import compilation_cache
    from adpo_jax.run import config_checks, roles

    if not _TRAINER.value:
        raise ValueError("--role=sampler needs --trainer=HOST:PORT, which the trainer prints")
    roles.parsed_address(_TRAINER.value, "--trainer")
    key = roles.read_key()
    config = config_checks.finalized(config)
    compilation_cache.use(config.trainer.compilation_cache_dir)
    try:
        roles.make_sampler(config, _TRAINER.value, key, weights=_WEIGHTS.value).run()
    except roles.TrainerLost as error:
        return _failed(error, HOST_LOST)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _dry_run(config: ConfigDict) -> int:
    """Prints what the run would need; the exit code says whether it fits."""
    import jax

    from adpo_jax import dry_run
    from adpo_jax.log.progress import telling

    if _DRY_RUN_TOPOLOGY.value:
        jax.config.update("jax_platforms", "cpu")  # so that a TPU of this machine stays free
    try:
        with telling("compiling the steps"):
            report = dry_run.dry_run(
                config, _DRY_RUN_TOPOLOGY.value, lengths=_DRY_RUN_LENGTHS.value
            )
    except ValueError as error:
        return _failed(error)
    say("\n".join(report.lines()), sys.stdout)
    return 0 if report.fits else DOES_NOT_FIT


def run() -> None:
    """Runs `python -m adpo_jax.main`."""
    begin()
    parser = functools.partial(parse_flags, about=__doc__, own=_FLAGS)
    app.run(_main, flags_parser=parser)


def _main(argv: list[str]) -> int:
    code = main(argv)
    if code == INTERRUPTED:
        # A rollout that was abandoned still computes: tearing JAX down under it may crash.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _failed(error: BaseException | str, code: int = USER_ERROR) -> int:
    """Prints what went wrong; returns the exit code."""
    if _DEBUG.value and isinstance(error, BaseException):
        traceback.print_exception(error)
    say_error(error)
    return code


if __name__ == "__main__":
    sys.exit(unless_interrupted(run))
