"""The folder of a run: whose it is, and where its things lie.

config.json            the whole config; what else it ran under is in config_changes.jsonl
metrics.jsonl          one object a line
tensorboard/           the same as events
checkpoints/           the training state; damaged ones are moved to damaged_checkpoints/
samples/               completions with their rewards
bad_batches/           recordings of iterations whose update was not sound
export/                the final policy as a Hugging Face folder
adapter/               under LoRA, its adapters as a folder of peft
surplus/               with algorithm.filter_groups, the groups that wait for the next iteration
profile/               xprof traces of the iterations that the config asks for
environment.json       versions and devices of the newest part of the run
trackers.json          the identifiers of the run's records in experiment trackers
evaluations/           what `python -m adpo_jax.evaluate` found, one folder each time
<rollout_data_dir>/    recordings of all iterations, where the config asks for them
"""

import fcntl
import json
import os
import shutil
import time
import weakref
from pathlib import Path

from ml_collections import ConfigDict

from adpo_jax.checkpoints import complete_steps
from adpo_jax.config import default_config
from adpo_jax.redaction import redacted

RESUME = ("auto", "never", "must")

# What may differ between two parts of one run; all else says what the run is. A name that ends in a
# dot stands for all keys below it.
MAY_CHANGE = (
    "mesh.",
    "actor_rollout_ref.actor.optim.",
    "actor_rollout_ref.actor.attention",
    "actor_rollout_ref.actor.grad_clip",
    "actor_rollout_ref.rollout.attention",
    "actor_rollout_ref.rollout.free_cache_engine",
    "actor_rollout_ref.rollout.gpu_memory_utilization",
    "actor_rollout_ref.rollout.num_slots",
    "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "custom_reward_function.num_workers",
    "custom_reward_function.on_timeout",
    "custom_reward_function.timeout_s",
    "eval.",
    "sft.save_freq",
    "trainer.best_metric",
    "trainer.compilation_cache_dir",
    "trainer.experiment_name",
    "trainer.grace_period_s",
    "trainer.gradient_checkpointing",
    "trainer.log_num_samples",
    "trainer.log_samples_freq",
    "trainer.logger",
    "trainer.max_anchor_kl",
    "trainer.max_bad_updates",
    "trainer.max_save_failures",
    "trainer.on_bad_update",
    "trainer.per_device_train_batch_size",
    "trainer.profile_steps",
    "trainer.project_name",
    "trainer.rollout_data_dir",
    "trainer.save_freq",
    "trainer.save_total_limit",
    "trainer.test_freq",
    "trainer.total_epochs",
    "trainer.total_training_steps",
)


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
      root: the folder; made by `claim`.
      writes: whether this process claims the folder and writes there; of several, one does.
    """

    def __init__(self, root: Path, *, writes: bool = True):
        self.root = Path(root)
        self.writes = writes
        self._release = None

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def bad_batches(self) -> Path:
        return self.root / "bad_batches"

    @property
    def surplus(self) -> Path:
        return self.root / "surplus"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return bool(complete_steps(self.checkpoints))

    @property
    def exported_step(self) -> int | None:
        """Iterations that the exported policy has behind it; None where there is no export."""
        try:
            return json.loads(self._export_note.read_text())["iterations"]
        except FileNotFoundError:
            return None

    def note_export(self, step: int) -> None:
        """Notes which state the export is of; the note goes when the folder is replaced."""
        if not self.writes:
            return
        self._export_note.write_text(json.dumps({"iterations": step}) + "\n")

    @property
    def _export_note(self) -> Path:
        return self.export / "adpo_jax.json"

    def check(
        self,
        config: ConfigDict,
        *,
        replay: Path | None = None,
        resume: str = "auto",
        allow_config_change: bool = False,
    ) -> None:
        """Checks that this config may run in this folder; writes nothing.

        Args:
          replay: the recording that the run trains from, which is part of what it is.
          resume: one of `RESUME`.
          allow_config_change: let the config change what the run is.

        Raises:
          ValueError: when it holds a run with another config, or something else, or not what
            `resume` asks for.
        """
        if resume not in RESUME:
            raise ValueError(f"--resume is one of {', '.join(RESUME)}, given {resume!r}")
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"{self.root} is a file; choose another --workdir")
        holds_run = self.config.exists()
        if not holds_run and self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty and holds no run; choose another --workdir")
        if resume == "must" and not self.has_checkpoint:
            raise ValueError(
                f"--resume=must, but {self.root} has no checkpoint; --resume=auto starts a new run"
            )
        if resume == "never" and holds_run:
            raise ValueError(
                f"--resume=never, but {self.root} holds a run; choose another --workdir or "
                "trainer.experiment_name, or go on with --resume=auto"
            )
        self._check_links()
        self._check_config(config, replay, allow_config_change)

    def claim(self, config: ConfigDict, **options) -> None:
        """Makes the folder this run's until `release`; options as for `check`.

        Raises:
          ValueError: as `check`, or for a folder that cannot be written or that another process
            holds; nothing is written then.
        """
        if not self.writes:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._hold()
            self.check(config, **options)
            self._write_config(_as_json(config, options.get("replay")))
            self.samples.mkdir(exist_ok=True)
            self._sweep()
        except OSError as error:
            self.release()
            raise ValueError(f"{self.root} cannot be written: {error.strerror or error}") from error
        except ValueError:
            self.release()
            raise

    def release(self) -> None:
        """Lets other processes have the folder."""
        if self._release is not None:
            self._release()
            self._release = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()

    def recordings(self, config: ConfigDict) -> Path:
        """Where the rollouts are recorded."""
        return self.root / config.trainer.rollout_data_dir

    def write_environment(self, environment: dict) -> None:
        """Writes what this part of the run runs on."""
        if not self.writes:
            return
        text = json.dumps(environment, indent=2) + "\n"
        _replace(self.root / "environment.json", text.encode())

    def write_samples(self, name: str, rows: list[dict]) -> None:
        """Writes `samples/<name>.jsonl`."""
        if not self.writes:
            return
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        # What a model wrote may hold lone surrogates, which UTF-8 has no bytes for.
        text = "".join(line + "\n" for line in lines)
        _replace(self.samples / f"{name}.jsonl", text.encode(errors="replace"))

    def _check_links(self) -> None:
        """A folder from elsewhere must not make this process write anywhere else."""
        if not self.root.is_dir():
            return
        for path in self.root.iterdir():
            if path.is_symlink() and not path.resolve().is_relative_to(self.root.resolve()):
                raise ValueError(f"{path} is a link that leaves the run's folder; remove it")

    def _check_config(self, config, replay, allow_config_change: bool) -> None:
        changes = self._changes(_as_json(config, replay))
        refused = [text for key, text in changes.items() if not _may_change(key)]
        if refused and not allow_config_change:
            raise ValueError(
                f"{self.root} holds a run with another config; choose another --workdir or "
                "trainer.experiment_name, or go on with --allow_config_change. Changed "
                "(there -> here):\n  " + "\n  ".join(refused)
            )

    def _changes(self, here: dict) -> dict[str, str]:
        """The keys whose values differ from the saved config's, with both values."""
        if not self.config.exists():
            return {}
        try:
            there = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{self.config} is no JSON: {error}; choose another --workdir"
            ) from None
        # A run that is older than a key had what is now its default.
        there = _filled(there, json.loads(default_config().to_json()) | {"replay": ""})
        return _differences(there, here)

    def _write_config(self, content: dict) -> None:
        changes = self._changes(content)
        if self.config.exists() and not changes:
            return
        if changes:
            step = max(complete_steps(self.checkpoints), default=0)
            line = {"time": round(time.time(), 3), "after_iteration": step, "changed": changes}
            with (self.root / "config_changes.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        # The unfinished file lies beside the folder: one that is not empty holds a config.
        unfinished = self.root.with_name(self.root.name + ".config.tmp")
        _replace(self.config, (json.dumps(content, indent=2) + "\n").encode(), unfinished)

    def _hold(self) -> None:
        if self._release is not None:
            return
        descriptor = os.open(self.root, os.O_RDONLY)
        # The kernel lets go of it when the process dies, however it dies.
        self._release = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(
                f"another process is training in {self.root}; wait for it, or choose another "
                "--workdir"
            ) from None

    def _sweep(self) -> None:
        """Removes what an export that was killed left half done."""
        for pattern in (".export.writing-*", ".export.replaced-*"):
            for path in self.root.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def _replace(path: Path, content: bytes, unfinished: Path | None = None) -> None:
    """Writes a file whole or not at all."""
    unfinished = unfinished or path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def _as_json(config: ConfigDict, replay: Path | None) -> dict:
    content = json.loads(config.to_json())
    return redacted(content) | {"replay": str(Path(replay).resolve()) if replay else ""}


def _may_change(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in MAY_CHANGE)


def _filled(there: dict, defaults: dict) -> dict:
    """`there` with the keys that it lacks."""
    filled = defaults | there
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(there.get(key), dict):
            filled[key] = _filled(there[key], default) if default else there[key]
    return filled


def _differences(there: dict, here: dict, prefix: str = "") -> dict[str, str]:
    """The keys whose values differ, each with a line that shows both."""
    lines = {}
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines |= _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines[f"{prefix}{key}"] = f"{prefix}{key}: {old!r} -> {new!r}"
    return lines
