"""Decode and encode with the height split over a mesh axis: equal to one device, in less time.

Every 3x3 convolution reads one row of each neighbour (a halo exchange by `ppermute`: at 720p on
eight devices 1% of the activations); the attention of the middle block, at the latent's resolution,
gathers the keys and values of all rows. Heights that do not divide evenly are padded with rows that
read as zero, which is what the convolutions see beyond the picture's edge anyway.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from apt_jax.errors import UserError
from apt_jax.models.vae.model import VAE
from apt_jax.models.vae.walk import Rows
from apt_jax.nn.functional import Params


def decode_sharded(vae: VAE, params: Params, z: jax.Array, *, mesh: Mesh, axis: str,
                   batch_axes: str | tuple[str, ...] | None = None, chunk: int = 1,
                   clamp: bool = True) -> jax.Array:
    """`vae.decode` with the height over `axis` of the mesh; jit it.

    Args:
      params: the whole tree on every device (a sharded tree is gathered).
      z: [B, 1 + k, H', W', 16], normalised.
      axis: any axis of the mesh. Its size may exceed H', though devices then idle.
      batch_axes: axes over which B is split; along all other axes the work is repeated.

    Returns [B, 1 + 4k, 8 H', 8 W', 3] in the compute dtype, its height sharded over `axis`.
    """
    def part(params: Params, z: jax.Array, rows: Rows) -> jax.Array:
        return vae.decode(params, z, chunk=chunk, clamp=clamp, rows=rows)

    return _by_rows(part, params, z, mesh, axis, batch_axes, 1, vae.config.spatial)


def encode_sharded(vae: VAE, params: Params, x: jax.Array, *, mesh: Mesh, axis: str,
                   batch_axes: str | tuple[str, ...] | None = None, chunk: int = 1) -> jax.Array:
    """`vae.encode` with the height over `axis` of the mesh; jit it. See `decode_sharded`.

    x: [B, 1 + 4k, H, W, 3]. Returns float32 [B, 1 + k, H / 8, W / 8, 16].
    """
    vae.config.latent_shape(*x.shape[1:4])

    def part(params: Params, x: jax.Array, rows: Rows) -> jax.Array:
        return vae.encode(params, x, chunk=chunk, rows=rows)

    return _by_rows(part, params, x, mesh, axis, batch_axes, vae.config.spatial, 1)


def _by_rows(part, params: Params, x: jax.Array, mesh: Mesh, axis: str,
             batch_axes: str | tuple[str, ...] | None, unit: int, out_unit: int) -> jax.Array:
    """part(params, x, rows) on each device's rows; unit: rows of x for one latent row."""
    if axis not in mesh.shape:
        raise UserError(f"the mesh has no axis {axis!r}; its axes are {', '.join(mesh.shape)}")
    ways, real = mesh.shape[axis], x.shape[2] // unit
    rows = Rows(axis, ways, -(-real // ways), real)
    padding = (ways * rows.local - real) * unit
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0), (0, 0)))
    spec = PartitionSpec(batch_axes, None, axis)
    run = jax.shard_map(lambda params, x: part(params, x, rows), mesh=mesh,
                        in_specs=(PartitionSpec(), spec), out_specs=spec,
                        check_vma=False)  # kernels do not say over which axes their results vary
    return run(params, x)[:, :, : real * out_unit]
