"""Linear layers for inference on a CPU, their weights in the order that oneDNN reads fastest."""

import ctypes
import mmap
import threading

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """A linear layer without bias for inference on a CPU, its weight in the order that oneDNN reads fastest.

    Decoding is bound by reading weights; rates are in docs/benchmarks.md. The weight is packed at the model's first
    forward pass. It is no parameter: nothing can be trained or saved.
    """

    def __init__(self, source: Tensor, dtype: torch.dtype, in_file: bool):
        """source: the weight, (..., in), its first dimensions together the outputs; in_file: it is a mapped file's."""
        super().__init__()
        self.source: Tensor | None = source
        self.weight_dtype, self.in_file = dtype, in_file
        self.weight: Tensor | None = None

    @staticmethod
    def can(device: torch.device | str, dtype: torch.dtype) -> bool:
        """Whether this machine has it, for weights on `device` in `dtype`."""
        if torch.device(device).type != "cpu" or not torch.backends.mkldnn.is_available():
            return False
        return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def pack(self) -> None:
        source = self.source
        if source is None:
            return
        # Over 32 MB, so that malloc gives it back to the system: smaller holes between lasting tensors would stay.
        room = torch.empty(max(source.numel(), 2**24), dtype=self.weight_dtype)
        weight = room[: source.numel()].view(source.shape).copy_(source).view(-1, source.shape[-1])
        # In the order for one row: the best for a single prompt and near the best for many.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        if self.in_file:
            forget_pages(source)
        self.source = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


_packing = threading.Lock()


def pack_all(layers: list[PackedLinear]) -> None:
    """Pack the layers and empty the list, the last (largest) first: what that takes for a moment then has room for the
    smaller ones."""
    with _packing:
        while layers:
            layers[-1].pack()
            layers.pop()


def forget_pages(mapped: Tensor) -> None:
    """Give the memory of a mapped file's tensor back to the system; where it is used again, it is read again."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    begin = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
