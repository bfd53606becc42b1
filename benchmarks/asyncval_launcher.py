"""Asyncval's own program with a DenseModel for sentence encoders; `benchmarks.asyncval` starts it.

It runs in the environment that has asyncval, so it imports nothing of mlflow_dr. Asyncval asks its
users to rewrite DenseModel; this one is a backbone with mean pooling and vectors of length 1.
Where there is no CUDA device, "cuda" is the processor. Figures are printed as lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields
from typing import Any

import asyncval.__main__ as program
import torch
from asyncval import callbacks
from asyncval.arguments import AsyncvalArguments
from asyncval.modeling import Encoder
from transformers import AutoModel, BatchEncoding

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DenseModel(Encoder):
    """A backbone with mean pooling and vectors of length 1, in the format of ASYNCVAL_DTYPE."""

    def __init__(self, ckpt_path: str, async_args: AsyncvalArguments) -> None:
        super().__init__(ckpt_path, async_args)
        dtype = DTYPES[os.environ["ASYNCVAL_DTYPE"]]
        self.backbone = AutoModel.from_pretrained(ckpt_path, torch_dtype=dtype)

    def encode_passage(self, psg: Any) -> torch.Tensor:
        mask = psg["attention_mask"]
        states = self.backbone(input_ids=psg["input_ids"], attention_mask=mask)[0].float()
        total = (states * mask[..., None]).sum(1)
        return torch.nn.functional.normalize(total / mask.sum(1, keepdim=True), dim=-1)

    encode_query = encode_passage

    def forward(self, input_ids: Any, attention_mask: Any, is_query: bool = False) -> torch.Tensor:
        return self.encode_passage({"input_ids": input_ids, "attention_mask": attention_mask})


class PrintFigures:
    """Asyncval shows its figures to callbacks only."""

    def log(self, args: Any, figures: dict[str, float], step: int) -> None:
        print(json.dumps(figures), flush=True)


def use_processor(kind: type) -> None:
    """Make the method `to` of a class take "cuda" for the processor."""
    to = kind.to  # type: ignore[attr-defined]

    def to_processor(self: Any, device: Any, *rest: Any, **named: Any) -> Any:
        return to(self, "cpu" if device == "cuda" else device, *rest, **named)

    kind.to = to_processor  # type: ignore[attr-defined]


def main() -> None:
    """Run Asyncval with the command line's flags."""
    program.DenseModel = DenseModel
    callbacks.INTEGRATION_TO_CALLBACK["print"] = PrintFigures
    is_release = "device" in {field.name for field in fields(AsyncvalArguments)}
    if is_release:  # version 0.2.0, which writes rankings by default
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        sys.argv += ["--device", device, "--write_run", "False"]
    elif not torch.cuda.is_available():
        for kind in (torch.nn.Module, BatchEncoding):
            use_processor(kind)
    program.main()


if __name__ == "__main__":
    main()
