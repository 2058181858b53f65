"""prompt -> pictures, with models of the DALL-E family, on a plain CPU.

The flow, prompt to pixels: `text` turns a prompt into ids and the text encoder of `models.transformer` reads them.
There it branches. DALL-E: the decoder of `models.transformer` writes image tokens one after another (`sampling` chooses
each). DALL-E 2: `models.clip` makes an embedding of what was read, the prior of `models.unclip` that of a picture, and
the generator there, which noise sets going, latents (`mixing` moves both). Either way the decoder of `models.vqgan`
makes pixels and `images` pictures.

`engines` puts these together; `weights` finds and checks what they are made of, `checkpoints` reads and writes it.
`training` makes the weights from `data`; `ui` is the page.

    from dalle_demo import DalleEngine
    engine = DalleEngine.load("nano")
    *_, last = engine.generate(engine.params("a red apple", n=4, seed=7))
    last.images[0].save("apple.png")

`UnclipEngine.load("unclip-nano")` draws in the same way.
"""

import importlib

_HOMES = {
    "DalleEngine": "engines",
    "GenerateParams": "config",
    "ParamError": "config",
    "UnclipEngine": "engines",
    "UnclipParams": "config",
    "Update": "turns",
    "WeightsError": "checkpoints",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name when it is first used: `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
