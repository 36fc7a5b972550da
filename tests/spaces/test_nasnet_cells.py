"""NASNet's space: published networks to the last parameter, timm's outputs, and what equal keys mean."""

from collections import defaultdict

import networkx as nx
import numpy as np
import pytest
import torch
from networkx.algorithms.isomorphism import categorical_node_match

from archfront.errors import InputError
from archfront.evaluators.costs import count
from archfront.spaces.nasnet_cells import DARTS_V2, NASNET_A, NasNet
from archfront.spaces.nasnet_operations import DARTS, INPUTS, NASNET, OPERATIONS, Cell, Site, live_sites, operation
from archfront.spaces.space import Population
from archfront.spaces.torchvision_compat import import_timm

LARGE = NasNet(
    combine=NASNET_A.combine,
    filters=168,
    stem="imagenet",
    skip_reduction_input=True,
    classes=1000,
    resolution=331,
)
TINY = {"cells": 1, "stages": 2, "filters": 4, "resolution": 8}


def test_nasnet_a_large_has_the_published_size_and_multiply_adds() -> None:
    with torch.device("meta"):
        model = LARGE.build(NASNET_A.genotype)
        reference = import_timm().create_model("nasnetalarge")
    found, expected = count(model, (3, 331, 331)), count(reference, (3, 331, 331))
    assert found.params == expected.params == 88_753_150
    assert found.macs == expected.macs
    assert round(found.macs / 1e9, 2) == 23.78


def test_darts_v2_has_the_published_size() -> None:
    space = NasNet(blocks=4, operations="darts", combine="all", filters=36)
    with torch.device("meta"):
        model = space.build(DARTS_V2.genotype)
    # 20 cells of 36 channels without the auxiliary head: 3.3 M.
    assert len(model.cells) == 20
    assert sum(p.numel() for p in model.parameters()) == 3_349_342


def test_nasnet_a_computes_what_timm_does() -> None:
    import_timm()
    from timm.models.nasnet import NASNetALarge

    torch.manual_seed(0)
    theirs = NASNetALarge(num_classes=7, stem_size=6, num_features=192, pad_type="same").eval()
    # timm's strided average pool pads first and so counts the padding; TensorFlow's, which it stands for, does not.
    strided = [m for m in theirs.modules() if getattr(m, "comb_iter_2_right", None) and hasattr(m, "comb_iter_4_right")]
    assert len(strided) == 4
    for cell in strided:
        cell.comb_iter_2_left = torch.nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    # At 67 pixels every size is odd, where TensorFlow's padding is symmetric.
    space = NasNet(
        combine=NASNET_A.combine,
        filters=8,
        stem_filters=6,
        stem="imagenet",
        skip_reduction_input=True,
        classes=7,
        resolution=67,
    )
    row = space.from_json([NASNET_A.genotype])[0]
    ours = space.network(row).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    copied = _copy_in_order(ours.stem, [theirs.conv0])
    copied += _copy_in_order(ours.classifier, [theirs.last_linear])
    names = ["cell_stem_0", "cell_stem_1", *(f"cell_{i}" for i in range(6)), "reduction_cell_0"]
    names += [*(f"cell_{i}" for i in range(6, 12)), "reduction_cell_1", *(f"cell_{i}" for i in range(12, 18))]
    for name, cell in zip(names, ours.cells.values(), strict=True):
        parts = dict(getattr(theirs, name).named_children())
        previous = [parts[n] for n in ("conv_prev_1x1", "path_1", "path_2", "final_path_bn") if n in parts]
        copied += _copy_in_order(cell.inputs[0], previous) + _copy_in_order(cell.inputs[1], [parts["conv_1x1"]])
        for number, term in enumerate(cell.terms):
            part = parts.get(f"comb_iter_{number // 2}_{('left', 'right')[number % 2]}")
            copied += _copy_in_order(term, [part] if part is not None else [])
    assert copied == len(theirs.state_dict())
    images = torch.randn(2, 3, 67, 67)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def _copy_in_order(target: torch.nn.Module, sources: list[torch.nn.Module]) -> int:
    """Tensors copied, in order; both sides must have the same shapes."""
    values = [value for source in sources for value in source.state_dict().values()]
    owned = list(target.state_dict().values())
    assert [value.shape for value in owned] == [value.shape for value in values]
    for mine, value in zip(owned, values, strict=True):
        mine.copy_(value)
    return len(values)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "none"])
def test_every_operation_halves_or_keeps_the_size(name: str, size: int) -> None:
    images = torch.randn(2, 4, size, size)
    assert operation(name, 4, 4, 1)(images).shape == images.shape
    half = -(-size // 2)
    assert operation(name, 4, 4, 2)(images).shape == (2, 4, half, half)
    assert operation(name, 4, 6, 2)(images).shape == (2, 6, half, half)


def test_operations_have_the_parameters_of_their_definitions() -> None:
    c = 12
    norm = 2 * c
    expected = {
        "conv_1x7_7x1": 14 * c * c + norm,
        "conv_1x3_3x1": 6 * c * c + norm,
        "conv_1x1": c * c + norm,
        "conv_3x3": 9 * c * c + norm,
        "dilated_conv_3x3": 9 * c * c + norm,
        **{f"sep_conv_{k}x{k}": 2 * (k * k * c + c * c + norm) for k in (3, 5, 7)},
        **{f"dil_sep_conv_{k}x{k}": k * k * c + c * c + norm for k in (3, 5)},
    }
    assert len(NASNET) == 13
    assert len(DARTS) == 7
    for name in {*NASNET, *DARTS}:
        assert sum(p.numel() for p in operation(name, c, c, 1).parameters()) == expected.get(name, 0), name


def test_windows_reach_as_far_as_their_names_say() -> None:
    reach = {"conv_1x7_7x1": 3, "sep_conv_7x7": 6, "dilated_conv_3x3": 2, "dil_sep_conv_5x5": 4, "max_pool_5x5": 2}
    for name, pixels in reach.items():
        image = torch.rand(1, 2, 17, 17, requires_grad=True)
        operation(name, 2, 2, 1).eval()(image)[0, :, 8, 8].sum().backward()
        touched = torch.nonzero(image.grad.abs().sum(dim=(0, 1)))
        if name != "max_pool_5x5":
            assert (touched.min().item(), touched.max().item()) == (8 - pixels, 8 + pixels), name
        assert touched.min() >= 8 - pixels
        assert touched.max() <= 8 + pixels


def _graph(blocks: list[list[list[int]]], outputs: list[int]) -> nx.DiGraph:
    """A cell as a labelled graph: states and terms are nodes, so that a doubled term is not lost."""
    graph = nx.DiGraph()
    for state in range(INPUTS + len(blocks)):
        graph.add_node(state, label=("input", state) if state < INPUTS else ("block", state in outputs))
    for i, block in enumerate(blocks, start=INPUTS):
        for j, (state, name) in enumerate(block):
            graph.add_node((i, j), label=("term", name))
            graph.add_edge(state, (i, j))
            graph.add_edge((i, j), i)
    return graph


@pytest.mark.filterwarnings("ignore:The hashes produced for directed graphs")
@pytest.mark.parametrize("combine", ["unused", "all", {"normal": [0, 3, 4], "reduction": [2]}])
def test_keys_are_the_isomorphism_classes_of_the_live_graphs(combine: object) -> None:
    """Against networkx, which knows nothing of our order: three blocks, two operations, one cell varied."""
    space = NasNet(blocks=3, operations=["identity", "conv_3x3"], combine=combine, stages=1)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    population = space.sample(rng, 700)
    # Few states, so that many genotypes meet.
    population[:, 12:] = 0
    graphs = defaultdict(list)
    for key, row in zip(space.keys(population), population, strict=True):
        plan = space.plans(row)[0]
        full = _graph(row[:12].reshape(3, 2, 2).tolist(), list(plan.outputs))
        dead = {state for state in range(INPUTS, INPUTS + 3) if state not in plan.live}
        full.remove_nodes_from([node for node in full if (node if isinstance(node, int) else node[0]) in dead])
        if not isinstance(combine, str):
            for state in plan.outputs:
                full.nodes[state]["label"] = (*full.nodes[state]["label"], "output")
        graphs[key].append(full)
    assert len(graphs) < len(population)
    match = categorical_node_match("label", None)
    classes = defaultdict(list)
    for members in graphs.values():
        assert all(nx.is_isomorphic(members[0], other, node_match=match) for other in members[1:])
        classes[nx.weisfeiler_lehman_graph_hash(members[0], node_attr="label")].append(members[0])
    for candidates in classes.values():
        for i, graph in enumerate(candidates):
            assert not any(nx.is_isomorphic(graph, other, node_match=match) for other in candidates[:i])


def _reordered(rng: np.random.Generator, space: NasNet, row: Population) -> tuple[Population, list[list[int]]]:
    """The same cells with blocks and terms in another order, and the new position of each block."""
    cells = row.reshape(2, space.blocks, 2, 2).copy()
    orders = []
    for cell in cells:
        while True:
            order = rng.permutation(space.blocks)
            labels = np.concatenate([np.arange(INPUTS), INPUTS + order])
            moved = np.empty_like(cell)
            moved[order] = cell
            moved[..., 0] = labels[moved[..., 0]]
            if (moved[..., 0] < INPUTS + np.arange(space.blocks)[:, None]).all():
                break
        cell[:] = moved[:, ::-1]
        orders.append(order.tolist())
    return cells.reshape(-1), orders


def test_reordered_cells_have_equal_keys_and_compute_the_same() -> None:
    space = NasNet(operations=[*NASNET, "none"])
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    moves = 0
    for row in space.sample(rng, 8):
        other, orders = _reordered(rng, space, row)
        moves += orders[0] != list(range(space.blocks))
        keys = space.keys(np.stack([row, other]))
        assert keys[0] == keys[1]
        previous, current = torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
        for kind, order in enumerate(orders):
            plan, moved = space.plans(row)[kind], space.plans(other)[kind]
            site = Site(reduction=bool(kind), previous=0, current=0, width=4)
            first = Cell(plan, site, (6, 6), shrink=False).eval()
            second = Cell(moved, site, (6, 6), shrink=False).eval()
            second.inputs.load_state_dict(first.inputs.state_dict())
            second.carried.load_state_dict(first.carried.state_dict())
            for block, place in enumerate(order):
                for term in range(2):
                    second.terms[2 * place + 1 - term].load_state_dict(first.terms[2 * block + term].state_dict())
            labels = [0, 1, *(INPUTS + place for place in order)]
            expected = dict(zip([labels[s] for s in plan.outputs], first(previous, current).split(4, 1), strict=True))
            found = dict(zip(moved.outputs, second(previous, current).split(4, 1), strict=True))
            assert expected.keys() == found.keys()
            for state, channels in found.items():
                torch.testing.assert_close(channels, expected[state])
    assert moves > 4


@pytest.mark.parametrize("combine", ["unused", "all", {"normal": [0, 4], "reduction": [1, 3]}])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_representative_is_of_the_same_size_and_cost_as_what_is_written(combine: object, stem: object) -> None:
    space = NasNet(
        blocks=3,
        operations=["none", "identity", "sep_conv_3x3", "max_pool_3x3"],
        combine=combine,
        stem=stem,
        cells=1,
        stages=2,
        filters=8,
        resolution=33,
    )  # type: ignore[arg-type]
    rows = space.sample(np.random.default_rng(0), 15)
    for row, representative in zip(rows, space.canonical(rows), strict=True):
        with torch.device("meta"):
            written, built = space.network(row), space.network(representative)
        shape = (3, 33, 33)
        found, expected = count(built, shape), count(written, shape)
        assert (found.params, found.macs) == (expected.params, expected.macs)


def test_what_the_logits_do_not_depend_on_is_neither_built_nor_told_apart() -> None:
    space = NasNet(blocks=1, operations=["identity", "conv_3x3"], combine="all", **TINY)
    # Normal cells look back by two, so the last one sees the stem and the reduction cell leads nowhere.
    normal = [0, "conv_3x3", 0, "conv_3x3"]
    genotypes = [[*normal, 0, "identity", 1, op] for op in ("identity", "conv_3x3")]
    keys = space.keys(space.from_json(genotypes))
    assert keys[0] == keys[1]
    model = space.build(genotypes[0])
    assert [space.sites[int(i)].reduction for i in model.cells] == [False, False]
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert live_sites(space.sites, (True, False), (True, True)) == [0, 2]
    # With the current state in use, the reduction cell counts.
    normal = [1, "conv_3x3", 0, "conv_3x3"]
    assert len(set(space.keys(space.from_json([[*normal, *genotype[4:]] for genotype in genotypes])))) == 2
    # Without a second stage there is none.
    single = NasNet(blocks=1, operations=["identity", "conv_3x3"], **{**TINY, "stages": 1})
    keys = single.keys(single.from_json([[*normal, *genotype[4:]] for genotype in genotypes]))
    assert keys[0] == keys[1]


def test_the_state_of_a_none_does_not_matter_and_does_not_use_it() -> None:
    space = NasNet(blocks=2, operations="darts_none", **TINY)
    reduction = [0, "identity", 1, "identity"] * 2
    genotypes = [[0, "none", 1, "identity", state, "none", 1, "sep_conv_3x3", *reduction] for state in (0, 1, 2)]
    assert len(set(space.keys(space.from_json(genotypes)))) == 1
    plan = space.plans(space.from_json(genotypes)[2])[0]
    # Nothing uses state 0 and block 2, so NASNet's rule concatenates them.
    assert plan.outputs == (0, 2, 3)
    zeros = [0, "none", 0, "none", 2, "identity", 1, "identity", *reduction]
    assert space.build(zeros)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_the_cell_after_a_reduction_skips_it_only_where_told() -> None:
    def inputs(space: NasNet) -> list[tuple[int, int]]:
        return [(site.previous, site.current) for site in space.sites]

    assert inputs(NasNet(cells=2, stages=2)) == [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]
    assert inputs(NasNet(cells=2, stages=2, skip_reduction_input=True)) == [(0, 0), (0, 1), (1, 2), (1, 3), (3, 4)]
    assert [site.width for site in LARGE.sites[:2]] == [42, 84]


def test_a_description_names_every_block() -> None:
    layers = LARGE.describe(NASNET_A.genotype)
    assert len(layers) == 12
    assert layers[5].shape == (6 * 168, 42, 42)
    assert layers[11].shape == (4 * 336, 21, 21)
    # Blocks stand in canonical order, so only what does not number them is the same.
    words = [layer.kind for layer in layers[:5]]
    assert "identity(1) + sep_conv_3x3(1)" in words or "sep_conv_3x3(1) + identity(1)" in words
    assert layers[5].kind == "concat(0, 2, 3, 4, 5, 6)"
    assert all(layer.size > 0 for layer in layers)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"blocks": 7}, "space.blocks"),
        ({"cells": 0}, "space.cells"),
        ({"filters": 1}, "space.filters"),
        ({"stem": "imagenet", "filters": 6}, "space.filters"),
        ({"stem": "mobile"}, "space.stem"),
        ({"stages": 7}, "space.resolution"),
        ({"operations": "enas"}, "space.operations"),
        ({"operations": ["conv_3x3", "conv_3x3"]}, "space.operations"),
        ({"operations": ["conv_3x33"]}, r"space.operations\[0\].*'conv_3x3'"),
        ({"combine": "some"}, "space.combine"),
        ({"combine": {"normal": [2]}}, "space.combine"),
        ({"combine": {"normal": [7], "reduction": [2]}}, "space.combine.normal"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=field):
        NasNet(**arguments)  # type: ignore[arg-type]
