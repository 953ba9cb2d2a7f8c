"""The smallest network of a quality is found by few trials, and all other limits hold."""

import pytest
import torch
from torch import Tensor, nn

import batude_fx
from batude_fx import Budget, BudgetError, SelectionError
from batude_fx.support.numbers import wilson_interval
from tests.compression.common import EXAMPLE, fvcore_flops, parameter_count


def _classifier() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 4)
    return nn.Sequential(*layers).eval()


def _images(count: int = 160) -> Tensor:
    return torch.randn(count, *EXAMPLE.shape[1:], generator=torch.Generator().manual_seed(1))


OPTIONS = {"example_inputs": EXAMPLE, "calibration": _images(), "round_to": 1}


def _kept(network: nn.Module) -> float:
    return fvcore_flops(network) / fvcore_flops(_classifier())


def test_the_smallest_network_of_a_score_is_found() -> None:
    called = []

    def evaluate(network: nn.Module) -> float:
        called.append(network)
        assert not network.training
        return _kept(network)

    plan = batude_fx.plan(_classifier(), Budget(score=0.6), evaluate=evaluate, **OPTIONS)
    assert plan.flops / plan.dense_flops == pytest.approx(0.61, abs=0.012)
    assert len(called) - 1 == len(plan.search.trials) <= 8  # and the original
    assert _kept(plan.apply(_classifier())) == plan.flops / plan.dense_flops
    assert str(plan.budget) == "score 0.6"


def test_a_drop_is_below_the_score_of_the_original() -> None:
    plan = batude_fx.plan(_classifier(), Budget(max_drop=0.25), evaluate=_kept, **OPTIONS)
    assert plan.search.least == 0.75
    assert plan.flops / plan.dense_flops == pytest.approx(0.76, abs=0.012)


def test_the_lower_end_of_the_agreement_reaches_what_was_asked() -> None:
    model, images = _classifier(), _images()
    plan = batude_fx.plan(model, Budget(agreement="80%"), **OPTIONS)
    held_back = images[1::2]
    hits = (plan.apply(model)(held_back).argmax(1) == model(held_back).argmax(1)).sum().item()
    reached = [trial for trial in plan.search.trials if trial.bound >= 0.8]
    assert min(trial.flops for trial in reached) == plan.flops < plan.dense_flops
    (trial,) = {trial for trial in reached if trial.flops == plan.flops}
    assert trial.value == hits / 80
    assert trial.bound == wilson_interval(hits, 80)[0] >= 0.8


def test_evaluate_may_train_what_it_is_given() -> None:
    model = _classifier()
    before = [parameter.clone() for parameter in model.parameters()]

    def evaluate(network: nn.Module) -> float:
        network(_images(2)).sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.sub_(parameter.grad)
        return _kept(network)

    batude_fx.plan(model, Budget(max_drop=0.25), evaluate=evaluate, **OPTIONS)
    assert all(torch.equal(parameter, kept) for parameter, kept in zip(model.parameters(), before, strict=True))


def test_other_limits_hold_too() -> None:
    model = _classifier()
    small = batude_fx.compress(model, Budget(agreement=0.5, flops=0.6, params="95%"), **OPTIONS)
    assert _kept(small) <= 0.6
    assert parameter_count(small) <= 0.95 * parameter_count(model)


@pytest.mark.parametrize(
    ("budget", "evaluate", "message"),
    [
        (Budget(score=2.0), _kept, r"score 2\.0: the original itself reaches 1 only"),
        (
            Budget(score=0.9, flops=0.5),
            _kept,
            r"reaches 0\.9; the largest one within the other limits, of .* reaches 0\.",
        ),
        (Budget(agreement=0.98), None, r"80 images are held back, too few .* begins at 0\.954\. Give 378 images"),
    ],
)
def test_out_of_reach_names_the_best(budget: Budget, evaluate: object, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        batude_fx.plan(_classifier(), budget, evaluate=evaluate, **OPTIONS)


@pytest.mark.parametrize(
    ("budget", "evaluate", "message"),
    [
        (Budget(score=0.5), None, "a score needs evaluate="),
        (0.5, _kept, "evaluate= has no use"),
        (Budget(score=0.5), lambda _: float("nan"), "evaluate returned 'nan'"),
        (Budget(score=0.5), lambda _: True, "evaluate returned 'True'"),
        (Budget(score=0.5), 0.9, "evaluate=0.9 is no function"),
        (Budget(score=0.5), lambda _: None, "evaluate returned 'None'"),
    ],
)
def test_evaluate_and_the_budget_belong_together(budget: Budget, evaluate: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        batude_fx.plan(_classifier(), budget, evaluate=evaluate, **OPTIONS)


def test_a_plan_at_another_budget_searches_for_nothing() -> None:
    with pytest.raises(BudgetError, match="a quality is searched for by `plan`"):
        batude_fx.plan(_classifier(), 0.6, **OPTIONS).at(Budget(agreement=0.9))


def test_an_agreement_that_no_memory_could_show_is_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"can be shown by 5,757 images only, and 1,024 are held back at most"):
        batude_fx.plan(_classifier(), Budget(agreement=0.999), **OPTIONS)


def test_agreement_needs_classes_and_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    with pytest.raises(BudgetError, match="no classifier"):
        batude_fx.plan(model, Budget(agreement=0.5), **OPTIONS)
    with pytest.raises(BudgetError, match=r"an agreement of 0\.5 cannot be measured"):
        batude_fx.plan(_classifier(), Budget(agreement=0.5), **OPTIONS | {"calibration": None})


@pytest.mark.parametrize(
    "limits", [{"agreement": 1.5}, {"agreement": "2x"}, {"agreement": 0.9, "score": 1.0}, {"max_drop": -1.0}, {}]
)
def test_targets_that_mean_nothing_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(BudgetError):
        Budget(**limits)
