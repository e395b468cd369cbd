"""Ahead: what an iterator gives next is made while the caller is busy with what needs no Python, such as a backward pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """An iterator whose next items can be made in a thread of its own: inside `meanwhile`, and at no other time. Close it, and the thread is gone.

    So nothing else of the program runs beside the iterator but the body of `meanwhile`, and items come in the same order with it and without. What the
    iterator raises is raised where the item is asked for.
    """

    def __init__(self, items: Iterator[Item], waited: Callable[[float], None] = lambda seconds: None, at_once: int = 1) -> None:
        """waited: is told of each time, in seconds, that the caller was kept waiting. at_once: how many items are made together, which for small ones costs
        half of what it costs to make each in its turn: the processor has the code at hand."""
        self._items, self._waited, self._at_once = items, waited, at_once
        self._ready: deque[Item] = deque()
        self._failed: BaseException | None = None
        self._is_leaving = False
        self._go, self._done = threading.Lock(), threading.Lock()  # what is waited for is that the other releases it
        self._go.acquire()
        self._done.acquire()
        self._thread: threading.Thread | None = None
        # Each thread has a current GPU of its own, and page-locked memory is asked of that one.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    def __iter__(self) -> Ahead[Item]:
        return self

    def __next__(self) -> Item:
        if not self._ready and self._failed is None:
            began = time.monotonic()
            self._make()
            self._waited(time.monotonic() - began)
        if not self._ready:
            assert self._failed is not None
            raise self._failed  # and again, should anyone ask again
        return self._ready.popleft()

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Beside what is done inside, the next items are made, if there are none; leaving waits for them."""
        if self._ready or self._failed is not None:
            yield
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reading ahead", daemon=True)
            self._thread.start()
        self._go.release()
        try:
            yield
        finally:
            began = time.monotonic()
            self._done.acquire()
            self._waited(time.monotonic() - began)

    def _make(self) -> None:
        try:
            for _ in range(self._at_once):
                self._ready.append(next(self._items))
        except BaseException as error:  # noqa: BLE001  handed to the thread that asks for the item
            self._failed = error

    def _run(self) -> None:
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)
        while True:
            self._go.acquire()
            if self._is_leaving:
                return
            self._make()
            self._done.release()

    def close(self) -> None:
        """End the thread; what is ready is dropped. The iterator stays open."""
        if self._thread is not None:
            self._is_leaving = True
            self._go.release()
            self._thread.join()
            self._thread = None
