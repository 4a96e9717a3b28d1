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
    """The card of an exported pipeline or transformer, as Markdown.

    Args:
      base: "source" of the base's component folder: hub or folder, revision, licence.
      stages: configs of the runs, the last first; () for imported weights that were not trained.
      weights: "ema" or "raw".
      command: what wrote the folder.
      two_step_time: t between two steps, as the scheduler has it.
      pipeline: the folder is a whole pipeline, not a transformer alone.
    """
    origin = _origin(base)
    what = (f"A one-step generator trained from {origin}." if stages else
            f"The weights of {origin}, unchanged, under a one-step scheduler.")
    usage = _usage(name, family, stages, two_step_time, pipeline)
    return _card(name, family, base, stages, what, usage, weights, dtype, command)


def lora_card(name: str, family: Family, *, base: Mapping[str, Any], stages: Sequence[Any],
              weights: str, command: str) -> str:
    """The card of an exported LoRA; arguments as for `model_card`."""
    what = f"A LoRA of rank {stages[0].lora.rank} that makes {_origin(base)} a one-step generator."
    usage = [
        "## Use", "", "```python", "from diffusers import FlowMatchEulerDiscreteScheduler", "",
        f"# pipe: a {family.pipeline} of the base", f'pipe.load_lora_weights("{name}")',
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)", "```", "",
        "Then one inference step, without guidance. Its scale is in the weights: adapter scale 1.",
        ""]
    return _card(name, family, base, stages, what, usage, weights, "float32", command)


def _origin(base: Mapping[str, Any]) -> str:
    # Of a local folder only the name: the card is read elsewhere.
    origin = base.get("hub") or Path(base.get("folder") or "an unnamed base").name
    return origin + (f", revision {base['revision']}" if base.get("revision") else "")


def _card(name: str, family: Family, base: Mapping[str, Any], stages: Sequence[Any], what: str,
          usage: Sequence[str], weights: str, dtype: str, command: str) -> str:
    licence = base.get("licence", "unknown")
    front = ["---", f"license: {licence}" if licence != "unknown" else "license: other",
             "library_name: diffusers", f"pipeline_tag: {family.task}", "tags:", "- one-step",
             "- apt"]
    if base.get("hub"):
        front.append(f"base_model: {base['hub']}")
    if base.get("lora"):
        what += (f" The LoRA {Path(base['lora']['file']).name} was merged into the base, "
                 f"{base['lora']['scale']:g} times.")
    lines = [*front, "---", "", f"# {name}", "", what, "", *usage, "## How it was made", ""]
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
        f"That of the base model, {_origin(base)}; its folder states none that could be read.", "",
    ]
    if stages:
        lines += ["## Configuration of the last stage", "", "```json", _config(stages[0]), "```",
                  ""]
    return "\n".join(lines)


def _usage(name: str, family: Family, stages: Sequence[Any], two_step_time: float,
           pipeline: bool) -> list[str]:
    if not pipeline:
        return ["This is the transformer alone; a sample is z - v(z, text, t = 1) from noise z.",
                ""]
    return ["## Use", "", "```python", "import torch",
            _USE[family.name].format(name=name, size=_size(stages), fps=16), "```", "",
            "One step computes z - v(z, text, t = 1). `num_inference_steps=2` evaluates the "
            f"network again at t = {two_step_time:g}; more steps were not trained for. No "
            "guidance: leave the scale at 1.", ""]


def _size(stages: Sequence[Any]) -> str:
    """The clip length that the model was trained on; a latent frame is four, the first is one."""
    return f"num_frames={1 + 4 * (max(stages[0].data.frames) - 1)}, " if stages else ""


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
    if config.get("lora") and config.lora.rank:
        parts.append(f"LoRA of rank {config.lora.rank}")
    parts.append(f"average {t.ema_decay:g}")
    return ", ".join(parts)


def _config(config: Any) -> str:
    from apt_jax.config import config_to_json

    return config_to_json(config).rstrip()
