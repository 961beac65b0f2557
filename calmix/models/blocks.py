"""Find the decoder blocks of a model and the weights in them, by structure.

There is no list of models; names tell only towers, routers and parts of experts apart. The decoder
is the list of modules that holds most of the weights, and what can be pruned in a block are its
linear maps. Experts are linear maps too, each a slice of a parameter that holds all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from calmix.errors import InputError, ModelError

EXPERTS = "experts"  # the name of the list of experts, in every model that has one
ROUTERS = ("router", "gate", "wg")  # names of the linear maps that choose experts
CHOSEN = (  # what configurations call the number of experts a token is sent to
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k",
)  # fmt: skip
DOWN = re.compile(r"down|w2|out")  # names of the last linear map of an expert
TOWERS = re.compile(r"vision|visual|image|audio|speech")  # names of parts beside a decoder
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map, as GPT-2's Conv1D is, whose weight is transposed."""
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return conv1d or isinstance(module, nn.Linear)


@dataclass(frozen=True)
class Prunable:
    """A linear map in a block, seen as a matrix of shape (rows = outputs, columns = inputs)."""

    name: str  # qualified; with `.weight` that of the parameter, but for slices of one
    module: Any  # holds the parameter
    parameter: str = "weight"  # its name in the module
    transposed: bool = False  # the parameter is stored as (inputs, outputs)
    mixture: str | None = None  # qualified name of the module within which tokens are routed
    expert: int | None = None  # the parameter holds all experts along its first dimension
    rows: slice = field(default_factory=lambda: slice(None))  # gate and up may lie in one

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.view().shape
        return rows, columns

    @property
    def parameter_name(self) -> str:
        """Qualified name of the parameter, of which this may be a part."""
        return f"{self.mixture or self.name}.{self.parameter}"

    @property
    def parameter_id(self) -> int:
        """Identity of the parameter."""
        return id(self.module._parameters[self.parameter])

    @property
    def whole_matrix(self) -> bool:
        """Whether the parameter is this matrix, as it lies."""
        return not self.transposed and self.expert is None and self.rows == slice(None)

    def whole(self) -> Tensor:
        """Return the module's own parameter, of which this may be a part."""
        weight: Tensor = self.module._parameters[self.parameter].data
        return weight

    def view(self) -> Tensor:
        """Return the module's own weight, seen as (rows, columns)."""
        weight = self.whole() if self.expert is None else self.whole()[self.expert]
        return (weight.T if self.transposed else weight)[self.rows]

    def assign(self, matrix: Tensor) -> None:
        """Write a (rows, columns) matrix into the module, in the module's own dtype."""
        self.view().copy_(matrix)


@dataclass(frozen=True)
class Dense:
    """A weight of a block that stays as it is, how many values it has, and why."""

    name: str
    weights: int
    reason: str


@dataclass(frozen=True)
class Mixture:
    """Experts that share a router: parameters of shape (experts, ...) hold all of them."""

    name: str  # qualified name of the module within which tokens are routed
    module: Any  # that module; it is called once a pass
    count: int
    layers: Sequence[Prunable]


@dataclass(frozen=True)
class DecoderBlocks:
    """The decoder blocks of a model, in order, with the qualified name of their list.

    `only` and `skip` are patterns of layers' names, as `select` takes them.
    """

    name: str
    blocks: Any
    width: int | None = None  # of the residual stream, if the configuration has it
    shared: frozenset[int] = frozenset()  # ids of parameters that are also used elsewhere
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block's weights."""
        return [sum(p.nbytes for p in block.parameters()) for block in self.blocks]

    def prunables(self, index: int, *, every: bool = False) -> list[Prunable]:
        """Return the linear maps of block `index`; `every`: those too that `select` left out.

        Routers, gates of shared experts and what other parts of the model use too are left out.
        """
        layers = self._layers(index)[0]
        return layers if every else [layer for layer in layers if self._wanted(layer.name)]

    @property
    def layers(self) -> list[Prunable]:
        """The linear maps to prune, of all blocks."""
        return [layer for index in range(len(self)) for layer in self.prunables(index)]

    def dense(self, index: int) -> list[Dense]:
        """Return the other weights of block `index`, vectors excepted."""
        layers, dense = self._layers(index)
        left = [layer for layer in layers if not self._wanted(layer.name)]
        return [*dense, *(Dense(layer.name, layer.view().numel(), "skipped") for layer in left)]

    def select(self, only: Sequence[str] = (), skip: Sequence[str] = ()) -> DecoderBlocks:
        """Return the same blocks with the linear maps to prune chosen by name.

        A pattern is `*.mlp.*`, or `re:` and an expression that is searched for. What no pattern of
        `only` (if there are any) or one of `skip` matches stays dense. Raises InputError: a pattern
        matches no layer or is not an expression, or nothing is left.
        """
        names = [layer.name for i in range(len(self)) for layer in self.prunables(i, every=True)]
        for option, patterns in (("only", only), ("skip", skip)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in names):
                    raise InputError(f"--{option} '{pattern}' matches no layer, such as {names[0]}")
        chosen = replace(self, only=tuple(only), skip=tuple(skip))
        if not any(chosen._wanted(name) for name in names):
            raise InputError("--only and --skip leave no layer to prune")
        return chosen

    def _wanted(self, name: str) -> bool:
        chosen = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return chosen and not any(_matches(name, pattern) for pattern in self.skip)

    def mixtures(self, index: int) -> list[Mixture]:
        """Return the mixtures of experts in block `index`; a ModelError where experts are modules
        of their own."""
        prefix, found = f"{self.name}.{index}", []
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == EXPERTS:
                raise ModelError(
                    f"the experts in {prefix}.{name} are modules of their own: open the model by "
                    "the code of transformers, which keeps all experts in one parameter"
                )
            if mixture := _mixture(f"{prefix}.{name}", module, self.width):
                found.append(mixture)
        return found

    def _layers(self, index: int) -> tuple[list[Prunable], list[Dense]]:
        block, prefix, mixtures = self.blocks[index], f"{self.name}.{index}", self.mixtures(index)
        layers: list[Prunable] = []
        beside = set()  # weights of linear maps within a mixture
        by_name = {mixture.name: mixture for mixture in mixtures}
        for name, module in block.named_modules():
            path = f"{prefix}.{name}"
            if _is_linear(module):
                weight = module.weight
                if any(path.startswith(f"{mixture.name}.") for mixture in mixtures):
                    beside.add(id(weight))
                elif not _routes(path, weight, mixtures):
                    if weight.dtype not in FLOATS:
                        raise ModelError(
                            f"weight {path}.weight is {weight.dtype}: only floats can be pruned"
                        )
                    transposed = not isinstance(module, nn.Linear)
                    layers.append(Prunable(path, module, transposed=transposed))
            elif mixture := by_name.get(path):
                layers += mixture.layers
        layers = [layer for layer in layers if layer.parameter_id not in self.shared]
        taken, dense = {layer.parameter_id for layer in layers}, []
        for name, p in block.named_parameters():
            vector = p.ndim < 2 or p.numel() == max(p.shape) or name.endswith("bias")
            if id(p) in taken or vector:
                continue
            path, reason = f"{prefix}.{name}", "no linear map"
            if id(p) in self.shared:
                reason = "used elsewhere too"
            elif p.ndim == 2 and _routes(path.rpartition(".")[0], p, mixtures):
                reason = "router"
            elif id(p) in beside:
                reason = "beside experts"
            dense.append(Dense(path, p.numel(), reason))
        return layers, dense


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise InputError(f"'{pattern}' is not a regular expression: {error}") from error


def _routes(path: str, weight: Tensor, mixtures: list[Mixture]) -> bool:
    """Whether a linear map chooses experts, or how much of a shared one is taken."""
    for mixture in mixtures:
        owner = mixture.name.rpartition(".")[0]
        inside = path.removeprefix(f"{owner}.").split(".")
        if not path.startswith(f"{owner}.") or inside[0] == EXPERTS:
            continue
        if any(part.endswith("router") or part in ROUTERS for part in inside):
            return True
        if len(inside) == 1 and weight.shape[0] in (1, mixture.count):
            return True
    return False


def _mixture(path: str, module: nn.Module, width: int | None) -> Mixture | None:
    """Return the experts that a module's own parameters hold; None where they hold none.

    The name of the module or of an attribute has "expert" in it. Experts map from the input's width
    to that of the neurons (or twice that: gate and up in one) and back, which shows whether they
    are stored transposed; where both fit, the module's own flag or the model's width decides.
    """
    own = {
        name: tuple(p.shape)
        for name, p in module._parameters.items()
        if p is not None and p.ndim == 3 and p.dtype in FLOATS
    }
    words = [type(module).__name__, *vars(module)]
    if len(own) < 2 or not any("expert" in word.lower() for word in words):
        return None
    down = next((name for name in own if DOWN.search(name)), list(own)[-1])
    stated = getattr(module, "is_transposed", None)
    found = []
    for transposed in (False, True) if stated is None else (bool(stated),):
        sides = {n: s[:0:-1] if transposed else s[1:] for n, s in own.items()}  # (outputs, inputs)
        back, neurons = sides.pop(down)
        ups = set(sides.values())
        if len(ups) == 1 and (up := ups.pop())[1] == back and up[0] in (neurons, 2 * neurons):
            found.append((back == width, transposed, neurons if up[0] != neurons else None))
    if not found:
        return None
    _, transposed, half = max(found, key=lambda one: one[0])
    count = min(shape[0] for shape in own.values())
    layers = [
        Prunable(f"{path}.{expert}.{part}", module, name, transposed, path, expert, rows)
        for name in own
        for expert in range(count)
        for part, rows in _parts(module, name, None if name == down else half).items()
    ]
    return Mixture(path, module, count, layers)


def _parts(module: nn.Module, name: str, half: int | None) -> Mapping[str, slice]:
    """Return the outputs of gate and up where they lie in one parameter, by name of the layer."""
    if half is None:
        return {name: slice(None)}
    if "gate_up" in name:
        gate, up = name.replace("gate_up", "gate"), name.replace("gate_up", "up")
    else:
        gate, up = f"{name}.gate", f"{name}.up"
    if not getattr(module, "is_concatenated", True):
        return {gate: slice(0, None, 2), up: slice(1, None, 2)}
    return {gate: slice(0, half), up: slice(half, None)}


def experts_per_token(config: Any) -> int:
    """Return how many experts a token is sent to, 1 where a configuration does not say."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, key, None) for key in CHOSEN)
    return next((value for value in values if isinstance(value, int)), 1)


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """Return the decoder blocks: the outermost `ModuleList` with the most in linear maps.

    Raises ModelError: there is no such list with a linear map of floats.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = module
    # Towers for images or sound beside the decoder have blocks too.
    lists = {n: one for n, one in lists.items() if not TOWERS.search(n)} or lists

    def size(name: str) -> int:
        linears: list[Any] = [module for module in lists[name].modules() if _is_linear(module)]
        experts = (p for p in lists[name].parameters() if p.ndim >= 3)
        return sum(weight.numel() for weight in (*(one.weight for one in linears), *experts))

    name = max(lists, key=size, default="")
    used = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    config: Any = getattr(model, "config", None)
    width = config and config.get_text_config(decoder=True).to_dict().get("hidden_size")
    found = DecoderBlocks(
        name, lists.get(name, ()), width if isinstance(width, int) else None,
        frozenset(key for key, times in used.items() if times > 1),
    )  # fmt: skip
    if not any(found.prunables(index) for index in range(len(found))):
        kind = type(model).__name__
        raise ModelError(f"{kind} has no list of decoder blocks with linear maps to prune")
    return found


def decoder_of(model: Any) -> Any:
    """Return the decoder of a causal language model: all but what makes logits of its output."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Some call their output head a decoder.
    if decoder is None or decoder is model or not hasattr(decoder, "get_input_embeddings"):
        decoder = model.base_model
    if decoder is model:  # its name for it is not where it is
        embeddings = model.get_input_embeddings()
        inside = (child for child in model.children() if embeddings in child.modules())
        decoder = next(inside, model)
    return decoder


@contextmanager
def forwards(pairs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the forward of modules for a while."""
    with ExitStack() as stack:
        for module, forward in pairs:
            stack.enter_context(patch.object(module, "forward", forward))
        yield


def outer_weights(model: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the weights of a model's output head and of its embeddings; often the same."""
    head, embedded = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no output head: leave out --embeddings")
    return head.weight, embedded.weight


def tied(model: Any) -> bool:
    """Whether a model's output head is its embeddings, once it has its weights."""
    head, embedded = model.get_output_embeddings(), model.get_input_embeddings()
    names = [f"{name}.weight" for name, one in model.named_modules() if one in (head, embedded)]
    alike = getattr(head, "weight", None) is embedded.weight
    return alike or not getattr(model, "all_tied_weights_keys", {}).keys().isdisjoint(names)
