"""Small promises: quick import, layers, a complete wheel, licences, no pickles."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "apt_jax"


def run(code: str, **more) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_touches_no_device():
    """Under 2 s (the best of three, on a busy machine), and jax is not even imported."""
    code = ("import time; start = time.perf_counter(); import apt_jax; "
            "seconds = time.perf_counter() - start; import sys; "
            "assert not {'jax', 'flax', 'numpy', 'grain'} & set(sys.modules); "
            "assert 'load' in dir(apt_jax); print(seconds)")
    assert min(float(run(code)) for _ in range(3)) < 2


def test_importing_everything_starts_no_backend():
    """All modules together initialise no device: that is left to the first computation. Without PyTorch
    its own model of the benches is no module."""
    run("import importlib, pkgutil, apt_jax\n"
        "for m in pkgutil.walk_packages(apt_jax.__path__, 'apt_jax.'):\n"
        "    try:\n"
        "        if m.name != 'apt_jax.__main__': importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as e:\n"
        "        assert (m.name, e.name) == ('apt_jax.bench.torch_mmdit', 'torch'), (m.name, e)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, list(xla_bridge._backends)")


def test_public_names():
    run("import apt_jax\n"
        "for name in apt_jax.__all__: assert getattr(apt_jax, name) is not None, name\n"
        "try: apt_jax.nothing\n"
        "except AttributeError as e: assert 'nothing' in str(e)\n"
        "else: raise AssertionError")


# -- layers ----------------------------------------------------------------------------------------

# A module may import from its own layer's folder and from layers below it (README.md).
LAYERS = (
    {"__main__"},
    {"cli"},
    {"bench"},
    {"api", "plan"},
    {"serve"},
    {"train", "eval"},
    {"convert"},
    {"objectives", "weights"},
    {"diffusion", "models", "data", "samples"},
    {"nn", "parallel"},
    {"kernels", "media", "tensor_files"},
    {"config"},
    {"paths"},
    {"errors", "installed", "__init__", "assets"},
)
# data/captions.py runs the text encoder of models/; train/ and eval/ do not know of each other.
ASIDE = {("data", "models")}
LEVEL = {part: level for level, layer in enumerate(LAYERS) for part in layer}


def imports_of(path: Path) -> set[str]:
    """Top-level parts of apt_jax that a file imports, also inside functions."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}:{node.lineno}: write imports absolutely")
        if isinstance(node, ast.Import):
            parts |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts |= ({f"apt_jax.{name.name}" for name in node.names}
                      if node.module == "apt_jax" else {node.module})
    return {part.split(".")[1] for part in parts if part.startswith("apt_jax.")}


def test_no_two_test_files_share_a_name():
    """pytest imports them by their bare names; of two alike it runs one and refuses the other."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def wrong_imports(files) -> list[str]:
    wrong = []
    for path in files:
        part = part_of(path)
        for other in imports_of(path) - {part}:
            if other not in LEVEL:
                if (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists():
                    wrong.append(f"{other} has no layer in this test")
                continue  # a name defined in apt_jax/__init__.py
            if LEVEL[other] <= LEVEL[part] and (part, other) not in ASIDE:
                wrong.append(f"{path.relative_to(ROOT)} ({part}) imports {other}")
    return wrong


def test_imports_point_downward_only():
    files = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    assert len(files) > 20
    assert {part_of(path) for path in files} <= set(LEVEL)
    assert not wrong_imports(files)


def test_an_upward_import_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "nn").mkdir()
    (tmp_path / "nn" / "norm.py").write_text("def f():\n    from apt_jax.train import loop\n")
    assert wrong_imports([tmp_path / "nn" / "norm.py"]) == ["nn/norm.py (nn) imports train"]


# -- what is shipped -------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """Files in git, or all files where this is no checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]
    return [p for p in ROOT.rglob("*") if p.is_file() and ".venv" not in str(p)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel built by setup.py from the files in git, outside the checkout."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("apt_jax", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE",
                             "NOTICE", "README.md"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps",
           "--no-build-isolation", "--no-index", "-w", str(out), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_all_that_the_package_needs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = next(n for n in names if n.endswith("entry_points.txt"))
        assert "apt-jax = apt_jax.cli.main:main" in archive.read(entry).decode()
    for path in tracked():
        name = path.relative_to(ROOT)
        if name.parts[0] == "apt_jax":
            assert str(name) in names, f"{name} is not in the wheel"
    assert "apt_jax/data/emoji/manifest.json" in names
    assert "apt_jax/assets/base/model.safetensors" in names
    assert "apt_jax/assets/mobilenet_v2_features.safetensors" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert any(n.endswith("licenses/NOTICE") for n in names)
    assert not any(n.startswith(("tests/", "configs/")) for n in names)


def test_the_wheel_works_where_the_checkout_is_not(wheel, tmp_path):
    """Unpacked alone it opens its data set and loads its base weights."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = ("import apt_jax; assert apt_jax.__file__.startswith({!r}), apt_jax.__file__\n"
            "from apt_jax.weights import load_generator\n"
            "model, params = load_generator('bundled:base'); assert params\n"
            "from apt_jax.data.bundled import resolve\n"
            "assert (resolve('bundled:emoji') / 'manifest.json').is_file()\n"
            ).format(str(tmp_path / "site"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_base_weights_are_small():
    size = (PACKAGE / "assets" / "base" / "model.safetensors").stat().st_size
    assert size < 8e6


def test_licence_and_notices():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for work in ("Fluent emoji", "MIT License", "MobileNetV2", "BSD 3-Clause", "all-MiniLM-L6-v2",
                 "Apache License 2.0", "Unicode"):
        assert work in notice, work
    assert (PACKAGE / "assets" / "MOBILENET_LICENSE.txt").is_file()


def test_no_pickles():
    """No pickle is written or read, and none lies in the repository."""
    words = {"pickle", "cloudpickle", "dill", "joblib"}
    for path in tracked():
        assert path.suffix not in (".pkl", ".pickle", ".pth", ".pt"), path
        if path.suffix != ".py" or PACKAGE not in path.parents:
            continue
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text, path
        for node in ast.walk(ast.parse(text)):
            names = ([n.name for n in node.names] if isinstance(node, ast.Import) else
                     [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            assert not {name.split(".")[0] for name in names} & words, path


def test_files_are_small_and_name_no_machine():
    """A source file stays readable, and holds no path of the machine it was written on."""
    for path in tracked():
        if path.suffix not in (".py", ".sh", ".md", ".toml", ".in") and path.name != "Makefile":
            continue
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py" and "tests" not in path.parts:
            assert text.count("\n") < 400, f"{path} is too long"
        assert "/" + "work/" not in text and "/" + "root/" not in text, path


def test_makefile_and_scripts():
    make = (ROOT / "Makefile").read_text()
    for target in ("demo:", "demo-full:", "demo-long:", "demo-wan:", "test:", "fixtures:", "clean:", "help:"):
        assert f"\n{target}" in make
    for script in (".ci/run", "launch/venv.sh"):
        assert os.access(ROOT / script, os.X_OK), script
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_what_make_demo_writes_is_ignored_by_git():
    written = ["runs/demo/summary.json", ".venv/bin/python", ".venv-3.13/bin/python",
               "apt_jax.egg-info/PKG-INFO", "configs/__pycache__/demo_common.cpython-313.pyc",
               ".pytest_cache/README.md", ".hypothesis/examples"]
    done = subprocess.run(["git", "check-ignore", *written], cwd=ROOT, capture_output=True,
                          text=True)
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout.split() == written


def venv(python: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch" / "venv.sh", python, folder, "demo"],
                          capture_output=True, text=True)


@pytest.mark.parametrize("version, modules, words", [
    ("3.10", "yes", "3.11 or newer is needed"),
    ("3.12", "no", "no venv module"),
])
def test_an_unfit_python_is_one_line(tmp_path, version, modules, words):
    """A stand-in interpreter answers the script's three questions."""
    python = tmp_path / "python9"
    python.write_text(f"""#!/bin/sh
case "$2" in
  *print*) echo {version} ;;
  *sys.exit*) {'exit 1' if version == '3.10' else 'exit 0'} ;;
  *ensurepip*) {'exit 0' if modules == 'yes' else 'echo trouble >&2; exit 1'} ;;
esac
""")
    python.chmod(0o755)
    done = venv(str(python), tmp_path / "env")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert words in done.stderr and not (tmp_path / "env").exists()


def test_a_missing_python_is_one_line(tmp_path):
    done = venv("python-that-is-not-there", tmp_path / "env")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "there is no 'python-that-is-not-there'" in done.stderr
