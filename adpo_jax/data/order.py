"""The order in which training takes the rows of a data set."""

import functools

import numpy as np


def prompt_indices(
    step: int, *, seed: int, num_rows: int, batch_size: int, shuffle: bool = True
) -> np.ndarray:
    """The rows of training step `step`. It is a pure function, so that a resume needs no iterator.

    The rows are dealt out epoch after epoch, each epoch in its own order, without a gap: a batch
    that an epoch cannot fill goes on with the next epoch's order, so that every row comes exactly
    once an epoch. An epoch's order sorts the rows by the raw output of Philox keyed by
    (seed, epoch), which NumPy guarantees to be the same on every platform and in every version.

    Args:
      step: from 0.
      seed: any integer.
      num_rows: rows of the data set.
      batch_size: rows a step; may exceed `num_rows`.
      shuffle: False deals the rows in the order of the data, in every epoch.

    Returns:
      [batch_size] int64.
    """
    if step < 0 or num_rows < 1 or batch_size < 1:
        raise ValueError(
            "step must be at least 0, num_rows and batch_size at least 1; given "
            f"step={step}, num_rows={num_rows}, batch_size={batch_size}"
        )
    epochs, offsets = np.divmod(step * batch_size + np.arange(batch_size), num_rows)
    rows = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places = offsets[here]
        rows[here] = _epoch_order(seed, int(epoch), num_rows)[places] if shuffle else places
    return rows


@functools.lru_cache(maxsize=4)  # training and cold start may each be at a border of two epochs
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.flags.writeable = False
    return order
