"""Imports point one way (see `docs`/README, "How it is built")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Layer → the layers it may import from, by module prefix. First match wins.
ALLOWED = {
    "lowering.numerics": (),
    "lowering.registry": ("lowering.numerics",),
    "lowering.ops": ("lowering.ops", "lowering.registry", "lowering.numerics"),
    "lowering.cpu": ("lowering.cpu", "lowering.ops", "lowering.registry", "lowering.numerics"),
    "lowering.triton": ("lowering.triton", "lowering.ops", "lowering.registry", "lowering.numerics"),
    "lowering.onnx": ("lowering.onnx", "lowering.ops", "lowering.registry", "lowering.numerics"),
    "int8pass.errors": (),
    "int8pass.qdq": ("int8pass.qdq", "int8pass.errors"),
    "int8pass.recipe_file": ("int8pass.errors", "int8pass.recipe"),
    "int8pass.recipe": ("int8pass.errors", "int8pass.recipe_file"),
    "int8pass.graph": ("int8pass.graph", "int8pass.capture", "int8pass.errors", "lowering.registry"),
    "int8pass.regions": ("int8pass.errors",),
    "int8pass.capture": ("int8pass.graph.constants", "int8pass.errors", "int8pass.regions"),
    "int8pass.asked_once": (),
    "int8pass.lower": ("int8pass.asked_once", "int8pass.capture", "int8pass.errors", "int8pass.graph", "lowering"),
}
_STAGE = ("int8pass.graph", "int8pass.capture", "int8pass.errors", "int8pass.recipe", "int8pass.match",
          "lowering.ops", "lowering.numerics")  # fmt: skip
for _name in ("normalize", "match", "folds", "quantize", "attention", "masks"):
    ALLOWED[f"int8pass.{_name}"] = _STAGE
ALLOWED["int8pass.fuse"] = (*_STAGE, "int8pass.attention")
ALLOWED["int8pass.smooth"] = (*_STAGE, "int8pass.folds")


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in found if name.split(".")[0] in {"int8pass", "lowering"}}


def _module(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("int8pass/**/*.py"), *ROOT.glob("lowering/**/*.py")])


@pytest.mark.parametrize("path", _sources(), ids=_module)
def test_imports_follow_the_layers(path: Path) -> None:
    module = _module(path)
    for prefix, allowed in ALLOWED.items():
        if module == prefix or module.startswith(prefix + "."):
            wrong = {name for name in _imports(path) if not name.startswith(tuple(allowed) or ("-",))}
            assert not wrong, f"{module} may not import {sorted(wrong)}"
            break
    if module.startswith("lowering"):
        assert not any(name.startswith("int8pass") for name in _imports(path))


def _short_strings(path: Path) -> list[str]:
    constants = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    return [c.lower() for c in constants if isinstance(c, str) and "\n" not in c and len(c) < 40]


def test_no_model_names_inside_the_pass() -> None:
    names = ("llama", "gemma", "bloom", "falcon", "mistral", "qwen", "bert")
    outside = {"hub.py", "cli.py", "measure.py"}  # these load models for people
    for path in _sources():
        if path.name not in outside:
            assert not [s for s in _short_strings(path) if any(name in s for name in names)], path


def test_importing_int8pass_needs_torch_alone() -> None:
    code = (
        "import sys\n"
        "absent = ('onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'openvino')\n"
        "absent += ('transformers', 'rich', 'typer', 'gguf')\n"
        "for name in absent: sys.modules[name] = None\n"
        "import int8pass\n"
        "assert 'lowering.triton' not in sys.modules and 'int8pass.cli' not in sys.modules\n"
        "print(int8pass.presets())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout
