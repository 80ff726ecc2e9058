"""Wheel and sdist, built as for a release and installed into empty environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import runs
from tests.reference import RUNS
from wsm_megatron.version import __version__

_ROOT = Path(__file__).parents[2]
_PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def _run(*command: object) -> str:
    """What a command prints; it knows nothing of this environment."""
    clean = {name: v for name, v in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        [str(word) for word in command], env=clean, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``scripts/wheel.sh`` builds."""
    for tool in ("build", "auditwheel"):
        pytest.importorskip(tool)
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("dist")
    _run(_ROOT / "scripts" / "wheel.sh", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def _installed(python: str, wheel: Path, folder: Path) -> Path:
    """``bin`` of a new environment that has the wheel alone."""
    _run(python, "-m", "venv", folder)
    _run(folder / "bin" / "pip", "install", "--no-deps", "--no-index", wheel)
    return folder / "bin"


def _interpreter(version: str) -> str | None:
    """A Python of that version: this one, on the path, or of pyenv."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for python in filter(None, found):  # pyenv's are there, and fail, where not switched on
        if subprocess.run([python, "--version"], capture_output=True).returncode == 0:
            return str(python)
    return None


def test_one_wheel_for_every_python_and_linux(wheel: Path) -> None:
    assert wheel.name.startswith(f"wsm_megatron-{__version__}-cp310-abi3-manylinux")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"wsm_megatron/py.typed", "wsm_megatron/kernels/_weighted_sum.abi3.so"} <= set(names)
    top = {name.split("/")[0] for name in names}
    assert top - {f"wsm_megatron-{__version__}.dist-info", "wsm_megatron.libs"} == {"wsm_megatron"}


def test_the_sdist_has_all_that_a_clone_has(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = _run("git", "-C", _ROOT, "ls-files").split() if (_ROOT / ".git").exists() else []
    unwanted = (".gitignore", ".gitattributes")
    assert [name for name in tracked if name not in names and name not in unwanted] == []
    assert {"docs/design.md", "scripts/merge.sbatch", "examples/demo/__main__.py"} <= names


@pytest.mark.parametrize("version", _PYTHONS)
def test_what_needs_no_torch_runs_alone(version: str, wheel: Path, tmp_path: Path) -> None:
    python = _interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    wsm = _installed(python, wheel, tmp_path / "empty") / "wsm"
    assert _run(wsm, "--version") == f"wsm_megatron {__version__}\n"
    assert "merge checkpoints of a run into one" in _run(wsm, "--help")
    assert "0.133975" in _run(wsm, "coefficients", "--num", "4", "--decay", "1-sqrt")


def test_a_merge_by_what_was_installed(wheel: Path, tmp_path: Path) -> None:
    """Torch and the rest come from this environment: they are too large to install again."""
    bin = _installed(sys.executable, wheel, tmp_path / "empty")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "empty" / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    where = _run(bin / "python", "-c", "import wsm_megatron; print(wsm_megatron.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    out = tmp_path / "out"
    _run(bin / "wsm", "merge", "--load", RUNS / runs.DENSE, "--save", out, "--last", "3")
    assert "the same bits" in _run(bin / "wsm", "verify", out, "--sources", "all")
