"""The picture of a run: every site's ranks over the rounds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batude_fx.files import replacing
from batude_fx.sites import ConvSite


def rank_picture(path: Path, sites: Mapping[str, ConvSite], rounds: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG with two maps, of output and of input ranks: a row a site, a column a round.

    Args:
        path: Where to.
        sites: Site name to site.
        rounds: Records of BC-ADL's rounds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(sites)
    full = np.array([[one.group_out_channels, one.group_in_channels] for one in sites.values()])  # (sites, 2)
    ranks = np.array([[record["ranks"][name] or full[i] for i, name in enumerate(names)] for record in rounds])
    shares = ranks / full  # (rounds, sites, 2)
    figure = Figure(figsize=(9, 1.8 + 0.16 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    images = []
    for axes, mode, title in ((left, 0, "output ranks"), (right, 1, "input ranks")):
        shown = shares[:, :, mode].T
        images.append(axes.imshow(shown, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="none"))
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(images[0], ax=(left, right), label="rank / channels")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
