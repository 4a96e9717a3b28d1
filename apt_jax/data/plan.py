"""The order of training samples as pure arithmetic on (seed, epoch, step).

Nothing here has a state: the batch of a global step is computed from the seed and the step, so the
step in a checkpoint is the whole data position, and any number of processes or reader threads
sees the same global batches. Every record is in exactly one batch of an epoch; batches are whole
over all processes; the last short batch of a bucket is padded with -1, never dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

PADDING = -1

# What a random stream is for; part of its key.
_ORDER, _INTERLEAVE, _DROPOUT = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Batch:
    """One global batch: the bucket it comes from and the int64 [B] record numbers in it."""

    bucket: int
    records: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every epoch.

    members: for each bucket the record numbers in it, int64 (disjoint). batch_size: global, one
    for all buckets or a tuple with one for each.
    """

    members: tuple[np.ndarray, ...]
    batch_size: int | tuple[int, ...]
    seed: int

    @classmethod
    def build(
        cls, members: Sequence[Sequence[int]], batch_size: int | Sequence[int], seed: int
    ) -> Plan:
        size = int(batch_size) if np.ndim(batch_size) == 0 else tuple(map(int, batch_size))
        return cls(tuple(np.asarray(m, np.int64) for m in members), size, int(seed))

    def __post_init__(self):
        if min(self.sizes) < 1 or len(self.sizes) != len(self.members):
            raise ValueError(
                f"batch_size {self.batch_size} is not positive, or not one for each of "
                f"{len(self.members)} buckets"
            )
        if not sum(map(len, self.members)):
            raise ValueError("a plan needs at least one record")
        object.__setattr__(self, "epoch", functools.lru_cache(maxsize=4)(self._epoch))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The global batch size of each bucket."""
        if isinstance(self.batch_size, tuple):
            return self.batch_size
        return (self.batch_size,) * len(self.members)

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """ceil(records / batch size) summed over the buckets."""
        return sum(-(-len(m) // size) for m, size in zip(self.members, self.sizes))

    def position(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, number of the batch in it)."""
        return divmod(step, self.batches_per_epoch)

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        epoch, number = self.position(step)
        return self.epoch(epoch)[number]

    def _epoch(self, epoch: int) -> tuple[Batch, ...]:
        batches = []
        for bucket, (members, size) in enumerate(zip(self.members, self.sizes)):
            if not len(members):
                continue
            order = members[shuffle(len(members), self.seed, epoch, _ORDER, bucket)]
            padding = -len(order) % size
            order = np.concatenate([order, np.full(padding, PADDING, np.int64)])
            batches += [Batch(bucket, part) for part in order.reshape(-1, size)]
        return tuple(batches[i] for i in shuffle(len(batches), self.seed, epoch, _INTERLEAVE))


def dropped_captions(records: int, rate: float, seed: int, epoch: int) -> np.ndarray:
    """bool [records]: whose caption is replaced by the empty one in this epoch."""
    return _bits(records, seed, epoch, _DROPOUT) < rate * 2.0**64


def shuffle(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count) fixed by the key, the same on every numpy version."""
    return np.argsort(_bits(count, *key), kind="stable")


def _bits(count: int, *key: int) -> np.ndarray:
    # The raw output of a bit generator is what numpy promises never to change.
    return np.random.Philox(np.random.SeedSequence([int(k) for k in key])).random_raw(count)
