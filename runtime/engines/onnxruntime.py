"""ONNX Runtime: CPU, CUDA and the other execution providers of its builds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.engines import EngineOptions
from runtime.errors import ArtefactError, IncompatibleError, NumericalError, ResourceError
from runtime.manifest import Array, GraphSpec

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
OUT_OF_MEMORY = ("bad allocation", "bad_alloc", "failed to allocate", "out of memory")


def load_library() -> Any:
    """Import onnxruntime; raises IncompatibleError with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise IncompatibleError(
            f"onnxruntime cannot be imported ({error}); expected it for ONNX graphs. "
            "Install it with: python -m pip install '.[cpu]' (or '.[gpu]' for CUDA)"
        ) from None
    return onnxruntime


class OnnxRuntimeEngine:
    """One graph in an ONNX Runtime session; `Run` may be called from several threads."""

    def __init__(self, spec: GraphSpec, model: bytes, options: EngineOptions):
        library = load_library()
        wanted = PROVIDERS[options.provider]
        available = library.get_available_providers()
        if wanted not in available and not options.allow_fallback:
            extra = EXTRAS.get(options.provider)
            fix = f"Install it with: python -m pip install '.[{extra}]', or" if extra else "Either"
            raise IncompatibleError(
                f"--provider {options.provider}: onnxruntime {library.__version__} here has "
                f"{available}; expected {wanted}. {fix} choose --provider cpu or --allow-fallback"
            )
        settings = library.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.log_severity_level = 3
        chosen = [wanted] if wanted in available else [PROVIDERS["cpu"]]
        self.spec = spec
        self.session: onnxruntime.InferenceSession = self._open(library, model, settings, chosen)
        running = self.session.get_providers()[0]
        if running != wanted and not options.allow_fallback:
            raise IncompatibleError(
                f"--provider {options.provider}: onnxruntime fell back to {running}; expected "
                f"{wanted}. Check the driver, or pass --allow-fallback"
            )
        self.provider = next(name for name, full in PROVIDERS.items() if full == running)

    def _open(self, library: Any, model: bytes, settings: Any, providers: list[str]) -> Any:
        try:
            return library.InferenceSession(model, settings, providers=providers)
        except Exception as error:  # the library's exceptions share no public base class
            if _out_of_memory(error):
                raise self._memory_error(error) from None
            raise ArtefactError(
                f"{self.spec.file}: onnxruntime {library.__version__} refuses it "
                f"({_first_line(error)}). Make the bundle again with: make export"
            ) from None

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph on inputs that fit its spec; see `Engine.run`."""
        self.spec.check_inputs(inputs)
        names = outputs or [t.name for t in self.spec.outputs]
        options = load_library().RunOptions()
        options.only_execute_path_to_fetches = outputs is not None
        try:
            values = self.session.run(names, dict(inputs), options)
        except Exception as error:
            if _out_of_memory(error):
                raise self._memory_error(error) from None
            raise NumericalError(f"{self.spec.file}: {_first_line(error)}") from None
        return dict(zip(names, values, strict=True))

    def _memory_error(self, error: Exception) -> ResourceError:
        return ResourceError(
            f"{self.spec.file}: out of memory ({_first_line(error)}); "
            "ask for a smaller --image, --latent or --batch"
        )


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(t in str(error).lower() for t in OUT_OF_MEMORY)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
