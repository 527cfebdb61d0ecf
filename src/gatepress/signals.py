"""What interrupts do while a block runs: Ctrl-C, SIGTERM, and SIGHUP of a closed terminal."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Windows has no SIGHUP.
INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def interrupts(answer: Callable[[int, Any], Any] | signal.Handlers) -> Iterator[None]:
    """Let each interrupt that would raise something have another answer in the block.

    Those that are ignored, as nohup asks, or end the process at once stay as they are, and all of them in threads:
    only the main one may change what signals do.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in INTERRUPTS if main}
    own = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in own:
            signal.signal(number, answer)
        yield
    finally:
        for number, handler in own.items():
            signal.signal(number, handler)
