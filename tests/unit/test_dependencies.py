"""pyproject.toml, the constraints and conda.yaml name the same packages and versions."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# what conda-forge calls them
CONDA_NAMES = {
    "pytorch-gpu": "torch",
    "matplotlib-base": "matplotlib",
    "faiss-gpu": "faiss-gpu-cu12",
}
NOT_INSTALLED_HERE = {"faiss-gpu-cu12"}


def declared(*without: str) -> dict[str, Requirement]:
    """name -> requirement of the package and its extras, without `dev` and these ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *(text for name in extras if name not in ("dev", *without) for text in extras[name]),
    ]
    requirements = map(Requirement, texts)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def pinned(name: str = "constraints.txt") -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


@pytest.mark.parametrize("name", sorted(set(declared()) - NOT_INSTALLED_HERE))
def test_a_dependency_is_pinned_to_an_allowed_version(name: str) -> None:
    assert name in pinned()
    assert declared()[name].specifier.contains(pinned()[name])


@pytest.mark.parametrize("name", sorted(declared("docs", "gpu")))
def test_the_oldest_version_is_the_lower_bound(name: str) -> None:
    (lowest,) = [part.version for part in declared()[name].specifier if part.operator == ">="]
    assert pinned("constraints-oldest.txt")[name] == lowest


def test_developers_tools_are_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tools = map(Requirement, project["optional-dependencies"]["dev"])
    loose = {tool.name for tool in tools if "==" not in str(tool.specifier)}
    unpinned = {name for name in loose if canonicalize_name(name) not in pinned()}
    assert all(name.startswith("types-") for name in unpinned), unpinned


def test_conda_allows_the_same_versions() -> None:
    text = (ROOT / "conda.yaml").read_text(encoding="utf-8")
    listed = yaml.safe_load(text)["dependencies"]
    (by_pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    by_conda = [text for text in listed if isinstance(text, str)]
    texts = [text for text in by_conda if not text.startswith(("python=", "pip"))]
    for text in [*texts, *(text for text in by_pip if not text.startswith("-e"))]:
        requirement = Requirement(text)
        name = CONDA_NAMES.get(requirement.name, canonicalize_name(requirement.name))
        assert str(requirement.specifier) == str(declared()[name].specifier), name
    assert "-e ." in by_pip  # installs the dependencies that conda does not
