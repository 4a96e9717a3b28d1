"""From the data set to the devices: which samples of an update a process reads, and where they go.

A process reads the rows of the global batch that wait on its devices and no others, wherever these
lie: jax orders the devices of a TPU slice by their place in its torus, and the rows of a host are
often not one stretch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from apt_jax.parallel.mesh import update_sharding
from apt_jax.train.steps import microbatches

BATCH_KEYS = ("x", "text", "text_mask", "loss_mask")


def _process_of(device: Any) -> int:
    return device.process_index


@functools.lru_cache(maxsize=64)
def rows_of(mesh: Mesh, size: int, accumulate: int = 1, process: int | None = None,
            process_of: Callable[[Any], int] = _process_of) -> np.ndarray:
    """int64 [b], ascending: the rows that a process reads of a global batch of `size` samples.

    Rows that several devices of a process hold are read once; processes whose devices hold the same
    rows (copies over context or tensor, where samples cannot wait apart) all read them.

    Args:
      size: samples of the update, filled up (`check_batch`).
      accumulate: train.accumulate; decides where samples wait.
      process: this one by default.
      process_of: whose a device is.
    """
    process = jax.process_index() if process is None else process
    sharding = update_sharding(mesh, microbatches(accumulate, size, mesh))
    mine = np.zeros(size, bool)
    for device, (part,) in sharding.devices_indices_map((size,)).items():
        if process_of(device) == process:
            mine[part] = True
    rows = np.flatnonzero(mine)
    rows.setflags(write=False)
    return rows


def within(rows: np.ndarray, part: slice) -> slice:
    """Where the stretch `part` of the global batch lies in the rows that were read, ascending."""
    start, stop = (None if end is None else int(np.searchsorted(rows, end))
                   for end in (part.start, part.stop))
    return slice(start, stop)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, accumulate: int = 1
              ) -> dict[str, jax.Array]:
    """A process's rows of a batch (`rows_of`) to its devices: arrays [B, ...] of the whole batch.

    batch: of `data.pipeline.batches`; "size" is B, by default the number of samples given.
    accumulate: train.accumulate of the step that takes it.
    """
    size = int(batch.get("size", len(batch["x"])))
    sharding = update_sharding(mesh, microbatches(accumulate, size, mesh))
    rows = rows_of(mesh, size, accumulate)

    def put(mine):
        shape = (size, *mine.shape[1:])
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            pieces.append(jax.device_put(mine[within(rows, index[0])], device))
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    found = {name: np.asarray(batch[name]) for name in BATCH_KEYS}
    if any(len(value) != len(rows) for value in found.values()):
        raise ValueError(f"a batch of {len(found['x'])} samples where this process has {len(rows)} "
                         f"of {size}")
    return {name: put(value) for name, value in found.items()}
