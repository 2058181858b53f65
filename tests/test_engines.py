"""What an engine promises to whoever draws with it: seeds, turns, stopping, and settings that arrive."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import tiny_config

from dalle_demo import engines, weights
from dalle_demo.config import CLIP_PRESET, MAX_SEED, PRESETS, DalleConfig, GenerateParams, ParamError
from dalle_demo.engines import DalleEngine, Update
from dalle_demo.images import from_pil, to_pil
from dalle_demo.matching import best
from dalle_demo.models.transformer import ImageDecoder, TextEncoder
from dalle_demo.models.vqgan import VQGAN
from dalle_demo.text import PAD, Encoded, Tokenizer
from dalle_demo.weights import Dalle, load_clip

PROMPT = "a red apple"
LENGTH = tiny_config().image_decoder.length


def finish(engine: DalleEngine, params: GenerateParams) -> Update:
    """Last update of a request."""
    *_, last = engine.generate(params)
    return last


def draw(engine: DalleEngine, prompt: str = PROMPT, **settings) -> list[bytes]:
    """Pixels of the finished pictures."""
    return [picture.tobytes() for picture in finish(engine, GenerateParams(prompt, **settings)).images]


def is_free(engine: DalleEngine) -> bool:
    """Whether another thread gets its turn at once."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (draw(engine, n=1, seed=1), done.set()), daemon=True)
    thread.start()
    return done.wait(60)


@pytest.fixture
def spy(engine, monkeypatch) -> list[int]:
    """Positions of all decoder steps made."""
    decoder, positions = engine.model.image_decoder, []
    original = decoder.step
    monkeypatch.setattr(
        decoder, "step", lambda t, position, c: (positions.append(position), original(t, position, c))[1]
    )
    return positions


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("seed", [7, 123_456])
def test_picture_i_is_the_only_picture_of_seed_plus_i(engine, seed, guidance):
    alone = [draw(engine, n=1, seed=seed + i, guidance_scale=guidance)[0] for i in range(5)]
    assert len(set(alone)) == 5
    for n in (1, 2, 4, 5):
        assert draw(engine, n=n, seed=seed, guidance_scale=guidance) == alone[:n]


@pytest.fixture(scope="module", params=["float32", "float16"])
def nano_sized(engine, request) -> DalleEngine:
    """Random weights in the sizes that are shipped, where matrix products take other code paths than in tiny ones."""
    torch.manual_seed(4)
    preset = PRESETS["nano"]
    config = DalleConfig(preset.vqgan, preset.text_encoder, preset.image_decoder)
    parts = VQGAN(config.vqgan), TextEncoder(config.text_encoder), ImageDecoder(config.image_decoder)
    for part in parts:
        part.eval().requires_grad_(False)
    for parameter in parts[2].parameters():
        parameter.data.mul_(2 if parameter.ndim >= 2 else 1)
    return DalleEngine(Dalle("random", "0" * 64, config, engine.model.tokenizer, *parts), form=request.param)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_same_in_the_sizes_that_are_shipped(nano_sized, guidance):
    alone = [draw(nano_sized, n=1, seed=5 + i, guidance_scale=guidance)[0] for i in range(3)]
    assert len(set(alone)) == 3
    for n in (2, 3):
        assert draw(nano_sized, n=n, seed=5, guidance_scale=guidance) == alone[:n]
    assert draw(nano_sized, n=9, seed=5, guidance_scale=guidance)[:3] == alone


def reference(engine: DalleEngine, params: GenerateParams, seed: int) -> torch.Tensor:
    """Tokens (N,) of one picture, slowly: the whole sequence again for each token, and an inverse CDF by hand."""
    model, codes = engine.model, engine.config.vqgan.codebook_size

    def logits(prompt: str, tokens: list[int]) -> torch.Tensor:
        ids = model.tokenizer.batch([prompt], engine.config.text_encoder.length)
        padded = torch.tensor([tokens + [0] * (LENGTH - len(tokens))])
        mask = ids != PAD
        return model.image_decoder(padded, model.text_encoder(ids, mask), mask)[0, len(tokens), :codes].double()

    uniforms = torch.rand(LENGTH, generator=torch.Generator().manual_seed(seed)).tolist()
    tokens: list[int] = []
    for uniform in uniforms:
        guided = logits(params.prompt, tokens)
        if params.guidance_scale != 1:
            empty = logits("", tokens)
            guided = empty + params.guidance_scale * (guided - empty)
        probs = torch.softmax(guided / params.temperature, -1)
        if params.top_k:
            probs[probs < probs.sort(descending=True).values[params.top_k - 1]] = 0
        probs /= probs.sum()
        mass = 0.0
        for token, share in sorted(enumerate(probs.tolist()), key=lambda pair: -pair[1]):
            if mass >= params.top_p:
                probs[token] = 0
            mass += share
        probs /= probs.sum()
        total, chosen = 0.0, None
        for token, prob in enumerate(probs.tolist()):
            total += prob
            if total > uniform:
                chosen = token
                break
        tokens.append(chosen)
    return torch.tensor(tokens)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_scale": 3.0},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.6},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "guidance_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [PROMPT, "一只小狗"])
def test_draws_what_an_independent_slow_sampler_draws(engine, monkeypatch, settings, prompt):
    params = GenerateParams(prompt, n=2, seed=11, **settings)
    decoded = spy_on_decoding(engine, monkeypatch)
    list(engine.generate(params, previews=False))
    assert len(decoded) == 2
    for i, tokens in enumerate(decoded):
        assert torch.equal(tokens, reference(engine, params, 11 + i))


def spy_on_decoding(engine: DalleEngine, monkeypatch) -> list[torch.Tensor]:
    """Tokens of every picture that is decoded from here on."""
    decoded, original = [], engine._decode
    monkeypatch.setattr(engine, "_decode", lambda tokens: decoded.append(tokens.clone()) or original(tokens))
    return decoded


def test_pictures_are_the_decoded_tokens(engine, monkeypatch):
    tokens = spy_on_decoding(engine, monkeypatch)
    (last,) = engine.generate(GenerateParams(PROMPT, n=2, seed=3), previews=False)
    vqgan, vqgan_grid = engine.model.vqgan, engine.config.vqgan.grid
    for picture, row in zip(last.images, tokens, strict=True):
        assert picture.tobytes() == to_pil(vqgan.decode(vqgan.lookup(row.view(1, vqgan_grid, vqgan_grid))))[0].tobytes()


def test_updates_have_their_full_length_from_the_first(engine):
    grid, side = engine.config.vqgan.grid, engine.config.vqgan.image_size
    updates = list(engine.generate(GenerateParams(PROMPT, n=3, seed=40)))
    assert [update.step for update in updates] == [grid * (i + 1) for i in range(grid)]
    for update in updates:
        assert update.total == LENGTH
        assert update.seeds == [40, 41, 42]
        assert len(update.images) == 3
        assert all(isinstance(picture, Image.Image) and picture.size == (side, side) for picture in update.images)
    assert [update.final for update in updates] == [False] * (grid - 1) + [True]


def test_previews_show_finished_rows_on_white(engine, monkeypatch):
    monkeypatch.setattr(engines.Ration, "allows", lambda self, rows: True)
    seen = []
    original = engine.model.vqgan.lookup
    monkeypatch.setattr(engine.model.vqgan, "lookup", lambda tokens: seen.append(tokens.clone()) or original(tokens))
    updates = list(engine.generate(GenerateParams(PROMPT, n=1, seed=1)))
    final, side = seen[-1], engine.config.vqgan.downsample
    for row, (tokens, update) in enumerate(zip(seen, updates, strict=True), start=1):
        assert torch.equal(tokens, final[:, :row])
        assert np.all(np.asarray(update.images[0])[row * side :] == 255)


@pytest.mark.parametrize(("cost", "fewest"), [(0.1, 10), (3.0, 3), (6.0, 2)])
def test_previews_take_a_small_share_of_the_time(monkeypatch, cost, fewest):
    """A clock on which a row of tokens takes 16 s, and decoding one `cost`."""
    clock = [0.0]
    monkeypatch.setattr(engines.time, "monotonic", lambda: clock[0])
    ration, made = engines.Ration(16), []
    for rows in range(1, 16):
        clock[0] += 16
        if ration.allows(rows):
            clock[0] += cost * rows
            ration.spend(rows, cost * rows)
            made.append(rows)
    assert made[0] == 1
    assert len(made) >= fewest
    assert cost * sum(made) <= 1.2 * engines.PREVIEW_SHARE * 256


def test_without_previews_there_is_the_end_only(engine):
    params = GenerateParams(PROMPT, n=2, seed=4)
    (last,) = engine.generate(params, previews=False)
    assert last.final
    assert [picture.tobytes() for picture in last.images] == draw(engine, n=2, seed=4)


def test_a_preview_that_would_take_too_long_is_an_earlier_one(engine, monkeypatch):
    allowed = iter([True, False, True, *[False] * 20])
    monkeypatch.setattr(engines.Ration, "allows", lambda self, rows: next(allowed))
    updates = list(engine.generate(GenerateParams(PROMPT, n=2, seed=1)))
    assert updates[1].images is updates[0].images
    assert updates[2].images is not updates[1].images
    assert updates[-2].images is updates[2].images
    assert updates[-1].images is not updates[2].images


@pytest.mark.parametrize("after", [0, 1, 2])
def test_stop_ends_within_one_step(engine, spy, after):
    stop = threading.Event()
    updates = engine.generate(GenerateParams(PROMPT, n=2, seed=1), stop)
    for _ in range(after):
        next(updates)
    made = len(spy)
    stop.set()
    assert list(updates) == []
    assert len(spy) <= made + 1
    assert is_free(engine)


def test_stop_is_seen_between_updates(engine, monkeypatch):
    """A row of a large model takes seconds: the flag is read after each token, not after each row."""
    stop, positions = threading.Event(), []
    decoder, original = engine.model.image_decoder, engine.model.image_decoder.step

    def step(tokens, position, cache):
        positions.append(position)
        if position == 1:
            stop.set()
        return original(tokens, position, cache)

    monkeypatch.setattr(decoder, "step", step)
    assert list(engine.generate(GenerateParams(PROMPT, n=1, seed=1), stop)) == []
    assert len(positions) <= 3


def test_stop_is_seen_between_pictures(engine, monkeypatch):
    """Decoding one of a large model takes seconds as well."""
    stop, decoded, original = threading.Event(), [], engine._decode

    def decode(tokens):
        decoded.append(tokens)
        stop.set()
        return original(tokens)

    monkeypatch.setattr(engine, "_decode", decode)
    assert list(engine.generate(GenerateParams(PROMPT, n=4, seed=1), stop, previews=False)) == []
    assert len(decoded) == 1


def test_each_update_is_made_with_the_engines_threads(engine):
    """A number of threads holds for one thread of Python, and a server asks for each update from another."""
    seen = []
    updates = engine.generate(GenerateParams(PROMPT, n=1, seed=1))

    def ask():
        torch.set_num_threads(engine.threads + 1)
        next(updates)
        seen.append(torch.get_num_threads())

    for _ in range(2):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    updates.close()
    assert seen == [engine.threads] * 2


def test_closing_the_iterator_frees_the_lock(engine, spy):
    updates = engine.generate(GenerateParams(PROMPT, n=1, seed=1))
    next(updates)
    made = len(spy)
    updates.close()
    assert len(spy) <= made + 1
    assert is_free(engine)


def test_an_error_frees_the_lock(engine, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_preview", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(engine.generate(GenerateParams(PROMPT, n=1, seed=1)))
    assert is_free(engine)


def test_an_iterator_that_is_never_started_holds_nothing(engine):
    waiting = engine.generate(GenerateParams(PROMPT, n=1, seed=1))
    assert is_free(engine)
    waiting.close()


def test_two_threads_draw_what_each_would_draw_alone(engine):
    requests = [("a red apple", 100), ("a black cat on a blue background", 200)]
    alone = [draw(engine, prompt, n=2, seed=seed) for prompt, seed in requests]
    together: list = [None, None]
    gate = threading.Barrier(2)

    def work(i: int) -> None:
        gate.wait()
        together[i] = draw(engine, requests[i][0], n=2, seed=requests[i][1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert together == alone


def test_global_state_is_untouched(engine):
    """Python's own generator is left out here, since the type checks of the tests draw from it."""
    before = bytes(torch.get_rng_state()), str(np.random.get_state())  # noqa: NPY002
    for _ in engine.generate(GenerateParams(PROMPT, n=2)):
        assert torch.is_grad_enabled()  # also between updates, when the caller has the thread
        assert not torch.is_inference_mode_enabled()
    assert (bytes(torch.get_rng_state()), str(np.random.get_state())) == before  # noqa: NPY002


def test_global_state_decides_nothing(engine):
    pictures, seeds = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pictures.append(draw(engine, n=1, seed=5))
    for _ in range(2):
        random.seed(1)
        torch.manual_seed(1)
        seeds.append(finish(engine, GenerateParams(PROMPT, n=1)).seeds)
    assert pictures[0] == pictures[1]
    assert seeds[0] != seeds[1]  # a blank seed is fresh even after someone has seeded the process


def test_blank_seed_is_drawn_reported_and_reproduces(engine):
    first, second = (finish(engine, GenerateParams(PROMPT, n=2)) for _ in range(2))
    assert first.seeds != second.seeds
    for update in (first, second):
        assert update.seeds[1] == update.seeds[0] + 1
        assert 0 <= update.seeds[0] <= MAX_SEED - 1
        again = draw(engine, n=2, seed=update.seeds[0])
        assert again == [picture.tobytes() for picture in update.images]


@pytest.fixture
def comparing(engine, shipped, monkeypatch) -> DalleEngine:
    """Engine where there is a CLIP to be found."""
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    monkeypatch.setattr(engine, "_clip", None)
    return engine


def score(prompt: str, picture: Image.Image, folder: Path) -> float:
    """Cosine of the embeddings of prompt and picture, by hand."""
    clip = load_clip(str(folder))
    ids = clip.tokenizer.batch([prompt], 50)
    text = clip.clip.encode_text(clip.text_encoder(ids, ids != PAD), ids != PAD)
    return F.cosine_similarity(text, clip.clip.encode_image(from_pil([picture]))).item()


def likelihood(engine: DalleEngine, prompt: str, tokens: torch.Tensor) -> float:
    """Mean log p(token | prompt, tokens before) by one pass over the whole picture, in fp32."""
    ids = engine.model.tokenizer.batch([prompt], engine.config.text_encoder.length)
    mask, codes = ids != PAD, engine.config.vqgan.codebook_size
    with torch.inference_mode():
        states = engine.model.text_encoder(ids, mask).float()
        logits = engine.model.image_decoder(tokens[None], states, mask)[0, :, :codes].float()
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].mean().item()


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_candidates_are_the_pictures_of_their_seeds_the_best_first(comparing, shipped, monkeypatch, scale):
    """Best by CLIP's cosine and by how likely the prompt's own rows, without guidance, made their tokens."""
    decode, decoded = comparing._decode, []
    monkeypatch.setattr(comparing, "_decode", lambda tokens: decoded.append(tokens.clone()) or decode(tokens))
    settings = {"guidance_scale": scale, "temperature": 0.8}
    alone = {seed: draw(comparing, n=1, seed=seed, **settings)[0] for seed in range(40, 46)}
    tokens = [one for one in decoded if len(one) == comparing.steps][-6:]
    last = finish(comparing, GenerateParams(PROMPT, n=3, seed=40, candidates=6, **settings))
    assert [picture.tobytes() for picture in last.images] == [alone[seed] for seed in last.seeds]
    size = last.images[0].size
    cosine = {s: score(PROMPT, Image.frombytes("RGB", size, alone[s]), shipped / CLIP_PRESET) for s in alone}
    fit = {s: cosine[s] + 0.25 * likelihood(comparing, PROMPT, one) for s, one in zip(alone, tokens, strict=True)}
    assert last.seeds == sorted(fit, key=fit.get, reverse=True)[:3]
    assert last.seeds != sorted(cosine, key=cosine.get, reverse=True)[:3]  # else the tokens' share is not seen
    assert last.scores == pytest.approx([cosine[seed] for seed in last.seeds], abs=1e-5)


def test_as_many_candidates_as_pictures_are_only_put_in_order(comparing):
    last = finish(comparing, GenerateParams(PROMPT, n=4, seed=40, candidates=4))
    assert sorted(last.seeds) == [40, 41, 42, 43]
    assert last.seeds != [40, 41, 42, 43]


def test_previews_show_all_candidates(comparing):
    *previews, last = comparing.generate(GenerateParams(PROMPT, n=2, seed=40, candidates=5))
    assert previews
    for update in previews:
        assert not update.final
        assert update.seeds == [40, 41, 42, 43, 44]
        assert len(update.images) == 5
        assert update.scores is None
    assert len(last.images) == len(last.seeds) == len(last.scores) == 2


def test_without_candidates_nothing_is_compared(comparing, monkeypatch):
    monkeypatch.setattr(engines, "load_clip", lambda: pytest.fail("loaded although nothing is compared"))
    last = finish(comparing, GenerateParams(PROMPT, n=2, seed=40))
    assert (last.seeds, last.scores) == ([40, 41], None)


def test_the_clip_is_loaded_once(comparing, monkeypatch):
    finish(comparing, GenerateParams(PROMPT, n=1, seed=1, candidates=2))
    monkeypatch.setattr(engines, "load_clip", lambda: pytest.fail("loaded again"))
    finish(comparing, GenerateParams(PROMPT, n=1, seed=1, candidates=2))


def test_candidates_need_a_clip(comparing, spy, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHIPPED", tmp_path)
    with pytest.raises(ParamError, match=r"^candidates: must be 0: clip-nano, which compares .* is missing") as caught:
        finish(comparing, GenerateParams(PROMPT, n=1, seed=1, candidates=2))
    assert caught.value.field == "candidates"
    assert str(tmp_path) not in str(caught.value)  # visitors read it
    assert spy == []  # said before anything is drawn
    assert is_free(comparing)


def test_candidates_need_a_prompt_that_the_clip_reads(comparing, monkeypatch):
    empty = Encoded([0, 2], 0, "")
    monkeypatch.setattr(Tokenizer, "encode", lambda self, prompt, length: empty)
    with pytest.raises(ParamError, match="reads nothing of this prompt"):
        finish(comparing, GenerateParams(PROMPT, n=1, seed=1, candidates=2))


def test_larger_pictures_are_compared_at_the_size_of_the_clip(shipped):
    clip, red = load_clip(str(shipped / CLIP_PRESET)), (200, 30, 30)
    small, large = Image.new("RGB", (32, 32), red), Image.new("RGB", (256, 256), red)
    _, _, scores = best(clip, PROMPT, [small, large], [1, 2], 2, torch.zeros(2))
    assert scores[0] == scores[1]


def test_prompts_draw_different_pictures(engine):
    prompts = ["a red apple", "a house, flat style", "一只小狗", "红色背景的汽车", "🍕"]
    assert len({draw(engine, prompt, n=1, seed=1, guidance_scale=4)[0] for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 0.3), ("top_k", 2), ("top_p", 0.2), ("guidance_scale", 6.0), ("seed", 9)]
)
def test_every_setting_changes_the_picture(engine, field, value):
    settings = {"n": 1, "seed": 1}
    assert draw(engine, **settings) != draw(engine, **(settings | {field: value}))


def test_settings_reach_the_sampler_as_given(engine, monkeypatch):
    calls = {}

    def note(tokens_of, name):
        def wrapped(*args, **options):
            calls[name] = args
            return tokens_of(*args, **options)

        return wrapped

    monkeypatch.setattr(engines, "sample", note(engines.sample, "sample"))
    monkeypatch.setattr(engines, "guide", note(engines.guide, "guide"))
    finish(engine, GenerateParams(PROMPT, n=3, seed=1, temperature=0.7, top_k=9, top_p=0.8, guidance_scale=2.5))
    _, uniforms, bos, *rest = calls["sample"]
    assert uniforms.shape == (3, LENGTH)
    assert bos == engine.config.image_decoder.bos
    assert rest == [0.7, 9, 0.8]
    assert calls["guide"][2] == 2.5


def test_guidance_of_one_skips_the_empty_prompt(engine, monkeypatch):
    monkeypatch.setattr(engines, "guide", lambda *_: pytest.fail("guided although guidance is off"))
    finish(engine, GenerateParams(PROMPT, n=4, seed=1, guidance_scale=1))


def test_defaults_of_the_model_are_used_unless_given(engine):
    params = engine.params(PROMPT)
    assert (params.temperature, params.guidance_scale) == (0.9, 2.0)  # written into config.json by conftest
    assert params.top_p == 1.0
    params = engine.params(PROMPT, temperature=0.4, n=2)
    assert (params.temperature, params.guidance_scale, params.n) == (0.4, 2.0, 2)


def test_says_what_was_left_out_of_a_long_prompt(engine):
    assert engine.left_out(PROMPT) is None
    notice = engine.left_out("zyxwvut " * 20)
    length = engine.config.text_encoder.length
    assert (notice.key, notice.length) == ("cut", length)
    assert f"it has {notice.tokens} tokens, {length} are read" in str(notice)
    words = "qzxv " * 30
    assert draw(engine, words, n=1, seed=1) == draw(engine, words + "apple", n=1, seed=1)


def test_says_that_it_was_not_taught_other_scripts(engine):
    assert engine.left_out("кот").key == "unfamiliar"
    assert engine.left_out("кот " * 40).key == "unfamiliar_and_cut"
    assert str(engine.left_out("кот")).startswith("This model reads English and Chinese; it may not know")


@pytest.mark.parametrize("form", ["float16", "bfloat16"])
def test_draws_in_every_format(nano_folder, form):
    engine = DalleEngine.load(str(nano_folder), form=form)
    assert engine.origin["format"] == form
    assert len(draw(engine, n=2, seed=1, guidance_scale=2)) == 2


def test_fp16_weights_draw_what_fp32_ones_do(engine, nano_folder):
    """Stored weights are fp16, so nothing is lost."""
    packed = DalleEngine.load(str(nano_folder), form="float16")
    settings = {"n": 3, "seed": 5, "temperature": 0.05}
    assert draw(packed, **settings) == draw(engine, **settings)


def test_refuses_an_unknown_format(nano_folder):
    with pytest.raises(ValueError, match="float8"):
        DalleEngine.load(str(nano_folder), form="float8")


def test_a_given_number_of_threads_is_kept(nano_folder, monkeypatch):
    monkeypatch.setattr(engines, "fastest_threads", lambda *_: pytest.fail("measured although given"))
    engine = DalleEngine.load(str(nano_folder), threads=1)
    assert engine.threads == 1
    torch.set_num_threads(2)
    draw(engine, n=1, seed=1)
    assert torch.get_num_threads() == 1  # whoever drew last, each engine draws with its own number
