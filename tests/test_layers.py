"""The direction of imports, read from the source: they go one way, like the data."""

import ast
import sys
from pathlib import Path

import pytest
import transformers

import gkd_trainer

PACKAGE = Path(gkd_trainer.__file__).parent
ROOT = Path(__file__).parents[1]

STAGES = {"data", "rollouts", "teachers", "divergence"}
# What a module or folder of the package stands on. Those of one layer do not import one another, unless named below.
LAYERS = [
    {"redaction", "config_effects", "quiet", "compat"},
    {"errors", "transfer", "batch_keys"},
    {"right_padding"},
    {"signals", "types", "urls", "vllm_answers"},
    {"divergence"},
    {"config_values"},
    {"teacher_checks"},
    {"config_checks"},
    {"config"},
    {"models", "vllm_client"},
    STAGES - {"divergence"},
    {"report"},  # a heat-map asks a teacher, and a comparison of students generates
    {"trainer"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def part_of(path):
    """The module or folder of the package that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imported_by(path):
    """The full names of the modules that a file imports, wherever in it and for whatever reason."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
            assert "gkd_trainer" not in names, f"{path.name}: `import gkd_trainer` hides which module is used"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide where a module stands"
            names.add(node.module)
            if node.module == "gkd_trainer":
                names.update(f"gkd_trainer.{alias.name}" for alias in node.names)
    return names


def parts_imported_by(path):
    return {name.split(".")[1] for name in imported_by(path) if name.startswith("gkd_trainer.")} - {"__version__"}


# The package's own __init__ names everything, and imports it when it is used.
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_in_package(path):
    return str(path.relative_to(PACKAGE))


def test_imports_are_found_anywhere_in_a_module(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import torch.nn as nn\n"
        "from gkd_trainer.models import predict\n"
        "if TYPE_CHECKING:\n    from gkd_trainer.trainer import GKDTrainer\n"
        "def late():\n    import gkd_trainer.cli\n    from gkd_trainer import GKDConfig, data\n"
    )
    assert {"torch.nn", "gkd_trainer.cli"} < imported_by(file)
    assert parts_imported_by(file) == {"models", "trainer", "cli", "GKDConfig", "data"}


@pytest.mark.parametrize("line", ["import gkd_trainer", "from . import models", "from ..types import Head"])
def test_imports_that_hide_a_modules_layer_are_refused(tmp_path, line):
    file = tmp_path / "module.py"
    file.write_text(line)
    with pytest.raises(AssertionError, match=r"hides? w"):
        imported_by(file)


def test_every_part_of_the_package_has_its_layer():
    assert {part_of(path) for path in FILES} <= LEVEL.keys()
    assert {"errors", "types", "models", "trainer", *STAGES} <= {part_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_in_package)
def test_a_module_imports_only_from_layers_below(path):
    part = part_of(path)
    for imported in parts_imported_by(path) - {part}:
        assert imported in LEVEL, f"{part} imports gkd_trainer.{imported}, which has no layer"
        assert LEVEL[imported] < LEVEL[part], f"{part} imports {imported}, which does not stand below it"


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) in STAGES], ids=name_in_package)
def test_the_stages_do_not_know_one_another(path):
    assert not parts_imported_by(path) & ((STAGES | {"report", "trainer", "cli"}) - {part_of(path)})


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) == "divergence"], ids=name_in_package)
def test_the_divergence_depends_only_on_torch(path):
    assert parts_imported_by(path) <= {"divergence", "errors", "signals", "types", "batch_keys"}
    others = {name.split(".")[0] for name in imported_by(path)} - {"gkd_trainer", "torch"}
    if path.name in ("triton.py", "triton_topk.py"):  # which are imported where there is a GPU to run it on
        others -= {"triton"}
    assert others <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ["types.py", "batch_keys.py", "right_padding.py", "signals.py", "errors.py"])
def test_the_divergences_dependencies_need_only_torch_too(name):
    others = {imported.split(".")[0] for imported in imported_by(PACKAGE / name)} - {"gkd_trainer", "torch"}
    assert others <= set(sys.stdlib_module_names)


def test_the_lazy_package_imports_nothing_of_its_own_at_run_time():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_run_time = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in at_run_time}
    assert names <= {"__future__", "importlib", "typing"}


TRAINER = PACKAGE / "trainer" / "trainer.py"
PARTS = sorted(path for path in TRAINER.parent.glob("*.py") if path.name not in ("trainer.py", "__init__.py"))


@pytest.mark.parametrize("path", PARTS, ids=name_in_package)
def test_no_part_of_the_trainer_knows_the_trainer(path):
    imported = imported_by(path)
    assert not {name for name in imported if name.startswith("gkd_trainer.trainer.trainer")}
    # `from gkd_trainer.trainer import module` would show as this alone.
    assert "gkd_trainer.trainer" not in imported
    assert "transformers.trainer.Trainer" not in names_imported_by(path)


def names_imported_by(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.name}" for node in nodes for alias in node.names} | {
        f"transformers.trainer.{alias.name}" for node in nodes for alias in node.names if node.module == "transformers"
    }


def test_hooks_of_the_trainer_are_overridden_in_only_one_file():
    """Of all classes that stand before Trainer in GKDTrainer, or derive from it anywhere in the package."""
    own = [cls for cls in gkd_trainer.GKDTrainer.__mro__ if cls.__module__.startswith("gkd_trainer")]
    assert [cls.__name__ for cls in own] == ["GKDTrainer", "GKDMixin"]
    hooks = {name for cls in own for name in vars(cls) if name in dir(transformers.Trainer)}
    assert {"compute_loss", "get_batch_samples", "prediction_step", "_save_rng_state"} <= hooks
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
            if bases & {"Trainer", "AnyTrainer", "GKDMixin", "GKDTrainer", "SFTTrainer"}:
                assert path == TRAINER, f"{name_in_package(path)}: {node.name} overrides hooks of Trainer"


MODULES = [path for path in FILES if not path.name.startswith("__")]


@pytest.mark.parametrize("path", MODULES, ids=name_in_package)
def test_contributing_says_where_each_module_is(path):
    folder = "gkd_trainer" if path.parent == PACKAGE else path.parent.name
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [table] = [part for part in text.split("\n\n") if part.startswith(f"| `{folder}/` |")]
    assert f"`{path.name}`" in table


@pytest.mark.parametrize("path", MODULES, ids=name_in_package)
def test_each_module_has_tests_of_its_name(path):
    relative = path.relative_to(PACKAGE)
    assert (ROOT / "tests" / relative.parent / f"test_{relative.name}").is_file()
