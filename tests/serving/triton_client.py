"""Clients of a Triton server over gRPC, run in its own environment: URL MODEL, requests on stdin.

A request is a JSON object of the model's inputs; all are sent at once, each by a client of its own.
"cancel": true leaves after the first response. Prints what each got as JSON: its responses and
its error.
"""

import json
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tritonclient import grpc

TYPES = {"labels": "UINT8", "guidance_scale": "FP64", "seed": "INT64", "first_index": "INT64"}
KINDS = {"UINT8": np.uint8, "FP64": np.float64, "INT64": np.int64, "INT32": np.int32}
OUTPUTS = ("number", "step", "seed", "preview", "pixels")


def inputs(request: dict[str, Any]) -> list[Any]:
    """Tensors of a request; labels as UTF-8."""
    found = []
    for name, value in request.items():
        kind = TYPES.get(name, "INT32")
        values = list(value.encode()) if isinstance(value, str) else np.ravel(value)
        own = grpc.InferInput(name, [len(values)], kind)
        own.set_data_from_numpy(np.array(values, KINDS[kind]))
        found.append(own)
    return found


def ask(url: str, model: str, request: dict[str, Any]) -> dict[str, Any]:
    """Every response to a request up to the final one, and the error if there was one."""
    news: queue.Queue[tuple[Any, Any]] = queue.Queue()
    cancel = request.pop("cancel", False)
    got: dict[str, Any] = {"responses": [], "error": None}
    with grpc.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: news.put((result, error)))
        client.async_stream_infer(model, inputs(request), enable_empty_final_response=True)
        while True:
            result, error = news.get(timeout=60)
            if error is not None:
                got["error"] = error.message()
                break
            arrays = {name: result.as_numpy(name) for name in OUTPUTS}
            filled = {name: array.tolist() for name, array in arrays.items() if array is not None}
            got["responses"] += [filled] if filled else []
            if cancel or result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream(cancel_requests=cancel)
    return got


def main(url: str, model: str) -> None:
    requests = json.load(sys.stdin)
    with ThreadPoolExecutor(len(requests)) as pool:
        json.dump([*pool.map(lambda own: ask(url, model, own), requests)], sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
