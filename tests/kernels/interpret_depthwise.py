"""Runs the Triton kernel in Triton's interpreter and prints, a line of JSON each, how far it is from the truth.

A program of its own, since TRITON_INTERPRET must be set before triton is imported.
"""

import itertools
import json
import sys

import torch
from torch import Tensor

from archfront.kernels.ops.depthwise import plan, run_kernel
from archfront.kernels.reference.depthwise import depthwise_scale_shift as reference
from archfront.kernels.reference.depthwise import fold_batch_norm
from archfront.spaces.fbnet_blocks import ConvNorm

GUARD = 4096
# More pixels than a tile; channels that fill no block; an image smaller than the kernel.
SHAPES = ((2, 3, 17, 16), (1, 19, 7, 9), (2, 6, 2, 1))


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """The same values amid NaN, and all of that memory: what is read past an end and used then shows in the result."""
    memory = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
    view = memory[GUARD : GUARD + values.numel()].view(values.shape)
    view.copy_(values)
    return view, memory


def by_kernel(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, relu: bool) -> tuple[Tensor, bool]:
    """The kernel's result, and whether it wrote past an end."""
    count, channels, height, width = x.shape
    nothing = torch.full((count, channels, -(-height // stride), -(-width // stride)), torch.nan, dtype=x.dtype)
    out, memory = guarded(nothing)
    operands = [guarded(operand)[0] for operand in (x, weight, scale, shift)]
    run_kernel(*operands, out, stride=stride, relu=relu)
    ends = torch.cat((memory[:GUARD], memory[GUARD + out.numel() :]))
    return out, not bool(ends.isnan().all())


def report(case: str, found: Tensor, truth: Tensor, strayed: bool) -> None:
    """Errors over the truth's root mean square; ``worst`` leaves out what rounding may take of each number."""
    error = found.double() - truth.double()
    size = truth.double().square().mean().sqrt().clamp_min(1e-30)
    rounding = torch.finfo(found.dtype).eps / 2 * truth.double().abs()
    relative = (error.square().mean().sqrt() / size).item()
    worst = ((error.abs() - rounding).max() / size).item()
    print(json.dumps({"case": case, "relative": relative, "worst": worst, "strayed": strayed}))


def sweep(everything: bool) -> None:
    """Against the reference in float64 on the same, already rounded numbers.

    The interpreter is slow: unless ``everything`` is asked for, each shape, kernel and stride meets one pair of dtype
    and ReLU, and the pairs take turns.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = list(itertools.product((torch.float32, torch.float16), (False, True)))
    places = itertools.product(enumerate(SHAPES), enumerate((3, 5)), (1, 2))
    chosen = [
        (shape, kernel, stride, pair)
        for (i, shape), (j, kernel), stride in places
        for pair in (pairs if everything else [pairs[(i + 2 * j + stride) % 4]])
    ]
    for shape, kernel, stride, (dtype, relu) in chosen:
        x = torch.randn(shape, generator=generator).to(dtype)
        weight = torch.randn(shape[1], 1, kernel, kernel, generator=generator).to(dtype)
        # Negative scales too; a shift that leaves some of every result above zero.
        scale = torch.randn(shape[1], generator=generator)
        shift = torch.randn(shape[1], generator=generator) + 1
        found, strayed = by_kernel(x, weight, scale, shift, stride, relu)
        truth = reference(x.double(), weight.double(), scale, shift, stride=stride, relu=relu)
        case = f"{shape} k{kernel} s{stride} relu={relu} {str(dtype).removeprefix('torch.')}"
        report(case, found, truth, strayed)


def against_fbnet() -> None:
    """The kernel after folding, against the conv, batch norm and ReLU of FBNet's block."""
    torch.manual_seed(0)
    for kernel, stride in ((3, 1), (5, 2)):
        block = ConvNorm(6, 6, kernel, stride, 6)
        conv, norm = block[0], block[1]
        torch.nn.init.uniform_(norm.running_var, 0.2, 3)
        for values in (norm.running_mean, norm.weight, norm.bias):
            torch.nn.init.normal_(values)
        x = torch.randn(1, 6, 7, 5)
        with torch.no_grad():
            found, strayed = by_kernel(x, conv.weight, *fold_batch_norm(norm), stride, relu=True)
            truth = block.eval().double()(x.double())
        report(f"fbnet k{kernel} s{stride} float32", found, truth, strayed)


def not_a_number() -> None:
    """NaN in one channel reaches that channel alone, and the ReLU keeps it (on a GPU, tl.maximum would not)."""
    x = torch.randn(1, 2, 4, 4)
    x[0, 1] = torch.nan
    found, strayed = by_kernel(x, torch.ones(2, 1, 3, 3), torch.ones(2), torch.ones(2), 1, relu=True)
    good = found[0, 0].isfinite().all() and found[0, 1].isnan().all()
    print(json.dumps({"case": "nan", "relative": 0.0 if good else 1.0, "worst": 0.0, "strayed": strayed}))


if __name__ == "__main__":
    blocks = [plan(torch.Size(shape), 3, 1, relu=False).constants for shape in SHAPES]
    assert any(b["BLOCK_C"] > shape[1] for b, shape in zip(blocks, SHAPES, strict=True)), "no channel is masked"
    assert any(b["BLOCK_P"] < shape[2] * shape[3] for b, shape in zip(blocks, SHAPES, strict=True)), "one tile is all"
    sweep("--everything" in sys.argv)
    against_fbnet()
    not_a_number()
