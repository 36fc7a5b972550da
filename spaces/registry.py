"""The table of spaces that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.spaces.space import Space

BUILT_IN = {
    "fbnet": "archfront.spaces.fbnet:FBNet",
    "fbnet-tiny": "archfront.spaces.fbnet:FBNetTiny",
    "nasbench201": "archfront.spaces.nasbench201:NasBench201",
    "evonorm": "archfront.spaces.evonorm:EvoNorm",
    "skan": "archfront.spaces.skan:SKan",
    "nasnet": "archfront.spaces.nasnet_cells:NasNet",
    "scaled": "archfront.spaces.scaled:Scaled",
    "einspace": "archfront.spaces.grammars.einspace:Einspace",
    "tabular": "archfront.spaces.grammars.tabular:Tabular",
    "joint": "archfront.spaces.joint:Joint",
    "bounded": "archfront.spaces.bounded:Bounded",
    "bits": "archfront.spaces.policies.bits:Bits",
    "depth-bits": "archfront.spaces.policies.depth_bits:DepthBits",
    "choices": "archfront.spaces.choices:Choices",
    "recorded": "archfront.spaces.recorded:Recorded",
}

SPACES: Registry[Space] = Registry("spaces", BUILT_IN)
