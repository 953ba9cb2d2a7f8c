"""Networks held against images: folders of images, scores, sweeps over budgets."""
