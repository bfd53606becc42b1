"""The demo collection, harvested from small trees of Python files."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mlflow_dr.collection import demo
from mlflow_dr.collection.beir import BeirFolder
from mlflow_dr.collection.demo import Pair, harvest
from mlflow_dr.errors import DataError
from mlflow_dr.files import build_once

REST = "It has a second paragraph of more than eight words in all."


def written(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source))
    return path


def function(number: int) -> str:
    docstring = f"Return the number {number} again.\n\n    {REST} {number}\n    "
    return f'def f{number}():\n    """{docstring}"""\n'


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """120 files of two functions each, in two folders."""
    for number in range(120):
        source = function(2 * number) + function(2 * number + 1)
        written(tmp_path / "package" / f"folder{number % 2}" / f"m{number:03}.py", source)
    return tmp_path / "package"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_module_class_and_function_docstrings_in_the_order_of_the_file(tmp_path: Path) -> None:
    written(
        tmp_path / "m.py",
        '''
        r"""What the module
        is good for.

        The module's docstring has a rest: one, two, three.

            It keeps its \\n lines.
        """
        class C:
            """What the class is good for.

            The class's docstring has a rest: one, two, three.
            """
            if True:
                async def f(self):
                    """What the function is good for.

                    The function's docstring has a rest: one, two.
                    """
                    def inner():
                        """What the inner one does.

                        The inner docstring has a rest: one, two.
                        """
                def last(self):
                    """What the last one does.

                    The last docstring has a rest: one, two.
                    """
        TEXT = """This is not a docstring.

        It is only a string of more than eight words."""
        ''',
    )
    assert harvest([tmp_path], workers=1) == [
        Pair(
            "What the module is good for.",
            "The module's docstring has a rest: one, two, three.\n\n    It keeps its \\n lines.",
        ),
        Pair("What the class is good for.", "The class's docstring has a rest: one, two, three."),
        Pair("What the function is good for.", "The function's docstring has a rest: one, two."),
        Pair("What the inner one does.", "The inner docstring has a rest: one, two."),
        Pair("What the last one does.", "The last docstring has a rest: one, two."),
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        "One paragraph only, however long it may turn out to be.",
        f"Too short.\n\n{REST}",
        f"Four --- words, *** no.\n\n{REST}",
        "A query that is long enough.\n\nToo short a rest.",
        f"{'word ' * 65}\n\n{REST}",
        f"A query with one {'long' * 200} word.\n\n{REST}",
        f"A query that is long enough.\n\n{'word ' * 5000}",
    ],
)
def test_too_short_and_too_long_docstrings_are_left_out(tmp_path: Path, docstring: str) -> None:
    (tmp_path / "m.py").write_text(f'"""{docstring}"""\n')
    assert harvest([tmp_path], workers=1) == []


def test_repeated_queries_and_passages_are_left_out(tmp_path: Path) -> None:
    written(tmp_path / "a.py", f'"""The query comes first.\n\n{REST}"""')
    written(tmp_path / "b.py", f'"""the query\ncomes FIRST.\n\nAnother passage. {REST}"""')
    written(tmp_path / "c.py", f'"""Another query is here.\n\n{REST.upper()}"""')
    written(tmp_path / "d.py", f'"""The fourth stays in.\n\nA third passage. {REST}"""')
    queries = [pair.query for pair in harvest([tmp_path], workers=2)]
    assert queries == ["The query comes first.", "The fourth stays in."]


def test_the_number_of_workers_changes_nothing(package: Path) -> None:
    pairs = harvest([package], workers=1)
    assert len(pairs) == 240
    assert [pair.query for pair in pairs[:3]] == [
        f"Return the number {number} again." for number in (0, 1, 4)
    ]
    assert harvest([package], workers=2) == pairs
    assert harvest([package], workers=3) == pairs


def test_tests_and_other_peoples_packages_are_not_read(tmp_path: Path) -> None:
    for folder in ("tests", "test", "site-packages/other"):
        written(tmp_path / folder / "m.py", function(1))
    written(tmp_path / "testing" / "m.py", function(2))
    assert [pair.query for pair in harvest([tmp_path], workers=1)] == ["Return the number 2 again."]


def test_files_that_are_not_valid_python_are_skipped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    written(tmp_path / "a.py", f'"""Never closed in here.\n\n{REST}"""\ndef f(:\n')
    (tmp_path / "b.py").write_bytes(b'"""\xff\xfe is not UTF-8.\n\n"""')
    (tmp_path / "c.py").write_bytes(b'"""A null byte, \x00.\n\n"""')
    (tmp_path / "d.py").symlink_to(tmp_path / "nowhere.py")
    written(tmp_path / "e.py", 'REGEX = "\\d"\n' + function(1))  # valid, with a warning
    written(tmp_path / "f.py", f'"""Half of a pair: \\ud800.\n\n{REST} Two."""')
    assert [pair.query for pair in harvest([tmp_path], workers=2)] == [
        "Return the number 1 again.",
        "Half of a pair: .",
    ]
    assert capfd.readouterr().err == ""


def test_the_folder_is_a_collection_of_its_own(package: Path, cache: Path, tmp_path: Path) -> None:
    demo.write_demo(tmp_path / "demo", [package], workers=2)
    collection = BeirFolder(tmp_path / "demo")
    train, dev = collection.topics("train"), collection.topics("dev")
    assert collection.splits == ["dev", "train"]
    assert len(collection.corpus()) == 240
    assert len(train.queries) + len(dev.queries) == 240
    assert 2 <= len(dev.queries) <= 24
    assert len(collection.examples()) == len(train.queries)
    texts = {
        passage.id: passage.text for batch in collection.corpus().batches() for passage in batch
    }
    for query in [*train.queries, *dev.queries]:
        (passage_id,) = {**train.qrels, **dev.qrels}[query.id]
        assert passage_id != query.id  # BEIR drops a passage that has its query's id
        assert texts[passage_id] == f"{REST} {query.text.split()[3]}"


def test_the_split_of_a_query_does_not_depend_on_the_others(package: Path, tmp_path: Path) -> None:
    demo.write_demo(tmp_path / "all", [package], workers=1)
    demo.write_demo(tmp_path / "half", [package / "folder1"], workers=1)
    everything = {query.text for query in BeirFolder(tmp_path / "all").topics("dev").queries}
    half = {query.text for query in BeirFolder(tmp_path / "half").topics("dev").queries}
    assert half and half < everything


def test_too_few_docstrings_are_an_error_with_both_numbers(tmp_path: Path) -> None:
    written(tmp_path / "package" / "m.py", function(1))
    with pytest.raises(DataError, match=r"needs 100 docstrings and found 1 under .*package"):
        demo.write_demo(tmp_path / "demo", [tmp_path / "package"], workers=1)
    assert not (tmp_path / "demo").exists()


def test_the_demo_is_built_once_per_set_of_versions(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = "1.0"
    monkeypatch.setattr(
        demo, "installed_sources", lambda: [demo.Source("package", version, package)]
    )
    collection = demo.demo_collection()
    assert (collection.name, collection.source) == ("demo", "docstrings of package 1.0")
    assert len(collection.corpus()) == 240

    written(package / "more.py", function(1000))
    assert len(demo.demo_collection().corpus()) == 240
    version = "1.1"
    assert len(demo.demo_collection().corpus()) == 241
    entries = list((cache / "demo").glob("*[0-9a-f]"))
    assert len(entries) == 2
    for entry in entries:
        (entry / "qrels/dev.tsv").unlink()
    assert demo.demo_collection().topics("dev").queries


def test_an_interrupted_build_leaves_no_files_and_no_processes(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[call-overload]
            started.append(self)

    class Interrupted:
        def __enter__(self) -> "Interrupted":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(demo, "progress_bar", lambda *_: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        build_once(
            tmp_path / "cache" / "demo", lambda partial: demo.write_demo(partial, [package], 2)
        )
    assert {path.name for path in (tmp_path / "cache").iterdir()} <= {"demo.lock"}
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


def test_a_worker_that_dies_is_an_error(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WORKER", "raise SystemExit(3)")
    with pytest.raises(DataError, match=r"ended with code 3 at .*m000\.py or before"):
        harvest([package], workers=2)


def test_a_script_without_a_main_guard_can_harvest(package: Path) -> None:
    script = f"""
from pathlib import Path
from mlflow_dr.collection.demo import harvest
print(len(harvest([Path({str(package)!r})], workers=2)))
"""
    written(package.parent / "script.py", script)
    done = subprocess.run(
        [sys.executable, package.parent / "script.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.stdout, done.stderr) == ("240\n", "")


def test_the_sources_are_found_without_importing_them() -> None:
    script = """
import sys
from mlflow_dr.collection.demo import installed_sources
sources = installed_sources()
assert sources == sorted(sources) and len(sources) > 1, sources
for name, version, root in sources:
    assert version and (root / "__init__.py").exists() or name == "python"
    assert name in ("numpy", "pyarrow") or name not in sys.modules, name
assert (dict((s.name, s.root) for s in sources)["python"] / "argparse.py").exists()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=600)
