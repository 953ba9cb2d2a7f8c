"""Numbers as text: counts with a metric prefix, percentages, milliseconds; and the interval of a share."""

import math


def human(count: float) -> str:
    """Format a count with three digits and a metric prefix: 4089184256 becomes "4.09 G", to be followed by a unit."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * scale:  # 999 999 is 1 M, not 1000 k
            return f"{count / scale:.3g} {prefix}"
    return f"{count:g} "


def percent(part: float, whole: float) -> str:
    """Format a part of a whole as a percentage: "49.9 %"; "-" where the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds without a unit: 0.0441 becomes "44.1"."""
    return f"{1000 * seconds:.3g}"


_Z2 = 1.959964**2  # square of the standard errors on each side of a mean, for 95 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which some trials were seen.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of the
    American Statistical Association 22, 1927.
    """
    z2 = _Z2 / trials
    share = successes / trials
    centre, width = share + z2 / 2, math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (centre - width) / (1 + z2)), min(1.0, (centre + width) / (1 + z2))


def fewest_trials(share: float) -> int:
    """Return the least number of trials whose 95 % interval by Wilson begins at a share if all of them succeed.

    The interval then begins at trials / (trials + z^2).
    """
    return math.ceil(_Z2 * share / (1 - share))
