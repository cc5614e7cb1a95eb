"""The house: imports run downwards by floors, and no room is too long or too wide."""

import ast

from helpers import ROOT

# From the top: a room imports rooms of lower floors, and those of its own floor that stand after it.
FLOORS = [
    ["finetune_generation"],
    ["utils"],
    ["glm.training.trainer"],
    ["glm.arguments", "glm.training.callbacks", "glm.decoding.decoder"],
    ["glm.checks", "glm.decoding.cache", "glm.decoding.candidates"],
    [
        "glm.training.memory",
        "glm.training.sampler",
        "glm.outputs.checkpoints",
        "glm.modeling",
        "glm.weights.torch_folder",
        "data",
    ],
    ["glm.weights.adapters", "glm.outputs.runs", "glm.weights.optimizer_state"],
    ["glm.weights.loading", "glm.outputs.folder"],
    [
        "glm.weights.formats",
        "glm.metrics",
        "glm.processes",
        "glm.device",
        "glm.training.sampler",
        "glm.records",
    ],
    ["glm.errors", "glm.files"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def path_of(room):
    return ROOT / f"{room.replace('.', '/')}.py"


def imports_of(room):
    """The project's own rooms that ``room`` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path_of(room).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FLOOR.keys()


def test_every_room_stands_on_a_floor():
    rooms = [
        path for pattern in ("*.py", "glm/**/*.py") for path in ROOT.glob(pattern) if path.stem != "__init__"
    ]
    assert {path_of(room) for room in FLOOR} == set(rooms)


def test_imports_run_downwards():
    for room in FLOOR:
        upwards = [other for other in imports_of(room) if FLOOR[other] <= FLOOR[room]]
        assert not upwards, f"{room} imports {upwards}"
    assert imports_of("data") <= {"glm.errors"}
    for room in FLOOR:
        if room.startswith("glm."):
            assert not imports_of(room) & {"data", "utils", "finetune_generation"}, room
