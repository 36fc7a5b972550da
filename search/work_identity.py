"""Which jobs do the same work: a candidate evaluated in one of them need not be evaluated in another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from archfront.search.code_identity import essence
from archfront.search.executors.factory import threads_of
from archfront.search.resolve import ResolvedJob


def work_digest(job: ResolvedJob, code: Mapping[str, Any], devices: Mapping[str, str]) -> str:
    """Digest of all that a candidate's metrics depend on at a fidelity, besides chance.

    Space, data, evaluators with their arguments, threads and GPUs of each, the devices that metrics hold for, code and
    plug-ins. Not part of it: the seed, since results of another seed are as good; and the list of fidelities, since
    each evaluation has its own.

    Args:
        devices: ``Evaluator.device_key`` by evaluator, where there is one.
    """
    workers = job.spec.workers
    facts = {
        "space": job.space.digest,
        "data": job.spec.data,
        "evaluators": [
            {
                "arguments": {name: value for name, value in config.items() if name != "fidelities"},
                "threads": threads_of(workers.needs_of(str(config["name"]))),
                "gpus": workers.needs_of(str(config["name"])).gpus,
                "device": devices.get(str(config["name"])),
            }
            for config in job.spec.evaluators
        ],
        "code": essence(code),
        "plugins": code["plugins"],
    }
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
