"""The revision that results carry."""

import importlib.util
import shutil
import subprocess

import pytest

from apt_jax import installed


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_revision_is_of_the_sources_and_not_of_the_results_beside_them(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    package, configs, result = (tmp_path / name for name in ("package", "configs", "result.json"))
    for folder in (package, configs):
        folder.mkdir()
    shutil.copy(installed.__file__, package / "installed.py")
    (configs / "a.py").write_text("")
    result.write_text("1")
    spec = importlib.util.spec_from_file_location("copied", package / "installed.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    assert copied.revision().startswith("sources-")  # no git here yet
    git("init", "-q")
    git("add", "package/installed.py", "configs", "result.json")
    git("commit", "-qm", "a")
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
    commit = git("log", "-1", "--format=%h")
    result.write_text("2")
    assert copied.revision() == copied.revision(configs) == commit
    (configs / "a.py").write_text("pass")
    assert copied.revision() == commit and copied.revision(configs).startswith("sources-")
    (configs / "a.py").write_text("break")
    before = copied.revision(configs)
    (configs / "a.py").write_text("pass")
    assert copied.revision(configs) != before
