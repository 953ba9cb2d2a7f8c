"""Versions of Python and of the libraries that a result depends on."""

import platform
from importlib.metadata import version


def library_versions(*names: str) -> dict[str, str]:
    """Return the version of each named library; "python" names the interpreter.

    They are read from the metadata of the installed packages, so that no library is imported for it.
    """
    return {name: platform.python_version() if name == "python" else version(name) for name in names}
