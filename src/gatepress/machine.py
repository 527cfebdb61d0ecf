"""What the machine calls itself: measured times are of one machine and say which."""

import platform
import resource
import sys
from pathlib import Path

import torch


def cpu_name() -> str:
    """Return the processor's model name as the system gives it, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine() or "unknown processor"


def device_name(device: torch.device) -> str:
    """Return what the processor or graphics card calls itself."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held at once: of the graphics card, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
