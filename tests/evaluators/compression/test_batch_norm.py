"""Re-estimated statistics are the means over batches, and nothing else of the model changes."""

import pytest
import torch
from torch import Tensor, nn

from archfront.errors import InputError
from archfront.evaluators.compression.recovery.batch_norm import reestimate_batch_norm


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(4, momentum=0.05)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.dropout(self.norm1(self.conv1(images)).relu())
        outputs: Tensor = self.norm2(self.conv2(hidden))
        return outputs


def network() -> Network:
    """With statistics of a training that is over."""
    torch.manual_seed(0)
    model = Network()
    model(torch.randn(4, 2, 5, 5) + 3)
    return model


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 5, 5, generator=generator) * (n / 4) + n for n in (4, 7, 2)]


def test_statistics_are_the_means_over_batches() -> None:
    model = network()
    assert reestimate_batch_norm(model, iter(batches())) == 2
    means, variances, seconds = [], [], []
    for batch in batches():
        first = model.conv1(batch).double()
        means.append(first.mean((0, 2, 3)))
        variances.append(first.var((0, 2, 3), unbiased=True))
        # The second layer sees what the first one normalises by its batch, without dropout.
        spread = first.var((0, 2, 3), unbiased=False, keepdim=True)
        normalised = (first - first.mean((0, 2, 3), keepdim=True)) / (spread + model.norm1.eps).sqrt()
        seconds.append(model.conv2(normalised.relu().float()).double().mean((0, 2, 3)))
    for found, expected in (
        (model.norm1.running_mean, means),
        (model.norm1.running_var, variances),
        (model.norm2.running_mean, seconds),
    ):
        assert found is not None
        torch.testing.assert_close(found.double(), torch.stack(expected).mean(0), rtol=1e-5, atol=1e-5)
    assert model.norm1.num_batches_tracked == 3


def test_batches_of_one_size_give_the_mean_of_all_data() -> None:
    model = network()
    data = torch.randn(12, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    reestimate_batch_norm(model, torch.split(data, 4))
    torch.testing.assert_close(model.norm1.running_mean, model.conv1(data).mean((0, 2, 3)), rtol=1e-4, atol=1e-6)


def test_modes_momenta_and_parameters_are_as_before() -> None:
    model = network().train()
    model.norm2.eval()
    modes = [m.training for m in model.modules()]
    parameters = [p.clone() for p in model.parameters()]
    reestimate_batch_norm(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert (model.norm1.momentum, model.norm2.momentum) == (0.3, 0.05)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))
    model.eval()
    reestimate_batch_norm(model, batches())
    assert not any(m.training for m in model.modules())


def test_a_failing_batch_leaves_the_statistics() -> None:
    model = network()
    reestimate_batch_norm(model, batches())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [torch.zeros(4, 2, 5, 5), torch.zeros(4, 9, 5, 5)])
    with pytest.raises(InputError, match="batches"):
        reestimate_batch_norm(model, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.norm1.momentum == 0.3


def test_models_without_running_statistics_are_left_alone() -> None:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    assert reestimate_batch_norm(nn.Sequential(nn.Conv2d(2, 2, 1), norm), batches()) == 0
    assert reestimate_batch_norm(nn.Linear(2, 2), []) == 0
    assert norm.momentum == 0.1
