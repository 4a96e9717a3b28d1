"""What of a config a run may not change, may change with a warning, and may change freely."""

import json

import pytest
from tiny import tiny_config

from apt_jax.config import config_from_json, config_to_json
from apt_jax.config.schema import BY_KEY
from apt_jax.errors import UserError
from apt_jax.train import course
from apt_jax.train.course import changes, check_course


def saved(config, without=()):
    """The config as a checkpoint has it; `without`: fields that its commit did not know."""
    data = json.loads(config_to_json(config))
    for key in without:
        group, leaf = key.split(".")
        del data[group][leaf]
    return config_from_json(json.dumps(data))


def changed(tmp_path, stage="pretrain", step=4, **overrides):
    """Keys that changes() names for a run of `tiny_config(stage)`."""
    there = saved(tiny_config(stage, init__generator="g", init__diffusion="d"))
    here = tiny_config(stage, **{"init__generator": "g", "init__diffusion": "d", **overrides})
    hard, soft = changes(there, here, step, tmp_path)
    assert hard is None
    return [line.split(" = ")[0] for line in soft]


@pytest.mark.parametrize(("stage", "overrides"), [
    ("pretrain", {"optimizer__learning_rate": 1e-3}),
    ("pretrain", {"objective__flow__shift": 2.0}),
    ("pretrain", {"train__ema_decay": 0.9}),
    ("pretrain", {"seed": 1}),
    ("pretrain", {"data__caption_dropout": 0.0}),
    ("pretrain", {"init__generator": "other"}),
    ("pretrain", {"model__dtype": "bfloat16"}),
    ("pretrain", {"model__attention": "cudnn_fp8"}),
    ("consistency", {"objective__consistency__guidance": 1.0}),
    ("consistency", {"init__diffusion": "bundled:base"}),
    ("adversarial", {"objective__adversarial__r1": False}),
    ("adversarial", {"optimizer__discriminator_learning_rate": 1e-5}),
    ("adversarial", {"optimizer__decay": 0.99}),
    ("adversarial", {"discriminator__matmul": "fp8"}),
])
def test_what_moves_the_weights_is_named(tmp_path, stage, overrides):
    key = next(iter(overrides)).replace("__", ".")
    assert changed(tmp_path, stage, **overrides) == [key]


@pytest.mark.parametrize(("stage", "overrides"), [
    ("pretrain", {"name": "other", "train__log_every": 7, "train__checkpoint_every": 3,
                  "train__first_step_seconds": 1.0, "train__sample_every": 2, "mesh__fsdp": 1,
                  "train__accumulate": 2, "data__threads": 0, "sample__guidance": 9.0}),
    ("pretrain", {"model__remat": "full", "model__attention": "oracle"}),
    # what the stage does not read
    ("pretrain", {"objective__adversarial__r1": False, "discriminator__backbone_rate": 0.5,
                  "optimizer__discriminator_learning_rate": 1e-5, "init__diffusion": "other"}),
    ("adversarial", {"objective__flow__shift": 2.0, "discriminator__backbone_rate": 0.5,
                     "optimizer__b2": 0.9}),
])
def test_what_does_not_is_free(tmp_path, stage, overrides):
    assert changed(tmp_path, stage, **overrides) == []


def test_every_field_of_the_lists_exists():
    """A field that is renamed must not become free, or count, by mistake."""
    keys = [*course.IDENTITY, *course.FREE, *course.PLACES,
            *sum(course.OTHER_OPTIMIZER.values(), ()),
            *(f"model.{key}" for key in course.COMPUTE_ONLY)]
    assert [key for key in keys if key not in BY_KEY] == []


def test_a_run_older_than_a_field_had_its_default(tmp_path):
    old = saved(tiny_config(), without=("train.first_step_seconds", "train.ema_from_step"))
    assert changes(old, tiny_config(), 4, tmp_path) == (None, [])
    _, soft = changes(old, tiny_config(train__ema_from_step=2), 4, tmp_path)
    assert soft == ["train.ema_from_step = 0 there, 2 here"]


def test_a_run_is_lengthened_freely_unless_its_rate_falls(tmp_path):
    assert changed(tmp_path, train__steps=9) == []
    assert changed(tmp_path, step=2, train__steps=3) == []
    assert changed(tmp_path, step=4, train__steps=3) == ["train.steps"]  # it was trained for more
    falling = tiny_config(optimizer__final_rate=0.1)
    longer = tiny_config(optimizer__final_rate=0.1, train__steps=9)
    assert changes(saved(falling), longer, 4, tmp_path)[1] == ["train.steps = 4 there, 9 here"]


def test_a_finished_run_is_refused_another_config_and_an_unfinished_one_warned(tmp_path):
    there, here = tiny_config(), tiny_config(seed=3, objective__flow__shift=2.0)
    with pytest.raises(UserError, match="with another seed = 0 there, 3 here, objective.flow.shift "
                                        "= 1.0 there, 2.0 here; use another --workdir") as error:
        check_course(saved(there), here, 4, tmp_path)
    assert "\n" not in str(error.value)
    assert len(check_course(saved(there), here, 3, tmp_path)) == 2
    with pytest.raises(UserError, match="train.steps = 4 there, 2 here; .* the old value$"):
        check_course(saved(there), tiny_config(train__steps=2), 4, tmp_path)


def test_places_are_compared_by_what_lies_there(tmp_path, monkeypatch):
    study, run = tmp_path / "study", tmp_path / "study" / "image"
    for name, text in (("study/base", "a"), ("copy/base", "a"), ("other/base", "b")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    run.mkdir()
    (run / "started_in.json").write_text(json.dumps({"directory": str(study)}))
    monkeypatch.chdir(tmp_path)

    def differs(there, here):
        configs = [tiny_config(init__generator=path) for path in (there, here)]
        return changes(saved(configs[0]), configs[1], 4, run)[1]

    assert not differs("base", "study/base")  # relative to where the run was started
    assert not differs(str(study / "base"), "study/../study/base")
    assert not differs("base", "copy/base")  # the study was copied
    assert differs("base", "other/base")
    assert differs("base", "bundled:base") and differs("bundled:base", "study/base")
    assert not differs("/gone/base", "study/base")  # ... or moved
    assert differs("/gone/consistency", "study/base")
