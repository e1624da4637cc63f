"""Locks of files, which the system frees however the process that holds one ends."""

import os


def lock(descriptor: int) -> bool:
    """Whether the file could be locked for this process alone, without waiting."""
    try:
        if os.name == "nt":
            import msvcrt

            # Past the text, since Windows lets no other process read a locked byte.
            os.lseek(descriptor, 1 << 20, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
