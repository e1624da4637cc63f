"""Backends and forms of the graphs compared and inspected by Polygraphy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from runtime.bundle.manifest import Manifest, read_manifest

polygraphy = pytest.importorskip("polygraphy", reason="Polygraphy: pip install '.[export]'")
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx  # noqa: E402
from polygraphy.common import TensorMetadata  # noqa: E402
from polygraphy.comparator import Comparator, DataLoader, SimpleCompareFunc  # noqa: E402
from polygraphy.logger import G_LOGGER  # noqa: E402

SIZES = {"batch": 2, "conditions": 2, "height": 31, "width": 64}
TOLERANCE = 1e-4
# One process of Polygraphy knows one flavour of TensorRT, chosen before its import.
NETWORKS = """
import json, sys
from pathlib import Path
from polygraphy.backend.trt import network_from_onnx_bytes
from polygraphy.logger import G_LOGGER
G_LOGGER.module_severity = G_LOGGER.ERROR
found = {}
for path in map(Path, sys.argv[1:]):
    builder, network, parser = network_from_onnx_bytes(path.read_bytes())
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    found[path.name] = {tensor.name: list(tensor.shape) for tensor in tensors}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    G_LOGGER.module_severity = G_LOGGER.ERROR
    return read_manifest(tiny_bundle)


def agree(manifest: Manifest, name: str, *models: bytes) -> bool:
    """Whether ONNX Runtime gives the same on Polygraphy's own random inputs."""
    metadata = TensorMetadata()
    for tensor in manifest.graph(name).inputs:
        metadata.add(tensor.name, np.float32, tensor.shape(SIZES))
    ranges = {"": (-1.0, 1.0), "text_k": (0.1, 2.0), "k": (0.1, 2.0), "response": (0.1, 2.0)}
    data = DataLoader(seed=1, iterations=1, input_metadata=metadata, val_range=ranges)
    found = Comparator.run([OnnxrtRunner(SessionFromOnnx(model)) for model in models], data)
    close = SimpleCompareFunc(rtol=TOLERANCE, atol=TOLERANCE)
    return bool(Comparator.compare_accuracy(found, compare_func=close))


def test_the_forms_of_a_graph_agree(manifest: Manifest) -> None:
    for name, spec in manifest.for_cpu.items():
        plain = manifest.file_bytes(manifest.graph(name))
        assert agree(manifest, name, plain, manifest.file_bytes(spec)), name


def test_another_weight_is_seen(manifest: Manifest) -> None:
    plain = manifest.file_bytes(manifest.graph("r2id"))
    model = onnx.load_from_string(plain)
    weight = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    values = numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
    assert not agree(manifest, "r2id", plain, model.SerializeToString())


def test_tensorrt_reads_every_graph_with_its_axes(manifest: Manifest) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX: pip install '.[tensorrt-rtx]'")
    files = [manifest.folder / spec.file for spec in manifest.graphs.values()]
    done = subprocess.run(
        [sys.executable, "-c", NETWORKS, *map(str, files)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for spec in manifest.graphs.values():
        wanted = {
            t.name: [-1 if isinstance(axis, str) else axis for axis in t.axes] for t in spec.inputs
        }
        assert found[spec.file] == wanted
