"""The sites of a network at which structure can be cut: channels, heads, hidden widths, the embedding, blocks, tokens.

A site is only given where the network itself has shown, in a run on the example, that what belongs to it was found.
"""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from archfront.errors import InputError, suggestion
from archfront.spaces.policies.channel_groups import Cut, Group, Trials, find_groups, names_of_tensors, tensors_of
from archfront.spaces.policies.site import Choice, Site

KINDS = ("channels", "heads", "mlp", "embedding", "blocks", "tokens")


@dataclass(frozen=True)
class Structure:
    """What was found in a network.

    Attributes:
        sites: kind after kind as they were asked for, each kind's in the order in which they run.
        left_alone: paths of modules, and of parameters of the network itself, with weights of two axes and more that
            no site covers, and why.
    """

    sites: tuple[Site, ...]
    left_alone: dict[str, str]


def find_structure(model: nn.Module, example: Tensor, domains: Mapping[str, Sequence[Choice]]) -> Structure:
    """The sites of a network; of its kinds those in ``domains``.

    ``channels``: the output channels that must be cut together. ``module`` is the first layer that makes them,
    ``members`` are all that do. Facts: ``channels``, ``step`` (how many go at once: 32 where a convolution of 32 groups
    makes or reads them), ``params`` (what the channels own, in the layers that read them too).
    ``heads``: of an attention that runs by heads. Facts: ``heads``, ``head_dim``, ``params``.
    ``mlp``: the hidden width between linear layers. Facts: ``width``, ``params``.
    ``embedding``: the width of the stream of tokens that all attentions add to. Facts: ``width``, ``params``.
    ``blocks``: modules that add to their input, which can be skipped. Facts: ``params``.
    ``tokens``: before a block with an attention. Facts: ``tokens``, ``prefix`` (the first ones, which must stay).

    A width of a transformer that no kind asked for describes is one of ``channels``.
    What only runs unchanged as long as no width changes (an attention that says its widths in numbers) is no hindrance
    for ``heads`` and ``embedding``, whose cuts must rewrite it.

    Args:
        model: any network of one input. It is left as it is.
        example: one input, ``(1, ...)``.
        domains: kind -> choices, from the strongest compression to none.

    Raises:
        InputError: an unknown kind, a domain that is empty or repeats a choice, a model that cannot be followed.
    """
    _check(domains)
    remedy = "Give a plain module of one tensor, whose course depends on no values, and an input that it takes."
    with _named_failure(model, "cannot be copied", "Give a module that copy.deepcopy takes."):
        network = _trainable_copy(model)
    example = example.detach().cpu().clone()
    if example.is_floating_point():
        example = example.to(next((p.dtype for p in network.parameters()), example.dtype))
    # The network runs with widths that are not its own, of which it may warn, and may draw numbers.
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng([]), torch.enable_grad():
        shape = tuple(example.shape)
        with _named_failure(model, f"fails on an input of shape {shape}", remedy):
            course = _Course.of(network, example)
        with _named_failure(model, "cannot be followed from its inputs to its outputs", remedy):
            return _Finder(network, example, course, domains).structure()


def _check(domains: Mapping[str, Sequence[Choice]]) -> None:
    if not domains:
        raise InputError("domains", dict(domains), "asks for nothing", f"Give one of: {', '.join(KINDS)}.")
    for kind, domain in domains.items():
        if kind not in KINDS:
            raise InputError(f"domains.{kind}", domain, "is of no kind of structure", suggestion(kind, KINDS))
        if not domain:
            raise InputError(f"domains.{kind}", domain, "is empty", "Give choices, the last of which changes nothing.")
        if len(set(domain)) < len(domain):
            raise InputError(f"domains.{kind}", domain, "says a choice twice", "Give every choice once.")


@contextmanager
def _named_failure(model: nn.Module, problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        problem = f"{problem} ({type(error).__name__}: {error})"
        raise InputError("model", type(model).__name__, problem, remedy) from error


def _trainable_copy(model: nn.Module) -> nn.Module:
    """A copy to follow: with gradients for all weights, and of a precision in which only errors change outputs."""
    network = copy.deepcopy(model).cpu().eval()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in network.parameters()):
        network = network.float()
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return network


@dataclass
class _Call:
    """A module's first call: its first input and its first output, with their nodes in autograd's graph."""

    given: Tensor | None
    before: Any
    made: Tensor | None = None
    after: Any = None


@dataclass(frozen=True)
class _Course:
    """How a network runs: its modules' calls, by path, in the order in which they begin."""

    calls: Mapping[str, _Call]

    @classmethod
    def of(cls, network: nn.Module, example: Tensor) -> _Course:
        calls: dict[str, _Call] = {}
        paths = {module: path for path, module in network.named_modules()}

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(tensors_of((args, kwargs)), None)
            calls.setdefault(paths[module], _Call(given, None if given is None else given.grad_fn))

        def end(module: nn.Module, _: tuple[Any, ...], output: object) -> None:
            call = calls[paths[module]]
            if call.made is None:
                call.made = next(tensors_of(output), None)
                call.after = None if call.made is None else call.made.grad_fn

        handles = [module.register_forward_pre_hook(begin, with_kwargs=True) for module in paths]
        handles += [module.register_forward_hook(end) for module in paths]
        if example.is_floating_point():  # so that the first module's input has a node too
            example = example.clone().requires_grad_(True).clone()
        try:
            network(example)
        finally:
            for handle in handles:
                handle.remove()
        return cls(calls)


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


@dataclass(frozen=True)
class _Attention:
    """A guess at how a module is an attention by heads.

    Attributes:
        path: of the module.
        output: path of the layer that writes its result into the stream of tokens.
        group: its heads.
    """

    path: str
    output: str
    group: Group

    @property
    def head_dim(self) -> int:
        return self.group.channels // self.group.units


_HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads")
_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention)


def _attentions(network: nn.Module, course: _Course, refused: dict[str, str]) -> list[list[_Attention]]:
    """Of every module with heads, asked from the innermost, the guesses; why others have none goes to ``refused``."""
    names = names_of_tensors(network)
    rank = {path: i for i, path in enumerate(course.calls)}
    found: dict[str, list[_Attention]] = {}
    for path in sorted(course.calls, key=lambda path: -path.count(".") - bool(path)):
        module = network.get_submodule(path)
        heads = next((h for name in _HEADS if type(h := getattr(module, name, None)) is int and h > 0), None)
        if heads is None or any(_is_inside(other, path) for other in found):
            continue
        # Those whose weights the module uses without calling them come first.
        of_its_own = {f"{path}.{p}" if path else p: m for p, m in module.named_modules() if isinstance(m, nn.Linear)}
        order = sorted(of_its_own, key=lambda p: rank.get(p, -1))
        if isinstance(module, nn.MultiheadAttention):
            found[path] = [_torch_attention(path, module, names)]
        elif guesses := list(_linear_attentions(path, network, {p: of_its_own[p] for p in order}, heads, names)):
            found[path] = guesses
        elif order:
            refused[path] = f"does not make queries, keys and values of its own for each of its {heads} heads"
    return [found[path] for path in course.calls if path in found]


def _torch_attention(path: str, module: nn.MultiheadAttention, names: Mapping[int, str]) -> _Attention:
    width, heads = module.embed_dim, module.num_heads
    places: list[tuple[Tensor | None, int]] = [(module.in_proj_weight, 0), (module.in_proj_bias, 0)]
    places += [(module.q_proj_weight, 0), (module.k_proj_weight, 0), (module.v_proj_weight, 0)]
    places += [(module.bias_k, 2), (module.bias_v, 2), (module.out_proj.weight, 1)]
    cuts = [
        Cut(names[id(tensor)], axis, np.arange(tensor.shape[axis]) // (width // heads) % heads)
        for tensor, axis in places
        if tensor is not None
    ]
    return _Attention(path, path, Group(writers=(path,), cuts=tuple(cuts), units=heads, channels=width))


def _linear_attentions(
    path: str, network: nn.Module, linear: Mapping[str, nn.Linear], heads: int, names: Mapping[int, str]
) -> Iterator[_Attention]:
    """Of linear layers in the order in which they run: one takes the heads' results, those before it make them."""
    for last in reversed(range(1, len(linear))):
        *before, output = list(linear)[: last + 1]
        width = linear[output].in_features
        makers = [p for p in before if linear[p].out_features in (width, 2 * width, 3 * width)]
        if width % heads or sum(linear[p].out_features for p in makers) < 3 * width:
            continue
        dim = width // heads
        ends: list[tuple[Tensor | None, int, int]] = [(linear[output].weight, 1, 1)]  # tensor, axis, times the width
        for p in makers:
            times = linear[p].out_features // width
            ends += [(linear[p].weight, 0, times), (linear[p].bias, 0, times)]
        held = [(tensor, axis, times) for tensor, axis, times in ends if tensor is not None]
        if any(id(tensor) not in names for tensor, _, _ in held):
            continue  # computed from others
        # A bias of each head's scores, a norm of the results; but it may be a norm of the inputs, or a bias by place.
        others = [
            (tensor, axis)
            for tensor in network.get_submodule(path).parameters()
            for axis, size in enumerate(tensor.shape)
            if size in (heads, width) and all(tensor is not t for t in (linear[output].bias, *(t for t, _, _ in held)))
        ]
        # Queries, keys and values of all heads one after the other, or those of one head after those of another.
        for by_head, more in itertools.product((False, True), (others, []) if others else ([],)):
            cuts = [
                Cut(names[id(t)], axis, np.arange(t.shape[axis]) // (dim * (times if by_head else 1)) % heads)
                for t, axis, times in held
            ]
            cuts += [Cut(names[id(t)], axis, np.arange(size := t.shape[axis]) // (size // heads)) for t, axis in more]
            group = Group(writers=(*makers, output), cuts=tuple(cuts), units=heads, channels=width)
            yield _Attention(path, output, group)


_PRODUCTS = re.compile("convolution|mm|linear|dotproduct|attention|embedding|^mv|^dot|lstm|gru|rnn")
"""Of autograd's operations, in lower case, those with weights or as attention: none is on the way past a block."""
_MIXING = re.compile("bmm|dotproduct|softmax")


def _residual_blocks(network: nn.Module, course: _Course) -> list[str]:
    """Paths of the outermost modules that add something to their input and keep its shape.

    Only those in a list or sequence, or beside another one of their class, count: not an encoder with all its blocks.
    A stage of blocks adds to its input too, but only by way of its blocks, and is none.
    """
    found: dict[str, Any] = {}
    for path in sorted(course.calls, key=lambda path: -path.count(".")):
        call = course.calls[path]
        if not path or call.given is None or call.made is None or call.given.shape != call.made.shape:
            continue
        module, holder = network.get_submodule(path), network.get_submodule(path.rpartition(".")[0])
        alike = [other for other in holder.children() if type(other) is type(module)]
        if len(alike) < 2 and not isinstance(holder, (nn.ModuleList, nn.Sequential)):
            continue
        if not any(isinstance(other, _LAYERS) for other in module.modules()):
            continue
        if _adds_to(call.before, call.after, {node for other, node in found.items() if _is_inside(other, path)}):
            found[path] = call.after
    return [path for path in course.calls if path in found and not any(_is_inside(path, other) for other in found)]


def _adds_to(before: Any, after: Any, closed: set[Any]) -> bool:
    """Whether a way leads back from one node to another through an addition, but no product nor closed node."""
    queue, seen = [(after, False)], set()
    while queue:
        node, added = queue.pop()
        if node is None or (node, added) in seen or node in closed:
            continue
        seen.add((node, added))
        if node is before:
            if added:
                return True
            continue
        name = node.name().lower()
        if _PRODUCTS.search(name):
            continue
        ways = [way for way, _ in node.next_functions if way is not None]
        added = added or (name.startswith(("add", "sub")) and len(ways) > 1)
        queue += [(way, added) for way in ways]
    return False


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict((*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)))


class _Finder:
    """The sites of one network, kind after kind.

    Args:
        network: to be followed, with gradients for its weights.
        example: one input.
        course: how it runs on that.
        domains: kind -> choices.
    """

    def __init__(
        self, network: nn.Module, example: Tensor, course: _Course, domains: Mapping[str, Sequence[Choice]]
    ) -> None:
        self._network, self._example, self._course, self._domains = network, example, course, domains
        self._parameters = dict(network.named_parameters())
        self._names = names_of_tensors(network)
        self._refused: dict[str, str] = {}
        self._covered: set[str] = set()
        self._guesses = _attentions(network, course, self._refused if "heads" in domains else {})
        self._attentions = [guesses[0] for guesses in self._guesses]

    def structure(self) -> Structure:
        sites: dict[str, list[Site]] = {kind: [] for kind in self._domains}
        if {"channels", "mlp", "embedding", "heads"} & set(self._domains):
            trials = Trials(self._network, self._example)
            self._add_heads(sites, trials)
            self._add_widths(sites, trials)
        self._add_blocks(sites)
        found = tuple(site for kind in self._domains for site in sites[kind])
        return Structure(found, dict(self._left_alone()))

    def _add_widths(self, sites: dict[str, list[Site]], trials: Trials) -> None:
        groups: dict[str, list[Group]] = {kind: [] for kind in ("channels", "mlp", "embedding") if kind in sites}
        if not groups:
            return
        for group in find_groups(self._network, self._example, list(self._course.calls)):
            kind = self._kind(group)
            if kind in groups and group.problem:
                self._refuse(group, group.problem)
            elif kind in groups:
                groups[kind].append(group)
        together = [group for of_kind in groups.values() for group in of_kind]
        wrong = trials.misaligned(together)
        for group in wrong:
            self._refuse(group, "cannot be followed through all operations on their way")
        fixed = trials.uncuttable([g for kind in groups if kind != "embedding" for g in groups[kind] if g not in wrong])
        for group in fixed:
            self._refuse(group, "cannot be fewer: the network fails without one of them")
        for kind, of_kind in groups.items():
            for group in of_kind:
                if group not in wrong and group not in fixed:
                    sites[kind].append(self._width_site(kind, group))

    def _kind(self, group: Group) -> str | None:
        """Of a group of channels; None where only whole heads can be cut."""
        writers = set(group.writers)
        if any(writers & set(self._owners(a.group)) - {a.output} for a in self._attentions):
            return None
        kind = "channels"
        if any(attention.output in writers for attention in self._attentions):
            kind = "embedding"
        elif self._is_hidden(group):
            kind = "mlp"
        return kind if kind in self._domains else "channels"

    def _is_hidden(self, group: Group) -> bool:
        ends = [*group.writers, *group.readers]
        return (
            len(group.readers) == 1
            and len({path.rpartition(".")[0] for path in ends}) == 1
            and all(isinstance(self._network.get_submodule(path), nn.Linear) for path in ends)
            and not any(_MIXING.search(name.lower()) for name in group.operations)
        )

    def _width_site(self, kind: str, group: Group) -> Site:
        if kind == "channels":
            members = group.writers
            self._covered |= {name for path in members for name in self._own_weights(path).values()}
            facts = {"channels": group.channels, "step": group.channels // group.units}
        else:
            members = self._owners(group)
            self._covered |= {cut.tensor for cut in group.cuts}
            facts = {"width": group.channels}
        return self._site(kind, group.writers[0], members, **facts, params=group.params(self._parameters))

    def _add_heads(self, sites: dict[str, list[Site]], trials: Trials) -> None:
        wrong = trials.misaligned([attention.group for attention in self._attentions])
        for i, (attention, *others) in enumerate(self._guesses):
            if attention.group in wrong:
                right = (other for other in others if not trials.misaligned([other.group]))
                attention = self._attentions[i] = next(right, attention)
            group = attention.group
            if "heads" not in sites:
                continue
            if group.units == 1:
                self._refused[attention.path] = "has one head"
            elif group in wrong:
                self._refused[attention.path] = "its heads cannot be told apart: they do not change places unnoticed"
            else:
                self._covered |= {cut.tensor for cut in group.cuts}
                facts = {"heads": group.units, "head_dim": attention.head_dim, "params": group.params(self._parameters)}
                sites["heads"].append(self._site("heads", attention.path, self._owners(group), **facts))

    def _add_blocks(self, sites: dict[str, list[Site]]) -> None:
        if not {"blocks", "tokens"} & set(sites):
            return
        prefix = getattr(self._network, "num_prefix_tokens", 0)
        for path in _residual_blocks(self._network, self._course):
            inside = {self._names[id(p)] for p in self._network.get_submodule(path).parameters()}
            if "blocks" in sites:
                params = sum(self._parameters[name].numel() for name in inside)
                sites["blocks"].append(self._site("blocks", path, (path,), params=params))
                self._covered |= inside
            given = self._course.calls[path].given
            attentions = [a.path for a in self._attentions if a.path == path or _is_inside(a.path, path)]
            if "tokens" in sites and attentions and given is not None and given.ndim == 3:
                first = self._network.get_submodule(attentions[0])
                tokens = given.shape[1 if getattr(first, "batch_first", True) else 0]
                sites["tokens"].append(self._site("tokens", path, (path,), tokens=tokens, prefix=prefix))
                self._covered |= inside

    def _site(self, kind: str, module: str, members: tuple[str, ...], **facts: float) -> Site:
        domain = tuple(self._domains[kind])
        return Site(id=f"{module}:{kind}", kind=kind, domain=domain, module=module, members=members, facts=facts)

    def _owners(self, group: Group) -> tuple[str, ...]:
        """Paths of the modules that hold a group's tensors, without the network itself."""
        cut = {cut.tensor for cut in group.cuts}
        held = {path: _own_tensors(module) for path, module in self._network.named_modules() if path}
        return tuple(path for path, own in held.items() if any(self._names[id(t)] in cut for t in own.values()))

    def _own_weights(self, path: str) -> dict[str, str]:
        """Of a module's own parameters of two axes and more: name in it -> name in the network."""
        own = self._network.get_submodule(path).named_parameters(recurse=False)
        return {name: self._names[id(parameter)] for name, parameter in own if parameter.ndim >= 2}

    def _refuse(self, group: Group, problem: str) -> None:
        for path in group.writers:
            self._refused.setdefault(path, f"its channels {problem}")

    def _left_alone(self) -> Iterator[tuple[str, str]]:
        for path, _ in self._network.named_modules():
            own = [name for name, named in self._own_weights(path).items() if named not in self._covered]
            for name in own[:1] if path else own:
                yield path or name, self._reason(path)

    def _reason(self, path: str) -> str:
        around = [a.path for a in self._attentions if a.path == path or _is_inside(path, a.path)]
        if path in self._refused:
            return self._refused[path]
        if around and "heads" not in self._domains:
            return "belongs to an attention, of which the kind heads says what can be cut"
        for other, reason in self._refused.items():
            if _is_inside(path, other):
                return reason
        if path not in self._course.calls and not around:
            return "is never run"
        return f"no site of the kinds asked for ({', '.join(self._domains)}) covers it"
