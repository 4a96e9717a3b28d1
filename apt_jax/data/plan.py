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
    """One global batch: the bucket it comes from and int64 [batch_size] record numbers."""

    bucket: int
    records: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The batches of every epoch.

    members: for each bucket the record numbers in it, int64 (disjoint). batch_size: global.
    """

    members: tuple[np.ndarray, ...]
    batch_size: int
    seed: int

    @classmethod
    def build(cls, members: Sequence[Sequence[int]], batch_size: int, seed: int) -> Plan:
        return cls(tuple(np.asarray(m, np.int64) for m in members), int(batch_size), int(seed))

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is not positive")
        if not sum(map(len, self.members)):
            raise ValueError("a plan needs at least one record")
        object.__setattr__(self, "epoch", functools.lru_cache(maxsize=4)(self._epoch))

    @functools.cached_property
    def batches_per_epoch(self) -> int:
        """ceil(records / batch_size) summed over the buckets."""
        return sum(-(-len(m) // self.batch_size) for m in self.members)

    def position(self, step: int) -> tuple[int, int]:
        """Global step -> (epoch, number of the batch in it)."""
        return divmod(step, self.batches_per_epoch)

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        epoch, number = self.position(step)
        return self.epoch(epoch)[number]

    def _epoch(self, epoch: int) -> tuple[Batch, ...]:
        batches = []
        for bucket, members in enumerate(self.members):
            if not len(members):
                continue
            order = members[shuffle(len(members), self.seed, epoch, _ORDER, bucket)]
            padding = -len(order) % self.batch_size
            order = np.concatenate([order, np.full(padding, PADDING, np.int64)])
            batches += [Batch(bucket, part) for part in order.reshape(-1, self.batch_size)]
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
