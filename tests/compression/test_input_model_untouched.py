"""The input model stays bit-identical, after success and after every kind of failure."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import batude_fx
from batude_fx.errors import BatudeError, BudgetError, CalibrationError, SelectionError
from batude_fx.tucker.ranks import Ranks
from tests.compression.common import EXAMPLE, fingerprint, hooked_net, photos, same_bits
from tests.toy_networks import InPlace, Noisy, VariedNet, varied_net


def test_a_backward_pass_may_be_open_meanwhile() -> None:
    model = varied_net().eval()
    loss = model(torch.randn(2, *EXAMPLE.shape[1:])).sum()
    batude_fx.compress(model, 0.7, example_inputs=EXAMPLE)  # normalized by its images; the model's buffers stay
    loss.backward()


_ATTEMPTS: dict[str, tuple[dict[str, object], type[BatudeError] | None]] = {
    "weights only": ({"calibration": None}, None),
    "synthetic": ({}, None),
    "photos": ({"calibration": photos()}, None),
    "bad budget": ({"budget": 2.0}, BudgetError),
    "out of reach": ({"budget": 0.001}, BudgetError),
    "bad glob": ({"include": "nothing*"}, SelectionError),
    "NaN": ({"calibration": torch.full((2, 3, 12, 12), float("nan"))}, CalibrationError),
    "shape": ({"calibration": torch.zeros(2, 1, 12, 12)}, CalibrationError),
    "size": ({"calibration": torch.zeros(2, 12, 12)}, CalibrationError),
    "empty": ({"calibration": []}, CalibrationError),
    "late NaN": ({"calibration": [photos(), torch.full((1, 3, 12, 12), float("inf"))]}, CalibrationError),
    "no images": ({"calibration": ["photo.png"]}, CalibrationError),
    "bytes": ({"calibration": torch.zeros(2, 3, 12, 12, dtype=torch.uint8)}, CalibrationError),
    "word": ({"calibration": "imagenet"}, CalibrationError),
    "ranks": ({"ranks": {"head": Ranks(1, 1)}}, SelectionError),
    "round_to": ({"round_to": 0}, SelectionError),
}


@pytest.mark.parametrize("attempt", _ATTEMPTS)
def test_the_input_model_is_bit_identical_after_success_and_failure(attempt: str) -> None:
    options, error = _ATTEMPTS[attempt]
    options = {"budget": 0.6, "example_inputs": EXAMPLE, **options}
    model = hooked_net()
    before = fingerprint(model)
    if error is None:
        batude_fx.compress(model, **options)
    else:
        with pytest.raises(error) as caught:
            batude_fx.compress(model, **options)
        assert "\n" not in str(caught.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize("calibration", [None, "synthetic", photos()])
def test_the_global_random_generator_stays_where_it_is(calibration: object) -> None:
    model = hooked_net()
    model.__class__ = Noisy
    before = fingerprint(model)
    batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    assert fingerprint(model) == before


def _broken() -> Iterator[Tensor]:
    yield photos()
    raise OSError("disk gone")


class Picky(VariedNet):
    """Runs on the example input, and no further."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise OSError("disk gone")
        return super().forward(x)


@pytest.mark.parametrize(("kind", "calibration"), [(VariedNet, _broken()), (Picky, photos()), (Picky, "synthetic")])
def test_the_input_model_survives_what_others_raise(kind: type[VariedNet], calibration: object) -> None:
    model = hooked_net()
    model.__class__ = kind
    before = fingerprint(model)
    with pytest.raises(OSError, match="disk gone"):
        batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=calibration)
    assert fingerprint(model) == before


def test_compiling_in_place_changes_nothing() -> None:
    model = varied_net()
    expected = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE)
    model.compile(backend="eager")
    assert same_bits(batude_fx.compress(model, 0.6, example_inputs=EXAMPLE), expected)
    assert model._compiled_call_impl is not None


@pytest.mark.parametrize("calibration", [None, "synthetic", photos()])
def test_a_model_may_work_in_place_on_its_input(calibration: object) -> None:
    model, x = InPlace(), EXAMPLE.clone()
    batude_fx.compress(model, 0.6, calibration=calibration, example_inputs=x)
    assert torch.equal(x, EXAMPLE)
