"""Real pipelines of diffusers through import and export: they load, and one step is z - v.

The PyTorch side samples with its own scheduler loop; ours with diffusion/samplers.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import tiny_pipelines  # noqa: E402

from apt_jax.convert.exporting import export_folder  # noqa: E402
from apt_jax.convert.importing import import_folder  # noqa: E402
from apt_jax.diffusion.samplers import one_step, two_step  # noqa: E402
from apt_jax.models.presets import make_generator  # noqa: E402
from apt_jax.weights import load_generator  # noqa: E402

TWO_STEP_TIME = 0.3


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module", params=["wan", "qwen"])
def folders(request, tmp_path_factory):
    """(name, source, component folder, exported folder) of a pipeline with random weights."""
    base = tmp_path_factory.mktemp(request.param)
    source = getattr(tiny_pipelines, f"save_{request.param}")(base / "source")
    ours = import_folder(str(source), base / "ours")
    out = export_folder(str(ours), base / "out", two_step_time=TWO_STEP_TIME, shard_bytes=60_000)
    return request.param, source, ours, out


@pytest.fixture(scope="module")
def pipe(folders):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folders[3])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_loads_with_the_same_weights(folders, pipe):
    """from_pretrained gives the pipeline's class, our scheduler, and bit by bit the source; the
    transformer is in several files with an index, as above 5 GB."""
    from diffusers import DiffusionPipeline

    assert len(list((folders[3] / "transformer").glob("*-of-*.safetensors"))) > 2
    before = DiffusionPipeline.from_pretrained(folders[1])
    assert type(pipe) is type(before)
    assert type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    for part in ("transformer", "vae", "text_encoder"):
        want, have = getattr(before, part).state_dict(), getattr(pipe, part).state_dict()
        assert set(want) == set(have)
        for name, value in want.items():
            assert torch.equal(value, have[name]), (part, name)
    same = {k: v for k, v in before.transformer.config.items() if not k.startswith("_")}
    for key, value in same.items():
        assert pipe.transformer.config[key] == value, key


def sample(name, pipe, z, text, mask, steps, **more):
    """The pipeline's latents [B, F, H, W, C] from noise z and given text states."""
    b, f, h, w, c = z.shape
    with torch.no_grad():
        if name == "wan":
            x = pipe(prompt_embeds=torch.tensor(text),
                     latents=torch.tensor(z).permute(0, 4, 1, 2, 3), height=8 * h,
                     width=8 * w, num_frames=1 + 4 * (f - 1), guidance_scale=1.0,
                     num_inference_steps=steps, output_type="latent", **more).frames
            return x.permute(0, 2, 3, 4, 1).numpy()
        packed = pipe._pack_latents(torch.tensor(z).permute(0, 1, 4, 2, 3), b, c, h, w)
        x = pipe(prompt_embeds=torch.tensor(text), prompt_embeds_mask=torch.tensor(mask).long(),
                 latents=packed, height=8 * h, width=8 * w, true_cfg_scale=1.0,
                 num_inference_steps=steps, output_type="latent", **more).images
        return pipe._unpack_latents(x, 8 * h, 8 * w, 8).permute(0, 2, 3, 4, 1).numpy()


def inputs(name):
    """Noise [2, F, 6, 4, 16], text states and mask; Wan's are zeros behind the prompt's."""
    rng = np.random.default_rng(0)
    length, f = (512, 2) if name == "wan" else (9, 1)
    mask = np.arange(length) < np.array([[7], [4]])
    text = rng.normal(size=(2, length, tiny_pipelines.TEXT_WIDTH)).astype(np.float32)
    z = rng.normal(size=(2, f, 6, 4, tiny_pipelines.CHANNELS)).astype(np.float32)
    return z, text * mask[..., None] if name == "wan" else text, mask


@pytest.fixture(scope="module")
def velocity(folders):
    """Our network with the imported weights, compiled once."""
    model, params = load_generator(folders[2])
    net = jax.jit(make_generator(model))
    return lambda *args: net(params, *args)


@pytest.mark.parametrize("steps", [1, 2])
def test_its_samples_are_ours(folders, pipe, velocity, steps):
    """The whole loop in PyTorch against our sampler with the imported weights."""
    name = folders[0]
    z, text, mask = inputs(name)
    keep = mask.sum(1).max()  # ours reads trimmed states
    given = [jnp.asarray(v) for v in (z, text[:, :keep], mask[:, :keep])]
    want = (one_step(velocity, *given) if steps == 1 else
            two_step(velocity, *given, t=TWO_STEP_TIME))
    have = sample(name, pipe, z, text, mask, steps)
    assert relative(have, np.asarray(want)) < 1e-4
    if steps == 2:  # and the second step does something
        assert relative(sample(name, pipe, z, text, mask, 1), have) > 0.01


def test_fresh_noise_comes_from_the_global_generator(folders, pipe, velocity, monkeypatch):
    """torch.manual_seed fixes the second step's noise; a generator of the pipeline does not."""
    name = folders[0]
    z, text, mask = inputs(name)
    monkeypatch.setattr(pipe, "scheduler", type(pipe.scheduler).from_config(
        pipe.scheduler.config, stochastic_sampling=True))
    b, f, h, w, c = z.shape
    torch.manual_seed(5)
    if name == "wan":
        fresh = torch.randn(b, c, f, h, w).permute(0, 2, 3, 4, 1)
    else:
        fresh = pipe._unpack_latents(torch.randn(b, h * w // 4, 4 * c), 8 * h, 8 * w, 8)
        fresh = fresh.permute(0, 2, 3, 4, 1)
    keep = mask.sum(1).max()
    given = [jnp.asarray(v) for v in (z, text[:, :keep], mask[:, :keep])]
    want = np.asarray(two_step(velocity, *given, t=TWO_STEP_TIME, fresh=jnp.asarray(fresh)))
    torch.manual_seed(5)
    have = sample(name, pipe, z, text, mask, 2, generator=torch.Generator().manual_seed(9))
    assert relative(have, want) < 1e-4
    again = sample(name, pipe, z, text, mask, 2, generator=torch.Generator().manual_seed(9))
    assert relative(again, want) > 1e-2


def test_its_scheduler_lands_on_the_times(folders, pipe):
    """Sigmas of one and two steps; one step is z - v to the last bit of float32."""
    name = folders[0]
    for steps, want in ((2, [1, TWO_STEP_TIME, 0]), (1, [1, 0])):
        given = {"sigmas": np.linspace(1, 1 / steps, steps)} if name == "qwen" else {
            "num_inference_steps": steps}
        pipe.scheduler.set_timesteps(**given)
        np.testing.assert_allclose(pipe.scheduler.sigmas.numpy(), want, atol=3e-6)
        np.testing.assert_allclose(pipe.scheduler.timesteps.numpy(), 1000 * np.array(want[:-1]),
                                   atol=3e-3)
    z, v = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    step = pipe.scheduler.step(v, pipe.scheduler.timesteps[0], z, return_dict=False)[0]
    assert torch.equal(step, z - v)


@pytest.mark.parametrize("family", ["wan", "qwen_image"])
def test_one_step_is_exact_at_any_time(family):
    """The first sigma is 1 to the last bit, whatever the shift for two steps."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from apt_jax.convert.scheduler import scheduler_config

    for t in np.linspace(0.003, 0.997, 71):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config(family, float(t)))
        for steps in (1, 2):
            given = ({"num_inference_steps": steps} if family == "wan" else
                     {"sigmas": np.linspace(1.0, 1 / steps, steps)})
            scheduler.set_timesteps(**given)
            assert scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0
        assert abs(float(scheduler.sigmas[1]) - t) < 1e-5


def test_fresh_noise_is_the_stochastic_scheduler():
    """two_step_fresh: the scheduler renoises the one-step sample to t with new noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from apt_jax.convert.scheduler import scheduler_config

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        scheduler_config("wan", 0.3, fresh=True))
    scheduler.set_timesteps(2)
    z, v, u = (torch.randn(2, 3, 4) for _ in range(3))
    noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    x_t = scheduler.step(v, scheduler.timesteps[0], z, generator=torch.Generator().manual_seed(1),
                         return_dict=False)[0]
    torch.testing.assert_close(x_t, 0.7 * (z - v) + 0.3 * noise, rtol=1e-5, atol=1e-5)
    last = scheduler.step(u, scheduler.timesteps[1], x_t, return_dict=False)[0]
    torch.testing.assert_close(last, x_t - 0.3 * u, rtol=1e-5, atol=1e-5)


def test_a_prompt_gives_a_picture(folders, pipe):
    """Text encoder, transformer and VAE of the exported folder work together."""
    if folders[0] == "wan":
        frames = pipe("a cat surfing", height=32, width=48, num_frames=5, num_inference_steps=1,
                      guidance_scale=1.0, output_type="np").frames
        assert frames.shape == (1, 5, 32, 48, 3) and np.isfinite(frames).all()
    else:
        images = pipe("a cat surfing", height=32, width=48, num_inference_steps=1,
                      true_cfg_scale=1.0, output_type="np").images
        assert images.shape == (1, 32, 48, 3) and np.isfinite(images).all()
