#!/usr/bin/env python3
"""Runs the plans of docs/plans/, one a call, and writes the page that lists them.

    python launch/plans.py                    the first plan that is missing, then the page
    python launch/plans.py --all              every one that is missing
    python launch/plans.py --only NAME ...    these, again where they are there already
    python launch/plans.py --list             names; + where a result is there
    python launch/plans.py --hlo DIR          keep the compiled programs, and go on from them
    python launch/plans.py --page             only the page and the plot, from what is there

Each result is a file docs/plans/NAME.json: the command, the versions, the revision (where all of it
was compiled at once) and what `apt-jax plan --json` wrote, the XLA flags among it. The page says which
were compiled with other flags than today's. The environment is that of `make test-plan`. A plan of the
8B network takes two to three minutes of processor time and 4 GB of memory. The plot needs
pip install 'apt_jax[plots]'.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apt_jax.installed import revision, versions_of  # noqa: E402
from apt_jax.parallel.flags import VARIABLES  # noqa: E402

PLANS = ROOT / "docs" / "plans"
PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
WAN_480P = ["--config.data.height=60", "--config.data.width=104"]
WAN_720P = ["--config.data.height=90", "--config.data.width=160"]
# Eight devices to a clip leave room to keep what they exchanged.
CONTEXT_8 = ["--config.mesh.context=8", "--config.model.remat=exchange"]
# The distillation before it, in the video stage's shapes; without D there is room for what was exchanged.
CONSISTENCY = ["--config.stage=consistency", "--config.model.remat=exchange"]


def cases() -> dict[str, tuple[str, str, list[str]]]:
    """name -> (config, topology, overrides), in the order in which they are run: one of each kind
    first."""
    wan, wan14 = "wan_1_3b_apt_video", "wan_14b"
    found = {
        "wan_1_3b_video_h100_1x1": (wan, "h100:1x1", [*WAN_480P, "--config.mesh.fsdp=1"]),
        "wan_1_3b_video_h100_1x1_batch_256": (wan, "h100:1x1", [
            *WAN_480P, "--config.mesh.fsdp=1", "--config.train.batch_size=256"]),
        "wan_1_3b_video_h100_1x8": (wan, "h100:1x8", WAN_480P),
    }
    order = [("video", "h100:1x8"), ("video", "h100:8x8"), ("video", "h100:128x8"),
             ("video_context_8", "h100:8x8"), ("wan_14b", "h100:8x8"), ("video", "v5p:4x4x4"),
             ("video_context_8", "h100:1x8"), ("image", "h100:1x8"), ("video", "v6e:16x16"),
             ("video", "h100:16x8"), ("image", "h100:128x8"), ("image", "h100:8x8"),
             ("image", "h100:16x8"), ("consistency", "h100:8x8"), ("image", "v5p:4x4x4"),
             ("image", "v6e:16x16")]
    slices = ("v5p:4x4x8", "v5p:4x8x8", "v6e:8x8", "v6e:8x16")
    order += [(stage, topology) for topology in slices for stage in ("video", "image")]
    for stage, topology in order:
        place = topology.replace(":", "_")
        if stage == "wan_14b":
            found[f"wan_14b_video_{place}"] = (wan14, topology, WAN_720P)
        elif stage == "video_context_8":
            found[f"seaweed_8b_video_{place}_context_8"] = (
                "seaweed_8b_video", topology, CONTEXT_8)
        elif stage == "consistency":
            found[f"seaweed_8b_consistency_{place}"] = ("seaweed_8b_video", topology, CONSISTENCY)
        else:
            found[f"seaweed_8b_{stage}_{place}"] = (f"seaweed_8b_{stage}", topology, [])
    return found


def command(name: str) -> list[str]:
    config, topology, overrides = cases()[name]
    return ["plan", "--config", f"configs/{config}.py", "--topology", topology, "--no-remedy",
            *overrides]


def run(name: str, hlo: str) -> bool:
    """Runs a plan and keeps what it found; False where it failed."""
    PLANS.mkdir(parents=True, exist_ok=True)
    words = command(name)
    print(f"plans.py: {name}: apt-jax {' '.join(words)}", flush=True)
    env = {k: v for k, v in os.environ.items()
           if k not in (*VARIABLES.values(), "JAX_PLATFORMS")}
    folder = Path(hlo).resolve() / name if hlo else None
    made = "" if folder and any(folder.glob("*.json")) else revision(ROOT / "configs")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "plan.json"
        kept = ["--reuse", "--hlo", str(folder)] if folder else []
        done = subprocess.run([sys.executable, "-m", "apt_jax", *words, "--json", str(out), *kept],
                              cwd=ROOT, env=env, stdin=subprocess.DEVNULL)
        if not out.is_file():
            print(f"plans.py: {name} failed with status {done.returncode}", file=sys.stderr)
            return False
        plan = slim(json.loads(out.read_text()))
    value = {"command": " ".join(["apt-jax", *words]), "versions": versions_of(PACKAGES),
             "revision": made, "plan": plan}
    (PLANS / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n")
    return True


def slim(plan: dict) -> dict:
    """Without the hundreds of transfers below 1 MiB that wait; the sums hold them."""
    for program in plan["programs"].values():
        program["exposed_steady"] = [
            row for row in program["exposed_steady"] if row["bytes"] >= 2**20]
    return plan


def results() -> dict[str, dict]:
    """Every result that is there, in the order of `cases`."""
    return {name: json.loads((PLANS / f"{name}.json").read_text())
            for name in cases() if (PLANS / f"{name}.json").is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", nargs="+", default=[], choices=list(cases()), metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--hlo", default="", metavar="DIR",
                        help="keep the compiled programs in DIR/NAME and read those that are there")
    args = parser.parse_args()
    there = results()
    if args.list:
        print("\n".join(f"{'+' if name in there else ' '} {name}" for name in cases()))
        return 0
    missing = [name for name in cases() if name not in there]
    wanted = args.only or (missing if args.all else missing[:1])
    failed = [] if args.page else [name for name in wanted if not run(name, args.hlo)]
    from apt_jax.plan import page

    page.write(PLANS, results(), {name: " ".join(["apt-jax", *command(name)]) for name in cases()})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
