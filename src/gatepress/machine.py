"""What the machine calls itself: measured times belong to one machine and say which."""

import platform
import sys
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
# Instructions for int8 products, the fastest first: two processors of one model name may differ in them.
_INSTRUCTIONS = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "i8mm": "NEON i8mm",
    "asimddp": "NEON dot product",
}


def cpu_name() -> str:
    """Return the processor's model name, or its architecture, and its instructions if the system lists them."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []  # not Linux
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine() or "unknown processor"
    flags = told.get("flags", told.get("Features", "")).split()
    best = next((label for flag, label in _INSTRUCTIONS.items() if flag in flags), None)
    return f"{name} ({best})" if best else name


def device_name(device: torch.device) -> str:
    """Return what the processor or graphics card calls itself."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held at once: on the graphics card, or else on the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # noqa: PLC0415 - Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
