"""The house keeps its order: a package imports only from packages before it, and no modules import in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import mlaconvert

# Each room may import from the rooms before it.
ORDER = (
    "errors",
    "progress",
    "listener",
    "units",
    "config",
    "files",
    "latent",
    "families",
    "model",
    "base",
    "clips",
    "conversion",
    "evaluation",
    "generation",
    "healing",
    "reports",
    "publishing",
    "integrations",
    "demo",
    "cli",
    "__main__",
)
ROOT = Path(mlaconvert.__file__).parent
MOST_LINES, MOST_FILES = 350, 14


def name_of(path: Path) -> str:
    """The dotted name of a module, without the package's own."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"}


def imports(path: Path, *, inside_functions: bool) -> set[str]:
    """The modules of the package that a module imports."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            inner = name.removeprefix("mlaconvert.")
            if inner != name:
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found & MODULES.keys()


def test_packages_import_in_order() -> None:
    assert len(MODULES) > 10
    for name, path in MODULES.items():
        room = name.split(".")[0]
        assert room in ORDER, f"{room} has no place in the order"
        for other in imports(path, inside_functions=True):
            below = other.split(".")[0]
            assert below == room or ORDER.index(below) < ORDER.index(room), f"{name} imports {other}"


def test_no_modules_import_in_a_circle() -> None:
    graph = {name: imports(path, inside_functions=False) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_every_package_says_what_lives_there() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"


def test_only_the_window_knows_the_rule_of_the_window() -> None:
    """Elsewhere a sink is set, printed or handed on, never reckoned with."""
    allowed = {
        "config.streaming",
        "conversion.collected.record",
        "model.window",
        "families.causal",
        "reports.card",
        "reports.plan",
        "integrations.streaming.swap",
        "integrations.sglang.cache",
        "integrations.sglang.transformer",
    }
    readers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "sink_frames" and isinstance(node.ctx, ast.Load)
    }
    assert "model.window" in readers
    assert readers <= allowed, f"{readers - allowed} reckon with the sink; ask model/window.py"


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of every module, with the module's name."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            yield name, node


def test_only_the_geometry_tells_latents_by_their_channels() -> None:
    """Whether a model works on pixels, or has Wan2.2's latents, is a property of `WanConfig`."""
    for name, node in nodes():
        if isinstance(node, ast.Compare) and name not in ("config.geometry", "families.wan"):
            sides = [node.left, *node.comparators]
            channels = any(isinstance(side, ast.Attribute) and side.attr.endswith("_dim") for side in sides)
            fixed = any(isinstance(side, ast.Constant) and side.value in (3, 16, 48) for side in sides)
            assert not (channels and fixed), f"{name}:{node.lineno} knows a VAE by its channels; ask WanConfig"


def test_only_origin_reads_where_a_model_came_from() -> None:
    """What a conversion.json says of its source is read in files/origin.py."""
    for name, node in nodes():
        key = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith((".get", "_section")):
            key = node.args[-1] if ast.unparse(node.func).endswith("_section") else node.args[0]
        if isinstance(key, ast.Constant) and key.value == "source" and name != "files.origin":
            raise AssertionError(f"{name}:{node.lineno} reads a recorded source; ask files/origin.py")  # type: ignore[attr-defined]


def test_only_provenance_asks_whether_clips_can_be_drawn() -> None:
    """The built-in model is known by where it lies (`Checkpoint.is_tiny`), what was made from it by `draws_clips`."""
    knowing = {name for name, node in nodes() if isinstance(node, ast.Name) and node.id == "TINY"}
    assert knowing == {"files.shipped", "files.select", "families.checkpoint", "conversion.provenance"}
    asking = {name for name, node in nodes() if isinstance(node, ast.Attribute) and node.attr == "is_tiny"}
    assert asking == {"conversion.provenance", "conversion.from_clips", "evaluation.sweep", "healing.models"}


def test_tensors_are_changed_in_one_way() -> None:
    """A checkpoint with other tensors is a `ChangedCheckpoint`; nothing else reads in its place or stands in for it."""
    for name, node in nodes():
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            reads = any(isinstance(part, ast.FunctionDef) and part.name == "read" for part in node.body)
            assert not (reads and any(base.endswith("Checkpoint") for base in bases)) or name == "families.changed"
        assert not (isinstance(node, ast.Name) and node.id == "SimpleNamespace"), name


def test_nobody_touches_what_another_keeps_private() -> None:
    """`self._field` and a class's own are; torch's, diffusers' and accelerate's have no public way."""
    foreign = {
        *("_version", "_modules", "_foreach_lerp_", "_exit", "_asdict", "_replace"),  # torch, os, named tuples
        *("_feat_map", "_enc_feat_map", "_diffusers_hook", "_keep_in_fp32_modules", "_no_split_modules"),  # diffusers
        "_reset_state",  # accelerate
    }
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            inside = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert inside or node.attr in foreign | own, f"{name}:{node.lineno} pokes {ast.unparse(node)}"


def test_only_own_clips_generate_from_an_empty_caption() -> None:
    """A teacher's own clips are made in clips/teacher_made.py; other rollouts continue clips or follow prompts."""
    rolling = {name for name, node in nodes() if isinstance(node, ast.Call) and ast.unparse(node.func) == "rollout"}
    others = {"evaluation.drift", "evaluation.bench.runner", "generation.passes", "healing.stages.few_step"}
    assert rolling == {"clips.teacher_made"} | others


MOST_PARAMETERS = 8
# Signatures that another codebase dictates: diffusers makes a model's config of its constructor's parameters, and
# calls of streaming codebases pass what theirs pass.
DICTATED = {
    ("integrations.diffusers", "WanMLATransformer3DModel.__init__"),
    ("integrations.diffusers", "SkyReelsV2MLATransformer3DModel.__init__"),
    ("integrations.streaming.attention", "Streaming.forward"),
}


def parameters(path: Path) -> dict[str, int]:
    """How many parameters each function and method of a module takes, besides self and cls."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                asked = child.args
                names = [one.arg for one in (*asked.posonlyargs, *asked.args, *asked.kwonlyargs)]
                found[f"{owner}{child.name}"] = len(names) - (names[:1] in (["self"], ["cls"]))
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            visit(child, f"{owner}{child.name}." if inside else owner)

    visit(ast.parse(path.read_text()), "")
    return found


def test_no_function_takes_more_parameters_than_one_can_hold() -> None:
    """What belongs together is an object with a name; commands are excepted, whose parameters are their options."""
    many = {
        (name, function)
        for name, path in MODULES.items()
        if not name.startswith("cli.")
        for function, count in parameters(path).items()
        if count > MOST_PARAMETERS
    }
    assert many == DICTATED
