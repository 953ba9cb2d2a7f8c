"""Versions of Python, of this package and of the libraries that a result depends on."""

import platform
from importlib.metadata import version

_ALWAYS = ("torch", "timm", "torchvision")


def library_versions(*further: str) -> dict[str, str]:
    """Return name to version of Python, batude_fx, torch, timm, torchvision and further libraries.

    The versions come from the metadata of the installed packages, so that none of them has to be imported.
    """
    own = {"python": platform.python_version(), "batude_fx": version("batude-fx")}
    return own | {name: version(name) for name in (*_ALWAYS, *further)}
