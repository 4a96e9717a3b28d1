"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apt_jax.convert.families import Family

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


def model_card(name: str, family: Family, *, base: Mapping[str, Any], stages: Sequence[Any],
               weights: str, command: str, two_step_time: float, dtype: str,
               pipeline: bool = True) -> str:
    """The card as Markdown.

    Args:
      base: "source" of the base's component folder: hub or folder, revision, licence.
      stages: configs of the runs, the last first; () for imported weights that were not trained.
      weights: "ema" or "raw".
      command: what wrote the folder.
      two_step_time: t between two steps, as the scheduler has it.
      pipeline: the folder is a whole pipeline, not a transformer alone.
    """
    licence = base.get("licence", "unknown")
    # Of a local folder only the name: the card is read elsewhere.
    origin = base.get("hub") or Path(base.get("folder") or "an unnamed base").name
    front = ["---", f"license: {licence}" if licence != "unknown" else "license: other",
             "library_name: diffusers", f"pipeline_tag: {family.task}", "tags:", "- one-step",
             "- apt"]
    if base.get("hub"):
        front.append(f"base_model: {base['hub']}")
    front.append("---")
    revision = f", revision {base['revision']}" if base.get("revision") else ""
    lines = [
        *front, "", f"# {name}", "",
        f"A one-step generator trained from {origin}{revision}." if stages else
        f"The weights of {origin}{revision}, unchanged, under a one-step scheduler.",
        "", *_usage(name, family, stages, two_step_time, pipeline), "## How it was made", "",
    ]
    for config in reversed(stages):
        lines.append(f"- {_STAGES[config.stage]}: `{config.name}`, {_recipe(config)}")
    if not stages:
        lines.append("- no training")
    lines += [
        "", f"Weights: {'the moving average' if weights == 'ema' else 'raw'}, {dtype}. Written by "
        "apt_jax:", "", "```", command, "```", "",
        "Method: Lin et al., Diffusion Adversarial Post-Training for One-Step Video Generation, "
        "arXiv 2501.08316.", "",
        "## Licence", "",
        f"The base model's: {licence}." if licence != "unknown" else
        f"That of the base model, {origin}; its folder states none that could be read.", "",
    ]
    if stages:
        lines += ["## Configuration of the last stage", "", "```json", _config(stages[0]), "```",
                  ""]
    return "\n".join(lines)


def _usage(name: str, family: Family, stages: Sequence[Any], two_step_time: float,
           pipeline: bool) -> list[str]:
    if not pipeline:
        return ["This is the transformer alone; a sample is z - v(z, text, t = 1) from noise z.", ""]
    return ["## Use", "", "```python", "import torch",
            _USE[family.name].format(name=name, size=_size(stages), fps=16), "```", "",
            "One step computes z - v(z, text, t = 1). `num_inference_steps=2` evaluates the network "
            f"again at t = {two_step_time:g}; more steps were not trained for. No guidance: leave "
            "the scale at 1.", ""]


def _size(stages: Sequence[Any]) -> str:
    if not stages or not stages[0].data.height or not stages[0].data.width:
        return ""
    data = stages[0].data
    return f"height={data.height}, width={data.width}, num_frames={max(data.frames)}, "


def _recipe(config: Any) -> str:
    o, t = config.optimizer, config.train
    parts = [f"{t.steps} updates of {t.batch_size} samples", f"{o.name}, rate {o.learning_rate:g}"]
    if config.stage == "adversarial":
        a = config.objective.adversarial
        if a.r1:
            parts.append(f"R1 {a.r1_mode}, weight {a.r1_weight:g}, sigma {a.r1_sigma:g}")
    if config.stage == "consistency":
        c = config.objective.consistency
        parts.append(f"{c.steps} intervals, guidance {c.guidance:g}")
    parts.append(f"average {t.ema_decay:g}")
    return ", ".join(parts)


def _config(config: Any) -> str:
    from apt_jax.config import config_to_json

    return config_to_json(config).rstrip()
