"""Which implementation of attention runs where: one list of names and one choice for every use.

A `Use` (rows, packed streams, prefill, decoding) is a table of implementations, a line each: where
it runs, which models it cannot run, the function. The tables of whole sequences are in
`attention_kernels`, those of the rollout engine in `kernels`.

    name = resolve("auto", STREAMS, settings, platform)   before anything is compiled
    name = fitting(name, STREAMS, settings, stream)       while tracing, when shapes are known

A name that was asked for and cannot run is refused. Where another implementation runs than the one
that was chosen, an `AttentionFallback` warning says so.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

NAMES = (
    "auto",  # the best of the platform
    "xla",  # the plain version, everywhere
    "pallas_tpu",  # Mosaic
    "pallas_gpu",  # Triton
    "cudnn",  # of jax.nn
    "pallas_tpu_interpret",  # runs on a CPU, to test
)
PLAIN = "xla"

# What `auto` wants on a platform, else the plain version. On GPUs the kernels are a choice, but no
# measurement speaks for them yet.
PREFERRED = {"tpu": "pallas_tpu"}


class AttentionFallback(UserWarning):
    """Another implementation of attention runs than the one that was chosen."""


def _no_objection(*_) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How one use is run under one name.

    Attributes:
      attend: the function; its arguments are those of all implementations of the use.
      platforms: where it runs, as JAX calls them; empty for everywhere.
      obstacle: (model) -> why it cannot run this model, as what follows its name in a sentence
        ("needs a head_dim ..."); empty where it can.
      limit: (model, *inputs) -> why these inputs are too much for it; empty where they are not.
    """

    attend: Callable
    platforms: tuple[str, ...] = ()
    obstacle: Callable[[Any], str] = _no_objection
    limit: Callable[..., str] = _no_objection


@dataclasses.dataclass(frozen=True)
class Use:
    """What attention is needed for, and the implementations of it.

    Attributes:
      name: for messages, such as "decoding".
      table: by name, one of `NAMES`; the plain version is always there and runs everything.
    """

    name: str
    table: Mapping[str, Implementation]

    def __post_init__(self):
        assert {PLAIN} <= set(self.table) <= set(NAMES), self


def resolve(name: str, use: Use, model: Any, platform: str) -> str:
    """The implementation that a name means for this model on this platform.

    `auto` is the best of the platform; where that cannot run the model it is the plain version,
    with a warning.

    Args:
      name: one of `NAMES`.
      model: what the obstacles of the use's implementations look at.
      platform: of the devices, which need not be there.

    Raises:
      ValueError: for a name that is none of `NAMES`, or whose implementation does not exist for
        this use, does not run on this platform or cannot run this model.
    """
    if name not in NAMES:
        raise ValueError(f"attention is one of {', '.join(NAMES)}; given {name!r}")
    if name == "auto":
        return fitting(PREFERRED.get(platform, PLAIN), use, model)
    if name not in use.table:
        others = ", ".join(["auto", *use.table])
        raise ValueError(
            f"attention {name!r} is not implemented for {use.name}; implemented are {others}"
        )
    one = use.table[name]
    if one.platforms and platform not in one.platforms:
        wanted = " or ".join(p.upper() for p in one.platforms)
        raise ValueError(
            f"attention {name!r} runs on a {wanted}, and this is a {platform}; use auto, or xla"
        )
    if why := one.obstacle(model):
        raise ValueError(f"attention {name!r} of {use.name} {why}. Use auto, or xla")
    return name


def fitting(name: str, use: Use, model: Any, *inputs) -> str:
    """A name that `resolve` gave, or the plain version, with a warning, where it cannot run this.

    Args:
      name: as chosen for this use or for a related one, such as decoding's for prefill.
      inputs: what the limits of the use's implementations look at; none for the model alone.
    """
    one = use.table.get(name)
    if one is None:
        why = "is not implemented"
    else:
        why = one.obstacle(model) or (one.limit(model, *inputs) if inputs else "")
    if not why:
        return name
    _warn_once(name, use.name, why)
    return PLAIN


@functools.cache
def _warn_once(name: str, use: str, why: str) -> None:
    """Once a process, since every shape and every caller traces anew."""
    warnings.warn(
        f"attention {name!r} of {use} {why}. The plain version runs instead; attention 'xla' "
        "chooses it without this warning",
        AttentionFallback,
        stacklevel=2,
    )
