"""What the DALL-E 2 engine promises: seeds to the bit, settings that arrive, pictures that come back."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dalle_demo import engines, mixing
from dalle_demo.checkpoints import CLASSES
from dalle_demo.config import CLIP_PARTS, MAX_SEED, UNCLIP_PRESETS, GenerateParams, UnclipParams
from dalle_demo.engines import CHUNK, DalleEngine, UnclipEngine, engine_for, engine_of, in_chunks
from dalle_demo.images import from_pil, to_pil
from dalle_demo.text import PAD
from dalle_demo.weights import DRAWING_PARTS, Clip, Unclip

PROMPT = "a red apple"


def draw(engine: UnclipEngine, prompt: str = PROMPT, **settings) -> list[bytes]:
    """Pixels of the finished pictures."""
    (last,) = engine.generate(UnclipParams(prompt, **settings))
    return [picture.tobytes() for picture in last.images]


@pytest.fixture(scope="module")
def nano_sized(unclip) -> UnclipEngine:
    """Random weights in the sizes that are shipped, where matrix products take other code paths than in tiny ones."""
    torch.manual_seed(4)
    config = UNCLIP_PRESETS["unclip-nano"]
    made = {part: CLASSES[part](getattr(config, part, config.generator)) for part in (*CLIP_PARTS, *DRAWING_PARTS)}
    for part in made.values():
        part.eval().requires_grad_(False)
    towers = [made.pop(part) for part in CLIP_PARTS]
    clip = Clip("random", "0" * 64, config.text_encoder, config.clip, unclip.model.clip.tokenizer, *towers)
    return UnclipEngine(Unclip("random", "0" * 64, config, clip, **made))


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "candidates": 3, "truncation": 0.5}], ids=str)
def test_picture_i_is_the_only_picture_of_seed_plus_i(unclip, settings):
    alone = [draw(unclip, n=1, seed=7 + i, **settings)[0] for i in range(9)]
    assert len(set(alone)) == 9
    for n in (2, 4, 5, 9):
        assert draw(unclip, n=n, seed=7, **settings) == alone[:n]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_in_the_sizes_that_are_shipped(nano_sized, monkeypatch, threads):
    monkeypatch.setattr(nano_sized, "threads", threads)
    settings = {"guidance_scale": 2.0}
    alone = [draw(nano_sized, n=1, seed=5 + i, **settings)[0] for i in range(6)]
    assert len(set(alone)) == 6
    for n in (3, 6):
        assert draw(nano_sized, n=n, seed=5, **settings) == alone[:n]


def test_every_call_of_a_model_is_of_one_size(unclip, monkeypatch):
    seen = []
    original = unclip._pixels
    monkeypatch.setattr(unclip, "_pixels", lambda e, z: (seen.append((len(e), len(z))), original(e, z))[1])
    for n in (1, 4, 6):
        draw(unclip, n=n, seed=1)
    unclip.draw(torch.zeros(2, 32), torch.zeros(2, 16))
    assert set(seen) == {(CHUNK, CHUNK)}
    assert len(seen) == 1 + 1 + 2 + 1


def test_chunks_are_filled_up_and_cut_again():
    rows = torch.arange(10.0)[:, None]
    assert torch.equal(in_chunks(lambda a, b: a + b, rows, 2 * rows), 3 * rows)


def reference(engine: UnclipEngine, params: UnclipParams, seed: int) -> Image.Image:
    """One picture, by hand: the prior's path with guidance, the nearest candidate, one pass of the generator."""
    model, config = engine.model, engine.config
    ids = model.clip.tokenizer.batch([params.prompt], config.text_encoder.length)
    mask = ids != PAD
    text = model.clip.clip.encode_text(model.clip.text_encoder(ids, mask), mask)
    generator = torch.Generator().manual_seed(2**31 + seed)
    starts = torch.randn(params.candidates, config.prior.embed_dim, generator=generator)
    best, nearest = None, -2.0
    for x in params.truncation * starts[:, None]:
        for i in range(config.prior.steps):
            time = torch.tensor([i / config.prior.steps])
            blind = model.prior(x, time, torch.zeros_like(text))
            x = x + (blind + params.guidance_scale * (model.prior(x, time, text) - blind)) / config.prior.steps
        embedding = x / x.norm()
        if (near := F.cosine_similarity(embedding, text).item()) > nearest:
            best, nearest = embedding, near
    noise = torch.randn(config.generator.noise_dim, generator=torch.Generator().manual_seed(seed))
    return to_pil(model.vae.decode(model.generator(params.truncation * noise[None], best)))[0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"guidance_scale": 4.0}, {"truncation": 0.3}, {"candidates": 1}, {"candidates": 5, "guidance_scale": 2.0}],
    ids=str,
)
def test_draws_what_is_drawn_step_by_step(unclip, settings):
    params = UnclipParams("一只小狗", n=2, seed=11, **settings)
    (last,) = unclip.generate(params)
    for picture, seed in zip(last.images, last.seeds, strict=True):
        with torch.inference_mode():
            expected = np.asarray(reference(unclip, params, seed), int)
        assert np.abs(np.asarray(picture, int) - expected).max() <= 2  # of 255, for rounding in another batch


@pytest.mark.parametrize(
    ("field", "value"), [("guidance_scale", 6.0), ("truncation", 0.2), ("candidates", 9), ("seed", 9)]
)
def test_every_setting_changes_the_pictures(unclip, field, value):
    settings = {"n": 4, "seed": 1}
    assert draw(unclip, **settings) != draw(unclip, **(settings | {field: value}))


def test_prompts_draw_different_pictures(unclip):
    prompts = ["a red apple", "a house, flat style", "一只小狗", "🍕"]
    assert len({draw(unclip, prompt, n=1, seed=1)[0] for prompt in prompts}) == len(prompts)


def test_without_noise_all_seeds_draw_one_picture(unclip):
    assert len(set(draw(unclip, n=3, seed=1, truncation=0))) == 1


def test_prior_and_generator_draw_from_other_noise(unclip):
    """The same numbers for both would tie what is shown to how it is shown. Torch reads 32 bits of a seed."""
    seen = unclip.imagine(UnclipParams(PROMPT, n=1, seed=3))
    numbers = [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3 + 2**31, 3 + 2**32)]
    assert torch.equal(seen.noise[0], numbers[0])
    assert torch.equal(numbers[2], numbers[0])
    assert not torch.equal(numbers[1], numbers[0])


def test_one_final_update(unclip):
    (update,) = unclip.generate(UnclipParams(PROMPT, n=6, seed=40))
    assert update.final
    assert update.seeds == list(range(40, 46))
    assert update.scores is None
    assert [picture.size for picture in update.images] == [(32, 32)] * 6


def test_the_last_seeds_can_be_drawn(unclip):
    assert len(draw(unclip, n=4, seed=MAX_SEED - 3)) == 4
    assert len(unclip.walk(UnclipParams(PROMPT, n=1, seed=MAX_SEED), 3).noise) == 3


def test_stop_is_seen_between_chunks(unclip, monkeypatch):
    stop, calls, original = threading.Event(), [], unclip._pixels

    def pixels(*rows):
        calls.append(rows)
        stop.set()
        return original(*rows)

    monkeypatch.setattr(unclip, "_pixels", pixels)
    assert list(unclip.generate(UnclipParams(PROMPT, n=16, seed=1), stop)) == []
    assert len(calls) == 1


def test_requests_wait_for_their_turn(unclip):
    """Also what is done in one step, such as a frame of a slider that moves."""
    done = threading.Event()
    with unclip._turn():
        thread = threading.Thread(target=lambda: (unclip.imagine(UnclipParams(PROMPT)), done.set()), daemon=True)
        thread.start()
        assert not done.wait(0.2)
    assert done.wait(30)


def test_global_state_is_untouched(unclip):
    before = bytes(torch.get_rng_state())
    draw(unclip, n=2)
    unclip.walk(UnclipParams(PROMPT), 3)
    assert bytes(torch.get_rng_state()) == before
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_what_is_imagined_is_what_is_drawn(unclip):
    params = UnclipParams(PROMPT, n=5, seed=3, truncation=0.7, candidates=3)
    seen = unclip.imagine(params)
    pictures = unclip.draw(seen.embedding, seen.noise)
    assert [picture.tobytes() for picture in pictures] == draw(unclip, n=5, seed=3, truncation=0.7, candidates=3)
    alone = unclip.draw(seen.embedding[3:4], seen.noise[3:4])
    assert alone[0].tobytes() == pictures[3].tobytes()


def test_embeddings_are_those_of_clip(unclip):
    (picture,) = unclip.draw(torch.ones(1, 32) / 32**0.5, torch.zeros(1, 16))
    clip = unclip.model.clip.clip
    expected = clip.encode_image(from_pil([picture]))[0]
    torch.testing.assert_close(unclip.invert(picture).embedding.clone(), expected)
    assert unclip.embed_text(PROMPT).norm().item() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(unclip.embed_text(PROMPT), unclip.embed_text("a house"))


def test_any_picture_is_seen_as_its_square_on_white(unclip):
    """Of any size, with transparency, or upright."""
    square = Image.new("RGB", (64, 64), "white")
    square.paste((200, 30, 30), (16, 0, 48, 64))
    upright = Image.new("RGBA", (32, 64), (200, 30, 30, 255))
    for found, expected in zip(
        (unclip.invert(upright), unclip.invert(square.convert("RGBA"))), [unclip.invert(square)] * 2, strict=True
    ):
        assert torch.equal(found.embedding, expected.embedding)
        assert torch.equal(found.noise, expected.noise)


def test_inverting_reads_the_noise_of_the_latents(unclip):
    (picture,) = unclip.draw(F.normalize(torch.ones(1, 32), dim=-1), torch.ones(1, 16))
    seen, model = unclip.invert(picture), unclip.model
    latents, _ = model.vae.encode(from_pil([picture]))
    mean, _ = model.noise_encoder(latents, seen.embedding[None].clone())
    torch.testing.assert_close(seen.noise.clone(), mean[0])


def test_what_is_fresh_belongs_to_its_seed_alone(unclip):
    both, second = unclip.fresh([5, 6]), unclip.fresh([6])
    for name in ("embedding", "noise"):
        first, other = getattr(both, name)
        assert torch.equal(other, getattr(second, name)[0])
        assert F.cosine_similarity(first, other, dim=0) < 0.9
    torch.testing.assert_close(both.embedding.norm(dim=1), torch.ones(2))
    assert torch.equal(both.noise, unclip.noise([5, 6]))


def test_blends_end_in_the_pictures_as_they_are_seen(unclip):
    one, other = (mixing.apart(unclip.imagine(UnclipParams(PROMPT, n=1, seed=seed)))[0] for seed in (1, 2))
    ends = mixing.together([mixing.blend(one, other, share) for share in (0.0, 0.5, 1.0)])
    first, middle, last = (picture.tobytes() for picture in unclip.draw(ends.embedding, ends.noise))
    assert [first] == draw(unclip, n=1, seed=1)
    assert [last] == draw(unclip, n=1, seed=2)
    assert middle not in (first, last)


def test_a_walk_begins_with_the_picture_and_is_closed(unclip):
    params = UnclipParams(PROMPT, n=4, seed=5, truncation=0.8)
    frames, again = (
        [picture.tobytes() for picture in unclip.draw(seen.embedding, seen.noise)]
        for seen in (unclip.walk(params, 6), unclip.walk(params, 6))
    )
    assert len(set(frames)) == 6
    assert frames[0] == draw(unclip, n=1, seed=5, truncation=0.8)[0]
    assert again == frames


def test_defaults_of_the_model_are_used_unless_given(unclip):
    params = unclip.params(PROMPT)
    assert type(params) is UnclipParams
    assert (params.guidance_scale, params.candidates) == (1.5, 2)  # the first is written into config.json
    assert unclip.params(PROMPT, guidance_scale=3).guidance_scale == 3


def test_says_what_was_left_out_of_a_long_prompt(unclip):
    assert unclip.left_out(PROMPT) is None
    assert unclip.left_out("zyxwvut " * 20).key == "cut"


def test_a_given_number_of_threads_is_kept(shipped, monkeypatch):
    monkeypatch.setattr(engines, "quickest_threads", lambda *_: pytest.fail("measured although given"))
    assert UnclipEngine.load(str(shipped / "unclip-nano"), threads=1).threads == 1


def test_an_engine_like_that_of_a_picture_draws_it_again(unclip, shipped):
    folder = str(shipped / "unclip-nano")
    again = UnclipEngine.like(unclip.origin, folder)
    assert again.origin == unclip.origin
    assert draw(again, n=2, seed=1) == draw(unclip, n=2, seed=1)
    with pytest.raises(ValueError, match="other weights"):
        UnclipEngine.like(unclip.origin | {"weights": "0" * 12}, folder)


def test_each_engine_draws_its_own_kind_of_weights(unclip, engine, shipped, nano_folder):
    assert engine_for(str(shipped / "unclip-nano")) is UnclipEngine
    assert engine_for(str(nano_folder)) is DalleEngine
    assert engine_of(unclip.origin) is UnclipEngine
    assert engine_of(engine.origin) is DalleEngine
    assert engine_of({"model": "nano"}) is DalleEngine  # a picture from before there were two
    assert type(engine.params(PROMPT)) is GenerateParams
