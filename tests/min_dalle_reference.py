"""tiny random weights -> what PyPI min-dalle makes of them, and its files in the form of the Hub.

Run as a script in a process of its own, since importing min_dalle switches autograd off and takes every thread.
`folder` runs it once a session.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

SIZES = {"layers": 2, "heads": 4, "width": 64, "glu_width": 80, "image_vocab": 16390}
SEED, GUIDANCE, TOP_K = 7, 16.0, 256
EVERY = 8  # of the logits are kept, for the file's size
PROMPT = "A red apple,  on a blue background 🍕"
SCALELESS = re.compile(r"(pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01]|final_ln)\.weight$")
ROOT = Path(__file__).resolve().parent.parent


def folder(tmp_path_factory) -> Path:
    """Folder of min-dalle's files, `reference.pt` and `ids.json`, the ids of `prompts()`."""
    return _made(tmp_path_factory.getbasetemp() / "min-dalle")


@functools.cache
def _made(out: Path) -> Path:
    out.mkdir()
    write_vocabulary(out)
    (out / "prompts.json").write_text(json.dumps(prompts()))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__, str(out)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return out


def texts() -> list[str]:
    """What the repository says in English, line by line."""
    paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("dalle_demo/*.py"), *ROOT.glob("weights/*/README.md")])
    lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted({line for line in lines if line.isascii() and len(line) > 20})


def write_vocabulary(out: Path) -> None:
    """vocab.json and merges.txt in BART's order: special tokens, characters, some hundred merges, <mask>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("Ġ", prepend_scheme="always")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=[chr(c) for c in range(33, 126)], show_progress=False
    )  # "~" is left out, so that a character of ASCII is unknown
    tokenizer.train_from_iterator((line.lower().replace("~", "") for line in texts()), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = model["vocab"] | {"<mask>": len(model["vocab"])}
    (out / "vocab.json").write_text(json.dumps(vocab))
    merges = [line if isinstance(line, str) else " ".join(line) for line in model["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


STRANGE = [
    "",
    " ",
    "   ",
    "a",
    "  a  red   apple ",
    "A RED Apple",
    "tab\there",
    "new\nline\r\nand\n",
    "\n",
    "café crème brûlée",
    "cafe\u0301",
    "naïve Ångström, Straße",
    "İstanbul ısı",
    "\u212a kelvin",
    "一只小狗",
    "a 一只 dog 小狗",
    "кот на стене",
    "नमस्ते",
    "ﷺ",
    "🍕",
    "🍕🍕 pizza🍕",
    "👨‍👩‍👧 family",
    "❤️ ❤ ♥",
    "1️⃣ #️⃣ *️⃣",
    "👍🏽 👍",
    "🇩🇪 flag 🏴‍☠️",
    "☕️a☕",
    "https://example.com/a?b=c&d=%20#e",
    "someone@example.com",
    "</s>",
    "<s> <pad> </s> <unk> <mask>",
    "a</s>b",
    "Ġa Ġ",
    "it's we'll don't 's",
    "~ a~b ~~",
    "a\u00a0b\u3000c\u2003d",
    "a\u200bb\u200dc\ufeff",
    "a\x00b\x7fc\x1b[31m",
    "\U0010ffff private",
    "“quotes” – dashes — … ½ ²",
    "ＡＢＣ ｆｕｌｌ",
    "!!!???...,,,;;;",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the cat on the wall " * 30,
    "0123456789 3.14 1,000,000",
    ":pizza: :red_heart:",
    PROMPT,
]


def prompts() -> list[str]:
    """The strange ones, and seeded mixtures of the repository's words with characters of every kind."""
    import random

    rng = random.Random(0)
    words = sorted({word for line in texts() for word in line.split()})
    odd = ["🍕", "❤️", "é", "ß", "小", "\t", "\n", " ", "  ", "~", "Ġ", "\u00a0", "\ufe0f", "\u200d", "'s", "</s>", "Ы"]
    made = []
    for _ in range(600):
        pieces = [rng.choice(words) if rng.random() < 0.7 else rng.choice(odd) for _ in range(rng.randint(1, 14))]
        text = "".join(piece + rng.choice([" ", " ", " ", "", "  "]) for piece in pieces)
        made.append(text.upper() if rng.random() < 0.1 else text)
    return STRANGE + made


def main(out: Path) -> None:
    """Write the files and everything that is compared."""
    import torch
    from min_dalle import MinDalle
    from min_dalle.models import DalleBartDecoder, DalleBartEncoder
    from min_dalle.text_tokenizer import TextTokenizer

    torch.set_num_threads(1)
    vocab = json.loads((out / "vocab.json").read_text())
    merges = (out / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    model = MinDalle.__new__(MinDalle)  # its __init__ downloads
    model.tokenizer = TextTokenizer(vocab, merges)
    ids = [model.tokenizer.tokenize(prompt) for prompt in json.loads((out / "prompts.json").read_text())]
    (out / "ids.json").write_text(json.dumps(ids))

    model.device, model.dtype, model.is_reusable, model.text_token_count = "cpu", torch.float32, True, 64
    model.layer_count, model.embed_count = SIZES["layers"], SIZES["width"]
    sizes = {"layer_count": SIZES["layers"], "embed_count": SIZES["width"], "attention_head_count": SIZES["heads"]}
    sizes |= {"glu_embed_count": SIZES["glu_width"], "device": "cpu"}
    model.encoder = DalleBartEncoder(text_vocab_count=len(vocab) - 1, text_token_count=64, **sizes)
    model.decoder = DalleBartDecoder(image_vocab_count=SIZES["image_vocab"], **sizes)
    model.detokenizer = narrow_detokenizer()
    for name, module in (("encoder", model.encoder), ("decoder", model.decoder), ("detoker", model.detokenizer)):
        module.eval()
        fill(module)
        torch.save(hub_form(module.state_dict()) if name != "detoker" else module.state_dict(), out / f"{name}.pt")

    result = {"text_tokens": text_tokens(model), "long_text_tokens": text_tokens(model, "a red cat on the wall " * 12)}
    for name in ("text", "long_text"):
        result[f"{name}_states"] = model.encoder(result[f"{name}_tokens"])
    for bos in (2**14 - 1, 2**14):
        result[f"tokens_{bos}"], result[f"logits_{bos}"] = decode(model, result["text_tokens"], 1, 1, bos)
    result["parallel"] = parallel(model, result["text_tokens"], result[f"tokens_{2**14 - 1}"])
    result["sampled"], _ = decode(model, result["text_tokens"], 3, TOP_K, 2**14 - 1)
    result["pixels"] = torch.stack([model.detokenizer(False, row[None]) for row in result["sampled"]])
    greedy = {"temperature": 1, "top_k": 1, "supercondition_factor": GUIDANCE}
    result["picture"] = next(model.generate_raw_image_stream(PROMPT, SEED, 1, **greedy))
    torch.save(result, out / "reference.pt")


def fill(module) -> None:
    """Random numbers that fp16 holds, spread so that prompts, positions and every tensor matter."""
    import torch

    torch.manual_seed(SEED)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape)
        if SCALELESS.search(name):
            value = torch.ones(tensor.shape)
        elif name.endswith("bias"):
            value = noise * 0.1
        elif tensor.ndim == 1:
            value = 1 + 0.2 * noise
            if "encoder_attn_layer_norm" in name:
                value = value * 0.2  # else guidance multiplies one same vector and all tokens are equal
        elif "embed" in name:
            value = noise * 0.5
        elif name == "lm_head.weight":
            value = noise * 0.2
        else:
            value = noise / tensor[0].numel() ** 0.5
        tensor.copy_(value.half().float())
    if hasattr(module, "post_quant_conv"):  # pixels mostly within [0, 1], where nothing is clipped
        module.decoder.conv_out.weight.data.mul_(0.125)
        module.decoder.conv_out.bias.data.fill_(0.5)


def hub_form(state: dict) -> dict:
    """State dict as min-dalle's converter left it.

    fp16, without scales of ones, a matrix the transposed view of what Flax stores, all layers in one storage.
    """
    import torch

    stored, stacks = {}, {}
    for name, tensor in state.items():
        if SCALELESS.search(name):
            continue
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        layers = [state[f"layers.{i}.{found[2]}"] for i in range(SIZES["layers"])] if found else [tensor]
        matrix = tensor.ndim == 2 and "embed" not in name
        leaf = found[2] if found else name
        if leaf not in stacks:
            stacks[leaf] = torch.stack([one.half().t() if matrix else one.half() for one in layers])
        one = stacks[leaf][int(found[1]) if found else 0]
        stored[name] = one.t() if matrix else one
    return stored


def narrow_detokenizer():
    """The package's own detokenizer with a quarter of the channels everywhere."""
    import types

    import min_dalle.models.vqgan_detokenizer as original

    lines = Path(original.__file__).read_text().splitlines()
    for i, line in enumerate(lines):
        if "grid_size, grid_size, 2 ** 8" not in line:  # those are pixels
            line = re.sub(r"2 \*\* ([789])\b", lambda found: f"2 ** {int(found[1]) - 2}", line)
            line = re.sub(r"(\w+Block)\((\d), (\d)", lambda f: f"{f[1]}({int(f[2]) - 2}, {int(f[3]) - 2}", line)
            lines[i] = line
    module = types.ModuleType("narrow")
    exec("\n".join(lines), module.__dict__)
    return module.VQGanDetokenizer()


def text_tokens(model, prompt: str = PROMPT):
    """Rows of the empty prompt and of a prompt, as the package's generator makes them."""
    import torch

    ids = model.tokenizer.tokenize(prompt)
    ids = [*ids[:63], ids[-1]] if len(ids) > 64 else ids  # it cuts the end off; ours keeps it, on purpose
    rows = torch.ones(2, 64, dtype=torch.long)
    rows[0, :2], rows[1, : len(ids)] = torch.tensor([ids[0], ids[-1]]), torch.tensor(ids)
    return rows


def decode(model, rows, count: int, top_k: int, bos: int):
    """Tokens (count, 256) from the package's own step, and of one image the logits (256, 2, 2048), every eighth."""
    import torch

    states = model.encoder(rows)
    index = [0] * count + [1] * count
    state = torch.zeros(SIZES["layers"], 4 * count, 256, SIZES["width"])
    tokens, logits = torch.full((count, 257), bos), []
    torch.manual_seed(SEED)
    for i in range(256):
        given = {
            "attention_mask": rows[index].not_equal(1)[:, None, None, :],
            "encoder_state": states[index],
            "attention_state": state,
            "prev_tokens": tokens[:, [i]],
            "token_index": torch.tensor([i]),
        }
        if count == 1:  # a second call at one place writes the same
            logits.append(model.decoder(**given)[0][:, -1, : 2**14 : EVERY].clone())
        settings = torch.tensor([1.0, top_k, GUIDANCE])
        tokens[:, i + 1], state = model.decoder.sample_tokens(settings=settings, **given)
    return tokens[:, 1:].clone(), torch.stack(logits) if logits else None


def parallel(model, rows, tokens):
    """Logits (2, 256, 2048) of all positions at once, every eighth."""
    import torch

    before = torch.cat([torch.tensor([[2**14 - 1]]), tokens[:, :-1]], 1)
    return model.decoder(
        attention_mask=rows.not_equal(1)[:, None, None, :],
        encoder_state=model.encoder(rows),
        attention_state=torch.zeros(SIZES["layers"], 4, 256, SIZES["width"]),
        prev_tokens=before,
        token_index=torch.arange(256),
    )[0][:, :, : 2**14 : EVERY].clone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
