"""The figures equal those of the reference programs on asymmetric data, and tell a copy from an honest model."""

import contextlib
import io

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.stats import mannwhitneyu
from torch_fidelity_reference import kid_features_to_metric, prc_features_to_metric

from dalle_demo.evaluation import metrics
from dalle_demo.evaluation.features import CONTENT, PARTS, Judge, fit_judge


def clouds(real: int = 130, generated: int = 90, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Two overlapping clouds of different size, place and spread, so that figures change when arguments are swapped."""
    rng = np.random.default_rng(5)
    return rng.normal(size=(real, width)), 0.6 + 0.6 * rng.normal(size=(generated, width))


def lattice() -> tuple[np.ndarray, np.ndarray]:
    """Clouds on whole numbers: many equal distances, so that < and <= differ."""
    return tuple(np.round(2 * points[:, :3]) for points in clouds())


@pytest.mark.parametrize("data", [clouds, lattice])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_precision_and_recall_equal_torch_fidelity(data, k):
    real, generated = data()
    reference = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), neighborhood=k)
    ours = metrics.precision(real, generated, k), metrics.recall(real, generated, k)
    assert ours == pytest.approx((reference["precision"], reference["recall"]), abs=1e-6)
    assert metrics.f1(*ours) == pytest.approx(reference["f_score"], abs=1e-6)
    assert abs(ours[0] - ours[1]) > 0.02  # else a swap would not show


@pytest.mark.parametrize("data", [clouds, lattice])
@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_equal_prdc(data, k):
    real, generated = data()
    with contextlib.redirect_stdout(io.StringIO()):
        reference = compute_prdc(real, generated, nearest_k=k)
        swapped = compute_prdc(generated, real, nearest_k=k)
    assert metrics.density(real, generated, k) == pytest.approx(reference["density"], abs=1e-12)
    assert metrics.coverage(real, generated, k) == pytest.approx(reference["coverage"], abs=1e-12)
    assert max(abs(reference[name] - swapped[name]) for name in ("density", "coverage")) > 0.02


def test_kid_equals_torch_fidelity():
    real, generated = clouds(100, 100)
    assert metrics.kid(real, generated) == pytest.approx(kid_features_to_metric(generated, real), rel=1e-9)


def test_kid_is_unbiased_for_unequal_numbers():
    rng = np.random.default_rng(0)
    draws = [metrics.kid(rng.normal(size=(40, 4)), rng.normal(size=(15, 4))) for _ in range(300)]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(300)
    assert np.mean([metrics.kid(rng.normal(size=(40, 4)), 1 + rng.normal(size=(15, 4))) for _ in range(9)]) > 1


def test_copying_is_the_z_score_of_mann_whitney():
    training, generated = lattice()
    held_out = lattice()[0][::2] + 1
    ours, theirs = (metrics.nearest(points, training)[0] for points in (generated, held_out))
    assert len(set(ours) & set(theirs)) > 1  # with ties between the two
    mean, deviation = len(ours) * len(theirs) / 2, np.sqrt(len(ours) * len(theirs) * (len(ours) + len(theirs) + 1) / 12)
    expected = (mannwhitneyu(ours, theirs).statistic - mean) / deviation
    assert metrics.copying(training, held_out, generated) == pytest.approx(expected)


def test_authpct_by_hand():
    training = np.array([[0.0], [1.0], [10.0]])  # nearest others at 1, 1 and 9
    generated = np.array([[0.3], [-1.5], [17.0], [20.0]])  # nearest training at 0.3, 1.5, 7 and 10
    assert metrics.authpct(training, generated) == 50


def test_nearer_training_by_hand():
    assert metrics.nearer_training(np.array([[0.0]]), np.array([[4.0]]), np.array([[1.0], [2.0], [3.0]])) == 1 / 3


def test_mean_pairwise_distance_by_hand():
    assert metrics.mean_pairwise_distance(np.array([[0.0], [1.0], [5.0]])) == pytest.approx(10 / 3)
    assert np.isnan(metrics.mean_pairwise_distance(np.zeros((1, 2))))


def test_f1_of_nothing_is_zero():
    assert metrics.f1(0.0, 0.0) == 0


def test_copies_are_told_from_an_honest_model():
    rng = np.random.default_rng(1)
    training, held_out, honest = (rng.normal(size=(200, 16)) for _ in range(3))
    copies = training + 0.05 * rng.normal(size=training.shape)
    assert metrics.authpct(training, copies) < 5 < 60 < metrics.authpct(training, honest)
    assert metrics.copying(training, held_out, copies) < -10
    assert abs(metrics.copying(training, held_out, honest)) < 3
    assert metrics.nearer_training(training, held_out, copies) == 1
    assert abs(metrics.nearer_training(training, held_out, honest) - 0.5) < 0.12


def test_large_sets_are_compared_in_parts(monkeypatch):
    real, generated = clouds()
    whole = metrics.nearest(generated, real), metrics.radii(real, 2)
    monkeypatch.setattr(metrics, "CHUNK", 37)
    parts = metrics.nearest(generated, real), metrics.radii(real, 2)
    np.testing.assert_allclose(parts[0][0], whole[0][0])
    np.testing.assert_array_equal(parts[0][1], whole[0][1])
    np.testing.assert_allclose(parts[1], whole[1])


@pytest.mark.parametrize("shape", [(5, 3), (5,)])
def test_features_that_do_not_belong_together_are_refused(shape):
    with pytest.raises(ValueError, match="equally wide"):
        metrics.precision(np.zeros((9, 2)), np.zeros(shape))


def test_too_few_pictures_are_refused():
    with pytest.raises(ValueError, match="here are 3"):
        metrics.recall(np.zeros((9, 2)), np.zeros((3, 2)), k=3)


def test_judge_finds_concepts_and_styles_and_is_the_same_from_its_file(tmp_path):
    rng = np.random.default_rng(2)
    concept, style = np.arange(240) % 40, np.arange(240) % 3
    looks, manners = rng.normal(size=(40, CONTENT)), rng.normal(size=(3, sum(PARTS)))
    features = rng.normal(size=(240, sum(PARTS))) + 2 * manners[style]
    features[:, :CONTENT] += looks[concept]
    codes, words = [f"{number:X}" for number in concept], np.array(["flat", "3d", "bold"])[style]
    judge = fit_judge(features[:160], codes[:160], features[:160], words[:160])
    judge.save(tmp_path / "judge.npz")
    for same in (judge, Judge.load(tmp_path / "judge.npz")):
        ranks = same.concept_ranks(features[160:], codes[160:])
        assert (ranks < 1).mean() > 0.9
        assert (same.concept_ranks(features[160:], codes[121:201]) < 1).mean() < 0.2  # asked for other concepts
        assert (same.style(features[160:]) == words[160:]).mean() > 0.9
