"""What is installed: measurements and results record what they depend on."""

import platform
from importlib import metadata

from gatepress import __version__

MADE_WITH = ("torch", "transformers", "datasets", "safetensors", "numpy")  # what a result depends on


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of gatepress, and of those of `packages` that are installed."""
    found = {"python": platform.python_version(), "gatepress": __version__}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
