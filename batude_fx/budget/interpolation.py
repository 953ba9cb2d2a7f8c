"""Times at all ranks from measurements at a few of them: pure functions of arrays.

The time of a Tucker-2 chain at ranks (r_out, r_in) is nearly `a r_in + b r_in r_out + c r_out`, as its flops are. Along
each rank that is a straight line, so linear interpolation in both ranks is nearly exact between measured points.
"""

from collections.abc import Sequence
from typing import cast

import numpy as np

from batude_fx.support.arrays import Floats, Integers

_POINTS = 6  # measured per mode


def measured_ranks(ranks: Integers) -> list[int]:
    """Return a few of the ranks of one mode, the smallest and the largest among them, denser where ranks are small."""
    distinct = np.unique(ranks)
    rows = np.unique(np.geomspace(1, len(distinct), min(_POINTS, len(distinct))).round().astype(int)) - 1
    return cast("list[int]", distinct[rows].tolist())


def interpolate(ranks: Integers, rows: Sequence[int], columns: Sequence[int], times: Floats) -> Floats:
    """Interpolate times at rank pairs bilinearly between the measured ones.

    Args:
        ranks: (n, 2) output and input ranks, inside the measured ones.
        rows: Measured output ranks, ascending; a single one where the mode is not cut.
        columns: Measured input ranks, ascending; a single one where the mode is not cut.
        times: (len(rows), len(columns)) what was measured.

    Returns:
        (n,)
    """
    along_columns = np.stack([np.interp(ranks[:, 1], columns, line) for line in times])  # (len(rows), n)
    if len(rows) == 1:
        return cast("Floats", along_columns[0])
    upper = np.clip(np.searchsorted(rows, ranks[:, 0]), 1, len(rows) - 1)
    low, high = np.array(rows)[upper - 1], np.array(rows)[upper]
    share = (ranks[:, 0] - low) / (high - low)
    each = np.arange(len(ranks))
    return cast("Floats", (1 - share) * along_columns[upper - 1, each] + share * along_columns[upper, each])
