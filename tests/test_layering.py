from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("vidtok", "vidgpt") for path in (ROOT / package).rglob("*.py"))


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ENTRIES = {target.partition(":")[0] for target in project()["scripts"].values()}


def imported_names(path: Path) -> Iterator[str]:
    """Every `a.b` of `import a.b`, and `a.b` with `a.b.c` of `from a.b import c`: c may be a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{name.name}" for name in node.names)


def importers(package: str) -> dict[str, set[str]]:
    """The modules that import a package or a part of it, each with the names that it imports from there."""
    found = {
        module_name(path): {name for name in imported_names(path) if f"{name}.".startswith(f"{package}.")} for path in MODULES
    }
    return {module: names for module, names in found.items() if names}


def test_the_walk_sees_every_form_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "module.py").write_text(
        "import a.b\ndef f():\n    from . import x\n    from .y import z\n    from c import d\n"
    )
    names = {"a.b", "pack", "pack.x", "pack.y", "pack.y.z", "c", "c.d"}
    assert set(imported_names(tmp_path / "pack" / "module.py")) == names


def test_vidtok_never_imports_vidgpt() -> None:
    assert not [module for module in importers("vidgpt") if module.split(".")[0] == "vidtok"]


def test_nobody_imports_an_entry() -> None:
    assert len(ENTRIES) >= 7
    assert {entry: importers(entry) for entry in sorted(ENTRIES) if importers(entry)} == {}


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "vector_quantize_pytorch",
            {"vidtok.quantizer", *(f"vidtok.quantizers.{name}" for name in ("finite_scalar", "vector", "simvq"))},
        ),
        ("accelerate", {"vidtok.runner", "vidtok.run.trackers"}),
        ("av", {"vidtok.video", "vidtok.decode"}),
    ],
)
def test_a_library_with_one_home_is_imported_nowhere_else(library: str, homes: set[str]) -> None:
    assert set(importers(library)) - homes == set()


def test_hydra_stays_above_the_entries() -> None:
    above = ENTRIES | {"vidtok.cli", "vidtok.cli_errors", "vidtok.schema"}
    assert set(importers("hydra")) - above == set()
    # config.yaml is written and read with the same YAML rules as conf/; to plain YAML 1e-3 is a string.
    below = {module: names for module, names in importers("omegaconf").items() if module not in above | {"vidtok.run.run_folder"}}
    # A mandatory option is written MISSING, which is a string; nothing else of OmegaConf travels.
    assert {module: names for module, names in below.items() if names != {"omegaconf", "omegaconf.MISSING"}} == {}
    assert [module for module in below if not module.endswith("options")] == []


def test_an_entry_has_at_most_60_lines() -> None:
    lines = {module_name(path): len(path.read_text().splitlines()) for path in MODULES if module_name(path) in ENTRIES}
    assert lines
    assert {module: count for module, count in lines.items() if count > 60} == {}


def test_no_module_bears_a_name_of_the_standard_library() -> None:
    assert [str(path.relative_to(ROOT)) for path in MODULES if path.stem in sys.stdlib_module_names - {"__init__"}] == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_imported_library_is_a_declared_dependency() -> None:
    declared = [*project()["dependencies"], *(line for extra in project()["optional-dependencies"].values() for line in extra)]
    distributions = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower() for line in declared}
    homes = metadata.packages_distributions()
    roots = (
        {name.partition(".")[0] for path in MODULES for name in imported_names(path)}
        - {"vidtok", "vidgpt"}
        - sys.stdlib_module_names
    )
    providers = {root: {re.sub(r"[-_.]+", "-", name).lower() for name in homes.get(root, [root])} for root in roots}
    assert {root: names for root, names in providers.items() if not names & distributions} == {}


def test_importing_the_public_names_brings_no_heavy_or_optional_library() -> None:
    heavy = ["torchvision", "av", "ale_py", "matplotlib", "datasets", "tensorboard", "cv2"]
    code = (
        "import json, sys, vidtok, vidgpt\n"
        "before = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
        "for package in (vidtok, vidgpt):\n"
        "    for name in package.__all__: getattr(package, name)\n"
        f"print(json.dumps([before, [name for name in {heavy} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [[], []]
