"""The choices that the rollout engine makes for a kind of machine: CPUs, GPUs, TPUs.

The choices change the speed and not the samples. They are made here, and the engine reads each as a
number or a flag.
"""

import dataclasses

from adpo_jax.engine import cache_plan
from adpo_jax.engine.sizes import doubling_sizes, slot_buckets

# The batch shrinks to these when samples run out; below 8 rows a step gets no cheaper.
SLOT_FRACTIONS = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
MIN_SLOTS = 8
DEFAULT_CPU_SLOTS = 64
# A TPU's registers hold so many rows side by side; a multiple suits a GPU's warps too.
SLOT_TILE = 8
# Up to this depth layers run one by one on a CPU (`model.unstacked`); beyond it compile time would
# grow too far.
MAX_UNROLLED_ON_CPU = 12
# XLA's compiler for GPUs copies the weights of a layer, and under plain attention its cache, out of
# a stack before it uses them: 1 ms and 70 GB a step of 232 samples of a Qwen3-0.6B. So up to this
# depth layers run one by one there; compiling takes six times as long.
MAX_UNROLLED_ON_GPU = 64
# Lengths that the ring grows through where attention reads all of its columns.
COLUMN_STAGES = 4


@dataclasses.dataclass(frozen=True)
class EngineTuning:
    """How the engine lays out and sizes what it decodes on one kind of machine.

    Attributes:
      stacked: whether layers lie on a leading axis and are scanned; else they run one by one, each
        on parameters and a cache of its own.
      transposed_keys: whether the cache has its keys as [D, columns].
      shrinks: whether the batch becomes smaller as samples end. A smaller batch makes a step faster
        where arithmetic is the bottleneck, and hardly faster where reading the weights is.
      default_slots: samples decoded at once if the user gives no number.
      slot_tile: slots of a device that are computed at once.
    """

    stacked: bool
    transposed_keys: bool
    shrinks: bool
    default_slots: int
    slot_tile: int

    def slot_sizes(self, num_slots: int, num_shards: int) -> list[int]:
        """The batch sizes that there are programs for, rising; the last one is `num_slots`.

        A call starts with the smallest batch that holds it.
        """
        if self.shrinks:
            return slot_buckets(num_slots, SLOT_FRACTIONS, num_shards, MIN_SLOTS)
        return doubling_sizes(num_slots, num_shards, MIN_SLOTS)


def engine_tuning(platform: str, attention: str, num_layers: int) -> EngineTuning:
    """The tuning for a platform.

    Args:
      platform: "cpu", "gpu" or "tpu".
      attention: the attention that the user asked for, one of `attention_choice.NAMES`.
    """
    if platform != "cpu":
        return EngineTuning(
            stacked=platform != "gpu" or num_layers > MAX_UNROLLED_ON_GPU,
            transposed_keys=False,
            shrinks=False,
            default_slots=cache_plan.MAX_SLOTS,
            slot_tile=SLOT_TILE,
        )
    # A kernel that is interpreted on a CPU needs the cache as it lies on an accelerator.
    plain = attention in ("auto", "xla")
    return EngineTuning(
        stacked=not (plain and num_layers <= MAX_UNROLLED_ON_CPU),
        transposed_keys=plain,
        shrinks=True,
        default_slots=DEFAULT_CPU_SLOTS,
        slot_tile=1,
    )


def column_stages(attention: str) -> int:
    """The number of lengths that the ring grows through under a resolved name of `kernels`.

    A kernel reads no more columns than a slot sees, so its ring need not grow.
    """
    return COLUMN_STAGES if attention == "xla" else 1
