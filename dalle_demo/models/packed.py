"""Transformer -> the same with projections that are faster on a processor, smaller, and stable to the bit.

A decoding step multiplies a few rows with every weight once, so its time is the time to read the weights. FBGEMM
(part of PyTorch on x86) reads them as fp16 and computes in fp32: exact for weights that are stored in fp16.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# In products of a multiple of four rows, a row has the same bits however many there are (measured for 4 to 64 rows with
# MKL, oneDNN and FBGEMM); one to three rows take other code paths, and so does FBGEMM with some numbers beyond 28.
ROWS = 4
MOST_ROWS = 24


class StoredLinear(nn.Linear):
    """nn.Linear without bias whose weights stay in their file; `read` maps them, for as long as the tensor lives."""

    def __init__(self, read: Callable[[], Tensor]):
        nn.Module.__init__(self)
        self._read = read

    @property
    def weight(self) -> Tensor:
        """(out, in), as stored."""
        return self._read()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return nn.functional.linear(x, self.weight.to(x))


class StoredEmbedding(nn.Embedding):
    """nn.Embedding likewise; only the rows that are looked up are ever in memory."""

    def __init__(self, read: Callable[[], Tensor]):
        nn.Module.__init__(self)
        self._read = read

    @property
    def weight(self) -> Tensor:
        """(V, D), as stored."""
        return self._read()

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D), in fp32."""
        return self.weight[ids.cpu()].float().to(ids.device)


class StableLinear(nn.Module):
    """nn.Linear without bias whose rows do not depend on how many there are, to the bit."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.flatten(0, -2)
        filled = fill_up(rows)
        parts = [filled] if len(filled) <= MOST_ROWS else filled.split(MOST_ROWS)
        products = [self.multiply(part) for part in parts]
        product = products[0] if len(products) == 1 else torch.cat(products)
        return product[: len(rows)].view(*x.shape[:-1], -1)

    def multiply(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)."""
        return nn.functional.linear(x, self.weight)


class PackedLinear(StableLinear):
    """The same with weights in fp16."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight.float(), None)

    def multiply(self, x: Tensor) -> Tensor:
        """(R, in) -> (R, out)."""
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def fill_up(rows: Tensor) -> Tensor:
    """Repeat the first row up to a multiple of ROWS."""
    missing = -len(rows) % ROWS
    return torch.cat([rows, rows[:1].expand(missing, -1)]) if missing else rows


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


def stabilise(module: nn.Module) -> None:
    """Replace projections within a module by those whose rows do not depend on their number, and read embeddings."""
    _replace(module, StableLinear, lambda embedding: nn.Embedding.from_pretrained(embedding.weight.float()))


def is_stored(module: nn.Module) -> bool:
    """Whether weights of it are still in their file."""
    return any(isinstance(child, StoredLinear | StoredEmbedding) for child in module.modules())


def _replace(module: nn.Module, linear: Callable, embedding: Callable) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, linear(child))
        elif isinstance(child, nn.Embedding):
            setattr(module, name, embedding(child))
        else:
            _replace(child, linear, embedding)
