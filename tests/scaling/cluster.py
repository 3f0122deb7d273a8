"""Workers and a queue, event by event: what a run waits for, and what is interrupted when workers are stopped."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from statistics import median

from app.domain.scaling import Load, typical_run_s
from tests.scaling.traffic import Arrival

START_UP_S = 12.0
"""From the request for a worker to its first run: a machine is found, the image is there, the process starts."""
_RECENT = 200
_RECENT_S = 900.0


@dataclass(eq=False)
class Run:
    """`left`: seconds that a worker still has to hold it. `held_for`: for how long workers have, so far."""

    accepted_at: float
    left: float
    queued_at: float
    taken_at: float | None = None
    held_for: float = 0.0
    ends_with: int = 0
    """The number of the event that ends it; another one is of a worker that was stopped."""


@dataclass(eq=False)
class Worker:
    number: int
    asked_for_at: float
    is_ready: bool = False
    is_stopping: bool = False
    gone_at: float | None = None
    runs: dict[Run, float] = field(default_factory=dict)
    """With the moment at which each was taken."""


class Cluster:
    """`waits`: of each run that was taken for the first time, when and how long it had waited. `busy_stopped`: workers
    that held runs when they were stopped. `handed_back`: runs that did not end within the grace, and began to wait
    again. `workers_seconds`: from the request for a worker to its end: what is paid."""

    def __init__(self, arrivals: tuple[Arrival, ...], *, slots: int, grace_s: float) -> None:
        self.now = 0.0
        self.queue: deque[Run] = deque()
        self.workers: list[Worker] = []
        self.waits: list[tuple[float, float]] = []
        self.busy_stopped = 0
        self.handed_back = 0
        self.workers_seconds = 0.0
        self._slots = slots
        self._grace_s = grace_s
        self._free: dict[Worker, None] = {}
        """With a free slot, the one first that has waited longest: Redis gives to it."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        self._numbers = count(1)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        for arrival in arrivals:
            self.at(arrival.at, lambda arrival=arrival: self._accept(arrival))  # type: ignore[misc]

    def at(self, moment: float, event: Callable[[], None]) -> int:
        """Let this happen then. Returns the event's number."""
        number = next(self._numbers)
        heapq.heappush(self._events, (moment, number, event))
        return number

    def play(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, self._number, event = heapq.heappop(self._events)
            event()
        self.now = until
        for worker in self.workers:
            self._leave(worker)

    @property
    def wanted(self) -> list[Worker]:
        """Those that nobody has stopped, ready or not."""
        return [worker for worker in self.workers if not worker.is_stopping]

    def load(self) -> Load:
        """As the service reads it from Postgres."""
        busy = [worker for worker in self.workers if worker.runs]
        recent = [held_for for ended_at, held_for in self._recent if ended_at > self.now - _RECENT_S]
        running = [run.held_for + self.now - taken_at for worker in busy for run, taken_at in worker.runs.items()]
        return Load(
            queued=len(self.queue),
            running=len(running),
            busy_workers=len(busy),
            median_run_s=typical_run_s(
                ended_lately_s=median(recent) if recent else None, running_s=median(running) if running else None
            ),
        )

    def start_worker(self) -> None:
        worker = Worker(next(self._numbers), self.now)
        self.workers.append(worker)
        self.at(self.now + START_UP_S, lambda: self._ready(worker))

    def stop_worker(self, worker: Worker) -> None:
        """SIGTERM: it takes no run any more, ends those that it can within the grace, and hands the others back."""
        worker.is_stopping = True
        self._free.pop(worker, None)
        if worker.runs:
            self.busy_stopped += 1
            self.at(self.now + self._grace_s, lambda: self._kill(worker))
        else:
            self._leave(worker)

    def _accept(self, arrival: Arrival) -> None:
        self.queue.append(Run(self.now, arrival.takes, self.now))
        self._hand_out()

    def _ready(self, worker: Worker) -> None:
        if not worker.is_stopping:
            worker.is_ready = True
            self._free[worker] = None
            self._hand_out()

    def _hand_out(self) -> None:
        while self.queue and self._free:
            worker = next(iter(self._free))
            del self._free[worker]
            run = self.queue.popleft()
            if run.taken_at is None:
                self.waits.append((self.now, self.now - run.accepted_at))
            run.taken_at = worker.runs[run] = self.now
            run.ends_with = self.at(self.now + run.left, lambda run=run, worker=worker: self._end(run, worker))  # type: ignore[misc]
            if len(worker.runs) < self._slots:
                self._free[worker] = None

    def _end(self, run: Run, worker: Worker) -> None:
        if run.ends_with != self._number:
            return  # it was handed back meanwhile
        taken_at = worker.runs.pop(run)
        self._recent.append((self.now, run.held_for + self.now - taken_at))
        if not worker.is_stopping:
            self._free.setdefault(worker)
            self._hand_out()
        elif not worker.runs:
            self._leave(worker)

    def _kill(self, worker: Worker) -> None:
        for run, taken_at in worker.runs.items():
            run.held_for += self.now - taken_at
            run.left -= self.now - taken_at
            run.ends_with = 0
            run.queued_at = self.now
            self.queue.append(run)
            self.handed_back += 1
        worker.runs.clear()
        self._leave(worker)
        self._hand_out()

    def _leave(self, worker: Worker) -> None:
        if worker.gone_at is None:
            worker.gone_at = self.now
            self.workers_seconds += self.now - worker.asked_for_at
            self.workers = [other for other in self.workers if other is not worker]
