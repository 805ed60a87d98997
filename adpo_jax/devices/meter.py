"""The share of the devices' peak arithmetic that an update uses: MFU and HFU.

MFU counts the arithmetic of the model, HFU also that which is recomputed to save memory.

Source of the two terms: Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B.
"""

import collections
from collections.abc import Callable, Hashable

import jax

from adpo_jax.devices.chips import chip_of
from adpo_jax.devices.flops import traced_flops


class Meter:
    """Counts floating-point operations of updates, from programs that are traced and not run.

    Args:
      update: the jitted update that runs.
      plain: makes the same update with nothing recomputed.
      devices: the devices that it runs on; if the peak of one is not known, nothing is counted.
    """

    def __init__(self, update: Callable, plain: Callable[[], Callable], devices: list[jax.Device]):
        self._update, self._make_plain, self._plain = update, plain, None
        chips = [chip_of(device) for device in devices]
        self._peak = None if None in chips else sum(chip.flops for chip in chips)
        self._counted: dict[Hashable, collections.Counter] = {}

    def count(self, args: tuple, num_micro: int) -> collections.Counter:
        """Operations of one call of the update, under the names of the metrics.

        Args:
          args: the arguments of the update, arrays or their shapes.
          num_micro: packed micro-batches of the call, which the program does not say.
        """
        if self._peak is None:
            return collections.Counter()
        return self.operations(args, num_micro)

    def operations(self, args: tuple, num_micro: int) -> collections.Counter:
        """As `count`, whatever the devices are.

        Each kind of arguments is counted once: tracing a program and walking through it takes tens
        of milliseconds, and the device waits.
        """
        leaves, structure = jax.tree.flatten(args)
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        kind = num_micro, structure, shapes
        if kind not in self._counted:
            self._plain = self._plain or self._make_plain()
            programs = self._plain, self._update
            model, run = (traced_flops(p.trace(*args), num_micro) for p in programs)
            found = {"update/mfu": model, "update/hfu": run}
            self._counted[kind] = collections.Counter(found)
        return self._counted[kind]

    def shares(self, operations: collections.Counter, seconds: float) -> dict[str, float]:
        """The metrics: these operations in this time as shares of the devices' peak."""
        return {name: count / seconds / self._peak for name, count in operations.items()}
