"""Transformer -> the same with two small matrices to train beside each projection, and back (Hu et al. 2021)."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle_demo.checkpoints import WeightsError, load_adapters, save_adapters
from dalle_demo.models.packed import StoredLinear
from dalle_demo.weights import Dalle

FILE = "lora.safetensors"


class AdaptedLinear(nn.Linear):
    """(W + B A) x without bias: W is frozen, A and B are trained. Alpha is the rank, so B A counts as it is."""

    def __init__(self, linear: nn.Linear, rank: int):
        nn.Module.__init__(self)  # and not that of nn.Linear, which makes weights
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        outputs, inputs = self.weight.shape
        self.A = nn.Parameter(self.weight.new_empty(rank, inputs))
        self.B = nn.Parameter(self.weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.counts = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.counts:
            return F.linear(x, self.weight)
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.A), self.B)


def add(module: nn.Module, rank: int) -> None:
    """Freeze a module and give each of its projections an adapter, which changes nothing until it is trained."""
    module.requires_grad_(False)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear):
            module.set_submodule(name, AdaptedLinear(child, rank))


def has_adapters(module: nn.Module) -> bool:
    """Whether the base's own weights are there beside what is trained."""
    return bool(_adapted(module))


@contextmanager
def left_out(module: nn.Module) -> Iterator[None]:
    """Let a module with adapters compute as its base does."""
    found = _adapted(module).values()
    for child in found:
        child.counts = False
    try:
        yield
    finally:
        for child in found:
            child.counts = True


def adapters(module: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, by the name of the weight that they change."""
    return {
        f"{name}.weight.{factor}": getattr(child, factor).detach()
        for name, child in _adapted(module).items()
        for factor in "AB"
    }


def _adapted(module: nn.Module) -> dict[str, AdaptedLinear]:
    """Projections with an adapter, by name."""
    return {name: child for name, child in module.named_modules() if isinstance(child, AdaptedLinear)}


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict of the module as it was before `add`, with each B A added to its W."""
    state = {key: value for key, value in module.state_dict().items() if not key.endswith((".A", ".B"))}
    for name, child in _adapted(module).items():
        state[f"{name}.weight"] = (child.weight + child.B @ child.A).detach()
    return state


def save(folder: Path, parts: Mapping[str, nn.Module], changes: Mapping[str, Tensor]) -> None:
    """Write the adapters of these parts, and the changes of other weights, beside what they were merged into."""
    tensors = {f"{part}.{key}": value for part, module in parts.items() for key, value in adapters(module).items()}
    tensors |= {f"{name}.D": change.half() for name, change in changes.items()}
    save_adapters(folder / FILE, tensors)


def scale(model: Dalle, folder: Path, strength: float) -> Dalle:
    """Set a model loaded from `folder`, in place, to W + (strength - 1) B A: 0 is its base, 1 as it was trained.

    Weights that were trained without adapters are set to W + (strength - 1) D.

    At 0, weights are those of the base but for the rounding of what is stored. Call it before an engine has the model.
    Returns the model under another hash, since what it draws is not what the folder draws.

    Raises:
        WeightsError: the folder holds no adapters, damaged ones, or those of another model.
    """
    if not (folder / FILE).exists():
        raise WeightsError(f"{folder} holds no {FILE}: only what was trained as LoRA has a strength")
    if strength == 1:
        return model
    tensors = load_adapters(folder / FILE)
    for name in sorted({key.rsplit(".", 1)[0] for key in tensors}):
        part, path = name.removesuffix(".weight").split(".", 1)
        try:
            module = getattr(model, part)
            if (change := tensors.get(f"{name}.D")) is not None:
                weight = module.get_parameter(name.split(".", 1)[1])
                if change.shape != weight.shape:
                    raise ValueError(f"its shape is {tuple(weight.shape)}")
                weight.data = torch.add(weight.float(), change, alpha=strength - 1).to(weight.dtype)
                continue
            factors = tensors[f"{name}.A"], tensors[f"{name}.B"] * (strength - 1)
            linear = module.get_submodule(path)
            if (factors[1].shape[0], factors[0].shape[1]) != linear.weight.shape:
                raise ValueError(f"of shape {tuple(linear.weight.shape)}")
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            raise WeightsError(f"{folder / FILE}: {name} does not fit {model.name}: {error}") from error
        if isinstance(linear, StoredLinear):  # stays in its file
            module.set_submodule(path, StoredLinear(partial(_shifted, linear, *factors)))
        else:
            linear.weight.data = _shifted(linear, *factors)
    return dataclasses.replace(model, sha256=hashlib.sha256(f"{model.sha256} {strength}".encode()).hexdigest())


def _shifted(linear: nn.Linear, a: Tensor, b: Tensor) -> Tensor:
    weight = linear.weight
    return torch.addmm(weight.float(), b, a).to(weight.dtype)
