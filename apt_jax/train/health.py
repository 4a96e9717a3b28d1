"""Stops a run that has broken, warns of one that is about to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from apt_jax.errors import UserError

# A discriminator that wins everywhere has loss 0; at the start both softplus terms give 2 ln 2.
COLLAPSE_LOSS = 0.05
COLLAPSE_STEPS = 50
# One that gives the same logit to everything has 2 ln 2 (relativistic: ln 2), and stays there for good
# where the penalties have made it flat (docs/tuning.md, "A discriminator that falls silent").
SILENT_WITHIN = 0.005
SILENT_STEPS = 300


def check_finite(step: int, metrics: Mapping[str, float], last_good: int | None, config: Any) -> None:
    """Raises UserError when one update gave a loss, gradient or new weight that is no number.

    Args:
      step: the number of the update (the first is 1).
      metrics: its scalars; those named "finite" or ".../finite" are 1.0 for a sound update.
      last_good: step of the newest checkpoint, None if there is none.
      config: of the run; its advice names what this stage reads and has not set already.
    """
    bad = [name for name, value in metrics.items()
           if name.split("/")[-1] == "finite" and not value == 1.0]
    if not bad:
        return
    network = bad[0].split("/")[0] if "/" in bad[0] else "generator"
    good = (f"the last good checkpoint is step {last_good}" if last_good is not None
            else "there is no checkpoint yet")
    advice = ["a lower optimizer.learning_rate"]
    if config.model.dtype != "float32":
        advice.append("model.dtype = float32")
    if config.stage == "adversarial":
        advice.append("a larger objective.adversarial.r1_weight")
    raise UserError(
        f"the {network}'s loss or gradient was not finite at step {step}; {good}, the broken state "
        f"was not saved. Try {' or '.join(advice)}, and run the same command again")


class _Watch:
    """Says once that something has held for so many updates in a row."""

    def __init__(self, warn: Callable[[str], None], steps: int):
        self._warn, self._steps = warn, steps
        self._run, self._done = 0, False

    def _saw(self, holds: bool, message: Callable[[int], str]) -> None:
        """message: what to say after that many updates in a row."""
        self._run = self._run + 1 if holds else 0
        if self._run >= self._steps and not self._done:
            self._done = True
            self._warn(message(self._run))


class CollapseWatch(_Watch):
    """Warns once when D's GAN loss stays near zero: the sign of collapse without R1 (Sec. 5.1).

    The penalties do not count: weighted, they keep the sum up for as long as D still moves.
    """

    def __init__(self, warn: Callable[[str], None], loss: float = COLLAPSE_LOSS,
                 steps: int = COLLAPSE_STEPS):
        super().__init__(warn, steps)
        self._loss = loss

    def observe(self, step: int, d_gan: float) -> None:
        """Takes D's loss without penalties of one update."""
        self._saw(d_gan < self._loss, lambda run: (
            f"step {step}: the discriminator's loss without penalties has been below "
            f"{self._loss} for {run} steps; it wins everywhere and the generator learns "
            "nothing (collapse). Check objective.adversarial.r1 = True, try a larger r1_sigma "
            "or r1_weight, or a lower optimizer.discriminator_learning_rate"))


class SilenceWatch(_Watch):
    """Warns once when D's GAN loss stays that of no opinion: G's gradient is noise then."""

    def __init__(self, warn: Callable[[str], None], loss: str = "non_saturating",
                 within: float = SILENT_WITHIN, steps: int = SILENT_STEPS):
        """loss: objective.adversarial.loss."""
        super().__init__(warn, steps)
        self._level, self._within = math.log(2) * (1 if loss == "relativistic" else 2), within

    def observe(self, step: int, d_gan: float) -> None:
        """Takes D's loss without penalties of one update."""
        self._saw(abs(d_gan - self._level) < self._within, lambda run: (
            f"step {step}: the discriminator's loss without penalties has been within "
            f"{self._within} of {self._level:.4f} for {run} steps; it tells nothing apart and the "
            "generator follows noise. If its logits stay so, start this stage anew: with "
            "init.discriminator where an adversarial stage went before, else with another "
            "r1_weight or optimizer.discriminator_learning_rate"))
