"""A LightningModule that holds metrics of torchmetrics, trained by Lightning's trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, F1Score, MetricCollection

import batude_fx
from tests.others.common import (
    assert_exported,
    assert_same_outputs,
    assert_saved_and_loaded,
    flops,
    noise,
    same_values,
    tucker_modules,
    unchanged,
    with_trained_norms,
)

pytestmark = [
    pytest.mark.others,
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # Lightning's
]

BUDGET = 0.5
CLASSES = 5
EXAMPLE = noise(1, 3, 16, 16)


class Classifier(LightningModule):
    """A classifier with metrics, as Lightning's documentation writes them."""

    def __init__(self, channels: int, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, CLASSES),
        )  # fmt: skip
        self.accuracy = Accuracy(task="multiclass", num_classes=CLASSES)
        self.metrics = MetricCollection({"f1": F1Score(task="multiclass", num_classes=CLASSES)}, prefix="val_")

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        images, labels = batch
        self.log_dict(self.metrics(self(images), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams.rate)


def call(network: nn.Module) -> object:
    return network(noise(4, 3, 16, 16))


def fresh() -> Classifier:
    """Return a classifier with the same random weights at each call."""
    torch.manual_seed(0)
    return with_trained_norms(Classifier(channels=32, rate=0.1))


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(noise(8, 3, 16, 16), torch.arange(8) % CLASSES), batch_size=4)


def trainer() -> Trainer:
    return Trainer(
        fast_dev_run=True, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Classifier:
    """The compressed network, which no test changes."""
    return batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLE)


@pytest.mark.parametrize("trained", [False, True])
def test_the_budget_holds_and_the_original_is_left_as_it_was(trained: bool) -> None:
    model = fresh()
    if trained:  # then it holds its trainer, and metrics that have seen a batch
        trainer().fit(model, batches(), batches())
    model.network[1].register_forward_hook(lambda *_: None)
    hyperparameters, updates = dict(model.hparams), model.accuracy.update_count
    with unchanged(model):
        small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE)
    assert flops(small, EXAMPLE) <= BUDGET * flops(model, EXAMPLE)
    assert same_values(small.hparams, model.hparams)
    assert dict(model.hparams) == hyperparameters
    assert model.accuracy.update_count == updates
    assert len(small.network[1]._forward_hooks) == 1


@pytest.mark.filterwarnings("ignore:calibration images look")  # the batch-norms hold random numbers
@pytest.mark.parametrize("trained", [False, True])
def test_the_trainer_changes_the_factors_of_the_copy_alone(trained: bool) -> None:
    model = fresh()
    if trained:
        trainer().fit(model, batches(), batches())
    small = batude_fx.compress(model, BUDGET, example_inputs=EXAMPLE, calibration=batches())
    before = {name: module.weight.detach().clone() for name, module in tucker_modules(small).items()}
    original = copy.deepcopy(model.state_dict())
    training = trainer()
    training.fit(small, batches(), batches())
    assert all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    assert before
    assert not any(torch.equal(module.weight, before[name]) for name, module in tucker_modules(small).items())
    assert 0 <= float(training.callback_metrics["accuracy_epoch"]) <= 1
    assert 0 <= float(trainer().validate(small, batches(), verbose=False)[0]["val_f1"]) <= 1


def test_saved_and_loaded_it_is_the_same_to_the_bit(small: nn.Module, tmp_path: Path) -> None:
    assert_saved_and_loaded(small, fresh(), call, tmp_path / "out")


def test_a_loaded_network_is_trained_further(small: nn.Module, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(small, tmp_path / "out")
    loaded = batude_fx.load(tmp_path / "out", model=fresh())
    trainer().fit(loaded.train(), batches(), batches())
    with pytest.warns(UserWarning, match="cannot be rebuilt by name"):
        batude_fx.save(loaded, tmp_path / "further")
    assert_same_outputs(batude_fx.load(tmp_path / "further", model=fresh()), loaded, call, bits=True)


@pytest.mark.parametrize("trained", [False, True])
def test_exported_it_computes_the_same_for_another_batch(small: Classifier, trained: bool, tmp_path: Path) -> None:
    network = batude_fx.compress(fresh(), BUDGET, example_inputs=EXAMPLE) if trained else small
    if trained:
        trainer().fit(network, batches(), batches())
    assert_exported(network, EXAMPLE, call, [noise(4, 3, 16, 16)], tmp_path / "small.onnx")
