"""How much memory there is, and the error for when there is too little."""

import os
from pathlib import Path

from runtime.errors import ResourceError


def memory() -> dict[str, int | None]:
    """Bytes of memory in all and available; None where the system does not tell simply."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {key: int(rest.split()[0]) << 10 for key, rest in (x.split(":", 1) for x in lines)}
        return {"total": sizes["MemTotal"], "available": sizes["MemAvailable"]}
    except (OSError, ValueError, KeyError, IndexError):
        if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
            return {"total": None, "available": None}
        return {
            "total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            "available": None,
        }


def resident() -> int:
    """Bytes of memory that this process holds; its peak where the system tells no more."""
    try:
        import resource
    except ImportError:  # Windows: about what Python, numpy and ONNX Runtime take
        return 150_000_000
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peak_resident() -> int:
    """The most bytes of memory that this process has held; Linux and macOS.

    Not `ru_maxrss` on Linux: a process started by a larger one has the other's there.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_error(error: Exception, where: str = "") -> ResourceError:
    """What the user is told after `error`: what was needed, in its words, and what there is."""
    reason = str(error).strip().split("\n")[0]
    left = memory()["available"]
    free = f"; {left >> 20} MiB are available" if left is not None else ""
    return ResourceError(
        f"{where}out of memory ({reason}){free}. Ask for a smaller --image, --latent or --batch"
    )
