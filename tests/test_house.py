"""The house keeps its order: a module imports only from rooms before its own."""

from __future__ import annotations

import ast
from pathlib import Path

import mlaconvert

# Each line may import from the lines above it, and nothing from its own.
ORDER = (
    ("errors",),
    ("shipped", "inputs", "ranks"),
    ("config",),
    ("lapack", "scratch", "threads"),
    ("checkpoint", "rope", "factorize", "pictures", "footage", "marks"),
    ("staging",),
    ("writer",),
    ("families", "spectrum", "cache", "data", "vbench", "adapter"),
    ("memory", "attention", "tiny", "lora"),
    ("model",),
    ("rollout",),
    ("calibrate", "drift"),
    ("recipes",),
    ("plan",),
    ("layers", "analyze"),
    ("calibrated", "verify", "journal", "assembly"),
    ("convert",),
    ("base",),
    ("text", "vae"),
    ("records",),
    ("evaluate",),
    ("heal", "generate", "encode", "bench", "integrations"),
    ("demo", "sweep"),
    ("report",),
    ("card", "page", "plots"),
    ("hub",),
    ("cli",),
    ("__main__",),
)
ROOT = Path(mlaconvert.__file__).parent
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ALLOWED_NEIGHBOURS = {("factorize", "rope")}  # the maths needs the rotary frequencies


def imports(path: Path) -> set[str]:
    """First-level rooms that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("mlaconvert.")}
    return found


def test_imports_follow_the_order() -> None:
    modules = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(modules) > 10
    for path in modules:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert room in LEVEL, f"{room} has no place in the order"
        for other in imports(path) - {room, "__version__"}:
            if (room, other) not in ALLOWED_NEIGHBOURS:
                assert LEVEL[other] < LEVEL[room], f"{path.name} imports {other}"
