"""Config files and overrides: syntax, types, and one-line errors that name the right key."""

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt_jax.config import apply_overrides, base_config, load_config, split_overrides
from apt_jax.config.load import flat_keys, get_key
from apt_jax.config.schema import FIELDS
from apt_jax.errors import UserError

KEYS = [field.key for field in FIELDS]


def message_of(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and text
    return text


def config_file(tmp_path, body, name="x.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(body))
    return path


# -- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("override, key, value", [
    ("--config.optimizer.learning_rate=1e-5", "optimizer.learning_rate", 1e-5),
    ("--config.optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
    ("train.steps=7", "train.steps", 7),
    ("--config.objective.adversarial.r1=false", "objective.adversarial.r1", False),
    ("--config.objective.adversarial.r1=True", "objective.adversarial.r1", True),
    ("--config.discriminator.taps=4,", "discriminator.taps", (4,)),
    ("--config.discriminator.taps=2,4", "discriminator.taps", (2, 4)),
    ("--config.discriminator.taps=(2, 4)", "discriminator.taps", (2, 4)),
    ("--config.discriminator.taps=()", "discriminator.taps", ()),
    ("--config.discriminator.taps=", "discriminator.taps", ()),
    ("--config.data.frames=[1,4]", "data.frames", (1, 4)),
    ("--config.train.sample_prompts=red heart,cat", "train.sample_prompts", ("red heart", "cat")),
    ("--config.name=a=b", "name", "a=b"),
    ("--config.init.generator=", "init.generator", ""),
])
def test_override_keeps_the_fields_type(override, key, value):
    config = base_config()
    apply_overrides(config, [override])
    assert get_key(config, key) == value
    assert type(get_key(config, key)) is type(value)


def test_override_as_two_arguments_and_negative_values():
    overrides, rest = split_overrides([
        "--workdir", "runs/x", "--config", "c.py", "--config.train.steps", "9",
        "--config.objective.adversarial.fixed_time", "-1", "--quiet"])
    assert rest == ["--workdir", "runs/x", "--config", "c.py", "--quiet"]
    config = base_config()
    apply_overrides(config, overrides)
    assert config.train.steps == 9 and config.objective.adversarial.fixed_time == -1.0


def test_override_without_a_value():
    assert "has no value" in message_of(lambda: split_overrides(["--config.seed", "--quiet"]))
    assert "has no value" in message_of(lambda: split_overrides(["--config.seed"]))


@pytest.mark.parametrize("wrong, right", [
    ("optimizer.learnin_rate", "optimizer.learning_rate"),
    ("optimiser.learning_rate", "optimizer.learning_rate"),
    ("learning_rate", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("train.learning_rate", "optimizer.learning_rate"),
    ("train.batchsize", "train.batch_size"),
    ("discriminator.tap", "discriminator.taps"),
    ("objective.r1_sigma", "objective.adversarial.r1_sigma"),
])
def test_wrong_key_names_the_nearest(wrong, right):
    text = message_of(lambda: apply_overrides(base_config(), [f"--config.{wrong}=1"]))
    assert repr(wrong) in text and repr(right) in text


def test_a_group_is_not_a_field():
    text = message_of(lambda: apply_overrides(base_config(), ["--config.mesh=1"]))
    assert "mesh.replica" in text and "mesh.fsdp" in text


@pytest.mark.parametrize("override, words", [
    ("--config.train.steps=1.5", ("train.steps", "a whole number", "'1.5'")),
    ("--config.train.steps=many", ("train.steps", "a whole number", "'many'")),
    ("--config.optimizer.learning_rate=fast", ("optimizer.learning_rate", "a number")),
    ("--config.optimizer.learning_rate=nan", ("optimizer.learning_rate", "a number")),
    ("--config.objective.adversarial.r1=maybe", ("adversarial.r1", "true or false")),
    ("--config.discriminator.taps=2,x", ("discriminator.taps", "whole numbers")),
    ("--config.discriminator.taps=(2, 3.5)", ("discriminator.taps", "whole numbers")),
    ("--config.discriminator.taps=(2", ("discriminator.taps", "whole numbers")),
    ("--config.data.frames=1,,4", ("data.frames", "whole numbers")),
])
def test_wrong_type_is_one_line(override, words):
    text = message_of(lambda: apply_overrides(base_config(), [override]))
    assert all(word in text for word in words)


@given(st.sampled_from([f for f in FIELDS if type(f.default) is int]),
       st.integers(-2**40, 2**40))
def test_any_int_goes_in_and_comes_out(field, value):
    config = base_config()
    apply_overrides(config, [f"--config.{field.key}={value}"])
    assert get_key(config, field.key) == value


@given(st.sampled_from([f for f in FIELDS if type(f.default) is float]),
       st.floats(allow_nan=False))
def test_any_float_goes_in_exactly(field, value):
    config = base_config()
    apply_overrides(config, [f"--config.{field.key}={value!r}"])
    assert get_key(config, field.key) == value


@given(st.lists(st.integers(-9, 99), max_size=5))
def test_any_tuple_of_ints_in_both_spellings(values):
    config = base_config()
    apply_overrides(config, [f"--config.discriminator.taps={tuple(values)!r}"])
    assert config.discriminator.taps == tuple(values)
    apply_overrides(config, ["--config.discriminator.taps=" + "".join(f"{v}," for v in values)])
    assert config.discriminator.taps == tuple(values)


@given(st.text(st.characters(codec="ascii", exclude_characters="=\n"), max_size=30),
       st.text(max_size=12))
def test_any_other_override_is_a_user_error_or_applies(key, value):
    """Nothing but UserError leaves the parser, and no field but the named one ever changes."""
    config = base_config()
    try:
        apply_overrides(config, [f"--config.{key}={value}"])
    except UserError as error:
        assert "\n" not in str(error)
        assert config.to_dict() == base_config().to_dict()
    else:
        assert key in KEYS


@given(st.sampled_from(KEYS), st.text(max_size=12))
def test_any_value_on_any_key_is_a_user_error_or_keeps_the_type(key, value):
    config = base_config()
    try:
        apply_overrides(config, [f"--config.{key}={value}"])
    except UserError as error:
        assert key in str(error)
    assert type(get_key(config, key)) is type(get_key(base_config(), key))
    assert flat_keys(config) == flat_keys(base_config())


# -- files -----------------------------------------------------------------------------------------


def test_a_file_its_argument_and_overrides(tmp_path):
    path = config_file(tmp_path, """
        from apt_jax.config import base_config

        def get_config(kind="a"):
            config = base_config()
            config.name = kind
            return config
        """)
    assert load_config(path).name == "a"
    config = load_config(f"{path}:b", ["--config.seed=3"])
    assert (config.name, config.seed) == ("b", 3) and config.is_locked


def test_a_file_imports_its_neighbour_and_leaves_no_trace(tmp_path):
    import sys

    for folder, name in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        config_file(tmp_path / folder, f"NAME = '{name}'", "shared_part.py")
        path = config_file(tmp_path / folder, """
            from apt_jax.config import base_config
            from shared_part import NAME

            def get_config():
                config = base_config()
                config.name = NAME
                return config
            """)
        assert load_config(path).name == name
    assert "shared_part" not in sys.modules
    assert not any(str(tmp_path) in entry for entry in sys.path)


@pytest.mark.parametrize("body, words", [
    ("x = 1", ("no get_config()",)),
    ("def get_config():\n    return 3", ("returned a int", "ConfigDict")),
    ("def get_config(:\n", ("line 1", "SyntaxError")),
    ("import nothing_like_it\n", ("line 1", "nothing_like_it")),
    ("def get_config():\n    raise ValueError('no\\nluck')", ("line 2", "ValueError: no luck")),
    ("from apt_jax.config import base_config\ndef get_config():\n    c = base_config()\n"
     "    c.optimizer.learning_rat = 1\n    return c",
     ("line 4", "'learning_rat'", "'optimizer.learning_rate'")),
    ("from apt_jax.config import base_config\ndef get_config():\n    c = base_config()\n"
     "    c.train.steps = c.train.batchsize\n    return c",
     ("line 4", "'batchsize'", "'train.batch_size'")),
    ("from apt_jax.config import base_config\ndef get_config():\n    c = base_config()\n"
     "    c.train.steps = 'many'\n    return c", ("line 4", "steps")),
    ("import sys\nsys.exit(3)\n", ("line 2", "SystemExit: 3")),
])
def test_a_wrong_file_is_one_line_with_its_place(tmp_path, body, words):
    path = tmp_path / "x.py"
    path.write_text(body)
    text = message_of(lambda: load_config(path))
    assert str(path) in text and all(word in text for word in words), text


def test_a_missing_file_names_the_nearest(tmp_path):
    config_file(tmp_path, "", "demo_image.py")
    text = message_of(lambda: load_config(tmp_path / "demo_imge.py"))
    assert "does not exist" in text and "demo_image.py" in text


def test_a_folder_is_no_config(tmp_path):
    assert "give one of its files, FILE.py" in message_of(lambda: load_config(tmp_path))
    config_file(tmp_path, "", "demo_image.py")
    text = message_of(lambda: load_config(tmp_path))
    assert f"{str(tmp_path)!r} is a folder" in text and text.endswith("demo_image.py")


def test_an_argument_that_is_not_taken(tmp_path):
    path = config_file(tmp_path, """
        from apt_jax.config import base_config

        def get_config():
            return base_config()
        """)
    assert "takes no argument" in message_of(lambda: load_config(f"{path}:b"))
