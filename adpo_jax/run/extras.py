"""Packages that some settings need beside those that are always installed."""

import importlib.util


def need_serve(what: str) -> None:
    """Checks that what the extra [serve] installs is there.

    Args:
      what: the setting that needs it.

    Raises:
      ValueError: naming the package that is missing.
    """
    for name in ("httpx", "starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"{what} needs {name}: pip install 'adpo-jax[serve]', or '.[serve]' in a clone"
            )
