"""Work distributed over processes and threads, results in order."""

import collections
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pipeline.errors import Stop


def _end_with_main_process() -> None:
    """End this worker when the main process is killed; otherwise it would wait for work forever."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None  # this is a worker

    def wait() -> None:
        main_process.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Workers:
    """Processes that work through jobs in order, a bounded number at a time. They are spawned, not forked: torch's
    threads do not survive a fork. A worker's `Stop` is raised where its result is read."""

    def __init__(self, n_workers: int):
        self.n_workers = n_workers

    def __enter__(self) -> "Workers":
        context = multiprocessing.get_context("spawn")
        options = {"mp_context": context, "initializer": _end_with_main_process}
        self.pool = ProcessPoolExecutor(self.n_workers, **options) if self.n_workers > 1 else None
        return self

    def __exit__(self, kind: type | None, *exc: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        if kind is BrokenProcessPool:
            raise Stop(
                "A worker process was killed, perhaps for lack of memory; run again to continue, with fewer "
                "--num_processes if memory is short."
            ) from None

    def map(self, function: Callable, jobs: Iterable[tuple]) -> Iterator[Any]:
        """function(*job) for each job, in order; `jobs` is read only a little ahead."""
        running: collections.deque = collections.deque()
        for job in jobs:
            if self.pool is None:
                yield function(*job)
                continue
            running.append(self.pool.submit(function, *job))
            if len(running) > self.n_workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def ahead(function: Callable, items: Iterable[Any], n_threads: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed in threads at most n_threads items ahead of the caller."""
    with ThreadPoolExecutor(n_threads) as pool:
        running: collections.deque = collections.deque()
        for item in items:
            running.append(pool.submit(function, item))
            if len(running) > n_threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
