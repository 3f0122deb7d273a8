"""How much may wait before something is dropped."""

import threading

from worker.metrics import Drop


class Room:
    """For so many items, of so many bytes in all. Used from any thread; nobody waits for room."""

    def __init__(self, items: int, size: int) -> None:
        self._most_items = items
        self._most_bytes = size
        self._items = 0
        self._bytes = 0
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def items(self) -> int:
        """How many there are."""
        return self._items

    @property
    def is_full(self) -> bool:
        return self._is_closed or self._items >= self._most_items or self._bytes >= self._most_bytes

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def refusal(self) -> Drop:
        """Why something did not fit."""
        return Drop.ENDED if self._is_closed else Drop.QUEUE_FULL

    def take(self, items: int, size: int) -> bool:
        """False: they do not fit, and have to be dropped."""
        with self._lock:
            fits = (
                not self._is_closed
                and self._items + items <= self._most_items
                and self._bytes + size <= self._most_bytes
            )
            if fits:
                self._items += items
                self._bytes += size
            return fits

    def leave(self, items: int, size: int) -> bool:
        """They are out again. False: the room was closed meanwhile, and they have been counted there."""
        with self._lock:
            if self._is_closed:
                return False
            self._items -= items
            self._bytes -= size
            return True

    def close(self) -> int:
        """Nothing comes in any more. How many items are still there; 0 when it was closed before."""
        with self._lock:
            left = 0 if self._is_closed else self._items
            self._is_closed = True
            return left
