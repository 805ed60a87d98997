"""What the number of a group determines: its prompt and the keys of its samples."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from adpo_jax.engine.sampling import sample_keys
from adpo_jax.records import Prompts

# Bytes of the digest of a prompt.
DIGEST_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Numbering:
    """What belongs to the number of a group, which counts the prompts in their order.

    Attributes:
      prompts_of: number of a batch, from 0 -> its prompts.
      batch_size: prompts of a batch.
      n: samples of a group.
    """

    prompts_of: Callable[[int], Prompts]
    batch_size: int
    seed: int
    n: int

    def prompts(self, numbers: Iterable[int]) -> Prompts:
        """The prompts of groups, in this order."""
        P = self.batch_size
        found = {batch: self.prompts_of(batch) for batch in {n // P: None for n in numbers}}
        return Prompts.concatenate([found[n // P].select([n % P]) for n in numbers])

    def digests(self, numbers: Sequence[int]) -> np.ndarray:
        """[N, DIGEST_SIZE] uint8, a digest of the prompt of each of N groups."""
        prompts = self.prompts(numbers).token_ids if numbers else []
        found = [np.asarray(ids, "<i8").tobytes() for ids in prompts]
        found = b"".join(hashlib.blake2b(ids, digest_size=DIGEST_SIZE).digest() for ids in found)
        return np.frombuffer(found, np.uint8).reshape(-1, DIGEST_SIZE)

    def keys(self, number: int) -> np.ndarray:
        """[n, 2] uint32, the keys of a group's samples, whatever iteration samples from them."""
        batch, row = divmod(number, self.batch_size)
        key = jax.random.fold_in(jax.random.key(self.seed), batch)
        return np.asarray(sample_keys(key, np.array([row], np.uint32), self.n))[0]

    def key(self, number: int) -> jax.Array:
        """A key of the group as a whole."""
        return jax.random.fold_in(jax.random.key(self.seed), number)
