from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archfront.errors import InputError
from archfront.evaluators.costs import Costs, count
from archfront.evaluators.evaluator import Evaluated, EvaluationContext, Task
from archfront.spaces.choices import Choices
from archfront.spaces.fbnet import FBNet, FBNetTiny


class Attentive(nn.Module):
    """Products inside functions, which hooks on convs and linears do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        result: Tensor = torch.softmax(q @ k.transpose(1, 2), -1) @ v
        return result


def tasks_of(space: FBNet, count: int, seed: int = 0) -> list[Task]:
    population = space.canonical(space.sample(np.random.default_rng(seed), count))
    keys = space.keys(population)
    return [
        Task(number=i, genotype=genotype, key=key.hex(), fidelity=1, repeat=0, seed=0)
        for i, (genotype, key) in enumerate(zip(space.to_json(population), keys, strict=True))
    ]


@pytest.mark.parametrize("space", [FBNetTiny(), FBNet()], ids=["tiny", "full"])
def test_costs_are_those_of_the_whole_network(space: FBNet) -> None:
    tasks = tasks_of(space, 4)
    results = Costs().evaluate(tasks, EvaluationContext(space=space))
    for task, result in zip(tasks, results, strict=True):
        assert isinstance(result, Evaluated)
        values = {name: metric.value for name, metric in result.metrics.items()}
        assert {metric.provenance for metric in result.metrics.values()} == {"computed"}
        with torch.device("meta"):
            model = space.build(task.genotype).eval()
        shape = (space.in_channels, space.resolution, space.resolution)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *shape, device="meta"))
        assert values["macs"] == counter.get_total_flops() / 2
        assert values["params"] == sum(p.numel() for p in model.parameters())
        state = model.state_dict()
        counters = sum(t.numel() for t in state.values() if not t.is_floating_point())
        assert values["size_bytes"] == 4 * sum(t.numel() for t in state.values()) + 4 * counters
        cost = count(model, shape)
        assert (cost.params, cost.macs, cost.size_bytes, cost.activation_bytes) == tuple(values.values())


def test_known_layers() -> None:
    conv = count(nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)), (3, 8, 8))
    assert conv.params == 3 * 8 * 9 + 8 + 8 * 16 * 5 + 5
    assert conv.macs == 3 * 8 * 9 * 16 + 8 * 16 * 5
    assert conv.size_bytes == 4 * conv.params
    assert conv.activation_bytes == 4 * (3 * 64 + 8 * 16)
    attention = count(Attentive(), (5, 8))
    assert attention.macs == 5 * 8 * 24 + 2 * 5 * 5 * 8


def test_repeated_candidates_are_not_counted_again_and_bad_ones_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    space = FBNetTiny()
    tasks = tasks_of(space, 200, seed=1)
    costs = Costs()
    first = costs.evaluate(tasks, EvaluationContext(space=space))
    with monkeypatch.context() as patch:
        patch.setattr(Costs, "_count", None)
        assert costs.evaluate(tasks, EvaluationContext(space=space)) == first
    bad = Task(number=0, genotype=["k9"], key="00", fidelity=1, repeat=0, seed=0)
    results = costs.evaluate([bad, tasks[0]], EvaluationContext(space=space))
    assert isinstance(results[0], InputError)
    assert results[1] == first[0]


def test_keys_of_other_spaces_are_not_mixed_up() -> None:
    small, large = FBNetTiny(), FBNetTiny(width=2)
    task = tasks_of(small, 1)[0]
    one, other = (Costs().evaluate([task], EvaluationContext(space=space))[0] for space in (small, large))
    assert isinstance(one, Evaluated)
    assert isinstance(other, Evaluated)
    assert one.metrics["params"].value < other.metrics["params"].value


def test_spaces_without_modules_are_refused() -> None:
    with pytest.raises(InputError, match=r"space\.name"):
        Costs().check(EvaluationContext(space=Choices(columns={"a": [1]})))
