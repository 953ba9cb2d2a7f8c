"""How a compressed network was made, carried along as an attribute of the network; and a checksum of weights.

What is carried is the record of the report (`report.record.Record`). Here only the number of parameters of the
original is read from it, so a protocol stands in for the record.
"""

import zlib
from typing import Any, Protocol

import torch
from torch import nn

_ATTRIBUTE = "_batude_record"


class Provenance(Protocol):
    """The part of a record that is read here."""

    @property
    def dense_params(self) -> int:
        """Parameters of the original network."""


def attach_(model: nn.Module, record: Provenance | None) -> None:
    """Let a network carry the record of how it was made; copies of the network carry it too."""
    vars(model)[_ATTRIBUTE] = record


def attached(model: nn.Module) -> Any:  # noqa: ANN401 - the record that was attached, of a type above this folder
    """The record that a network carries; None where it carries none."""
    return vars(model).get(_ATTRIBUTE)


def checksum(model: nn.Module) -> int:
    """The CRC-32 of all parameters, which tells two checkpoints of one architecture apart."""
    digest = 0
    for parameter in model.parameters():
        plain = parameter.detach().cpu().reshape(-1).contiguous()
        digest = zlib.crc32(plain.view(torch.uint8).numpy().tobytes(), digest)
    return digest
