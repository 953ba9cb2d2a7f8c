"""The clock whose times are known, for all tests of this folder."""

from tests.known_clock import clock

__all__ = ["clock"]
