"""gradients of matrices -> orthogonalised steps: the optimiser of everything between a Transformer's shortcuts."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

# Polar Express (Amsel et al. 2025, algorithm 1): odd quintics that push all singular values towards one, fastest first
QUINTICS = ((8.28721, -23.59589, 17.30039), (4.10706, -2.94785, 0.54484), (3.94869, -2.90890, 0.55182),
            (3.31842, -2.48849, 0.51005))  # fmt: skip
SPREAD = 0.2  # root mean square of an update in units of the learning rate: AdamW's usual one (Liu et al. 2025)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), with the work shared between the processes.

    A step changes all directions of a matrix by about the same amount. `torch.optim.Muon` always multiplies in bf16,
    which most processors emulate, and repeats the work in every process. A matrix whose longer side is a multiple of
    the shorter is orthogonalised in square blocks, so that all blocks of one size are multiplied as one batch; where a
    fused projection has the width of its input, as in `nano`, its parts are whole blocks.
    """

    def __init__(self, matrices: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change every matrix that has a gradient."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            updates = orthogonal([self._momentum(p, group["momentum"]) for p in matrices])
            for p, update in zip(matrices, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * SPREAD)

    def _momentum(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov's average of the gradients."""
        state = self.state[p]
        if "average" not in state:
            state["average"] = torch.zeros_like(p)
        return p.grad.lerp(state["average"].lerp_(p.grad, 1 - beta), beta)


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """Nearest orthogonal matrix of each, block by block, scaled to a root mean square of about one."""
    blocks = [split(matrix) for matrix in matrices]
    shapes = sorted({tuple(b.shape[1:]) for b in blocks})
    for shape in shapes:
        members = [i for i, b in enumerate(blocks) if tuple(b.shape[1:]) == shape]
        done = shared_polar(torch.cat([blocks[i] for i in members])) * math.sqrt(max(shape))
        for i, part in zip(members, done.split([len(blocks[i]) for i in members]), strict=True):
            blocks[i] = part
    return [join(b, matrix.shape) for b, matrix in zip(blocks, matrices, strict=True)]


def split(matrix: Tensor) -> Tensor:
    """(m, n) -> (K, s, s) square blocks where the longer side is a multiple s K of the shorter one, else (1, m, n)."""
    m, n = matrix.shape
    if m % n == 0:
        return matrix.view(m // n, n, n)
    if n % m == 0:
        return matrix.view(m, n // m, m).transpose(0, 1)
    return matrix[None]


def join(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `split`."""
    return blocks.transpose(0, 1).reshape(shape) if shape[1] > shape[0] else blocks.reshape(shape)


def shared_polar(blocks: Tensor) -> Tensor:
    """`polar` of a stack (K, m, n), each process computing its share of it."""
    if not dist.is_initialized():
        return polar(blocks)
    rank, count = dist.get_rank(), dist.get_world_size()
    share = slice(len(blocks) * rank // count, len(blocks) * (rank + 1) // count)
    done = torch.zeros_like(blocks)
    done[share] = polar(blocks[share])
    dist.all_reduce(done)
    return done


def polar(blocks: Tensor) -> Tensor:
    """U V^T of the singular value decompositions U S V^T, about.

    Singular values end up between 0.4 and 1.6, but for those under a thousandth of the Frobenius norm, which stay less.
    Under autocast it multiplies in its type, for which the polynomials were made; up to 1.7 in bf16.
    """
    tall = blocks.shape[-2] > blocks.shape[-1]
    x = blocks.mT if tall else blocks
    x = x / (1.02 * x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(blocks.dtype)
