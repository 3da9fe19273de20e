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
ORDER = [  # a room imports only rooms before it
    *("errors", "config", "dist", "files", "data", "dataset", "attention", "batching", "cache", "sources", "memory"),
    *("quant", "model", "dropout", "flavours", "lora", "fast", "loss", "optim", "page", "checkpoint", "adapter"),
    *("generate", "questions", "adapters", "chat", "output", "api", "layerwise", "merge", "export"),
    *("evaluate", "rundir", "stopping", "runlog", "method", "shard", "watch", "predict", "run", "plan"),
    *("look", "preview", "doctor", "report", "record", "finish"),
    *("loop", "tune", "cli"),
]
OPENERS = ["__init__", "__main__"]  # the version, and the door
SCRIPTS = {"demo/build.py", "demo/corpus.py"}  # made the demo's files; no room imports them
MAY_IMPORT_TRANSFORMERS = {"model", "generate", "attention", "runlog", "doctor", "cli"}  # and only inside functions
MAX_FUNCTION_LINES, MAX_STORY_LINES, MAX_STEP_LINES = 60, 500, 45


def trees() -> dict[str, ast.Module]:
    """Every module of the package by its path inside it."""
    found = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text("utf-8")) for path in found}


TREES = trees()
ROOMS = {name.removesuffix(".py"): tree for name, tree in TREES.items() if "/" not in name}


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


def rooms_of(tree: ast.AST) -> set[str]:
    """The rooms of minilora that a module imports from."""
    parts = [name.split(".") for name, _ in imported(tree)]
    return {part[1] for part in parts if part[0] == "minilora" and len(part) > 1 and part[1] != "__version__"}


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_every_room_has_its_place_in_the_order():
    assert set(ROOMS) == {*ORDER, *OPENERS}


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_before_it(room):
    later = rooms_of(ROOMS[room]) - set(ORDER[: ORDER.index(room)])
    assert not later, f"{room} imports {sorted(later)}"


def test_only_the_command_line_imports_the_loop_and_only_main_the_command_line():
    importers = {room for room, tree in ROOMS.items() if "loop" in rooms_of(tree)}
    assert importers == {"cli", "tune", "__init__"}
    assert {room for room, tree in ROOMS.items() if "cli" in rooms_of(tree)} == {"__main__"}
    assert rooms_of(ast.parse((ROOT / "train.py").read_text("utf-8"))) == {"cli"}


def test_no_room_imports_the_scripts_that_made_the_demo():
    assert TREES.keys() >= SCRIPTS
    for room, tree in ROOMS.items():
        assert not {name for name, _ in imported(tree) if name.startswith("minilora.demo.")}, room
    assert rooms_of(TREES["demo/__init__.py"]) == set()


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
    (holder,) = [node for node in functions(ROOMS["runlog"]) if any("transformers" in n for n, _ in imported(node))]
    assert holder.name == "versions"


def test_the_library_stands_without_peft_and_trainer():
    allowed = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "tqdm", "minilora"}
    for name, tree in TREES.items():
        extra = {"bitsandbytes"} if name == "quant.py" else set()
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


def test_functions_fit_a_screen():
    """At most 60 lines; a longer one says why in its docstring, in words a reader finds: '... in one piece because'."""
    long = {
        f"{name}:{node.lineno} {node.name} ({num_lines(node)} lines)"
        for name, tree in TREES.items()
        for node in functions(tree)
        if num_lines(node) > MAX_FUNCTION_LINES and "because" not in (ast.get_docstring(node) or "")
    }
    assert not long


def test_the_story_is_short():
    files = [ROOT / "train.py", *(PACKAGE / f"{room}.py" for room in ("loop", "lora", "loss"))]
    assert sum(len(path.read_text("utf-8").splitlines()) for path in files) <= MAX_STORY_LINES


def test_one_step_is_one_screen():
    (step,) = [node for node in functions(ROOMS["loop"]) if node.name == "train_step"]
    assert num_lines(step) <= MAX_STEP_LINES


def test_every_room_says_what_it_is_for():
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name
