"""What a model is made of: its convolutions, what they cost, how they are found and how they are replaced."""
