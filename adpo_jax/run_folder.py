"""The folder of a run: whose it is, and where its things lie.

config.json      the whole config; a folder is resumed only under the same one
metrics.jsonl    one object a line
tensorboard/     the same as events
checkpoints/     the training state
samples/         completions with their rewards
export/          the final policy as a Hugging Face folder
"""

import dataclasses
import json
import os
from pathlib import Path

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths within one run's folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a state to go on from."""
        return self.checkpoints.is_dir() and any(
            p.name.isdigit() for p in self.checkpoints.iterdir()
        )

    def check(self, config: ConfigDict) -> None:
        """Checks that this config may run in this folder; writes nothing.

        Raises:
          ValueError: when it holds a run with another config, or something else.
        """
        if self.config.exists():
            changed = _differences(json.loads(self.config.read_text()), _as_json(config))
            if changed:
                raise ValueError(
                    f"{self.root} holds a run with another config; choose another --workdir or "
                    "trainer.experiment_name. Changed (there -> here):\n  " + "\n  ".join(changed)
                )
        elif self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty and holds no run; choose another --workdir")

    def claim(self, config: ConfigDict) -> None:
        """Makes the folder this run's, after `check`."""
        self.check(config)
        if not self.config.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            unfinished = self.root.with_name(self.root.name + ".config.tmp")
            unfinished.write_text(json.dumps(_as_json(config), indent=2) + "\n")
            os.replace(unfinished, self.config)
        self.samples.mkdir(exist_ok=True)

    def write_samples(self, name: str, rows: list[dict]) -> None:
        """Writes `samples/<name>.jsonl`."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        # What a model wrote may hold lone surrogates, which UTF-8 has no bytes for.
        text = "".join(line + "\n" for line in lines)
        (self.samples / f"{name}.jsonl").write_text(text, encoding="utf-8", errors="replace")


def _as_json(config: ConfigDict) -> dict:
    return json.loads(config.to_json())


def _differences(there: dict, here: dict, prefix: str = "") -> list[str]:
    """The keys whose values differ, one a line."""
    lines = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old!r} -> {new!r}")
    return lines
