"""A model drawn as its layers: one bar a layer, as high as the layer is large, coloured by its kind."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import markupsafe

from archfront.spaces.space import Layer

_BAR, _GAP, _HEIGHT, _LABEL = 34, 6, 96, 64


def draw(layers: Sequence[Layer]) -> markupsafe.Markup:
    """An SVG of the layers from input to output."""
    largest = max((layer.size for layer in layers), default=1.0) or 1.0
    # The last label leans out to the right.
    width = len(layers) * (_BAR + _GAP) + _GAP + _LABEL // 2
    parts = [
        f'<svg class="layers" viewBox="0 0 {width} {_HEIGHT + _LABEL}" width="{width}" height="{_HEIGHT + _LABEL}" '
        'role="img" aria-label="layers from input to output">'
    ]
    for i, layer in enumerate(layers):
        x = _GAP + i * (_BAR + _GAP)
        height = 4 + (_HEIGHT - 8) * (layer.size / largest) ** 0.5 if layer.size else 0
        y = _HEIGHT - height
        shape = "×".join(map(str, layer.shape))
        title = markupsafe.escape(f"{layer.name}: {layer.kind}, output {shape}")
        if height:
            parts.append(
                f'<g><title>{title}</title><rect x="{x}" y="{y:.1f}" width="{_BAR}" height="{height:.1f}" rx="3" '
                f'fill="{_colour(layer.kind)}"/></g>'
            )
        else:
            parts.append(
                f'<g><title>{title}</title><line x1="{x}" x2="{x + _BAR}" y1="{_HEIGHT - 3}" y2="{_HEIGHT - 3}" '
                'stroke="#b0b7bc" stroke-width="2" stroke-dasharray="4 3"/></g>'
            )
        middle = x + _BAR / 2
        parts.append(
            f'<text transform="translate({middle - 4},{_HEIGHT + 8}) rotate(60)" font-size="10">'
            f"{markupsafe.escape(layer.kind)}</text>"
        )
    parts.append("</svg>")
    return markupsafe.Markup("".join(parts))


def _colour(kind: str) -> str:
    """A colour that a kind has in every drawing."""
    hue = int.from_bytes(hashlib.blake2b(kind.encode(), digest_size=2).digest(), "big") % 360
    return f"hsl({hue} 48% 58%)"
