"""The flags of training: Hugging Face's TrainingArguments, and ours under Tevatron's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.encoder.config import (
    DEFAULT_PASSAGE_LENGTH,
    DEFAULT_QUERY_LENGTH,
    EncoderConfig,
)
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.retrieval.vector_form import check_dims, parse_dims
from mlflow_dr.training.batches import PASSAGE, QUERY
from mlflow_dr.training.flags import TORCH, check_values, flag, upsample_rates
from mlflow_dr.training.loss import Objective


@dataclass
class ModelArguments:
    """Flags of the encoder."""

    model_name_or_path: str = flag(
        "bert-base-uncased",
        "The directory of an encoder or a backbone, a Hugging Face name, a published checkpoint "
        "(models:/...), or `tiny`: a two-layer BERT from scratch.",
        "--model",
        "--pretrained_model_cfg",
    )
    model_file: str | None = flag(
        None, "A checkpoint file of DPR or GC-DPR; its weights replace those of the model."
    )
    tokenizer_name: str | None = flag(None, "Directory or Hugging Face name of another tokenizer.")
    cache_dir: str | None = flag(None, "Directory for files from the Hugging Face hub.")
    untie_encoder: bool = flag(False, "Use separate weights for queries and passages.")
    fix_ctx_encoder: bool = flag(
        False, "Train only the query encoder; needs --untie_encoder or a model with two encoders."
    )
    dropout: float | None = flag(
        None, "Dropout of the backbone's hidden states and attention (default: as in the model)."
    )
    add_pooler: bool = flag(False, "Add a linear layer after the pooling.")
    projection_in_dim: int | None = flag(
        None, "Input size of that layer (default: the encoder's size, 768 for BERT)."
    )
    projection_out_dim: int = flag(768, "Output size of that layer.")
    pooling: str | None = flag(
        None,
        "cls, mean, last, max, mean_sqrt_len or weighted_mean (default: as in the encoder's "
        "directory; for a bare backbone cls, or mean if the collection has no hard negatives).",
    )
    normalize: bool | None = flag(
        None,
        "Scale vectors to length 1, so that the score is the cosine (default: as in the "
        "encoder's directory; false for a bare backbone).",
    )
    query_prefix: str | None = flag(None, "Text that is put before each query.")
    passage_prefix: str | None = flag(None, "Text that is put before each passage.")
    do_lower_case: bool = flag(False, "Lower-case all texts, even if the tokenizer does not.")
    strip_question_mark: bool | None = flag(
        None,
        "Remove one ? from the end of each query, as DPR does; saved in the checkpoint.",
        nargs="?",
        const=True,
    )
    attn_implementation: str | None = flag(
        None,
        "Attention implementation of transformers: sdpa, eager or flash_attention_2 (default: "
        "sdpa, or our own where a GPU can do without padding).",
    )
    append_eos_token: bool = flag(
        False, "End each text with the tokenizer's end-of-sequence token."
    )
    trust_remote_code: bool = flag(False, "Allow code from the backbone's directory to run.")
    lora: bool = flag(False, "Train only low-rank adapters (needs peft).")
    lora_name_or_path: str | None = flag(None, "Continue training these adapters; implies --lora.")
    lora_r: int = flag(16, "Rank of the adapters.")
    lora_alpha: int = flag(64, "Scale of the adapters, times the rank.")
    lora_dropout: float = flag(0.1, "Dropout of the adapters.")
    lora_target_modules: str | None = flag(
        None,
        "Names of the layers that get an adapter, separated by commas (default: the projections "
        "of attention and feed-forward, else all linear layers).",
    )
    lora_publish: str = flag(
        "merged", "merged: publish merged weights; adapter: publish only the adapter."
    )

    def __post_init__(self) -> None:
        if self.lora_name_or_path:
            self.lora = True


@dataclass
class LossArguments:
    """Flags of the loss and of the gradient cache."""

    loss: str = flag(
        "contrastive",
        "contrastive, distillation (from a teacher's scores alone), or a loss of another package.",
    )
    temperature: float = flag(1.0, "Divides the scores in the loss.")
    negatives_x_device: bool = flag(
        False, "Use the passages of all processes as negatives.", "--negative_x_device"
    )
    mask_duplicates: bool = flag(
        True, "Do not use other copies of a query's positive in the batch as negatives."
    )
    distil_weight: float = flag(
        0.0, "Weight of the KL divergence from a teacher's scores in the loss, 0 to 1."
    )
    distil_temperature: float = flag(0.02, "Divides the teacher's scores.")
    matryoshka_dims: str | None = flag(
        None,
        "Train the first dimensions of vectors, too, so that they can be used alone: 64,256. The "
        "losses of all dimensions and of each number are added up.",
    )
    grad_cache: bool = flag(
        False, "Encode the batch in chunks; the gradient is the same, with less memory."
    )
    gc_q_chunk_size: int = flag(4, "Queries in a chunk of the gradient cache.", "--q_chunk_size")
    gc_p_chunk_size: int = flag(
        32, "Passages in a chunk of the gradient cache.", "--ctx_chunk_size"
    )

    def __post_init__(self) -> None:
        self._dims()  # refuses

    def _dims(self) -> tuple[int, ...]:
        return parse_dims([self.matryoshka_dims]) if self.matryoshka_dims is not None else ()

    def objective(self, encoder: Encoder | None = None) -> Objective:
        """The objective that these flags describe.

        Args:
            encoder: what is trained, to normalise vectors of fewer dimensions as it does.

        Raises:
            UsageError: its vectors have fewer dimensions than `--matryoshka_dims`.
        """
        if encoder is not None:
            check_dims(self._dims(), encoder.dimension)
        return Objective(
            temperature=self.temperature,
            across_devices=self.negatives_x_device,
            mask_duplicates=self.mask_duplicates,
            distil_weight=self.distil_weight,
            distil_temperature=self.distil_temperature,
            loss=self.loss,
            matryoshka_dims=self._dims(),
            normalize=encoder is not None and encoder.settings.normalize,
        )

    def chunk_sizes(self) -> dict[str, int] | None:
        """Texts in a chunk of the gradient cache, by role; None without the cache."""
        if not self.grad_cache:
            return None
        return {QUERY: self.gc_q_chunk_size, PASSAGE: self.gc_p_chunk_size}


@dataclass
class DataArguments:
    """Flags of the training data."""

    recipe: str | None = flag(
        None,
        "Defaults of flags: demo, msmarco, judged, tevatron or dpr (default: by dataset; dpr with "
        "GC-DPR's --train_file).",
    )
    dataset_name: str = flag(
        "demo",
        "The collection to train on and to validate on: demo, msmarco, a folder, irds:<id>, or a "
        "Hugging Face name. NAME@WEIGHT+NAME@WEIGHT mixes several.",
        "--dataset",
    )
    train_dir: str | None = flag(
        None,
        "A file or folder of training examples that replace those of the collection; its passage "
        "ids are those of the collection, unless the folder has a corpus.",
    )
    validation_dataset: str | None = flag(
        None, "The collection or suite to validate on (default: the first of --dataset)."
    )
    dataset_proc_num: int = flag(
        12, "Largest number of processes that tokenise; at most the number of cores.", "--num_proc"
    )
    train_files_upsample_rates: str | None = flag(
        None, "How often each dataset of a mixture is read in an epoch, such as [1,2]."
    )
    token_table: bool = flag(
        True, "Tokenise all passages once before training; otherwise each passage when it is read."
    )
    document_store: str = flag(
        "corpus",
        "With --token_table false, where passages are read: corpus, lookup, memory, or another "
        "document store.",
    )
    validation_split: str | None = flag(None, "The split to validate on (default: dev, else test).")
    validation_fraction: float | None = flag(
        None,
        "Hold this share of the training queries out, such as 0.05, and validate on them: the "
        "split `held-out`.",
    )
    train_n_passages: int = flag(
        8, "Passages per query: one positive, and hard negatives.", "--train_group_size"
    )
    other_negatives: int = flag(
        0, "Further negatives per query that are not hard: DPR's negative_ctxs."
    )
    positive_passage_no_shuffle: bool = flag(
        False, "Always use a query's first positive; otherwise another one in each epoch."
    )
    q_max_len: int = flag(DEFAULT_QUERY_LENGTH, "Longest query, in tokens.", "--query_max_len")
    p_max_len: int = flag(
        DEFAULT_PASSAGE_LENGTH, "Longest passage, in tokens.", "--passage_max_len"
    )
    passage_field_separator: str = flag(" ", "Text between the title and the text of a passage.")


@dataclass
class PublishArguments:
    """Flags of MLflow."""

    publish_steps: int = flag(
        500, "Steps between two published checkpoints; 0 publishes at the end only."
    )
    publish_per_epoch: int | None = flag(
        None,
        "Published checkpoints per epoch, instead of --publish_steps.",
        "--eval_per_epoch",
    )
    publish_initial: bool = flag(True, "Also publish the encoder before the first step.")
    tracking_uri: str | None = flag(None, "The tracking server (default: MLFLOW_TRACKING_URI).")
    experiment_name: str | None = flag(None, "The experiment of a new run.")


@dataclass
class EngineArguments:
    """Flags of the library that computes the steps."""

    engine: str = flag(TORCH, "torch, or jax for TPUs (needs the extra jax).", "--training_engine")
    coordinator: str | None = flag(
        None,
        "With --engine jax on several hosts: address and port of the first one, or `auto` for "
        "Cloud TPU, Slurm, Kubernetes and MPI.",
    )
    n_hosts: int | None = flag(None, "Number of hosts, with --coordinator HOST:PORT.")
    host_index: int | None = flag(None, "This host, counted from 0, with --coordinator HOST:PORT.")
    compile_only: str | None = flag(
        None,
        "Train nothing: compile a step of --engine jax for a TPU, such as v5e:2x4, and print "
        "whether it fits into its memory (needs libtpu, no TPU).",
    )


# ruff does not see that `flag` makes dataclass fields
# ruff: noqa: RUF009
@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """Hugging Face's arguments, with defaults for publishing to MLflow instead of saving here."""

    output_dir: str | None = flag("outputs", "Directory for checkpoints to resume from.")
    save_strategy: SaveStrategy | str = flag(
        "no", "no, steps or epoch; --save_steps implies steps."
    )
    overwrite_output_dir: bool = flag(
        False, "Remove the checkpoints of another training from --output_dir."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Resume from this checkpoint, or without a value from the last complete checkpoint in "
        "--output_dir; the MLflow run is the same.",
        nargs="?",
        const="true",
    )
    warmup_steps: float = flag(
        0.1,
        "Steps while the learning rate rises; below 1, a share of all steps.",
        "--warmup_ratio",
    )
    logging_steps: float = flag(10, "Steps between two logged losses.", "--log_batch_step")
    run_name: str | None = flag(None, "The name of the MLflow run.")
    per_device_train_batch_size: int = flag(
        8, "Queries in a batch, in each training process.", "--batch_size"
    )
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.", "--adam_eps")
    use_cpu: bool = flag(False, "Train on the CPU.", "--no_cuda")
    # HfArgumentParser takes the second type of a union with None: a string
    report_to: None | str | list[str] = flag(  # noqa: RUF036
        "none", "Further integrations; metrics always go to MLflow.", nargs="+"
    )

    def __post_init__(self) -> None:
        # Trainer warns about the usual names, because it has newer ones
        for usual, newer in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if getattr(self, newer) is None:
                setattr(self, newer, getattr(self, usual))
        super().__post_init__()


@dataclass(frozen=True)
class TrainingRequest:
    """All flags of `mlflow-dr train`.

    `bare_pooling` is the pooling of a backbone, if neither its directory nor a flag names one.
    """

    model: ModelArguments
    loss: LossArguments
    data: DataArguments
    publish: PublishArguments
    trainer: RetrieverTrainingArguments
    bare_pooling: str = "cls"
    engine: EngineArguments = field(default_factory=EngineArguments)

    def __post_init__(self) -> None:
        for arguments in (
            *(self.model, self.loss, self.data, self.publish, self.trainer, self.engine),
        ):
            check_values(vars(arguments))
        upsample_rates(self.data.train_files_upsample_rates)

    @property
    def output(self) -> Path:
        """The directory of checkpoints to resume from."""
        return Path(str(self.trainer.output_dir))

    @property
    def saves(self) -> bool:
        """Whether the training saves checkpoints to resume from."""
        return bool(self.trainer.save_strategy != SaveStrategy.NO)

    def encoder_changes(self) -> dict[str, Any]:
        """The settings of the encoder that flags change."""
        settings = {
            "pooling": self.model.pooling,
            "normalize": self.model.normalize,
            "query_prompt": self.model.query_prefix,
            "passage_prompt": self.model.passage_prefix,
            "query_max_length": self.data.q_max_len,
            "passage_max_length": self.data.p_max_len,
            "title_separator": self.data.passage_field_separator,
            "strip_question_mark": self.model.strip_question_mark,
        }
        return {key: value for key, value in settings.items() if value is not None}

    def fresh_encoder_config(self) -> EncoderConfig:
        """The configuration of an encoder from scratch."""
        return EncoderConfig(**{"pooling": self.bare_pooling, **self.encoder_changes()})
