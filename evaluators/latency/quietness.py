"""What a shared processor takes while nobody disturbs it.

A neighbour on the same core makes everything up to twice as slow, for a millisecond or for minutes. Medians over short
spells differ from item to item by chance, and by 6 to 10 % between processes where low quantiles differ by 3. Long
spells slow a whole process down, items and a fixed piece of work alike: the probe tells by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
import torch.nn.functional as functional

_QUIET = 0.15
"""The share of samples that are faster: not the least, which is luck, nor so many that neighbours had a part in it."""

Probe = Callable[[], float]
"""Does its piece of work and gives how long that took, in ms."""


def quiet(samples: Sequence[float]) -> float:
    """What the samples come to where nobody disturbs them; nan if there are none."""
    return float(np.quantile(samples, _QUIET)) if len(samples) else float("nan")


def processor_probe() -> Probe:
    """About 0.3 ms of what networks do: arithmetic on what lies in the caches, and calls of small operators."""
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(*shape, generator=generator) for shape in ((1, 32, 16, 16), (32, 32, 3, 3)))

    def probe() -> float:
        start = perf_counter()
        with torch.inference_mode():
            for _ in range(2):
                torch.relu(functional.conv2d(image, weight, padding=1).mul(0.5))
        return (perf_counter() - start) * 1e3

    for _ in range(20):
        probe()
    return probe
