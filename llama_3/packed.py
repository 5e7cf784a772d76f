"""Linear layers for inference on a CPU, their weights in the layout that oneDNN reads fastest."""

import ctypes
import mmap
import threading

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer for inference on a CPU, its weight in the layout that oneDNN reads fastest.

    Decoding is bound by reading weights; rates are in docs/benchmarks.md. The weight is packed at the model's first
    forward pass. It is not a parameter, so it cannot be trained or saved.
    """

    def __init__(self, source: Tensor, dtype: torch.dtype, in_file: bool, bias: Tensor | None = None):
        """source: the weight, (..., in), leading dimensions being the outputs; in_file: it is mapped from a file; bias:
        (out) in `dtype`."""
        super().__init__()
        self.source: Tensor | None = source
        self.weight_dtype, self.in_file = dtype, in_file
        self.weight: Tensor | None = None
        self.bias = bias

    @staticmethod
    def can(device: torch.device | str, dtype: torch.dtype) -> bool:
        """Whether this machine supports it, for weights on `device` in `dtype`."""
        if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def pack(self) -> None:
        source = self.source
        if source is None:
            return
        # Over 32 MB, so that malloc returns it to the system; smaller gaps between lasting tensors would stay.
        room = torch.empty(max(source.numel(), 2**24), dtype=self.weight_dtype)
        weight = room[: source.numel()].view(source.shape).copy_(source).view(-1, source.shape[-1])
        # In the layout for one row: the best for a single prompt and nearly the best for many.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        if self.in_file:
            forget_pages(source)
        self.source = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


_packing = threading.Lock()


def pack_all(layers: list[PackedLinear]) -> None:
    """Pack the layers, the last (largest) first, and empty the list: the smaller ones then reuse the memory that the
    largest needed for a moment."""
    with _packing:
        while layers:
            layers[-1].pack()
            layers.pop()


def forget_pages(mapped: Tensor) -> None:
    """Give the memory of a mapped file's tensor back to the system; if it is used again, it is read again."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
