"""The server with a leak: python -m tests.soak.leaky BUNDLE… keeps a part of what it answers."""

from typing import Any

import numpy as np

from runtime import cli
from serving.__main__ import parser, serve
from serving.service import Service

LEAK = 1 << 20  # bytes of an answer
kept: list[Any] = []
whole = Service.file


def leaking(*args: Any) -> bytes:
    kept.append(np.ones(LEAK, np.uint8))
    return whole(*args)


if __name__ == "__main__":
    Service.file = leaking  # type: ignore[assignment]
    cli.run(serve, parser())
