"""Submit a job, drive it to its end, extend it: what the command line and the Python client call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from archfront.db.dominance import crowding_distance, nondominated_ranks
from archfront.db.lease import kept_lease
from archfront.db.ledger import Ledger
from archfront.db.queries import evaluation_rows, job_objectives
from archfront.db.reuse import Results
from archfront.errors import ArchfrontError, ChangedCodeError, InputError, JobFailedError, LeaseLostError, StoppedError
from archfront.evaluators.evaluator import EvaluationContext
from archfront.plugins import Plugin
from archfront.search.code_identity import changes, code_identity
from archfront.search.engine import Engine, Seeding
from archfront.search.executors.executor import Executor
from archfront.search.executors.factory import made_executor, threads_of
from archfront.search.executors.ray_hub import RayHub
from archfront.search.finalists import run_finalists
from archfront.search.job import Finalists, JobSpec, parse_spec
from archfront.search.plugins import load_plugins
from archfront.search.progress import Progress
from archfront.search.resolve import ResolvedJob, resolve
from archfront.search.shared_results import SharedResults
from archfront.search.work_identity import work_digest
from archfront.search.worker import WorkerSetup

_PREPARE_S = 1800.0
_KEY_S = 180.0
_OUTCOMES = {
    "budget": ("done", "its budget is spent"),
    "exhausted": ("done", "its strategy finds nothing new in the space"),
    "hours": ("done", "its hours are over"),
    "cancelled": ("cancelled", "cancelled by the user"),
    "stopped": ("running", "stopped; it can be resumed"),
}


@dataclass(kw_only=True)
class DriveOptions:
    """How to drive a job, as opposed to what the job is.

    Attributes:
        plugins: the user's own files.
        more_evaluations: to add to the job's budget, for good.
        accept_changes: asked what changed since the last run; true goes on. None refuses.
        ray_address: of a running Ray cluster; the environment's RAY_ADDRESS, or a cluster of this job's own, if None.
        hub: a way to Ray that several jobs share, in place of the address.
        claim: take the job as a controller does, on nobody's order.
        files: folder or URI for checkpoints; beside the database if None.
        bench: finalists to measure in place of the job's own.
        candidates: which they are, by evaluation or key; as the plan says if empty.
        observe: called after each commit.
        announce: called with a line on what happens now, before and after the search itself.
        stop: polled; true ends the run resumable.
    """

    plugins: Sequence[Plugin] = ()
    more_evaluations: int = 0
    accept_changes: Callable[[list[str]], bool] | None = None
    ray_address: str | None = None
    hub: RayHub | None = None
    claim: bool = False
    files: str | None = None
    bench: Finalists | None = None
    candidates: Sequence[str] = ()
    observe: Callable[[Progress], None] = lambda _: None
    announce: Callable[[str], None] = lambda _: None
    stop: Callable[[], bool] = field(default=lambda: False)


def submit(
    ledger: Ledger, document: Any, plugins: Sequence[Plugin] = (), *, managed: bool = False, files: str | None = None
) -> int:
    """Validate a job and enter it, queued. Returns its id.

    Args:
        managed: for a controller to drive.
        files: folder or URI for checkpoints.

    Raises:
        InputError: the job cannot work; nothing was stored.
    """
    load_plugins(plugins)
    spec = parse_spec(document)
    job = resolve(spec)
    if spec.warm_start is not None:
        source = ledger.find_job(spec.warm_start.job)
        # An id does not change its meaning, while a name or 'last' soon does.
        spec = spec.model_copy(update={"warm_start": spec.warm_start.model_copy(update={"job": source})})
        _warm_start(ledger, job, source, spec.warm_start.count if spec.warm_start else 0)
    document = spec.model_dump(mode="json")
    return ledger.create_job(spec.name, document, job.space.digest, managed=managed, files=files)


def _extended(spec: JobSpec, evaluations: int) -> JobSpec:
    """The spec with evaluations added to its budget.

    Raises:
        InputErrors: more than a budget may be.
    """
    document = spec.model_dump(mode="json")
    document["budget"]["evaluations"] += evaluations
    return parse_spec(document)


def drive(ledger: Ledger, job_id: int, options: DriveOptions) -> str:
    """Drive a job from where it stands to its end.

    Returns:
        why it ended, see ``Engine.run``.

    Raises:
        JobBusyError: another driver is at it.
        ChangedCodeError: code changed since the last run, and nobody accepts it.
        JobFailedError: the job failed, and is marked so.
    """
    load_plugins(options.plugins)
    job = resolve(_extended(parse_spec(ledger.job(job_id)["spec"]), options.more_evaluations))
    if job.space.digest != ledger.job(job_id)["space_digest"]:
        raise ChangedCodeError(
            f"Job {job_id}: the space {job.space.name!r} means something else in this version, so its candidates "
            "cannot be mixed. Start a new job, with `warm_start` if it shall begin with the best of this one."
        )
    code = code_identity(options.plugins)
    _agree(ledger, job_id, code, options)
    run_id = ledger.begin_run(job_id, code, claim=options.claim)
    if options.more_evaluations:
        # Only now: whoever was refused has changed nothing.
        ledger.change_job(job_id, spec=job.spec.model_dump(mode="json"))
    try:
        with kept_lease(ledger.engine, job_id, run_id):
            reason = _run(ledger, job_id, run_id, job, code, options)
    except StoppedError:
        reason = "cancelled" if _is_cancelled(ledger, job_id) else "stopped"
    except JobFailedError as error:
        ledger.end_run(job_id, run_id, "failed", str(error), "failed")
        raise
    except LeaseLostError:
        raise
    except BaseException as error:
        # A fault of the driver, not of the job: the job stays resumable.
        text = str(error) if isinstance(error, ArchfrontError) else repr(error)
        # Where even this cannot be written (a full disk), the first error is the one to show.
        with suppress(SQLAlchemyError):
            ledger.end_run(job_id, run_id, "interrupted", text, "queued" if options.claim else "running")
        raise
    state, words = _OUTCOMES[reason]
    if options.claim and state == "running":
        state, words = "queued", "its controller was stopped; it waits for another"
    ledger.end_run(job_id, run_id, reason, words, state)
    if reason == "cancelled":
        ledger.request_cancel(job_id)  # what a driver that was not in its loop left written ahead
    return reason


def default_files(ledger: Ledger, job_id: int) -> str:
    """Where a job's checkpoints go unless said otherwise: beside a SQLite file, else in the working folder."""
    database = ledger.engine.url.database
    beside = ledger.engine.dialect.name == "sqlite" and database
    folder = Path(database).absolute().parent if beside and database else Path.cwd()
    return str(folder / "archfront-files" / f"job-{job_id}")


def _run(
    ledger: Ledger, job_id: int, run_id: int, job: ResolvedJob, code: dict[str, Any], options: DriveOptions
) -> str:
    files = options.files or ledger.job(job_id)["files"] or default_files(ledger, job_id)
    if options.files is not None:
        # Where they are is the job's affair from now on: whoever takes it over finds them there.
        ledger.change_job(job_id, files=files)
    setup = WorkerSetup(spec=job.spec.model_dump(mode="json"), plugins=list(options.plugins), files=files)
    stop = lambda: options.stop() or _is_cancelled(ledger, job_id)  # noqa: E731
    with made_executor(
        job.spec,
        setup,
        hub=options.hub,
        ray_address=options.ray_address,
        announce=options.announce,
        stop=stop,
        apart=options.claim,
    ) as executor:
        devices = _prepare(ledger, job, executor, setup, options)
        executor.start()
        history = ledger.history(job_id, job.signs)
        digest = _note_work(ledger, job_id, work_digest(job, code, devices), fresh=not history.ask_count)
        shares = job.spec.reuse and digest is not None
        engine = Engine(
            job,
            ledger.writer(job_id, run_id, job.signs),
            executor,
            history,
            shared=SharedResults(job, Results(ledger, job_id, job.space.digest, str(digest))) if shares else None,
            seedings=_seedings(ledger, job),
            observe=options.observe,
            stop=options.stop,
        )
        reason = engine.run()
        plan = options.bench or job.spec.finalists
        if _OUTCOMES[reason][0] != "done" or not plan.count:
            return reason
        if run_finalists(
            ledger, job_id, run_id, job, executor,
            plan=plan, candidates=options.candidates, announce=options.announce, stop=stop,
        ):  # fmt: skip
            return reason
        return "cancelled" if _is_cancelled(ledger, job_id) else "stopped"


def _note_work(ledger: Ledger, job_id: int, digest: str, *, fresh: bool) -> str | None:
    """Write down what work a job does, for jobs that may share its results. Returns the digest, or None if the job
    began by other code, so that its results serve nobody else and nobody else's serve it."""
    if fresh:
        ledger.change_job(job_id, work_digest=digest)
        return digest
    if ledger.job(job_id)["work_digest"] == digest:
        return digest
    ledger.change_job(job_id, work_digest=None)
    return None


def _prepare(
    ledger: Ledger, job: ResolvedJob, executor: Executor, setup: WorkerSetup, options: DriveOptions
) -> dict[str, str]:
    """Give every worker what its evaluators need made once: from the ledger, or made now. Returns the devices that
    metrics hold for, by evaluator."""
    devices: dict[str, str] = {}
    for name, evaluator in job.evaluators:
        needs = job.spec.workers.needs_of(name)
        context = EvaluationContext(space=job.space, data=job.spec.data, threads=threads_of(needs), files=setup.files)
        key, device = evaluator.prepare_key(context), evaluator.device_key(context)
        if needs.device is not None or (evaluator.on_device and executor.elsewhere):
            # They identify the device, and that is where the worker is.
            key = key and executor.call(name, "prepare_key", {}, _KEY_S)
            device = device and executor.call(name, "device_key", {}, _KEY_S)
        if device is not None:
            devices[name] = device
        if key is None:
            continue
        artifact = ledger.artifact(name, key)
        if artifact is None:
            options.announce(f"preparing {name} (once for this device and space; kept in the ledger)")
            artifact = executor.call(name, "prepare", {}, _PREPARE_S)
            ledger.store_artifact(name, key, artifact, artifact.get("device"))
        setup.artifacts[name] = artifact
    return devices


def _agree(ledger: Ledger, job_id: int, code: dict[str, Any], options: DriveOptions) -> None:
    before = ledger.last_code(job_id)
    changed = [] if before is None else changes(before, code)
    if changed and not (options.accept_changes is not None and options.accept_changes(changed)):
        lines = "\n".join(f"  {line}" for line in changed)
        raise ChangedCodeError(
            f"Job {job_id} was last run by other code, so what follows may not fit what is there:\n{lines}\n"
            "Resume with --accept-changes to go on all the same, or restore the code."
        )


def _is_cancelled(ledger: Ledger, job_id: int) -> bool:
    return bool(ledger.job(job_id)["cancel_requested"])


def _seedings(ledger: Ledger, job: ResolvedJob) -> list[Seeding]:
    seedings = []
    if job.spec.warm_start is not None:
        source, count = int(job.spec.warm_start.job), job.spec.warm_start.count
        seedings.append(Seeding(source="warm_start", genotypes=_warm_start(ledger, job, source, count)))
    if job.spec.seeds:
        seedings.append(Seeding(source="seeds", genotypes=job.space.genotypes_of(job.spec.seeds)))
    return seedings


def _warm_start(ledger: Ledger, job: ResolvedJob, source: int, count: int) -> list[Any]:
    """The best feasible candidates of another job, by non-dominated rank, then crowding, under its own objectives.

    They are evaluated anew: the other job's figures hold under its recipe and device, not under this one's.
    """
    row = ledger.job(source)
    if row["space_digest"] != job.space.digest:
        raise InputError(
            "warm_start.job", source, "searched another space", "Name a job of the same space and settings."
        )
    signs = [(name, -1 if direction == "max" else 1) for name, direction in job_objectives(row["spec"])]
    history = ledger.history(source, signs)
    fidelity = dict(zip(history.finished, history.fidelities.tolist(), strict=True))
    good = [i for i, violation in enumerate(history.violations) if violation == 0]
    if not good:
        raise InputError("warm_start.job", source, "has no feasible evaluation", "Name another job.")
    top = max(fidelity[history.finished[i]] for i in good)
    good = [i for i in good if fidelity[history.finished[i]] == top]
    points = history.objectives[good]
    ranks = nondominated_ranks(points)
    crowding = points[:, 0] * 0.0
    for rank in set(ranks.tolist()):
        crowding[ranks == rank] = crowding_distance(points[ranks == rank])
    order = sorted(range(len(good)), key=lambda i: (ranks[i], -crowding[i], history.finished[good[i]]))
    numbers = [history.finished[good[i]] for i in order[:count]]
    with ledger.engine.connect() as connection:
        return [row["genotype"] for row in evaluation_rows(connection, source, numbers)]
