"""Calibration images, the user's or synthetic ones, and the statistics of a network's activations on them."""
