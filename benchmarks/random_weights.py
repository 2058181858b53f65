"""preset -> files in the form of kuprel/min-dalle, filled with random numbers, to time both programs on.

Random weights cost what trained ones cost: every operation is dense and of fixed size.

    python benchmarks/random_weights.py --preset mini --out FOLDER
"""

import argparse
import json
import string
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dalle_demo.config import PRESETS, DalleConfig
from dalle_demo.models.vqgan import VQGAN

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mini", choices=["mini", "mega"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arrange", action="store_true", help="move files made before to where min-dalle looks")
    options = parser.parse_args()
    if options.arrange:
        arrange(options.preset, options.out)
    else:
        write(PRESETS[options.preset], options.out)


def write(config: DalleConfig, folder: Path) -> None:
    """Write encoder, decoder, detoker, vocabulary and merges."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    text, image = config.text_encoder, config.image_decoder
    torch.save(stacked(transformer(text, cross=False)), folder / "encoder.pt")
    decoder = transformer(image, cross=True) | {"lm_head.weight": spread(image.vocab_size, image.width)}
    torch.save(stacked(decoder), folder / "decoder.pt")
    torch.save(detoker(config), folder / "detoker.pt")
    space = chr(ord(" ") + 256)  # how byte-level vocabularies write it
    words = ["<s>", "<pad>", "</s>", "<unk>", space, *string.ascii_lowercase, *string.digits, *string.punctuation]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate([*words, f"{space}a"])}))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{space} a\n")


def arrange(preset: str, folder: Path) -> None:
    """Bring the files into min-dalle's own folders."""
    transformer, vqgan = folder / f"dalle_bart_{preset}", folder / "vqgan"
    for place in (transformer, vqgan):
        place.mkdir(exist_ok=True)
    for path in folder.glob("*.*"):
        path.rename((vqgan if path.name == "detoker.pt" else transformer) / path.name)


def transformer(sizes, cross: bool) -> dict[str, Tensor]:
    """State dict of an encoder, or of a decoder but for its head, in fp16 and without the scales that are ones."""
    width, glu = sizes.width, sizes.glu_width
    state = {
        "embed_tokens.weight": spread(sizes.vocab_size, width),
        "embed_positions.weight": spread(sizes.length, width),
        **norm("layernorm_embedding", width),
        "final_ln.bias": shift(width),
    }
    for i in range(sizes.layers):
        attentions = [("self_attn", "pre_self_attn_layer_norm")]
        attentions += [("encoder_attn", "pre_encoder_attn_layer_norm")] if cross else []
        for name, before in attentions:
            state[f"layers.{i}.{before}.bias"] = shift(width)
            state |= {f"layers.{i}.{name}.{part}.weight": spread(width, width) for part in ATTENTION}
            state |= norm(f"layers.{i}.{name}_layer_norm", width)
        state |= {f"layers.{i}.glu.ln0.bias": shift(width), f"layers.{i}.glu.ln1.bias": shift(glu)}
        state |= {f"layers.{i}.glu.{part}.weight": spread(glu, width) for part in ("fc0", "fc1")}
        state[f"layers.{i}.glu.fc2.weight"] = spread(width, glu)
    return state


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, with one storage for what all layers have under one name, and matrices transposed in it."""
    names: dict[str, list[str]] = {}
    for key in state:
        if key.startswith("layers."):
            names.setdefault(key.split(".", 2)[2], []).append(key)
    for keys in names.values():
        stack = torch.stack([state[key].t() for key in keys])
        state |= {key: one.t() for key, one in zip(keys, stack, strict=True)}
    return state


def detoker(config: DalleConfig) -> dict[str, Tensor]:
    """State dict of the VQGAN's second half, in fp32, with pixels about 0.5."""
    state = VQGAN(config.vqgan).state_dict()
    state["embedding.weight"] = state.pop("quantizer.embedding.weight").normal_()
    state["decoder.conv_out.bias"].fill_(0.5)
    return state


def spread(rows: int, columns: int) -> Tensor:
    """Matrix that keeps the scale of what it is multiplied with."""
    return (torch.randn(rows, columns) / columns**0.5).half()


def shift(width: int) -> Tensor:
    """Small offsets."""
    return (0.05 * torch.randn(width)).half()


def norm(name: str, width: int) -> dict[str, Tensor]:
    """Scale and offsets."""
    return {f"{name}.weight": 1 + shift(width), f"{name}.bias": shift(width)}


if __name__ == "__main__":
    main()
