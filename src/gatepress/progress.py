"""How long work reports its progress. The library calls these; the command line draws them."""

from typing import Protocol


class Progress(Protocol):
    """A bar with a total, a description and a few live figures."""

    def start(self, total: int, description: str) -> None:
        """Begin a piece of work of `total` units."""

    def advance(self, steps: int = 1, **figures: float | str) -> None:
        """Report `steps` more units done and the latest figures (loss, gates closed, ...)."""

    def finish(self) -> None:
        """End the piece of work that was started last."""


class NoProgress:
    """Report nothing: the default for library callers."""

    def start(self, total: int, description: str) -> None:
        """Ignore the start."""

    def advance(self, steps: int = 1, **figures: float | str) -> None:
        """Ignore the advance."""

    def finish(self) -> None:
        """Ignore the end."""
