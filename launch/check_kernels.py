"""Whether the attention kernels compute attention on the accelerator that is here, and its products
in eight bits products.

    python launch/check_kernels.py                          # every kernel that can run here
    python launch/check_kernels.py --backends hopper --cases odd vmap --json found.json

Small attentions of kinds that hurt, forward and gradients, against plain JAX in float32 ("fp8": layers'
products, against the same rounded factors multiplied in float32, whatever --cases says). Prints a line
for each and keeps it in --json at once; status 1 where one is farther away than rounding explains, or
fails. Each kernel has a process of its own and --limit seconds: one that hangs, or breaks the device,
holds up no other, and the row that it stood in says so. The same command goes on with what is missing.
`apt-jax bench attention` checks the large ones before it times them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from apt_jax.bench.attention_peers import gradient_of  # noqa: E402
from apt_jax.bench.cases import INFERENCE_ONLY  # noqa: E402
from apt_jax.bench.check import HALF, limit, wrong  # noqa: E402
from apt_jax.bench.report import Results, attempt  # noqa: E402
from apt_jax.bench.rows import DeviceLost, make_rows  # noqa: E402
from apt_jax.errors import UserError  # noqa: E402
from apt_jax.kernels import dispatch, fp8  # noqa: E402
from apt_jax.kernels.attention import attention  # noqa: E402
from apt_jax.kernels.choice import Hardware, choosing  # noqa: E402
from apt_jax.kernels.oracle import oracle  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Small:
    """mask: "" for none, "first" hides the first keys of each sample, "some" every third. ways: of a
    vmap around it, 0 for none."""

    queries: int
    keys: int
    heads: int = 2
    head_dim: int = 128
    batch: int = 2
    mask: str = ""
    ways: int = 0
    dtype: str = "bfloat16"

    def arrays(self) -> list[jax.Array]:
        """q, k, v, a cotangent and, where there is one, the mask."""
        lead = (self.ways,) * bool(self.ways) + (self.batch,)
        counts = (self.queries, self.keys, self.keys, self.queries)
        made = [jax.random.normal(key, (*lead, n, self.heads, self.head_dim)).astype(self.dtype)
                for key, n in zip(jax.random.split(jax.random.key(7), 4), counts, strict=True)]
        at = jnp.arange(self.keys)
        masks = {"first": at >= jnp.arange(1, self.batch + 1)[:, None] * (self.keys // 3),
                 "some": jnp.broadcast_to(at % 3 > 0, (self.batch, self.keys))}
        return made + ([masks[self.mask]] if self.mask else [])


CASES = {"one tile": Small(128, 128, heads=1, batch=1), "tiles": Small(384, 640),
         "narrow": Small(384, 640, head_dim=64), "odd": Small(1031, 1031, mask="first"),
         "some": Small(517, 333, head_dim=64, mask="some"), "vmap": Small(512, 640, ways=3, mask="first"),
         "half": Small(256, 384, dtype="float16"), "long": Small(8192, 8192, heads=8, batch=1)}


def distances(case: Small, backend: str) -> dict[str, float]:
    """{"out", "dq", "dk", "dv": distance from float32, norm over norm}; "out" alone of a kernel for
    inference."""
    q, k, v, dout, *mask = case.arrays()

    def both(function):
        def one(q, k, v, dout):
            out = function(q, k, v, *mask)
            if backend in INFERENCE_ONLY:
                return (out,)
            return out, *gradient_of(lambda *a: function(*a, *mask))(q, k, v, dout)

        return jax.jit(jax.vmap(one) if case.ways else one)

    reason = dispatch.refusal(backend, dispatch.Request.of(*(x[0] if case.ways else x
                                                             for x in (q, k, v))))
    if reason:
        raise UserError(reason)
    with choosing(backend=backend):
        found = both(attention)(q, k, v, dout)
    with jax.default_matmul_precision("highest"):
        want = both(oracle)(
            *(x.astype(jnp.float32) for x in (q, k, v, dout)))
    return {name: float(jnp.linalg.norm(f.astype(jnp.float32) - w) / jnp.linalg.norm(w))
            for name, f, w in zip(("out", "dq", "dk", "dv"), found, want)}


PRODUCTS = {"product": (384, 1024, 512), "odd product": (331, 3072, 1040)}  # tokens, in, out


def product_distances(sizes: tuple[int, int, int]) -> dict[str, float]:
    """{"y", "dx", "dw": distance of the hardware's products in eight bits from those of the same
    factors in float32}; UserError where the hardware has none."""
    if fp8.widened() is not None:
        raise UserError("no tensor cores for eight bits here: factors are widened first")
    return compared_products(*sizes)


def compared_products(tokens: int, width: int, out: int) -> dict[str, float]:
    x, w, dy = (jax.random.normal(key, shape).astype(jnp.bfloat16) for key, shape in zip(
        jax.random.split(jax.random.key(3), 3), ((tokens, width), (width, out), (tokens, out))))

    def all_three():  # a new function each time: it is traced for another hardware
        def one(x, w, dy):
            y, pull = jax.vjp(fp8.matmul, x, w)
            return y, *pull(dy)

        return jax.jit(one)(x, w, dy)

    found = all_three()
    with (choosing(hardware=Hardware.of(jax.devices("cpu")[0])),
          jax.default_matmul_precision("highest")):
        want = all_three()
    apart = lambda f, w: jnp.linalg.norm(f - w) / jnp.linalg.norm(w)  # noqa: E731
    return {name: float(apart(f.astype(jnp.float32), w.astype(jnp.float32)))
            for name, f, w in zip(("y", "dx", "dw"), found, want, strict=True)}


def todo(backend: str, cases: list[str]) -> Iterator[tuple[str, str, functools.partial]]:
    """What `make_rows` makes: (name, no config, what makes the row)."""
    def made(case: Small) -> dict:
        found = distances(case, backend)
        error = wrong(found, limit(backend, case.dtype))
        return {"distances": found, **({"error": error} if error else {})}

    def product(sizes: tuple[int, int, int]) -> dict:
        found = product_distances(sizes)
        error = wrong(found, HALF)
        return {"distances": found, **({"error": error} if error else {})}

    if backend == "fp8":
        for name, sizes in PRODUCTS.items():
            yield f"{name}/fp8", "", functools.partial(
                lambda sizes: attempt(lambda: product(sizes)) | {"backend": "fp8",
                                                                 "sizes": sizes}, sizes)
        return
    for name in cases:
        case = CASES[name]
        yield f"{name}/{backend}", "", functools.partial(
            lambda case: attempt(lambda: made(case)) | {"backend": backend,
                                                        **dataclasses.asdict(case)}, case)


def tell(name: str, row: dict) -> None:
    says = row.get("error") or row.get("skipped") or ", ".join(
        f"{key} {value:.1e}" for key, value in row["distances"].items())
    kind = "FAILED: " if "error" in row else "left out: " if "skipped" in row else ""
    print(f"{name:<20} {kind}{says}", flush=True)


def check(backend: str, cases: list[str], file: Path | None, command: list[str]) -> int:
    """One kernel, in this process. Returns 1 where a case failed."""
    results = Results(file, jax.devices()[0].device_kind, command)
    rows = list(todo(backend, cases))
    for name, config, _ in rows:
        if results.has(name, config):
            tell(name, results.rows[name])
    try:
        return 1 if make_rows(rows, results, tell) else 0
    except DeviceLost as error:
        print(error, flush=True)
        return 1


def main(argv: list[str] | None = None) -> int:
    known = ("cudnn", "hopper", "cudnn_fp8", "fp8", "pallas", "tokamax", "splash")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", choices=known, default=known, metavar="NAME",
                        help=f"of {', '.join(known)} (default: all that can run here)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
                        help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the distances here")
    parser.add_argument("--limit", type=float, default=180.0, metavar="S",
                        help="seconds for each kernel, compiling included (default: 180)")
    args = parser.parse_args(argv)
    given = list(sys.argv[1:] if argv is None else argv)
    if len(args.backends) == 1:
        return check(args.backends[0], args.cases, args.json,
                     ["python", "launch/check_kernels.py", *given])
    failed = 0
    with tempfile.TemporaryDirectory() as programs:  # plain JAX's are compiled by the first alone
        env = {"JAX_COMPILATION_CACHE_DIR": programs,
               "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **os.environ}
        for backend in args.backends:
            command = [sys.executable, __file__, "--backends", backend, "--cases", *args.cases]
            command += ["--json", str(args.json)] if args.json else []
            try:
                failed |= subprocess.run(command, env=env, timeout=args.limit).returncode != 0
            except subprocess.TimeoutExpired:
                print(f"{backend}: no end within {args.limit:g} s; the process was ended", flush=True)
                failed = 1
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
