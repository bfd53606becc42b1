"""The keywords of `train` and `run`, for type checkers: the flags with underscores.

They are our flags and the usual ones of Hugging Face's TrainingArguments; a test holds that they
exist. The other flags and spellings work, too, but type checkers do not know them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from mlflow_dr.api.options import EngineName, Judged, Match, Texts
from mlflow_dr.files import PathLike

TrainingEngine = Literal["torch", "jax"]


class EncoderFlags(TypedDict, total=False):
    """The encoder."""

    model_file: PathLike
    tokenizer_name: PathLike
    cache_dir: PathLike
    untie_encoder: bool
    fix_ctx_encoder: bool
    dropout: float
    add_pooler: bool
    projection_in_dim: int
    projection_out_dim: int
    pooling: str
    normalize: bool
    query_prefix: str
    passage_prefix: str
    do_lower_case: bool
    strip_question_mark: bool
    attn_implementation: str
    append_eos_token: bool
    trust_remote_code: bool
    lora: bool
    lora_name_or_path: PathLike
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    lora_target_modules: str
    lora_publish: Literal["merged", "adapter"]


class LossFlags(TypedDict, total=False):
    """The loss and the gradient cache."""

    loss: str
    temperature: float
    negatives_x_device: bool
    mask_duplicates: bool
    distil_weight: float
    distil_temperature: float
    matryoshka_dims: str
    grad_cache: bool
    gc_q_chunk_size: int
    gc_p_chunk_size: int


class DataFlags(TypedDict, total=False):
    """The training data."""

    recipe: str
    train_dir: PathLike
    validation_dataset: PathLike
    dataset_proc_num: int
    train_files_upsample_rates: str
    token_table: bool
    document_store: str
    validation_split: str
    validation_fraction: float
    train_n_passages: int
    other_negatives: int
    positive_passage_no_shuffle: bool
    q_max_len: int
    p_max_len: int
    passage_field_separator: str


class TrainerFlags(TypedDict, total=False):
    """Hugging Face's TrainingArguments, as far as they are usual."""

    output_dir: PathLike
    overwrite_output_dir: bool
    resume_from_checkpoint: PathLike | bool
    save_strategy: str
    save_steps: float
    save_total_limit: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_train_epochs: float
    max_steps: int
    learning_rate: float
    lr_scheduler_type: str
    lr_scheduler_kwargs: Mapping[str, Any] | str
    warmup_steps: float
    optim: str
    optim_args: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    label_smoothing_factor: float
    bf16: bool
    fp16: bool
    tf32: bool
    gradient_checkpointing: bool
    gradient_checkpointing_kwargs: Mapping[str, Any] | str
    torch_compile: bool
    use_liger_kernel: bool
    neftune_noise_alpha: float
    logging_steps: float
    logging_first_step: bool
    disable_tqdm: bool
    report_to: Texts
    run_name: str
    full_determinism: bool
    seed: int
    data_seed: int
    use_cpu: bool
    dataloader_drop_last: bool
    dataloader_num_workers: int
    dataloader_pin_memory: bool
    dataloader_persistent_workers: bool
    dataloader_prefetch_factor: int
    ddp_timeout: int
    fsdp: str
    fsdp_config: Mapping[str, Any] | str
    deepspeed: Mapping[str, Any] | str


class TrainingFlags(EncoderFlags, LossFlags, DataFlags, TrainerFlags, total=False):
    """What `train` and `run` have in common."""

    config: PathLike
    publish_steps: int
    publish_per_epoch: int
    publish_initial: bool
    tracking_uri: str
    experiment_name: str
    coordinator: str
    n_hosts: int
    host_index: int


class TrainOptions(TrainingFlags, total=False):
    """The keywords of `train`."""

    engine: TrainingEngine


class RunOptions(TrainingFlags, total=False):
    """The keywords of `run`: also what the validator does."""

    training_engine: TrainingEngine
    gpus: int
    measures: Texts
    match: Match
    depth: int
    dtype: str
    engine: EngineName
    subset: Texts
    estimate: bool
    target_error: float
    judged: Judged
    refine: str
    dims: Texts | int | Sequence[int]
    precision: Texts
    keep_up: bool
    name: str
    poll_seconds: float
    metric: str
    patience: int
    min_delta: float
    keep: str
