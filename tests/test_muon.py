"""Muon orthogonalises momentum: its numbers, its blocks, its share of the work, and that it learns."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dalle_demo.training import muon
from dalle_demo.training.muon import SPREAD, Muon, join, orthogonal, polar, shared_polar, split

SHAPES = {"square": (24, 24), "tall": (72, 24), "wide": (24, 72), "tall, no multiple": (40, 24), "row": (1, 5)}
SHAPES |= {"wide, no multiple": (24, 40), "column": (5, 1)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def spectrum(values: Tensor, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random U (m, k), V (n, k) with orthonormal columns, and U diag(values) V^T."""
    u, v = (torch.linalg.qr(torch.randn(side, len(values))).Q for side in (m, n))
    return u, v, u * values @ v.T


def step(optimizer: Muon, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Change of a weight by one step."""
    before = weight.detach().clone()
    weight.grad = gradient
    optimizer.step()
    return weight.detach() - before


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a.flatten(), b.flatten(), 0).item()


# the iteration


@pytest.mark.parametrize("shape", [(32, 32), (80, 32), (32, 80)])
@pytest.mark.parametrize("decades", [0.3, 1, 2.5])
def test_polar_brings_singular_values_near_one_and_keeps_the_vectors(shape, decades):
    # far below a thousandth of the matrix's norm they stay small, as four iterations multiply by 446 at most
    u, v, matrix = spectrum(torch.logspace(0, -decades, 32), *shape)
    ours = polar(matrix[None])[0]
    values = torch.linalg.svdvals(ours)
    assert 0.4 < values.min() < values.max() < 1.6
    inner = u.T @ ours @ v
    torch.testing.assert_close(inner, inner.diagonal().diag(), atol=1e-3, rtol=0)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert cosine(ours, left @ right) > 0.9
    assert cosine(matrix, left @ right) < 0.99


def test_polar_in_bf16_points_the_same_way():
    blocks = torch.randn(2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = polar(blocks)
    assert ours.dtype == torch.float32
    assert cosine(ours, polar(blocks)) > 0.99
    assert not torch.equal(ours, polar(blocks))


def test_polar_does_not_depend_on_scale_or_neighbours():
    blocks = torch.randn(3, 16, 24)
    scaled = blocks * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    torch.testing.assert_close(polar(scaled), torch.cat([polar(block[None]) for block in blocks]), atol=0.01, rtol=0)
    assert torch.equal(polar(torch.zeros(2, 4, 4)), torch.zeros(2, 4, 4))


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 96)])
def test_agrees_with_torch_where_matrices_stay_whole(shape):
    """Another polynomial, in bf16, but the same direction, length and decay, step after step."""
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.2}
    one, other = Muon([ours], **settings), torch.optim.Muon([theirs], **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(shape) * torch.logspace(0, -1.5, shape[1])
        decay = 0.02 * ours.detach(), 0.02 * theirs.detach()
        change = step(one, ours, gradient) + decay[0], step(other, theirs, gradient) + decay[1]
        assert cosine(*change) > 0.9
        assert cosine(-gradient, change[1]) < 0.8  # so the gradient itself would not pass
        assert 0.95 < change[0].norm() / change[1].norm() < 1.4


# blocks


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_join_is_the_inverse_of_split(shape):
    matrix = torch.randn(shape)
    assert torch.equal(join(split(matrix), matrix.shape), matrix)


def test_blocks_are_what_fused_projections_are_fused_of():
    parts = torch.randn(3, 8, 8)
    assert torch.equal(split(torch.cat(list(parts), 0)), parts)
    assert torch.equal(split(torch.cat(list(parts), 1)), parts)
    assert split(torch.randn(20, 8)).shape == (1, 20, 8)
    assert split(torch.randn(8, 20)).shape == (1, 8, 20)


@pytest.mark.parametrize("dim", [0, 1])
def test_fused_projections_are_treated_as_if_they_stood_apart(dim):
    apart = [scale * torch.randn(16, 16) for scale in (1, 10, 0.1)]
    fused = orthogonal([torch.cat(apart, dim)])[0]
    torch.testing.assert_close(fused, torch.cat(orthogonal(apart), dim), atol=1e-4, rtol=0)


def test_every_matrix_gets_its_own_result_whatever_the_others():
    matrices = [torch.randn(shape) for shape in [*SHAPES.values(), *reversed(SHAPES.values())]]
    for ours, matrix in zip(orthogonal(matrices), matrices, strict=True):
        torch.testing.assert_close(ours, orthogonal([matrix])[0], atol=1e-4, rtol=0)
        assert cosine(ours, matrix) > 0.5


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_shares_of_the_processes_add_up_to_the_whole(monkeypatch, processes, blocks):
    stack, shares, counted = torch.randn(blocks, 8, 12), [], []
    monkeypatch.setattr(muon.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(muon.dist, "get_world_size", lambda: processes)
    monkeypatch.setattr(muon.dist, "all_reduce", lambda tensor: shares.append(tensor.clone()))
    monkeypatch.setattr(muon, "polar", lambda blocks: counted.append(len(blocks)) or polar(blocks))
    for rank in range(processes):
        monkeypatch.setattr(muon.dist, "get_rank", lambda rank=rank: rank)
        shared_polar(stack)
    torch.testing.assert_close(sum(shares), polar(stack), atol=1e-4, rtol=0)
    assert sum(counted) == blocks
    assert max(counted) - min(counted) <= 1  # no work is done twice, and none has much more than another


# steps


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 192), (144, 32), (32, 144)])
def test_updates_have_the_spread_of_adamw(shape):
    weight = nn.Parameter(torch.randn(shape))
    change = step(Muon([weight], lr=0.01), weight, 1e-3 * torch.randn(shape))
    assert change.pow(2).mean().sqrt().item() == pytest.approx(SPREAD * 0.01, rel=0.2)


def test_decay_is_apart_from_the_gradient():
    weight, untouched = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 6))
    before, other = weight.detach().clone(), untouched.detach().clone()
    optimizer = Muon([weight, untouched], lr=0.1, weight_decay=0.5)
    step(optimizer, weight, torch.zeros(6, 6))
    torch.testing.assert_close(weight.detach(), 0.95 * before)
    step(optimizer, weight, torch.zeros(6, 6))
    torch.testing.assert_close(weight.detach(), 0.95**2 * before)
    assert torch.equal(untouched, other)  # no gradient, no step


def test_momentum_is_nesterovs_average(monkeypatch):
    monkeypatch.setattr(muon, "orthogonal", lambda matrices: matrices)
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = Muon([weight], lr=1 / SPREAD, momentum=0.9)
    # averages 0.1, 0.9 * 0.1 + 0.1 * 2 = 0.29, 0.9 * 0.29 - 0.1 = 0.161; steps 0.1 * gradient + 0.9 * average
    for gradient, expected in ((1.0, 0.19), (2.0, 0.461), (-1.0, 0.0449)):
        given = torch.full((2, 2), gradient)
        torch.testing.assert_close(step(optimizer, weight, given), torch.full((2, 2), -expected), atol=1e-6, rtol=0)
        assert torch.equal(given, torch.full((2, 2), gradient))


def test_state_comes_back_from_a_checkpoint():
    gradients = torch.randn(4, 8, 8)
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([weight], lr=0.1)
    for gradient in gradients[:3]:
        step(optimizer, weight, gradient)
    copied = nn.Parameter(weight.detach().clone())
    resumed = Muon([copied], lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(step(optimizer, weight, gradients[3]), step(resumed, copied, gradients[3]))


def test_lowers_an_ill_conditioned_regression():
    inputs = torch.randn(256, 32) * torch.logspace(0, -1, 32)
    target = inputs @ torch.randn(32, 96)
    weight = nn.Parameter(torch.zeros(96, 32))
    optimizer, losses, steps = Muon([weight], lr=0.5), [], 150
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * number / steps))
        loss = (inputs @ weight.T - target).pow(2).mean()
        losses.append(loss.item())
        step(optimizer, weight, torch.autograd.grad(loss, weight)[0])
    assert losses[-1] < 1e-3 * losses[0]
