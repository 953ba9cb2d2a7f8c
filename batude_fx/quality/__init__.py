"""How far the outputs of a compressed network are from its original's, on images that neither was fitted to."""
