"""Pushing a run's best checkpoint to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mlflow_dr.errors import HubError, UsageError, one_line
from mlflow_dr.files import scratch
from mlflow_dr.report.contents import RunReport
from mlflow_dr.report.model_card import LICENCE, MARK, PICTURE, model_card
from mlflow_dr.report.writing import write_picture
from mlflow_dr.tracking.checkpoints import MODEL_TYPE
from mlflow_dr.tracking.fetching import checkpoint_files
from mlflow_dr.tracking.manifest import MANIFEST
from mlflow_dr.tracking.mlmodel import is_description

CARD = "README.md"
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
REFUSED = (401, 403)


def check_repository(repo: str, licence: str | None) -> None:
    """Refuse what the hub would refuse, before anything is read.

    Raises:
        UsageError: no name of a repository or of a licence, or the hub is not to be used.
    """
    from huggingface_hub import constants

    if not REPOSITORY.fullmatch(repo):
        raise UsageError(f"--push {repo[:80]!r}: expected OWNER/NAME of a repository on the hub")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UsageError(
            f"--license {licence[:80]!r}: expected an identifier of the hub, such as apache-2.0, "
            "mit, cc-by-nc-4.0 or other"
        )
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push needs the hub, and HF_HUB_OFFLINE is set; unset it")


def push(report: RunReport, repo: str, licence: str | None = None, private: bool = False) -> str:
    """Upload the best checkpoint of a run with a card and its curve, as one commit.

    A card that somebody else has written, or whose first line was removed, stays.

    Args:
        report: of the run.
        repo: `OWNER/NAME`; it is made if it does not exist.
        licence: for the card.
        private: whether a repository that is made is private.

    Returns:
        Its address.

    Raises:
        UsageError: the checkpoint is no encoder.
        HubError: the hub cannot be reached, or refuses.
        CheckpointError: the checkpoint's files cannot be fetched.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    checkpoint = report.best.checkpoint
    if checkpoint.model_type != MODEL_TYPE:
        raise UsageError(f"{checkpoint.uri} is no encoder; --push uploads encoders")
    # the files may lie in the store itself, so the card is written elsewhere
    with checkpoint_files(checkpoint) as directory, scratch() as own:
        own.mkdir()
        write_picture(report, own / PICTURE)
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            if _may_write_card(api, repo):
                card = model_card(report, repo, licence)
                (own / CARD).write_text(card, encoding="utf-8")
            files = {name: path for name, path in _files(directory).items() if name != CARD}
            files |= _files(own)
            api.create_commit(
                repo,
                [CommitOperationAdd(name, path) for name, path in files.items()],
                commit_message=f"Step {checkpoint.step} of {report.run.name}",
            )
        except Exception as error:
            raise HubError(_message(error, repo)) from error
    return f"{api.endpoint}/{repo}"


def _files(directory: Path) -> dict[str, Path]:
    """The files to upload by name, without what only MLflow and validators read."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {
        name: path for name, path in names.items() if name != MANIFEST and not is_description(name)
    }


def _may_write_card(api: Any, repo: str) -> bool:
    """Whether the repository has no card, or one that this function has written."""
    if not api.file_exists(repo, CARD):
        return True
    text = Path(api.hf_hub_download(repo, CARD)).read_text(encoding="utf-8", errors="replace")
    return MARK in text


def _message(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REFUSED or type(error).__name__ == "LocalTokenNotFoundError":
        return (
            f"the hub does not let this user write to {repo}; set HF_TOKEN to a token with write "
            "access, or `hf auth login`"
        )
    return f"{repo} cannot be pushed ({one_line(error)})"
