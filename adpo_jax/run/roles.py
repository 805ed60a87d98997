"""A run on several sets of devices: one trains, and others sample for it.

    python -m adpo_jax.main --config=configs/gsm8k.py --role=trainer --listen=0.0.0.0:8470
    python -m adpo_jax.main --config=configs/gsm8k.py --role=sampler --trainer=10.0.0.1:8470

Both read the run's key from the environment variable `KEY_VARIABLE`. A sampler is a single process
with devices of its own; there may be any number, which come and go (`rollouts.dispatch`). The
trainer sends them its weights, or writes them into the folder --weights (`rollouts.weights`).
"""

import collections
import os
import queue
import sys
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.engine.verbs import Verbs
from adpo_jax.model import lora
from adpo_jax.policy.policy import Policy
from adpo_jax.rollouts import weights as weights_lib
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.flight import FlyingGroup, FlyingSample
from adpo_jax.rollouts.group_decoding import GroupDecoding
from adpo_jax.run import digests, loading, setup
from adpo_jax.run.config_files import user_path
from adpo_jax.run.sampler_line import Line, Refusal, TrainerLost

KEY_VARIABLE = "ADPO_JAX_RUN_KEY"
# Decode steps between two looks at what has come from the trainer.
_STEPS = 16
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


def sent_weights(verbs: Verbs, params) -> Any:
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


def fits_of_params(verbs: Verbs, params) -> dict[str, str]:
    """What `fits_of` lacks: that the weights which are not sent are the same."""
    return _fits_of_frozen(lora.split(verbs.cast(params))[1])


def _fits_of_frozen(weights: Any) -> dict[str, str]:
    if not jax.tree.leaves(weights):
        return {}
    return {"digest of the frozen weights": digests.digest(weights)}


def make_sampler(config: ConfigDict, address: str, key: str, *, weights: str = "") -> "SamplerRole":
    """The sampler of a config, whose mesh is this process's own.

    Args:
      weights: the trainer's folder of weights as it is found here; "" where it lies at the same
        place.

    Raises:
      ValueError: for anything in the config that cannot work.
    """
    weights = checked_folder(weights) if weights else ""
    source = loading.find_model(config)
    mesh = setup.make_mesh(config)
    policy = loading.make_policy(config, source, mesh)
    engine = setup.make_engine(config, policy)
    frozen = None
    if policy.lora:
        whole = loading.initial_params(config, source, mesh)
        frozen = lora.split(engine.verbs.cast(whole))[1]
    sampling = setup.make_sampling(config, source)
    return SamplerRole(
        policy, engine, sampling, frozen=frozen, address=address, key=key, weights=weights
    )


def checked_folder(given: str) -> str:
    """The absolute path of a sampler's folder of weights.

    Raises:
      ValueError: where there is none.
    """
    path = user_path(given).absolute()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if not is_folder:
        raise ValueError(
            f"--weights: there is no folder {str(path)!r:.200} here; name the one that the "
            "trainer writes its weights into, where this machine finds it"
        )
    return str(path)


class SamplerRole:
    """A process that samples for a trainer.

    Args:
      frozen: the weights that are not trained, as decoding reads them; None where all are.
      address: of the trainer, "host:port".
      weights: the trainer's folder of weights as it is found here; "" where it lies at the same
        place.
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
        weights: str = "",
    ):
        self._policy, self._engine, self._sampling = policy, engine, sampling
        self._frozen = frozen
        abstract = jax.eval_shape(engine.verbs.cast, policy.abstract_params())
        self._abstract = lora.split(abstract)[0]
        fits = fits_of(policy, engine, sampling) | _fits_of_frozen(frozen)
        self._line = Line(address, key, fits, self._abstract, folder=weights)
        self._address = address
        self._clear()

    def _clear(self) -> None:
        self._params, self._version = None, -1
        self._sent: dict[str, jax.Array] = {}  # the weights that the trainer sent, by name
        self._works: dict[int, dict] = {}
        self._groups: dict[int, FlyingGroup] = {}
        self._fresh: collections.deque[int] = collections.deque()
        self._decoding: GroupDecoding | None = None

    def run(self) -> None:
        """Samples until the trainer says that its run is over.

        Raises:
          Refusal: where the trainer refuses this sampler.
          TrainerLost: where it is not there for long, or its weights are not.
        """
        print(f"sampling for the trainer at {self._address}", file=sys.stderr, flush=True)
        self._line.start()
        while self._take_news():
            self._line.beat()
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
                self._line.beat()
                if idle and self._params is not None:
                    self._tell_room()
                if idle:
                    continue
                return True
            first = False
            if kind == "finished":
                return False
            if kind == "raised":
                raise content[0]
            if kind == "refused":
                raise Refusal(f"the trainer at {self._address} refuses: {content[0]}")
            if kind == "lost":
                raise TrainerLost(f"the trainer at {self._address} is lost: {content[0]}")
            getattr(self, f"_on_{kind}")(*content)

    def _on_reset(self) -> None:
        self._leave()
        self._clear()

    def _on_weights(self, version: int, changed: dict[str, np.ndarray]) -> None:
        self._leave()
        layouts = dict.fromkeys(changed)
        if self._policy.mesh is not None:
            whole = self._policy.shardings(self._policy.abstract_params())
            layouts = weights_lib.by_name(lora.split(whole)[0])
        self._sent |= {name: jax.device_put(x, layouts[name]) for name, x in changed.items()}
        tree = weights_lib.as_tree(self._sent, self._abstract)
        self._params = tree if self._frozen is None else lora.join(tree, self._frozen)
        self._version = version
        self._fresh = collections.deque(sorted(self._works))

    def _on_works(self, works: list[dict]) -> None:
        started = (FlyingSample.empty(),) * self._sampling.n
        for work in works:
            if work["number"] not in self._works:
                self._works[work["number"]] = work
                self._groups[work["number"]] = started
                self._fresh.append(work["number"])
        self._tell_room()

    def _on_dropped(self, numbers: list[int]) -> None:
        numbers = [number for number in numbers if number in self._works]  # others are delivered
        if not numbers:
            return
        # They may be handed out again, so nothing of them may go on; others do, in a new session.
        self._leave()
        for number in numbers:
            del self._works[number], self._groups[number]
        self._fresh = collections.deque(sorted(self._works))

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
        groups = self._engine.stream(
            self._params,
            prompts,
            self._sampling,
            jax.random.key(0),
            version=self._version,
            keys=keys,
            on_tokens=lambda *_: self._line.beat(),
        )
        for group in groups:
            number = numbers[group.prompt_index]
            self._line.deliver(self._works.pop(number), group.completions)
            del self._groups[number]
        self._fresh.clear()
        self._tell_room()

    def _decode(self) -> None:
        """Decodes a while; groups go on from one set of weights to the next."""
        if self._decoding is None:
            session = self._engine.session(
                self._params, self._sampling, jax.random.key(0), version=self._version
            )
            self._decoding = GroupDecoding(session)
        while self._fresh:
            number = self._fresh.popleft()
            if number in self._works:
                work = self._works[number]
                keys = np.array(work["keys"], np.uint32)
                self._decoding.submit(number, work["prompt"], keys, self._groups[number])
        self._decoding.decode(_STEPS)
        for number in self._decoding.whole():
            group = self._decoding.take(number)
            work = self._works.pop(number)
            del self._groups[number]
            self._line.deliver(work, [sample.completion() for sample in group])
        self._tell_room()

    def _leave(self) -> None:
        """Ends the decoding under the present weights; what is under way keeps its tokens."""
        if self._decoding is not None:
            left = self._decoding.left()
            self._groups |= {n: group for n, group in left.items() if n in self._works}
            self._decoding = None
