"""Numbers for Prometheus, at /metrics in its text format.

What vLLM measures too has vLLM's name, so that dashboards made for it work.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from adpo_jax.engine.continuous import ContinuousBatch

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds.
_TO_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_A_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_A_REQUEST = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480)


class Metrics:
    """The numbers of one server.

    Args:
      model_name: a label of those that are vLLM's.
      batch: asked for its load whenever the numbers are read.
    """

    def __init__(self, model_name: str, batch: ContinuousBatch):
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        gauges = {
            "vllm:num_requests_running": ("Completions that decode.", lambda: batch.num_running),
            "vllm:num_requests_waiting": (
                "Completions that wait for a slot.",
                lambda: batch.num_waiting,
            ),
            "adpo_jax:slots": (
                "Slots of the batch as it is now; it grows and shrinks with the load.",
                lambda: batch.sizes.slots if batch.sizes else 0,
            ),
            "adpo_jax:weight_version": (
                "The version of the weights, 0 for those that the server started with.",
                lambda: batch.version,
            ),
            "adpo_jax:max_slots": ("The most slots of the batch.", lambda: batch.num_slots),
        }
        for name, (text, value) in gauges.items():
            self._make(Gauge, name, text).set_function(value)
        make = self._make
        self._prompt_tokens = make(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._tokens = make(Counter, "vllm:generation_tokens", "Tokens that were sampled.")
        self._ended = Counter(
            "vllm:request_success",
            "Completions that ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._to_first = make(
            Histogram,
            "vllm:time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            _TO_FIRST_TOKEN,
        )
        self._per_token = make(
            Histogram,
            "vllm:request_time_per_output_token_seconds",
            "Seconds a token after the first, on average over a completion.",
            _A_TOKEN,
        )
        self._whole = make(
            Histogram,
            "vllm:e2e_request_latency_seconds",
            "From the arrival of a request to the end of a completion.",
            _A_REQUEST,
        )
        self._responses = Counter(
            "adpo_jax:http_responses",
            "Answers by route and status.",
            ["route", "status"],
            registry=self._registry,
        )

    def _make(self, kind, name: str, text: str, buckets=None):
        options = {} if buckets is None else {"buckets": buckets}
        made = kind(name, text, ["model_name"], registry=self._registry, **options)
        return made.labels(**self._labels)

    def text(self) -> bytes:
        """All numbers in the text format."""
        return generate_latest(self._registry)

    def answered(self, route: str, status: int) -> None:
        self._responses.labels(route=route, status=status).inc()

    def began(self, num_prompt_tokens: int) -> None:
        """A request's prompts are known."""
        self._prompt_tokens.inc(num_prompt_tokens)

    def timing(self, arrived: float) -> "Timing":
        """A clock for one completion of a request that arrived then, by `time.perf_counter`."""
        return Timing(self, arrived)


class Timing:
    """The times of one completion."""

    def __init__(self, metrics: Metrics, arrived: float):
        self._metrics, self._began, self._first = metrics, arrived, None
        self._num_tokens = self._num_first = 0

    def tokens(self, count: int) -> None:
        """Some tokens have come."""
        self._metrics._tokens.inc(count)
        self._num_tokens += count
        if self._first is None and count:
            self._first, self._num_first = time.perf_counter(), count
            self._metrics._to_first.observe(self._first - self._began)

    def ended(self, finish_reason: str) -> None:
        now, further = time.perf_counter(), self._num_tokens - self._num_first
        if further:
            self._metrics._per_token.observe((now - self._first) / further)
        self._metrics._whole.observe(now - self._began)
        labels = self._metrics._labels | {"finished_reason": finish_reason}
        self._metrics._ended.labels(**labels).inc()
