"""Apple's MPS device without an Apple: its tensors live on the CPU and say `mps`, and what MPS refuses is refused.

Refused are float64 and complex128 on the device, operations on tensors of both devices, generators of the CPU for
numbers on the device, and every operation for which the installed PyTorch has no MPS kernel. Which ones it has is read
from PyTorch's own table of operations. Speed, memory and rounding are those of the CPU.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
import torchgen
import yaml
from torch import __future__ as future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

MPS = torch.device("mps", 0)
REFUSED = (torch.float64, torch.complex128)
#: Keys of kernels that do for any device what they say in terms of other operations.
COMPOSITE = {"CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd"}


class MpsTensor(torch.Tensor):
    """A tensor of the emulated device around one of the CPU, `inner`."""

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype in REFUSED:
            raise TypeError(f"Cannot convert a MPS Tensor to {inner.dtype}: the MPS framework doesn't support it")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=MPS,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # PyTorch's own versions of these ask for the guard of the device, which a build without MPS lacks.

    def contiguous(self, memory_format=torch.contiguous_format):
        return self if self.is_contiguous(memory_format=memory_format) else self.clone(memory_format=memory_format)

    def new_tensor(self, data, *, dtype=None, device=None):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def __getitem__(self, index):
        return MpsTensor(self.inner[tree_map_only(MpsTensor, lambda tensor: tensor.inner, index)])

    def __setitem__(self, index, value):
        index, value = tree_map_only(MpsTensor, lambda tensor: tensor.inner, (index, value))
        self.inner[index] = value

    def nonzero(self, *, as_tuple=False):
        found = torch.ops.aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def tolist(self):
        return self.inner.tolist()

    def item(self):
        return self.inner.item()

    def __float__(self):
        return float(self.inner)

    def __int__(self):
        return int(self.inner)

    def __bool__(self):
        return bool(self.inner)

    def __repr__(self):
        return f"Mps{self.inner!r}"


class EmulatedMps(TorchDispatchMode):
    """Within the block `device="mps"` means the emulated device; `used` has the names of the operations run there."""

    def __init__(self):
        super().__init__()
        self.used = set()

    def __enter__(self):
        self.before = torch._C._only_lift_cpu_tensors(), future.get_overwrite_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) moves what it made, where we see it
        self.attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, self._attend
        future.set_overwrite_module_params_on_conversion(True)  # new parameters where `.data` would not take ours
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before[0])
        F.scaled_dot_product_attention = self.attention
        future.set_overwrite_module_params_on_conversion(self.before[1])
        return super().__exit__(*error)

    def _attend(self, *args, **kwargs):
        """PyTorch chooses the kernel by device before we are asked."""
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, MpsTensor) for x in tensors):
            return self.attention(*args, **kwargs)
        assert all(isinstance(x, MpsTensor) for x in tensors), "attention: expected all tensors on one device"
        args, kwargs = tree_map_only(MpsTensor, lambda tensor: tensor.inner, (args, kwargs))
        return MpsTensor(self.attention(*args, **kwargs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {}, self.used)


def _run(func, args, kwargs, used=None):
    tensors = []
    tree_map_only(torch.Tensor, tensors.append, (args, kwargs))
    there = [tensor for tensor in tensors if isinstance(tensor, MpsTensor)]
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if not there and (target is None or target.type != "mps"):
        return func(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::") + (f".{o}" if (o := func._schema.overload_name) else "")
    moving = name in ("_to_copy", "copy_")
    if there and not moving and name not in ("index.Tensor", "index_put_", "index_put"):
        here = [tensor for tensor in tensors if not isinstance(tensor, MpsTensor) and tensor.ndim]
        assert not here, f"{name}: expected all tensors on one device, got mps and {here[0].device}"
    assert kwargs.get("generator") is None, f"{name}: a generator of the CPU for numbers on mps"
    if not moving:
        assert has_kernel(name), f"{name} is not implemented for MPS"
    if used is not None:
        used.add(name)
    inner_args, inner_kwargs = tree_map_only(MpsTensor, lambda tensor: tensor.inner, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if name == "_to_copy" and target is not None and target.type != "mps":
        return result
    known = {id(tensor.inner): tensor for tensor in there}  # what works in place gives its argument back
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else MpsTensor(x), result)


@functools.cache
def has_kernel(name):
    """Whether the installed PyTorch has the operation `name` for MPS."""
    entry = _operations().get(name)
    if entry is None:  # made by PyTorch from another one
        return True
    delegate = entry.get("structured_delegate")
    keys = {key.strip() for group in entry.get("dispatch", {}) for key in group.split(",")}
    if "MPS" in keys or keys & COMPOSITE:
        return True
    return has_kernel(delegate) if delegate else not keys


@functools.cache
def _operations():
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return {entry["func"].split("(")[0]: entry for entry in yaml.load(path.read_text(), loader)}
