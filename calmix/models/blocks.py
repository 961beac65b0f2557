"""Find the decoder blocks of a model and the weights in them, by structure.

There is no list of supported models; names only identify towers, routers and parts of experts. The
decoder is the module list with most of the weights, and the prunable weights of a block are its
linear layers. Experts count as linear layers, each a slice of a parameter that holds all of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from calmix.errors import InputError, ModelError

EXPERTS = "experts"  # the name of the list of experts in every model that has one
ROUTERS = ("router", "gate", "wg")  # names of the linear layers that choose experts
CHOSEN = (  # configuration keys for the number of experts per token
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
)
DOWN = re.compile(r"down|w2|out")  # names of the last linear layer of an expert
TOWERS = re.compile(r"vision|visual|image|audio|speech")  # names of parts beside the decoder
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, including GPT-2's Conv1D with its transposed weight."""
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return conv1d or isinstance(module, nn.Linear)


@dataclass(frozen=True)
class Prunable:
    """A linear layer in a block, seen as a matrix of shape (rows = outputs, columns = inputs)."""

    name: str  # qualified; `name.weight` is the parameter, except for slices
    module: Any  # holds the parameter
    parameter: str = "weight"  # its name in the module
    transposed: bool = False  # the parameter is stored as (inputs, outputs)
    mixture: str | None = None  # qualified name of the module that sends tokens to its experts
    expert: int | None = None  # index in the parameter's first dimension, over all experts
    rows: slice = field(default_factory=lambda: slice(None))  # gate and up can share a parameter

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.view().shape
        return rows, columns

    @property
    def parameter_name(self) -> str:
        """Qualified name of the parameter, of which this can be a slice."""
        return f"{self.mixture or self.name}.{self.parameter}"

    @property
    def whole_matrix(self) -> bool:
        """Whether the parameter is exactly this matrix, as stored."""
        return not self.transposed and self.expert is None and self.rows == slice(None)

    def whole(self) -> Tensor:
        """Return the whole parameter, of which this can be a slice."""
        return self.module._parameters[self.parameter].data

    def view(self) -> Tensor:
        """Return the weight in the module as a view (rows, columns)."""
        weight = self.whole() if self.expert is None else self.whole()[self.expert]
        return (weight.T if self.transposed else weight)[self.rows]


@dataclass(frozen=True)
class Dense:
    """A weight of a block that is not pruned, its number of values, and the reason."""

    name: str
    weights: int
    reason: str


@dataclass(frozen=True)
class Mixture:
    """Experts that share a router, in parameters of shape (experts, ...)."""

    name: str  # qualified name of the module that sends tokens to its experts
    module: Any  # that module; it is called once per pass
    count: int
    layers: Sequence[Prunable]


@dataclass(frozen=True)
class DecoderBlocks:
    """The decoder blocks of a model, in order, with the qualified name of their list.

    `only` and `skip` are patterns of layer names, as in `select`.
    """

    name: str
    blocks: Any
    width: int | None = None  # of the residual stream, if the configuration gives it
    shared: frozenset[str] = frozenset()  # names of parameters that are also used elsewhere
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def sizes(self) -> list[int]:
        """The bytes of each block's weights."""
        return [sum(p.nbytes for p in block.parameters()) for block in self.blocks]

    def prunables(self, index: int, *, every: bool = False) -> list[Prunable]:
        """Return the linear layers of block `index`; with `every`, also those `select` left out.

        Routers, gates of shared experts and weights used elsewhere too are not among them.
        """
        layers = self._layers(index)[0]
        return layers if every else [layer for layer in layers if self._wanted(layer.name)]

    @property
    def layers(self) -> list[Prunable]:
        """The linear layers to prune in all blocks."""
        return [layer for index in range(len(self)) for layer in self.prunables(index)]

    def dense(self, index: int) -> list[Dense]:
        """Return the other weights of block `index`, except vectors."""
        layers, dense = self._layers(index)
        left = [layer for layer in layers if not self._wanted(layer.name)]
        return [*dense, *(Dense(layer.name, layer.view().numel(), "skipped") for layer in left)]

    def select(self, only: Sequence[str] = (), skip: Sequence[str] = ()) -> DecoderBlocks:
        """Return the same blocks with the linear layers to prune chosen by name.

        A pattern is a glob such as `*.mlp.*`, or `re:` and a regular expression to search for. A
        layer stays dense if it matches no pattern of `only` (if there are any) or one of `skip`.
        Raises InputError if a pattern is invalid or matches no layer, or if no layer is left.
        """
        names = [layer.name for i in range(len(self)) for layer in self.prunables(i, every=True)]
        for option, patterns in (("only", only), ("skip", skip)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in names):
                    line = f"--{option} '{pattern}' matches no layer: names are like {names[0]}"
                    raise InputError(line)
        selection = replace(self, only=tuple(only), skip=tuple(skip))
        if not any(selection._wanted(name) for name in names):
            raise InputError("--only and --skip leave no layer to prune")
        return selection

    def _wanted(self, name: str) -> bool:
        included = not self.only or any(_matches(name, pattern) for pattern in self.only)
        return included and not any(_matches(name, pattern) for pattern in self.skip)

    def mixtures(self, index: int) -> list[Mixture]:
        """Return the mixtures of experts in block `index`; ModelError if the experts are separate
        modules."""
        prefix, mixtures = f"{self.name}.{index}", []
        for name, module in self.blocks[index].named_modules():
            if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == EXPERTS:
                raise ModelError(
                    f"the experts in {prefix}.{name} are separate modules: open the model with "
                    "transformers' own code, which keeps all experts in one parameter"
                )
            if mixture := _mixture(f"{prefix}.{name}", module, self.width):
                mixtures.append(mixture)
        return mixtures

    def _layers(self, index: int) -> tuple[list[Prunable], list[Dense]]:
        block, prefix = self.blocks[index], f"{self.name}.{index}"
        mixtures = self.mixtures(index)
        experts: dict[str, list[Prunable]] = {}  # by parameter
        for layer in (layer for mixture in mixtures for layer in mixture.layers):
            experts.setdefault(layer.parameter_name, []).append(layer)
        layers: list[Prunable] = []
        dense: list[Dense] = []
        for path, p in block.named_parameters(prefix):
            owner, _, name = path.rpartition(".")
            module = block.get_submodule(owner.removeprefix(prefix).removeprefix("."))
            linear = name == "weight" and _is_linear(module)
            reason = "no linear map"
            if path in self.shared:
                reason = "used elsewhere too"
            elif path in experts:
                layers += experts[path]
                continue
            elif p.ndim == 2 and _routes(owner, p, mixtures):
                reason = "router"
            elif linear and any(owner.startswith(f"{mixture.name}.") for mixture in mixtures):
                reason = "beside experts"
            elif linear:
                if p.dtype not in FLOATS:
                    raise ModelError(f"weight {path} is {p.dtype}: only floats can be pruned")
                layers.append(Prunable(owner, module, transposed=not isinstance(module, nn.Linear)))
                continue
            if p.ndim > 1 and p.numel() > max(p.shape) and not name.endswith("bias"):
                dense.append(Dense(path, p.numel(), reason))
        return layers, dense


def _matches(name: str, pattern: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern.removeprefix("re:"), name) is not None
    except re.error as error:
        raise InputError(f"'{pattern}' is not a regular expression: {error}") from error


def _routes(path: str, weight: Tensor, mixtures: Iterable[Mixture]) -> bool:
    """Whether a linear layer is a router, or the gate of a shared expert."""
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
    """Return the experts in a module's own parameters; None if there are none.

    The name of the module or of an attribute contains "expert". Experts map from the input's width
    to the number of neurons (or twice that, for gate and up in one) and back, which shows whether
    they are stored transposed; if both fit, the module's own flag or the model's width decides.
    """
    shapes = {
        name: tuple(p.shape)
        for name, p in module._parameters.items()
        if p is not None and p.ndim == 3 and p.dtype in FLOATS
    }
    words = [type(module).__name__, *vars(module)]
    if len(shapes) < 2 or not any("expert" in word.lower() for word in words):
        return None
    down = next((name for name in shapes if DOWN.search(name)), list(shapes)[-1])
    stated = getattr(module, "is_transposed", None)
    layouts = []
    for transposed in (False, True) if stated is None else (bool(stated),):
        sides = {
            n: s[:0:-1] if transposed else s[1:] for n, s in shapes.items()
        }  # (outputs, inputs)
        back, neurons = sides.pop(down)
        ups = set(sides.values())
        if len(ups) == 1 and (up := ups.pop())[1] == back and up[0] in (neurons, 2 * neurons):
            layouts.append((back == width, transposed, neurons if up[0] != neurons else None))
    if not layouts:
        return None
    _, transposed, gate_rows = max(layouts, key=lambda one: one[0])
    count = min(shape[0] for shape in shapes.values())
    layers = [
        Prunable(f"{path}.{expert}.{part}", module, name, transposed, path, expert, rows)
        for name in shapes
        for expert in range(count)
        for part, rows in _parts(module, name, None if name == down else gate_rows).items()
    ]
    return Mixture(path, module, count, layers)


def _parts(module: nn.Module, name: str, half: int | None) -> Mapping[str, slice]:
    """Return the rows of each layer in a parameter by name: gate and up can share one."""
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
    """Return how many experts a token is sent to; 1 if the configuration does not say."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, key, None) for key in CHOSEN)
    return next((value for value in values if isinstance(value, int)), 1)


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """Return the decoder blocks: the outermost `ModuleList` with most values in linear layers.

    Raises ModelError if no such list has a linear layer of floats.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists[name] = module
    # Image and audio towers beside the decoder have blocks too.
    lists = {n: one for n, one in lists.items() if not TOWERS.search(n)} or lists
    sizes: dict[str, int] = {}
    for key, one in lists.items():
        linears: list[Any] = [module.weight for module in one.modules() if _is_linear(module)]
        experts = [p for p in one.parameters() if p.ndim >= 3]
        sizes[key] = sum(weight.numel() for weight in (*linears, *experts))
    name = max(sizes, key=sizes.__getitem__, default="")
    named = list(model.named_parameters(remove_duplicate=False))
    used = Counter(id(p) for _, p in named)
    config: Any = getattr(model, "config", None)
    width = config and config.get_text_config(decoder=True).to_dict().get("hidden_size")
    blocks = DecoderBlocks(
        name,
        lists.get(name, ()),
        width if isinstance(width, int) else None,
        frozenset(name for name, p in named if used[id(p)] > 1),
    )
    if not any(blocks.prunables(index) for index in range(len(blocks))):
        kind = type(model).__name__
        raise ModelError(f"{kind} has no list of decoder blocks with linear layers to prune")
    return blocks


def decoder_of(model: Any) -> Any:
    """Return the decoder of a causal language model: all but what computes the logits."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    # Some models call their output head a decoder.
    if decoder is None or decoder is model or not hasattr(decoder, "get_input_embeddings"):
        decoder = model.base_model
    if decoder is model:  # its base_model_prefix names no attribute
        embeddings = model.get_input_embeddings()
        inside = (child for child in model.children() if embeddings in child.modules())
        decoder = next(inside, model)
    return decoder


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode temporarily: no dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def outer_layers(model: Any) -> dict[str, nn.Parameter]:
    """Return the weights of a model's output head and embeddings by the names of their modules;
    one if they are the same once they are loaded."""
    head, embedded = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(head, "weight", None) is None:
        raise ModelError(f"{type(model).__name__} has no output head: leave out --embeddings")
    names = [f"{name}.weight" for name, one in model.named_modules() if one in (head, embedded)]
    same_once_loaded = not getattr(model, "all_tied_weights_keys", {}).keys().isdisjoint(names)
    tied = same_once_loaded or head.weight is embedded.weight
    weights = [embedded.weight] if tied else [head.weight, embedded.weight]
    paths = {id(weight): path for path, weight in model.named_parameters()}
    return {paths[id(weight)].removesuffix(".weight"): weight for weight in weights}


def first_tensor(result: Any) -> Tensor:
    """Return the hidden states in a block's output."""
    return result[0] if isinstance(result, tuple | list) else result
