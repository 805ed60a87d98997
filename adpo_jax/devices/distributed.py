"""Several processes that train one policy: how they find each other and exchange values.

Every process runs the same program on its own devices. Arrays of the mesh are global, so all
processes call a jitted function at the same time. Values of one host (the completions that it
sampled, their rewards) stay with its process until `all_gather`.

No process can come back while the others go on. When one is lost all of them stop, and the same
command goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import pickle
import secrets
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from adpo_jax.devices.host_network import SECRET_BYTES, Address, Listener, Ring

# The variables that a launcher sets for each process; JAX itself reads the first one alone.
COORDINATOR, NUM_PROCESSES, PROCESS_ID = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)

# Where a process listens, and what it would have all say to each other.
_ADDRESS = np.dtype([("host", "S46"), ("port", np.uint16), ("secret", np.uint8, SECRET_BYTES)])


@dataclasses.dataclass
class _Network:
    """What `initialize` learns of the network between the hosts.

    Attributes:
      near: the host of process 0; "" where JAX finds it itself.
      timeout_s: as of `initialize`.
    """

    near: str = ""
    timeout_s: float = 100.0


_network = _Network()


def initialize(wanted: bool | None, *, timeout_s: int) -> None:
    """Joins the other processes, before anything else of JAX is used.

    Args:
      wanted: whether there are others; None to look at the environment.
      timeout_s: after so many seconds without a sign of life from one process, all others stop.

    Raises:
      ValueError: when there are said to be others and the environment does not say which.
    """
    found = _environment()
    if wanted is False or (wanted is None and found is None):
        return
    _network.timeout_s = timeout_s
    if address := (found or {}).get("coordinator_address"):
        _network.near = address.rpartition(":")[0].strip("[]")
    try:
        jax.distributed.initialize(
            **(found or {}),
            heartbeat_timeout_seconds=timeout_s,
            shutdown_timeout_seconds=timeout_s,
        )
    except ValueError as error:
        if wanted is None:  # the machine has TPU chips of its own and is no part of a pod
            return
        raise ValueError(
            f"--distributed: {error} Neither SLURM nor a TPU pod is recognised here; set "
            f"{COORDINATOR} (host:port of process 0), {NUM_PROCESSES} and {PROCESS_ID}"
        ) from error
    print(
        f"process {jax.process_index()} of {jax.process_count()}; when one is lost the others stop "
        f"within {timeout_s} s, and the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    if not is_leader():  # so that standard output has every line once
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _environment() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None if there are no other processes.

    They are empty where JAX finds the arguments itself.

    Raises:
      ValueError: for a coordinator's address without number and place of the processes.
    """
    env = os.environ
    if COORDINATOR in env and not _on_tpu_pod():
        try:
            num_processes, process_id = int(env[NUM_PROCESSES]), int(env[PROCESS_ID])
        except (KeyError, ValueError) as error:
            if _several_slurm_tasks():
                return {}
            raise ValueError(
                f"{COORDINATOR} is set, so {NUM_PROCESSES} and {PROCESS_ID} (0 to one less) are "
                f"wanted as integers; given {env.get(NUM_PROCESSES)!r} and {env.get(PROCESS_ID)!r}"
            ) from error
        address = env[COORDINATOR]
        return {
            "coordinator_address": address,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    return {} if _several_slurm_tasks() or _on_tpu_pod() else None


def _several_slurm_tasks() -> bool:
    """Whether `srun` started several of us; a login or batch shell has no SLURM_STEP_NODELIST."""
    return "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def _on_tpu_pod() -> bool:
    """Whether this machine may be one of a TPU pod: GKE names its hosts, a TPU VM has chips."""
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_leader() -> bool:
    """Whether this process writes logs, samples and exports: process 0."""
    return jax.process_index() == 0


def own_rows(num_rows: int) -> range:
    """This process's share of so many rows; shares differ by one row at most.

    The shares in the order of the processes are all rows in their order.
    """
    first, last = (num_rows * (jax.process_index() + i) // jax.process_count() for i in (0, 1))
    return range(first, last)


def all_gather(value: Any) -> list:
    """The values of all processes, in their order; every process gets the whole list.

    Args:
      value: anything that pickles, large arrays too.
    """
    if jax.process_count() == 1:
        return [value]
    mine, ring = pickle.dumps(value, protocol=5), host_ring()
    blocks = _through_devices(mine) if ring is None else ring.all_gather(mine)
    return [pickle.loads(block) for block in blocks]


@functools.cache
def host_ring() -> Ring | None:
    """The connections of all processes; None where their hosts do not reach each other.

    All processes call this for the first time together.
    """
    me, mine, ring, problem = jax.process_index(), np.zeros((), _ADDRESS), None, ""
    mine["secret"] = list(secrets.token_bytes(SECRET_BYTES))
    with contextlib.ExitStack() as opened:
        # Whatever fails here, the other processes wait in both exchanges.
        try:
            listener = opened.enter_context(Listener(_network.near))
            mine["host"], mine["port"] = listener.address.host.encode(), listener.address.port
        except Exception as error:
            listener, problem = None, str(error)
        every = multihost_utils.process_allgather(np.frombuffer(mine.tobytes(), np.uint8))
        every = np.frombuffer(np.ascontiguousarray(every).tobytes(), _ADDRESS)
        addresses = [Address(one["host"].decode(), int(one["port"])) for one in every]
        if listener is not None:
            try:
                secret = every[0]["secret"].tobytes()
                ring = listener.ring(addresses, me, secret, _network.timeout_s)
            except Exception as error:
                problem = str(error)
    if np.all(multihost_utils.process_allgather(np.array(ring is not None))):
        return ring
    if problem:
        warnings.warn(
            f"process {me} does not reach its neighbours over ports of their hosts ({problem}); "
            "what processes sample is exchanged through the memory of the devices",
            stacklevel=2,
        )
    if ring is not None:
        ring.close()
    return None


def _through_devices(mine: bytes) -> list[bytes]:
    """The bytes of all processes, by a collective of their devices."""
    mine = np.frombuffer(mine, np.uint8)
    parts = np.array(divmod(mine.size, 1 << 20), np.int32)  # the size may need 64 bits
    sizes = multihost_utils.process_allgather(parts).reshape(-1, 2) @ np.array([1 << 20, 1])
    # The length is a power of two, so that few programs are compiled.
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def wait_for_all(name: str) -> None:
    """Waits until every process has called this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raises on all processes if one fails within, so that none waits for the one that failed.

    No process may wait for another one within.
    """
    if jax.process_count() == 1:
        yield
        return
    mine = None
    try:
        yield
    except Exception as error:
        mine = error
    errors = all_gather(_sendable(mine))
    first = next((process for process, error in enumerate(errors) if error is not None), None)
    if first is not None:
        raise mine if mine is not None else errors[first]


def _sendable(error: Exception | None) -> Exception | None:
    """An error that arrives as itself, in place of one that does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever a class of somebody else raises
        return RuntimeError(f"{type(error).__name__}: {error}")


def fetch(tree):
    """Arrays of any layout -> numpy arrays, whole on every process."""
    return jax.tree.map(
        lambda x: (
            jax.device_get(x)
            if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )
