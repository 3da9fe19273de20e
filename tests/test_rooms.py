"""The house: data flows one way through its rooms, imports are cheap and quiet, nothing dangerous lies about."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

PACKAGE = Path(minilora.__file__).parent
ROOT = PACKAGE.parent
STORY = {"matmul", "kernels", "attention", "delta", "lora_variants", "lora", "loss", "decoder", "batching", "optim"}
LAYERS = [  # data flows from left to right: a layer imports from itself and from layers before it
    {"errors", "config"},
    {"utils"},
    {"distributed"},
    {"data"},
    STORY | {"objectives"},
    {"models"},
    {"adapters"},
    {"inference"},
    {"training"},
    {"loop"},
    {"tools"},
    {"cli"},
]
MAX_TOP_ENTRIES = 28
OPENERS = {"__init__", "__main__", "demo", "presets"}  # the public names, the entry point, what is bundled
SCRIPTS = {"demo/build.py", "demo/corpus.py"}  # made the demo's files; no room imports them
MAY_IMPORT_TRANSFORMERS = {  # and only inside functions
    *("attention", "models/load", "inference/generate", "training/log", "tools/doctor"),
}
MAX_STEP_LINES = 45


def trees() -> dict[str, ast.Module]:
    """Every module of the package by its path inside it."""
    found = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in found}


TREES = trees()
MODULES = {name.removesuffix(".py"): tree for name, tree in TREES.items() if not name.startswith("demo/")}


def imported(tree: ast.AST) -> list[tuple[str, ast.stmt]]:
    """(dotted name, statement) of everything a module imports, at the top or inside functions."""
    names: list[tuple[str, ast.stmt]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names += [(f"{node.module}.{alias.name}", node) for alias in node.names]
    return names


def parts_of(tree: ast.AST) -> set[str]:
    """The first level of minilora that a module imports from: `adapters` for minilora.adapters.format."""
    parts = [name.split(".") for name, _ in imported(tree)]
    return {part[1] for part in parts if part[0] == "minilora" and len(part) > 1 and part[1] != "__version__"}


def layer_of(part: str) -> int:
    (number,) = [number for number, layer in enumerate(LAYERS) if part in layer]
    return number


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """What a module imports from a layer after its own."""
    own = layer_of(name.split("/")[0])
    return sorted(part for part in parts_of(tree) - OPENERS if layer_of(part) > own)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_module_has_a_layer():
    top = {name.split("/")[0] for name in MODULES}
    assert top - OPENERS <= set().union(*LAYERS)
    for part in top & STORY:
        assert f"{part}" in MODULES, f"{part} is part of the story and no module"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.split("/")[0] not in OPENERS))
def test_imports_go_from_right_to_left(name):
    assert not wrong_imports(name, MODULES[name])


def test_a_wrong_direction_is_found():
    """The check itself: a planted import of a later layer, at the top and inside a function."""
    for text in (
        "from minilora.training.run import Run",
        "def f():\n    from minilora.adapters import format",
        "import minilora.cli",
    ):
        assert wrong_imports("data/rows", ast.parse(text)), text
    assert not wrong_imports("training/run", ast.parse("from minilora.data.rows import read_rows"))


def test_the_tree_is_small_on_top():
    """A newcomer sees a few story files and eight folders."""
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= MAX_TOP_ENTRIES
    for folder in (path for path in entries if path.is_dir() and path.name not in ("presets", "demo")):
        files = [path for path in folder.glob("*.py") if len(ast.parse(path.read_text("utf-8")).body) > 1]
        assert len(files) > 1, f"{folder.name}: a package for a single file"


def test_only_the_command_line_imports_the_loop_and_only_main_the_command_line():
    importers = {name for name, tree in MODULES.items() if "loop" in parts_of(tree)}
    assert importers == {"cli", "tools/tune", "__init__"}
    assert {name for name, tree in MODULES.items() if "cli" in parts_of(tree)} == {"__main__"}


def test_no_module_imports_the_scripts_that_made_the_demo():
    assert TREES.keys() >= SCRIPTS
    for name, tree in MODULES.items():
        assert not {module for module, _ in imported(tree) if module.startswith("minilora.demo.")}, name
    assert parts_of(TREES["demo/__init__.py"]) == set()


def test_transformers_is_imported_late_and_by_few():
    """Its import takes seconds; --help must not."""
    for name, tree in TREES.items():
        if name in SCRIPTS:
            continue
        inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
        for module, node in imported(tree):
            if module.split(".")[0] in ("transformers", "huggingface_hub"):
                assert name.removesuffix(".py") in MAY_IMPORT_TRANSFORMERS, f"{name} imports {module}"
                assert id(node) in inside, f"{name}:{node.lineno} imports {module} at the top"
    (holder,) = [
        node for node in functions(MODULES["training/log"]) if any("transformers" in n for n, _ in imported(node))
    ]
    assert holder.name == "versions"


def test_the_library_stands_without_peft_and_trainer():
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "tqdm", "minilora"}
    for name, tree in TREES.items():
        extra = {"bitsandbytes"} if name == "models/quantize.py" else set()
        foreign = {module.split(".")[0] for module, _ in imported(tree)} - set(sys.stdlib_module_names)
        assert foreign <= allowed | extra, f"{name} imports {foreign - allowed}"
        assert not {module for module, _ in imported(tree) if module.endswith((".Trainer", ".TrainingArguments"))}


@pytest.mark.parametrize("module", ["minilora", "minilora.cli"])
def test_importing_is_cheap_silent_and_sets_nothing(module):
    script = (
        "import os, sys, warnings, logging; before = dict(os.environ); filters = list(warnings.filters)\n"
        f"import {module}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert dict(os.environ) == before and list(warnings.filters) == filters\n"
        "assert not logging.getLogger().handlers\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_that_runs_code_from_files():
    for name, tree in TREES.items():
        modules = {module.split(".")[0] for module, _ in imported(tree)}
        assert not modules & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, name
        for function, node in calls(tree):
            where = f"{name}:{node.lineno}: {function}"
            assert function not in ("eval", "exec", "compile", "__import__"), where
            assert function not in ("torch.load", "torch.save", "numpy.load", "np.load", "os.system"), where
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ast.unparse(keyword.value)
                allowed = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False, "shell": False}
                assert value is allowed.get(str(keyword.arg), value), where
        assert not re.search(r"trust_remote_code\W+True", (PACKAGE / name).read_text("utf-8")), name


def test_every_load_from_transformers_says_no_to_remote_code():
    for name, tree in TREES.items():
        for function, node in calls(tree):
            if function.endswith(".from_pretrained") and name not in SCRIPTS:
                given = {keyword.arg for keyword in node.keywords}
                assert given >= {"trust_remote_code", "local_files_only"}, f"{name}:{node.lineno}"


def test_one_step_is_one_screen():
    (step,) = [node for node in functions(MODULES["loop"]) if node.name == "train_step"]
    assert num_lines(step) <= MAX_STEP_LINES


def test_every_module_says_what_it_is_in_its_first_line():
    """One plain sentence that ends with a full stop, alone on the first line."""
    for name, tree in TREES.items():
        first = (ast.get_docstring(tree) or "").split("\n")
        assert re.match(r"[\w`].*[.:]$", first[0]), f"{name}: {first[0]}"
        assert first[1:2] in ([], [""]), f"{name}: the first sentence goes on in the second line"
