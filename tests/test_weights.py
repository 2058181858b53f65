"""A checkpoint is whole or refused, by the name of the file at fault; and writing one never harms the old one."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, save_random, save_tiny, save_tiny_clip, save_tiny_unclip, tiny_config, tiny_unclip_config

from dalle_demo import checkpoints, weights
from dalle_demo.checkpoints import WeightsError, load_part, load_tokenizer, save_parts, tensor_hash
from dalle_demo.config import CLIP_PARTS, CLIP_PRESET, PARTS, UNCLIP_PARTS, UnclipConfig
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import Tokenizer
from dalle_demo.weights import assemble_unclip, check, is_unclip, load_clip, load_dalle, load_unclip

TENSOR = "image_decoder.norm_final.weight"


@pytest.fixture
def folder(nano_folder, tmp_path) -> Path:
    """Checkpoint that may be harmed."""
    return Path(shutil.copytree(nano_folder, tmp_path / "copy"))


def refuse(folder: Path, *words: str, load=load_dalle) -> str:
    """Message of the WeightsError that loading raises; it must hold these words."""
    with pytest.raises(WeightsError) as caught:
        load(str(folder))
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def edit_tensors(folder: Path, change, rehash: bool) -> None:
    """Change the stored tensors; with `rehash`, as by someone who keeps config.json in step."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    if rehash:
        for part in {key.split(".")[0] for key in tensors} & checkpoints.CLASSES.keys():
            found = tensor_hash(checkpoints.StoredPart(path, part))
            edit_config(folder, lambda meta, part=part, found=found: meta["sha256"].update({part: found}))


def test_round_trip_keeps_every_number(tmp_path):
    torch.manual_seed(3)
    config = tiny_config(quantizer="vq", levels=(), vq_size=40, vq_dim=8).vqgan
    before = VQGAN(config)
    save_parts(tmp_path / "new" / "deep", {"vqgan": config}, {"vqgan": before})
    after = load_part(tmp_path / "new" / "deep", "vqgan")
    assert list(after.state_dict()) == list(before.state_dict())
    for key, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[key], value.half().float()), key
    assert not after.training
    assert all(parameter.dtype == torch.float32 and not parameter.requires_grad for parameter in after.parameters())
    assert not any(value.is_meta for value in after.state_dict().values())
    assert {path.name for path in (tmp_path / "new" / "deep").iterdir()} == {"config.json", "model.safetensors"}


def test_loads_what_was_saved(nano_folder):
    model = load_dalle(str(nano_folder))
    assert model.config == tiny_config()
    assert model.name == nano_folder.name
    assert model.tokenizer.encode(WORDS[0], 50) == load_tokenizer(nano_folder).encode(WORDS[0], 50)
    stored = load_file(nano_folder / "model.safetensors")
    for part in PARTS:
        for key, value in getattr(model, part).state_dict().items():
            assert torch.equal(value, stored.pop(f"{part}.{key}").float())
    assert stored == {}


def test_saving_twice_gives_the_same_files(tmp_path):
    one, other = (save_tiny(tmp_path / name, tiny_config()) for name in ("one", "other"))
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_sizes_come_from_the_file_and_not_from_a_preset(tmp_path):
    config = tiny_config(channels=8)
    assert load_dalle(str(save_tiny(tmp_path / "a", config))).config == config


@pytest.mark.parametrize("rehash", [False, True], ids=["as found", "with fresh hashes"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop(TENSOR),
        lambda tensors: tensors.update({"image_decoder.extra.weight": torch.zeros(2)}),
        lambda tensors: tensors.update({TENSOR: torch.zeros(7, dtype=torch.float16)}),
        lambda tensors: tensors.update({TENSOR: torch.zeros(1, 48, dtype=torch.float16)}),
        lambda tensors: tensors.update({TENSOR + "s": tensors.pop(TENSOR)}),
    ],
    ids=["missing", "extra", "misshapen", "one axis more", "renamed"],
)
def test_wrong_tensors(folder, change, rehash):
    edit_tensors(folder, change, rehash)
    message = refuse(folder, "model.safetensors")
    if rehash:  # then the tensors themselves are compared, and the culprit has a name
        assert "norm_final.weight" in message or "extra.weight" in message


@pytest.mark.parametrize("name", ["upscaler.weight", "weight", "vqgan2.conv_in.weight"])
def test_tensors_of_no_part(folder, name):
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}), rehash=True)
    refuse(folder, "model.safetensors", name)


@pytest.mark.parametrize("part", PARTS)
def test_changed_number(folder, part):
    def change(tensors):
        key = next(key for key in tensors if key.startswith(part))
        tensors[key].view(-1)[0] += 1

    edit_tensors(folder, change, rehash=False)
    refuse(folder, "model.safetensors", part, "sha256")


def test_changed_type(folder):
    """The same numbers in another format are another file than the one that was written."""
    edit_tensors(folder, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].float()}), rehash=False)
    refuse(folder, "model.safetensors")


@pytest.mark.parametrize("share", [0, 0.0001, 0.5, 0.999])
def test_truncated_file(folder, share):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refuse(folder, "model.safetensors")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    refuse(folder, name, str(folder))


def test_edited_tokenizer(folder):
    """Ids would mean other words than those that were trained."""
    Tokenizer.train(["something else entirely"], 300).save(folder / "tokenizer.json")
    refuse(folder, "tokenizer", "sha256")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}'])
def test_damaged_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    refuse(folder, "tokenizer.json", str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"text"', "{}", '{"format": 1}', '{"format": 1, "parts": []}'])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refuse(folder, "config.json", str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.update(format=2),
        lambda meta: meta["parts"]["vqgan"].update(colour=3),
        lambda meta: meta["parts"]["vqgan"].pop("channels"),
        lambda meta: meta["parts"].update(vqgan=None),
        lambda meta: meta.update(sha256={}),
        lambda meta: meta.pop("sha256"),
        lambda meta: meta["sha256"].pop("tokenizer"),
        lambda meta: meta["parts"]["image_decoder"].update(width=64),
    ],
    ids=[
        "format",
        "unknown key",
        "missing key",
        "no part",
        "no hashes",
        "no table",
        "no tokenizer hash",
        "other width",
    ],
)
def test_wrong_config(folder, change):
    edit_config(folder, change)
    refuse(folder, "config.json", str(folder))


def test_parts_trained_apart_do_not_mix(folder, tmp_path):
    """A decoder writes tokens of one tokenizer of pictures; with another it would draw noise."""
    torch.manual_seed(9)
    config = tiny_config()
    save_parts(tmp_path / "other", {"vqgan": config.vqgan}, {"vqgan": VQGAN(config.vqgan)})
    other = {key: value for key, value in load_file(tmp_path / "other" / "model.safetensors").items()}
    edit_tensors(folder, lambda tensors: tensors.update(other), rehash=False)
    refuse(folder, "vqgan")


def test_vqgan_alone_is_no_dalle(tmp_path):
    config = tiny_config().vqgan
    save_parts(tmp_path, {"vqgan": config}, {"vqgan": VQGAN(config)})
    refuse(tmp_path, "config.json", "text_encoder", "not a complete DALL-E")
    with pytest.raises(WeightsError, match="text_encoder"):
        load_part(tmp_path, "text_encoder")


def test_unknown_preset_names_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text("{}")
    refuse(Path("gigantic"), "gigantic", "small", "config.json")


def test_presets_are_found_beside_the_package(nano_folder, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", nano_folder.parent)
    assert weights.find(nano_folder.name) == nano_folder
    assert load_dalle(nano_folder.name).name == nano_folder.name


def save_again(folder: Path, tokenizer: Path) -> None:
    """Write other weights and another tokenizer over a checkpoint."""
    config = tiny_config()
    parts = {name: getattr(config, name) for name in PARTS}
    torch.manual_seed(77)
    modules = {name: checkpoints.CLASSES[name](value) for name, value in parts.items()}
    save_parts(folder, parts, modules, tokenizer)


@pytest.mark.parametrize("culprit", ["save_file", "write_text"])
def test_a_failed_save_leaves_the_old_checkpoint(folder, tmp_path, monkeypatch, culprit):
    before = load_dalle(str(folder))
    Tokenizer.train(["quite another vocabulary"], 290).save(tmp_path / "new.json")

    def fail(first, second, *_, **__):
        target = second if culprit == "save_file" else first
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoints, "save_file", fail) if culprit == "save_file" else (Path, "write_text", fail)))
        with pytest.raises(OSError, match="No space"):
            save_again(folder, tmp_path / "new.json")
    after = load_dalle(str(folder))
    for part in PARTS:
        for key, value in getattr(before, part).state_dict().items():
            assert torch.equal(getattr(after, part).state_dict()[key], value)


def test_nothing_has_its_name_before_it_is_on_the_disk(folder, tmp_path, monkeypatch):
    """After a loss of power too: what weights were converted from is deleted once they have their name."""
    before = load_dalle(str(folder)).sha256
    Tokenizer.train(["quite another vocabulary"], 290).save(tmp_path / "new.json")
    synced, sync = [], os.fsync

    def fail_last(number: int) -> None:
        synced.append(number)
        if len(synced) == 3:
            raise OSError("No space left on device")
        sync(number)

    monkeypatch.setattr(checkpoints.os, "fsync", fail_last)
    with pytest.raises(OSError, match="No space"):
        save_again(folder, tmp_path / "new.json")
    assert load_dalle(str(folder)).sha256 == before


def test_a_later_save_cleans_up(folder, tmp_path):
    for name in ("model.safetensors.part", "config.json.part"):
        (folder / name).write_text("left by a run that was killed")
    Tokenizer.train(["quite another vocabulary"], 290).save(tmp_path / "new.json")
    save_again(folder, tmp_path / "new.json")
    load_dalle(str(folder))
    assert not list(folder.glob("*.part"))


def test_saving_over_its_own_tokenizer(folder):
    save_again(folder, folder / "tokenizer.json")
    load_dalle(str(folder))


# CLIP and DALL-E 2


@pytest.fixture
def pair(shipped, tmp_path) -> Path:
    """A DALL-E 2 that may be harmed, and its CLIP beside it."""
    return Path(shutil.copytree(shipped, tmp_path / "pair")) / "unclip-nano"


def test_loads_a_clip_as_it_was_saved(shipped):
    clip, config = load_clip(str(shipped / CLIP_PRESET)), tiny_unclip_config()
    assert (clip.name, clip.config, clip.text_config) == (CLIP_PRESET, config.clip, config.text_encoder)
    assert clip.sha256 == checkpoints.stored_hash(shipped / CLIP_PRESET, "clip")
    stored = load_file(shipped / CLIP_PRESET / "model.safetensors")
    for part in CLIP_PARTS:
        for key, value in getattr(clip, part).state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, stored.pop(f"{part}.{key}").float())
    assert stored == {}


def test_loads_a_dalle_2_as_it_was_saved_but_for_the_discriminator(shipped):
    model = load_unclip(str(shipped / "unclip-nano"))
    assert (model.name, model.config, model.clip.name) == ("unclip-nano", tiny_unclip_config(), CLIP_PRESET)
    stored = load_file(shipped / "unclip-nano" / "model.safetensors")
    for part in weights.DRAWING_PARTS:
        module = getattr(model, part)
        assert not module.training
        for key, value in module.state_dict().items():
            assert torch.equal(value, stored.pop(f"{part}.{key}").float())
    assert {key.split(".")[0] for key in stored} == {"discriminator"}  # which fine-tuning goes on with
    load_part(shipped / "unclip-nano", "discriminator")


@pytest.mark.parametrize("rehash", [False, True], ids=["as found", "with fresh hashes"])
@pytest.mark.parametrize(
    ("name", "key"),
    [("unclip-nano", "prior.norm_out.weight"), ("unclip-nano", "vae.conv.weight"), (CLIP_PRESET, "clip.log_scale")],
)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen", "changed"])
def test_wrong_tensors_of_a_dalle_2(pair, name, key, change, rehash):
    def edit(tensors):
        key_here = key if key in tensors else next(other for other in tensors if other.startswith(key.split(".")[0]))
        if change == "missing":
            del tensors[key_here]
        elif change == "extra":
            tensors[f"{key.split('.')[0]}.more"] = torch.zeros(2)
        elif change == "misshapen":
            tensors[key_here] = torch.zeros(3, 3, dtype=torch.float16)
        else:
            tensors[key_here] = tensors[key_here] + 1

    folder = pair.parent / name
    edit_tensors(folder, edit, rehash)
    if (change, rehash) == ("changed", True):
        if name == CLIP_PRESET:  # another one than that of the training
            refuse(pair, "config.json", CLIP_PRESET, "sha256", load=load_unclip)
        return
    refuse(pair, str(folder / "model.safetensors"), load=load_unclip)


@pytest.mark.parametrize(
    "path",
    [
        "unclip-nano/config.json",
        "unclip-nano/model.safetensors",
        f"{CLIP_PRESET}/model.safetensors",
        f"{CLIP_PRESET}/tokenizer.json",
    ],
)
def test_missing_file_of_a_dalle_2(pair, path):
    (pair.parent / path).unlink()
    refuse(pair, path.split("/")[1], load=load_unclip)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (
            lambda meta: meta["parts"].pop("prior"),
            "prior, only vae, generator, noise_encoder, discriminator; it is not a complete DALL-E 2",
        ),
        (lambda meta: meta.pop("clip"), "which CLIP it was trained with"),
        (lambda meta: meta.update(clip="clip-nano"), "which CLIP it was trained with"),
        (lambda meta: meta["clip"].update(sha256="0" * 64), "000000000000…"),
        (lambda meta: meta["clip"].update(name="clip-giant"), "unclip-nano needs clip-giant: no weights at"),
        (lambda meta: meta["defaults"].update(temperature=1), "temperature"),
        (lambda meta: meta["defaults"].update(truncation=2), "truncation"),
    ],
)
def test_wrong_config_of_a_dalle_2(pair, change, word):
    edit_config(pair, change)
    refuse(pair, word, load=load_unclip)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: dataclasses.replace(config, prior=dataclasses.replace(config.prior, embed_dim=16)),
        lambda config: dataclasses.replace(config, generator=dataclasses.replace(config.generator, embed_dim=16)),
        lambda config: dataclasses.replace(config, generator=dataclasses.replace(config.generator, latent_dim=5)),
        lambda config: dataclasses.replace(config, vae=dataclasses.replace(config.vae, image_size=64)),
    ],
    ids=["prior", "generator", "latents", "grid"],
)
def test_parts_of_other_sizes_do_not_draw_together(shipped, tmp_path, change):
    config: UnclipConfig = change(tiny_unclip_config())
    shutil.copytree(shipped / CLIP_PRESET, tmp_path / CLIP_PRESET)
    save_tiny_unclip(tmp_path / "odd", config, tmp_path / CLIP_PRESET)
    refuse(tmp_path / "odd", "config.json", "do not fit each other", load=load_unclip)


def test_a_noise_encoder_of_another_generator_does_not_draw_with_it(shipped, tmp_path):
    clip = Path(shutil.copytree(shipped / CLIP_PRESET, tmp_path / CLIP_PRESET))
    config = tiny_unclip_config()
    parts = {part: getattr(config, part, config.generator) for part in UNCLIP_PARTS}
    parts["noise_encoder"] = dataclasses.replace(config.generator, noise_dim=8)
    named = {"name": CLIP_PRESET, "sha256": checkpoints.stored_hash(clip, "clip")}
    save_random(tmp_path / "odd", parts, clip=named)
    refuse(tmp_path / "odd", "config.json", "do not fit each other", load=load_unclip)


def test_the_clip_beside_a_model_goes_before_one_of_its_name(pair, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(weights, "SHIPPED", elsewhere)
    before = load_unclip(str(pair)).clip.sha256
    shutil.move(pair.parent / CLIP_PRESET, elsewhere / CLIP_PRESET)
    assert load_unclip(str(pair)).clip.sha256 == before  # by its name
    shutil.rmtree(elsewhere)
    refuse(pair, "unclip-nano needs clip-nano", "not here", load=load_unclip)


def test_each_kind_of_weights_is_loaded_as_what_it_is(pair, nano_folder):
    assert is_unclip(str(pair))
    assert not is_unclip(str(nano_folder))
    assert not is_unclip(str(pair.parent / CLIP_PRESET))
    for folder in (pair, nano_folder, pair.parent / CLIP_PRESET):
        check(folder)
    refuse(pair, "describes no vqgan, only vae, ", "; it is not a complete DALL-E model")
    refuse(pair.parent / CLIP_PRESET, "describes no vqgan, only text_encoder, clip; it is not a complete DALL-E model")
    refuse(nano_folder, "it is not a complete DALL-E 2 model", load=load_unclip)
    refuse(
        nano_folder,
        "describes no clip, only vqgan, text_encoder, image_decoder; it is not a complete CLIP model",
        load=load_clip,
    )
    for name in ("unclip-nano", CLIP_PRESET):
        edit_tensors(pair.parent / name, lambda tensors: tensors.popitem(), rehash=False)
        with pytest.raises(WeightsError):
            check(pair.parent / name)


def save_runs(folder: Path) -> dict[str, Path]:
    """Weights folders of the stages `prior` and `unclip`, and a CLIP."""
    config = tiny_unclip_config()
    parts = {part: getattr(config, part, config.generator) for part in UNCLIP_PARTS}
    prior = {"prior": parts.pop("prior")}
    return {
        "prior": save_random(folder / "prior" / "weights", prior),
        "unclip": save_random(folder / "unclip" / "weights", parts),
        "clip": save_tiny_clip(folder / "out" / CLIP_PRESET, config),
    }


def test_assembles_what_the_stages_have_trained(tmp_path):
    runs, out = save_runs(tmp_path), tmp_path / "out" / "made"
    assemble_unclip(**runs, out=out, defaults={"truncation": 0.5})
    model = load_unclip(str(out))
    assert model.config == dataclasses.replace(tiny_unclip_config(), defaults={"truncation": 0.5})
    assert model.clip.sha256 == load_clip(str(runs["clip"])).sha256
    stored = {}
    for name in ("prior", "unclip"):
        stored |= load_file(runs[name] / "model.safetensors")
    made = load_file(out / "model.safetensors")
    in_bytes = {key for key, value in stored.items() if not key.startswith("vae.") and value.ndim > 1}
    assert made.keys() == stored.keys() | {f"{key}:scale" for key in in_bytes}
    assert {key for key, value in made.items() if value.dtype == torch.int8} == in_bytes
    for key in stored.keys() - in_bytes:
        assert made[key].dtype == stored[key].dtype
        assert torch.equal(made[key], stored[key])
    for key in in_bytes:
        part, _, name = key.partition(".")
        value, read = stored[key].flatten(1).float(), load_part(out, part).state_dict()[name].flatten(1)
        assert made[f"{key}:scale"].numel() == len(value)
        assert (made[key].flatten(1).abs().amax(1) == 127).all()
        assert ((read - value).abs() <= 0.6 * value.abs().amax(1, keepdim=True) / 127).all()


def test_what_is_in_bytes_is_whole_or_refused(tmp_path):
    runs, out = save_runs(tmp_path), tmp_path / "out" / "made"
    assemble_unclip(**runs, out=out, defaults={})
    scale = "generator.spread.weight:scale"
    edit_tensors(out, lambda tensors: tensors.update({scale: 2 * tensors[scale]}), rehash=False)
    refuse(out, "its generator has sha256", load=load_unclip)
    edit_tensors(out, lambda tensors: tensors.update({scale: tensors[scale][:1]}), rehash=True)
    refuse(out, "generator.spread.weight:scale is (1, 1), expected no such tensor", load=load_unclip)


def test_a_row_of_zeros_stays_one_in_bytes():
    state = {"rows": torch.tensor([[0.0, 0.0], [0.51, -1.0]]), "bias": torch.ones(2)}
    stored = checkpoints.in_bytes(state)
    assert torch.equal(stored["bias"], state["bias"])
    torch.testing.assert_close(stored["rows"] * stored["rows:scale"].float(), state["rows"], atol=0.005, rtol=0)


@pytest.mark.parametrize("culprit", ["prior", "unclip", "clip"])
def test_assembles_nothing_from_damaged_weights(tmp_path, culprit):
    runs, out = save_runs(tmp_path), tmp_path / "out" / "made"
    path = runs[culprit] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        assemble_unclip(**runs, out=out, defaults={})
    assert not out.exists()


def test_the_name_of_a_dalle_2_is_of_all_that_draws(pair):
    """Another prior draws other pictures, another discriminator does not."""
    before = load_unclip(str(pair)).sha256
    edit_tensors(pair, lambda tensors: tensors["discriminator.out.weight"].add_(1), rehash=True)
    assert load_unclip(str(pair)).sha256 == before
    edit_tensors(pair, lambda tensors: tensors["prior.norm_out.weight"].add_(1), rehash=True)
    assert load_unclip(str(pair)).sha256 != before


@pytest.mark.parametrize("name", ["unclip-nano", CLIP_PRESET])
def test_weights_of_a_checkout_that_are_not_here_are_not_offered_for_download(tmp_path, monkeypatch, name):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    assert "pull" not in refuse(Path(name), f"the weights of {name} are not here; a checkout", load=load_unclip)
