"""A pretended GPU for a torch without CUDA: tensors that say they lie on cuda:0 and compute on the CPU.

    with pretended_gpu() as seen:
        call(sae_training, ...)         # takes its CUDA branches
    assert not seen.not_contiguous      # see Seen

As torch would with a GPU, it refuses tensors of both devices in one operation (single numbers may be), and host code
that reads a GPU's memory (`numpy`, `data_ptr`, saving to safetensors). It counts, by operation and line, where the CPU
would wait for the GPU, and notes tensors handed to a collective that nccl would refuse.

It cannot see: what a real kernel computes, refuses or costs; attention's choice among kernels; streams and events, so
neither a buffer reused too early nor work that fails to overlap; memory; which device is current in a thread; nccl.
"""

import collections
import contextlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from pipeline.distributed import World

_CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")
# Operations whose result, or its size, must reach the CPU, and how often they wait for it.
_WAITS = {
    **dict.fromkeys(("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), 1),
    **dict.fromkeys(("_unique2", "unique_dim", "unique_consecutive"), 1),
    "bincount": 2,  # for its least and its greatest value
}
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Seen:
    """What happened on the pretended GPU."""

    def __init__(self) -> None:
        self.waits: collections.Counter[str] = collections.Counter()  # where the CPU waits: "operation file:line code"
        self.not_contiguous: list[str] = []  # tensors that nccl would refuse in a collective, by line

    def waited(self, operation: str, times: int = 1) -> None:
        self.waits[f"{operation} {_line()}"] += times

    def n_waits(self) -> int:
        return sum(self.waits.values())


_seen = Seen()  # of the block that is running, in every thread


def _line() -> str:
    """The line of this project that is running."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if not any(part in frame.filename for part in ("site-packages", "lib/python", "<", __file__)):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.line}"
    return "?"


def _is_cuda(device: Any) -> bool:
    # meta: what C++ code that has read a wrapper's device passes on.
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _plain(value: Any) -> Any:
    """The CPU tensor inside a pretended one."""
    return value.held if isinstance(value, GpuTensor) else value


def _pretended(value: Any) -> Any:
    return GpuTensor(value) if isinstance(value, Tensor) and not isinstance(value, GpuTensor) else value


class GpuTensor(Tensor):
    """Holds a CPU tensor and says it is on cuda:0. To torch's C++ code it is a meta tensor: a CPU build has no device
    guard for CUDA. So `torch.Tensor`'s own methods are replaced where C++ would use the missing memory."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> "GpuTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device="meta",
            requires_grad=requires_grad,
        )
        made.held = held if held.is_inference() else held.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: _CUDA)
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"GpuTensor({self.held})"

    def tolist(self) -> Any:
        _seen.waited("tolist")
        return self.held.tolist()

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    numpy = __array__ = _refuse

    def data_ptr(self) -> int:
        raise RuntimeError("host code asks for the address of a GPU's tensor")

    def __setitem__(self, index: Any, value: Any) -> None:  # C++ would make a meta tensor of a number
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if isinstance(part, Tensor):
                if not isinstance(part, GpuTensor) and part.dim():
                    _seen.waited("indices from the CPU")
                if part.dtype == torch.bool and not (isinstance(value, (int, float)) or value.dim() == 0):
                    _seen.waited("bool mask")
        if isinstance(value, Tensor) and not isinstance(value, GpuTensor) and value.dim():
            _seen.waited("copy from the CPU")
        self.held[tuple(map(_plain, parts))] = _plain(value)

    def record_stream(self, stream: Any) -> None:
        pass

    def pin_memory(self) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        _seen.waited("new_tensor from the CPU")
        return GpuTensor(torch.tensor(data, dtype=options.get("dtype", self.dtype)))

    def cpu(self) -> Tensor:
        return self.to("cpu")

    def to(self, *args: Any, **options: Any) -> Tensor:
        return _to(self, *args, **options)

    def __reduce_ex__(self, protocol: int) -> Any:  # torch.save copies to the CPU
        _seen.waited("pickling")
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name == "_has_compatible_shallow_copy_type":  # False: Module.to makes new parameters
            return False
        if name == "_fused_sdp_choice":
            return 0  # the math path; the real choice depends on the GPU
        _check_devices(func, name, args, kwargs)
        _count_waits(func, name, args, kwargs)
        to_cpu = _leaves_the_gpu(kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        if name.startswith(("empty", "new_", "zeros")):
            kwargs.pop("pin_memory", None)
        out = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if to_cpu or name == "_local_scalar_dense":
            return out
        return _wrapped(func, name, args, kwargs, out)


def _check_devices(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError for CPU tensors, but for single numbers, among a GPU's; note allowed copies and indices."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_cpu = [t for t in tensors if not isinstance(t, GpuTensor) and t.dim() > 0]
    if not on_cpu:
        return
    if name == "copy_":
        _seen.waited("copy between devices")
    elif name in _INDEXING and isinstance(args[0], GpuTensor) and not (len(args) > 2 and args[2] in on_cpu):
        _seen.waited("indices from the CPU")
    else:
        shapes = (f"{'cuda' if isinstance(t, GpuTensor) else 'cpu'} {tuple(t.shape)}" for t in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {', '.join(shapes)}")


def _count_waits(func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    if name in _WAITS:
        _seen.waited(name, _WAITS[name])
    elif name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
        _seen.waited(name)
    elif name in _INDEXING:
        for i in args[1]:
            if i is not None and i.dtype in (torch.bool, torch.uint8):
                _seen.waited("bool mask")
    elif name == "_to_copy" and _leaves_the_gpu(kwargs) and not kwargs.get("non_blocking"):
        _seen.waited("to the CPU")


def _leaves_the_gpu(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and not _is_cuda(kwargs["device"])


def _wrapped(func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
    """The operation's results as pretended tensors; those that are its arguments, as the same objects."""
    is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    # A normal tensor's views are normal tensors, in inference mode too.
    stays_normal = is_view and isinstance(args[0], GpuTensor) and not args[0].is_inference()
    with torch.inference_mode(False) if stays_normal else contextlib.nullcontext():
        wrapped = tree_map(_pretended, out)
    if name == "_to_copy":
        return wrapped
    if torch.is_inference_mode_enabled():  # torch cannot relate storages there
        given = zip(args, func._schema.arguments, strict=False)
        changed = [arg for arg, spec in given if spec.alias_info and spec.alias_info.is_write]
        return changed[0] if changed and isinstance(wrapped, GpuTensor) else wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


_torch_to = torch.Tensor.to


def _to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    """Tensor.to, in either direction."""
    dtype, device = options.pop("dtype", None), options.pop("device", None)
    non_blocking = options.pop("non_blocking", False)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor):
            device, dtype = arg.device, arg.dtype
        elif isinstance(arg, bool):
            non_blocking = arg
        elif arg is not None:
            device = arg
    here = isinstance(tensor, GpuTensor)
    there = here if device is None else _is_cuda(device)
    if here and there:
        return tensor if dtype in (None, tensor.dtype) else torch.ops.aten._to_copy(tensor, dtype=dtype)
    if here:
        return torch.ops.aten._to_copy(tensor, device=_CPU, dtype=dtype, non_blocking=non_blocking)
    if not there:
        given = {name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None}
        return _torch_to(tensor, **given, **options)
    if not non_blocking:
        _seen.waited("to the GPU")
    made = GpuTensor(_torch_to(tensor.detach(), dtype=dtype or tensor.dtype).clone())
    return made.requires_grad_(tensor.requires_grad) if tensor.is_leaf and tensor.requires_grad else made


class _Nothing:
    """A stream or an event: every method does nothing."""

    def __init__(self, *args: Any, **options: Any):
        self.device = _CUDA

    def __getattr__(self, name: str) -> Callable[..., "_Nothing"]:
        return lambda *args, **options: _Nothing()


def _factory(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.zeros and its like, on either device."""

    def made(*args: Any, **options: Any) -> Tensor:
        there = _is_cuda(options.get("device")) and torch.device(options["device"]).type != "meta"
        options.pop("pin_memory", None)
        if there:
            options["device"] = _CPU
            if make.__name__ == "tensor":
                _seen.waited("tensor from the CPU")
        out = make(*args, **options)
        return _pretended(out) if there else out

    return made


_torch_load = torch.load


def _load(*args: Any, map_location: Any = None, **options: Any) -> Any:
    there = map_location is not None and _is_cuda(map_location)
    state = _torch_load(*args, map_location="cpu" if there else map_location, **options)
    return tree_map(_pretended, state) if there else state


_all_reduce = World.all_reduce


def _checked_all_reduce(world: World, tensor: Tensor) -> Tensor:
    if not tensor.is_contiguous():
        _seen.not_contiguous.append(f"{tuple(tensor.shape)} with strides {tensor.stride()} at {_line()}")
    return _all_reduce(world, tensor)


_FACTORIES = ("zeros", "ones", "empty", "full", "arange", "tensor", "randn", "rand", "randint", "randperm", "eye")
_CUDA_FUNCTIONS = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "set_device": lambda device: None,
    "current_device": lambda: 0,
    "current_stream": lambda *args: _Nothing(),
    "get_device_capability": lambda *args: (9, 0),
    "synchronize": lambda *args: None,
    "stream": lambda stream: contextlib.nullcontext(),
    "Stream": _Nothing,
    "Event": _Nothing,
    "empty_cache": lambda: None,
}


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Seen]:
    """In this block, in every thread, torch has one GPU."""
    global _seen
    _seen = Seen()
    with contextlib.ExitStack() as patches:
        change = lambda owner, name, value: patches.enter_context(mock.patch.object(owner, name, value, create=True))
        for name in _FACTORIES:
            change(torch, name, _factory(getattr(torch, name)))
        change(torch, "load", _load)
        change(Tensor, "to", _to)
        change(Tensor, "pin_memory", lambda tensor: tensor)
        for name, value in _CUDA_FUNCTIONS.items():
            change(torch.cuda, name, value)
        change(World, "all_reduce", _checked_all_reduce)
        yield _seen
