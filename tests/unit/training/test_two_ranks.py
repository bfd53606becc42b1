"""Two processes with half the batch each, held against one process with the whole batch."""

import copy
import socket
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks

from mlflow_dr.encoder.lora import add_lora
from mlflow_dr.encoder.model import Encoder, untie
from mlflow_dr.stores.token_table import token_table
from mlflow_dr.training.batches import Group, Texts, TrainingSet
from mlflow_dr.training.bi_encoder import BiEncoder
from mlflow_dr.training.data import Mixture
from mlflow_dr.training.encoder_setup import collator_of
from mlflow_dr.training.loss import Objective

SIZES = {"query": 2, "passage": 3}
ALONE = Objective(0.05, distil_weight=0.3, distil_temperature=0.5)
ACROSS = Objective(0.05, distil_weight=0.3, distil_temperature=0.5, across_devices=True)
APART = Objective(0.05, distil_weight=0.3, distil_temperature=0.5)

STEPS = {
    f"{encoder}, {'cached' if cached else 'plain'}, {n} batches": (encoder, cached, n)
    for encoder, cached, n in product(("tied", "untied", "lora"), (True, False), (1, 2))
}
TRAINER = {"trainer, cached": True, "trainer, plain": False}
EPOCHS = [f"{what}, {kind}" for kind in ("one set", "mixture") for what in ("whole", "resumed")]


Found = dict[str, Any]


@pytest.fixture
def encoders(make_small: Callable[..., Encoder]) -> dict[str, Encoder]:
    made = {name: make_small(normalize=True) for name in ("tied", "untied", "lora")}
    untie(made["untied"])
    torch.manual_seed(4)
    add_lora(made["lora"], "base", rank=2, alpha=4, dropout=0.0)
    generator = torch.Generator().manual_seed(5)
    for name, weight in (pair for model in made.values() for pair in model.named_parameters()):
        if name.startswith("untied_query_encoder") or ".lora_B." in name:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return {name: weight.double() for name, weight in made.items()}


@pytest.fixture
def batches(make_texts: Callable[..., Texts]) -> list[dict[str, Any]]:
    """Two batches of 10 queries with 2 passages each; passages 0 and 18 are one."""
    return [
        {
            "query": make_texts([2 + 3 * i % 5 for i in range(10)], seed),
            "passage": make_texts([3 + 5 * i % 11 for i in range(20)], seed),
            "keys": torch.tensor([18, *range(1, 20)]),
            "teacher": torch.rand(10, 2, generator=torch.Generator().manual_seed(seed)),
        }
        for seed in range(2)
    ]


def arguments(size: int, **others: Any) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "use_cpu": True,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "warmup_steps": 0,
        "disable_tqdm": True,
        **others,
    }


def over_epochs(size: int, mixed: bool) -> dict[str, Any]:
    """Three epochs of two steps each, or of four; kept amid the second."""
    per_epoch = 4 if mixed else 2
    return arguments(
        size,
        gradient_accumulation_steps=1,
        max_steps=3 * per_epoch,
        save_strategy="steps",
        save_steps=per_epoch + 1,
    )


def sets_of(encoder: Encoder, colours: Any, set_of: Callable[..., TrainingSet]) -> dict[str, Any]:
    """A training set and a mixture that another process can be given."""

    def listed(first_key: int) -> TrainingSet:
        chosen = set_of(encoder, colours, 2, first_key=first_key)
        queries = token_table(chosen._queries.get_many(range(len(colours))))
        passages = token_table(chosen._passages.get_many(range(len(colours.passages))))
        return TrainingSet(colours.examples, queries, passages, 2, seed=0, first_key=first_key)

    return {"one set": listed(0), "mixture": Mixture([listed(0), listed(1000)], [2.0, 1.0], seed=0)}


@pytest.fixture
def groups(
    encoders: dict[str, Encoder], colours: Any, set_of: Callable[..., TrainingSet]
) -> list[Group]:
    chosen = set_of(encoders["tied"], colours, 3)
    return [chosen[index] for index in range(len(chosen))]


@pytest.fixture
def cases(
    batches: list[dict[str, Any]],
    encoders: dict[str, Encoder],
    groups: list[Group],
    colours: Any,
    set_of: Callable[..., TrainingSet],
) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for name, (encoder, cached, n) in STEPS.items():
        for objective in (ACROSS, APART):
            made[f"{name}, {objective.across_devices}"] = {
                "kind": "steps",
                "encoder": encoder,
                "objective": objective,
                "sizes": SIZES if cached else None,
                "batches": batches[:n],
            }
    for name, cached in TRAINER.items():
        made[name] = {
            "kind": "trainer",
            "encoder": name,
            "objective": Objective(0.05, across_devices=True),
            "sizes": SIZES if cached else None,
            "arguments": {**arguments(2), "ddp_backend": "gloo"},
            "training_set": list(groups),
            "collator": collator_of(encoders["tied"]),
            "directory": name,
            "resumed": None,
        }
    sets = sets_of(encoders["tied"], colours, set_of)
    for name in EPOCHS:
        what, kind = name.split(", ")
        settings = over_epochs(2, kind == "mixture")
        made[name] = {
            "kind": "trainer",
            "encoder": name,
            "objective": Objective(0.05, across_devices=True),
            "sizes": None,
            "arguments": {**settings, "ddp_backend": "gloo"},
            "training_set": sets[kind],
            "collator": collator_of(encoders["tied"]),
            "directory": kind,
            "resumed": f"checkpoint-{settings['save_steps']}" if what == "resumed" else None,
        }
    return made


kept: list[list[Found]] = []
"""What both ranks found, once they were asked; empty results where they failed."""


@pytest.fixture
def ranks(
    forks: Forks, cases: dict[str, Any], encoders: dict[str, Encoder], tmp_path: Path
) -> list[Found]:
    """The results of each rank, computed once in two processes for all tests of this file."""
    if not kept:
        kept.append([{}, {}])
        directory = tmp_path
        trained = {name: copy.deepcopy(encoders["tied"]) for name in (*TRAINER, *EPOCHS)}
        given = {"cases": cases, "encoders": {**encoders, **trained}}
        torch.save(given, directory / "given.pt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = Path(__file__).parent / "two_ranks.py"
        done = forks.call(*("python", script, directory, port), variables={}, directory=directory)
        assert done.returncode == 0, done.stderr[-3000:]
        kept[0] = [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return kept[0]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("objective", [ACROSS, APART], ids=["across", "apart"])
def test_loss_and_gradients_equal_those_of_one_process(
    name: str,
    objective: Objective,
    ranks: list[Found],
    encoders: dict[str, Encoder],
    batches: list[dict[str, Any]],
) -> None:
    """With negatives of all devices: of the whole batch. Without: of the mean of both halves."""
    key, _, n = STEPS[name]
    encoder = encoders[key].train()
    losses: list[list[float]] = []
    for batch in batches[:n]:
        vectors = BiEncoder(encoder)({role: batch[role] for role in ("query", "passage")})
        parts = [slice(0, 10)] if objective.across_devices else [slice(0, 5), slice(5, 10)]
        found = [
            ALONE(
                vectors["query"][part],
                vectors["passage"][2 * part.start : 2 * part.stop],
                batch["keys"][2 * part.start : 2 * part.stop],
                batch["teacher"][part],
            )
            for part in parts
        ]
        (sum(found) / len(found) / n).backward(retain_graph=True)  # type: ignore[union-attr]
        losses.append([loss.item() for loss in found])
    expected = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    for rank, found_there in enumerate(ranks):
        for step in found_there[f"{name}, {objective.across_devices}"]["steps"]:
            own = [some[rank % len(some)] for some in losses]
            assert step["losses"] == pytest.approx(own, rel=1e-10)
            assert step["gradients"].keys() == expected.keys()
            for weight, gradient in expected.items():
                torch.testing.assert_close(
                    step["gradients"][weight], gradient, rtol=1e-10, atol=1e-10
                )


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("across", [True, False], ids=["across", "apart"])
def test_each_gradient_is_reduced_once_a_step(name: str, across: bool, ranks: list[Found]) -> None:
    """The number of chunks and accumulated batches does not matter."""
    for found in ranks:
        case = found[f"{name}, {across}"]
        for step in case["steps"]:
            numbers = [number for number, _ in step["reduced"]]
            assert sorted(numbers) == list(range(len(numbers)))
            assert sum(size for _, size in step["reduced"]) == case["trainable"]
        assert len(numbers) > 1 or "lora" in name


@pytest.mark.parametrize("name", TRAINER)
def test_our_trainer_gives_the_same_in_two_processes_and_in_one(
    name: str,
    ranks: list[Found],
    encoders: dict[str, Encoder],
    groups: list[Group],
    make_trainer: Callable[..., Any],
) -> None:
    """Two batches of 2 on each of two ranks are two batches of 4, for three steps."""
    trainer = make_trainer(encoders["tied"], training_set=groups, **arguments(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for found in ranks:
        case = found[name]
        for weight, value in encoders["tied"].state_dict().items():
            torch.testing.assert_close(case["weights"][weight], value, rtol=1e-10, atol=1e-10)
        assert len(case["reduced"]) == 3
        for step in case["reduced"]:
            numbers = [number for number, _ in step]
            assert sorted(numbers) == list(range(len(numbers)))
            assert sum(size for _, size in step) == case["trainable"]
    assert ranks[0][name]["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("mixed", [False, True], ids=["one set", "mixture"])
def test_two_processes_read_the_passages_of_each_epoch(
    mixed: bool,
    ranks: list[Found],
    encoders: dict[str, Encoder],
    colours: Any,
    set_of: Callable[..., TrainingSet],
    make_trainer: Callable[..., Any],
) -> None:
    """Two processes read what one process reads, also when resumed within the second epoch."""
    kind = "mixture" if mixed else "one set"
    settings = over_epochs(4, mixed)
    read: list[list[int]] = []
    trainer = make_trainer(
        encoders["tied"],
        training_set=sets_of(encoders["tied"], colours, set_of)[kind],
        **{**settings, "save_strategy": "no"},
    )
    collate = trainer.data_collator
    trainer.data_collator = lambda groups: (
        read.append([int(key) for group in groups for key in group.keys]) or collate(groups)
    )
    trainer.train()
    epochs = torch.tensor(read).view(3, -1).sort().values.tolist()
    assert epochs[0] != epochs[1] != epochs[2]
    whole, resumed = (
        [
            first + second
            for first, second in zip(*(found[name]["keys"] for found in ranks), strict=True)
        ]
        for name in (f"whole, {kind}", f"resumed, {kind}")
    )
    assert whole == read
    assert resumed == read[settings["save_steps"] :]
    for found in ranks:
        weights = [found[f"{what}, {kind}"]["weights"] for what in ("whole", "resumed")]
        for weight, value in encoders["tied"].state_dict().items():
            torch.testing.assert_close(weights[0][weight], value, rtol=1e-10, atol=1e-10)
            # kept in fp32
            torch.testing.assert_close(weights[1][weight], value, rtol=1e-4, atol=1e-6)
