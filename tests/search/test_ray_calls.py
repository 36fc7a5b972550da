"""What is prepared once is prepared on a Ray worker, and every worker gets it."""

import os
from pathlib import Path

import pytest

import archfront
from archfront.client import Job

PLUGIN = '''
"""An evaluator that needs something made once."""
import os

from archfront.evaluators.evaluator import Evaluated, Evaluator, Metric, MetricSpec


class Prepared(Evaluator):
    name = "prepared"
    batch_size = 8

    @property
    def metrics(self):
        return [MetricSpec(name="value", unit="1", direction="max")]

    def prepare_key(self, context):
        return f"{context.space.digest}:1"

    def prepare(self, context):
        return {"pid": os.getpid(), "driver": os.environ["DRIVER"], "offset": 0.5}

    def evaluate(self, tasks, context):
        made = context.artifacts["prepared"]
        assert made["driver"] != str(made["pid"])
        return [Evaluated({"value": Metric(sum(task.genotype) + made["offset"])}) for task in tasks]


ARCHFRONT_PLUGINS = {"evaluators": {"prepared": Prepared}}
'''


def test_prepared_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVER", str(os.getpid()))
    file = tmp_path / "prepared.py"
    file.write_text(PLUGIN)
    spec = {
        "name": "prepared",
        "space": {"name": "choices", "columns": {"a": [1, 2, 3], "b": [1, 2, 3]}},
        "evaluators": [{"name": "prepared"}],
        "objectives": [{"metric": "value", "direction": "max"}],
        "strategy": {"name": "random"},
        "budget": {"evaluations": 9},
        "workers": {"executor": "ray", "count": 2},
    }
    job: Job = archfront.run(spec, db=tmp_path / "archfront.db", plugins=[file])
    assert job.state == "done"
    assert [row["value"] for row in job.front()] == [6.5]
