"""Frames to latents with the checkpoint's VAE, batched over all devices of this process."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from apt_jax.errors import UserError, disk_errors
from apt_jax.tensor_files import TensorSet, find_files, read_json

_END = 2048  # bytes


class VaeCodec:
    """The VAE's encoder for `prepare`; weights are read and programs compiled on first use.

    Args:
      folder: what `apt-jax convert import` wrote, or its vae/.
      per_device: samples of one call on each device; memory grows with it.
      dtype: compute dtype, "bfloat16" or "float32".

    UserError for a folder that holds no VAE.
    """

    def __init__(self, folder: str | pathlib.Path, per_device: int = 1, dtype: str = "bfloat16"):
        self.folder = vae_folder(folder)
        self.per_device, self.dtype = per_device, dtype

    def __reduce__(self):  # a Ray worker reads the weights itself
        return VaeCodec, (self.folder.absolute(), self.per_device, self.dtype)

    @functools.cached_property
    def name(self) -> str:
        """Which weights, by content, and in which precision."""
        return f"vae {folder_digest(self.folder, whole=True)} {self.dtype}"

    @functools.cached_property
    def config(self):
        """The VAEConfig."""
        from apt_jax.models.vae import VAEConfig

        return VAEConfig.from_dict(_card(self.folder)["vae"])

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def batch(self) -> int:
        import jax

        return self.per_device * jax.local_device_count()

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(F', H', W') of a clip."""
        return self.config.latent_shape(frames, height, width)[:3]

    def encode(self, frames: np.ndarray) -> Any:
        """uint8 [B, F, H, W, 3], B <= batch -> [B, F', H', W', C] bfloat16, normalised.

        A short batch repeats its last sample up to `batch`, so that each bucket compiles once. The
        result may still be under way on the devices.
        """
        import jax

        count = len(frames)
        frames = frames[np.minimum(np.arange(self.batch), count - 1)]
        return self._run(jax.device_put(frames, self._split))[:count]

    @functools.cached_property
    def _split(self):
        """The batch over all local devices."""
        import jax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        mesh = jax.make_mesh((jax.local_device_count(),), ("data",), devices=jax.local_devices(),
                             axis_types=(AxisType.Auto,))
        return NamedSharding(mesh, PartitionSpec("data"))

    @functools.cached_property
    def _run(self):
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec

        from apt_jax.models.vae import load_vae

        with disk_errors(self.folder, "read"):
            vae, params = load_vae(self.folder, self.dtype)
        whole = NamedSharding(self._split.mesh, PartitionSpec())
        params = jax.jit(vae.cast, out_shardings=whole)(params)

        def encode(params, frames):
            x = frames.astype(jnp.float32) / 127.5 - 1  # [B, F, H, W, 3]
            return vae.encode(params, x).astype(jnp.bfloat16)  # [B, F', H', W', C]

        run = jax.jit(encode, in_shardings=(whole, self._split), out_shardings=self._split)
        return functools.partial(run, params)


def vae_folder(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder itself or its vae/. UserError where neither holds a VAE of ours."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"--vae: there is no folder {folder}; apt-jax convert import writes one")
    found = folder / "vae" if (folder / "vae").is_dir() else folder
    card = _card(found)
    if card.get("kind") != "vae" or not isinstance(card.get("vae"), dict):
        raise UserError(f"--vae: {found} does not describe a VAE (kind = {card.get('kind')!r}); "
                        "give a folder that apt-jax convert import wrote")
    return found


def _card(folder: pathlib.Path) -> dict:
    value = read_json(folder / "config.json")
    if not isinstance(value, dict):
        raise UserError(f"{folder / 'config.json'} is no JSON object; import the checkpoint again")
    return value


def folder_digest(folder: pathlib.Path, whole: bool, beside: Sequence[pathlib.Path] = ()) -> str:
    """A short hash of a weights folder: of its config, its tensors, and all of the files `beside`.

    whole False, for large encoders, hashes names, shapes and the first and last 2 KiB of every
    tensor. UserError where a tensor file is damaged, incomplete or missing.
    """
    digest = hashlib.sha256(json.dumps(_card(folder), sort_keys=True).encode())
    weights = TensorSet(find_files(folder))  # also looks at every header
    with disk_errors(folder, "read"):
        for path in (*(weights.files if whole else ()), *beside):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while part := file.read(2**22):
                    digest.update(part)
        if not whole:
            for name, tensor in sorted(weights.tensors.items()):
                digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
            _digest_ends(digest, weights)
    return digest.hexdigest()[:16]


def _digest_ends(digest, weights: TensorSet) -> None:
    """The first and last bytes of every tensor, file by file."""
    for path in weights.files:
        with open(path, "rb") as file:
            for tensor in sorted((t for t in weights.tensors.values() if t.file == path),
                                 key=lambda t: t.start):
                for place in (tensor.start, max(tensor.start, tensor.stop - _END)):
                    file.seek(place)
                    digest.update(file.read(min(_END, tensor.stop - place)))
