"""Fields that the configurations of several commands share: their types, checks and help texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from mlflow_dr.collection.asyncval import given_collection
from mlflow_dr.config import Config, Flag, as_tuple, checked
from mlflow_dr.devices import dtype_name
from mlflow_dr.encoder.config import SHORTEST, EncoderConfig, changes_of
from mlflow_dr.errors import UsageError, quoted
from mlflow_dr.retrieval.measures import parse_measures
from mlflow_dr.retrieval.vector_form import parse_dims, parse_precisions
from mlflow_dr.subsets.spec import parse_subset

DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")
LARGEST = 10**15  # of counts, seeds and seconds
FILE_FIELDS = ("dataset", "candidate_dir", "query_files", "qrel_files")


def as_texts(value: Any) -> Any:
    """Whole numbers of a YAML file as texts."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(each) if type(each) is int else each for each in values)


def check_device(name: str) -> None:
    """Refuse a name that is not a device's; whether this machine has the device is checked later.

    Raises:
        UsageError: with what is expected.
    """
    if not DEVICE.fullmatch(name):
        raise UsageError(
            f"device {quoted(name)} is not a device; expected auto, cpu, cuda or cuda:<n>"
        )


def check_device_names(names: str) -> None:
    """Refuse names, between commas, of which one is not a device's.

    Raises:
        UsageError: with what is expected.
    """
    for name in names.split(","):
        check_device(name)


def check_search_backend(name: str) -> None:
    """Refuse a search back end that does not exist.

    Raises:
        UsageError: with those that do.
    """
    if name != "auto":
        from mlflow_dr.retrieval.search import SEARCH_BACKENDS  # imports torch

        SEARCH_BACKENDS.get(name)


def _check_keep_rules(text: str) -> None:
    """Refuse a rule of what to keep that does not exist.

    Raises:
        UsageError: with those that do.
    """
    from mlflow_dr.decisions.pruning import parse_keep_rules  # imports mlflow

    parse_keep_rules(text)


def joined(value: Any) -> Any:
    """Several words as one text."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _absolute(name: str) -> str:
    """The absolute path of a directory, so that validators in other directories find it."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def _check_pooling(name: str) -> None:
    EncoderConfig(pooling=name)


File = Annotated[Path, Strict(False)]
Files = Annotated[tuple[File, ...], BeforeValidator(as_tuple)]
Texts = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Length = Annotated[int, Field(ge=SHORTEST, le=LARGEST)]

Dataset = Annotated[
    str | None,
    Field(
        description="demo, msmarco, a folder, irds:<id>, a hub name such as mteb/scifact, or what "
        "else `mlflow-dr datasets` lists."
    ),
]
RUN = Field(description="The MLflow run: its id, the beginning of its id, or its name.")
RunName = Annotated[str | None, RUN]
TrackingUri = Annotated[
    str | None, Field(description="The tracking server (default: MLFLOW_TRACKING_URI).")
]
CheckpointsDir = Annotated[
    File | None,
    Flag("--checkpoints-dir", "--ckpts-dir"),
    Field(
        description="A directory in which a trainer saves checkpoints (Tevatron, "
        "sentence-transformers, Hugging Face), instead of a run."
    ),
]
Every = Annotated[Count, Field(description="Only checkpoints whose step this number divides.")]
KeepRules = Annotated[str, AfterValidator(checked(_check_keep_rules))]
Seed = Annotated[int, Field(ge=0, le=LARGEST, description="Random seed for sampling.")]
Measures = Annotated[
    str,
    BeforeValidator(joined),
    AfterValidator(checked(parse_measures)),
    Flag("--measures", "--metrics", several=True),
    Field(
        description="What to measure: mrr, ndcg, recall, map, precision or success, each with @k; "
        "accuracy@k where queries have answers; average_rank@k and nll@k of pool:FILE."
    ),
]
Match = Annotated[
    Literal["string", "regex", "kilt"],
    Field(
        description="When a passage holds an answer: string (its words in a row), regex (answers "
        "are regular expressions, as CuratedTREC's), or kilt (KILT's rule)."
    ),
]
Depth = Annotated[
    Count | None,
    Field(description="Passages to rank per query (default: the largest cut-off measured)."),
]
Device = Annotated[
    str, AfterValidator(checked(check_device)), Field(description="auto, cpu, cuda or cuda:<n>.")
]
Devices = Annotated[
    str,
    AfterValidator(checked(check_device_names)),
    Field(
        description="auto, cpu, cuda or cuda:<n>; several between commas, such as cuda:0,cuda:1, "
        "encode side by side."
    ),
]
EngineName = Annotated[
    Literal["local", "ray"],
    Field(
        description="Where encoding runs: local on this machine, or ray on every device of a Ray "
        "cluster (RAY_ADDRESS; without it, one of this machine is started)."
    ),
]
Dtype = Annotated[
    str,
    AfterValidator(checked(dtype_name)),
    Field(
        description="Number format: auto (bf16 where it is faster, else fp32), fp32, bf16 or "
        "fp16. PyTorch's names (float32, bfloat16, float16) work, too."
    ),
]
KeepOwnId = Annotated[
    bool,
    Field(
        description="Keep a passage whose id is the query's id. BEIR's convention leaves it out."
    ),
]
SearchBackendName = Annotated[
    str,
    AfterValidator(checked(check_search_backend)),
    Field(
        description="What compares vectors: torch (auto), faiss, or the search back end of another "
        "package."
    ),
]
Subsets = Annotated[
    Texts,
    AfterValidator(checked(lambda texts: [parse_subset(text) for text in texts])),
    Field(
        description="Encode only a part of the corpus, and the judged passages: random:N or "
        "random:P%, bm25@K, ranking:FILE@K, pool:FILE,FILE@K, encoder:NAME@K, rerank:FILE@K, "
        "queries:N, full; joined by +."
    ),
]
Estimated = Annotated[
    bool,
    Field(
        description="Estimate the values on the full corpus, with 95 % intervals, from the random "
        "sample that --subset names, such as random:5%. The validation is called NAME-est."
    ),
]
TargetError = Annotated[
    float | None,
    Field(
        gt=0,
        lt=1,
        description="With --estimate, choose the size of the random sample so that intervals are "
        "about this far from the value on either side, such as 0.01.",
    ),
]
Dims = Annotated[
    Texts,
    BeforeValidator(as_texts),
    AfterValidator(checked(parse_dims)),
    Field(
        description="Also measure vectors that keep only their first dimensions, such as 64,256. "
        "These figures have 64d in their names."
    ),
]
Precisions = Annotated[
    Texts,
    AfterValidator(checked(parse_precisions)),
    Field(
        description="Also measure passages that are stored as int8 or binary, such as int8,binary. "
        "These figures have int8 in their names."
    ),
]
Judged = Annotated[
    Literal["relevant", "all"],
    Field(description="Which judged passages every subset includes."),
]
Output = Annotated[File, Field(description="Where to write.")]
Force = Annotated[bool, Field(description="Replace files that exist.")]
TrustRemoteCode = Annotated[
    bool, Field(description="Allow Python code in an encoder's directory to run.")
]


class CollectionConfig(Config):
    """A collection: by its name, or by its files as Asyncval takes them."""

    dataset: Dataset = None
    candidate_dir: File | None = None
    """Instead of --dataset: a file or folder of passages as JSON lines with text_id and text (a
    string or token ids). Needs --query-files and --qrel-files."""
    query_files: Annotated[Files, Flag("--query-files", "--query-file")] = ()
    """Queries as JSON lines. Of several files, each is a split named after its file."""
    qrel_files: Annotated[Files, Flag("--qrel-files", "--qrel-file")] = ()
    """Judgements (TREC or BEIR): one file for all query files, or one each."""

    def named_dataset(self) -> tuple[str | None, tuple[str, ...]]:
        """The dataset's name, None if there is none, and the splits of its query files.

        Raises:
            UsageError: both a name and files, not all of the files, or one that does not exist.
        """
        candidates = [self.candidate_dir] if self.candidate_dir else []
        files = (candidates, self.query_files, self.qrel_files)
        for path in (path for paths in files for path in paths):
            if not path.exists():
                raise UsageError(f"{path}: no such file or folder")
        name, splits = given_collection(self.dataset, files, FILE_FIELDS)
        return name, tuple(splits)

    def required_dataset(self) -> tuple[str, tuple[str, ...]]:
        """As `named_dataset`, where a dataset is needed.

        Raises:
            UsageError: no dataset, or as `named_dataset`.
        """
        name, splits = self.named_dataset()
        if name is None:
            raise UsageError("give --dataset, or --candidate-dir, --query-files and --qrel-files")
        return name, splits

    def one_dataset(self, split: str | None) -> tuple[str, str | None]:
        """The dataset's name and the split, where exactly one of each is needed.

        Args:
            split: as given; None leaves it to the collection.

        Raises:
            UsageError: no dataset, or several query files and no split.
        """
        name, splits = self.required_dataset()
        if len(splits) > 1 and not split:
            raise UsageError(f"several query files: choose one by --split {' or '.join(splits)}")
        return name, split or next(iter(splits), None)


class EncoderOverrides(Config):
    """What replaces settings of the encoder's directory."""

    pooling: Annotated[str, AfterValidator(checked(_check_pooling))] | None = None
    """Use this pooling instead of the one in the encoder's directory."""
    normalize: Annotated[bool | None, Flag(off="--no-normalize")] = None
    """Scale vectors to length 1, or not, whatever the directory says."""
    max_length: Length | None = None
    """Longest query and passage, in tokens."""
    q_max_len: Length | None = None
    """Longest query, in tokens."""
    p_max_len: Length | None = None
    """Longest passage, in tokens."""
    tokenizer: Annotated[
        Annotated[str, AfterValidator(_absolute)] | None,
        Flag("--tokenizer", "--tokenizer-name-or-path"),
    ] = None
    """Use the tokenizer of this directory or hub name."""

    @property
    def encoder_changes(self) -> dict[str, Any]:
        """The given values, as `load_encoder` takes them."""
        query_length = self.q_max_len or self.max_length
        passage_length = self.p_max_len or self.max_length
        return changes_of(
            self.pooling, self.normalize, query_length, passage_length, self.tokenizer
        )


class LoadConfig(EncoderOverrides):
    """How `mlflow_dr.load_encoder` reads an encoder."""

    trust_remote_code: TrustRemoteCode = False
    tracking_uri: TrackingUri = None
