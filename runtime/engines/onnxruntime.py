"""ONNX Runtime: CPU, CUDA and the other execution providers of its builds."""

import importlib
import importlib.util
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime.bundle.manifest import REBUILD, Array, GraphSpec
from runtime.engines import EngineOptions
from runtime.engines.bound import BoundSession
from runtime.engines.onnx_file import check_interface, check_outputs, check_self_contained
from runtime.errors import ArtefactError, IncompatibleError, NumericalError
from runtime.memory import is_out_of_memory, memory_error
from runtime.providers import PROVIDERS, Provider

if TYPE_CHECKING:
    import onnxruntime

_importing = threading.Lock()
ONCE = ("size", "schedule", "prompt")  # lifetimes of graphs that run once in a request


def load_library() -> Any:
    """Import onnxruntime; raises IncompatibleError with the command that installs it.

    Raises ResourceError where there is no memory for it. By one thread at a time: beside an
    import that fails, another would get half a module.
    """
    try:
        with _importing:
            import onnxruntime
    except ImportError as error:
        if is_out_of_memory(error):
            raise memory_error(error, "onnxruntime cannot be imported: ") from None
        raise IncompatibleError(
            f"onnxruntime cannot be imported ({error}); expected it for ONNX graphs. "
            f"Install it with: {PROVIDERS['cpu'].install} (for CUDA: {PROVIDERS['cuda'].install})"
        ) from None
    return onnxruntime


class OnnxRuntimeEngine:
    """One graph in an ONNX Runtime session; `Run` may be called from several threads.

    `provider` is the one that runs it. Raises ArtefactError for a graph that is none or reaches
    outside its file, IncompatibleError where the provider is missing, fails to open the graph or
    leaves all of it to another, unless `allow_fallback` lets the CPU step in. `optimised`: the
    graph is as the library would make it, which takes it as long as all else that it does to open
    one.
    """

    def __init__(
        self, spec: GraphSpec, model: bytes, options: EngineOptions, optimised: bool = False
    ):
        check_self_contained(model, spec.file)
        self.spec = spec
        self.session: onnxruntime.InferenceSession
        try:
            self.session = _open(spec, model, options, optimised)
        except IncompatibleError:
            if not options.allow_fallback:
                raise
            options = replace(options, provider="cpu", provider_options={})
            self.session = _open(spec, model, options, optimised)
        self.provider = options.provider
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        check_interface(spec, *({t.name: t.shape for t in own} for own in (inputs, outputs)))
        self._bound = _bound(self.session, spec, options)

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph on inputs that fit its spec; see `Engine.run`."""
        sizes = self.spec.check_inputs(inputs)
        names = outputs or [t.name for t in self.spec.outputs]
        options = load_library().RunOptions()
        options.only_execute_path_to_fetches = outputs is not None
        try:
            if self._bound is not None:
                return self._bound.run(inputs, sizes, names)
            values = self.session.run(names, dict(inputs), options)
        except Exception as error:
            if is_out_of_memory(error):
                raise memory_error(error, f"{self.spec.file}: ") from None
            raise NumericalError(f"{self.spec.file}: {_first_line(error)}") from None
        made = dict(zip(names, values, strict=True))
        check_outputs(self.spec, sizes, made)
        return made


def _open(spec: GraphSpec, model: bytes, options: EngineOptions, optimised: bool) -> Any:
    """A session that runs on the provider asked for and nowhere else; see OnnxRuntimeEngine."""
    library = load_library()
    provider = PROVIDERS[options.provider]
    settings = library.SessionOptions()
    # What runs once is over before a pool of threads is up, which would spin beside the steps.
    settings.intra_op_num_threads = 1 if spec.lifetime in ONCE else options.threads
    settings.log_severity_level = 3
    # A pattern is a block for a whole run, beside the arena that the first run grew for the same.
    settings.enable_mem_pattern = False
    if optimised:
        settings.graph_optimization_level = library.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    chosen = _choose(library, settings, options)
    try:  # enable_fallback: the library's own way to the CPU, also in the middle of a run
        session = library.InferenceSession(model, settings, providers=chosen, enable_fallback=0)
    except Exception as error:  # the library's exceptions share no public base class
        if is_out_of_memory(error):
            raise memory_error(error, f"{spec.file}: ") from None
        if isinstance(error, library.capi.onnxruntime_pybind11_state.NotImplemented):
            raise IncompatibleError(
                f"{spec.file}: onnxruntime {library.__version__} cannot run {spec.precision} on "
                f"--provider {options.provider} ({_first_line(error)}). Choose --precision fp32 or "
                "another --provider"
            ) from None
        refuses = f"onnxruntime {library.__version__} refuses it ({_first_line(error)})"
        if options.provider == "cpu":
            raise ArtefactError(f"{spec.file}: {refuses}. {REBUILD}") from None
        raise IncompatibleError(
            f"--provider {options.provider}: {spec.file}: {refuses}. Check the driver and each "
            "--provider-option, or choose --provider cpu or --allow-fallback"
        ) from None
    # A provider can be in the session and yet be given none of the graph.
    ran = sorted({part.ep_name for part in session.get_provider_graph_assignment_info()})
    if options.provider != "cpu" and provider.ep_name not in ran:
        raise IncompatibleError(
            f"--provider {options.provider}: {spec.file}: onnxruntime {library.__version__} fell "
            f"back to {' and '.join(ran)}; expected {provider.ep_name}. Check the driver and its "
            "libraries, or pass --allow-fallback"
        )
    return session


def _bound(session: Any, spec: GraphSpec, options: EngineOptions) -> BoundSession | None:
    """The session with its tensors on the device, for providers whose memory the library has."""
    provider, own = PROVIDERS[options.provider], options.provider_options
    if not provider.device:
        return None
    capture = own.get(provider.capture, "0").lower() in ("1", "true")
    device = provider.device, int(own.get("device_id", "0"))
    return BoundSession(load_library(), session, spec, device, capture)


def _choose(library: Any, settings: Any, options: EngineOptions) -> list[Any] | None:
    """The `providers` of a session; None for a plugin, which the settings name instead."""
    provider = PROVIDERS[options.provider]
    own = {**provider.defaults, **options.provider_options}
    available = library.get_available_providers()
    if provider.ep_name in available:
        if options.provider != "cpu":
            library.preload_dlls(msvc=False)  # CUDA's libraries where pip has put them
        return [(provider.ep_name, own)]
    if not provider.plugin or importlib.util.find_spec(provider.plugin) is None:
        raise IncompatibleError(
            f"--provider {options.provider}: onnxruntime {library.__version__} here has "
            f"{available}; expected {provider.ep_name}. Install it with: {provider.install}, "
            "or choose --provider cpu or --allow-fallback"
        )
    devices = _plugin_devices(library, provider, f"--provider {options.provider}")
    settings.add_provider_for_devices(devices, own)
    return None


def _plugin_devices(library: Any, provider: Provider, option: str) -> list[Any]:
    """The devices of a provider that comes as a library of its own, registered once."""
    try:
        plugin = importlib.import_module(provider.plugin)
        name = plugin.get_ep_name()
        if all(device.ep_name != name for device in library.get_ep_devices()):
            library.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:  # of a foreign package, and a C++ library's loader
        raise IncompatibleError(
            f"{option}: {provider.plugin} cannot be loaded ({_first_line(error)}). Check the "
            "driver with: nvidia-smi, or choose --provider cpu or --allow-fallback"
        ) from None
    devices = [device for device in library.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise IncompatibleError(
            f"{option}: {provider.plugin} finds no device that it can run on. Choose --provider "
            "cuda or cpu, or --allow-fallback"
        )
    return devices


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
