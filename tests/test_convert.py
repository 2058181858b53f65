"""Published files become ours whole, or are refused by the name of the file and the tensor at fault."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import min_dalle_reference as reference
import msgpack
import pytest
import torch
from hub_stub import serving
from test_parity import VQGAN_SIZES, config_of, like_published
from tiny import tiny_config

from dalle_demo import convert as convert_module
from dalle_demo.config import PRESETS, SOURCES
from dalle_demo.convert import ConvertError, convert
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.repos import pull
from dalle_demo.weights import load_dalle

FILES = ("encoder.pt", "decoder.pt", "detoker.pt", "vocab.json", "merges.txt")
FROM_ZERO = dataclasses.replace(VQGAN_SIZES, from_zero=True)
CLASSES = {"vqgan": VQGAN, "text_encoder": TextEncoder, "image_decoder": ImageDecoder}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return reference.folder(tmp_path_factory)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """Copy that may be harmed."""
    for name in FILES:
        shutil.copyfile(original / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def converted(original):
    return convert(original, "min-dalle", config_of(original))


def refuse(folder: Path, form: str, config, *words: str) -> None:
    with pytest.raises(ConvertError) as caught:
        convert(folder, form, config)
    for word in words:
        assert word in str(caught.value)


def change(folder: Path, name: str, edit) -> None:
    tensors = torch.load(folder / name, weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / name)


def test_tensors_are_ours_by_name_shape_type_and_layout(converted, original):
    config = config_of(original)
    assert converted.config == config
    for part, tensors in converted.tensors.items():
        with torch.device("meta"):
            module = CLASSES[part](getattr(config, part))
        assert {key: value.shape for key, value in tensors.items()} == {
            key: value.shape for key, value in module.state_dict().items()
        }
        kind = torch.float32 if part == "vqgan" else torch.float16
        for key, value in tensors.items():
            assert value.dtype == kind, key
            assert value.is_contiguous(), key
            assert value.untyped_storage().nbytes() == value.nbytes, key


def test_source_tensors_are_stacked_views(original):
    """What the test above is worth: the file holds one storage for several tensors, and transposed ones."""
    stored = torch.load(original / "decoder.pt", weights_only=True)
    one = stored["layers.0.self_attn.q_proj.weight"]
    assert not one.is_contiguous()
    assert one.untyped_storage().nbytes() == 2 * one.nbytes
    assert not any(reference.SCALELESS.search(key) for key in stored)


def test_absent_scales_are_ones_and_present_ones_are_kept(folder, converted, original):
    name = "layers.0.glu.ln1.weight"
    ours = "layers.0.feed_forward.norm_hidden.weight"
    assert torch.equal(converted.tensors["image_decoder"][ours], torch.ones(80, dtype=torch.float16))
    scale = torch.arange(80).half()
    change(folder, "decoder.pt", lambda tensors: tensors.update({name: scale}))
    again = convert(folder, "min-dalle", config_of(original))
    assert torch.equal(again.tensors["image_decoder"][ours], scale)


@pytest.mark.parametrize("file", ["encoder.pt", "decoder.pt", "detoker.pt"])
def test_every_tensor_is_needed_and_none_is_left_over(folder, original, file):
    config = config_of(original)
    keys = list(torch.load(folder / file, weights_only=True))
    for key in {keys[0], keys[len(keys) // 2], keys[-1]}:
        change(folder, file, lambda tensors, key=key: tensors.pop(key))
        refuse(folder, "min-dalle", config, file, repr(key), "missing")
        shutil.copyfile(original / file, folder / file)
    change(folder, file, lambda tensors: tensors.update(stranger=torch.zeros(1)))
    refuse(folder, "min-dalle", config, file, "'stranger'")


@pytest.mark.parametrize(
    ("file", "key", "edit", "words"),
    [
        ("encoder.pt", "embed_tokens.weight", lambda t: t[1:], ("(699, 64)", "(700, 64)")),
        ("decoder.pt", "layers.1.glu.fc2.weight", lambda t: t.t(), ("(80, 64)", "(64, 80)")),
        ("detoker.pt", "decoder.up.3.block.0.nin_shortcut.weight", lambda t: t[:, :, 0], ("(64, 128, 1)",)),
        ("decoder.pt", "lm_head.weight", lambda t: t.int(), ("torch.int32",)),
    ],
)
def test_names_a_misshapen_tensor(folder, original, file, key, edit, words):
    change(folder, file, lambda tensors: tensors.update({key: edit(tensors[key])}))
    refuse(folder, "min-dalle", config_of(original), str(folder / file), repr(key), *words)


def test_other_sizes_are_refused(original):
    refuse(original, "min-dalle", PRESETS["mini"], "detoker.pt", "expected")


def test_form_must_be_known(original):
    refuse(original, "onnx", config_of(original), "'onnx'")


@pytest.mark.parametrize("name", FILES)
def test_names_a_missing_file(folder, original, name):
    config = config_of(original)
    (folder / name).unlink()
    refuse(folder, "min-dalle", config, name, "missing")


@pytest.mark.parametrize("name", FILES[:3])
def test_names_a_truncated_file(folder, original, name):
    for size in (0, 100, (folder / name).stat().st_size // 2):
        os.truncate(folder / name, size)
        refuse(folder, "min-dalle", config_of(original), name, "damaged")


def test_runs_no_code_of_a_pickle(folder, original):
    class Command:
        def __reduce__(self):
            return Path.touch, (folder / "executed",)

    torch.save({"embed_tokens.weight": Command()}, folder / "encoder.pt")
    refuse(folder, "min-dalle", config_of(original), "encoder.pt")
    torch.save([torch.zeros(1)], folder / "encoder.pt")
    refuse(folder, "min-dalle", config_of(original), "encoder.pt", "dictionary")
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("vocab.json", "{"), ("vocab.json", '{"a": 0}'), ("merges.txt", "#version\na b c\n"), ("vocab.json", "[]")],
)
def test_names_a_damaged_vocabulary(folder, original, name, text):
    config = config_of(original)
    (folder / name).write_text(text)
    refuse(folder, "min-dalle", config, name)


# ---------------------------------------------------------------- the Flax original


def flax_array(tensor: torch.Tensor, chunk: int | None = None):
    """Array as flax.serialization writes it."""
    if chunk is not None:
        flat = tensor.flatten().split(chunk)
        shape = {str(i): size for i, size in enumerate(tensor.shape)}
        parts = {str(i): flax_array(part) for i, part in enumerate(flat)}
        return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": parts}
    kind = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), kind, data), use_bin_type=True))


def put(tree: dict, path: str, value) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


MODULES = {  # in the order in which dalle-mini's layers call them
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn": "FlaxBartAttention_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn": "FlaxBartAttention_1",
    "encoder_attn_layer_norm": "LayerNorm_3",
    "glu.ln0": "GLU_0/LayerNorm_0",
    "glu.fc0": "GLU_0/Dense_0",
    "glu.fc1": "GLU_0/Dense_1",
    "glu.ln1": "GLU_0/LayerNorm_1",
    "glu.fc2": "GLU_0/Dense_2",
}


def flax_leaf(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Name and layout in Flax of a tensor of PyTorch."""
    stem, kind = key.rsplit(".", 1)
    if kind == "weight" and "embed" in stem.split(".")[-1] and "layernorm" not in stem:
        return f"{stem}/embedding", tensor
    if kind == "weight" and tensor.ndim == 4:
        return f"{stem}/kernel", tensor.permute(2, 3, 1, 0)
    if kind == "weight" and tensor.ndim == 2:
        return f"{stem}/kernel", tensor.t()
    return f"{stem}/{'scale' if kind == 'weight' else kind}", tensor


def flax_transformer(folder: Path, scanned: bool, pack) -> dict:
    """Tree of parameters with the numbers of min-dalle's files."""
    tree: dict = {}
    for part in ("encoder", "decoder"):
        stored = torch.load(folder / f"{part}.pt", weights_only=True)
        layers: dict[str, list] = {}
        for key, tensor in stored.items():
            found = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
            name, value = flax_leaf(found[2] if found else key, tensor)
            if found is None:
                at = name if part == "decoder" and name.startswith("lm_head") else f"model/{part}/{name}"
                put(tree, at, pack(value))
                continue
            module = max((m for m in MODULES if re.match(rf"{re.escape(m)}[./]", name)), key=len)
            name = MODULES[module] + name.removeprefix(module).replace(".", "/")
            layers.setdefault(name, []).append(value)
        kind = f"model/{part}/layers/FlaxBart{part.capitalize()}Layer"
        for name, values in layers.items():
            if scanned:
                put(tree, f"{kind}s/{name}", pack(torch.stack(values)))
            else:
                for i, value in enumerate(values):
                    put(tree, f"{kind}_{i}/{name}", pack(value))
    return tree


def flax_vqgan(vqgan: VQGAN) -> dict:
    tree: dict = {}
    for key, tensor in vqgan.state_dict().items():
        name, value = flax_leaf(key.replace("quantizer.", "quantize."), tensor)
        name = re.sub(r"\b(down|up)\.(\d+)\.", r"\1_\2.", name)
        name = re.sub(r"\.(block|attn)\.(\d+)\b", r".\1_\2", name)
        put(tree, name.replace(".", "/"), flax_array(value))
    return tree


@pytest.fixture(scope="module")
def published_vqgan() -> VQGAN:
    """VQGAN as the Flax repository has it: pixels in [0, 1] on both sides."""
    torch.manual_seed(5)
    vqgan = VQGAN(VQGAN_SIZES).eval().requires_grad_(False)
    vqgan.quantizer.embedding.weight.normal_()
    return vqgan


@pytest.fixture
def flax_folder(original, published_vqgan, tmp_path) -> Path:
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(original / name, tmp_path / name)
    config, sizes = config_of(original), reference.SIZES
    (tmp_path / "vqgan").mkdir()
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "d_model": sizes["width"],
                "encoder_layers": sizes["layers"],
                "decoder_layers": sizes["layers"],
                "encoder_attention_heads": sizes["heads"],
                "decoder_attention_heads": sizes["heads"],
                "encoder_ffn_dim": sizes["glu_width"],
                "decoder_ffn_dim": sizes["glu_width"],
                "encoder_vocab_size": config.text_encoder.vocab_size,
                "image_vocab_size": sizes["image_vocab"],
                "image_length": 256,
                "max_text_length": 64,
                "decoder_start_token_id": 16384,
                "use_scan": True,
                "normalize_text": True,
                "scale_embedding": False,
            }
        )
    )
    (tmp_path / "vqgan" / "config.json").write_text(
        json.dumps(
            {
                "ch": 32,
                "ch_mult": [1, 1, 2, 2, 4],
                "num_res_blocks": 2,
                "attn_resolutions": [16],
                "resolution": 256,
                "z_channels": 64,
                "embed_dim": 64,
                "n_embed": 16384,
                "double_z": False,
            }
        )
    )
    write_flax(tmp_path, flax_transformer(original, scanned=True, pack=flax_array))
    write_flax(tmp_path / "vqgan", flax_vqgan(published_vqgan))
    return tmp_path


def write_flax(folder: Path, tree: dict) -> None:
    (folder / "flax_model.msgpack").write_bytes(msgpack.packb(tree, use_bin_type=True))


def test_flax_gives_the_tensors_that_min_dalle_gives(flax_folder, converted, original):
    """The sizes come from its config.json, whatever preset is asked for."""
    found = convert(flax_folder, "flax", PRESETS["mega"])
    assert found.config.text_encoder == converted.config.text_encoder
    assert found.config.image_decoder == converted.config.image_decoder
    assert found.config.vqgan == FROM_ZERO
    assert found.config.defaults == PRESETS["mega"].defaults
    for part in ("text_encoder", "image_decoder"):
        assert found.tensors[part].keys() == converted.tensors[part].keys()
        for key, value in converted.tensors[part].items():
            assert torch.equal(found.tensors[part][key], value), key
            assert found.tensors[part][key].is_contiguous(), key


@pytest.mark.parametrize(
    ("scanned", "pack"),
    [
        (False, flax_array),
        (True, lambda tensor: flax_array(tensor.float())),
        (True, lambda tensor: flax_array(tensor, chunk=1000)),
        (False, lambda tensor: flax_array(tensor.bfloat16())),
    ],
    ids=["unscanned", "float32", "chunked", "bfloat16"],
)
def test_flax_layouts_and_types(flax_folder, converted, original, scanned, pack):
    write_flax(flax_folder, flax_transformer(original, scanned, pack))
    found = convert(flax_folder, "flax", PRESETS["mini"]).tensors["image_decoder"]
    kind = found["lm_head.weight"].dtype
    for key, value in converted.tensors["image_decoder"].items():
        assert torch.equal(found[key], value.to(kind)), key


def test_flax_vqgan_speaks_of_pixels_between_minus_one_and_one(flax_folder, published_vqgan):
    """dalle-mini encoded pixels in [0, 1]; ours are the same tokens, to the border."""
    vqgan = VQGAN(FROM_ZERO).eval()
    vqgan.load_state_dict(convert(flax_folder, "flax", PRESETS["mini"]).tensors["vqgan"], strict=True)
    for module in (vqgan, published_vqgan):
        like_published(module, eps=1e-6)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(vqgan.encode(pixels), published_vqgan.encode((pixels + 1) / 2))
    tokens = torch.arange(256).view(1, 16, 16)
    found, theirs = (module.decode(module.lookup(tokens)) for module in (vqgan, published_vqgan))
    torch.testing.assert_close((found + 1) / 2, theirs, atol=1e-4, rtol=1e-4)


def test_flax_tokenizer_may_be_in_one_file(flax_folder):
    """As Hugging Face's fast tokenizers have it; its own rules for words are not those of DALL-E Mini."""
    before = convert(flax_folder, "flax", PRESETS["mini"]).tokenizer
    vocab = json.loads((flax_folder / "vocab.json").read_text())
    merges = (flax_folder / "merges.txt").read_text().split("\n")[1:-1]
    for name in ("vocab.json", "merges.txt"):
        (flax_folder / name).unlink()
    refuse(flax_folder, "flax", PRESETS["mini"], "vocab.json", "missing")
    for form in (merges, [line.split() for line in merges]):
        (flax_folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab, "merges": form}}))
        after = convert(flax_folder, "flax", PRESETS["mini"]).tokenizer
        assert after.encode(reference.PROMPT, 64) == before.encode(reference.PROMPT, 64)


def test_flax_is_pulled_with_the_encoder(flax_folder, converted, monkeypatch):
    """The whole way from two repositories, of which one is held to its commit, to a model that reads pictures."""
    source = SOURCES["mini-flax"]
    with serving(flax_folder, monkeypatch) as stub:
        commit = stub.put(source.repo, {path.name: path for path in flax_folder.glob("*.*")})
        published = {path.name: path for path in (flax_folder / "vqgan").iterdir()}
        stub.put(source.vqgan.repo, published, source.vqgan.revision)
        stub.put(source.vqgan.repo, {})
        folder = pull("mini-flax")
        stub.requests.clear()
        assert pull("mini-flax") == folder
        model = load_dalle("mini-flax")
        assert stub.requests == []
    assert model.name == "mini-flax"
    assert model.config.vqgan == FROM_ZERO
    assert model.config.image_decoder == converted.config.image_decoder
    assert model.config.defaults == PRESETS["mini"].defaults
    assert model.vqgan.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 256)
    card = (folder / "README.md").read_text()
    for word in (source.repo, commit, source.vqgan.repo, source.vqgan.revision, "license: apache-2.0"):
        assert word in card


@pytest.mark.parametrize("where", [".", "vqgan"])
def test_flax_names_a_damaged_file(flax_folder, where):
    path = flax_folder / where / "flax_model.msgpack"
    data = path.read_bytes()
    for damaged in (b"", b"\xc1", data[:1000], data[: len(data) // 2], msgpack.packb([1]), msgpack.packb({"a": 1})):
        path.write_bytes(damaged)
        refuse(flax_folder, "flax", PRESETS["mini"], str(path))
    bad_arrays = [(2, ([1], "float32", bytes(4))), (1, ([2], "float32", bytes(4))), (1, ([1], "object", bytes(8)))]
    for code, content in bad_arrays:
        path.write_bytes(msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb(content))}))
        refuse(flax_folder, "flax", PRESETS["mini"], str(path), "damaged")
    path.unlink()
    refuse(flax_folder, "flax", PRESETS["mini"], str(path), "missing")


def test_flax_names_a_stranger(flax_folder, original):
    tree = flax_transformer(original, scanned=True, pack=flax_array)
    put(tree, "model/decoder/layers/FlaxBartDecoderLayers/Bias_0/bias", flax_array(torch.zeros(2, 64)))
    write_flax(flax_folder, tree)
    refuse(flax_folder, "flax", PRESETS["mini"], "flax_model.msgpack", "Bias_0")


@pytest.mark.parametrize("key", sorted(convert_module.FLAX_MUST_BE))
def test_flax_variants_that_we_do_not_compute_are_refused(flax_folder, key):
    path = flax_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "other"}))
    refuse(flax_folder, "flax", PRESETS["mini"], str(path), key)


@pytest.mark.parametrize("value", [None, 0, "64", True, 1.5])
def test_flax_sizes_must_be_numbers(flax_folder, value):
    path = flax_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_model": value}))
    refuse(flax_folder, "flax", PRESETS["mini"], str(path), "d_model")


def test_other_vqgans_are_refused(original):
    config = config_of(original)
    refuse(
        original, "min-dalle", type(config)(tiny_config().vqgan, config.text_encoder, config.image_decoder), "detoker"
    )
