"""Recovery and fine-tuning as a job has them: what is mended is the policy's network, and drops are fair."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from tests.support.small_models import DATA, RESNET, bits, data_of, digits

import archfront
from archfront import plugins
from archfront.errors import InputError
from archfront.evaluators.compression.compressible import Compressible
from archfront.evaluators.compression.evaluator import Compression
from archfront.evaluators.compression.fine_tuning import FineTuning
from archfront.evaluators.compression.recovery.low_rank import LowRank, correction_bytes
from archfront.evaluators.compression.recovery.recovery import Case
from archfront.evaluators.compression.recovery.registry import RECOVERIES
from archfront.evaluators.compression.recovery.rounding import AdaRound, Gptq
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.export import export_candidate
from archfront.plugins import read_plugins
from archfront.search.plugins import FAMILIES, load_plugins
from archfront.spaces.policies.bits import Bits
from archfront.spaces.policies.quantised import float_weight, quantised_layers
from archfront.spaces.policies.quantiser import Quantiser


def evaluated(space: Bits, genotypes: list[Any], files: Path | None = None, **options: Any) -> list[dict[str, float]]:
    tasks = [
        Task(number=i, genotype=g, key=str(i), fidelity=0, repeat=0, seed=0, final=True)
        for i, g in enumerate(genotypes)
    ]
    context = EvaluationContext(space=space, data=DATA, files=None if files is None else str(files))
    rows = []
    for one in Compression(**options).evaluate(tasks, context):
        assert isinstance(one, Evaluated), one
        rows.append({name: metric.value for name, metric in one.metrics.items()})
    return rows


def case(space: Bits, width: int, network: Compressible) -> Case:
    policy = space.variant([width] * len(space.columns))
    batches, labels = network.inputs("train", 128)
    student = space.transform(copy.deepcopy(network.model), policy, batches).eval()
    return Case(student=student, teacher=network.model, batches=batches, labels=labels)


def moved(one: Case) -> float:
    """How far the student's logits are from the teacher's."""
    with torch.no_grad():
        return sum(float((one.student(b) - one.teacher(b)).square().sum()) for b in one.batches)


@pytest.mark.parametrize("name", sorted(RECOVERIES))
def test_a_network_that_nothing_was_done_to_is_left_to_the_bit(name: str) -> None:
    space = bits("vit", weights=[4, 32], activations="float")
    network = Compressible(space, digits(), 64)
    one = case(space, 32, network)
    RECOVERIES.build({"name": name}, "recovery").recover(one)
    with torch.no_grad():
        assert all(torch.allclose(one.student(b), one.teacher(b), atol=1e-4) for b in one.batches)
    if name != "rsq":  # which rotates what it does not quantise
        assert moved(one) == 0


def test_shared_and_prepared_networks_compute_the_same() -> None:
    space = bits("resnet", weights=[3, 8], activations=[4, 8], keep={"conv1": 8})
    network = Compressible(space, digits(RESNET), 100)
    [batch] = network.inputs("validation", 60)[0]
    genotype = [3, 4, *[8] * (len(space.columns) - 2)]
    [shared] = network.outputs(batch, [space.variant(genotype)])
    with torch.no_grad():
        assert torch.allclose(network.prepared(space.variant(genotype))(batch), shared, atol=1e-5)
    table = space.cost_table(space.from_json([genotype]))
    assert network.costs(space.variant(genotype)) == pytest.approx({k: float(v[0]) for k, v in table.items()})


@pytest.mark.parametrize("step", [Gptq(), AdaRound(steps=150), AdaRound(steps=150, of="layers"), LowRank(rank=4)])
@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_recovered_logits_are_nearer(step: Any, model: str) -> None:
    space = bits(model, weights=[3], activations="float")
    network = Compressible(space, data_of(model), 64)
    one = case(space, 3, network)
    before = moved(one)
    step.recover(one)
    assert moved(one) < 0.8 * before


def test_low_rank_corrections_are_counted_and_best() -> None:
    space = bits("vit", weights=[2], activations="float")
    network = Compressible(space, digits(), 64, recovery=[LowRank(rank=3, bits=16)])
    policy = space.variant([2] * len(space.columns))
    added = network.costs(policy)["size_bytes"] - float(
        space.cost_table(space.from_json([[2] * len(space.columns)]))["size_bytes"][0]
    )
    assert added == sum(correction_bytes(layer.shape, 3) for layer in space.layers.found)
    for _, layer, holder in quantised_layers(network.prepared(policy)):
        weight = float_weight(layer)
        assert weight is not None
        error = (weight - Quantiser(bits=2).fake(weight)).flatten(1)
        tail = torch.linalg.svdvals(error.double())[3:].square().sum()
        left = (weight - layer.weight).detach().double().square().sum()  # type: ignore[operator, union-attr]
        assert float(left) == pytest.approx(float(tail), rel=0.02)
        assert holder.correction is not None


def test_the_drop_is_from_the_network_after_the_same_fine_tuning(tmp_path: Path) -> None:
    space = bits("resnet", weights=[2, 32], activations="float")
    tuning = FineTuning(epochs=1, images=512, batch=64, learning_rate=0.02, augmentation="none")
    genotypes = [[32] * len(space.columns), [2] * len(space.columns)]
    whole, two = evaluated(space, genotypes, tmp_path, fine_tuning=tuning)
    assert whole["accuracy_drop"] == whole["test_accuracy_drop"] == 0
    [untuned, raw] = evaluated(space, genotypes)
    assert whole["accuracy"] != untuned["accuracy"]
    assert two["accuracy"] > raw["accuracy"] + 10
    assert two["accuracy_drop"] == pytest.approx(whole["accuracy"] - two["accuracy"])
    # Other workers find the tuned network; one that is damaged is made again.
    [kept] = tmp_path.iterdir()
    assert kept.name.startswith("reference-")
    before = load(kept.read_bytes())
    kept.write_bytes(kept.read_bytes()[:100])
    network = Compressible(space, digits(RESNET), 256, fine_tuning=tuning)
    assert evaluated(space, genotypes[:1], tmp_path, fine_tuning=tuning, images=128)[0]["accuracy_drop"] == 0
    assert all(torch.equal(value, before[key]) for key, value in load(kept.read_bytes()).items())
    assert not network.shares


def test_distillation_reaches_a_network_of_few_bits() -> None:
    space = bits("resnet", weights=[2, 32], activations="float")
    genotype = [2] * len(space.columns)
    [row] = evaluated(
        space,
        [genotype],
        fine_tuning=FineTuning(images=512, batch=64, learning_rate=0.005, distillation=1.0, temperature=1.0),
    )
    [raw] = evaluated(space, [genotype])
    assert row["accuracy"] > raw["accuracy"] + 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recovery": [{"name": "gptk"}]}, r"compression\.recovery\.0.*gptq"),
        ({"recovery": [{"name": "gptq", "damping": -1.0}]}, r"recovery\.0\.damping"),
        ({"recovery": [{"steps": 3}]}, r"recovery\.0.*has no 'name'"),
        ({"recovery": [{"name": "low-rank"}, {"name": "gptq"}]}, r"recovery\.1.*gptq.*behind 'low-rank'"),
        ({"recovery": [{"name": "gptq"}, {"name": "adaround"}]}, r"recovery\.1.*adaround.*behind 'gptq'"),
        ({"recovery": [{"name": "adaround"}, {"name": "low-rank"}]}, r"recovery\.1.*take back"),
    ],
)
def test_unknown_steps_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Compression(**options)


def test_what_a_step_cannot_serve_is_said_before_the_job_begins() -> None:
    for space in (bits("resnet", activations="float"), bits("vit", activations="follow")):
        with pytest.raises(InputError, match=r"recovery.*(rsq|residual stream|quantised inputs)"):
            Compression(recovery=[{"name": "rsq"}]).check(EvaluationContext(space=space, data=DATA))


def test_statistics_do_not_depend_on_how_many_pass_at_once() -> None:
    space = bits("resnet", weights=[4], activations="float")
    genotype = [[4] * len(space.columns)]
    rows = [
        evaluated(space, genotype, recovery=[{"name": "batch-norm"}], calibration=257, images=images)[0]
        for images in (64, 256)
    ]
    assert rows[0]["accuracy"] == rows[1]["accuracy"] > 95


def test_the_network_that_was_exported_stays_as_it_was() -> None:
    space = bits("resnet", weights=[3], activations="float")
    job = {
        "name": "one",
        "space": {"name": "bits", **space.config},
        "data": DATA,
        "evaluators": [{"name": "compression", "calibration": 32, "recovery": [{"name": "gptq"}]}],
        "objectives": [{"metric": "accuracy", "direction": "max"}],
        "strategy": {"name": "random"},
        "budget": {"evaluations": 1},
        "workers": {"executor": "inline"},
    }
    with tempfile.TemporaryDirectory() as folder:
        found = archfront.run(job, db=Path(folder) / "l.db")
        [before] = evaluated(space, [[3] * len(space.columns)], recovery=[{"name": "gptq"}], calibration=32)
        export_candidate(found, "0", Path(folder) / "a.safetensors")
        [after] = evaluated(space, [[3] * len(space.columns)], recovery=[{"name": "gptq"}], calibration=32)
    assert before == after


def test_a_step_of_the_user_s_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from archfront.evaluators.compression.recovery.recovery import Recovery\n"
        "from archfront.spaces.policies.quantised import quantised_layers\n"
        "class Zero(Recovery):\n"
        "    name = 'zero'\n"
        "    stage = 1\n"
        "    def recover(self, case):\n"
        "        for _, layer, holder in quantised_layers(case.student):\n"
        "            holder.fixed = layer.weight.detach() * 0\n"
        "ARCHFRONT_PLUGINS = {'recoveries': {'zero-of-the-test': Zero}}\n"
    )
    assert set(plugins.FAMILIES) == set(FAMILIES)
    load_plugins(read_plugins([file]))
    space = bits("resnet", weights=[8], activations="float")
    [row] = evaluated(space, [[8] * len(space.columns)], recovery=[{"name": "zero-of-the-test"}])
    assert row["accuracy"] < 20


def test_a_batch_that_the_images_cannot_fill() -> None:
    space = bits("resnet", weights=[2, 32], activations="float")
    evaluator = Compression(fine_tuning=FineTuning(images=32, batch=64))
    with pytest.raises(InputError, match=r"fine_tuning\.batch.*32 training"):
        evaluator.check(EvaluationContext(space=space, data=DATA))
