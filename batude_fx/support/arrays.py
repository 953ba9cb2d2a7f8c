"""Sites, losses and limits to ranks: a multiple-choice knapsack. Integers and arrays; no model in sight.

Every site offers its rank pairs, dense included, each with a cost and a loss; one option per site is picked so that
the sum of losses is small and the sum of costs stays within the limits. A Lagrange multiplier, found by bisection,
gives a point on the convex hull of all solutions; what it leaves unspent is then spent move by move.

Source: P. Sinha, A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27(3), 1979;
H. Kellerer, U. Pferschy, D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
