"""The rooms of the package, lowest first: a module imports from its own room and those below."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "befm_jax"
FLOORS = (
    ("errors",),
    ("files",),
    ("checksums",),
    ("models",),
    ("data",),
    ("tasks",),
    ("evals",),
    ("llama",),
    ("config",),
    ("adapters",),
    ("distributed",),
    ("inference", "training"),
    ("respondents",),
    ("planning",),
    ("cli",),
    ("serving",),
    ("train", "simulate", "evaluate", "plan", "export", "serve", "lm_harness", "__init__"),
)
WITHOUT_JAX = ("errors", "files", "checksums", "models", "data", "tasks", "evals")
JAX = {"jax", "flax", "optax", "orbax"}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Entry points call one another.
TOP = len(FLOORS) - 1


def imports(path):
    """The modules that a file imports, wherever it does: `befm_jax.data.items`, `jax.numpy`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_nothing_imports_from_a_floor_above():
    upward = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        for module in imports(path):
            other = [*module.split("."), ""][1] if module.startswith("befm_jax.") else ""
            same = FLOOR_OF.get(other) == FLOOR_OF[room] and other != room
            if FLOOR_OF.get(other, 0) > FLOOR_OF[room] or (same and FLOOR_OF[room] != TOP):
                upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
        if room in WITHOUT_JAX:
            jax = sorted({m for m in imports(path) if m.split(".")[0] in JAX})
            upward += [f"{path.relative_to(PACKAGE)} imports {module}" for module in jax]
    assert upward == []


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 13
