"""Evaluation of networks on images: folders of images, scores, and sweeps over budgets."""
