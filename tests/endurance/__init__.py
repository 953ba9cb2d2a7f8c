"""Tests that take minutes: `make kills` and `make soak`. Pytest runs short versions of them."""
