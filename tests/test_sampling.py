"""From logits to tokens: each filter does what its control says, and each image is alone with its seed."""

import pytest
import torch

from dalle_demo.sampling import choose, draw_uniforms, filter_logits, guide, sample


def logits(*shape: int, seed: int = 0, spread: float = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def kept(filtered: torch.Tensor) -> list[set[int]]:
    """Tokens that are still possible, row by row."""
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in filtered]


def test_guidance_of_one_is_off_and_inputs_survive():
    cond, uncond = logits(3, 50), logits(3, 50, seed=1)
    before = cond.clone(), uncond.clone()
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), 3 * cond - 2 * uncond)
    assert torch.equal(cond, before[0])
    assert torch.equal(uncond, before[1])


def test_guidance_of_one_does_not_drown_small_logits():
    """A huge unconditional logit must not eat the digits of the conditional one by more than rounding."""
    cond, uncond = torch.tensor([[1.25, 0.0]]), torch.tensor([[100.0, -100.0]])
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond, atol=1e-4, rtol=0)


def test_guidance_moves_away_from_the_empty_prompt():
    cond, uncond = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert guide(cond, uncond, 4.0).tolist() == [[4.0, 0.0]]


def test_filters_off_change_nothing_and_inputs_survive():
    values = logits(4, 30)
    before = values.clone()
    assert torch.equal(filter_logits(values), before)
    assert torch.equal(filter_logits(values, 30, 1.0), before)
    assert torch.equal(filter_logits(values, 1000, 1.0), before)
    filter_logits(values, 3, 0.5)
    assert torch.equal(values, before)


@pytest.mark.parametrize("k", [1, 2, 7, 29])
def test_top_k_keeps_the_k_best(k):
    values = logits(5, 30)
    best = [set(row.argsort(descending=True)[:k].tolist()) for row in values]
    filtered = filter_logits(values, top_k=k)
    assert kept(filtered) == best
    assert torch.equal(filtered[filtered.isfinite()], values[filtered.isfinite()])


def test_top_k_keeps_ties():
    assert kept(filter_logits(torch.tensor([[5.0, 3.0, 3.0, 3.0, 1.0]]), top_k=2)) == [{0, 1, 2, 3}]
    assert kept(filter_logits(torch.zeros(2, 6), top_k=1)) == [set(range(6))] * 2


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
def test_top_p_keeps_the_smallest_set_of_that_mass(p):
    values = logits(20, 40, spread=2)
    for row, tokens in zip(values.double().softmax(-1), kept(filter_logits(values, top_p=p)), strict=True):
        order = row.argsort(descending=True).tolist()
        expected, mass = set(), 0.0
        for token in order:
            if mass >= p:
                break
            expected.add(token)
            mass += row[token].item()
        assert tokens == expected


def test_top_p_always_keeps_the_best():
    sure = torch.tensor([[0.0, 50.0, 0.0]])
    assert kept(filter_logits(sure, top_p=1e-6)) == [{1}]
    assert kept(filter_logits(logits(9, 40), top_p=1e-9)) == [{row.argmax().item()} for row in logits(9, 40)]


def test_top_p_counts_mass_among_what_top_k_left():
    values = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(filter_logits(values, top_p=0.5)) == [{0, 1}]
    assert kept(filter_logits(values, top_k=2, top_p=0.5)) == [{0}]  # 0.4 / 0.7 is already over a half


def test_uniforms_of_an_image_depend_on_its_seed_alone():
    rows = draw_uniforms([7, 8, 9, 10], 64)
    assert rows.shape == (4, 64)
    assert ((rows >= 0) & (rows < 1)).all()
    assert torch.equal(draw_uniforms([9], 64)[0], rows[2])
    assert torch.equal(draw_uniforms([10, 3, 9], 64)[2], rows[2])
    assert len({tuple(row.tolist()) for row in rows}) == 4


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    draw_uniforms([1, 2**31 - 1], 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_choice_is_the_inverse_cdf():
    values = torch.tensor([[0.25, 0.5, 0.25]]).log().expand(7, -1)
    uniforms = torch.tensor([0.0, 0.2, 0.26, 0.5, 0.74, 0.76, 1 - 2**-24])
    assert choose(values, uniforms).tolist() == [0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_impossible_tokens_are_never_chosen(uniform):
    values = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert choose(values, torch.tensor([uniform])).item() in (1, 3)


def test_frequencies_match_the_softmax():
    """Pearson's chi-square over 200,000 draws; with 19 degrees of freedom it stays under 50 but once in 8,000."""
    draws, values = 200_000, logits(1, 20, spread=1)
    chosen = choose(values.expand(draws, -1), draw_uniforms([5], draws)[0])
    expected = values[0].double().softmax(-1) * draws
    found = torch.bincount(chosen, minlength=20)
    assert ((found - expected) ** 2 / expected).sum() < 50


def test_frequencies_match_with_filters_and_temperature():
    draws = 50_000
    table = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log()
    uniforms = draw_uniforms(range(draws), 1)
    (tokens,) = sample(lambda *_: table.expand(draws, -1), uniforms, bos=0, temperature=0.5, top_k=3, top_p=0.99)
    expected = torch.tensor([0.25, 0.09, 0.01]) / 0.35  # probabilities squared by temperature 1/2
    found = torch.bincount(tokens[:, 0], minlength=5) / draws
    assert (found[:3] - expected).abs().max() < 0.01
    assert found[3:].sum() == 0


def test_loop_feeds_back_its_own_tokens():
    calls = []

    def step(tokens: torch.Tensor, position: int) -> torch.Tensor:
        calls.append((position, tokens.tolist()))
        return torch.nn.functional.one_hot((tokens + 1) % 10, 10).float() * 1e4

    seen = [so_far.clone() for so_far in sample(step, draw_uniforms([1, 2], 5), bos=3)]
    assert [so_far.shape[1] for so_far in seen] == [1, 2, 3, 4, 5]
    assert seen[-1].tolist() == [[4, 5, 6, 7, 8]] * 2
    assert calls == [(i, [3 + i] * 2) for i in range(5)]


def test_low_temperature_is_greedy():
    values = logits(6, 40)
    (tokens,) = sample(lambda *_: values, draw_uniforms(range(6), 1), bos=0, temperature=1e-3)
    assert torch.equal(tokens[:, 0], values.argmax(-1))


def test_bf16_logits_are_sampled_in_fp32():
    values = logits(1, 4096, spread=0.1).bfloat16().expand(64, -1)
    (from_bf16,) = sample(lambda *_: values, draw_uniforms(range(64), 1), bos=0)
    (from_fp32,) = sample(lambda *_: values.float(), draw_uniforms(range(64), 1), bos=0)
    assert torch.equal(from_bf16, from_fp32)
