"""Files that torch itself executes: exported programs (``.pt2``) and TorchScript. A leaf of torch."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch.export import ExportedProgram

from archfront.errors import MissingExtraError

RUNTIMES = ("eager", "inductor", "torchscript")

_NO_LIMIT = 2**31

Run = Callable[[Tensor], Tensor]


def exported(model: nn.Module, example: Tensor, *, any_batch: bool = False) -> ExportedProgram:
    """A network as a program.

    Args:
        model: in evaluation mode, on the processor.
        example: its one input, ``(batch, ...)``.
        any_batch: serve every batch size, not only the example's.

    Raises:
        torch._dynamo.exc.UserError: the network cannot be exported.
    """
    shapes: Any = ({0: torch.export.Dim("batch", min=1, max=65536)},) if any_batch else None
    # Two, for an example of one would be taken for a network that serves nothing else.
    given = example if not any_batch or len(example) > 1 else torch.cat([example, example])
    # Tensors made in inference mode cannot be traced outside of it, nor a graph inside: copies can.
    with torch.inference_mode(False), torch.no_grad():
        return torch.export.export(copy.deepcopy(model), (given.clone().contiguous(),), dynamic_shapes=shapes)


def export_program(model: nn.Module, example: Tensor, path: Path, *, any_batch: bool = False) -> None:
    """Write a network as a program; see ``exported``."""
    torch.export.save(exported(model, example, any_batch=any_batch), path)


def program_runner(path: Path | str, how: str, threads: int, batch: int | None = None) -> Run:
    """What computes a program's first output.

    Args:
        how: ``eager``, or ``inductor``: compiled, with weights as constants, without which int8 is not fused.
        threads: that compiled operators may use; eager ones have the process's own.
        batch: compile for so many samples alone, to which fewer are filled up. By default for every number that comes.

    Raises:
        MissingExtraError: the program was quantised by torchao, which is not installed, and shall be compiled.
        ValueError: an unknown way.
    """
    # Registers the operators that quantised programs consist of, without which they cannot be read.
    import torch.ao.quantization.fx._decomposed

    if how not in ("eager", "inductor"):
        raise ValueError(f"unknown way {how!r} to run a program; known: eager, inductor")
    program = torch.export.load(path)
    if how == "eager":
        return _without_gradients(program.module())
    # Compiled as they stand, quantised operators would be slower than those in float.
    if any("quantized_decomposed" in str(node.target) for node in program.graph.nodes):
        x86_quantiser()
    run = _compiled(program.module(), threads)
    return run if batch is None else _filled(run, batch)


def runner(path: Path | str, runtime: str, threads: int, batch: int | None = None) -> Run:
    """What computes a file's first output; see ``program_runner``.

    Args:
        runtime: ``eager`` or ``inductor`` for a program, ``torchscript`` for what ``torch.jit`` saved.
    """
    if runtime != "torchscript":
        return program_runner(path, runtime, threads, batch)
    with quiet():
        return _without_gradients(torch.jit.load(str(path)))  # type: ignore[no-untyped-call]


def torch_call(
    path: Path | str, runtime: str, batch: int, shape: Sequence[int], threads: int, dtype: str = "float32"
) -> Callable[[], object]:
    """A call of a file on a batch drawn from torch's global generator, for measuring; compiled already.

    Args:
        shape: of one sample.
        dtype: torch's name; whole numbers are drawn small, as tokens are.
    """
    run = runner(path, runtime, threads)
    drawn, kind = torch.randn(batch, *shape), getattr(torch, dtype)
    feed = drawn if kind.is_floating_point else drawn.abs().to(kind)
    run(feed)
    return lambda: run(feed)


def x86_quantiser() -> ModuleType:
    """torchao's quantiser for x86; its import also teaches Inductor to fuse what it quantised.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    try:
        with quiet():
            from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer
    except ImportError:
        raise MissingExtraError("Backend pt2e", "pt2e") from None
    return x86_inductor_quantizer  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings: that torchao's libraries for GPUs do not load, and that what serves today will be removed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output))


def _without_gradients(module: Callable[[Tensor], Any]) -> Run:
    def run(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return _first(module(batch))

    return run


def _compiled(module: nn.Module, threads: int) -> Run:
    # Every shape for itself: with a batch of any size Inductor mistakes the strides of an int8 convolution's output.
    call = _without_gradients(torch.compile(module, dynamic=False))
    known: set[tuple[object, ...]] = set()

    def run(batch: Tensor) -> Tensor:
        batch = batch.contiguous()
        # What torch compiles anew for: unnoticed, it would do so without these settings, and compute in float.
        key = (batch.shape, batch.dtype, batch.is_inference(), torch.get_num_threads())
        if key in known:
            return call(batch)
        with _compiling(threads):
            output = call(batch)
        known.add(key)
        return output

    return run


@contextmanager
def _compiling(threads: int) -> Iterator[None]:
    """Inductor's settings, which it reads in the first call of each shape: options of ``torch.compile`` come too late
    for ``freezing``."""
    import torch._inductor.config

    # One compiler at a time, in this process: others would outlive the compilation.
    settings = {"freezing": True, "cpp.threads": threads, "compile_threads": 1}
    limits = {"recompile_limit": _NO_LIMIT, "accumulated_recompile_limit": _NO_LIMIT}
    with quiet(), torch._inductor.config.patch(settings), torch._dynamo.config.patch(limits):
        yield


def _filled(run: Run, batch: int) -> Run:
    def padded(given: Tensor) -> Tensor:
        missing = batch - len(given)
        if not missing:
            return run(given)
        return run(torch.cat([given, given.new_zeros(missing, *given.shape[1:])]))[: len(given)]

    return padded
