"""The controller: claims jobs that wait for a driver, or whose driver died, and drives them side by side."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from archfront.db.connection import without_password
from archfront.db.controllers import beat_controller, enter_controller, fair_part
from archfront.db.ledger import Ledger
from archfront.errors import ArchfrontError, ChangedCodeError, JobBusyError, JobFailedError, LedgerError
from archfront.plugins import Plugin
from archfront.search.driver import DriveOptions, drive
from archfront.search.executors.ray_hub import RayHub

_POLL_S = 1.0
_BEAT_S = 5.0
_SETTLE_S = 12.0
"""After the database was away, living drivers need so long to prolong leases that ran out meanwhile."""

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 300.0


@dataclass(kw_only=True)
class ControllerOptions:
    """How a controller works.

    Attributes:
        ray_address: of the cluster; None for one of its own.
        files: folder or URI for the checkpoints of jobs that name none.
        jobs: how many it drives at most at the same time.
        plugins: the operator's own files.
        log: called with a line on whatever happens.
        stop: polled; true ends it, and leaves its jobs to others.
    """

    ray_address: str | None = None
    files: str | None = None
    jobs: int = 8
    plugins: Sequence[Plugin] = ()
    log: Callable[[str], None] = print
    stop: Callable[[], bool] = field(default=lambda: False)


@dataclass(slots=True)
class _Trouble:
    """A job that this controller could not drive, and when it will try again."""

    pause_s: float
    until: float
    words: str


class Controller:
    """One process, one ledger, one Ray cluster, several jobs: a thread each, over one hub.

    Nothing that befalls a job, Ray or the database ends it. What it holds in memory may be lost: the ledger has it.
    """

    def __init__(self, ledger: Ledger, options: ControllerOptions) -> None:
        self._ledger = ledger
        self._options = options
        self._threads: dict[int, threading.Thread] = {}
        self._troubles: dict[int, _Trouble] = {}
        self._quiet_until = 0.0

    def run(self) -> None:
        """Drive what is to be driven until told to stop."""
        hub = RayHub(self._options.ray_address)
        controller = enter_controller(self._ledger, self._options.ray_address)
        self._options.log(f"controller {controller} is up: {without_password(self._ledger.url)}")
        beaten = 0.0
        try:
            while not self._options.stop():
                self._reap()
                try:
                    if time.monotonic() - beaten >= _BEAT_S:
                        beat_controller(self._ledger, controller, self._state(hub))
                        hub.share(fair_part(self._ledger))
                        beaten = time.monotonic()
                    self._claim(hub)
                except (LedgerError, SQLAlchemyError) as error:
                    self._options.log(f"the database cannot be reached, trying again: {error}")
                    self._quiet_until = time.monotonic() + _SETTLE_S
                time.sleep(_POLL_S)
        finally:
            for thread in self._threads.values():
                thread.join()
            hub.close()
            with suppress(LedgerError, SQLAlchemyError):
                beat_controller(self._ledger, controller, "ended", ended=True)
            self._options.log(f"controller {controller} has ended; its jobs are free")

    def _state(self, hub: RayHub) -> str:
        return f"{len(self._threads)} jobs, Ray {'reached' if hub.ready else 'away'}"

    def _reap(self) -> None:
        for job_id in [job_id for job_id, thread in self._threads.items() if not thread.is_alive()]:
            self._threads.pop(job_id).join()

    def _claim(self, hub: RayHub) -> None:
        if time.monotonic() < self._quiet_until:
            return
        for job_id in self._ledger.claimable():
            if len(self._threads) >= self._options.jobs:
                return
            trouble = self._troubles.get(job_id)
            if job_id in self._threads or (trouble is not None and time.monotonic() < trouble.until):
                continue
            thread = threading.Thread(target=self._drive, args=(job_id, hub), name=f"job-{job_id}", daemon=True)
            self._threads[job_id] = thread
            thread.start()

    def _drive(self, job_id: int, hub: RayHub) -> None:
        def log(line: str) -> None:
            self._options.log(f"job {job_id}: {line}")

        def announce(line: str) -> None:
            log(line)
            with suppress(LedgerError, SQLAlchemyError):
                self._ledger.change_job(job_id, reason=line)

        try:
            row = self._ledger.job(job_id)
            if row["cancel_requested"]:
                # Its driver died before it could; no code of the job is needed for that.
                self._ledger.request_cancel(job_id)
                log("cancelled")
                return
            log(f"driving {row['name']!r}")
            options = DriveOptions(
                plugins=self._options.plugins,
                hub=hub,
                claim=True,
                files=self._options.files if row["files"] is None else None,
                announce=announce,
                stop=self._options.stop,
            )
            log(f"ended: {drive(self._ledger, job_id, options)}")
            self._troubles.pop(job_id, None)
        except JobBusyError:
            log("another driver was faster")
        except JobFailedError as error:
            log(f"failed: {error}")
        except ChangedCodeError as error:
            # Another controller may have the right code; this one never will.
            self._note_trouble(job_id, str(error), _LONGEST_PAUSE_S)
        except ArchfrontError as error:
            self._note_trouble(job_id, str(error))
        except Exception as error:
            self._note_trouble(job_id, repr(error))
            log(traceback.format_exc())

    def _note_trouble(self, job_id: int, words: str, pause_s: float = _FIRST_PAUSE_S) -> None:
        """Leave a job alone for a while, longer each time, and say why where its owner looks."""
        before = self._troubles.get(job_id)
        pause_s = min(2 * before.pause_s, _LONGEST_PAUSE_S) if before is not None else pause_s
        self._troubles[job_id] = _Trouble(pause_s, time.monotonic() + pause_s, words)
        self._options.log(f"job {job_id}: left alone for {pause_s:g} s: {words}")
        if before is None or before.words != words:
            with suppress(LedgerError, SQLAlchemyError):
                if self._ledger.holder(job_id) is None:
                    self._ledger.change_job(job_id, reason=words)
