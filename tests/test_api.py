"""The Python interface: load, sample, show, save, and `apt-jax sample` on top of it."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import apt_jax
from apt_jax import api
from apt_jax.cli import main as cli
from apt_jax.config import base_config
from apt_jax.convert.exporting import export_folder
from apt_jax.errors import UserError
from apt_jax.models.presets import make_generator
from apt_jax.weights import save_generator

TOKENS, WIDTH = 4, 8


class Encoder:
    """Stands in for MiniLM: states from the caption's length and letters, width 8."""

    width, name = WIDTH, "test"

    def encode(self, captions, max_tokens):
        text = np.zeros((len(captions), max_tokens, WIDTH), np.float32)
        mask = np.zeros((len(captions), max_tokens), bool)
        for i, caption in enumerate(captions):
            rows = np.frombuffer(caption.encode()[:max_tokens] or b"\0", np.uint8)
            text[i, :len(rows), 0] = rows / 255
            mask[i, :len(rows)] = True
        return text, mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights folder of a tiny random generator of 4x4 px images and 2-frame clips."""
    config = base_config()
    model = config.model
    model.width, model.depth, model.heads, model.head_dim = 16, 1, 1, 16
    model.rope_axes, model.text_width = (4, 6, 6), WIDTH
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda p: draw(scale=0.3, size=p.shape).astype(np.float32),
                          make_generator(model).abstract())
    path = tmp_path_factory.mktemp("weights") / "tiny"
    save_generator(path, model.to_dict(), params, {
        "data": {"frames": (1, 2), "height": 4, "width": 4, "max_text_tokens": TOKENS},
        "sample": {"guidance": 2.0, "steps": 3}})
    return path


@pytest.fixture(scope="module")
def generator(folder):
    """One for all tests: every sampler and shape compiles once. Most draw two 4x4 images."""
    generator = apt_jax.load(folder)
    generator._encoder = Encoder()
    return generator


PAIR = ("cat", "dog")


def test_shapes_captions_and_settings(generator):
    samples = generator.sample("red heart", count=2, frames=1)
    assert samples.frames.shape == (2, 1, 4, 4, 3) and samples.frames.dtype == np.uint8
    assert samples.captions == ("red heart", "red heart") and len(samples) == 2
    assert samples.settings["mode"] == "one_step" and samples.seconds is None
    assert (samples.frames[0] != samples.frames[1]).any()
    clips = generator.sample("cat", timing=2)
    assert clips.frames.shape == (1, 2, 4, 4, 3) and clips.seconds > 0
    euler = generator.sample(PAIR, "euler", frames=1)
    assert (euler.settings["steps"], euler.settings["guidance"]) == (3, 2.0)
    assert euler.captions == PAIR


def test_one_step_is_z_minus_v(generator):
    """Eq. 3-5 by hand, from the noise that every mode shares."""
    from apt_jax.eval.generate import sample_noise

    text, mask = generator.encode(PAIR)
    z = sample_noise(5, np.arange(2), (1, 4, 4, 3))
    v = jax.jit(generator.network)(generator.params, z, np.ones(2, np.float32), text, mask)
    expected = np.clip(np.rint((np.asarray(z - v) + 1) * 127.5), 0, 255)
    got = generator.sample(PAIR, seed=5, frames=1).frames
    np.testing.assert_allclose(got, expected, atol=1)
    euler = generator.sample(PAIR, "euler", seed=5, frames=1, steps=1, guidance=1.0)
    np.testing.assert_allclose(euler.frames, expected, atol=1)


def test_a_string_is_one_prompt(generator):
    text, mask = generator.encode("red heart")
    assert text.shape[0] == mask.shape[0] == 1
    np.testing.assert_array_equal(text, generator.encode(["red heart"])[0])


def test_only_the_users_captions_are_counted(generator, monkeypatch):
    """The empty caption of euler's guidance is encoded apart, once, and for no other mode."""
    asked = []
    monkeypatch.setattr(Encoder, "encode", lambda self, captions, most, real=Encoder.encode: (
        asked.append(list(captions)), real(self, captions, most))[1])
    monkeypatch.setattr(generator, "_empty", None)
    plain, again = (generator.sample(PAIR, "euler", frames=1) for _ in range(2))
    generator.sample("cat", frames=1)
    assert asked == [[*PAIR], [""], [*PAIR], ["cat"]]
    np.testing.assert_array_equal(plain.frames, again.frames)
    null = tuple(x[0] for x in generator.encode([""]))
    drawn = generator.draw(*generator.encode(PAIR), PAIR, null=null, mode="euler", frames=1)
    np.testing.assert_array_equal(plain.frames, drawn.frames)
    other = generator.sample(PAIR, "euler", frames=1, negative="dog")
    assert asked[-1] == [*PAIR, "dog"] and (other.frames != plain.frames).any()


def test_same_seed_same_samples_whatever_the_batch(generator):
    whole = generator.sample(PAIR, seed=3, frames=1).frames
    np.testing.assert_array_equal(whole, generator.sample(PAIR, seed=3, frames=1).frames)
    longer = generator.sample([*PAIR, "owl"], seed=3, frames=1, batch=2).frames
    assert longer.shape[0] == 3
    np.testing.assert_array_equal(whole, longer[:2])
    assert (whole != generator.sample(PAIR, seed=4, frames=1).frames).any()


def test_fresh_noise_time_and_guidance_matter(generator):
    def draw(*args, **more):
        return generator.sample(PAIR, *args, frames=1, **more).frames

    base = draw("two_step", time=0.7)
    assert (base != draw("two_step")).any()
    assert (base != draw("two_step", time=0.7, fresh_noise=True)).any()
    assert (draw("euler") != draw("euler", guidance=6.0)).any()


def test_generators_of_one_network_share_what_is_compiled(folder, generator):
    """A study draws from four of them; the weights, guidance and time are arguments."""
    other = apt_jax.load(folder)
    other._encoder = Encoder()
    other.params = jax.tree.map(lambda p: 0.5 * p, other.params)
    settings = dict(mode="two_step", seed=4, frames=1)
    mine, half = (g.sample(PAIR, time=0.7, **settings) for g in (generator, other))
    assert (mine.frames != half.frames).any()
    used = generator._generation(mine.settings, 2)
    assert used is other._generation(half.settings, 2)
    compiled = used._program._cache_size()
    generator.sample(PAIR, time=0.3, **settings)
    assert used._program._cache_size() == compiled
    deeper = api.Generator({**generator.model, "depth": 2}, generator.params, generator.config)
    assert deeper._generation(mine.settings, 2) is not used


def test_a_run_from_before_the_frame_rate_was_a_field_is_sampled(generator):
    old = generator.config.copy_and_resolve_references()
    with old.unlocked():
        del old.sample["fps"]
    again = api.Generator(generator.model, generator.params, old)
    assert again.sample_shape(frames=1) == generator.sample_shape(frames=1)


@pytest.mark.parametrize("arguments, words", [
    (dict(prompts=[]), "no prompt"),
    (dict(prompts="a", mode="onestep"), "did you mean 'one_step'"),
    (dict(prompts="a", guidance=3.0), "guidance = 3.0 belongs to mode 'euler'"),
    (dict(prompts="a", mode="euler", time=0.5), "time = 0.5 belongs to mode 'two_step'"),
    (dict(prompts="a", mode="two_step", time=1.5), "time = 1.5 must lie"),
    (dict(prompts="a", mode="euler", steps=0), "steps = 0 must be"),
    (dict(prompts="a", height=5), "height = 5 is not a multiple"),
    (dict(prompts="a", width=0), "width = 0"),
    (dict(prompts="a", count=0), "count = 0"),
    (dict(prompts="a", batch=0), "batch = 0 must be"),
    (dict(prompts="a", batch=-1), "batch = -1 must be"),
    (dict(prompts="a", seed=2**31), "seed = 2147483648 does not fit"),
    (dict(prompts="a", mode="euler", guidance=float("nan")), "guidance = nan is no number"),
    (dict(prompts="a", mode="euler", guidance=float("inf")), "guidance = inf is no number"),
    (dict(prompts="a", mode="euler", guidance=1e39), "guidance = 1e\\+39 is no number up to"),
    (dict(prompts="a", mode="euler", steps=10**11), "steps = 100000000000 must be 1 to 100,000"),
    (dict(prompts="a", frames=10**11), "frames = 100000000000 must be 1 to 16,384"),
    (dict(prompts="a", frames=-3), "frames = -3 must be 1 to"),
    (dict(prompts="a", count=10**10), "count = 10000000000 of 1 prompts must be 1 to 1,000,000"),
    (dict(prompts="a", frames=1.5), "frames = 1.5 is no whole number"),
    (dict(prompts="a", seed=True), "seed = True is no whole number"),
    (dict(prompts="a", timing=-1), "timing = -1 must be"),
    (dict(prompts=[1, 2]), "prompt 1 is no text"),
    (dict(prompts="a", mode="euler", guidance="3"), "guidance = '3' is no number; give"),
    (dict(prompts="a", mode="euler", guidance=[3]), "guidance = \\[3\\] is no number"),
    (dict(prompts="a", mode="two_step", time="a"), "time = 'a' is no number"),
    (dict(prompts=None), "prompts = None is no text; give a string"),
    (dict(prompts=5), "prompts = 5 is no text"),
    (dict(prompts="a", negative=None), "negative = None|prompt None is no text"),
    (dict(prompts="a", negative="b"), "negative = b belongs to mode 'euler', not 'one_step'"),
    (dict(prompts="a", mode="two_step", negative="b"), "negative = b belongs"),
    (dict(prompts=["a", "b\ud800"]), "holds bytes or half a character"),
    (dict(prompts="a", mode="euler", negative="\udcff"), "holds bytes or half a character"),
])
def test_wrong_settings_are_user_errors(generator, arguments, words):
    with pytest.raises(UserError, match=words):
        generator.sample(**arguments)


def test_a_text_width_of_another_encoder_is_refused(folder):
    with pytest.raises(UserError, match="width 8"):
        apt_jax.load(folder).sample("cat")


def test_load_errors(tmp_path):
    for path in (tmp_path / "none", tmp_path, "bundled:bas"):
        with pytest.raises(UserError):
            apt_jax.load(path)


def test_what_cannot_be_loaded_or_asked_of_it(folder, generator):
    for options, words in (
            (dict(weights="raw"), "one set of weights"), (dict(base="nowhere"), "makes pixels"),
            (dict(mesh=3), "mesh = 3 is no table"), (dict(weights="avg"), "weights = 'avg' is unk"),
            (dict(mesh={"context": "a"}), "'context'. = 'a' is no whole number"),
            (dict(mesh={"bogus": 1}), "mesh has no 'bogus'"),
            (dict(mesh={"context": 1}, tiled=True), "one device")):
        with pytest.raises(UserError, match=words):
            apt_jax.load(folder, **options)
    with pytest.raises(TypeError, match="not 'bogus'"):
        generator.sample_shape(bogus=3)
    with pytest.raises(UserError, match="path = None is no path; give"):
        apt_jax.load(None)
    with pytest.raises(UserError, match="path = '' names nothing; give a path"):
        apt_jax.load("")


def test_what_show_and_save_refuse(generator, tmp_path):
    samples = generator.sample("a", frames=1)
    for size, words in ((10**7, "size = 10000000 must be 1 to 4,096"), ("big", "size = 'big' is no"),
                        (0, "size = 0 must"), (-3, "size = -3 must")):
        for call in (apt_jax.show, lambda s, size: apt_jax.save(s, tmp_path / "x", size)):
            with pytest.raises(UserError, match=words):
                call(samples, size=size)
    for call, words in ((lambda: apt_jax.show(samples, columns=-1), "columns = -1"),
                        (lambda: apt_jax.show(samples.frames), "returned, not a ndarray"),
                        (lambda: apt_jax.show(None), "returned, not a NoneType; give"),
                        (lambda: apt_jax.save("dir", samples), "save takes .* not a str; give"),
                        (lambda: apt_jax.save(samples, None), "folder = None is no path")):
        with pytest.raises(UserError, match=words):
            call()
    assert not list(tmp_path.iterdir())


def test_samples_are_short_to_print_and_a_picture_in_a_notebook(generator):
    samples = generator.sample(["cat", "a long prompt " * 9], frames=1, count=2, latents=True)
    assert repr(samples) == ("Samples(4 pictures, 4 x 4: 'cat', "
                             "'a long prompt a long prompt a long prom…')")
    assert samples._repr_html_().startswith('<img alt="cat, a long prompt')
    assert "data:image/png;base64," in samples._repr_html_()
    one, *_, last = samples
    assert one.captions == ("cat",) and len(one) == 1 == len(last) and len(samples[1:]) == 3
    np.testing.assert_array_equal(last.frames[0], samples.frames[-1])
    np.testing.assert_array_equal(samples[-2].noise, samples.noise[2:3])
    with pytest.raises(IndexError):
        samples[4]
    many = samples.__class__(samples.frames[[0] * 70], ("cat",) * 70, {})
    assert "and 6 more; apt_jax.show" in many._repr_html_()
    assert repr(generator.sample("cat")) == "Samples(1 clip of 2 frames, 4 x 4: 'cat')"


def test_a_folder_holds_the_last_samples_alone(generator, tmp_path, caplog):
    """What an earlier call wrote there is gone, what others wrote stays."""
    apt_jax.save(generator.sample(["red heart", "cat"], frames=1, latents=True), tmp_path)
    (tmp_path / "002_mine.png").write_text("mine")
    record = json.loads((tmp_path / "sample.json").read_text())
    record["samples"][0]["files"] += ["../precious", ".."]
    (tmp_path / "sample.json").write_text(json.dumps(record))
    (tmp_path.parent / "precious").write_text("mine")
    with caplog.at_level("INFO", "apt_jax"):
        apt_jax.save(generator.sample(["x", "cat"], frames=1), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000_x.png", "001_cat.png", "002_mine.png", "grid.png", "sample.json"]
    assert "which these replace: 2 of their files removed" in caplog.text
    assert (tmp_path.parent / "precious").read_text() == "mine"
    (tmp_path / "sample.json").write_text("[3]")
    apt_jax.save(generator.sample("y", frames=1), tmp_path)  # not ours: nothing is removed
    assert (tmp_path / "000_x.png").exists()


@pytest.mark.parametrize("group, key, value", [
    ("data", "", 5), ("data", "frames", 4), ("data", "frames", []), ("data", "height", "x"),
    ("data", "max_text_tokens", 0), ("sample", "steps", "x"), ("sample", "shift", None),
    ("sample", "fps", -3), ("model", "heads", 0), ("model", "remat", "bogus"),
    ("model", "dtype", "int8")])
def test_a_damaged_card_is_one_line(folder, tmp_path, group, key, value):
    copy = shutil.copytree(folder, tmp_path / "copy")
    card = json.loads((copy / "config.json").read_text())
    if key:
        card[group][key] = value
    else:
        card[group] = value
    (copy / "config.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=f"config.json.*{key or group}") as error:
        apt_jax.load(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{}", '{"model": 5, "data": {}, "sample": {}, "init": {}}',
                                  '{"model": {"heads": "x"}, "data": {}, "sample": {}, "init": {}}'])
def test_a_damaged_run_is_one_line(tmp_path, text):
    (tmp_path / "checkpoints" / "1" / "state").mkdir(parents=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json.*model"):
        apt_jax.load(tmp_path)


def test_output_that_cannot_be_written_is_one_line(generator, tmp_path):
    samples = generator.sample("a", frames=1, seed=np.int64(3), batch=np.int64(1))
    (tmp_path / "file").write_text("")
    (tmp_path / "there" / "sample.json").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "there"):
        with pytest.raises(UserError, match="a file lies where a folder is needed, or the reverse"):
            apt_jax.save(samples, path)
    with pytest.raises(UserError, match="no name"):
        apt_jax.save(samples, "")
    assert json.loads((apt_jax.save(samples, tmp_path / "new")[-1]).read_text())["seed"] == 3


def test_a_tilde_is_the_home_folder(generator, folder, tmp_path, monkeypatch):
    """Also where no shell has seen it: in Python, and within --out=~/x."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    shutil.copytree(folder, home / "weights")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert apt_jax.load("~/weights").source == str(home / "weights")
    apt_jax.save(generator.sample("a", frames=1), "~/out")
    assert cli.main(["convert", "export", "--checkpoint=~/weights", "--to=~/diffusers"]) == 0
    assert (home / "out" / "sample.json").is_file() and not list(here.iterdir())
    assert (home / "diffusers" / "README.md").is_file()
    with pytest.raises(UserError, match="--to .*would replace .*home/weights, which is read"):
        export_folder("~/weights", "~/weights", overwrite=True)


def test_save_and_show_images(generator, tmp_path):
    samples = generator.sample(["Red heart!", "", "\u732b"], frames=1, seed=9)
    paths = apt_jax.save(samples, tmp_path / "out")
    names = [path.name for path in paths]
    assert names == ["000_red_heart.png", "001_empty.png", "002_sample.png", "grid.png",
                     "sample.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), samples.frames[0, 0])
    record = json.loads(paths[-1].read_text())
    assert record["seed"] == 9 and record["mode"] == "one_step"
    assert record["samples"][0] == {"caption": "Red heart!", "files": ["000_red_heart.png"]}
    picture = apt_jax.show(samples)
    assert isinstance(picture, Image.Image) and picture.width > 200


def test_save_and_show_clips(generator, tmp_path):
    av = pytest.importorskip("av")
    samples = generator.sample("cat", frames=2)
    paths = {path.name: path for path in apt_jax.save(samples, tmp_path)}
    assert set(paths) == {"000_cat.mp4", "000_cat.webp", "grid.webp", "sample.json"}
    with Image.open(paths["000_cat.webp"]) as clip:
        assert clip.n_frames == 2
    with av.open(str(paths["000_cat.mp4"])) as clip:
        assert sum(1 for _ in clip.decode(video=0)) == 2
    page = apt_jax.show(samples)
    assert page._repr_html_().startswith('<img alt="cat" src="data:image/webp;base64,')


def test_command_line_equals_the_interface(generator, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(api.Generator, "encode", lambda self, prompts: Encoder().encode(
        prompts, self.config.data.max_text_tokens))
    out = tmp_path / "out"
    code = cli.main(["sample", "--checkpoint", str(folder), "--prompt", "cat", "--prompt", "dog",
                     "--frames", "1", "--seed", "4", "--steps", "2", "--time", "0.7",
                     "--out", str(out)])
    text = capsys.readouterr().out
    assert code == 0 and "two_step: 2 network evaluations" in text and "ms for 2 samples" in text
    expected = generator.sample(PAIR, "two_step", 4, frames=1, time=0.7).frames
    np.testing.assert_array_equal(np.asarray(Image.open(out / "001_dog.png")), expected[1, 0])
    record = json.loads((out / "sample.json").read_text())
    assert record["time"] == 0.7 and record["seconds"] > 0 and record["checkpoint"] == str(folder)
    # A negative prompt has a meaning in euler only, so it asks for it, as --guidance does.
    again = ["sample", "--checkpoint", str(folder), "--prompt", "cat", "--negative", "dog",
             "--frames", "1", "--out", str(out)]
    assert cli.main(again) == 0 and "euler: 6 network" in capsys.readouterr().out
    assert cli.main([*again, "--steps", "1"]) == 2
    assert "negative = dog belongs to mode 'euler'" in capsys.readouterr().err


def test_a_grid_has_as_many_as_a_webp_takes(generator, tmp_path, monkeypatch, caplog):
    """Everything else of a large set is written too: the limit of a side is 16,383 pixels."""
    from apt_jax import samples as module

    pytest.importorskip("av")
    samples = generator.sample("cat", frames=2, count=10)
    _, wide = apt_jax.media.grid_size(9, 4, 4, labels=True, size=128)
    with monkeypatch.context() as patch:
        patch.setattr(module, "WEBP_SIDE", wide + 100)  # three in a row, and not four
        paths = apt_jax.save(samples, tmp_path)
    with Image.open(tmp_path / "grid.webp") as grid:
        assert grid.size[0] == wide
    assert len(json.loads(paths[-1].read_text())["samples"]) == 10 and len(paths) == 22
    assert "10 samples would be too large; it has the first 9" in caplog.text
    assert module._fitting(946, (81, 480, 832), 128, 0) == 25  # 3 GB of frames
    assert module._fitting(946, (2, 480, 832), 128, 0) == 19**2  # 19 x 836 + 4 pixels
    assert module._fitting(946, (2, 480, 832), 128, 40) == 19  # one row
    assert module._fitting(400, (1, 64, 64), 128, 0) == 400
    few = generator.sample("cat", frames=2, count=2)  # as wide as two, however many columns are asked
    assert module._sheet(few, 128, 200).shape == module._sheet(few, 128, 2).shape
    with monkeypatch.context() as patch:
        patch.setattr(module, "WEBP_SIDE", 100)
        assert max(module._sheet(few, 4096).shape[1:3]) <= 100  # one, and no larger than it may be
