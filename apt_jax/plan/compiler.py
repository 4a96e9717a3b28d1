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

from apt_jax.errors import UserError
from apt_jax.plan.hlo import is_whole


def compile_text(lowered: jax.stages.Lowered, options: dict[str, Any] | None,
                 platform: str) -> tuple[jax.stages.Compiled, str]:
    """(the compiled program, its text).

    options: XLA compiler options. platform: "tpu" for what libtpu compiles. UserError where the dump
    cannot be written or read whole.
    """
    if platform != "tpu":
        compiled = lowered.compile(compiler_options=options or None)
        return compiled, compiled.as_text()
    try:
        with tempfile.TemporaryDirectory(prefix="apt_jax_plan_") as folder:
            compiled = lowered.compile(compiler_options={**(options or {}), **_dump(folder)})
            texts = [path.read_text() for path in Path(folder).glob("*.after_optimizations.txt")]
    except OSError as error:
        raise _failed(error.strerror or str(error)) from None
    text = max(texts, key=len, default="")
    if not is_whole(text):  # XLA only logs that it could not write
        raise _failed("the dump is cut off" if text else "there is no dump")
    return compiled, text


def _dump(folder: str) -> dict[str, Any]:
    """Options for the text of every module in this folder, whatever XLA_FLAGS say of dumps."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": ".*"}


def _failed(reason: str) -> UserError:
    return UserError(f"a program for TPUs is read from what libtpu writes to {tempfile.gettempdir()}, "
                     f"and {reason}; make room there, or name another folder in TMPDIR")
