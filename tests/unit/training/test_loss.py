"""The objective, held against sums written out and torch's own formulas."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mlflow_dr.encoder.model import Encoder
from mlflow_dr.errors import UsageError
from mlflow_dr.training.flags import OWN_LOSSES, losses
from mlflow_dr.training.loss import LossInputs, Objective, across
from mlflow_dr.training.parsing import parse_training


def vectors(
    n_queries: int, n_passages: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(n_queries, 8, generator=generator, dtype=dtype)
    passages = torch.randn(n_queries * n_passages, 8, generator=generator, dtype=dtype)
    return queries.requires_grad_(), passages.requires_grad_()


def written_out(
    queries: Tensor, passages: Tensor, temperature: float, keys: Sequence[int] | None = None
) -> float:
    """The mean over queries of minus the logarithm of the positive's softmax."""
    each = len(passages) // len(queries)
    total = 0.0
    for index, query in enumerate(queries):
        target = index * each
        counted = [
            row
            for row in range(len(passages))
            if row == target or keys is None or keys[row] != keys[target]
        ]
        scores = {row: (query @ passages[row]).item() / temperature for row in counted}
        best = max(scores.values())
        total += math.log(sum(math.exp(s - best) for s in scores.values())) + best - scores[target]
    return total / len(queries)


@pytest.mark.parametrize("n_passages", [1, 3])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_mean_negative_log_softmax_of_the_positive(n_passages: int, temperature: float) -> None:
    queries, passages = vectors(4, n_passages)
    loss = Objective(temperature)(queries, passages).item()
    assert loss == pytest.approx(written_out(queries, passages, temperature), rel=1e-12)


KEYS = [7, 1, 2, 7, 3, 1, 9, 7, 4, 5, 9, 9]
"""Of three passages for each of four queries: 0 and 1 share a positive, 7 is 0's once more."""


def test_copies_of_the_positive_are_not_negatives() -> None:
    queries, passages = vectors(4, 3)
    keys = torch.tensor(KEYS)
    loss = Objective(0.5)(queries, passages, keys).item()
    assert loss == pytest.approx(written_out(queries, passages, 0.5, KEYS), rel=1e-12)
    unmasked = Objective(0.5, mask_duplicates=False)(queries, passages, keys).item()
    assert unmasked == pytest.approx(written_out(queries, passages, 0.5), rel=1e-12)
    assert unmasked > loss


def test_a_masked_passage_gets_no_gradient() -> None:
    """Two queries share one positive; its copy from the other query is not used as a negative."""
    queries, passages = vectors(2, 1)
    Objective()(queries, passages, torch.tensor([5, 5])).backward()
    assert not passages.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_loss_in_parts_is_the_same(rows: int, weight: float) -> None:
    """Loss and gradients; 7 queries in parts of `rows`, the last one ragged."""
    found: list[tuple[Tensor, ...]] = []
    keys = torch.arange(14) % 5
    teacher = torch.rand(7, 2, generator=torch.Generator().manual_seed(1))
    for limit in (1 << 26, rows * 14):
        queries, passages = vectors(7, 2)
        objective = Objective(0.05, distil_weight=weight, scores_at_once=limit)
        loss = objective(queries, passages, keys, teacher)
        loss.backward()
        found.append((loss.detach(), queries.grad, passages.grad))  # type: ignore[arg-type]
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that torch had allocated at one time during `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    total = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_in_parts_the_score_matrix_is_never_held_as_a_whole() -> None:
    """512 x 512 scores are a megabyte in fp32; softmax and its gradient are two more."""

    def work(limit: int) -> Callable[[], object]:
        queries = torch.randn(512, 16, requires_grad=True)
        passages = torch.randn(512, 16, requires_grad=True)
        return lambda: Objective(0.05, scores_at_once=limit)(queries, passages).backward()

    whole, parts = peak_bytes(work(1 << 26)), peak_bytes(work(16 * 512))
    assert whole > 2 << 20
    assert parts < 512 << 10


def test_distillation_equals_torchs_divergence() -> None:
    queries, passages = vectors(4, 3)
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(1)) * 20
    objective = Objective(0.5, distil_weight=1.0, distil_temperature=2.0)
    loss = objective(queries, passages, torch.tensor(KEYS), teacher)
    own = torch.stack([passages[3 * i : 3 * i + 3] @ queries[i] for i in range(4)]) / 0.5
    expected = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(
        own.log_softmax(dim=1), (teacher.double() / 2.0).log_softmax(dim=1)
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def test_distillation_is_zero_if_the_student_equals_the_teacher() -> None:
    queries, passages = vectors(4, 3)
    own = torch.einsum("qd,qpd->qp", queries, passages.view(4, 3, 8))
    objective = Objective(0.5, distil_weight=1.0, distil_temperature=0.5)
    loss = objective(queries, passages, teacher=own.detach())
    assert loss.item() == pytest.approx(0, abs=1e-12)


def test_the_weight_mixes_loss_and_distillation() -> None:
    queries, passages = vectors(4, 3)
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))

    def loss(weight: float, scores: Tensor | None = teacher) -> float:
        return Objective(0.5, distil_weight=weight)(queries, passages, teacher=scores).item()

    assert loss(0.25) == pytest.approx(0.75 * loss(0.0) + 0.25 * loss(1.0), rel=1e-12)
    assert loss(0.0) == loss(0.0, None)


@pytest.mark.parametrize("settings", [{}, {"distil_weight": 0.5}, {"scores_at_once": 1}])
def test_half_precision_is_computed_in_fp32(settings: dict[str, Any]) -> None:
    """Also inside autocast, where products would be taken in bf16."""
    queries, passages = (vector.detach().to(torch.bfloat16) for vector in vectors(4, 3))
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    objective = Objective(0.05, **settings)
    expected = objective(queries.float(), passages.float(), teacher=teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(queries, passages, teacher=teacher)
        wide = objective(queries.float(), passages.float(), teacher=teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert torch.equal(wide, expected)


def test_one_process_alone_gathers_nothing() -> None:
    queries, passages = vectors(4, 1)
    assert across(queries) is queries
    alone = Objective(0.05, across_devices=True)(queries, passages)
    assert torch.equal(alone, Objective(0.05)(queries, passages))


@pytest.mark.parametrize("name", ["contrastive", "distillation"])
def test_our_losses_are_found_by_name(name: str) -> None:
    assert name in OWN_LOSSES and name in losses.names()


def test_distillation_alone_is_the_loss_with_its_whole_weight() -> None:
    queries, passages = vectors(4, 3)
    teacher = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    alone = Objective(0.5, loss="distillation", distil_temperature=2.0)
    mixed = Objective(0.5, distil_weight=1.0, distil_temperature=2.0)
    assert alone.needs_teacher and mixed.needs_teacher and not Objective().needs_teacher
    expected = mixed(queries, passages, teacher=teacher)
    assert torch.equal(alone(queries, passages, teacher=teacher), expected)


OUTSIDE = '''
import torch
from mlflow_dr.training.loss import LossInputs, needs_teacher


@needs_teacher
def margin_mse(inputs: LossInputs) -> torch.Tensor:
    """Hofstätter et al. 2020: margins like the teacher's."""
    scores, teacher = inputs.own_scores(), inputs.teacher_scores
    margins = scores[:, :1] - scores[:, 1:]
    return torch.nn.functional.mse_loss(margins, teacher[:, :1] - teacher[:, 1:])


def hinge(inputs: LossInputs) -> torch.Tensor:
    """Every other passage of the batch should score lower than the positive, by 1."""
    scores = inputs.scores()
    positive = scores.gather(1, inputs.positives[:, None])
    others = torch.ones_like(scores).scatter(1, inputs.positives[:, None], 0.0)
    return (torch.relu(1 + scores - positive) * others).sum(dim=1).mean()
'''


@pytest.fixture
def other_package(install_package: Callable[..., Path]) -> None:
    """A package with two losses, as pip would install it."""
    install_package(
        {"outside_losses.py": OUTSIDE},
        "[mlflow_dr.losses]\n"
        "margin_mse = outside_losses:margin_mse\nhinge = outside_losses:hinge\n",
        losses,
    )


@pytest.mark.usefixtures("other_package")
@pytest.mark.parametrize("sizes", [None, {"query": 2, "passage": 3}], ids=["plain", "cached"])
@pytest.mark.parametrize("name", ["hinge", "margin_mse"])
def test_a_loss_of_another_package_trains(
    name: str,
    sizes: dict[str, int] | None,
    make_small: Callable[..., Encoder],
    make_trainer: Callable[..., Any],
    make_examples: Callable[..., Any],
    set_of: Callable[..., Any],
) -> None:
    """It takes the teacher's scores if it needs them; the gradient cache changes nothing."""
    examples = make_examples(
        *(
            (f"q{i}", [f"all about the colour {i}"], [f"never colour {i}"], [3.0, 1.0])
            for i in range(8)
        )
    )
    found = []
    for chunks in (None, sizes):
        encoder = make_small(normalize=True).double()
        objective = Objective(0.5, loss=name)
        trainer = make_trainer(
            encoder,
            training_set=set_of(encoder, examples, 2, with_scores=objective.needs_teacher),
            objective=objective,
            chunk_sizes=chunks,
            max_steps=6,
        )
        trainer.train()
        losses_of_steps = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
        assert losses_of_steps[-1] < losses_of_steps[0]
        found.append(torch.cat([weight.detach().flatten() for weight in encoder.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("other_package")
def test_the_flag_takes_the_losses_of_other_packages() -> None:
    assert parse_training(["--loss", "hinge"]).loss.objective().loss == "hinge"
    with pytest.raises(UsageError, match=r"loss is 'hing'; did you mean 'hinge'\? \(known: contr"):
        parse_training(["--loss", "hing"])


def test_a_loss_is_registered_by_a_decorator() -> None:
    @losses.register("zero")
    def zero(inputs: LossInputs) -> Tensor:
        return inputs.queries.sum() * 0

    try:
        assert Objective(loss="zero")(*vectors(2, 1)) == 0
    finally:
        losses._parts.pop("zero")


@pytest.mark.parametrize("normalize", [True, False])
def test_the_losses_of_fewer_dimensions_are_added(normalize: bool) -> None:
    queries, passages = vectors(4, 3)
    if normalize:
        queries, passages = (torch.nn.functional.normalize(each, dim=1) for each in vectors(4, 3))
    objective = Objective(0.5, matryoshka_dims=(2, 5), normalize=normalize)
    expected = written_out(queries, passages, 0.5)
    for dims in (2, 5):
        small = [each[:, :dims] for each in (queries, passages)]
        if normalize:
            small = [torch.nn.functional.normalize(each, dim=1) for each in small]
        expected += written_out(small[0], small[1], 0.5)
    assert objective(queries, passages).item() == pytest.approx(expected, rel=1e-12)


def test_fewer_dimensions_train_as_with_the_library() -> None:
    """The sum is that of `MatryoshkaLoss` around `MultipleNegativesRankingLoss`."""
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    queries, passages = (torch.nn.functional.normalize(each, dim=1) for each in vectors(4, 1))

    class Given(torch.nn.Module):
        """A model that gives these vectors."""

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            return features

        def get_embedding_dimension(self) -> int:
            return 8

    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    model: Any = Given()
    ranking = MultipleNegativesRankingLoss(model, scale=2.0, similarity_fct=dot_score)
    features = [{"sentence_embedding": each.clone()} for each in (queries, passages)]
    theirs = MatryoshkaLoss(model, ranking, [8, 4, 2])(features, torch.zeros(4))
    ours = Objective(0.5, matryoshka_dims=(4, 2), normalize=True)(queries, passages)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_matryoshka_dims_are_checked(make_tiny: Callable[..., Encoder], tmp_path: Path) -> None:
    argv = ["--output_dir", str(tmp_path), "--dataset_name", "demo", "--matryoshka_dims"]
    arguments = parse_training([*argv, "8,16"]).loss
    encoder = make_tiny(normalize=True)
    objective = arguments.objective(encoder)
    assert (objective.matryoshka_dims, objective.normalize) == ((8, 16), True)
    with pytest.raises(UsageError, match="dims 99999: the encoder's vectors have"):
        parse_training([*argv, "99999"]).loss.objective(encoder)
    with pytest.raises(UsageError, match="dims 'many': expected whole numbers"):
        parse_training([*argv, "many"])
