"""features -> precision, recall and KID as torch-fidelity 0.4.0 computes them, its code cut down to that.

The package itself is no requirement of the tests: it needs torchvision, whose published builds do not load beside a
PyTorch without GPU libraries. From metric_prc.py and metric_kid.py of https://github.com/toshas/torch-fidelity,
Apache-2.0; `mmd2` is adapted there from https://github.com/mbinkowski/MMD-GAN, BSD 3-Clause.
"""

import numpy as np
import torch


def prc_features_to_metric(features_1, features_2, neighborhood=3):
    # Convention: features_1 is GENERATED (input1), features_2 is REAL (input2).
    dist_nn_1 = torch.cdist(features_1, features_1).kthvalue(neighborhood + 1).values
    dist_nn_2 = torch.cdist(features_2, features_2).kthvalue(neighborhood + 1).values
    dist_2_1 = torch.cdist(features_2, features_1)
    dist_1_2 = dist_2_1.T
    # Recall: for each real sample (features_2), is it inside any generated sample's (features_1) ball?
    recall = (dist_2_1 <= dist_nn_1).any(dim=1).float().mean().item()
    # Precision: for each generated sample (features_1), is it inside any real sample's (features_2) ball?
    precision = (dist_1_2 <= dist_nn_2).any(dim=1).float().mean().item()
    f_score = 2 * precision * recall / max(1e-5, precision + recall)
    return {"precision": precision, "recall": recall, "f_score": f_score}


def kid_features_to_metric(features_1, features_2):
    """For one subset that holds all rows; both have the same number."""
    K_XX, K_YY, K_XY = (
        (np.matmul(X, Y.T) * (1.0 / X.shape[1]) + 1) ** 3
        for X, Y in ((features_1, features_1), (features_2, features_2), (features_1, features_2))
    )
    m = K_XX.shape[0]
    Kt_XX_sums = K_XX.sum(axis=1) - np.diagonal(K_XX)
    Kt_YY_sums = K_YY.sum(axis=1) - np.diagonal(K_YY)
    mmd2 = (Kt_XX_sums.sum() + Kt_YY_sums.sum()) / (m * (m - 1))
    return mmd2 - 2 * K_XY.sum(axis=0).sum() / (m * m)
