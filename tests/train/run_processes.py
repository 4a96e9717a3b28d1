"""A config file for the tests with several processes: `FILE.py:STAGE,DIFFUSION`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from tiny import emoji_config  # noqa: E402

STEPS = 8


def get_config(stage_and_weights: str):
    """A short run in which rounding does not grow.

    At the paper's eps every weight moves by the learning rate in RMSProp's first updates, the more
    so where its gradient is nothing but rounding.
    """
    stage, weights = stage_and_weights.split(",", 1)
    start = {"init__generator": weights}
    if stage == "adversarial":
        start |= {"init__diffusion": weights, "objective__adversarial__r1_sigma": 0.5}
    return emoji_config(stage, train__steps=STEPS, train__log_every=1, train__checkpoint_every=3,
                        optimizer__learning_rate=1e-3, optimizer__eps=1e-2, **start)
