"""What the README shows is what runs."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.support.small_models import DATA

import archfront
from archfront.cli.main import main
from archfront.search.job import Budget, Workers, read_spec
from archfront.search.resolve import resolve
from archfront.spaces.registry import SPACES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_plugins_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(EXAMPLES / "my_job.yaml"), "--db", str(tmp_path / "l.db"), "--json"]
    for plugin in ("my_evaluator.py", "my_space.py"):
        arguments += ["--plugin", str(EXAMPLES / plugin)]
    monkeypatch.setattr(sys, "argv", ["archfront", "run", *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    assert not ending.value.code
    assert json.loads(capsys.readouterr().out)["evaluations"]["done"] == 100
    front = archfront.Job(tmp_path / "l.db").front().to_pandas()
    assert front["depth"].max() > front["depth"].min()


def test_the_readme_shows_the_examples_as_they_are() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", text, flags=re.DOTALL)
    code = (EXAMPLES / "my_evaluator.py").read_text()
    assert any(block.strip() == code.strip() for block in blocks)
    jobs = [yaml.safe_load(block) for block in blocks if block.startswith("name: digits")]
    assert jobs == [yaml.safe_load((EXAMPLES / "digits.yaml").read_text())]


def test_the_grammar_of_the_documentation_runs(tmp_path: Path) -> None:
    """Several objectives and early stopping, on a grammar that a user wrote."""
    spec = read_spec(EXAMPLES / "my_grammar.yaml").model_copy(update={"budget": Budget(evaluations=14)})
    spec = spec.model_copy(update={"workers": Workers(count=2, executor="process")})
    job = archfront.run(spec, db=tmp_path / "l.db", plugins=[EXAMPLES / "my_grammar.py"])
    status = job.status()["evaluations"]
    assert (status["done"], status["failed"]) == (14, 0)
    rows = job.front(fidelity="any", objectives=["accuracy", "params"]).to_pandas()
    assert set(rows["fidelity"]) <= {2, 6}
    assert 6 in job.front().to_pandas()["fidelity"].tolist()


def test_the_policy_of_the_documentation_runs(tmp_path: Path) -> None:
    spec = {
        "name": "mine",
        "space": {"name": "skipped-blocks", "model": {"name": "cifar-resnet", "depth": 14}},
        "data": DATA,
        "evaluators": [{"name": "compression", "recovery": [{"name": "batch-norm"}]}],
        "objectives": [{"metric": "accuracy", "direction": "max"}, {"metric": "macs", "direction": "min"}],
        "strategy": {"name": "random"},
        "budget": {"evaluations": 8},
        "workers": {"count": 1, "executor": "process"},
    }
    job = archfront.run(spec, db=tmp_path / "l.db", plugins=[EXAMPLES / "my_policy.py"])
    [least, most] = (job.front(objectives=[f"{sign}macs"])[0] for sign in "-+")
    # Every block of the first stage, and of each later one but its first, has the same number of multiply-adds.
    skipped = least["genotype"].count("skip") - most["genotype"].count("skip")
    assert most["macs"] - least["macs"] == skipped * 2 * 16 * 16 * 9 * 32 * 32 > 0
    text = (ROOT / "docs" / "policies.md").read_text()
    assert f"```python\n{(EXAMPLES / 'my_policy.py').read_text()}```" in text


def test_the_documentation_shows_the_examples_as_they_are() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "spaces.md").read_text(), flags=re.DOTALL)
    shown = [(EXAMPLES / name).read_text().strip() for name in ("my_grammar.py", "my_space.py")]
    assert [block.strip() for block in blocks] == shown


def test_the_spaces_of_the_documentation_are_searched() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "spaces.md").read_text(), flags=re.DOTALL)
    jobs = [yaml.safe_load(block) for block in blocks]
    assert {job["space"]["name"] for job in jobs} >= {"einspace", "choices", "joint", "bounded"}
    for job in jobs:
        space = SPACES.build(job["space"], "space")
        members = [*space.to_json(space.sample(np.random.default_rng(0), 3)), *space.genotypes_of(job.get("seeds", []))]
        assert all(space.describe(genotype) for genotype in members)


@pytest.mark.parametrize("name", ["digits.yaml", "ten.yaml"])
def test_the_examples_are_valid(name: str) -> None:
    resolve(read_spec(EXAMPLES / name))
