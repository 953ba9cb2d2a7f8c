"""Attach to a compressed network the record of how it was made; and compute a checksum of weights.

The record is `report.record.Record`, whose folder is above this one. Only the number of parameters of the original
network is read from it here, so that a protocol is enough as its type.
"""

import zlib
from typing import Protocol

import torch
from torch import nn

_ATTRIBUTE = "_batude_record"


class Provenance(Protocol):
    """The one attribute of a record that this folder reads."""

    @property
    def dense_params(self) -> int:
        """Parameters of the original network."""


def attach_(model: nn.Module, record: Provenance | None) -> None:
    """Set the record of how a network was made as an attribute of the network, which copies of it share."""
    vars(model)[_ATTRIBUTE] = record


def attached_record(model: nn.Module) -> Provenance | None:
    """Return the record that `attach_` set on a network, or None."""
    record: Provenance | None = vars(model).get(_ATTRIBUTE)
    return record


def checksum(model: nn.Module) -> int:
    """Return the CRC-32 of all parameters, which differs between two checkpoints of one architecture."""
    digest = 0
    for parameter in model.parameters():
        flat = parameter.detach().cpu().reshape(-1).contiguous()
        digest = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), digest)
    return digest
