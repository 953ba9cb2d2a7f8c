"""The convolutions of a model: how they are found, what they cost and how they are replaced."""
