"""Text to pictures with models of the DALL-E family, on a plain CPU.

The flow, prompt to pixels: `text` turns a prompt into ids, `models.transformer` reads them and writes image tokens
one after another (`sampling` chooses each), `models.vqgan` turns the tokens into pixels, `images` into pictures.
`engines` puts these together; `weights` finds and checks what they are made of. `training` makes the weights from
`data`; `ui` is the page.

    from dalle_demo import DalleEngine
    engine = DalleEngine.load("nano")
    *_, last = engine.generate(engine.params("a red apple", n=4, seed=7))
    last.images[0].save("apple.png")
"""

from dalle_demo.config import GenerateParams, ParamError
from dalle_demo.engines import DalleEngine, Update
from dalle_demo.weights import WeightsError

__all__ = ["DalleEngine", "GenerateParams", "ParamError", "Update", "WeightsError"]
