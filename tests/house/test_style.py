"""Cards, sizes, and what is never written."""

from __future__ import annotations

import ast
import re

import pytest

from tests.house.source import REPO, imports, modules

pytestmark = pytest.mark.unit

MAX_CARD_LINES = 8
CARD_KEY = re.compile(r"(Takes|Gives|Knows|Keeps|Never): ")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 6
MAX_NESTING = 3

#: What may pass a budget: where ► why.
EXCEPTIONS: dict[str, str] = {
    "flux_ray/algo/advantages.py compute_advantages arguments": "the tensors that estimators may ask for, by name",
    "flux_ray/algo/objective.py policy_objective arguments": "the tensors of the loss, each by its name",
    "flux_ray/batch/samples.py make_samples arguments": "the parts that a sample is made of, each by its name",
    "flux_ray/rollout/worker.py __init__ arguments": "what one process is told, each by its name",
    "benchmarks/driver_cost.py run arguments": "what its part is asked for, each by its name",
    "flux_ray/model/head.py forward arguments": "the signature of an autograd function",
}

#: Where code is kept small: the package, what shows it, what measures it.
FOLDERS = ("flux_ray", "examples", "benchmarks")

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How deep blocks stand in one another; an elif is no deeper than its if."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            chained = isinstance(node, ast.If) and name == "orelse" and isinstance(child, ast.If)
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not chained)))
    return deepest


def test_every_module_opens_with_its_card():
    wrong = []
    for _, path, tree in modules():
        card = [line for line in (ast.get_docstring(tree) or "").splitlines() if line.strip()]
        needs_keys = path.name != "__init__.py"
        if (not card and path.stat().st_size) or len(card) > MAX_CARD_LINES:
            wrong.append(f"{path.relative_to(REPO)}: {len(card)} lines")
        elif card and needs_keys and not any(CARD_KEY.match(line) for line in card):
            wrong.append(f"{path.relative_to(REPO)}: none of Takes, Gives, Knows, Keeps, Never")
    assert wrong == []


def test_files_and_functions_are_small():
    wrong = []
    for _, path, tree in (module for folder in FOLDERS for module in modules(folder)):
        where = str(path.relative_to(REPO))
        sizes = [(f"{where} lines", len(path.read_text(encoding="utf-8").splitlines()), MAX_FILE_LINES)]
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
                assert node.end_lineno is not None
                sizes += [
                    (f"{where} {node.name} lines", node.end_lineno - node.lineno + 1, MAX_FUNCTION_LINES),
                    (f"{where} {node.name} arguments", len(arguments - {"self", "cls"}), MAX_ARGUMENTS),
                    (f"{where} {node.name} nesting", nesting(node), MAX_NESTING),
                ]
        wrong += [f"{what}: {size} > {most}" for what, size, most in sizes if size > most and what not in EXCEPTIONS]
    assert wrong == []


#: It takes functions of a notebook from one process of a run to another. No file holds one.
PICKLES = "flux_ray.cluster.functions"


def test_nothing_is_pickled_and_no_remote_code_is_trusted():
    wrong = []
    for name, path, tree in modules():
        imported = [(alias.name, node.lineno) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                    for alias in node.names]
        wrong += [f"{path.name}:{line}: {target}" for target, line in [*imports(tree), *imported]
                  if {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"} & set(target.split("."))
                  and name != PICKLES]
        wrong += [f"{path.name}:{node.lineno}: {ast.unparse(node)}" for node in ast.walk(tree)
                  if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save")]
        wrong += [f"{path.name}:{node.value.lineno}: {node.arg}" for node in ast.walk(tree)
                  if isinstance(node, ast.keyword) and node.arg == "allow_pickle"]
        wrong += [f"{path.name}:{node.value.lineno}: trust_remote_code" for node in ast.walk(tree)
                  if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
                  and not (isinstance(node.value, ast.Constant) and node.value.value is False)]
    assert wrong == []


def test_nesting_is_counted():
    chain = "def f():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n"
    tree = ast.parse(f"{chain}  while d:\n   with e:\n    pass")
    assert nesting(tree.body[0]) == 3
