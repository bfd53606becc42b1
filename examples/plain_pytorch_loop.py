"""A training loop in plain PyTorch whose checkpoints are validated.

Run `python examples/plain_pytorch_loop.py`. All that the loop uses of mlflow_dr is
`publish_checkpoint`. While it runs, or afterwards, start `mlflow-dr validate --run-id RUN` on any
machine. MRR@10 rises from 0.02 to above 0.9 in thirty steps, which take some ten seconds.
"""

from pathlib import Path

import mlflow
import torch
from torch.nn.functional import cross_entropy, normalize

from mlflow_dr import flush_checkpoints, open_collection, publish_checkpoint
from mlflow_dr.encoder.backbone import tiny_encoder
from mlflow_dr.encoder.config import EncoderConfig

# 600 German passages and English questions; yours may be "msmarco" or any folder
SEA = str(Path(__file__).parent / "sea")
TEMPERATURE, BATCH = 0.05, 32

examples = open_collection(SEA).examples()
questions = [example.query.text for example in examples]
answers = [
    f"{passage.title} {passage.text}"
    for passage in examples.passages.passages(example.positives[0] for example in examples)
]

# any Hugging Face model and tokenizer; this one is built here, so nothing is downloaded
torch.manual_seed(0)
tiny = tiny_encoder([*questions, *answers], EncoderConfig())
model, tokenizer = tiny.backbone.train(), tiny.tokenizer


def vectors(texts: list[str]) -> torch.Tensor:
    """Mean pooling and length 1, as given to `publish_checkpoint` below."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    mask = tokens["attention_mask"].unsqueeze(-1)
    states = model(tokens["input_ids"], tokens["attention_mask"])[0]
    return normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def publish(step: int) -> None:
    """Publish from a background thread; the loop waits only for a copy of the weights."""
    publish_checkpoint(
        *(model, step),
        tokenizer=tokenizer,
        pooling="mean",
        normalize=True,
        dataset=SEA,
        split="dev",
        wait=False,
    )


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
with mlflow.start_run() as run:
    publish(0)
    for step in range(1, 31):
        chosen = torch.randperm(len(questions))[:BATCH].tolist()
        queries, passages = ([texts[row] for row in chosen] for texts in (questions, answers))
        scores = vectors(queries) @ vectors(passages).T / TEMPERATURE
        loss = cross_entropy(scores, torch.arange(len(scores)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mlflow.log_metric("train/loss", loss.item(), step)
        if step % 10 == 0:
            publish(step)
    flush_checkpoints()  # before the run ends, because validators leave then

print(f"now: mlflow-dr validate --run-id {run.info.run_id}")
