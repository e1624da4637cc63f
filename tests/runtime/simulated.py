"""TensorRT and CUDA as the engine calls them, simulated on the CPU where there is no GPU.

A "plan" is the ONNX graph itself, run by ONNX Runtime; device memory is host memory that only
these calls may reach. It checks what the engine asks for: addresses, sizes, copies, order.
"""

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime.engines import cuda, tensorrt

FUSED = ["weights", "row", "x0_1", "x0_2", "noise", "next", "x0", "size"]


class Cuda:
    """The calls of `cuda.bindings.runtime` that the engine makes; `limit` bytes of memory.

    As with CUDA itself, several threads may call it at once.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=0, cudaErrorMemoryAllocation=2)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N815

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit, self.device, self.host = limit, {}, {}  # type: ignore[var-annotated]
        self.copies: list[tuple[str, int]] = []
        self.allocations = self.used = 0
        self.lock = threading.RLock()  # of these two; the collector frees in any thread's midst

    def cudaMalloc(self, count: int) -> tuple[int, int]:  # noqa: N802
        with self.lock:
            if count > self.free():
                return 2, 0
            self.allocations += 1
            self.used += count
        return 0, self._new(self.device, count)

    def cudaMallocHost(self, count: int) -> tuple[int, int]:  # noqa: N802
        return 0, self._new(self.host, count)

    def cudaFree(self, pointer: int) -> tuple[int]:  # noqa: N802
        count = len(self.device.pop(pointer))
        with self.lock:
            self.used -= count
        return (0,)

    def cudaFreeHost(self, pointer: int) -> tuple[int]:  # noqa: N802
        del self.host[pointer]
        return (0,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, count: int, kind: int, stream: int
    ) -> tuple[int]:
        places = [self._place(pointer, count) for pointer in (source, target)]
        self.copies.append(("→".join(places), count))
        ctypes.memmove(target, source, count)
        return (0,)

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaGetLastError(self) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return 0, self.free(), self.limit

    def free(self) -> int:
        return self.limit - self.used

    def array(self, pointer: int, shape: tuple[int, ...]) -> np.ndarray:
        """The float32 tensor at a device address, checked to lie in its memory."""
        count = 4 * int(np.prod(shape))
        assert self._place(pointer, count) == "device"
        memory = memoryview((ctypes.c_char * count).from_address(pointer))
        return np.frombuffer(memory, np.float32).reshape(shape)

    def _new(self, where: dict[int, Any], count: int) -> int:
        memory = ctypes.create_string_buffer(b"\xff" * count, count)  # NaN until it is written
        where[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _place(self, pointer: int, count: int) -> str:
        for name, where in (("device", self.device), ("host", self.host)):
            if pointer in where:
                assert count <= len(where[pointer]), "a copy beyond its memory"
                return name
        raise AssertionError("an address that was not allocated")


class Context:
    """An execution context; the step graph's update is done in numpy, after its definition."""

    def __init__(self, engine: "Engine") -> None:
        self.engine, self.lib = engine, engine.lib
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.lib.profiles.append(profile)
        return self.lib.answer("set_optimization_profile_async", True, False)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return self.lib.answer("set_input_shape", True, False)

    def infer_shapes(self) -> list[str]:
        axes: dict[str, int] = {}
        for value in self.engine.session.get_inputs():
            axes |= dict(zip(value.shape, self.shapes[value.name], strict=True))
        for value in self.engine.session.get_outputs():
            self.shapes[value.name] = tuple(axes.get(axis, axis) for axis in value.shape)
        if self.engine.fused:
            self.shapes |= dict.fromkeys(("next", "x0"), self.shapes["latent"])
            self.shapes["size"] = (1, 1, 1, 1)
        return self.lib.answer("infer_shapes", [], ["latent"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.lib.answer("get_tensor_shape", self.shapes[name], (9, 9))

    def set_tensor_address(self, name: str, pointer: int) -> bool:
        self.addresses[name] = pointer
        return self.lib.answer("set_tensor_address", True, False)

    def execute_async_v3(self, stream: int) -> bool:
        at = {n: self.lib.cuda.array(p, self.shapes[n]) for n, p in self.addresses.items()}
        names = [value.name for value in self.engine.session.get_outputs()]
        given = {v.name: at[v.name] for v in self.engine.session.get_inputs()}
        for name, value in zip(names, self.engine.session.run(names, given), strict=True):
            at[name][...] = value
        if self.engine.fused:
            keep, move, c, d, e, p, q = at["row"]
            x, eps = at["latent"], (at["weights"] * at["eps"]).sum(0)
            history = c * at["x0_1"] + d * at["x0_2"] + e * at["noise"]
            at["next"][...] = keep * x + move * eps + history
            at["x0"][...] = p * x + q * eps
            at["size"][...] = np.abs(at["next"]).mean()
        return self.lib.answer("execute_async_v3", True, False)


class Engine:
    """A deserialised plan: an ONNX Runtime session."""

    def __init__(self, library: "Library", data: bytes) -> None:
        self.lib = library
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            data, options, ["CPUExecutionProvider"], enable_fallback=0
        )
        values = (*self.session.get_inputs(), *self.session.get_outputs())
        self.names = [value.name for value in values]
        self.fused = "eps" in self.names
        self.names += FUSED if self.fused else []
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = library.profiles_in_a_plan

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 12_345

    def create_runtime_config(self) -> Any:
        return self.lib.answer("create_runtime_config", self.lib.config, None)

    def create_execution_context(self, runtime_config: Any) -> Context | None:
        assert runtime_config is self.lib.config
        return self.lib.answer("create_execution_context", Context(self), None)


class Library:
    """The module; `failing` names calls that give None or False, `says` what is logged then."""

    __version__ = "9.9"
    ExecutionContextAllocationStrategy = SimpleNamespace(ON_PROFILE_CHANGE="per profile")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="captured")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy")

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.failing, self.says = cuda, "", "nothing to say"
        self.profiles: list[int] = []
        self.opened: list[bytes] = []
        self.blobs: list[bytes] = []
        self.profiles_in_a_plan = 2
        self.config = SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: SimpleNamespace(
                deserialize=self.take_blob,
                serialize=lambda: b"kernels",
            ),
            set_runtime_cache=lambda cache: self.answer("set_runtime_cache", True, False),
        )

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        self.log = log

        def deserialize(data: bytes) -> Engine | None:
            self.opened.append(data)
            try:
                engine = Engine(self, data)
            except Exception as error:  # the library's classes share no base
                log.log(self.ILogger.ERROR, str(error))
                return None
            return self.answer("deserialize_cuda_engine", engine, None)

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def take_blob(self, blob: bytes) -> bool:
        self.blobs.append(blob)
        return bool(self.answer("deserialize", True, False))

    def answer(self, name: str, good: Any, bad: Any) -> Any:
        """`good`, or where the call is to fail, `bad` and a message."""
        if name != self.failing:
            return good
        self.log.log(self.ILogger.ERROR, self.says)
        return bad


def simulate(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Make this a machine with a GPU of sm89 and TensorRT for RTX 9.9."""
    made = Library(Cuda())
    monkeypatch.setattr(tensorrt, "load_library", lambda flavour: made)
    monkeypatch.setattr(tensorrt, "installed", lambda: ["tensorrt_rtx"])
    monkeypatch.setattr(tensorrt, "device_target", lambda: "sm89")
    for module in (tensorrt, cuda):
        monkeypatch.setattr(module, "load_cuda", lambda: made.cuda)
    return made
