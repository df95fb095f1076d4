"""What is released: the wheel is the add-on alone, the sdist runs README's commands."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(__file__).parents[1]
FOLDERS = ("agm", "baselines", "benchmarks", "tests")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def run(*command: object, cwd: Path, status: int = 0, **environment: str) -> str:
    """stdout, or stderr of a failure, of this Python with some arguments."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tree in which nothing was ever built: setuptools goes on from what it once listed."""
    folder = tmp_path_factory.mktemp("source")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """The sdist, and the wheel that is made of it."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (sdist,), (wheel,) = folder.glob("agm_dfq-*.tar.gz"), folder.glob("agm_dfq-*-none-any.whl")
    return sdist, wheel


def test_the_wheel_is_the_add_on_alone(built, source, tmp_path):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {f"agm/{name}" for name in files(source / "agm")}
    assert "agm/py.typed" in names
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", built[1],
        cwd=tmp_path)  # fmt: skip
    shown = "from agm import AGM; import agm; print(AGM(), agm.__file__)"
    out = run("-c", shown, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site" / "agm") in out


def test_the_sdist_runs_the_main_job(built, source, tmp_path):
    shutil.unpack_archive(built[0], tmp_path)
    (folder,) = tmp_path.iterdir()
    made = {n for n in files(folder) if n.startswith(("agm_dfq.egg-info", "PKG-INFO", "setup.cfg"))}
    assert files(folder) - made == {n for n in files(source) if ".egg-info" not in n}
    argv = ("--bits", 3, "--seeds", 1, "--steps", 2, "--batch-size", 4, "--out", "run")
    out = run("benchmarks/compare.py", *argv, cwd=folder, PYTHONPATH=str(folder))
    assert "Wrote run/report.json" in out


def test_another_package_of_the_name_is_told(tmp_path):
    (tmp_path / "agm").mkdir()
    (tmp_path / "agm" / "__init__.py").write_text("name = 'agm'")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    err = run("-c", "import baselines", cwd=tmp_path, status=1, PYTHONPATH=path)
    last = err.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(tmp_path) in last
    assert "`pip uninstall agm; pip install -e .`" in last


def test_what_a_program_asks_for_is_the_extra():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"sklearn": "scikit-learn", "PIL": "pillow"}
    asked = {named.get(name, name) for name in benchmarks.NEEDED}
    assert asked == {"torch", *project["optional-dependencies"]["bench"]}
