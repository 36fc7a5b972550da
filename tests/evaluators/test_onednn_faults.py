"""The way around oneDNN's fault changes neither outputs nor gradients."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from archfront.evaluators.onednn_faults import avoid_narrow_strided_pointwise
from archfront.spaces.grammars.einspace import Einspace

DEBUG_MALLOC = Path("/usr/lib/x86_64-linux-gnu/libc_malloc_debug.so.0")
FAULTY = [
    "sequential",
    ["routing", "permute132", "leaky_relu", "permute231"],
    "linear16",
    "linear256",
    ["routing", "permute312", ["routing", "im2col1x1s2p0", "linear32", "permute21"], "identity"],
]
"""A network that writes behind oneDNN's workspace where nothing is done about it."""


def test_outputs_and_gradients_stay() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1, stride=2), nn.Conv2d(12, 12, 1, stride=(1, 2), groups=4)
    )
    changed = avoid_narrow_strided_pointwise(copy.deepcopy(plain))
    assert [m.stride for m in changed if isinstance(m, nn.Conv2d)] == [(1, 1)] * 3
    assert list(changed.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 9, 10)
    outputs = [model(images) for model in (plain, changed, copy.deepcopy(changed))]
    for output in outputs:
        output.square().sum().backward()
        assert torch.allclose(output, outputs[0], atol=1e-6)
    for ours, theirs in zip(changed.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_others_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(16, 8, 1, stride=2), nn.Conv2d(8, 8, 3, stride=2), nn.Conv2d(8, 8, 1))
    avoid_narrow_strided_pointwise(model)
    assert [m.stride for m in model if isinstance(m, nn.Conv2d)] == [(2, 2), (2, 2), (1, 1)]


@pytest.mark.skipif(not DEBUG_MALLOC.exists(), reason="needs glibc's checking malloc of x86-64 Debian")
def test_training_a_step_corrupts_no_memory() -> None:
    program = f"""
import torch
from archfront.spaces.grammars.einspace import Einspace
torch.set_num_threads(1)
model = Einspace().build({FAULTY!r})
for _ in range(3):
    model(torch.randn(2, 3, 32, 32)).sum().backward()
"""
    environment = {**os.environ, "LD_PRELOAD": str(DEBUG_MALLOC), "MALLOC_CHECK_": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_network_is_one_of_the_space() -> None:
    assert Einspace().from_json([FAULTY]).shape == (1,)
