"""Driven by a browser: `make test-docs`."""
