"""prompt -> pictures, with models of the DALL-E family, on a plain CPU.

The flow, prompt to pixels: `text` turns a prompt into ids, `models.transformer` reads them and writes image tokens
one after another (`sampling` chooses each), `models.vqgan` turns the tokens into pixels, `images` into pictures.
`engines` puts these together; `weights` finds and checks what they are made of. `training` makes the weights from
`data`; `ui` is the page.

    from dalle_demo import DalleEngine
    engine = DalleEngine.load("nano")
    *_, last = engine.generate(engine.params("a red apple", n=4, seed=7))
    last.images[0].save("apple.png")
"""

import importlib

_HOMES = {
    "DalleEngine": "engines",
    "GenerateParams": "config",
    "ParamError": "config",
    "Update": "engines",
    "WeightsError": "weights",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name when it is first used: `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
