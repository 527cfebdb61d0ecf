"""Train gates over a frozen pretrained encoder, then remove exactly what they closed.

import gatepress
model = gatepress.load_pruned("pruned/sst2")     # no registration, no remote code
import gatepress.auto                            # or teach transformers' Auto classes
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatepress.models import load_pruned

__version__ = "0.48.0"
__all__ = ["__version__", "load_pruned"]


if not TYPE_CHECKING:  # a type checker would take every name for known

    def __getattr__(name: str) -> Any:
        """Import heavy modules only on first use (PEP 562): `gatepress --help` must not need torch."""
        if name == "load_pruned":
            from gatepress.models import load_pruned

            return load_pruned
        raise AttributeError(f"module 'gatepress' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names too, for completion."""
    return sorted({*globals(), *__all__})
