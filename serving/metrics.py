"""What Prometheus reads at /metrics."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from runtime.memory import resident

TIMES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class Metrics:
    """Counters of one server, in a registry of its own."""

    type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            "r2_requests", "answers, by path and status", ("path", "status"), registry=own
        )
        self.pictures = Counter("r2_pictures", "pictures drawn", ("model",), registry=own)
        self.stopped = Counter(
            "r2_pictures_stopped", "pictures given up while they were diffused", registry=own
        )
        self.waiting = Gauge("r2_queue_pictures", "pictures that wait", registry=own)
        self.drawing = Gauge("r2_drawing_pictures", "pictures being drawn", registry=own)
        self.batches = Histogram(
            "r2_batch_pictures",
            "pictures diffused at once",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=own,
        )
        self.seconds = Histogram(
            "r2_seconds",
            "seconds by part: queue and decode of a picture, diffuse of a batch, preview, encode",
            ("part",),
            buckets=TIMES,
            registry=own,
        )
        memory = Gauge("r2_memory_bytes", "memory that this process holds", registry=own)
        memory.set_function(resident)
        ProcessCollector(registry=own)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry)
