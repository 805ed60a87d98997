"""A run on several sets of devices: one trains, and others sample for it.

    python -m adpo_jax.main --config=configs/gsm8k.py --role=trainer --listen=0.0.0.0:8470
    python -m adpo_jax.main --config=configs/gsm8k.py --role=sampler --trainer=10.0.0.1:8470

Both read the run's key from the environment variable `KEY_VARIABLE`. A sampler is a single process
with devices of its own; there may be any number, which come and go (`rollouts.dispatch`).
"""

import collections
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.model import lora
from adpo_jax.policy.policy import Policy
from adpo_jax.records import Completion
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S
from adpo_jax.rollouts.flight import FlyingGroup, FlyingSample, GroupDecoding
from adpo_jax.run import loading, setup

KEY_VARIABLE = "ADPO_JAX_RUN_KEY"
# Decode steps between two looks at what has come from the trainer.
_STEPS = 16
# Seconds between two attempts to reach the trainer.
_RETRY_S = 2.0
# Seconds without the trainer after which a sampler gives up.
GIVE_UP_S = 1800.0
# As many groups as any batch has: in calls of whole batches a sampler takes its whole share.
_ALL = 1 << 30


def read_key() -> str:
    """The key that trainer and samplers share.

    Raises:
      ValueError: where there is none.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ValueError(
            f"--role needs a key that trainer and samplers share: set {KEY_VARIABLE} to the same "
            "long random text for all of them"
        )
    return key


def parsed_address(text: str, flag: str) -> tuple[str, int]:
    """Host and port of "host:port".

    Raises:
      ValueError: for anything else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{flag} is HOST:PORT; given {text!r:.100}")
    return host.strip("[]"), int(port)


def sent_weights(policy: Policy, verbs, params) -> Any:
    """What samplers are sent of the parameters: the trained ones, as decoding reads them."""
    return lora.split(verbs.cast(params))[0]


def fits_of(policy: Policy, engine: Engine, sampling: SamplingParams) -> dict[str, str]:
    """What a sampler must have in common with its trainer, in words."""
    weights = jax.eval_shape(engine.verbs.cast, policy.abstract_params())
    leaves, _ = jax.tree_util.tree_flatten_with_path(weights)
    shapes = [f"{jax.tree_util.keystr(p)} {x.dtype}{list(x.shape)}" for p, x in leaves]
    return {
        "model": wire.digest_of("\n".join(shapes).encode()),
        "architecture": str(policy.config),
        "sampling": str(sampling),
        "cache": str(engine.verbs.layout.dtype),
        "longest prompt": str(engine.max_prompt_length),
    }


class TrainerLost(Exception):
    """The trainer cannot be reached, or sends what is nothing."""


class Refusal(ValueError):
    """The trainer refuses this sampler."""


class _Line:
    """A sampler's line to the trainer: threads that ask for orders and deliver groups.

    Attributes:
      inbox: what has come: ("weights", version, tree), ("works", list), ("dropped", numbers),
        ("reset",), ("finished",), ("refused", text) and ("lost", text).
    """

    def __init__(self, address: str, key: str, fits: dict[str, str], abstract: Any):
        import httpx

        self.inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.whole_calls = False
        self._fits, self._abstract = fits, abstract
        self._client = httpx.Client(
            base_url=f"http://{address}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(60.0, connect=5.0),
            trust_env=False,
        )
        self._errors = httpx.HTTPError
        self._name, self._run = secrets.token_hex(8), ""
        self._lock = threading.Lock()
        self._holds: set[int] = set()
        self._room, self._version = 0, -1
        self._reached = time.monotonic()
        self._outbox: queue.SimpleQueue[tuple[str, int, list[Completion]] | None]
        self._outbox = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._told, args=(work,), name=name, daemon=True)
            for name, work in (("orders", self._ask), ("deliveries", self._deliver))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def set_room(self, room: int) -> None:
        """Says how many further groups could begin."""
        with self._lock:
            self._room = room

    def deliver(self, number: int, completions: list[Completion]) -> None:
        """Sends a whole group, as soon as the trainer can be reached."""
        self._outbox.put((self._run, number, completions))

    # --- in the threads

    def _told(self, work: Callable[[], None]) -> None:
        """Works; what it raises ends the sampler, which would wait for ever else."""
        try:
            work()
        except Exception as error:
            self.inbox.put(("lost", f"{type(error).__name__}: {str(error)[:500]}"))

    def _post(self, path: str, **content) -> dict | None:
        """The answer; None where the trainer cannot be reached, or has begun anew."""
        try:
            answer = self._client.post(path, **content)
        except self._errors:
            if time.monotonic() - self._reached > GIVE_UP_S:
                text = f"it has not been reached for {GIVE_UP_S:g} s"
                self.inbox.put(("lost", text))
            time.sleep(_RETRY_S)
            return None
        self._reached = time.monotonic()
        if answer.status_code == 200:
            return answer.json()
        if answer.status_code == 410:
            self._run = ""
        elif answer.status_code in (400, 401, 409, 413):
            self.inbox.put(("refused", f"{answer.status_code}: {answer.text[:500]}"))
            time.sleep(LEASE_S)
        else:
            time.sleep(_RETRY_S)
        return None

    def _ask(self) -> None:
        held: list[dict] = []
        while True:
            if not self._run:
                held = []
                if not self._say_hello():
                    continue
            with self._lock:
                asked = {
                    "name": self._name,
                    "run": self._run,
                    "holds": sorted(self._holds),
                    "room": self._room,
                    "version": self._version,
                }
            order = self._post("/sampler/order", json=asked)
            if order is None:
                continue
            if order["finished"]:
                self.inbox.put(("finished",))
                return
            if order["works"]:
                with self._lock:
                    self._holds |= {work["number"] for work in order["works"]}
                    self._room = 0  # until the decoding thread says how much is left
            if order["dropped"]:
                with self._lock:
                    self._holds -= set(order["dropped"])
                self.inbox.put(("dropped", order["dropped"]))
            # Groups that are to be sampled by new weights wait for these.
            held += order["works"]
            has_weights = order["version"] == self._version
            if not has_weights and order["version"] is not None:
                has_weights = self._fetch(order["version"])
            if has_weights and held:
                self.inbox.put(("works", held))
                held = []

    def _say_hello(self) -> bool:
        answer = self._post("/sampler/hello", json={"name": self._name, "fits": self._fits})
        if answer is None:
            return False
        with self._lock:
            self._holds.clear()
            self._room, self._version = 0, -1
            self._name = secrets.token_hex(8)
        self.whole_calls, self._run = answer["whole_calls"], answer["run"]
        self.inbox.put(("reset",))
        return True

    def _fetch(self, version: int) -> bool:
        """Fetches weights; returns False where these are gone, for there are newer ones."""
        for _ in range(5):
            try:
                answer = self._client.get(f"/sampler/weights/{version}")
            except self._errors:
                time.sleep(_RETRY_S)
                continue
            if answer.status_code != 200:
                return False
            if answer.headers.get("etag", "").strip('"') != wire.digest_of(answer.content):
                continue
            tree = wire.read_params(answer.content, self._abstract)
            with self._lock:
                self._version = version
            self.inbox.put(("weights", version, tree))
            return True
        return False

    def _deliver(self) -> None:
        while True:
            run, number, completions = self._outbox.get()
            content = wire.packed_groups({number: completions})
            while run == self._run:
                headers = {"x-sampler": self._name, "x-run": run}
                if self._post("/sampler/groups", content=content, headers=headers) is not None:
                    break
            with self._lock:
                self._holds.discard(number)


def make_sampler(config: ConfigDict, address: str, key: str) -> "SamplerRole":
    """The sampler of a config, whose mesh is this process's own.

    Raises:
      ValueError: for anything in the config that cannot work.
    """
    source = loading.find_model(config)
    mesh = setup.make_mesh(config)
    policy = loading.make_policy(config, source, mesh)
    engine = setup.make_engine(config, policy)
    frozen = None
    if policy.lora:
        whole = loading.initial_params(config, source, mesh)
        frozen = lora.split(engine.verbs.cast(whole))[1]
    sampling = setup.make_sampling(config, source)
    return SamplerRole(policy, engine, sampling, frozen=frozen, address=address, key=key)


class SamplerRole:
    """A process that samples for a trainer.

    Args:
      frozen: the weights that are not trained, as decoding reads them; None where all are.
      address: of the trainer, "host:port".
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        sampling: SamplingParams,
        *,
        frozen: Any = None,
        address: str,
        key: str,
    ):
        self._policy, self._engine, self._sampling = policy, engine, sampling
        self._frozen = frozen
        abstract = jax.eval_shape(engine.verbs.cast, policy.abstract_params())
        abstract = lora.split(abstract)[0]
        fits = fits_of(policy, engine, sampling)
        self._line = _Line(address, key, fits, abstract)
        self._address = address
        self._clear()

    def _clear(self) -> None:
        self._params, self._version = None, -1
        self._works: dict[int, dict] = {}
        self._groups: dict[int, FlyingGroup] = {}
        self._fresh: collections.deque[int] = collections.deque()
        self._decoding: GroupDecoding | None = None

    def run(self) -> None:
        """Samples until the trainer says that its run is over.

        Raises:
          Refusal: where the trainer refuses this sampler.
          TrainerLost: where it is not there for long.
        """
        print(f"sampling for the trainer at {self._address}", file=sys.stderr, flush=True)
        self._line.start()
        while self._take_news():
            if self._params is None:
                continue
            if self._line.whole_calls:
                self._sample_whole()
            else:
                self._decode()

    # --- news

    def _take_news(self) -> bool:
        """Takes what has come; waits for it where there is nothing to decode."""
        first = True
        while True:
            idle = first and (self._params is None or not self._works)
            try:
                kind, *content = self._line.inbox.get(timeout=1.0 if idle else 0.0)
            except queue.Empty:
                if idle and self._params is not None:
                    self._tell_room()
                if idle:
                    continue
                return True
            first = False
            if kind == "finished":
                return False
            if kind == "refused":
                raise Refusal(f"the trainer at {self._address} refuses: {content[0]}")
            if kind == "lost":
                raise TrainerLost(f"the trainer at {self._address} is lost: {content[0]}")
            getattr(self, f"_on_{kind}")(*content)

    def _on_reset(self) -> None:
        self._leave()
        self._clear()

    def _on_weights(self, version: int, tree: Any) -> None:
        self._leave()
        if self._policy.mesh is not None:
            layouts = lora.split(self._policy.shardings(self._policy.abstract_params()))[0]
            tree = jax.tree.map(jax.device_put, tree, layouts)
        else:
            tree = jax.device_put(tree)
        self._params = tree if self._frozen is None else lora.join(tree, self._frozen)
        self._version = version
        self._fresh = collections.deque(sorted(self._works))

    def _on_works(self, works: list[dict]) -> None:
        started = (FlyingSample.empty(),) * self._sampling.n
        for work in works:
            self._works[work["number"]] = work
            self._groups[work["number"]] = started
            self._fresh.append(work["number"])
        self._tell_room()

    def _on_dropped(self, numbers: list[int]) -> None:
        for number in numbers:
            self._works.pop(number, None)
            self._groups.pop(number, None)

    def _tell_room(self) -> None:
        if self._line.whole_calls:
            self._line.set_room(0 if self._works else _ALL)
            return
        # One group waits beside those that fill the slots.
        most = -(-self._engine.num_slots // self._sampling.n) + 1
        self._line.set_room(max(most - len(self._works), 0))

    # --- sampling

    def _sample_whole(self) -> None:
        """Samples all groups in one call, as a trainer that samples for itself does."""
        numbers = sorted(self._works)
        if not numbers:
            return
        works = [self._works[number] for number in numbers]
        keys = np.array([work["keys"] for work in works], np.uint32)
        prompts = [work["prompt"] for work in works]
        out = self._engine.generate(
            self._params,
            prompts,
            self._sampling,
            jax.random.key(0),
            version=self._version,
            keys=keys,
        )
        for number, group in zip(numbers, out.groups, strict=True):
            self._line.deliver(number, group)
            del self._works[number], self._groups[number]
        self._fresh.clear()
        self._tell_room()

    def _decode(self) -> None:
        """Decodes a while; groups go on from one set of weights to the next."""
        if self._decoding is None:
            session = self._engine.session(
                self._params, self._sampling, jax.random.key(0), version=self._version
            )
            self._decoding = GroupDecoding(session, self._version)
        while self._fresh:
            number = self._fresh.popleft()
            if number in self._works:
                work = self._works[number]
                keys = np.array(work["keys"], np.uint32)
                self._decoding.submit(number, work["prompt"], keys, self._groups[number])
        self._decoding.decode(_STEPS)
        for number in self._decoding.whole():
            group = self._decoding.take(number)
            if self._works.pop(number, None) is not None:
                del self._groups[number]
                self._line.deliver(number, [sample.completion() for sample in group])
        self._tell_room()

    def _leave(self) -> None:
        """Ends the decoding under the present weights; what is under way keeps its tokens."""
        if self._decoding is not None:
            left = self._decoding.left()
            self._groups |= {n: group for n, group in left.items() if n in self._works}
            self._decoding = None
