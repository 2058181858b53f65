"""Transformer -> the same with projections that are faster on a processor, smaller, and stable to the bit.

A decoding step multiplies a few rows with every weight once, so its time is the time to read the weights. FBGEMM
(part of PyTorch on x86) reads them as fp16 and computes in fp32: exact for weights that are stored in fp16.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MOST_ROWS = 24  # of one product: with some numbers beyond 28, FBGEMM takes code paths that round differently


class Stored(nn.Module):
    """Weights that stay in their file; `read` maps them, for as long as the tensor lives."""

    def __init__(self, read: Callable[[], Tensor]):
        nn.Module.__init__(self)  # and not that of nn.Linear or nn.Embedding, which make weights
        self._read = read

    @property
    def weight(self) -> Tensor:
        """Matrix, as stored."""
        return self._read()


class StoredLinear(Stored, nn.Linear):
    """nn.Linear without bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(x, self.weight.to(x))


class StoredEmbedding(Stored, nn.Embedding):
    """nn.Embedding; only the rows that are looked up are ever in memory."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D), in fp32."""
        return self.weight[ids.cpu()].float().to(ids.device)


class PackedLinear(nn.Module):
    """nn.Linear without bias, with weights in fp16."""

    least_rows = 3  # of a product whose rows have the bits that they have in larger ones

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), None)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in fp32."""
        if x.numel() <= MOST_ROWS * x.shape[-1]:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        chunks = x.flatten(0, -2).split(MOST_ROWS)
        products = [torch.ops.quantized.linear_dynamic_fp16(chunk, self.packed) for chunk in chunks]
        return torch.cat(products).unflatten(0, x.shape[:-1])


class HalfEmbedding(nn.Module):
    """nn.Embedding that keeps fp16 rows and gives fp32 ones."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.half().clone(), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return nn.functional.embedding(ids, self.weight).float()


def can_pack() -> bool:
    """Whether this build of PyTorch has FBGEMM, and this processor what it needs (AVX2)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def pack(module: nn.Module) -> None:
    """Replace projections and embeddings within a module by those with fp16 weights; what remains becomes fp32."""
    _replace(module, PackedLinear, HalfEmbedding)
    for child in module.modules():
        if not isinstance(child, HalfEmbedding):
            for parameter in child.parameters(recurse=False):
                parameter.data = parameter.data.float()


def read(module: nn.Module) -> None:
    """Bring weights that are still in their file into memory."""
    if is_stored(module):
        _replace(module, _read_linear, lambda embedding: nn.Embedding.from_pretrained(embedding.weight.clone()))


def _read_linear(stored: nn.Linear) -> nn.Linear:
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(stored.weight.clone(), requires_grad=False)
    return linear


def is_stored(module: nn.Module) -> bool:
    """Whether weights of it are still in their file."""
    return any(isinstance(child, Stored) for child in module.modules())


def _replace(module: nn.Module, linear: Callable, embedding: Callable) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, linear(child))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, embedding(child))
        else:
            _replace(child, linear, embedding)
