"""The files of one checkpoint are fetched in the background, once, and are removed in the end."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_dr import compat
from mlflow_dr.errors import UnavailableError
from mlflow_dr.files import SCRATCH
from mlflow_dr.tracking import fetching, prefetch
from mlflow_dr.tracking.checkpoints import Checkpoint, publish, run_checkpoints
from mlflow_dr.tracking.prefetch import CheckpointPrefetch
from mlflow_dr.tracking.runs import TrackedRun


class Store:
    """The artifact store, seen from another machine.

    Attributes:
        downloads: the content of each file that was downloaded, but for manifests.
        is_open: while it is not set, downloads wait.
        error: raised by downloads.
    """

    def __init__(self) -> None:
        self.downloads: list[str] = []
        self.is_open = threading.Event()
        self.is_open.set()
        self.error: Exception | None = None
        self._download = compat.download_file

    def download(self, store: Any, name: str, path: str) -> None:
        assert self.is_open.wait(20)
        if self.error is not None:
            raise self.error
        self._download(store, name, path)
        if name == "weights":
            self.downloads.append(Path(path).read_text())


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    for module in (fetching, prefetch):
        monkeypatch.setattr(module, "local_directory", lambda location: None)
    monkeypatch.setattr(fetching, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(compat, "download_file", store.download)
    return store


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many temporary directories there are."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return lambda: sum(path.is_dir() for path in folder.glob(f"{SCRATCH}*"))


@pytest.fixture
def checkpoints(run: TrackedRun, tmp_path: Path) -> list[Checkpoint]:
    for step in (1, 2, 3):
        directory = tmp_path / f"published-{step}"
        directory.mkdir()
        (directory / "weights").write_text(str(step))
        publish(run, directory, step)
    return run_checkpoints(run)


@pytest.fixture
def fetcher(temporary: Callable[[], int]) -> Iterator[CheckpointPrefetch]:
    fetcher = CheckpointPrefetch()
    yield fetcher
    fetcher.close()
    assert temporary() == 0


def end_of(fetcher: CheckpointPrefetch) -> None:
    """Wait until the files are there."""
    fetch = fetcher._fetch
    assert fetch is not None
    fetch.wait()


def removed(fetcher: CheckpointPrefetch, act: Callable[[], object]) -> None:
    """Do something that has the fetched files removed, and wait for that."""
    fetch = fetcher._fetch
    assert fetch is not None
    act()
    fetch.task.wait(20)
    assert fetch.task.is_done


def test_files_are_fetched_once_and_removed_after_use(
    store: Store,
    checkpoints: list[Checkpoint],
    fetcher: CheckpointPrefetch,
    temporary: Callable[[], int],
) -> None:
    first = checkpoints[0]
    fetcher.begin(first)
    fetcher.begin(first)
    end_of(fetcher)
    assert store.downloads == ["1"]

    def use() -> None:
        with fetcher.files(first) as directory:
            assert (directory / "weights").read_text() == "1"
            assert temporary() == 1

    removed(fetcher, use)
    assert store.downloads == ["1"]
    assert temporary() == 0
    with fetcher.files(first) as directory:
        assert directory.exists()
    assert store.downloads == ["1", "1"]


def test_files_that_are_being_fetched_are_waited_for(
    store: Store, checkpoints: list[Checkpoint], fetcher: CheckpointPrefetch
) -> None:
    store.is_open.clear()
    fetcher.begin(checkpoints[0])
    threading.Timer(0.2, store.is_open.set).start()
    with fetcher.files(checkpoints[0]) as directory:
        assert (directory / "weights").read_text() == "1"
    assert store.downloads == ["1"]


def test_an_error_is_left_to_who_needs_the_files(
    store: Store, checkpoints: list[Checkpoint], fetcher: CheckpointPrefetch
) -> None:
    for is_away in (True, False):
        store.error = ConnectionError("away")
        fetcher.begin(checkpoints[0])
        end_of(fetcher)
        if is_away:
            with pytest.raises(UnavailableError, match="away"), fetcher.files(checkpoints[0]):
                pass
        else:
            store.error = None
            with fetcher.files(checkpoints[0]) as directory:
                assert (directory / "weights").read_text() == "1"


def test_one_checkpoint_at_a_time_is_kept(
    store: Store,
    checkpoints: list[Checkpoint],
    fetcher: CheckpointPrefetch,
    temporary: Callable[[], int],
) -> None:
    first, second, third = checkpoints
    store.is_open.clear()
    fetcher.begin(first)
    fetcher.begin(second)  # the first one is still being fetched
    assert fetcher.model_id == first.model_id
    store.is_open.set()
    end_of(fetcher)
    with fetcher.files(third) as directory:  # another one is needed first
        assert (directory / "weights").read_text() == "3"
    assert fetcher.model_id == first.model_id
    removed(fetcher, lambda: fetcher.begin(second))
    end_of(fetcher)
    assert temporary() == 1
    with fetcher.files(second) as directory:
        assert (directory / "weights").read_text() == "2"
    assert store.downloads == ["1", "3", "2"]


def test_files_on_this_machine_are_not_fetched(
    checkpoints: list[Checkpoint], fetcher: CheckpointPrefetch
) -> None:
    fetcher.begin(checkpoints[0])
    assert fetcher.model_id == ""


def test_an_interrupt_while_waiting_leaves_nothing_behind(
    store: Store,
    checkpoints: list[Checkpoint],
    fetcher: CheckpointPrefetch,
    temporary: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.is_open.clear()
    fetcher.begin(checkpoints[0])

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prefetch._Fetch, "wait", interrupted)

    def use() -> None:
        with pytest.raises(KeyboardInterrupt), fetcher.files(checkpoints[0]):
            pass
        store.is_open.set()

    removed(fetcher, use)
    assert temporary() == 0


def test_closing_removes_what_was_not_used_and_waits_for_no_download(
    store: Store,
    checkpoints: list[Checkpoint],
    fetcher: CheckpointPrefetch,
    temporary: Callable[[], int],
) -> None:
    fetcher.begin(checkpoints[0])
    end_of(fetcher)
    fetcher.close()
    assert temporary() == 0
    store.is_open.clear()
    fetcher.begin(checkpoints[1])
    removed(fetcher, lambda: (fetcher.close(), store.is_open.set()))
    assert temporary() == 0
