"""feature arrays of real and generated pictures -> fidelity, variety and copying, one plain function each.

An array holds one picture a row. Of what is drawn from the same distribution, most figures change with the number of
rows: they mean something beside the same figure of real pictures, with the same numbers of rows.
"""

import numpy as np

CHUNK = 1024  # rows compared at once with everything else


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row of `a` (A, D) to each row of `b` (B, D): (A, B)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be two arrays of equally wide rows, not {a.shape} and {b.shape}")
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(np.maximum(squares, 0))


def nearest(points: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each point to its nearest one in `among`, and which it is."""
    parts = [distances(points[start : start + CHUNK], among) for start in range(0, len(points), CHUNK)]
    return np.concatenate([part.min(1) for part in parts]), np.concatenate([part.argmin(1) for part in parts])


def radii(points: np.ndarray, k: int) -> np.ndarray:
    """r_k(x; S): distance of each point to its k-th nearest other point."""
    if not 1 <= k < len(points):
        raise ValueError(f"k={k} neighbours need more than {k} pictures, here are {len(points)}")
    found = np.empty(len(points))
    for start in range(0, len(points), CHUNK):
        part = distances(points[start : start + CHUNK], points)
        part[np.arange(len(part)), start + np.arange(len(part))] = np.inf  # itself
        found[start : start + len(part)] = np.partition(part, k - 1, axis=1)[:, k - 1]
    return found


def precision(real: np.ndarray, generated: np.ndarray, k: int = 3) -> float:
    """Share of generated pictures that lie among the real ones.

    1/M sum_j 1[exists i: |y_j - x_i| <= r_k(x_i; X)]; Kynkäänniemi et al. 2019.
    """
    return float((distances(generated, real) <= radii(real, k)).any(1).mean())


def recall(real: np.ndarray, generated: np.ndarray, k: int = 3) -> float:
    """Share of real pictures that lie among the generated ones.

    1/N sum_i 1[exists j: |x_i - y_j| <= r_k(y_j; Y)]; Kynkäänniemi et al. 2019.
    """
    return precision(generated, real, k)


def f1(precision: float, recall: float) -> float:
    """Harmonic mean of the two, 2PR / (P + R), 0 when both are 0; Sajjadi et al. 2018."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def density(real: np.ndarray, generated: np.ndarray, k: int = 5) -> float:
    """How many neighbourhoods of real pictures a generated one lies in, over k; 1 is expected of a perfect model.

    1/(kM) sum_j sum_i 1[|y_j - x_i| < r_k(x_i; X)]; Naeem et al. 2020, strict as in the authors' `prdc`.
    """
    return float((distances(generated, real) < radii(real, k)).sum(1).mean() / k)


def coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> float:
    """Share of real pictures with a generated one in their neighbourhood.

    1/N sum_i 1[exists j: |y_j - x_i| < r_k(x_i; X)]; Naeem et al. 2020, strict as in the authors' `prdc`.
    """
    return float((distances(generated, real) < radii(real, k)).any(0).mean())


def kid(real: np.ndarray, generated: np.ndarray) -> float:
    """Kernel distance: the unbiased MMD^2 with kernel (x.y / D + 1)^3; Bińkowski et al. 2018.

    sum_{i!=i'} k(x_i, x_i') / N(N-1) + sum_{j!=j'} k(y_j, y_j') / M(M-1) - 2 sum_ij k(x_i, y_j) / NM; Gretton et al.
    2012, lemma 6. Over all pictures at once rather than the mean over subsets. May be slightly negative.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return float(within(real) + within(generated) - 2 * kernel(real, generated).mean())


def authpct(training: np.ndarray, generated: np.ndarray) -> float:
    """Percentage of generated pictures that are authentic: no nearer to a training picture than its like are.

    y_j is authentic when |y_j - x*| > r_1(x*; X) for its nearest training picture x*; Alaa et al. 2022, as
    computed by Stein et al. 2023.
    """
    distance, index = nearest(generated, training)
    return float(100 * (distance > radii(training, 1)[index]).mean())


def copying(training: np.ndarray, held_out: np.ndarray, generated: np.ndarray) -> float:
    """C_T of one cell: z-score of how far generated pictures are from training, beside held-out ones.

    (U - NM/2) / sqrt(NM(N + M + 1) / 12), where U counts the pairs in which the generated one is farther (ties half);
    Meehan et al. 2020. Far below 0 is copying, far above 0 is not having learned.
    """
    ours, theirs = nearest(generated, training)[0], np.sort(nearest(held_out, training)[0])
    below, up_to = np.searchsorted(theirs, ours, "left"), np.searchsorted(theirs, ours, "right")
    n, m = len(ours), len(theirs)
    return float(((below + up_to).sum() / 2 - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def nearer_training(training: np.ndarray, held_out: np.ndarray, generated: np.ndarray) -> float:
    """Share of generated pictures that are nearer to a training picture than to any held-out one.

    The larger of the two sets has more chances, so it is read beside the share of real pictures.
    """
    return float((nearest(generated, training)[0] < nearest(generated, held_out)[0]).mean())


def mean_pairwise_distance(points: np.ndarray) -> float:
    """Mean distance of two different rows: the variety of pictures of one prompt. NaN for a single row."""
    if len(points) < 2:
        return float("nan")
    return float(distances(points, points)[np.triu_indices(len(points), 1)].mean())
