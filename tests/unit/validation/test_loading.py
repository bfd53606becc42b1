"""The next checkpoint is loaded early where there is memory; errors come when it is needed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mlflow_dr.errors import CheckpointError, UnavailableError
from mlflow_dr.tracking.checkpoints import PRUNED_TAG, Checkpoint
from mlflow_dr.tracking.prefetch import CheckpointFiles
from mlflow_dr.validation import loading
from mlflow_dr.validation.loading import ModelLoader

SIZE = 1000


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(f"m-{step}", "run", step, True, False, 0, 0, "", "", {}, {}, frozenset[str]())


class Disk:
    """Files of checkpoints, and what was loaded from them.

    Attributes:
        loaded: the step of each load, and whether it was in the main thread.
        broken: steps that cannot be loaded.
        is_open: while it is not set, threads wait amid loading.
        has_begun: whether a thread has begun to load.
        are_here: while it is not set, files are being fetched.
    """

    def __init__(self, directory: Path) -> None:
        self.loaded: list[tuple[int, bool]] = []
        self.broken: set[int] = set()
        self.is_open = threading.Event()
        self.is_open.set()
        self.has_begun = threading.Event()
        self.are_here = threading.Event()
        self.are_here.set()
        self._directory = directory
        (directory / "weights").write_bytes(bytes(SIZE))

    @contextmanager
    def files(self, _: Checkpoint) -> Iterator[Path]:
        assert self.are_here.wait(20)
        yield self._directory

    def load(self, one: Checkpoint, files: CheckpointFiles) -> str:
        is_main = threading.current_thread() is threading.main_thread()
        with files(one):
            if not is_main:
                self.has_begun.set()
            assert is_main or self.is_open.wait(20)
            self.loaded.append((one.step, is_main))
            if one.step in self.broken:
                raise CheckpointError(f"step {one.step} is damaged")
            return f"model {one.step}"


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


@pytest.fixture
def make_loader(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModelLoader]:
    def make(available: int = 4 * SIZE, keeps_model: bool = False) -> ModelLoader:
        monkeypatch.setattr(loading, "available_memory", lambda: available)
        loader = ModelLoader(disk.load, keeps_model)
        monkeypatch.setattr(loader._prefetch, "files", disk.files)
        monkeypatch.setattr(loader._prefetch, "begin", lambda _: None)
        return loader

    return make


def test_the_next_model_is_loaded_by_a_thread(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    loader = make_loader()
    assert loader.model(checkpoint(1)) == "model 1"
    loader.begin(checkpoint(2))
    assert loader.ready_ids == ["", "m-2"]
    loader.begin(checkpoint(3))  # one at a time
    assert loader.ready_ids == ["", "m-2"]
    assert loader.model(checkpoint(2)) == "model 2"
    assert loader.ready_ids == ["", ""]
    assert disk.loaded == [(1, True), (2, False)]


def test_nothing_is_loaded_early_without_memory_or_files(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    loader = make_loader(available=4 * SIZE - 1)
    loader.begin(checkpoint(1))  # how large is it?
    loader.model(checkpoint(1))
    loader.begin(checkpoint(2))
    assert loader.ready_ids == ["", ""]
    loader = make_loader()
    loader.model(checkpoint(1))
    loader.begin(replace(checkpoint(2), tags={PRUNED_TAG: "keep_best"}))
    assert loader.ready_ids == ["", ""]
    assert loader.model(checkpoint(2)) == "model 2"


def load_slowly(disk: Disk, loader: ModelLoader) -> None:
    """Step 2 is being loaded early, and will be a little longer."""
    loader.model(checkpoint(1))
    disk.is_open.clear()
    loader.begin(checkpoint(2))
    assert disk.has_begun.wait(20)
    threading.Timer(0.05, disk.is_open.set).start()


def test_another_checkpoint_is_loaded_if_the_guess_was_wrong(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    """After the wrong one is there, so that two are never loaded at once."""
    loader = make_loader()
    load_slowly(disk, loader)
    assert loader.model(checkpoint(3)) == "model 3"
    assert disk.loaded == [(1, True), (2, False), (3, True)]
    assert loader.ready_ids == ["", ""]


def test_an_error_is_raised_when_the_model_is_needed(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    loader = make_loader()
    loader.model(checkpoint(1))
    disk.broken = {2}
    loader.begin(checkpoint(2))
    with pytest.raises(CheckpointError, match="step 2 is damaged"):
        loader.model(checkpoint(2))
    assert disk.loaded == [(1, True), (2, False), (2, True)]
    loader.begin(checkpoint(3))
    assert loader.model(checkpoint(3)) == "model 3"


def test_a_model_is_kept_for_a_suite_while_the_next_one_is_loaded(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    loader = make_loader(keeps_model=True)
    first = loader.model(checkpoint(1))
    loader.begin(checkpoint(2))
    assert loader.model(checkpoint(1)) is first
    assert loader.model(checkpoint(2)) == "model 2"
    assert loader.model(checkpoint(1)) == "model 1"  # it was forgotten
    assert [step for step, _ in disk.loaded] == [1, 2, 1]


def test_closing_waits_for_what_is_being_loaded(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    """Python would end by an abort while a thread is amid PyTorch's own code."""
    loader = make_loader()
    load_slowly(disk, loader)
    loader.close()
    assert disk.loaded == [(1, True), (2, False)]


def test_closing_waits_for_no_files(disk: Disk, make_loader: Callable[..., ModelLoader]) -> None:
    """They are removed once they are here, and nothing is loaded."""
    loader = make_loader()
    loader.model(checkpoint(1))
    disk.are_here.clear()
    loader.begin(checkpoint(2))
    early = loader._early
    loader.close()
    assert early is not None
    disk.are_here.set()
    with pytest.raises(UnavailableError, match="step 2 is not needed"):
        early.task.wait()
    assert disk.loaded == [(1, True)]


def test_an_interrupted_wait_leaves_the_model_to_the_next(
    disk: Disk, make_loader: Callable[..., ModelLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads at once would leave transformers' classes changed."""
    loader = make_loader()
    loader.model(checkpoint(1))
    disk.is_open.clear()
    loader.begin(checkpoint(2))
    early = loader._early
    assert early is not None
    with monkeypatch.context() as patch:
        patch.setattr(early.task, "wait", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            loader.model(checkpoint(2))
    disk.is_open.set()
    assert loader.model(checkpoint(2)) == "model 2"
    assert disk.loaded == [(1, True), (2, False)]


def test_nothing_is_held_while_a_validator_waits(
    disk: Disk, make_loader: Callable[..., ModelLoader]
) -> None:
    loader = make_loader(keeps_model=True)
    loader.model(checkpoint(1))
    loader.begin(checkpoint(2))
    assert loader.ready_ids == ["m-1", "m-2"]
    loader.forget()
    assert loader.ready_ids == ["", ""]
    assert loader.model(checkpoint(2)) == "model 2"


def _interrupted() -> None:
    raise KeyboardInterrupt
