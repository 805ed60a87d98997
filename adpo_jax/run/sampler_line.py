"""A sampler's line to its trainer: it asks what to do, fetches weights, and delivers groups.

Two threads speak to the trainer while the sampler decodes. What comes is put into an inbox; what
goes waits in an outbox until the trainer can be reached. Everything belongs to a start of the
trainer, its "run": what was begun for an earlier one is not delivered to a later one.
"""

import contextlib
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from adpo_jax.records import Completion
from adpo_jax.rollouts import wire
from adpo_jax.rollouts.dispatch import LEASE_S
from adpo_jax.rollouts.weights import Manifest, Unreadable, parts_of_file, taken

# Seconds between two attempts to reach the trainer.
_RETRY_S = 2.0
# Seconds without the trainer after which a sampler gives up.
GIVE_UP_S = 1800.0
# Seconds without a step of decoding after which a sampler no longer says that it lives. A first
# compilation takes minutes.
HUNG_S = 900.0
# Seconds between two questions of a sampler that has no room.
_BUSY_S = 0.5
# Attempts to deliver a group to a trainer that can be reached.
_ATTEMPTS = 30
# Seconds after which weights that cannot be read end a sampler. Other machines' files may show late
# on shared storage.
UNREAD_S = 120.0


class TrainerLost(Exception):
    """The trainer cannot be reached, or its weights cannot be read."""


class Refusal(ValueError):
    """The trainer refuses this sampler."""


class _Gone(Exception):
    """A version of the weights is not there any more, since there are newer ones."""


class Line:
    """The line of one sampler.

    Args:
      address: of the trainer, "host:port".
      fits: what both must have in common, by name.
      abstract: the shapes and dtypes of the weights that are sent.
      folder: the trainer's folder of weights as it is found here; "" where it lies at the same
        place.

    Attributes:
      inbox: what has come: ("weights", version, arrays), ("works", list), ("dropped", numbers),
        ("reset",), ("finished",), ("refused", text), ("lost", text) and ("raised", error). The
        arrays are those, by name, that are new since the weights before. A work is a dict with
        "number", "prompt", "keys" and "run".
      whole_calls: whether all groups of an order are sampled in one call; known after "reset".
    """

    def __init__(
        self, address: str, key: str, fits: dict[str, str], abstract: Any, *, folder: str = ""
    ):
        import httpx

        self.inbox: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        self.whole_calls = False
        self._fits, self._abstract = fits, abstract
        self._given_folder = self._folder = folder
        self._client = httpx.Client(
            base_url=f"http://{address}",
            headers={"Authorization": f"Bearer {key}".encode()},
            timeout=httpx.Timeout(60.0, connect=5.0),
            trust_env=False,
        )
        self._unreached = httpx.HTTPError
        self._name = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._run = ""  # "" until the trainer has been greeted
        self._holds: set[int] = set()
        self._room, self._version = 0, -1
        self._digests: dict[str, str] = {}  # of the weights that have come
        self._unread_since: float | None = None
        self._fetched: float | None = None  # when bytes of weights came last, while they are
        self._reached = self._beaten = time.monotonic()
        self._outbox: queue.SimpleQueue[tuple[dict, list[Completion]]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("orders", self._ask), ("deliveries", self._deliver))
        ]

    # --- for the thread that decodes

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def beat(self) -> None:
        """Says that decoding goes on."""
        self._beaten = time.monotonic()

    def set_room(self, room: int) -> None:
        """Says how many further groups could begin."""
        with self._lock:
            self._room = room

    def deliver(self, work: dict, completions: list[Completion]) -> None:
        """Sends a whole group, as soon as the trainer can be reached."""
        self._outbox.put((work, completions))

    # --- in the threads

    def _guarded(self, work: Callable[[], None]) -> None:
        """Works; what it raises ends the sampler, which would wait for ever else."""
        try:
            work()
        except (TrainerLost, Refusal) as error:
            self.inbox.put(("raised", error))
        except Exception as error:
            self.inbox.put(("lost", f"{type(error).__name__}: {str(error)[:500]}"))

    @property
    def _hangs(self) -> bool:
        oldest = min(self._beaten, self._fetched or self._beaten)
        return time.monotonic() - oldest > HUNG_S

    def _post(self, path: str, run: str = "", **content) -> dict | None:
        """The answer; None where the trainer cannot be reached, or has begun anew."""
        try:
            answer = self._client.post(path, **content)
        except self._unreached:
            if time.monotonic() - self._reached > GIVE_UP_S:
                self.inbox.put(("lost", f"it has not been reached for {GIVE_UP_S:g} s"))
            time.sleep(_RETRY_S)
            return None
        self._reached = time.monotonic()
        if answer.status_code == 200:
            return answer.json()
        if answer.status_code == 410:
            with self._lock:
                if run == self._run:
                    self._run = ""
        elif answer.status_code in (400, 401, 409, 413):
            self.inbox.put(("refused", f"{answer.status_code}: {answer.text[:500]}"))
            time.sleep(LEASE_S)
        else:
            time.sleep(_RETRY_S)
        return None

    def _ask(self) -> None:
        held: list[dict] = []  # until the weights are there that sample them
        while True:
            if self._hangs:
                time.sleep(_BUSY_S)
                continue
            if not self._run:
                held = []
                if not self._say_hello():
                    continue
            with self._lock:
                run = self._run
                asked = {
                    "name": self._name,
                    "run": run,
                    "holds": sorted(self._holds),
                    "room": 0 if self._unread_since else self._room,
                    "version": self._version,
                }
            if not asked["room"]:
                asked["wait"] = _BUSY_S
            order = self._post("/sampler/order", run, json=asked)
            if order is None:
                continue
            if order["finished"]:
                self.inbox.put(("finished",))
                return
            held = self._take(order, run, held)

    def _take(self, order: dict, run: str, held: list[dict]) -> list[dict]:
        """Takes an order; returns the groups whose weights are not there yet."""
        dropped = set(order["dropped"])
        with self._lock:
            self._holds -= dropped
            self._holds |= {work["number"] for work in order["works"]}
            if order["works"]:
                self._room = 0  # until the decoding thread says how much is left
        if dropped:
            self.inbox.put(("dropped", sorted(dropped)))
        held = [work for work in held if work["number"] not in dropped]
        held += [work | {"run": run} for work in order["works"]]
        has_weights = order["version"] == self._version
        if not has_weights and order["version"] is not None:
            has_weights = self.fetch(order["version"])
        if has_weights and held:
            self.inbox.put(("works", held))
            return []
        return held

    def _say_hello(self) -> bool:
        answer = self._post("/sampler/hello", json={"name": self._name, "fits": self._fits})
        if answer is None:
            return False
        with self._lock:
            self._holds.clear()
            self._room, self._version = 0, -1
            self.whole_calls, self._run = answer["whole_calls"], answer["run"]
        self._digests, self._unread_since = {}, None
        if self._given_folder and not answer["weights"]:
            raise Refusal(
                "--weights: the trainer writes its weights into no folder; give --weights to it "
                "as well, or leave it out here"
            )
        self._folder = self._given_folder or answer["weights"]
        self.inbox.put(("reset",))
        return True

    def fetch(self, version: int) -> bool:
        """Fetches what has changed of the weights; returns False where it has to be tried again.

        The first of the threads calls it.

        Raises:
          TrainerLost: where they have not been readable for long.
        """
        try:
            self._fetched = time.monotonic()
            manifest = self._manifest(version)
            names = manifest.changed(self._digests)
            arrays = taken(self._parts(version, manifest, names), manifest, names)
        except _Gone:
            self._unread_since = None
            return False
        except self._unreached:
            time.sleep(_RETRY_S)
            return False
        except Unreadable as error:
            self._unread_since = self._unread_since or time.monotonic()
            if time.monotonic() - self._unread_since > UNREAD_S:
                raise TrainerLost(self._in_words(error)) from None
            time.sleep(_RETRY_S)
            return False
        finally:
            self._fetched = None
        self._unread_since, self._digests = None, manifest.digests()
        with self._lock:
            self._version = version
        self.inbox.put(("weights", version, arrays))
        return True

    def _manifest(self, version: int) -> Manifest:
        answer = self._client.get(f"/sampler/weights/{version}")
        if answer.status_code == 404:
            raise _Gone
        given = answer.headers.get("etag", "").strip('"')
        if answer.status_code != 200 or given != wire.digest_of(answer.content):
            raise Unreadable(f"its manifest did not come whole (status {answer.status_code})")
        return Manifest.read(answer.content, self._abstract)

    def _parts(self, version: int, manifest: Manifest, names: list[str]) -> Iterator[bytes]:
        """The bytes of tensors, one after the other."""
        if not names:
            return
        with contextlib.ExitStack() as stack:
            if manifest.file:
                parts = parts_of_file(Path(self._folder), manifest, names)
            else:
                path, asked = f"/sampler/tensors/{version}", {"names": names}
                answer = stack.enter_context(self._client.stream("POST", path, json=asked))
                if answer.status_code == 404:
                    raise _Gone
                if answer.status_code != 200:
                    raise Unreadable(f"its tensors did not come (status {answer.status_code})")
                parts = answer.iter_raw()
            for part in parts:
                self._fetched = time.monotonic()
                yield part

    def _in_words(self, error: Unreadable) -> str:
        cure = ""
        if self._folder:
            cure = ". If the folder lies at another place here, say where with --weights=FOLDER"
        return (
            f"the trainer's weights could not be read for {UNREAD_S:g} s: {str(error)[:500]}{cure}"
        )

    def _deliver(self) -> None:
        while True:
            try:
                work, completions = self._outbox.get(timeout=LEASE_S / 6)
            except queue.Empty:
                # The other thread may be fetching weights, which takes long.
                if self._run and not self._hangs:
                    alive = {"name": self._name, "run": self._run}
                    self._post("/sampler/alive", alive["run"], json=alive)
                continue
            number, run = work["number"], work["run"]
            content = wire.packed_groups({number: completions})
            headers = {"x-sampler": self._name, "x-run": run}
            failures = 0
            while run == self._run:
                before = self._reached
                if self._post("/sampler/groups", run, content=content, headers=headers) is not None:
                    break
                failures += self._reached > before
                if failures > _ATTEMPTS:
                    self.inbox.put(("lost", "it does not take what was sampled"))
                    return
            with self._lock:
                if run == self._run:
                    self._holds.discard(number)
