"""Generator weights out of a run folder: its newest checkpoint; adapters, alone and merged."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from apt_jax.config import load_kept
from apt_jax.errors import UserError, disk_error, os_error, passes
from apt_jax.tensor_files import read_table, write_json
from apt_jax.weights.common import (
    BUNDLED,
    CHECKPOINTS,
    CONFIG_FILE,
    Leaves,
    check_keys,
    flatten,
    is_run,
    make_abstract,
    unflatten,
)

log = logging.getLogger(__name__)

STARTED_FILE = "started_in.json"  # {"directory": ...}
# What is asked for -> its name in the state of a run (train/state.py).
STATES = {"ema": "generator_ema", "raw": "generator", "discriminator": "discriminator"}


def record_directory(run: Path, config: Any) -> None:
    """Notes in a run folder which directory its config's relative paths start from.

    It is no part of the config, which has to be the same when a run goes on elsewhere. A record
    stays where the paths are not found from here.
    """
    here = Path.cwd()
    names = [name for name in (config.init.generator, config.init.discriminator,
                               config.init.diffusion) if name and not name.startswith(BUNDLED)]
    if all((here / Path(name).expanduser()).exists() for name in names) or not (run / STARTED_FILE).exists():
        write_json(run / STARTED_FILE, {"directory": str(here)})


def init_path(run: Path, name: str) -> str:
    """init.generator or init.diffusion of a run's config as a path from here.

    It is `name` itself for "", bundled weights, and where training recorded no directory or the
    recorded place is gone; a home folder's ~ is written out.
    """
    if not name or name.startswith(BUNDLED):
        return name
    if name.startswith("~"):
        name = str(Path(name).expanduser())
    if not (run / STARTED_FILE).is_file():
        return name
    directory = Path(str(read_table(run / STARTED_FILE).get("directory", "")))
    there = directory / name
    return str(there) if directory != Path.cwd() and there.exists() else name


def load_run(folder: Path, which: str, shardings: Any
             ) -> tuple[ml_collections.ConfigDict, dict[str, Any]]:
    """config.model and parameters of a run; adapters are merged into their base.

    Arguments and errors as for `load_generator`.
    """
    config = load_kept(folder / CONFIG_FILE)
    lora = config.get("lora")
    if lora and lora.rank:
        return config.model, _merged(folder, config, which, shardings)
    return config.model, newest(folder, which, make_abstract(config.model), shardings)


def load_discriminator(folder: str | Path, abstract: Any, shardings: Any = None) -> dict[str, Any]:
    """The discriminator of an adversarial run, whole, like `abstract`.

    UserError for any other folder, for adapters, and for a discriminator of other shapes.
    """
    folder = Path(folder).expanduser()
    if not is_run(folder):
        raise UserError(f"init.discriminator = {str(folder)!r} is no run folder; give one that "
                        "apt-jax train wrote in stage adversarial, or leave it empty")
    config = load_kept(folder / CONFIG_FILE)
    if config.get("stage") != "adversarial":
        raise UserError(f"init.discriminator: the run {folder} is of stage {config.get('stage')!r} and "
                        "has no discriminator; give one of stage adversarial, or leave it empty")
    lora = config.get("lora")
    if lora and lora.rank and lora.get("discriminator"):
        raise UserError(f"init.discriminator: the run {folder} trained adapters of its discriminator; "
                        "give one that trained the whole of it, or leave it empty")

    def read(step: Path) -> dict[str, Any]:
        _check_same_shapes(step, "discriminator", abstract, folder)
        return _read_checkpoint(step, "discriminator", abstract, shardings)

    return _try_steps(folder, read)


def newest(folder: Path, which: str, abstract: Any, shardings: Any = None) -> dict[str, Any]:
    """The parameters `abstract` of the newest checkpoint that can be read."""
    return _try_steps(folder, lambda step: _read_checkpoint(step, which, abstract, shardings))


def open_run(folder: Path, which: str) -> tuple[ml_collections.ConfigDict, Any]:
    """config.model and the leaves of a run, each read from the checkpoint when it is asked for.

    The host holds one leaf at a time, but for an adapted run, which is merged whole.
    """
    config = load_kept(folder / CONFIG_FILE)
    lora = config.get("lora")
    if lora and lora.rank:
        return config.model, Leaves(flatten(_merged(folder, config, which, None)))
    abstract = flatten(make_abstract(config.model))

    def opened(step: Path) -> CheckpointLeaves:
        leaves = CheckpointLeaves(step, which, abstract)
        leaves.probe(min(abstract, key=lambda name: abstract[name].size))
        return leaves

    return config.model, _try_steps(folder, opened)


class CheckpointLeaves:
    """The parameters of one checkpoint, to be read like those of a file."""

    def __init__(self, step: Path, which: str, abstract: dict[str, Any]):
        self._step, self._which, self._abstract = step, which, abstract
        self._last: tuple[str, np.ndarray] | None = None

    @property
    def step(self) -> int:
        """How many updates the checkpoint is of."""
        return int(self._step.name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(leaf.shape) for name, leaf in self._abstract.items()}

    def probe(self, name: str) -> None:
        """Reads a leaf; a torn checkpoint makes Orbax raise whatever it raises."""
        self._read(name)

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """A leaf, or one layer of it; the leaf last read is kept.

        UserError where its part of the checkpoint is damaged.
        """
        try:
            self._read(name)
        except UserError:
            raise
        except Exception as error:
            if may_be_whole(error):
                raise
            raise UserError(f"{self._step} is damaged: {name!r} cannot be read "
                            f"({type(error).__name__}); move that folder away to use the checkpoint "
                            "before it, or train on to a new one") from error
        value = self._last[1]
        return value if layer is None else value[layer]

    def _read(self, name: str) -> None:
        if self._last is None or self._last[0] != name:
            self._last = None  # freed before the next one comes
            one = unflatten({name: self._abstract[name]})
            value = flatten(_read_checkpoint(self._step, self._which, one, None))[name]
            self._last = (name, np.asarray(value))


def _try_steps(folder: Path, read: Callable[[Path], Any]) -> Any:
    """`read` of the newest checkpoint that does not fail; a warning where newer ones do."""
    steps = sorted((int(p.name) for p in (folder / CHECKPOINTS).iterdir() if p.name.isdigit()),
                   reverse=True)
    problem = "it holds none"
    for step in steps:
        try:
            found = read(folder / CHECKPOINTS / str(step))
            if step != steps[0]:
                log.warning("warning: %s: its newest checkpoint cannot be read (%s); step %d is "
                            "used", folder, problem, step)
            return found
        except UserError:
            raise
        except Exception as error:  # whatever a torn checkpoint makes the reader raise
            if may_be_whole(error):
                if isinstance(cause := os_error(error), PermissionError):
                    raise disk_error(cause, folder, "read") from error
                raise
            problem = f"step {step}: {type(error).__name__}"
    raise UserError(f"{folder} has no readable checkpoint ({problem}); continue the run so that it "
                    "saves one")


def may_be_whole(error: Exception) -> bool:
    """Whether an error of reading a checkpoint says nothing about its files, but that a disk, the
    permissions or the memory did not let them be read; a file that is missing is damage."""
    cause = os_error(error)
    return passes(error) and not (cause is not None and cause.errno == errno.ENOENT)


def _read_checkpoint(folder: Path, which: str, abstract: Any, shardings: Any) -> dict[str, Any]:
    """One parameter tree out of a checkpoint; the rest of the state is not read."""
    import jax
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    if shardings is not None and jax.tree.structure(abstract) == jax.tree.structure(shardings):
        args = jax.tree.map(lambda leaf, where: ocp.ArrayRestoreArgs(
            sharding=where, global_shape=leaf.shape, dtype=leaf.dtype), abstract, shardings)
    else:
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    name = STATES[which]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        state = reader.restore((folder / "state").resolve(), args=ocp.args.PyTreeRestore(
            item={name: abstract}, restore_args={name: args}, partial_restore=True))
    params = state[name]
    # A leaf that the checkpoint lacks comes back as its description.
    read = {name: leaf for name, leaf in flatten(params).items()
            if not isinstance(leaf, jax.ShapeDtypeStruct)}
    check_keys(Leaves(read).shapes(), abstract, str(folder))
    return params


def _check_same_shapes(step: Path, which: str, abstract: Any, run: Path) -> None:
    """UserError that names the first parameter in which a checkpoint's network is not `abstract`."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        there = flatten(reader.metadata((step / "state").resolve()).item_metadata.tree[STATES[which]])
    here = flatten(abstract)
    for name in sorted(set(there) | set(here)):
        shapes = [tuple(leaves[name].shape) if name in leaves else "not there"
                  for leaves in (there, here)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"init.{which} = {run}: its parameter {name!r} is {shapes[0]}, here {shapes[1]}; set "
                f"config.model and config.{which} as in its {CONFIG_FILE}, or leave init.{which} empty")


# -- runs that trained adapters (config.lora) ------------------------------------------------------


def adapted_run(path: str | Path, lora: Any = None) -> ml_collections.ConfigDict | None:
    """The config of a run that trained adapters (such as those of `lora`, if given); else None."""
    if not str(path) or str(path).startswith(BUNDLED) or not is_run(Path(path).expanduser()):
        return None
    config = load_kept(Path(path).expanduser() / CONFIG_FILE)
    here = config.get("lora")
    if not here or not here.rank:
        return None
    same = lora is None or all(here[key] == lora[key] for key in ("rank", "alpha"))
    return config if same else None


def base_of_adapters(source: str, which: str, lora: Any) -> tuple[str, str]:
    """(path, which) of the weights below the adapters of a run that starts from `source`.

    A run that goes on with the adapters of another has that one's base.
    """
    config = adapted_run(source, lora)
    if config is None:
        return source, which
    return base_of_adapters(*_start_of(Path(source).expanduser(), config), lora)


def _start_of(folder: Path, config: Any) -> tuple[str, str]:
    if config.init.generator:
        return init_path(folder, config.init.generator), config.init.generator_weights
    return init_path(folder, config.init.diffusion), "ema"


def load_adapters(path: str | Path, which: str = "ema") -> tuple[Any, dict[str, Any]]:
    """(config, adapters as a nested dict of numpy arrays) of a run that trained some.

    UserError for any other path.
    """
    from apt_jax.models.presets import make_generator
    from apt_jax.nn.lora import split

    config = adapted_run(path)
    if config is None:
        raise UserError(f"{path} is no run that trained adapters; give one with lora.rank set")
    adapters, _ = split(make_generator(config.model, config.lora).abstract())
    return config, newest(Path(path).expanduser(), which, adapters)


def _merged(folder: Path, config: Any, which: str, shardings: Any) -> dict[str, Any]:
    """The base of an adapted run with its adapters in it."""
    import jax

    from apt_jax.models.presets import adapter_scale
    from apt_jax.nn.lora import join, merge
    from apt_jax.weights.folders import load_generator

    _, adapters = load_adapters(folder, which)
    base = base_of_adapters(*_start_of(folder, config), config.lora)
    if not base[0].startswith(BUNDLED) and not Path(base[0]).is_dir():
        raise UserError(f"{folder} has adapters on {base[0]}, which is not here; run the command "
                        "in the folder where it was trained, or put those weights there")
    _, params = load_generator(*base, shardings)
    if isinstance(jax.tree.leaves(params)[0], jax.Array):
        adapters = jax.tree.map(jax.numpy.asarray, adapters)
    return merge(join(params, adapters), adapter_scale(config.lora))
