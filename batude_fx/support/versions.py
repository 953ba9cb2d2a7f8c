"""Versions of Python, of this package and of the libraries that a result depends on."""

import platform
from importlib.metadata import version

_ALWAYS = ("torch", "timm", "torchvision")


def library_versions(*further: str) -> dict[str, str]:
    """Name to version: Python, batude_fx, torch, timm, torchvision, and the further libraries that are named.

    They are read from the metadata of the installed packages, so that no library is imported for it.
    """
    own = {"python": platform.python_version(), "batude_fx": version("batude-fx")}
    return own | {name: version(name) for name in (*_ALWAYS, *further)}
