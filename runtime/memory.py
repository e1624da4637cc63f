"""How much memory there is, and the error for when there is too little."""

import contextlib
import os
from pathlib import Path

from runtime.errors import ResourceError

GROUPS = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = (
    *("bad allocation", "bad_alloc", "failed to allocate", "out of memory"),
    *("cannot allocate memory", "failed to map segment", "pthread_create", "bad_array_new"),
    *("resource temporarily unavailable", "thread constructor"),
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library's error says that memory ran out; some say it in words alone."""
    return isinstance(error, MemoryError) or any(t in str(error).lower() for t in OUT_OF_MEMORY)


def memory() -> dict[str, int | None]:
    """Bytes of memory in all and available to this process; None where that is not told simply.

    Limits on the process and on its control group count: what is available is the least of them.
    """
    found = _of_system()
    left = [own for own in (found["available"], *limits()) if own is not None]
    return found | {"available": max(0, min(left)) if left else None}


def limits() -> list[int]:
    """Bytes that each limit on this process still leaves it: of address space, of its group."""
    left = []
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            left.append(most - pages * resource.getpagesize())
    with contextlib.suppress(OSError, ValueError, IndexError):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in groups if line.startswith("0::"))
        for folder in (group := GROUPS / own.lstrip("/"), *group.parents):
            if folder == GROUPS.parent:
                break
            left += _of_group(folder)
    return left


def _of_group(folder: Path) -> list[int]:
    """What a control group (version 2) leaves, counting files that the system may forget as free.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst, section Memory.
    """
    try:
        most = (folder / "memory.max").read_text().strip()
        if most == "max":
            return []
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [int(most) - used + int(stat.get("inactive_file", 0))]
    except (OSError, ValueError):
        return []


def _of_system() -> dict[str, int | None]:
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
    reason = str(error).strip().split("\n")[0] or "in the program itself"
    left = memory()["available"]
    free = f"; {left >> 20} MiB are available" if left is not None else ""
    return ResourceError(
        f"{where}out of memory ({reason}){free}. Ask for a smaller --image, --latent or --batch"
    )
