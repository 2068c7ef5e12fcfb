"""The distributions: what they contain, that they pass their checks, and that the wheel runs."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TREES = {"scalekd": "scalekd", "cli": "scalekd/cli", "pipelines": "scalekd/pipelines"}


def _shipped_files() -> set[str]:
    """Files of the package at their path in an installation."""
    return {
        f"{installed}/{path.relative_to(REPOSITORY / tree).as_posix()}"
        for tree, installed in TREES.items()
        for path in (REPOSITORY / tree).rglob("*")
        if path.suffix in (".py", ".yaml", ".html") or path.name == "py.typed"
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("build") is None:
        pytest.skip("needs the package build")
    source = tmp_path_factory.mktemp("source") / "scalekd"
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "output", "results", "__pycache__", "*.egg-info", "node_modules"
    )
    shutil.copytree(REPOSITORY, source, ignore=left_out)
    output = tmp_path_factory.mktemp("dist")
    for kind in ("--sdist", "--wheel"):
        subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", output, source],
            check=True,
            capture_output=True,
        )
    return output


@pytest.mark.slow
def test_the_wheel_contains_only_the_package(distributions: Path) -> None:
    (wheel,) = distributions.glob("scalekd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    ours = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert ours == _shipped_files()


@pytest.mark.slow
def test_the_sdist_contains_package_tests_documents_and_licence(distributions: Path) -> None:
    (sdist,) = distributions.glob("scalekd-*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    sources = {
        path.relative_to(REPOSITORY).as_posix()
        for tree in TREES
        for path in (REPOSITORY / tree).rglob("*.py")
    }
    assert names >= sources
    assert names >= {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "mkdocs.yml"}
    assert names >= {"docs/index.md", "docs/schema/plan.v1.json", "tests/conftest.py"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("output")]
    assert sum(member.size for member in members) < 20e6


@pytest.mark.slow
def test_the_distributions_pass_twines_check(distributions: Path) -> None:
    if find_spec("twine") is None:
        pytest.skip("needs the package twine")
    files = [str(path) for path in distributions.iterdir()]
    ended = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_runs_in_a_fresh_environment(distributions: Path, tmp_path: Path) -> None:
    """Without dependencies of its own: it sees the packages of this environment."""
    (wheel,) = distributions.glob("scalekd-*.whl")
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    (site,) = folder.glob("lib/python3*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    subprocess.run([*install, "--no-index", wheel], check=True, capture_output=True)
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others), encoding="utf-8")
    for pth in (path for other in others for path in Path(other).glob("*.pth")):
        (site / f"zz-{pth.name}").write_text(
            "\n".join(
                line
                for line in pth.read_text(encoding="utf-8").splitlines()
                if line.startswith("/")
            ),
            encoding="utf-8",
        )
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert version["project"]["dynamic"] == ["version"]
    for arguments, expected in (
        (["--version"], "0.2"),
        (["--help"], "cache-teacher"),
        (["train-student", "--help"], "--cache"),
        (["recipes", "swin_l-resnet50"], "swin_large"),
    ):
        ended = subprocess.run(
            [folder / "bin/scalekd", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr
        assert expected in ended.stdout
    where = subprocess.run(
        [python, "-c", "import scalekd, sys; print(scalekd.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(folder) in where.stdout
