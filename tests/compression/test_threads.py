"""Several threads: what one of them compresses, another may run, discover or compress at the same time."""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import batude_fx
from tests.compression.common import EXAMPLE, photos
from tests.toy_networks import varied_net


@pytest.fixture(autouse=True)
def _process_state_stays() -> object:
    call, getattr_, filters = nn.Module.__call__, nn.Module.__getattr__, warnings.filters[:]
    yield
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, getattr_)
    assert warnings.filters == filters


def _at_once(*works: Callable[[], object], times: int = 4) -> list[list[object]]:
    """Do each work several times in a thread of its own, all threads at the same time; the results of each."""
    barrier = threading.Barrier(len(works))

    def repeat(work: Callable[[], object]) -> list[object]:
        barrier.wait()
        return [work() for _ in range(times)]

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(repeat, works))


def test_threads_that_discover_find_what_one_finds_alone() -> None:
    models = [varied_net() for _ in range(4)]
    expected = batude_fx.discover(models[0], EXAMPLE)
    found = _at_once(*(lambda model=model: batude_fx.discover(model, EXAMPLE) for model in models))
    assert all(sites == expected for thread in found for sites in thread)


def test_a_model_is_served_while_others_are_discovered_and_compressed() -> None:
    served, model = varied_net().eval(), varied_net()
    with torch.no_grad():
        expected = served(EXAMPLE)
        outputs, *_ = _at_once(
            lambda: [served(EXAMPLE) for _ in range(50)],
            lambda: batude_fx.discover(model, EXAMPLE),
            lambda: batude_fx.compress(varied_net(), 0.6, example_inputs=EXAMPLE),
        )
    assert all(torch.equal(output, expected) for some in outputs for output in some)


def test_the_model_that_is_compressed_may_be_served_meanwhile() -> None:
    model = varied_net().eval()
    alone = batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=photos()).state_dict()
    with torch.no_grad():
        expected = model(EXAMPLE)

    def serve() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(EXAMPLE) for _ in range(50)]

    def compress() -> nn.Module:
        return batude_fx.compress(model, 0.6, example_inputs=EXAMPLE, calibration=photos())

    outputs, *compressed = _at_once(serve, compress, compress)
    assert all(torch.equal(output, expected) for some in outputs for output in some)
    for small in (network for thread in compressed for network in thread):
        state = small.state_dict()
        assert state.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in state.items())
