"""New weights for a server under way, from a folder inside the one that it was allowed.

A trainer writes a Hugging Face folder, whole or not at all, and names it to the server. It is read
beside the decoding and checked whole, before anything of the old weights is let go.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from adpo_jax.hf import folders
from adpo_jax.hf.config import check_counts
from adpo_jax.hf.files import read_json
from adpo_jax.policy.policy import Policy

LONGEST_PATH = 4096  # characters
# What is read of a folder beside the files that an index names.
FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


class WeightsRoot:
    """The folder whose folders may become weights of the server.

    Args:
      root: the folder.
      policy: the model, whose weights must fit.
      override_config: keys of their config.json with other values, as of `pretrained.load`.

    Raises:
      ValueError: where there is no such folder, or the model has adapters.
    """

    def __init__(
        self,
        root: str | Path,
        policy: Policy,
        override_config: Mapping[str, Any] | None = None,
    ):
        try:
            self._root = Path(root).expanduser().resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"--weights-root: {error}") from None
        if not self._root.is_dir():
            raise ValueError(f"--weights-root: {root} is no folder")
        if policy.lora:
            raise ValueError(
                "--weights-root: the model is a checkpoint with adapters beside its weights, and "
                "folders hold whole weights; serve the run's export instead"
            )
        self._policy, self._override_config = policy, override_config

    def read(self, given: str):
        """The parameters that a folder holds, in the memory of the host where there is another.

        Nothing outside the root is opened, whatever links lie in the folder.

        Args:
          given: the folder's path, or its path inside the root.

        Raises:
          ValueError: for a folder outside the root, or one whose weights are not of this model.
        """
        folder = self._inside(given)
        if not folder.is_dir():
            raise ValueError(f"weight_dir: there is no folder {given!r:.200} in --weights-root")
        for name in FILES:
            self._inside(folder / name)
        self._check_model(folder)
        for path in folders.weight_files(folder):
            self._inside(path)
        policy = self._policy
        with _on_host():
            return folders.load_params(
                policy.config,
                policy.abstract_params(),
                folder,
                read_json(folder / "config.json")["model_type"],
            )

    def _inside(self, path: str | Path) -> Path:
        """The path without links; refused where it leads out of the root."""
        inside = None
        if len(str(path)) <= LONGEST_PATH:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                inside = (self._root / path).resolve()
        if inside is None or not inside.is_relative_to(self._root):
            raise ValueError(
                f"weight_dir: {str(path)!r:.200} does not lie in the folder that --weights-root "
                "names; write the weights there"
            )
        return inside

    def _check_model(self, folder: Path) -> None:
        config_json = read_json(folder / "config.json")
        check_counts(config_json, str(folder / "config.json"))
        config_json = folders.overridden(config_json, self._override_config)
        other = Policy.abstract_from_config(config_json, dtype=self._policy.dtype).config
        mine = self._policy.config
        if other != mine:
            differing = [name for name in vars(mine) if vars(mine)[name] != vars(other)[name]]
            raise ValueError(
                f"{folder} holds another model than the one that is served: its config.json "
                f"differs in {', '.join(differing)}"
            )


def _on_host():
    """Arrays are made in the host's memory, so that the device need not hold two models."""
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_device(jax.local_devices(backend="cpu")[0])
