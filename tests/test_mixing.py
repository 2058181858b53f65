"""Between two pictures lie others; the ends are the two, to the bit."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle_demo.mixing import WANDER, Seen, apart, blend, loop, slerp, text_diff, together, vary


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(normal(*shape, seed=seed), dim=-1)


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.acos(F.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1))


def test_slerp_goes_along_the_arc_at_an_even_pace():
    a, b = unit(5, 64), unit(5, 64, seed=1)
    for share in (0.1, 0.25, 0.5, 0.9):
        point = slerp(a, b, share)
        torch.testing.assert_close(point.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(angle(a, point), share * angle(a, b), atol=1e-4, rtol=0)
        torch.testing.assert_close(angle(point, b), (1 - share) * angle(a, b), atol=1e-4, rtol=0)


def test_ends_of_an_arc_are_what_it_goes_between_to_the_bit():
    a, b = normal(3, 64), normal(3, 64, seed=1)  # of any length
    assert torch.equal(slerp(a, b, 0.0), a)
    assert torch.equal(slerp(a, b, 1.0), b)


@pytest.mark.parametrize("other", [lambda a: a, lambda a: 2 * a, lambda a: -a, lambda a: 0 * a, lambda a: a + 1e-7])
def test_slerp_of_vectors_without_an_arc_is_a_number(other):
    a = unit(2, 64)
    for share in (0.0, 0.3, 1.0):
        assert slerp(a, other(a), share).isfinite().all()
    assert slerp(0 * a, 0 * a, 0.5).eq(0).all()  # the noise at truncation 0
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_noise_stays_as_spread_on_its_way_to_other_noise():
    points = slerp(normal(500, 64), normal(500, 64, seed=1), 0.5)
    assert points.std().item() == pytest.approx(1, abs=0.03)  # the chord's would be 0.71


def test_blend_moves_what_is_seen_and_the_noise():
    one, other = (Seen(unit(64, seed=seed), normal(16, seed=seed)) for seed in (1, 2))
    middle = blend(one, other, 0.5)
    assert torch.equal(middle.embedding, slerp(one.embedding, other.embedding, 0.5))
    assert torch.equal(middle.noise, slerp(one.noise, other.noise, 0.5))
    assert torch.equal(blend(one, other, 1.0).embedding, other.embedding)
    assert torch.equal(blend(one, other, 1.0).noise, other.noise)


def test_variations_stay_near_what_is_seen():
    seen, fresh = Seen(unit(64), normal(16)), Seen(unit(3, 64, seed=4), normal(3, 16, seed=5))
    near, far, furthest = (vary(seen, fresh, distance) for distance in (0.2, 0.8, 1.0))
    for name in ("embedding", "noise"):
        own = getattr(seen, name).expand(3, -1)
        assert (angle(getattr(near, name), own) < angle(getattr(far, name), own)).all()
        assert torch.equal(getattr(vary(seen, fresh, 0.0), name), own)
    assert torch.equal(furthest.noise, fresh.noise)
    torch.testing.assert_close(
        angle(furthest.embedding, seen.embedding.expand(3, -1)),
        WANDER * angle(fresh.embedding, seen.embedding.expand(3, -1)),
    )
    torch.testing.assert_close(furthest.embedding.norm(dim=-1), torch.ones(3))


def test_text_diff_moves_along_the_difference_of_the_texts():
    seen, source, target = Seen(unit(64), normal(16)), unit(64, seed=1), unit(64, seed=2)
    for strength in (0.0, 0.25, 0.5):
        moved = text_diff(seen, source, target, strength)
        assert torch.equal(moved.noise, seen.noise)
        direction = (target - source) / (target - source).norm()
        whole = torch.acos(seen.embedding @ direction)
        expected = torch.sin((1 - strength) * whole) * seen.embedding + torch.sin(strength * whole) * direction
        torch.testing.assert_close(moved.embedding, expected / torch.sin(whole))
    assert torch.equal(text_diff(seen, source, target, 0.0).embedding, seen.embedding)
    assert text_diff(seen, source, source, 0.5) is seen  # the same text changes nothing


def test_a_walk_is_closed_and_even():
    a, b = normal(512), normal(512, seed=1)
    frames = loop(a, b, 24)
    assert torch.equal(frames[0], a)
    torch.testing.assert_close(frames[6], b, atol=1e-5, rtol=0)
    steps = (frames - frames.roll(1, 0)).norm(dim=1)  # the step that closes it is one of them
    assert steps.max() < 1.1 * steps.min()
    assert frames.std(1).min() > 0.9


def test_together_and_apart():
    seen = Seen(unit(3, 64), normal(3, 16))
    again = together(apart(seen))
    assert torch.equal(again.embedding, seen.embedding)
    assert torch.equal(again.noise, seen.noise)
    assert math.prod(apart(seen)[1].noise.shape) == 16
