"""The engine on a Ray cluster that is there already.

Each task is a Ray task of one core, spread over the nodes. A node that dies takes its tasks with it, and Ray starts them again
on another one; so it goes on as long as one node is left. What travels is the order and the answer, a few kilobytes each.

Every node needs this package in the same version, and sees sources and dataset under the same URLs.
"""

import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from typing_extensions import override

from datastore.engines.engine import Engine
from datastore.errors import ConfigError, DatastoreError, DependencyError

__all__ = ["RayEngine"]

_RETRIES = 5
"""How often a task is started again whose node or process has died: more often, and it is the task that kills them."""

_KNOCK_S = 10

_PER_CORE = 2
"""Tasks that are given out at once: one that runs, and one that waits for it to end."""


class RayEngine(Engine):
    """Runs tasks on the Ray cluster at `address`; `auto` is the one that this machine belongs to.

    A program that is connected to Ray already stays so.
    """

    def __init__(self, address: str = "auto") -> None:
        self.address = address

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        with _connected(self.address) as ray:
            task = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(work)
            left = iter(orders)
            pending = [task.remote(order) for order in islice(left, self._most(ray))]
            try:
                while pending:
                    ready, pending = ray.wait(pending)
                    pending += [task.remote(order) for order in islice(left, len(ready))]
                    for answer in ready:
                        yield _taken(ray, answer)
            finally:
                for answer in pending:
                    ray.cancel(answer, force=True)

    def _most(self, ray: Any) -> int:
        return max(1, _PER_CORE * int(ray.cluster_resources().get("CPU", 1)))


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    try:
        import ray  # noqa: PLC0415 - optional, and slow to load
    except ImportError:
        raise DependencyError("ray is not installed", hint="pip install 'llm-datastore[ray]'.") from None
    own = not ray.is_initialized()
    if own:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the Ray cluster cannot be reached: {str(error).splitlines()[0]}",
                address=address,
                hint="Start one by `ray start --head`, or name its head: `--address HOST:6379`.",
            ) from None
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at `address`: Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S):
            pass


def _taken(ray: Any, answer: Any) -> bytes:
    try:
        return bytes(ray.get(answer))
    except ray.exceptions.RayError as error:
        raise DatastoreError(
            f"a task was given up by Ray: {str(error).splitlines()[0]}",
            error=type(error).__name__,
            hint="Run the same command again; what is done stays done. If it was out of memory, give Ray fewer cores (`ray start --num-cpus`): "
            "each runs a task. An ingest takes a smaller `task_bytes`, too.",
        ) from None
