"""The table of allocators that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.search.allocators.allocator import Allocator

ALLOCATORS: Registry[Allocator] = Registry(
    "allocators",
    {
        "bisection": "archfront.search.allocators.bisection:Bisection",
        "differentiable": "archfront.search.allocators.differentiable:Differentiable",
        "dp": "archfront.search.allocators.dynamic_programme:DynamicProgramme",
        "greedy": "archfront.search.allocators.greedy:IterativeGreedy",
        "milp": "archfront.search.allocators.linear_programme:Milp",
        "per-site": "archfront.search.allocators.per_site:PerSite",
        "proportional": "archfront.search.allocators.proportional:Proportional",
        "quota": "archfront.search.allocators.quota:QuotaSort",
        "search": "archfront.search.allocators.search:SearchAllocator",
        "threshold": "archfront.search.allocators.threshold:GlobalThreshold",
        "two-pool": "archfront.search.allocators.two_pool:TwoPool",
    },
)
