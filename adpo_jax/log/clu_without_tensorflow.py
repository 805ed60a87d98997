"""`clu.metric_writers` on a machine without TensorFlow.

clu needs TensorFlow (1.5 GB) for one class, its summary writer, but imports it with the package. A
module that takes the place of that one class before the first import makes the rest usable.
"""

import sys
import types

_NAME = "clu.metric_writers.tf.summary_writer"


class _NoSummaryWriter:
    def __init__(self, *_, **__):
        raise NotImplementedError("use adpo_jax.log.metrics.TensorBoardWriter")


if _NAME not in sys.modules:
    sys.modules[_NAME] = types.ModuleType(_NAME)
    sys.modules[_NAME].SummaryWriter = _NoSummaryWriter

from clu import metric_writers  # noqa: E402

__all__ = ["metric_writers"]
