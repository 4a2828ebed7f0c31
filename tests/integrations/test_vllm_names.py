"""The names of vLLM that the plugin relies on, compared with sources: those installed, or those in KIMI_NATIVE_VLLM_SOURCES (a directory
that holds `vllm/`, as an unpacked wheel does). Nothing of vLLM is imported, so any version can be checked on any machine."""

import ast
import functools
import importlib.util
import os
from pathlib import Path

import pytest

from kimi_native.compat.vllm import versions


def sources() -> Path:
    if named := os.environ.get("KIMI_NATIVE_VLLM_SOURCES"):
        return Path(named)
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(spec.submodule_search_locations[0]).parent


@functools.cache
def module_body(root: Path, module: str) -> list[ast.stmt]:
    path = root.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assert path.is_file(), f"vLLM has no module {module}"
    return ast.parse(path.read_text()).body


def defined(body: list[ast.stmt], name: str) -> ast.stmt | None:
    """The statement of `body` that defines `name`, also inside `if` and `try`."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name:
            return statement
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return statement
        if isinstance(statement, ast.If | ast.Try) and (found := defined(statement.body, name)):
            return found
    return None


def find(root: Path, module: str, dotted: str) -> ast.stmt:
    body = module_body(root, module)
    for name in dotted.split("."):
        found = defined(body, name)
        assert found is not None, f"{module} has no {dotted}"
        body = getattr(found, "body", [])
    return found


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(module, name, parameters) for module, names in versions.RELIED_ON.items() for name, parameters in names.items()],
)
def test_name_is_there(module, name, parameters):
    found = find(sources(), module, name)
    if parameters is not None:
        assert isinstance(found, ast.FunctionDef)
        there = [argument.arg for argument in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
        missing = [parameter for parameter in parameters if parameter not in there]
        assert not missing, f"{module}.{name} takes {there}"


def test_a_name_that_is_gone_would_be_seen():
    root = sources()
    with pytest.raises(AssertionError, match="has no AttentionBackend.no_such_method"):
        find(root, "vllm.v1.attention.backend", "AttentionBackend.no_such_method")
    with pytest.raises(AssertionError, match="has no module"):
        find(root, "vllm.no_such_module", "x")
