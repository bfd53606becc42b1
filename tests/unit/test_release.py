"""What a release needs: one version everywhere, named Pythons, and checks before each commit."""

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from mlflow_dr.version import VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_changelog_and_the_citation_have_the_version() -> None:
    headings = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert any(line.split()[:2] == ["##", VERSION] for line in headings)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == VERSION
    assert citation["license"] == PROJECT["license"]


def test_the_named_pythons_are_allowed() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    versions = [
        text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text
    ]
    assert versions[0] == "3.11"
    assert all(allowed.contains(version) for version in versions)
    assert not allowed.contains("3.10")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_a_release_without_a_changelog_is_refused(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.0.1\n", encoding="utf-8")
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").symlink_to(shutil.which("python3") or "")
    for name in ("pyproject.toml", "setup.py", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / ".installed-dev").touch()
    package = tmp_path / "mlflow_dr"
    package.mkdir()
    (package / "version.py").write_text(f'VERSION = "{VERSION}"\n', encoding="utf-8")
    done = subprocess.run(["make", "release"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"CHANGELOG.md has no heading '## {VERSION}'" in done.stderr
    assert not (tmp_path / "dist").exists()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A new git repository with our hooks."""
    shutil.copy(ROOT / ".pre-commit-config.yaml", tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.skipif(shutil.which("pre-commit") is None, reason="no pre-commit here")
@pytest.mark.parametrize(
    ("name", "size", "hook"),
    [
        ("mlflow.db", 1, "databases"),
        ("runs/tracking.sqlite3-wal", 1, "databases"),
        ("mlruns/0/meta.yaml", 1, "databases"),
        ("weights.bin", 600_000, "large-files"),
    ],
)
def test_a_commit_of_databases_or_large_files_is_refused(
    repository: Path, name: str, size: int, hook: str
) -> None:
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["pre-commit", "run", hook]
    subprocess.run(["git", "add", "."], cwd=repository, check=True)
    assert subprocess.run(command, cwd=repository, capture_output=True).returncode == 0
    path.write_bytes(b"0" * size)
    subprocess.run(["git", "add", "--force", "."], cwd=repository, check=True)
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1
    assert name in done.stdout
