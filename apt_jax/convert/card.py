"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_jax.convert.families import Family
from apt_jax.convert.provenance import History
from apt_jax.media import frame_rate

_USE = {
    "wan": '''from diffusers import WanPipeline
from diffusers.utils import export_to_video

pipe = WanPipeline.from_pretrained("{name}", torch_dtype=torch.bfloat16).to("cuda")
frames = pipe("a cat surfing", {size}num_inference_steps=1, guidance_scale=1.0).frames[0]
export_to_video(frames, "cat.mp4", fps={fps})''',
    "qwen_image": '''from diffusers import QwenImagePipeline

pipe = QwenImagePipeline.from_pretrained("{name}", torch_dtype=torch.bfloat16).to("cuda")
pipe("a cat surfing", num_inference_steps=1, true_cfg_scale=1.0).images[0].save("cat.png")''',
}
_STAGES = {"pretrain": "flow matching", "consistency": "consistency distillation",
           "adversarial": "adversarial post-training (APT)"}
_MANY = "A diffusion model takes many steps and guidance; one step or two were not trained for."


def model_card(name: str, family: Family, *, base: Mapping[str, Any], past: History,
               weights: str, command: str, two_step_time: float, dtype: str,
               pipeline: bool = True, module: str = "", text: str = "") -> str:
    """The card of an exported pipeline or transformer, as Markdown.

    Args:
      base: "source" of the base's component folder: hub or folder, revision, licence; bundled and
        licence for the package's own weights; {} for weights that have none.
      past: the runs, the last first; no stages for weights that were not trained here.
      weights: "ema" or "raw".
      command: what wrote the folder.
      two_step_time: t between two steps, as the scheduler has it.
      pipeline: the folder is a whole pipeline, not a transformer alone.
      module: the file with the network's own class, where diffusers has none.
      text: which text states it reads, where no component of the folder makes them.
    """
    origin = _origin(base)
    if not past.stages:
        what = (f"The weights of {origin}, not trained further." if base else
                "Weights that were not imported; how they were trained is not recorded.")
    elif _distilled(past):
        what = f"A one-step generator trained from {origin}."
    else:
        what = f"A diffusion model trained from {origin}."
    usage = _usage(name, family, past, two_step_time, pipeline)
    library = "diffusers"
    if module:
        usage[0] += f" Its class is in `{module}`, beside the weights; diffusers has none."
        library = "pytorch"
    if text:
        usage += [text, ""]
    return _card(name, family, base, past, what, usage, weights, dtype, command, library)


def lora_card(name: str, family: Family, *, base: Mapping[str, Any], past: History,
              weights: str, command: str) -> str:
    """The card of an exported LoRA; arguments as for `model_card`."""
    rank, pipe = past.stages[0].lora.rank, f"# pipe: a {family.pipeline} of the base"
    load = f'pipe.load_lora_weights("{name}")'
    scale = "Its scale is in the weights: adapter scale 1."
    if _distilled(past):
        what = f"A LoRA of rank {rank} that makes {_origin(base)} a one-step generator."
        code = ["from diffusers import FlowMatchEulerDiscreteScheduler", "", pipe, load,
                "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)"]
        then = f"Then one inference step, without guidance. {scale}"
    else:
        what = f"A LoRA of rank {rank} on {_origin(base)}."
        code, then = [pipe, load], f"Then sample as with the base. {scale}"
    usage = ["## Use", "", "```python", *code, "```", "", then, ""]
    return _card(name, family, base, past, what, usage, weights, "float32", command)


def _distilled(past: History) -> bool:
    """Whether one step was trained for: by the last stage, or by one that it went on from."""
    return any(config.stage != "pretrain" for config in past.stages)


def _origin(base: Mapping[str, Any]) -> str:
    # Of a local folder only the name: the card is read elsewhere.
    if base.get("bundled"):
        return f"apt_jax's {base['bundled']}"
    folder = base.get("folder")
    origin = base.get("hub") or (Path(folder).resolve().name if folder else "no imported base")
    return origin + (f", revision {base['revision']}" if base.get("revision") else "")


def _card(name: str, family: Family, base: Mapping[str, Any], past: History, what: str,
          usage: Sequence[str], weights: str, dtype: str, command: str,
          library: str = "diffusers") -> str:
    licence = base.get("licence", "unknown")
    front = ["---", f"license: {licence}" if licence != "unknown" else "license: other",
             f"library_name: {library}", f"pipeline_tag: {family.task}", "tags:", "- apt_jax"]
    front += ["- one-step"] * _distilled(past)
    front += ["- apt"] * any(config.stage == "adversarial" for config in past.stages)
    if base.get("hub"):
        front.append(f"base_model: {base['hub']}")
    if base.get("lora"):
        what += (f" The LoRA {Path(base['lora']['file']).name} was merged into the base, "
                 f"{base['lora']['scale']:g} times.")
    lines = [*front, "---", "", f"# {name}", "", what, "", *usage, "## How it was made", ""]
    lines += [f"- an earlier stage, {Path(missing).name}: not at hand when this was written"
              for missing in past.missing]
    for config, done in reversed(list(zip(past.stages, past.steps, strict=True))):
        lines.append(f"- {_STAGES[config.stage]}: `{config.name}`, {_recipe(config, done)}")
    if not past.stages:
        lines.append("- no training" if base else "- not recorded")
    average = {"ema": "the moving average, ", "raw": "raw, "}[weights] if past.stages else ""
    lines += [
        "", f"Weights: {average}{dtype}. Written by apt_jax:", "", "```", command, "```", ""]
    if _distilled(past):
        lines += ["Method: Lin et al., Diffusion Adversarial Post-Training for One-Step Video "
                  "Generation, arXiv 2501.08316.", ""]
    lines += ["## Licence", "", _licence(base, licence), ""]
    if past.stages:
        lines += ["## Configuration of the last stage", "", "```json", _config(past.stages[0]),
                  "```", ""]
    return "\n".join(lines)


def _licence(base: Mapping[str, Any], licence: str) -> str:
    if base.get("bundled"):
        return (f"The base model's: {licence}. It learned from Microsoft's Fluent emoji (MIT); the "
                "copyright lines and the texts are in `NOTICE`.")
    if licence != "unknown":
        return f"The base model's: {licence}."
    if not base:
        return "None is stated: no imported base is known."
    return f"That of the base model, {_origin(base)}; its folder states none that could be read."


def _usage(name: str, family: Family, past: History, two_step_time: float,
           pipeline: bool) -> list[str]:
    if past.stages:
        trained = "" if _distilled(past) else f" {_MANY}"
    else:
        trained = f" Whether one step gives a picture depends on these weights. {_MANY}"
    if not pipeline:
        sample = "one step" if trained else "a sample"
        return [f"This is the transformer alone; {sample} is z - v(z, text, t = 1) from noise z."
                f"{trained}", ""]
    more = trained or " More were not trained for. No guidance: leave the scale at 1."
    return ["## Use", "", "```python", "import torch",
            _USE[family.name].format(name=name, size=_size(past.stages), fps=_fps(past.stages)),
            "```", "",
            "One step computes z - v(z, text, t = 1). `num_inference_steps=2` evaluates the "
            f"network again at t = {two_step_time:g}.{more}", ""]


def _size(stages: Sequence[Any]) -> str:
    """The clip length that the model was trained on; a latent frame is four, the first is one."""
    return f"num_frames={1 + 4 * (max(stages[0].data.frames) - 1)}, " if stages else ""


def _fps(stages: Sequence[Any]) -> str:
    asked = stages[0].sample.get("fps", 0.0) if stages else 0.0  # runs older than the field
    return f"{frame_rate(asked, latents=True):g}"


def _recipe(config: Any, done: int | None) -> str:
    """done: the step of the newest checkpoint."""
    o, t = config.optimizer, config.train
    some = f"{done} of " if done is not None and done < t.steps else ""
    parts = [f"{some}{t.steps} updates of {t.batch_size} samples",
             f"{o.name}, rate {o.learning_rate:g}"]
    if config.stage == "adversarial":
        a = config.objective.adversarial
        if a.r1:
            parts.append(f"R1 {a.r1_mode}, weight {a.r1_weight:g}, sigma {a.r1_sigma:g}")
    if config.stage == "consistency":
        c = config.objective.consistency
        parts.append(f"{c.steps} intervals, guidance {c.guidance:g}")
    if config.get("lora") and config.lora.rank:
        parts.append(f"LoRA of rank {config.lora.rank}")
    parts.append(f"average {t.ema_decay:g}")
    return ", ".join(parts)


def _config(config: Any) -> str:
    from apt_jax.config import config_to_json

    return config_to_json(config).rstrip()
