"""Training: from an open model to fixed gates."""

from gatepress.training.loop import train

__all__ = ["train"]
