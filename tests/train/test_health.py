"""Stops and warnings."""

import pytest
from tiny import tiny_config

from apt_jax.errors import UserError
from apt_jax.train.health import CollapseWatch, SilenceWatch, check_finite


def test_sound_metrics_pass():
    check_finite(3, {"finite": 1.0, "loss": float("nan")}, None, tiny_config())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_unsound_update_names_step_network_checkpoint_and_remedy(value):
    with pytest.raises(UserError) as error:
        check_finite(7, {"generator/finite": 1.0, "discriminator/finite": value}, 5,
                     tiny_config("adversarial", model__dtype="bfloat16"))
    text = str(error.value)
    for part in ("discriminator", "step 7", "checkpoint is step 5", "learning_rate", "not saved",
                 "float32", "r1_weight"):
        assert part in text
    with pytest.raises(UserError, match="no checkpoint yet.* Try a lower optimizer.learning_rate, and"):
        check_finite(7, {"finite": value}, None, tiny_config("consistency", model__dtype="float32"))


def test_collapse_warns_once_and_only_after_an_unbroken_run():
    said = []
    watch = CollapseWatch(said.append, loss=0.1, steps=5)
    for step in range(4):
        watch.observe(step, 0.01)
    watch.observe(4, 1.0)
    for step in range(5, 9):
        watch.observe(step, 0.01)
    assert said == []
    for step in range(9, 30):
        watch.observe(step, 0.01)
    assert len(said) == 1
    assert "step 9" in said[0] and "collapse" in said[0]


def test_silence_warns_once_and_only_after_an_unbroken_run():
    said = []
    watch = SilenceWatch(said.append, within=0.01, steps=5)
    for step in range(4):
        watch.observe(step, 1.386)
    watch.observe(4, 1.40)
    for step in range(5, 9):
        watch.observe(step, 1.39)
    assert said == []
    for step in range(9, 30):
        watch.observe(step, 1.3863)
    assert len(said) == 1 and "step 9" in said[0] and "tells nothing apart" in said[0]
    watch = SilenceWatch(said.append, "relativistic", within=0.01, steps=2)
    for value in (1.386, 1.386, 0.693, 0.694):
        watch.observe(30, value)
    assert len(said) == 2 and "of 0.6931 for 2 steps" in said[1]
