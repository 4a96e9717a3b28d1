"""The scheduler of an exported pipeline: one step is z - v(z, c, T), two land on the sampler's t.

FlowMatchEulerDiscreteScheduler starts at sigma = 1 whatever its shift and ends at 0, so its one
step is x = z - v exactly. With two steps its second sigma follows from the shift, but not the same
way in every pipeline: Wan's lets the scheduler space the steps, from 1 to its own smallest sigma
shift(1 / 1000), and shifts those again; Qwen-Image's hands it 1 and 1/2, which are shifted once.
"""

from __future__ import annotations

import math
from typing import Any

from apt_jax.errors import UserError

CLASS = "FlowMatchEulerDiscreteScheduler"
TRAIN_STEPS = 1000
SCHEDULER_FILE = "scheduler_config.json"


def two_step_shift(family: str, t: float) -> float:
    """The shift whose second sigma of two is t, in (0, 1), to 1e-6 or so.

    31.6 for Wan and 1 for Qwen-Image at 0.5. It is rounded to few enough bits that shift - 1 is
    exact in float32: else the first sigma, shift / (1 + (shift - 1)), might miss 1 by a bit.
    """
    if not 0 < t < 1:
        raise UserError(f"the time between two steps is {t}; it must lie between 0 and 1")
    odds = t / (1 - t)
    # Wan: shift(shift(1 / 1000, s), s) = t; Qwen-Image: shift(1 / 2, s) = t
    shift = math.sqrt(odds * (TRAIN_STEPS - 1)) if family == "wan" else odds
    unit = 2.0 ** (max(0, math.frexp(shift)[1]) - 22)
    return max(1, round(shift / unit)) * unit


def scheduler_config(family: str, t: float, fresh: bool = False) -> dict[str, Any]:
    """scheduler_config.json.

    Args:
      family: "wan" or "qwen_image".
      t: the time between two steps.
      fresh: fresh noise in the second step instead of the first one's; the pipelines let it come
        from torch's global generator.
    """
    return {
        "_class_name": CLASS,
        "num_train_timesteps": TRAIN_STEPS,
        "shift": two_step_shift(family, t),
        "use_dynamic_shifting": False,
        "shift_terminal": None,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": fresh,
    }
