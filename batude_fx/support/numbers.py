"""Numbers and tables for people: the only place that formats them."""


def human(count: float) -> str:
    """A count with three digits and a metric prefix: 4089184256 is "4.09 G"."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * scale:  # 999 999 is 1 M, not 1000 k
            return f"{count / scale:.3g} {prefix}"
    return f"{count:g} "


def percent(part: float, whole: float) -> str:
    """A share of a whole: "49.9 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def milliseconds(seconds: float) -> str:
    """A wall time: 0.0441 is "44.1"."""
    return f"{1000 * seconds:.3g}"
