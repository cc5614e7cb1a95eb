"""The layout: imports run downwards, rooms are short, an import does nothing, the top is as it should be."""

import ast
import graphlib
import re
import subprocess

import pytest
from helpers import ROOT

# A room imports rooms of lower levels, and those of its own wing. A wing is a folder of glm/ (modeling is a
# wing of its own). The rooms of glm/ without a wing are at the bottom.
LEVELS = {
    "finetune_generation": 0,
    "utils": 1,
    "glm.decoding": 2,
    "glm.training": 2,
    "glm.weights": 3,
    "glm.modeling": 3,
    "glm.outputs": 4,
    "data": 5,
}
BOTTOM = 6
LONGEST_ROOM = 400  # lines
TOP = {
    *("finetune_generation.py", "data.py", "utils.py", "glm", "configs", "docs", "tests", ".ci"),
    *("README.md", "README_zh.md", "CONTRIBUTING.md", "LICENSE", ".gitignore", "pyproject.toml"),
    *("requirements.txt", "requirements-paddle3.txt", "requirements-cuda11.txt"),
}
# What acts on the process or the machine, wherever its module is from.
ACTIONS = {
    *("environ", "putenv", "signal", "Thread", "Process", "Popen", "socket", "CDLL", "open", "mkdir"),
    *("set_device", "set_flags", "set_seed", "seed", "set_level", "setattr"),
}

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("glm/**/*.py")]
    if path.stem != "__init__"
}
TREES = {room: ast.parse(path.read_text(encoding="utf-8")) for room, path in PATHS.items()}


def wing_of(room):
    """Return a room's wing: "glm.outputs" of glm.outputs.folder, "glm" of glm.files, or the room itself."""
    return room if room in LEVELS else room.rpartition(".")[0]


def level_of(room):
    return LEVELS.get(wing_of(room), BOTTOM)


def imports_of(room):
    """Return the project's own rooms that ``room`` imports, wherever in it."""
    found = set()
    for node in ast.walk(TREES[room]):
        if isinstance(node, ast.ImportFrom):
            # Relative names are completed: "from . import cache" in glm.decoding.decoder.
            parts = room.split(".")[: -node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & PATHS.keys()


def statements_at_import(body):
    """Yield what an import carries out: a module's statements and its classes', without functions' bodies."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from statements_at_import(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults))
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node


def acts(node):
    """Return whether a statement at import does more than name a value."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        return False
    if isinstance(node, ast.Try) and all(isinstance(part, ast.ImportFrom) for part in node.body):
        return False  # what is done where an import fails
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in targets):
            return True
    elif isinstance(node, ast.stmt):
        return True
    names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return bool(names & ACTIONS)


def test_imports_run_downwards():
    upwards = {
        (room, other)
        for room in PATHS
        for other in imports_of(room)
        if level_of(other) <= level_of(room) and wing_of(other) != wing_of(room)
    }
    assert not upwards


def test_no_circle():
    arrows = {room: imports_of(room) for room in PATHS}
    assert list(graphlib.TopologicalSorter(arrows).static_order())


def test_glm_stands_alone():
    above = {"data", "utils", "finetune_generation"}
    assert not [room for room in PATHS if room.startswith("glm.") and imports_of(room) & above]


@pytest.mark.parametrize("room", PATHS)
def test_nothing_happens_at_import(room):
    found = [node for node in statements_at_import(TREES[room].body) if acts(node)]
    assert not found, [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['A'] = '1'",
        "os.environ.setdefault('A', '1')",
        "signal.signal(signal.SIGINT, stop)",
        "HANDLER = signal.signal(2, stop)",
        "threading.Thread(target=work).start()",
        "paddle.set_flags({})",
        "paddle.nn.Layer.forward = forward",
        "for name in names: work(name)",
        "class A:\n    LIBRARY = ctypes.CDLL('libc.so.6')",
        "def f(a=open('b')): pass",
    ],
)
def test_what_happens_at_import_is_found(line):
    assert any(acts(node) for node in statements_at_import(ast.parse(line).body))


def test_no_room_is_too_long():
    lengths = {room: len(path.read_text(encoding="utf-8").splitlines()) for room, path in PATHS.items()}
    assert {room: lines for room, lines in lengths.items() if lines > LONGEST_ROOM} == {}


def test_every_wing_is_known():
    """A new folder of glm/ gets its level in LEVELS."""
    assert {wing_of(room) for room in PATHS} == {"glm", *LEVELS}


def test_every_module_and_test_stands_in_the_tests_readme():
    named = set(re.findall(r"\w+\.py", (ROOT / "tests/README.md").read_text(encoding="utf-8")))
    tests = {path.name for path in ROOT.glob("tests/*.py")}
    assert named == tests | {path.name for path in PATHS.values()}


def test_top_of_the_folder():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    assert {path.split("/")[0] for path in listed.stdout.splitlines()} <= TOP
