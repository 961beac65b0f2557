"""A simulated device: operations run on tensors without data, and are counted.

PyTorch's FakeTensorMode follows types, shapes and devices through every operation, so a CPU build
can run what a GPU would. Reads by the host are answered here: each would make a real host wait.
"""

from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {"_local_scalar_dense", "nonzero", "equal"}
SELECTS = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_", "_copy_from"}


class Traced(TorchDispatchMode):
    """Counts by name what the host reads (and waits for) and all operations on the device, and by
    (from, to) the tensors that are copied."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()
        self.copies = Counter()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = any(tensor.device.type != "cpu" for tensor in given)
        chosen = name in SELECTS and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if (name in READS or chosen) and away:
            self.reads[name] += 1
        if name == "_local_scalar_dense":
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        if name == "equal":
            return True
        if name == "nonzero":  # as if all were chosen
            return args[0].new_zeros((args[0].numel(), args[0].ndim), dtype=torch.int64)
        if name == "where" and len(args) == 1:  # the same, a tensor for each dimension
            self.reads[name] += away
            return [args[0].new_zeros(args[0].numel(), dtype=torch.int64) for _ in args[0].shape]
        if func.overloadpacket is aten.scaled_dot_product_attention:
            found = _attended(*args, **kwargs)
        elif "out" in kwargs and isinstance(kwargs["out"], Tensor):
            found = _into(func, args, kwargs)
        else:
            found = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        if any(t.device.type == "mps" and t.dtype == torch.float64 for t in made):
            raise TypeError(f"{name}: the MPS framework doesn't support float64")
        if name in COPIES:
            ends = args[1 if name == "copy_" else 0].device.type, made[0].device.type
            if ends[0] != ends[1]:
                self.copies[ends] += 1
        if any(t.device.type != "cpu" for t in (*given, *made)):
            self.operations[name] += 1
        return found

    def listed(self, value):
        """Return what `tolist` might."""
        if value.device.type != "cpu":
            self.reads["tolist"] += 1
        fill = {torch.bool: True, torch.int64: 1}.get(value.dtype, 1.0)

        def filled(shape):
            return [filled(shape[1:]) for _ in range(shape[0])] if shape else fill

        return filled(tuple(value.shape))


def _into(func, args, kwargs):
    """Run an operation that writes into `out`: what it would return has to fit."""
    rest = dict(kwargs)
    out = rest.pop("out")
    if func is aten.addmm.dtype_out:  # PyTorch 2.9 does not follow products of a wider type
        args = tuple(value.to(args[3]) for value in args[:3])
    made = func.overloadpacket(*args, **rest)
    assert (made.shape, made.dtype, made.device) == (out.shape, out.dtype, out.device), func
    return out


def _attended(*args, **kwargs):
    """Attend without a choice of kernel, for which a CUDA build asks the driver."""
    return aten._scaled_dot_product_attention_math(*args, **kwargs)[0]


CONVERSIONS = {
    Tensor.to: (),
    Tensor.cpu: (torch.device("cpu"),),
    Tensor.float: (torch.float32,),
    Tensor.double: (torch.float64,),
    Tensor.half: (torch.float16,),
    Tensor.bfloat16: (torch.bfloat16,),
    Tensor.int: (torch.int32,),
    Tensor.long: (torch.int64,),
    Tensor.bool: (torch.bool,),
}
PLAIN = {
    Tensor.copy_: aten.copy_,
    Tensor.contiguous: aten.contiguous,
    Tensor.__invert__: aten.bitwise_not,
    Tensor.nonzero: aten.nonzero,
    Tensor.item: aten._local_scalar_dense,
    Tensor.__bool__: lambda value: bool(aten._local_scalar_dense(value)),
    Tensor.__int__: lambda value: int(aten._local_scalar_dense(value)),
    Tensor.__index__: lambda value: int(aten._local_scalar_dense(value)),
    Tensor.__float__: lambda value: float(aten._local_scalar_dense(value)),
}


class _Python(TorchFunctionMode):
    """Answers indexing and conversions before the dispatcher hears of them: PyTorch would switch to
    the tensor's device, which a CPU build cannot."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            view, chosen = _viewed(*args)
            return aten.index(view, chosen) if chosen else view
        if func is Tensor.__setitem__:
            view, chosen = _viewed(*args[:2])
            value = args[2]
            if not isinstance(value, Tensor):
                value = torch.full((), value, dtype=view.dtype, device=view.device)
            return aten.index_put_(view, chosen, value) if chosen else aten.copy_(view, value)
        attends = func is nn.functional.scaled_dot_product_attention
        if attends and not torch.is_inference_mode_enabled():
            return _attended(*args, **kwargs)
        if func in PLAIN:
            return PLAIN[func](*args, **kwargs)
        if func in CONVERSIONS:
            return _converted(*args, *CONVERSIONS[func], **kwargs)
        return func(*args, **kwargs)


def _converted(tensor, *to, copy=False, **options):
    """Do what `Tensor.to` does."""
    options = {k: v for k, v in options.items() if v is not None}
    for value in to:
        if isinstance(value, torch.dtype):
            options["dtype"] = value
        elif isinstance(value, Tensor):
            options |= {"dtype": value.dtype, "device": value.device}
        elif isinstance(value, str | torch.device):
            options["device"] = value
    if "device" in options:
        options["device"] = torch.empty(0, device=options["device"]).device
    same = options.get("dtype", tensor.dtype) == tensor.dtype
    same &= options.get("device", tensor.device) == tensor.device
    if same and not copy:
        return tensor
    if options.get("device", tensor.device) != tensor.device and not isinstance(tensor, FakeTensor):
        tensor = torch.empty_like(tensor)  # real numbers would go to the real device
    return aten._to_copy(tensor, **options)


def _viewed(tensor, key):
    """Apply the numbers, slices and new axes of an index; return the tensors that remain in it."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if k is Ellipsis]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        taken = sum(k.ndim if _is_mask(k) else k is not None for k in keys) - 1
        keys[at : at + 1] = [slice(None)] * (tensor.ndim - taken)
    chosen, axis = [], 0
    for k in keys:
        if k is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(k, slice):
            tensor = aten.slice(tensor, axis, k.start, k.stop, k.step or 1)
        elif isinstance(k, int) and not isinstance(k, bool):
            tensor = tensor.select(axis, k)
            continue
        else:
            index = k if isinstance(k, Tensor) else torch.tensor(k, device="cpu")
            chosen += [None] * (axis - len(chosen)) + [index]
            axis += index.ndim if _is_mask(index) else 1
            continue
        axis += 1
    return tensor, chosen


def _is_mask(key):
    return isinstance(key, Tensor) and key.dtype == torch.bool


@contextmanager
def tracing(device="cuda"):
    """Make tensors fake, new ones on this device, and count the operations on them."""
    traced = Traced()
    with (
        mock.patch.object(FakeTensor, "tolist", lambda value: traced.listed(value)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        FakeTensorMode(allow_non_fake_inputs=True),
        traced,
        _Python(),
        torch.device(device),
    ):
        yield traced


def empty_model(config, device="cuda", change=lambda model: None):
    """Return a causal language model without data; `change` replaces some of its modules."""
    from transformers import AutoModelForCausalLM

    with _disable_current_modes(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        change(model)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                made = torch.empty_like(weight, device=device)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    model.tie_weights()
    return model.eval()
