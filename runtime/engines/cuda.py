"""CUDA's runtime library: the GPU at hand, checked calls, memory on both sides."""

import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.bundle.manifest import Array
from runtime.errors import IncompatibleError, ResourceError
from runtime.providers import CUDA


def load_cuda() -> Any:
    """Import CUDA's runtime bindings; raises IncompatibleError with the command to install them."""
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        raise IncompatibleError(
            f"cuda-python cannot be imported ({error}); expected it for TensorRT plans. "
            f"Install it with: {CUDA}"
        ) from None
    return runtime


def device_target() -> str:
    """Compute capability of the GPU at hand, as in `sm89`; raises IncompatibleError."""
    device = Device(load_cuda())
    attributes = device.cuda.cudaDeviceAttr
    major, minor = (
        device.call("cudaDeviceGetAttribute", getattr(attributes, name), 0)
        for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
    )
    return f"sm{major}{minor}"


class Device:
    """CUDA runtime calls, each checked."""

    def __init__(self, cuda: Any):
        self.cuda = cuda

    def call(self, function: str, *args: Any) -> Any:
        """Call a function and return its value; raises IncompatibleError or ResourceError."""
        error, *values = getattr(self.cuda, function)(*args)
        if error == self.cuda.cudaError_t.cudaSuccess:
            return values[0] if values else None
        self.cuda.cudaGetLastError()  # a later call must not see this error
        if error == self.cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise self.out_of_memory(int(args[0]), function)
        words = self.cuda.cudaGetErrorString(error)[1]
        raise IncompatibleError(
            f"no usable GPU or driver: {function} says {words.decode()!r}; expected an NVIDIA GPU "
            "and its driver (nvidia-smi shows both)"
        )

    def out_of_memory(self, needed: int, what: str) -> ResourceError:
        """The error for `needed` bytes that are not there, with the bytes that are free."""
        error, free, _ = self.cuda.cudaMemGetInfo()
        found = f"{free} are free" if error == self.cuda.cudaError_t.cudaSuccess else "fewer free"
        return ResourceError(
            f"{what}: out of GPU memory: {needed} bytes are needed, {found}; "
            "ask for a smaller --image, --latent or --batch"
        )

    def copy(self, target: int, source: int, count: int, stream: Any) -> None:
        """Queue a copy between any two of host and device."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDefault
        self.call("cudaMemcpyAsync", target, source, count, kind, stream)


class Buffer:
    """A tensor's memory on the device and, pinned, on the host; it grows and never shrinks."""

    def __init__(self, device: Device):
        self.device = device
        self.capacity = self.pointer = self.host = 0
        self._free: list[Callable[[], object]] = []

    def reserve(self, count: int) -> None:
        """Make room for `count` bytes; what was there before is lost. Raises ResourceError."""
        if count <= self.capacity:
            return
        self.free()
        cuda = self.device.cuda
        self.pointer = int(self.device.call("cudaMalloc", count))
        self._free.append(weakref.finalize(self, cuda.cudaFree, self.pointer))
        self.host = int(self.device.call("cudaMallocHost", count))
        self._free.append(weakref.finalize(self, cuda.cudaFreeHost, self.host))
        self.capacity = count

    def free(self) -> None:
        """Give the memory back."""
        for free in self._free:
            free()
        self._free, self.capacity = [], 0

    def array(self, shape: tuple[int, ...], dtype: str) -> Array:
        """The host's side as an array."""
        count = math.prod(shape) * np.dtype(dtype).itemsize
        memory = memoryview((ctypes.c_char * count).from_address(self.host))
        return np.frombuffer(memory, np.dtype(dtype)).reshape(shape)
