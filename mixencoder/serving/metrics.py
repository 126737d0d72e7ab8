"""What `/metrics` shows: counts and times of requests and passes, in Prometheus' text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one server.

    Args:
        waiting: returns the number of waiting requests.
        candidates: returns the number of candidates in the index.
    """

    def __init__(self, waiting: Callable[[], int], candidates: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        labels = ["endpoint"]
        self.requests = Counter("mixencoder_requests", "Requests answered.", [*labels, "status"], registry=registry)
        self.seconds = Histogram(
            "mixencoder_request_seconds", "Time to answer a request.", labels, buckets=_SECONDS, registry=registry
        )
        self.in_work = Gauge("mixencoder_requests_in_work", "Requests in work now.", registry=registry)
        self.pairs = Counter("mixencoder_pairs", "Pairs of query and candidate ranked.", registry=registry)
        self.tokens = Counter("mixencoder_tokens", "Tokens of the texts that requests held.", registry=registry)
        self.cut = Counter("mixencoder_texts_cut", "Texts longer than the model reads.", registry=registry)
        self.abandoned = Counter("mixencoder_requests_abandoned", "Requests whose client went away.", registry=registry)
        self.pass_requests = Histogram(
            "mixencoder_pass_requests", "Requests gathered into a pass.", buckets=_COUNTS, registry=registry
        )
        self.pass_seconds = Histogram("mixencoder_pass_seconds", "Time of a pass.", buckets=_SECONDS, registry=registry)
        Gauge("mixencoder_queue_length", "Requests that wait for the model.", registry=registry).set_function(waiting)
        Gauge("mixencoder_index_candidates", "Candidates in the index.", registry=registry).set_function(candidates)

    def observe_pass(self, jobs: int, seconds: float) -> None:
        """Note a pass."""
        self.pass_requests.observe(jobs)
        self.pass_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)
