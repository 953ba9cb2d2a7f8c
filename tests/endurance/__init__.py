"""Tests that take minutes: `make kills`. Pytest runs a short version of it."""
