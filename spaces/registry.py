"""The table of spaces that job files can name."""

from __future__ import annotations

from archfront.registry import Registry
from archfront.spaces.space import Space

SPACES: Registry[Space] = Registry(
    "spaces",
    {
        "fbnet": "archfront.spaces.fbnet:FBNet",
        "fbnet-tiny": "archfront.spaces.fbnet:FBNetTiny",
        "nasbench201": "archfront.spaces.nasbench201:NasBench201",
        "choices": "archfront.spaces.choices:Choices",
        "recorded": "archfront.spaces.recorded:Recorded",
    },
)
