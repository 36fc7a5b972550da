"""A model drawn as its layers: bars where they follow one another, a diagram where some stand side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import markupsafe

from archfront.spaces.space import Layer

_BAR, _GAP, _HEIGHT, _LABEL, _LONG = 34, 6, 96, 72, 14
"""Of bars, in pixels; and the most letters of a kind that fit below one."""

_BOX, _LETTER, _LINK, _LANE, _FRAME, _CAPTION, _WIDEST = 22, 6.1, 14, 8, 8, 14, 1040
"""Of diagrams, in pixels: height of a box, width of a letter, gaps between boxes and between lanes, margin of a frame
around lanes, height of its caption, and where a new line begins."""


def draw(layers: Sequence[Layer]) -> markupsafe.Markup:
    """An SVG of the layers from input to output."""
    if any(layer.branches or len(layer.kind) > _LONG for layer in layers):
        return _diagram(layers)
    largest = max((layer.size for layer in layers), default=1.0) or 1.0
    # The last label leans out to the right.
    width = len(layers) * (_BAR + _GAP) + _GAP + _LABEL // 2
    parts = [_svg(width, _HEIGHT + _LABEL)]
    for i, layer in enumerate(layers):
        x = _GAP + i * (_BAR + _GAP)
        height = 4 + (_HEIGHT - 8) * (layer.size / largest) ** 0.5 if layer.size else 0
        y = _HEIGHT - height
        if height:
            parts.append(
                f'<g>{_title(layer)}<rect x="{x}" y="{y:.1f}" width="{_BAR}" height="{height:.1f}" rx="3" '
                f'fill="{_colour(layer.kind)}"/></g>'
            )
        else:
            parts.append(
                f'<g>{_title(layer)}<line x1="{x}" x2="{x + _BAR}" y1="{_HEIGHT - 3}" y2="{_HEIGHT - 3}" '
                'stroke="#b0b7bc" stroke-width="2" stroke-dasharray="4 3"/></g>'
            )
        middle = x + _BAR / 2
        parts.append(
            f'<text transform="translate({middle - 4},{_HEIGHT + 8}) rotate(60)" font-size="10">'
            f"{markupsafe.escape(layer.kind)}</text>"
        )
    parts.append("</svg>")
    return markupsafe.Markup("".join(parts))


@dataclass
class _Part:
    """A layer laid out: its extent, and the lanes within it."""

    layer: Layer
    width: float
    height: float
    lanes: list[list[_Part]] = field(default_factory=list)


def _diagram(layers: Sequence[Layer]) -> markupsafe.Markup:
    """Boxes in the order in which data runs through them; lanes of a frame one below the other."""
    lines: list[list[_Part]] = [[]]
    for part in map(_laid_out, layers):
        if lines[-1] and _extent([*lines[-1], part])[0] > _WIDEST:
            lines.append([])
        lines[-1].append(part)
    extents = [_extent(line) for line in lines]
    width = max((w for w, _ in extents), default=0.0) + 2 * _LINK
    body: list[str] = []
    y = float(_LANE)
    for line, (_, height) in zip(lines, extents, strict=True):
        _place(line, _LINK, y + height / 2, body)
        y += height + _LANE
    return markupsafe.Markup("".join([_svg(width, y), *body, "</svg>"]))


def _laid_out(layer: Layer) -> _Part:
    if not layer.branches:
        return _Part(layer, max(_LETTER * len(layer.kind) + 12, _BOX), _BOX)
    lanes = [[_laid_out(inner) for inner in lane] for lane in layer.branches]
    extents = [_extent(lane) for lane in lanes]
    width = max([*(w for w, _ in extents), _LETTER * len(_caption(layer))]) + 2 * (_LINK + _FRAME)
    height = sum(h for _, h in extents) + _LANE * (len(lanes) - 1) + 2 * _FRAME + _CAPTION
    return _Part(layer, width, height, lanes)


def _extent(parts: Sequence[_Part]) -> tuple[float, float]:
    """Width and height of parts in a line; an empty lane is a wire."""
    width = sum(part.width for part in parts) + _LINK * max(len(parts) - 1, 0)
    return width, max((part.height for part in parts), default=float(_BOX))


def _place(parts: Sequence[_Part], x: float, middle: float, into: list[str]) -> float:
    """Draw a line of parts from x on around a height; where it ends."""
    for i, part in enumerate(parts):
        if i:
            into.append(_wire(x, middle, x + _LINK, middle))
            x += _LINK
        top = middle - part.height / 2
        if part.lanes:
            _place_lanes(part, x, top, middle, into)
        else:
            colour, dash = (_colour(part.layer.kind), "") if part.layer.size else ("none", ' stroke-dasharray="4 3"')
            into.append(
                f'<g>{_title(part.layer)}<rect x="{x:.1f}" y="{top:.1f}" width="{part.width:.1f}" height="{_BOX}" '
                f'rx="4" fill="{colour}" stroke="#8a949a"{dash}/><text x="{x + part.width / 2:.1f}" '
                f'y="{middle + 3.5:.1f}" font-size="10" text-anchor="middle" style="fill:#15191c">'
                f"{markupsafe.escape(part.layer.kind)}</text></g>"
            )
        x += part.width
    return x


def _place_lanes(part: _Part, x: float, top: float, middle: float, into: list[str]) -> None:
    right = x + part.width
    into.append(
        f'<g>{_title(part.layer)}<rect x="{x:.1f}" y="{top:.1f}" width="{part.width:.1f}" height="{part.height:.1f}" '
        f'rx="6" fill="#8a949a14" stroke="#b0b7bc"/><text x="{x + _FRAME:.1f}" y="{top + _CAPTION - 2:.1f}" '
        f'font-size="10">{markupsafe.escape(_caption(part.layer))}</text></g>'
    )
    y = top + _CAPTION + _FRAME
    for lane in part.lanes:
        width, height = _extent(lane)
        at = y + height / 2
        begin = x + _FRAME + _LINK
        into.append(_wire(x, middle, begin, at))
        if lane:
            _place(lane, begin, at, into)
        else:
            width = 0.0
        into.append(_wire(begin + width, at, right - _FRAME, at))
        into.append(_wire(right - _FRAME, at, right, middle))
        y += height + _LANE


def _caption(layer: Layer) -> str:
    copies = layer.details.get("copies")
    return f"{layer.kind} ({copies} copies)" if copies else layer.kind


def _wire(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#8a949a"/>'


def _svg(width: float, height: float) -> str:
    return (
        f'<svg class="layers" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" role="img" '
        'aria-label="layers from input to output">'
    )


def _title(layer: Layer) -> str:
    shape = "×".join(map(str, layer.shape))
    return f"<title>{markupsafe.escape(f'{layer.name}: {layer.kind}, output {shape}')}</title>"


def _colour(kind: str) -> str:
    """A colour that a kind has in every drawing."""
    hue = int.from_bytes(hashlib.blake2b(kind.encode(), digest_size=2).digest(), "big") % 360
    return f"hsl({hue} 48% 68%)"
