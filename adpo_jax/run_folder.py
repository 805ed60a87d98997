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

    def claim(self, config: ConfigDict) -> bool:
        """Makes the folder this run's.

        Returns:
          Whether it was so already: the run is then to be resumed.

        Raises:
          ValueError: when it holds a run with another config, or something else.
        """
        wanted = json.loads(config.to_json())
        if self.config.exists():
            changed = _differences(json.loads(self.config.read_text()), wanted)
            if changed:
                raise ValueError(
                    f"{self.root} holds a run with another config; choose another --workdir or "
                    "trainer.experiment_name. Changed (there -> here):\n  " + "\n  ".join(changed)
                )
            return True
        if self.root.exists() and any(self.root.iterdir()):
            raise ValueError(f"{self.root} is not empty and holds no run; choose another --workdir")
        self.samples.mkdir(parents=True, exist_ok=True)
        unfinished = self.config.with_suffix(".tmp")
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
        os.replace(unfinished, self.config)
        return False

    def write_samples(self, name: str, rows: list[dict]) -> None:
        """Writes `samples/<name>.jsonl`."""
        lines = [json.dumps(row, ensure_ascii=False, default=str) for row in rows]
        # What a model wrote may hold lone surrogates, which UTF-8 has no bytes for.
        text = "".join(line + "\n" for line in lines)
        (self.samples / f"{name}.jsonl").write_text(text, encoding="utf-8", errors="replace")


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
