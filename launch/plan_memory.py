#!/usr/bin/env python3
"""Prints what the plan says of temporaries beside what a run on this CPU really takes.

    python launch/plan_memory.py                       the steps of two configs, a table
    python launch/plan_memory.py --config FILE --config.train.batch_size=8 ...

For every step: the compiler's temporaries and results that are not updated in place, and by how
much the resident memory of the process grew at its peak while the step ran once (VmHWM, reset before,
less VmRSS before; the arguments lie there already). Each step runs in a process of its own. Nothing
is gated: the process also holds threads' stacks, buffers of the matrix library and what the
allocator keeps. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = (
    ("configs/demo_image.py", "--config.train.batch_size=64", "--config.train.accumulate=1",
     "--config.model.remat=full"),
    ("configs/demo_image.py", "--config.train.batch_size=256", "--config.train.accumulate=4",
     "--config.model.remat=full"),
)
MIB = 2**20


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def run_step(config_file: str, overrides: list[str], number: int) -> dict:
    """Compiles and runs one step of a config on one device of this CPU."""
    import jax
    import jax.numpy as jnp

    from apt_jax.config import load_config, validate
    from apt_jax.plan.programs import training_programs

    config = validate(load_config(config_file, overrides))
    programs = training_programs(config, jax.devices()[:1])
    if number >= len(programs):
        return {}
    program = programs[number]
    compiled = program.function.lower(*program.args).compile()

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return 0.02 * jax.random.normal(jax.random.key(leaf.size), leaf.shape, leaf.dtype)
        return jnp.ones(leaf.shape, leaf.dtype)

    args = jax.block_until_ready(jax.tree.map(fill, program.args))
    said = compiled.memory_analysis()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    jax.block_until_ready(compiled(*args))
    return {"program": program.name, "samples": program.samples,
            "arguments": said.argument_size_in_bytes,
            "planned": (said.temp_size_in_bytes + said.output_size_in_bytes
                        - said.alias_size_in_bytes),
            "grown": status("VmHWM") - before}


def main() -> int:
    if sys.argv[1:2] == ["--step"]:
        print(json.dumps(run_step(sys.argv[3], sys.argv[4:], int(sys.argv[2]))))
        return 0
    cases = CASES
    if sys.argv[1:2] == ["--config"] and len(sys.argv) > 2:
        cases = ((sys.argv[2], *sys.argv[3:]),)
    elif len(sys.argv) > 1:
        print(__doc__)
        return 2
    print("| config | step | samples | arguments, MiB | temporaries planned "
          "| resident memory grew |")
    print("| --- | --- | --- | --- | --- | --- |")
    for config, *overrides in cases:
        for number in (0, 1):
            done = subprocess.run(
                [sys.executable, __file__, "--step", str(number), config, *overrides], cwd=ROOT,
                stdout=subprocess.PIPE, text=True, check=True)
            if found := json.loads(done.stdout.splitlines()[-1]):
                print(f"| {' '.join([config, *overrides])} | {found['program']} "
                      f"| {found['samples']} | {found['arguments'] / MIB:,.0f} "
                      f"| {found['planned'] / MIB:,.0f} | {found['grown'] / MIB:,.0f} |",
                      flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
