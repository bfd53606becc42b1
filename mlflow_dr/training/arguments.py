"""Training arguments: our own beside Hugging Face's, under the names that Tevatron's users know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from mlflow_dr.encoder.config import (
    DEFAULT_PASSAGE_LENGTH,
    DEFAULT_QUERY_LENGTH,
    EncoderConfig,
)
from mlflow_dr.training.bi_encoder import PASSAGE, QUERY
from mlflow_dr.training.flags import check_values, flag, upsample_rates
from mlflow_dr.training.loss import Objective


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = flag(
        "bert-base-uncased",
        "An encoder's or backbone's directory, a Hugging Face name, a published checkpoint "
        "(models:/...), or `tiny`: a two-layer BERT from scratch.",
        "--model",
        "--pretrained_model_cfg",
    )
    model_file: str | None = flag(
        None, "A checkpoint file of DPR's or GC-DPR's, whose weights replace the model's."
    )
    tokenizer_name: str | None = flag(
        None, "A tokenizer of another directory or Hugging Face name."
    )
    cache_dir: str | None = flag(None, "Where what comes from the Hugging Face hub is kept.")
    untie_encoder: bool = flag(False, "Give queries weights of their own.")
    fix_ctx_encoder: bool = flag(
        False, "Train the queries' weights only; needs --untie_encoder or two encoders."
    )
    dropout: float | None = flag(
        None, "The backbone's dropout, of hidden states and attention (default: the model's own)."
    )
    add_pooler: bool = flag(False, "Add a linear layer after the pooling.")
    projection_in_dim: int | None = flag(
        None, "What that layer takes (default: what the encoder gives, 768 in BERT)."
    )
    projection_out_dim: int = flag(768, "What that layer gives.")
    pooling: str | None = flag(
        None,
        "cls, mean, last, max, mean_sqrt_len or weighted_mean (default: what the "
        "encoder's directory says; for a bare backbone cls, or mean where the collection has "
        "judgements alone).",
    )
    normalize: bool | None = flag(
        None,
        "Scale vectors to length 1, so that the score is the cosine (default: what the "
        "encoder's directory says; no for a bare backbone).",
    )
    query_prefix: str | None = flag(None, "Put before every query.")
    passage_prefix: str | None = flag(None, "Put before every passage.")
    do_lower_case: bool = flag(False, "Lower-case every text, also where the tokenizer would not.")
    strip_question_mark: bool | None = flag(
        None,
        "Drop one ? at the very end of a query, as DPR does; travels with the checkpoint.",
        nargs="?",
        const=True,
    )
    attn_implementation: str | None = flag(
        None, "transformers' attention: sdpa, eager, flash_attention_2."
    )
    append_eos_token: bool = flag(
        False, "End every text with the tokenizer's end-of-sequence token."
    )
    trust_remote_code: bool = flag(False, "Let code in the backbone's directory run.")
    lora: bool = flag(False, "Train low-rank adapters only (needs peft).")
    lora_name_or_path: str | None = flag(None, "Go on with these adapters; implies --lora.")
    lora_r: int = flag(16, "The adapters' rank.")
    lora_alpha: int = flag(64, "Their scale, times the rank.")
    lora_dropout: float = flag(0.1, "Their dropout.")
    lora_target_modules: str | None = flag(
        None,
        "Names of the layers that get one, with commas (default: the projections of "
        "attention and feed-forward, else all linear layers).",
    )
    lora_publish: str = flag("merged", "What is published: merged weights, or the adapter alone.")

    def __post_init__(self) -> None:
        if self.lora_name_or_path:
            self.lora = True
        check_values(vars(self))


@dataclass
class LossArguments:
    """What it learns from a batch, and how the batch is computed."""

    temperature: float = flag(1.0, "Divides the scores in the loss.")
    negatives_x_device: bool = flag(
        False, "Passages of all processes are negatives.", "--negative_x_device"
    )
    mask_duplicates: bool = flag(
        True, "A query's own positive, in the batch once more, is no negative."
    )
    distil_weight: float = flag(
        0.0, "The share of the loss (0 to 1) that is KL divergence from a teacher."
    )
    distil_temperature: float = flag(0.02, "Divides the teacher's scores.")
    grad_cache: bool = flag(False, "Encode the batch in chunks: the same gradient in less memory.")
    gc_q_chunk_size: int = flag(4, "Queries in a chunk.", "--q_chunk_size")
    gc_p_chunk_size: int = flag(32, "Passages in a chunk.", "--ctx_chunk_size")

    def __post_init__(self) -> None:
        check_values(vars(self))

    def objective(self) -> Objective:
        """The loss that these flags describe."""
        return Objective(
            temperature=self.temperature,
            across_devices=self.negatives_x_device,
            mask_duplicates=self.mask_duplicates,
            distil_weight=self.distil_weight,
            distil_temperature=self.distil_temperature,
        )

    def chunk_sizes(self) -> dict[str, int] | None:
        """Texts in a chunk of the gradient cache, by role; None without it."""
        if not self.grad_cache:
            return None
        return {QUERY: self.gc_q_chunk_size, PASSAGE: self.gc_p_chunk_size}


@dataclass
class DataArguments:
    """What it is trained on."""

    recipe: str | None = flag(
        None,
        "Whose choices stand where no flag does: demo, msmarco, judged, tevatron or dpr "
        "(default: by dataset; dpr with GC-DPR's --train_file).",
    )
    dataset_name: str = flag(
        "demo",
        "demo, msmarco, a folder, irds:<id>, or a Hugging Face name: the collection "
        "that is trained on, and searched by validators. NAME@WEIGHT+NAME@WEIGHT mixes "
        "several.",
        "--dataset",
    )
    train_dir: str | None = flag(
        None,
        "A file or folder of training examples to take instead of the collection's own; "
        "ids in it are the collection's, unless a corpus lies beside it.",
    )
    validation_dataset: str | None = flag(
        None, "The collection that validators search (default: the first trained on)."
    )
    dataset_proc_num: int = flag(
        12, "Processes that tokenise, at most; never more than there are cores.", "--num_proc"
    )
    train_files_upsample_rates: str | None = flag(
        None, "How often each part of a mixture is read in an epoch, such as [1,2]."
    )
    token_table: bool = flag(
        True, "Tokenise all passages ahead, once; else each passage whenever it is read."
    )
    validation_split: str | None = flag(
        None, "The split that validators measure (default: dev, else test)."
    )
    train_n_passages: int = flag(
        8, "Passages per query: one positive, the rest hard negatives.", "--train_group_size"
    )
    other_negatives: int = flag(
        0, "Further negatives of a query that are not hard: DPR's negative_ctxs."
    )
    positive_passage_no_shuffle: bool = flag(
        False, "Always take a query's first positive; else all of them in turn, epoch by epoch."
    )
    q_max_len: int = flag(DEFAULT_QUERY_LENGTH, "Tokens of a query at most.", "--query_max_len")
    p_max_len: int = flag(
        DEFAULT_PASSAGE_LENGTH, "Tokens of a passage at most.", "--passage_max_len"
    )
    passage_field_separator: str = flag(" ", "Stands between a passage's title and text.")

    def __post_init__(self) -> None:
        check_values(vars(self))
        upsample_rates(self.train_files_upsample_rates)


@dataclass
class PublishArguments:
    """What goes to MLflow."""

    publish_steps: int = flag(500, "Publish a checkpoint every so many steps; 0: at the end.")
    publish_per_epoch: int | None = flag(
        None,
        "Publish a checkpoint so many times an epoch, instead of --publish_steps.",
        "--eval_per_epoch",
    )
    publish_initial: bool = flag(True, "Publish the encoder before the first step, too.")
    tracking_uri: str | None = flag(None, "The tracking server (default: MLFLOW_TRACKING_URI).")
    experiment_name: str | None = flag(None, "The experiment of a new run.")

    def __post_init__(self) -> None:
        check_values(vars(self))


# dataclass fields behind a function: ruff cannot see that they are no shared defaults
# ruff: noqa: RUF009
@dataclass
class RetrieverTrainingArguments(TrainingArguments):
    """Hugging Face's arguments, with defaults for publishing to MLflow instead of saving here."""

    output_dir: str | None = flag("outputs", "Where --save_steps writes checkpoints.")
    save_strategy: SaveStrategy | str = flag(
        "no", "no, steps or epoch; --save_steps alone means steps."
    )
    overwrite_output_dir: bool = flag(
        False, "Remove the checkpoints of another training from --output_dir."
    )
    resume_from_checkpoint: str | None = flag(
        None,
        "Go on from the last whole checkpoint in --output_dir (or from this one), in "
        "the same MLflow run.",
        nargs="?",
        const="true",
    )
    warmup_steps: float = flag(
        0.1,
        "Steps in which the learning rate rises; below 1, that share of all steps.",
        "--warmup_ratio",
    )
    logging_steps: float = flag(10, "Log every so many steps.", "--log_batch_step")
    run_name: str | None = flag(None, "The name of the MLflow run.")
    per_device_train_batch_size: int = flag(
        8, "Queries in a batch, in each training process.", "--batch_size"
    )
    adam_epsilon: float = flag(1e-8, "Adam's epsilon.", "--adam_eps")
    use_cpu: bool = flag(False, "Train on the processor.", "--no_cuda")
    # HfArgumentParser takes the second type of a union that has None: a string
    report_to: None | str | list[str] = flag(  # noqa: RUF036
        "none", "Further integrations; MLflow is always written to.", nargs="+"
    )

    def __post_init__(self) -> None:
        check_values(vars(self))
        # the usual names; Trainer warns of them because it has newer ones
        for usual, newer in (
            ("gradient_checkpointing", "activation_checkpointing"),
            ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ):
            if getattr(self, newer) is None:
                setattr(self, newer, getattr(self, usual))
        super().__post_init__()


@dataclass(frozen=True)
class TrainingRequest:
    """Everything that `mlflow-dr train` was asked.

    `bare_pooling` is the pooling of a backbone whose directory and whose user name none.
    """

    model: ModelArguments
    loss: LossArguments
    data: DataArguments
    publish: PublishArguments
    trainer: RetrieverTrainingArguments
    bare_pooling: str = "cls"

    def encoder_changes(self) -> dict[str, Any]:
        """What the flags say about the encoder; the rest stays as its directory says."""
        wanted = {
            "pooling": self.model.pooling,
            "normalize": self.model.normalize,
            "query_prompt": self.model.query_prefix,
            "passage_prompt": self.model.passage_prefix,
            "query_max_length": self.data.q_max_len,
            "passage_max_length": self.data.p_max_len,
            "title_separator": self.data.passage_field_separator,
            "strip_question_mark": self.model.strip_question_mark,
        }
        return {key: value for key, value in wanted.items() if value is not None}

    def fresh_encoder_config(self) -> EncoderConfig:
        """The configuration of an encoder that is made from scratch."""
        return EncoderConfig(**{"pooling": self.bare_pooling, **self.encoder_changes()})
