"""Versions of tables, profiles, predictors and devices: a short digest of their JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def json_digest(data: Any) -> str:
    """16 hex digits, the same for the same data whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=8).hexdigest()
