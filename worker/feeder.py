"""Keeps a queue worker going in a thread of its own, whatever becomes of Redis."""

import logging
import threading
from collections.abc import Callable
from uuid import UUID

from redis import Redis
from redis.exceptions import RedisError

from app.domain.errors import ConfigurationError
from app.domain.run import Priority
from worker.queue_worker import ConcurrentWorker

logger = logging.getLogger(__name__)

RECONNECT_SECONDS = 1.0
_TIMEOUT_SECONDS = 2.0


class Feeder:
    """`make` makes the queue worker; that takes a Redis that answers."""

    def __init__(self, redis_url: str, make: Callable[[], ConcurrentWorker]) -> None:
        self._redis_url = redis_url
        self._make = make
        self._stopping = threading.Event()
        self._worker: ConcurrentWorker | None = None

    def feed(self) -> None:
        """Work until `stop`. Raises `ConfigurationError` where this Redis would lose jobs."""
        while not self._stopping.is_set():
            try:
                require_noeviction(self._redis_url)
                self._worker = self._make()
                if not self._stopping.is_set():
                    self._worker.work(logging_level="WARNING")
            except RedisError as error:
                logger.warning("Redis is away", extra={"fields": {"error": str(error)}})
            self._stopping.wait(RECONNECT_SECONDS)

    @property
    def busy(self) -> int:
        """Slots in use. A queue worker that gives way to another has waited for its runs before."""
        return self._worker.busy if self._worker is not None else 0

    def stop(self) -> None:
        """Take no more jobs. From any thread."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()

    def let_go(self, run_id: UUID, priority: Priority) -> None:
        """A run was handed back although its task goes on: enqueue it again, and do not wait for the task."""
        if self._worker is not None:
            self._worker.let_go(run_id, priority)


def require_noeviction(redis_url: str) -> None:
    """A Redis that evicts would drop jobs. Raises `ConfigurationError`; `RedisError` where it does not answer."""
    with Redis.from_url(redis_url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS) as client:
        policy = client.info("memory").get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise ConfigurationError(f"REDIS_URL: the server's maxmemory-policy is {policy}; it must be noeviction")
