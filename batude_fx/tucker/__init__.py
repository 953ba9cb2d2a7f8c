"""The mathematics of Tucker-2, and the layers that carry it: ranks, decompositions, dense layers, modules."""
