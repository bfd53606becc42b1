"""What a shell completes."""

import sys

import pytest
from click.shell_completion import ShellComplete

from mlflow_dr.cli import COMMANDS, group


def completed(*words: str) -> list[str]:
    """What the last word may become; `file` lets the shell complete files."""
    *before, last = words
    items = ShellComplete(group, {}, "mlflow-dr", "X").get_completions(before, last)
    return [item.value if item.type == "plain" else item.type for item in items]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ev"], ["evaluate"]),
        (["cache", ""], ["remove"]),
        (["validate", "--order", ""], ["oldest", "newest", "bisect"]),
        (["best", "--download", ""], ["file"]),
        (["evaluate", "--dataset", "ms"], ["msmarco", "file"]),
        (["evaluate", ""], ["file"]),
        (["train", "--publish_s"], ["--publish_steps"]),
        (["train", "--publish-s"], ["--publish-steps"]),
        (["train", "--config", ""], ["file"]),
        (["run", "--subs"], ["--subset"]),
        (["run", "--learning_r"], ["--learning_rate"]),
        (["jax-train", "--temp"], ["--temperature"]),
    ],
)
def test_completion(words: list[str], expected: list[str]) -> None:
    assert completed(*words) == expected


def test_names_of_commands_are_completed_without_importing_the_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Importing all of them would take a second at each touch of the tab key."""
    monkeypatch.setattr("importlib.import_module", lambda name: sys.exit(name))
    items = ShellComplete(group, {}, "mlflow-dr", "X").get_completions([], "")
    assert {item.value: item.help for item in items} == dict(COMMANDS)
