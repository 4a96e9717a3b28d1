"""The shipped configs load, validate, say how they are run, and build; the 8B ones abstractly."""

import ast
import json
import shlex
from pathlib import Path

import jax
import pytest

from apt_jax.config import base_config, load_config, validate
from apt_jax.config.networks import NETWORKS, use_network
from apt_jax.errors import UserError
from apt_jax.models.discriminator import default_taps
from apt_jax.models.presets import discriminator_taps, make_discriminator, make_generator

CONFIGS = Path(__file__).parents[2] / "configs"
ARGUMENTS = {
    "qwen_image": (":consistency", ":apt"),
    "wan_14b": (":consistency", ":image", ":video"),
    "wan_tiny": (":consistency", ":image", ":video"),
    "emoji_64": (":pretrain", ":consistency", ":image", ":video"),
    **{f"demo_{stage}": ("", ":long") for stage in ("pretrain", "consistency", "image", "video")},
}
FILES = sorted(p for p in CONFIGS.glob("*.py") if not p.stem.endswith(("_common", "_data")))
ALL = [str(p) + argument for p in FILES for argument in ARGUMENTS.get(p.stem, ("",))]


def short(path: str) -> str:
    return Path(path).name


def test_the_issues_configs_are_there():
    assert {p.stem for p in FILES} >= {
        "demo_pretrain", "demo_consistency", "demo_image", "demo_video", "emoji_64",
        "seaweed_8b_image", "seaweed_8b_video", "wan_1_3b_consistency", "wan_1_3b_apt_image",
        "wan_1_3b_apt_video", "qwen_image"}


def test_no_planned_update_is_taken_for_one_that_hangs():
    """The watchdog waits for the first update at least twice as long as the plan says it takes."""
    seen = 0
    for file in sorted((CONFIGS.parent / "docs" / "plans").glob("*.json")):
        found = json.loads(file.read_text())
        command = shlex.split(found["command"])
        if found["plan"]["devices"] == 1:  # nobody to wait for
            continue
        overrides = [word for word in command if word.startswith("--config.")]
        config = load_config(CONFIGS.parent / command[command.index("--config") + 1], overrides)
        if config.stage == "adversarial":
            seen += 1
            update = found["plan"]["step_seconds"]
            assert config.train.first_step_seconds >= 2 * update, (file.name, update)
    assert seen > 10


@pytest.mark.parametrize("path", ALL, ids=short)
def test_loads_validates_and_takes_overrides(path):
    config = validate(load_config(path, ["--config.optimizer.learning_rate=1e-7"]))
    assert config.optimizer.learning_rate == 1e-7 and config.is_locked
    assert config.name == short(path).replace(".py", "").removesuffix(":long").replace(":", "_")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_opens_with_its_command_cost_and_outcome(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"apt-jax train --config configs/{path.name}" in text
    assert "--workdir runs/" in text and "ost" in text and "Gives" in text


def test_a_wrong_argument_names_the_right_ones():
    with pytest.raises(UserError, match="pretrain, consistency, image"):
        load_config(f"{CONFIGS / 'emoji_64.py'}:imag")
    with pytest.raises(UserError, match="short or long"):
        load_config(f"{CONFIGS / 'demo_consistency.py'}:audio")


@pytest.mark.parametrize("path", [p for p in ALL if any(f in p for f in ("demo", "emoji"))
                                  and "pretrain" not in p], ids=short)
def test_stages_of_one_family_share_the_network(path):
    """Weights pass from stage to stage, so every stage must describe the same generator."""
    first = (f"{CONFIGS / 'emoji_64.py'}:pretrain" if "emoji_64" in path
             else CONFIGS / "demo_pretrain.py")
    assert load_config(path).model.to_dict() == load_config(first).model.to_dict()


PAPER = {  # method.md's table of stages
    "seaweed_8b_image": dict(batch=9062, rate=5e-6, steps=350, sigma=0.01, shift=1.0,
                             sample=(1, 128, 128, 16), tokens=4096),
    "seaweed_8b_video": dict(batch=2048, rate=3e-6, steps=300, sigma=0.1, shift=12.0,
                             sample=(13, 90, 160, 16), tokens=46_800),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipe(name):
    paper, config = PAPER[name], validate(load_config(CONFIGS / f"{name}.py"))
    adversarial = config.objective.adversarial
    assert config.stage == "adversarial" and config.model.dtype == "bfloat16"
    assert config.train.batch_size == paper["batch"] and config.train.steps == paper["steps"]
    assert config.train.ema_decay == 0.995
    assert config.optimizer.name == "rmsprop" and config.optimizer.decay == 0.9
    assert config.optimizer.learning_rate == paper["rate"]
    assert config.optimizer.discriminator_learning_rate in (0.0, paper["rate"])
    assert config.optimizer.weight_decay == 0 and config.optimizer.warmup_steps == 0
    assert config.discriminator.taps == (16, 26, 36) and config.discriminator.backbone == "train"
    assert adversarial.r1 and adversarial.r1_mode == "approximate" and not adversarial.r2
    assert adversarial.r1_weight == 100 and adversarial.r1_sigma == paper["sigma"]
    assert adversarial.time_shift == paper["shift"] and adversarial.fixed_time == -1
    assert adversarial.loss == "non_saturating"
    assert config.init.generator_weights == "ema"
    assert config.init.diffusion != config.init.generator


@pytest.mark.parametrize("name", PAPER)
def test_the_8b_networks_build_without_allocating(name):
    config = load_config(CONFIGS / f"{name}.py")
    generator = make_generator(config.model)
    assert generator.parameter_count() == pytest.approx(8.15e9, rel=0.02)
    leaves = jax.tree.leaves(generator.abstract())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    frames, height, width, channels = PAPER[name]["sample"]
    assert (frames, height, width, channels) == (
        max(config.data.frames), config.data.height, config.data.width, config.model.in_channels)
    patch = config.model.patch
    assert frames * height * width // (patch[0] * patch[1] * patch[2]) == PAPER[name]["tokens"]

    shape = jax.ShapeDtypeStruct
    inputs = (shape((2, frames, height, width, channels), "float32"), shape((2,), "float32"),
              shape((2, config.data.max_text_tokens, config.model.text_width), "float32"),
              shape((2, config.data.max_text_tokens), "bool"))
    velocity = jax.eval_shape(generator, generator.abstract(), *inputs)
    assert velocity.shape == inputs[0].shape and velocity.dtype == "float32"
    judge = make_discriminator(config.model, config.discriminator)
    logits = jax.eval_shape(judge, judge.abstract(), *inputs)
    assert logits.shape == (2,) and logits.dtype == "float32"
    assert judge.parameter_count() > generator.parameter_count() - 2e6


WAN = {  # stage: what the paper or Wan says of it
    "consistency": dict(frames=(1, 21), generator="", rate=1e-5),
    "apt_image": dict(frames=(1,), generator="runs/cd", rate=5e-6, steps=350, sigma=0.01, shift=1),
    "apt_video": dict(frames=(21,), generator="runs/apt_image", rate=3e-6, steps=300, sigma=0.1,
                      shift=12),
}


@pytest.mark.parametrize("stage", WAN)
def test_wans_recipe(stage):
    said, config = WAN[stage], validate(load_config(CONFIGS / f"wan_1_3b_{stage}.py"))
    assert make_generator(config.model).parameter_count() == 1_418_996_800
    assert config.model.dtype == "bfloat16" and config.model.text_tokens == 512
    assert config.init.diffusion == "ckpt/wan13b" and config.init.generator == said["generator"]
    assert config.data.frames == said["frames"] and config.data.path == "data/clips"
    assert config.optimizer.learning_rate == said["rate"]
    assert config.train.accumulate == 0  # any number of GPUs
    if stage == "consistency":
        assert config.optimizer.name == "adamw"
        assert 5 <= config.objective.consistency.guidance <= 7.5
        return
    adversarial = config.objective.adversarial
    assert config.train.steps == said["steps"] and config.train.ema_decay == 0.995
    assert config.optimizer.name == "rmsprop" and config.optimizer.weight_decay == 0
    assert adversarial.r1_sigma == said["sigma"] and adversarial.r1_weight == 100
    assert adversarial.time_shift == said["shift"] and adversarial.fixed_time == -1
    assert config.init.generator_weights == "ema" and config.discriminator.taps == (13, 22, 30)
    judge = make_discriminator(config.model, config.discriminator)
    assert judge.abstract()["heads"]["query"].shape == (3, 1536)


@pytest.mark.parametrize("name, parameters", [
    ("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584), ("qwen_image", 20_430_401_088),
])
def test_public_networks_have_their_public_sizes(name, parameters):
    config = base_config()
    use_network(config, name)
    config.data.height = config.data.width = 0
    assert make_generator(validate(config).model).parameter_count() == parameters
    assert set(NETWORKS[name]) <= set(base_config().model)
    with pytest.raises(UserError, match=f"did you mean {name!r}"):
        use_network(config, name + "x")


@pytest.mark.parametrize("stage", ["consistency", "image", "video"])
def test_the_14b_recipe(stage):
    config = validate(load_config(f"{CONFIGS / 'wan_14b.py'}:{stage}"))
    assert make_generator(config.model).parameter_count() == 14_288_491_584
    assert config.model.heads % config.mesh.context == 0
    assert config.init.diffusion == "ckpt/wan14b"
    if stage != "consistency":
        assert config.discriminator.taps == default_taps(40)


def test_qwen_image_takes_the_papers_blocks():
    config = validate(load_config(f"{CONFIGS / 'qwen_image.py'}:apt"))
    assert discriminator_taps(config.model, config.discriminator) == (27, 43, 60)
    with pytest.raises(UserError, match="consistency, apt"):
        load_config(f"{CONFIGS / 'qwen_image.py'}:video")


def test_demo_generator_is_small_enough_to_ship():
    demo = load_config(CONFIGS / "demo_pretrain.py")
    assert make_generator(demo.model).parameter_count() * 2 < 8e6  # bytes in bfloat16
