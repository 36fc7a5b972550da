"""The command that measures a device's operators."""

from __future__ import annotations

from typing import Annotated

import typer

from archfront.cli.common import AsJson, Database, PluginFiles, console, duration, errors, print_json
from archfront.client import DEFAULT_DB
from archfront.errors import InputError


def profile(
    space: Annotated[str | None, typer.Option(metavar="JOB.yaml", help="Cover the space of this job.")] = None,
    models: Annotated[str | None, typer.Option(metavar="NAMES", help="Cover models: timm:resnet18,timm:...")] = None,
    device: Annotated[str, typer.Option(help="local-cpu or cuda:<number>.")] = "local-cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of an operator.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images a pass.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Genotypes traced of a space without blocks.")] = 200,
    db: Database = DEFAULT_DB,
    plugin: PluginFiles = None,
    json: AsJson = False,
) -> None:
    """Measure the operators that a space or models need, and keep them in the ledger; what is known costs nothing."""
    if not space and not models:
        raise InputError("--space", space, "is missing", "Give --space JOB.yaml or --models timm:<model>,...")
    from archfront.db.ledger import Ledger
    from archfront.evaluators.costs import InputShaped
    from archfront.evaluators.latency.device import LOCAL_CPU, check_device, fingerprint
    from archfront.evaluators.latency.profile import ProfileProgress
    from archfront.evaluators.latency.space_traces import covering_traces
    from archfront.plugins import read_plugins
    from archfront.search.job import read_spec
    from archfront.search.plugins import load_plugins
    from archfront.search.profiling import changed_devices, extend_profile, model_traces
    from archfront.search.resolve import resolve

    place = check_device(device)
    claimed = "cpu" if place == LOCAL_CPU else place
    load_plugins(read_plugins(plugin or []))
    found = []
    if space:
        searched = resolve(read_spec(space)).space
        if not isinstance(searched, InputShaped):
            raise InputError(
                "--space", searched.name, "has no torch models to profile", "Name a job with such a space."
            )
        found += covering_traces(searched, samples, batch=batch, device=claimed)
    if models:
        found += model_traces([name.strip() for name in models.split(",") if name.strip()], batch, claimed)
    operators = [operator for trace in found for operator in trace.operators]
    ledger = Ledger.open(db)
    here = fingerprint(threads, place)
    for change in changed_devices(ledger, here):
        errors.print(f"An earlier profile of this device does not hold any more: {change}.", highlight=False)

    def observe(progress: ProfileProgress) -> None:
        left = "" if progress.left_s is None else f", {duration(progress.left_s)} left"
        errors.print(f"{progress.done:,} of {progress.total:,} operators{left}", highlight=False)

    made = extend_profile(ledger, here, operators, observe)
    ledger.close()
    failed = [made.failed[o.call] for o in {o.call: o for o in operators}.values() if o.call in made.failed]
    if json:
        summary = {"device": made.device, "digest": made.digest, "operators": len(made.ms), "failed": failed}
        print_json({**summary, "traced": len(found), "needed": len({o.call for o in operators})})
        return
    console.print(
        f"{len(found)} traced modules need {len({o.call for o in operators}):,} operators; "
        f"the profile {made.digest[:8]} of {made.device['model']} ({threads} thread{'s' if threads > 1 else ''}) "
        f"holds {len(made.ms):,}.",
        highlight=False,
    )
    for reason in sorted(set(failed)):
        console.print(f"{failed.count(reason)} cannot run alone: {reason}", highlight=False, markup=False)
