"""A config file for the tests that train in a process of their own: `FILE.py:DIFFUSION`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from tiny import emoji_config  # noqa: E402


def get_config(weights: str):
    """An adversarial run from the weights folder `weights`."""
    return emoji_config("adversarial", init__diffusion=weights, init__generator=weights,
                        train__steps=12, train__log_every=1, train__checkpoint_every=3,
                        train__sample_every=4)
