"""One launch of training ranks for each world size, of all that the chosen tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import make_family
from tests.model.test_score import written
from tests.tiny import tiny_model
from tests.train.ranks import launch

#: Module of tests ► world size ► the scenario that it reads.
SCENARIOS: dict[str, dict[int, str]] = {
    "test_trainer": {2: "two_ranks", 1: "one_rank"},
    "test_pair_step": {2: "pairs_two", 1: "pairs_one"},
    "test_critic": {2: "critic_two_ranks"},
    "test_skipped": {2: "skips"},
    "test_mixture": {2: "mixture"},
}
#: On two ranks, for tests that are marked `all`.
REPEATS, MIXTURE_REPEATS = "stages_between", "mixture_between"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(folder / "tied", tied=True)
    tiny_model(folder / "untied", tied=False)
    make_family("Qwen 3 MoE", folder / "mixture")
    written(folder / "tied", folder / "scorer")
    return folder


@pytest.fixture(scope="session")
def launched(folder: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The scenarios' results. Two ranks first: one rank goes on from what they have saved."""
    items = [item for item in request.session.items if item.path.parent == Path(__file__).parent]
    modules = {item.path.stem for item in items}
    results: dict[str, Any] = {}
    for world_size in (2, 1):
        wanted = [of[world_size] for module, of in SCENARIOS.items() if module in modules and world_size in of]
        if world_size == 2 and any(item.get_closest_marker("all") for item in items):
            wanted += [REPEATS, MIXTURE_REPEATS]
        results |= launch(wanted, world_size, folder) if wanted else {}
    return results


@pytest.fixture(scope="module")
def two(launched: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """The result of the module's scenario on two ranks."""
    return launched[SCENARIOS[request.path.stem][2]]


@pytest.fixture(scope="module")
def repeats(launched: dict[str, Any]) -> dict[str, Any]:
    return launched[REPEATS]


@pytest.fixture(scope="module")
def one(launched: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    """And on one rank."""
    return launched[SCENARIOS[request.path.stem][1]]
