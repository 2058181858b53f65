"""files of min-dalle or of the Flax original -> tensors of our modules: names, layouts and pixel ranges made ours.

Both forms are first brought to min-dalle's names. Every tensor of a file is used, with the shape that the config
says, or ConvertError names the file and the tensor. Norms without a scale have one of ones here.
"""

import json
import math
import mmap
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from dalle_demo.config import DalleConfig, ImageDecoderConfig, TextEncoderConfig, VQGANConfig
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer

TYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class ConvertError(ValueError):
    """Files that cannot be converted; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Converted:
    """A whole model, not yet in modules."""

    config: DalleConfig
    tensors: dict[str, dict[str, Tensor]]  # part -> state dict of its module
    tokenizer: Tokenizer


def convert(folder: Path, form: str, config: DalleConfig) -> Converted:
    """Read the files of a folder.

    Transformer tensors keep the type they are stored in, those of the VQGAN are fp32.

    Args:
        folder: with `vocab.json`, `merges.txt`, `encoder.pt`, `decoder.pt` and `detoker.pt` for "min-dalle"; for "flax"
            those of the repository in `folder` and of its VQGAN in `folder/vqgan`.
        form: "min-dalle" or "flax".
        config: sizes that min-dalle's files must have. Flax repositories tell theirs, so only `defaults` are taken.

    Raises:
        ConvertError: a file is missing, damaged, or not of these sizes.
    """
    if form not in ("min-dalle", "flax"):
        raise ConvertError(f"form {form!r} is neither 'min-dalle' nor 'flax'")
    if form == "min-dalle":
        encoder, decoder, vqgan = (_Tensors(folder / f"{name}.pt") for name in ("encoder", "decoder", "detoker"))
    else:
        config = _flax_config(folder, config)
        tensors = _flax_transformer(folder / "flax_model.msgpack")
        encoder, decoder = (_Tensors(folder / "flax_model.msgpack", tensors[part]) for part in ("encoder", "decoder"))
        vqgan = _Tensors(folder / "vqgan" / "flax_model.msgpack", _flax_vqgan(folder / "vqgan" / "flax_model.msgpack"))
    tensors = {
        "vqgan": _vqgan(vqgan, config.vqgan),
        "text_encoder": _text_encoder(encoder, config.text_encoder),
        "image_decoder": _image_decoder(decoder, config.image_decoder),
    }
    return Converted(config, tensors, _tokenizer(folder, config.text_encoder.vocab_size))


class _Tensors:
    """Tensors of one file under min-dalle's names; each is taken once, and `done` says that none is left."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor] | None = None):
        self.path = path
        self._tensors = dict(_load_pickle(path) if tensors is None else tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def take(self, key: str, *shape: int) -> Tensor:
        """Tensor of a name, contiguous and in a storage of its own."""
        if key not in self._tensors:
            raise ConvertError(f"{self.path}: tensor {key!r} is missing")
        tensor = self._tensors.pop(key)
        if tensor.shape != shape:
            found = f"has the shape {tuple(tensor.shape)}, expected {shape}"
            raise ConvertError(f"{self.path}: tensor {key!r} {found}")
        if not tensor.is_floating_point():
            raise ConvertError(f"{self.path}: tensor {key!r} holds {tensor.dtype}, expected floating point numbers")
        tensor = tensor.contiguous()
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def norm(self, theirs: str, ours: str, width: int) -> dict[str, Tensor]:
        """Scale and shift of a LayerNorm; those followed by a projection were trained without a scale."""
        bias = self.take(f"{theirs}.bias", width)
        scale = self.take(f"{theirs}.weight", width) if f"{theirs}.weight" in self else torch.ones_like(bias)
        return {f"{ours}.weight": scale, f"{ours}.bias": bias}

    def fused(self, *keys: str, shape: tuple[int, int]) -> Tensor:
        """Weights of several projections of one input, as one."""
        return torch.cat([self.take(f"{key}.weight", *shape) for key in keys])

    def done(self) -> None:
        """Raise ConvertError if a tensor was not taken."""
        if self._tensors:
            raise ConvertError(f"{self.path}: tensor {min(self._tensors)!r} has no place in this model")


def _text_encoder(source: _Tensors, config: TextEncoderConfig) -> dict[str, Tensor]:
    """Tensors of our TextEncoder."""
    tensors = _embeddings(source, config.vocab_size, config.length, config.width)
    for i in range(config.layers):
        at = f"layers.{i}"
        tensors |= _self_attention(source, at, config.width)
        tensors |= _feed_forward(source, at, config.width, config.glu_width)
    source.done()
    return tensors


def _image_decoder(source: _Tensors, config: ImageDecoderConfig) -> dict[str, Tensor]:
    """Tensors of our ImageDecoder."""
    tensors = _embeddings(source, config.vocab_size, config.length, config.width)
    tensors["lm_head.weight"] = source.take("lm_head.weight", config.vocab_size, config.width)
    for i in range(config.layers):
        at = f"layers.{i}"
        tensors |= _self_attention(source, at, config.width)
        tensors |= _cross_attention(source, at, config.width, config.text_width)
        tensors |= _feed_forward(source, at, config.width, config.glu_width)
    source.done()
    return tensors


def _embeddings(source: _Tensors, rows: int, length: int, width: int) -> dict[str, Tensor]:
    """What is before and after the layers."""
    return {
        "embed_tokens.weight": source.take("embed_tokens.weight", rows, width),
        "embed_positions.weight": source.take("embed_positions.weight", length, width),
        **source.norm("layernorm_embedding", "norm_embedding", width),
        **source.norm("final_ln", "norm_final", width),
    }


def _self_attention(source: _Tensors, at: str, width: int) -> dict[str, Tensor]:
    theirs, ours = f"{at}.self_attn", f"{at}.self_attention"
    qkv = [f"{theirs}.{name}_proj" for name in "qkv"]
    return {
        **source.norm(f"{at}.pre_self_attn_layer_norm", f"{ours}.norm_in", width),
        f"{ours}.qkv.weight": source.fused(*qkv, shape=(width, width)),
        f"{ours}.out.weight": source.take(f"{theirs}.out_proj.weight", width, width),
        **source.norm(f"{at}.self_attn_layer_norm", f"{ours}.norm_out", width),
    }


def _cross_attention(source: _Tensors, at: str, width: int, text_width: int) -> dict[str, Tensor]:
    theirs, ours = f"{at}.encoder_attn", f"{at}.cross_attention"
    return {
        **source.norm(f"{at}.pre_encoder_attn_layer_norm", f"{ours}.norm_in", width),
        f"{ours}.q.weight": source.take(f"{theirs}.q_proj.weight", width, width),
        f"{ours}.kv.weight": source.fused(f"{theirs}.k_proj", f"{theirs}.v_proj", shape=(width, text_width)),
        f"{ours}.out.weight": source.take(f"{theirs}.out_proj.weight", width, width),
        **source.norm(f"{at}.encoder_attn_layer_norm", f"{ours}.norm_out", width),
    }


def _feed_forward(source: _Tensors, at: str, width: int, glu_width: int) -> dict[str, Tensor]:
    theirs, ours = f"{at}.glu", f"{at}.feed_forward"
    return {
        **source.norm(f"{theirs}.ln0", f"{ours}.norm_in", width),
        f"{ours}.gate_and_value.weight": source.fused(f"{theirs}.fc0", f"{theirs}.fc1", shape=(glu_width, width)),
        **source.norm(f"{theirs}.ln1", f"{ours}.norm_hidden", glu_width),
        f"{ours}.out.weight": source.take(f"{theirs}.fc2.weight", width, glu_width),
    }


def _vqgan(source: _Tensors, config: VQGANConfig) -> dict[str, Tensor]:
    """Tensors of our VQGAN in fp32; it speaks of pixels in [-1, 1] where theirs speaks of [0, 1]."""
    with torch.device("meta"):
        expected = VQGAN(config).state_dict()
    tensors = {}
    for key, value in expected.items():
        tensors[key] = source.take(key.removeprefix("quantizer."), *value.shape).float()
    source.done()
    tensors["decoder.conv_out.weight"] = tensors["decoder.conv_out.weight"] * 2
    tensors["decoder.conv_out.bias"] = tensors["decoder.conv_out.bias"] * 2 - 1
    return tensors


def _tokenizer(folder: Path, rows: int) -> Tokenizer:
    """Tokenizer of a folder, from `vocab.json` and `merges.txt`, else out of `tokenizer.json`."""
    names = ("vocab.json", "merges.txt")
    missing = [folder / name for name in names if not (folder / name).exists()]
    path = folder / "tokenizer.json"
    if missing and not path.exists():
        raise ConvertError(f"{missing[0]} is missing")
    try:
        if not missing:
            return Tokenizer.from_bpe(folder / "vocab.json", folder / "merges.txt", rows)
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        merges = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
        return Tokenizer.from_merges(model["vocab"], merges, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        name = path if missing else " or ".join(str(folder / name) for name in names)
        raise ConvertError(f"{name} is damaged: {error}") from error


def _load_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # not mapped: what is converted is let go
    except FileNotFoundError as error:
        raise ConvertError(f"{path} is missing") from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ConvertError(f"{path} is truncated or damaged, or holds more than tensors: {error}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ConvertError(f"{path} does not hold a dictionary of tensors")
    return dict(tensors)


# What a DALL-E Mini may be configured to and what our modules compute; absent means the same.
FLAX_MUST_BE = {
    "activation_function": "gelu",
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "scale_embedding": False,
    "sinkhorn_iters": 1,
    "tie_word_embeddings": False,
    "use_absolute_position_embeddings": True,
    "use_alibi": False,
    "use_bias": False,
    "use_cosine_attention": False,
    "use_deepnet_scaling": False,
    "use_final_ln_decoder": True,
    "use_final_ln_encoder": True,
    "use_glu": True,
    "use_head_scale": False,
    "use_swin_position_embeddings": False,
}
FLAX_VQGAN_MUST_BE = {"in_channels": 3, "out_ch": 3, "double_z": False, "resamp_with_conv": True, "give_pre_end": False}


def _flax_config(folder: Path, config: DalleConfig) -> DalleConfig:
    """Sizes that the repository's own config.json files tell."""
    model = _FlaxConfig(folder / "config.json", FLAX_MUST_BE)
    vqgan = _FlaxConfig(folder / "vqgan" / "config.json", FLAX_VQGAN_MUST_BE)
    width, vocab = model.size("d_model"), model.size("image_vocab_size")
    return replace(
        config,
        vqgan=VQGANConfig(
            image_size=vqgan.size("resolution"),
            channels=vqgan.size("ch"),
            multipliers=vqgan.sizes("ch_mult"),
            blocks=vqgan.size("num_res_blocks"),
            attention=vqgan.sizes("attn_resolutions"),
            vq_size=vqgan.size("n_embed"),
            vq_dim=vqgan.same("embed_dim", "z_channels"),
            from_zero=True,
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=model.size("encoder_vocab_size"),
            length=model.size("max_text_length"),
            width=width,
            layers=model.size("encoder_layers"),
            heads=model.size("encoder_attention_heads"),
            glu_width=model.size("encoder_ffn_dim"),
            ascii_only=True,
        ),
        image_decoder=ImageDecoderConfig(
            vocab_size=vocab + 1,
            length=model.size("image_length"),
            bos=model.size("decoder_start_token_id", vocab),
            text_width=width,
            width=width,
            layers=model.size("decoder_layers"),
            heads=model.size("decoder_attention_heads"),
            glu_width=model.size("decoder_ffn_dim"),
        ),
    )


class _FlaxConfig:
    """A config.json of whole numbers, checked to ask for nothing that our modules do not compute."""

    def __init__(self, path: Path, must_be: Mapping[str, Any]):
        self.path = path
        try:
            self._values = json.loads(path.read_text(encoding="utf-8"))
            for key, value in must_be.items():
                if self._values.get(key, value) != value:
                    raise ConvertError(f"{path}: {key} is {self._values[key]!r}; only {value!r} can be read")
        except FileNotFoundError as error:
            raise ConvertError(f"{path} is missing") from error
        except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
            raise ConvertError(f"{path} is damaged: {error}") from error

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        return self._checked(key, self._values.get(key, default))

    def sizes(self, key: str) -> tuple[int, ...]:
        """Several of them."""
        values = self._values.get(key)
        return tuple(self._checked(key, value) for value in (values if isinstance(values, list) else [values]))

    def same(self, key: str, other: str) -> int:
        """A size that must go by two names."""
        if self.size(key) != self.size(other):
            raise ConvertError(f"{self.path}: {key} and {other} differ, which cannot be read")
        return self.size(key)

    def _checked(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConvertError(f"{self.path}: {key} is {value!r}, expected a positive whole number")
        return value


def _flax_transformer(path: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors of encoder and decoder under min-dalle's names, from layers that are stacked or not."""
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in _load_msgpack(path).items():
        kernel = name.endswith("/kernel")
        tensor = tensor.transpose(-1, -2) if kernel and tensor.ndim > 1 else tensor
        if name == "lm_head/kernel":
            parts["decoder"]["lm_head.weight"] = tensor
            continue
        found = re.fullmatch(r"model/(encoder|decoder)/(?:layers/FlaxBart(?:En|De)coderLayer(s|_\d+)/)?(.+)", name)
        if found is None:
            raise ConvertError(f"{path}: tensor {name!r} has no place in this model")
        part, layer, leaf = found.groups()
        key = _flax_leaf(leaf)
        if layer is None:
            parts[part][key] = tensor
        elif layer == "s":
            parts[part] |= {f"layers.{i}.{key}": one for i, one in enumerate(tensor)}
        else:
            parts[part][f"layers{layer.replace('_', '.')}.{key}"] = tensor
    return parts


# Flax numbers modules in the order in which they are called.
FLAX_MODULES = {
    "FlaxBartAttention_0": "self_attn",
    "FlaxBartAttention_1": "encoder_attn",
    "GLU_0/LayerNorm_0": "glu.ln0",
    "GLU_0/LayerNorm_1": "glu.ln1",
    "GLU_0/Dense_0": "glu.fc0",
    "GLU_0/Dense_1": "glu.fc1",
    "GLU_0/Dense_2": "glu.fc2",
    "LayerNorm_0": "pre_self_attn_layer_norm",
    "LayerNorm_1": "self_attn_layer_norm",
    "LayerNorm_2": "pre_encoder_attn_layer_norm",
    "LayerNorm_3": "encoder_attn_layer_norm",
}


def _flax_leaf(name: str) -> str:
    """min-dalle's name of a tensor within its layer, or of one outside the layers."""
    for theirs, key in FLAX_MODULES.items():
        if name.startswith(f"{theirs}/"):
            name = key + name.removeprefix(theirs)
            break
    return re.sub(r"/(kernel|scale|embedding)$", "/weight", name).replace("/", ".")


def _flax_vqgan(path: Path) -> dict[str, Tensor]:
    """Tensors of a VQGAN, encoder included, under the names of taming-transformers; min-dalle kept those."""
    tensors = {}
    for name, tensor in _load_msgpack(path).items():
        name = re.sub(r"\b(down|up|block|attn)_(\d+)(?=/)", r"\1/\2", name) if "/mid/" not in name else name
        name = re.sub(r"/(kernel|scale|embedding)$", "/weight", name).removeprefix("quantize/")
        layout = (3, 2, 0, 1) if tensor.ndim == 4 else range(tensor.ndim)  # of a convolution: (h, w, in, out)
        tensors[name.replace("/", ".")] = tensor.permute(*layout)
    return tensors


def _load_msgpack(path: Path) -> dict[str, Tensor]:
    """Tensors of a Flax file, named by their path of keys."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return dict(_leaves(msgpack.unpackb(data, ext_hook=_array, raw=False)))
    except FileNotFoundError as error:
        raise ConvertError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, msgpack.UnpackException) as error:
        raise ConvertError(f"{path} is truncated or damaged: {error}") from error


def _array(code: int, data: bytes) -> Tensor:
    """Flax's extension type 1: shape, type and bytes."""
    if code != 1:
        raise ValueError(f"extension type {code} is not an array")
    shape, kind, values = msgpack.unpackb(data, raw=True)
    if kind.decode() not in TYPES:
        raise ValueError(f"an array holds {kind.decode()}")
    return torch.frombuffer(bytearray(values), dtype=TYPES[kind.decode()]).reshape(shape)


def _leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Tensor]]:
    """Arrays of a tree of dictionaries; those over a gigabyte come in chunks."""
    if isinstance(tree, Tensor):
        yield at, tree
    elif not isinstance(tree, dict):
        raise ValueError(f"{at or 'the file'} is not an array")
    elif "__msgpack_chunked_array__" in tree:
        shape, chunks = ([values[str(i)] for i in range(len(values))] for values in (tree["shape"], tree["chunks"]))
        if sum(chunk.numel() for chunk in chunks) != math.prod(shape):
            raise ValueError(f"chunks of {at} do not fill its shape")
        yield at, torch.cat([chunk.flatten() for chunk in chunks]).reshape(shape)
    else:
        for key, value in tree.items():
            yield from _leaves(value, f"{at}/{key}" if at else key)
