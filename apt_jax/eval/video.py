"""Features of clips. There is no video network here, and nothing below is an FVD.

Two distances judge a clip: the per-frame FD (every frame counts as a picture) and the motion FD, on
the *differences of the features of neighbouring frames*, phi(frame f + 1) - phi(frame f), each pair
one sample, with its own projection fitted on the real differences. The frames' features serve both,
so motion costs no second pass. A frozen clip has only zeros there and a flickering one differences
that are too large; both raise the motion FD. What it cannot see: the order of pairs in a clip, and
anything longer than two frames.
"""

import numpy as np


def motion_features(features: np.ndarray) -> np.ndarray:
    """Features [N, F, D] of N clips -> differences of neighbours [N * (F - 1), D]."""
    return np.diff(features, axis=1).reshape(-1, features.shape[-1])
