"""Drawings of layers: every layer stands in the picture, and within it."""

from xml.etree import ElementTree as ET

import pytest

from archfront.report.drawing import draw
from archfront.spaces.fbnet import FBNetTiny
from archfront.spaces.grammars.einspace import Einspace
from archfront.spaces.grammars.einspace_seeds import SEEDS
from archfront.spaces.space import Layer

SVG = "{http://www.w3.org/2000/svg}"


def leaves(layers: tuple[Layer, ...]) -> list[Layer]:
    found = []
    for layer in layers:
        found += [inner for lane in layer.branches for inner in leaves(lane)] if layer.branches else [layer]
    return found


@pytest.mark.parametrize("name", sorted(SEEDS))
def test_a_branched_model_is_drawn_whole(name: str) -> None:
    layers = Einspace().describe(SEEDS[name]())
    picture = ET.fromstring(str(draw(layers)))
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    kinds = [layer.kind for layer in leaves(tuple(layers))]
    assert sorted(t for t in texts if t in set(kinds)) == sorted(kinds)
    assert ("clone4 … cat4d2 (4 copies)" in texts) == (name == "transformer")
    width, height = (float(picture.attrib[side]) for side in ("width", "height"))
    assert width < 1100
    for box in picture.iter(f"{SVG}rect"):
        x, y, w, h = (float(box.attrib[a]) for a in ("x", "y", "width", "height"))
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height


def test_boxes_do_not_overlap_unless_one_holds_the_other() -> None:
    picture = ET.fromstring(str(draw(Einspace().describe(SEEDS["transformer"]()))))
    boxes = [tuple(float(box.attrib[a]) for a in ("x", "y", "width", "height")) for box in picture.iter(f"{SVG}rect")]
    for i, (x, y, w, h) in enumerate(boxes):
        for u, v, s, t in boxes[i + 1 :]:
            apart = x + w <= u or u + s <= x or y + h <= v or v + t <= y
            inside = x <= u and y <= v and u + s <= x + w and v + t <= y + h
            assert apart or inside


def test_a_chain_is_drawn_as_bars() -> None:
    space = FBNetTiny()
    layers = space.describe(["k3_e1", "skip", *["k3_e1"] * (len(space.columns) - 2)])
    picture = ET.fromstring(str(draw(layers)))
    assert [text.text for text in picture.iter(f"{SVG}text")] == [layer.kind for layer in layers]


def test_names_cannot_break_the_page() -> None:
    text = str(
        draw([Layer(name="<script>", kind="a&b", shape=(1,), branches=((Layer(name="x", kind="<b>", shape=()),),))])
    )
    ET.fromstring(text)
    assert "<script>" not in text
