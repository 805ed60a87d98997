"""Which implementation of attention runs where: one list of names and one choice for every use.

A `Use` (rows, packed streams, prefill, decoding) has a table of implementations. A line of the
table says where one runs, which models it cannot run, and names the function. The tables for whole
sequences are in `model/attention_kernels`, those of the rollout engine in `engine/kernels`.

    name = resolve("auto", STREAMS, settings, platform)   before anything is compiled
    name = fitting(name, STREAMS, settings, stream)       while tracing, when shapes are known

A name that the user asked for and that cannot run is refused. Where the best kernel of a platform
cannot run, the next one does; where none can, the plain version runs, and an `AttentionFallback`
warning says so.
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
    "mosaic_gpu",  # Mosaic, for Hopper cards
    "cudnn",  # of jax.nn
    "pallas_tpu_interpret",  # the TPU kernels on a CPU, for tests
)
PLAIN = "xla"

# The names that `auto` means on a platform, where a use says nothing else; the plain version
# elsewhere.
PREFERRED = {"tpu": ("pallas_tpu",)}


# The oldest compute capability whose tensor cores take bfloat16: an A100's.
MIN_CAPABILITY = 8.0
# That of an H100, H200 or GH200, whose instructions for matrix products no other generation has.
HOPPER = 9


def old_gpu(device: Any) -> str:
    """Why the kernels of GPUs do not run on a device; empty if they do, or for None.

    Args:
      device: a `jax.Device`, which need not be there.
    """
    capability = float(getattr(device, "compute_capability", None) or MIN_CAPABILITY)
    if capability < MIN_CAPABILITY:
        return f"needs a GPU of compute capability {MIN_CAPABILITY} or more; given {capability}"
    return ""


def no_hopper(device: Any) -> str:
    """Why kernels for Hopper cards (compute capability 9) do not run on a device, as `old_gpu`."""
    capability = getattr(device, "compute_capability", None)
    if capability and int(float(capability)) != HOPPER:
        return f"needs a Hopper GPU, of compute capability {HOPPER}.0; given {capability}"
    return ""


class AttentionFallback(UserWarning):
    """Another implementation of attention runs than the one that was chosen."""


def _no_objection(*_) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How one use is run under one name.

    Attributes:
      attend: the function; all implementations of a use take the same arguments.
      platforms: the platforms that it runs on, as JAX calls them; empty for everywhere.
      obstacle: (model) -> why it cannot run this model, as the rest of a sentence that begins with
        its name ("needs a head_dim ..."); empty if it can.
      limit: (model, *inputs) -> why these inputs are too large for it; empty if they are not.
    """

    attend: Callable
    platforms: tuple[str, ...] = ()
    obstacle: Callable[[Any], str] = _no_objection
    limit: Callable[..., str] = _no_objection


@dataclasses.dataclass(frozen=True)
class Use:
    """A purpose of attention, and its implementations.

    Attributes:
      name: for messages, such as "decoding".
      table: implementations by names of `NAMES`; "xla", the plain version, is always among them and
        runs everything.
      preferred: the names that `auto` means on a platform: the first of them that can run; the
        plain version elsewhere.
    """

    name: str
    table: Mapping[str, Implementation]
    preferred: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=PREFERRED.copy)

    def __post_init__(self):
        assert {PLAIN} <= set(self.table) <= set(NAMES), self


def resolve(name: str, use: Use, model: Any, platform: str) -> str:
    """The name of the implementation that `name` means for this model on this platform.

    `auto` means the best implementation of the platform that can run the model, and where none can
    the plain version, with a warning.

    Args:
      name: one of `NAMES`.
      model: the settings of the model that obstacles look at.
      platform: the platform of the devices, which need not be there.

    Raises:
      ValueError: for a name that is none of `NAMES`, or whose implementation does not exist for
        this use, does not run on this platform or cannot run this model.
    """
    if name not in NAMES:
        raise ValueError(f"attention is one of {', '.join(NAMES)}; given {name!r}")
    if name == "auto":
        return fitting(use.preferred.get(platform, (PLAIN,))[0], use, model)
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
    """A resolved name, or another where that name cannot run the model or inputs.

    The names behind it in a platform's order come next; "xla", with a warning, is the last.

    Args:
      name: the name that `resolve` chose for this use or for a related one (decoding for prefill).
      inputs: the inputs that limits look at; none to look at the model alone.
    """
    order = next((names for names in use.preferred.values() if name in names), (name,))
    for one_name in order[order.index(name) :]:
        one = use.table.get(one_name)
        if one is None:
            why = "is not implemented"
        else:
            why = one.obstacle(model) or (one.limit(model, *inputs) if inputs else "")
        if not why:
            return one_name
    _warn_once(one_name, use.name, why)
    return PLAIN


@functools.cache
def _warn_once(name: str, use: str, why: str) -> None:
    """Warns once a process, since every shape and every caller traces anew."""
    warnings.warn(
        f"attention {name!r} of {use} {why}. The plain version runs instead; attention 'xla' "
        "chooses it without this warning",
        AttentionFallback,
        stacklevel=2,
    )
