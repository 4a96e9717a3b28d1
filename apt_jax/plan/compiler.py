"""The scheduled text of a compiled program, also where jaxlib cannot read it back.

A program for TPUs whose transfers run on the sparse cores has asynchronous updates with two
operands, which jaxlib 0.10.2 refuses to parse ("async-update instruction should have 1
operands but sees 2"). libtpu itself writes such a program as a dump without complaint.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax


def compile_text(lowered: jax.stages.Lowered, options: dict[str, Any] | None,
                 platform: str) -> tuple[jax.stages.Compiled, str]:
    """(the compiled program, its text).

    options: XLA compiler options. platform: "tpu" for what libtpu compiles.
    """
    if platform != "tpu":
        compiled = lowered.compile(compiler_options=options or None)
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory(prefix="apt_jax_plan_") as folder:
        compiled = lowered.compile(compiler_options={**(options or {}), "xla_dump_to": folder})
        texts = sorted(Path(folder).glob("*.after_optimizations.txt"),
                       key=lambda path: path.stat().st_size)
        return compiled, texts[-1].read_text() if texts else compiled.as_text()
