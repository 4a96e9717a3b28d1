"""The one training loop of all stages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from apt_jax.config import config_to_json, validate
from apt_jax.data.pipeline import batches, open_dataset, size_field
from apt_jax.errors import UserError
from apt_jax.nn.lora import join
from apt_jax.parallel.mesh import batch_unit, check_batch, make_mesh, replicated
from apt_jax.paths import given_path
from apt_jax.train.adapters import BASE
from apt_jax.train.checkpoint import Checkpoints, write_run_files
from apt_jax.train.disk import run_disk
from apt_jax.train.distributed import agree, describe
from apt_jax.train.feeding import put_batch, rows_of
from apt_jax.train.folder import RunFolder
from apt_jax.train.health import CollapseWatch, SilenceWatch, check_finite
from apt_jax.train.logs import MetricLog, Progress
from apt_jax.train.preemption import Preemption
from apt_jax.train.state import frozen_inputs, init_state, set_up
from apt_jax.train.steps import build_update
from apt_jax.train.watchdog import Watchdog
from apt_jax.weights import CONFIG_FILE, record_directory

# A save that had begun when a process of several failed may end in this time; it needs the others.
LEAVE_SECONDS = 60.0


def train(config: Any, workdir: str | Path, *, quiet: bool = False,
          dataset: Any = None, leave: Callable[[], NoReturn] | None = None) -> dict[str, Any]:
    """Trains one stage in a run folder; a folder with checkpoints is continued.

    Args:
      config: a whole configuration; `validate` is called on it.
      workdir: the run folder (config.json, versions.json, checkpoints/, metrics.jsonl,
        tensorboard/, samples/).
      quiet: no progress output; warnings still show.
      dataset: an opened data set in place of the one `config.data` names.
      leave: ends the process, where a signal comes before the first update of this one: compiling
        takes minutes, and nothing is lost. Without it, and with several processes, the signal waits
        for the update.

    Returns:
      {"status": "complete" or "preempted", "step", "seconds" (trained, over all attempts),
      "workdir", "metrics" (the last logged)}.

    Raises:
      UserError: a config, checkpoint, mesh or data set that does not fit; a finished run of another
        config (`train/course.py`); a folder that another run is in; a disk that does not take the
        run; a non-finite loss.
    """
    config = validate(config)
    if not str(workdir):  # Path("") would be the current directory
        raise UserError("--workdir is empty; name a run folder")
    workdir = Path(given_path("--workdir", workdir))
    hang = config.train.hang_seconds if jax.device_count() > 1 else 0.0
    # Around all of it: devices wait for each other in a step, and processes when they restore and
    # when they leave, too.
    with Watchdog(hang, config.train.first_step_seconds) as dog, RunFolder(workdir):
        run = _Run(config, workdir, quiet, dog)
        try:
            summary = run.train(dataset, leave)
        except BaseException:
            dog.slowly()
            run.close(LEAVE_SECONDS if jax.process_count() > 1 else None)
            raise
        dog.slowly()
        run.close()
        return summary


class _Run:
    """The parts of one run, opened in the order in which they can be wrong."""

    def __init__(self, config: Any, workdir: Path, quiet: bool, dog: Watchdog):
        self.config, self.workdir, self.dog = config, workdir, dog
        self.first = jax.process_index() == 0
        self.quiet = quiet
        self.progress: Progress | None = None
        self.log: MetricLog | None = None
        self.mesh = make_mesh(config.mesh)
        for name in sorted({size_field(frames, config.train.clip_batch_size)
                            for frames in config.data.frames}):
            size = config.train[name]
            filled = check_batch(self.mesh, size, config.train.accumulate, f"train.{name}")
            if filled > size:
                self.say(f"{config.name}: train.{name} = {size} is filled up with empty samples, "
                         f"{filled - size} of them, to split over devices and microbatches")
        self.setup = set_up(config, self.mesh)
        if jax.process_count() > 1:
            agree(config_to_json(config))
        print(f"{config.name}: {describe(self.mesh)}", file=sys.stderr, flush=True)
        self.checkpoints = Checkpoints(workdir, config, self.say)
        self.window: list[tuple[int, dict]] = []  # metrics on the device since the last log
        self.checked = 0  # updates known to be sound
        self.metrics: dict[str, float] = {}
        self.watches = (CollapseWatch(self.say),
                        SilenceWatch(self.say, config.objective.adversarial.loss))

    def say(self, text: str) -> None:
        """A line for the user, from one process."""
        if not self.first:
            return
        if self.progress is not None:
            self.progress.say(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """A line that only informs."""
        if not self.quiet:
            self.say(text)

    def close(self, seconds: float | None = None) -> None:
        """Releases all; what is being saved has so many seconds left (default: all it takes)."""
        if self.progress is not None:
            self.progress.close()
        try:
            if self.log is not None:
                with run_disk(self.workdir):
                    self.log.close()
        finally:
            self.checkpoints.close(seconds)

    def train(self, dataset: Any, leave: Callable[[], NoReturn] | None) -> dict[str, Any]:
        config, total = self.config, self.config.train.steps
        restored = self.checkpoints.restore(self.setup.abstract)
        step = restored.step if restored else 0
        before = restored.seconds if restored else 0.0
        if step >= total:
            # The files beside a finished run say what it was trained with; they stay.
            if not (self.workdir / CONFIG_FILE).is_file():
                self._write_files()
            self.tell(f"{config.name}: already trained for {step} steps")
            return self._summary("complete", step, before)
        dataset = _open(config) if dataset is None else dataset
        check_data(config, dataset)
        frozen = frozen_inputs(config, self.setup, dataset.negative_text, dataset.negative_mask,
                               replicated(self.mesh))
        state = restored.state if restored else init_state(config, self.setup)
        restored = None
        update = build_update(config, self.setup.nets, self.setup.optimizers, self.mesh,
                              self.setup.shardings)
        stream = _stream(config, dataset, step, self.mesh)
        batch = next(stream)
        # Only now: a start that is refused must not relabel the run that is there.
        self._write_files()
        if step:
            self.tell(f"{config.name}: going on from step {step}")
        with run_disk(self.workdir, opening=True):
            self.log = MetricLog(self.workdir, step, writes=self.first)
        self.progress = Progress(total, step, config.name, shows=self.first and not self.quiet)
        self.checked = step
        previews = None
        begun = time.monotonic()

        def seconds():
            return before + time.monotonic() - begun

        def pause():
            """Waits for the step; what comes next is none, and may take longer than one."""
            self._check(step)
            self.dog.slowly()

        def save():
            pause()  # and what is written is known to be sound
            self.checkpoints.save(step, state, {"seed": config.seed, "next_batch": step},
                                  seconds())

        def early(name):
            self.say(f"{config.name}: {name}: left before the first update, with nothing to save; "
                     f"the same command goes on from step {step} of {total}")
            leave()

        shapes = set()
        with Preemption(None if leave is None else early) as stop:
            while step < total:
                new = batch["x"].shape not in shapes
                self.dog.step(new)
                if new:
                    size = "x".join(map(str, batch["x"].shape[1:-1]))
                    self.progress.compiles(
                        f"the step of {size} samples" if shapes else "the first step")
                shapes.add(batch["x"].shape)
                on_device = put_batch(batch, self.mesh, config.train.accumulate)
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, frozen, on_device)
                stop.updates()
                step += 1
                self.window.append((step, metrics))
                if step < total:
                    batch = next(stream)  # read while the device works
                # One step late: the device has the next step to do meanwhile, and the host never
                # runs further ahead of it than that.
                self._check(step - 1)
                note = None
                if step % config.train.log_every == 0 or step == total:
                    note = self._log(step, seconds())
                self.progress.update(step, note)
                if step % config.train.checkpoint_every == 0 or step == total:
                    save()
                if config.train.sample_every and (
                        step % config.train.sample_every == 0 or step == total):
                    # After the checkpoint: a sampler is another program, and may be the first to fail.
                    pause()
                    if previews is None:
                        previews = self._previews(dataset)
                    params = join(frozen.get(BASE.format("generator")), state["generator_ema"])
                    with run_disk(self.workdir):
                        for preview in previews:
                            preview.write(step, params)
                if step < total and (name := stop.asked(step)):
                    save()
                    self.checkpoints.wait()
                    if self.window:
                        self._log(step, seconds())
                    self.say(f"{config.name}: {name}: saved step {step} of {total} and left; the "
                             "same command goes on from there")
                    return self._summary("preempted", step, seconds())
            # A signal that comes now has nothing left to stop.
            self.dog.slowly()
            self.checkpoints.wait()
        return self._summary("complete", step, seconds())

    def _write_files(self) -> None:
        """config.json, versions.json and where relative paths start, from one process."""
        if self.first:
            with run_disk(self.workdir, opening=True):
                write_run_files(self.workdir, self.config)
                record_directory(self.workdir, self.config)

    def _check(self, upto: int) -> None:
        """Raises for the first update up to `upto` that was not sound."""
        while self.checked < upto:
            step = self.checked + 1
            _, metrics = self.window[step - self.window[0][0]]
            flags = jax.device_get({n: v for n, v in metrics.items() if n.endswith("finite")})
            check_finite(step, flags, self.checkpoints.latest(), self.config)
            self.checked = step

    def _log(self, step: int, seconds: float) -> str:
        """Writes the means since the last log; returns the numbers to show."""
        self._check(step)
        rows = [(s, {n: float(v) for n, v in values.items()})
                for s, values in jax.device_get(self.window)]
        self.window.clear()
        for s, row in rows:
            if "discriminator/d_gan" in row:  # its loss has the penalties in it
                for watch in self.watches:
                    watch.observe(s, row["discriminator/d_gan"])
        self.metrics = {name: float(np.mean([row[name] for _, row in rows]))
                        for name in rows[0][1] if not name.endswith("finite")}
        with run_disk(self.workdir):
            self.log.write(step, {**self.metrics, "seconds": seconds})
        shown = [name for name in self.metrics if name.split("/")[-1] == "loss"]
        return ", ".join(f"{name} {self.metrics[name]:.4g}" for name in sorted(shown))

    def _previews(self, dataset: Any) -> list[Any]:
        """Of images and of clips, where the run has both."""
        from apt_jax.train.previews import Previews, find_prompts

        config = self.config
        prompts, text, mask = find_prompts(dataset, config.train.sample_prompts, self.say)
        largest = {shape.frames > 1: shape for shape in dataset.shapes}  # they are sorted
        return [Previews(config, self.setup.generator, self.mesh, self.workdir / "samples",
                         prompts, text, mask, dataset.negative_text, dataset.negative_mask,
                         (shape.frames, shape.height, shape.width, config.model.in_channels))
                for shape in largest.values()]

    def _summary(self, status: str, step: int, seconds: float) -> dict[str, Any]:
        return {"status": status, "step": step, "seconds": round(seconds, 3),
                "workdir": str(self.workdir), "metrics": dict(self.metrics)}


def check_data(config: Any, dataset: Any) -> None:
    """UserError where the data set's samples do not fit the model."""
    model = config.model
    if dataset.text_width != model.text_width:
        raise UserError(f"the captions of {config.data.path} have states of width "
                        f"{dataset.text_width}; set model.text_width = {dataset.text_width} "
                        f"(it is {model.text_width})")
    if dataset.channels != model.in_channels:
        raise UserError(f"{config.data.path} holds {dataset.kind} of {dataset.channels} channels; "
                        f"set model.in_channels and model.out_channels = {dataset.channels} (they "
                        f"are {model.in_channels})")
    if dataset.kind == "latents" and config.train.sample_every:
        raise UserError("pictures while training are of pixels, and the data are latents; set "
                        "train.sample_every = 0 and draw with apt-jax sample")
    for shape in dataset.shapes:
        sizes = (shape.frames, shape.height, shape.width)
        if any(size % patch for size, patch in zip(sizes, model.patch, strict=True)):
            raise UserError(f"samples of {sizes} frames, rows, columns are no multiple of "
                            f"model.patch = {tuple(model.patch)}; set data.height and data.width, "
                            "or another patch")


def _open(config: Any) -> Any:
    data = config.data
    return open_dataset(data.path, split=data.split, frames=data.frames, height=data.height,
                        width=data.width, frame_stride=data.frame_stride,
                        max_text_tokens=data.max_text_tokens,
                        caption_dropout=data.caption_dropout)


def _stream(config: Any, dataset: Any, start_step: int, mesh: Mesh) -> Any:
    accumulate = config.train.accumulate
    return iter(batches(dataset, batch_size=config.train.batch_size,
                        clip_batch_size=config.train.clip_batch_size, seed=config.seed,
                        start_step=start_step, rows=lambda size: rows_of(mesh, size, accumulate),
                        multiple=batch_unit(mesh, accumulate),
                        threads=config.data.threads,
                        prefetch=config.data.prefetch))
