"""Who may import whom, and which library lives in which part."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.source import REPO, imports, modules

pytestmark = pytest.mark.unit

#: Module, or part, ► level; the longest name that fits counts. A module imports lower levels and its own part.
LEVELS = {
    "flux_ray": 0,
    "flux_ray.records": 0,
    "flux_ray.config": 0,
    "flux_ray.names": 0,
    "flux_ray.errors": 0,
    "flux_ray.formula": 0,
    "flux_ray.lifetime": 0,
    "flux_ray.hugging_face": 0,
    "flux_ray.plugins": 0,
    "flux_ray.ports": 0,
    "flux_ray.run_dir": 0, "flux_ray.signals": 0,
    "flux_ray.accounts": 0, "flux_ray.clock": 0, "flux_ray.background": 0, "flux_ray.vllm_internals": 0,
    "flux_ray.messages": 0,
    "flux_ray.protocols": 0,
    "flux_ray.observability.metrics": 0, "flux_ray.observability.rollouts": 0,
    "flux_ray.observability.described": 0,
    "flux_ray.cluster.functions": 0, "flux_ray.cluster.group": 0,
    "flux_ray.model": 1,
    "flux_ray.algo": 1,
    "flux_ray.batch": 1,
    "flux_ray.algo.explain": 2, "flux_ray.algo.table": 2,   # what they tell of is in algo and in batch
    "flux_ray.reward.answers": 1, "flux_ray.reward.rules": 1, "flux_ray.reward.symbols": 1,
    "flux_ray.cluster.plan": 1,
    "flux_ray.sandbox": 1,
    "flux_ray.data": 2,
    "flux_ray.rollout": 2,
    "flux_ray.reward": 2,
    "flux_ray.reference": 2,
    "flux_ray.train": 2,
    "flux_ray.weights": 2,
    "flux_ray.observability": 2,
    "flux_ray.cluster": 3, "flux_ray.cluster.reaper": 0,
    "flux_ray.driver": 4,
    "flux_ray.offline": 4,
    "flux_ray.run": 5,
    "flux_ray.backends": 6,
    "flux_ray.api": 7, "flux_ray.audit": 6, "flux_ray.replay": 6,
    "flux_ray.translate": 1,
    "flux_ray.settings": 1,
    "flux_ray.info": 1,
    "flux_ray.home": 0, "flux_ray.machine": 0, "flux_ray.held_folder": 0, "flux_ray.secrecy": 0,
    "flux_ray.help": 1,
    "flux_ray.outside_loop": 6, "flux_ray.handed_over": 6, "flux_ray.checkpoints": 6, "flux_ray.metrics": 6,
    "flux_ray.models_of_runs": 6, "flux_ray.pass_rates": 7, "flux_ray.evaluations": 8,
    "flux_ray.local_models": 6, "flux_ray.chat": 7, "flux_ray.generate": 7,
    "flux_ray.further": 8,
    "flux_ray.__main__": 9,
}

#: Library ► the only parts, or modules, that import it.
HOMES = {
    "vllm": {"rollout", "weights"},
    "deepspeed": {"train", "reference"},
    "ray": {"cluster"},
    "hydra": {"__main__"},
    "peft": {"model"},
    "trl": {"backends"},
    "wandb": {"observability"}, "mlflow": {"observability"}, "trackio": {"observability"},
    "unsloth": {"backends"},
    "math_verify": {"reward"},
    "omegaconf": {"config", "names", "run_dir", "observability"},   # the last two read and write config.yaml
}

#: Folders of the repository that are not in the wheel.
BESIDE = ("examples", "benchmarks", "tests")


def level(name: str) -> int | None:
    fits = [known for known in LEVELS if name == known or (name.startswith(f"{known}.") and known != "flux_ray")]
    return LEVELS[max(fits, key=len)] if fits else None


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_level():
    assert [name for name, _, _ in modules() if level(name) is None] == []


def test_imports_go_down_or_stay_in_their_room():
    wrong = []
    for name, path, tree in modules():
        for target, line in imports(tree):
            if not target.startswith("flux_ray") or target == "flux_ray" or part(target) == part(name):
                continue
            below, own = level(target), level(name)
            if below is None or own is None or not (below < own or below == own == 0):
                wrong.append(f"{path.relative_to(REPO)}:{line}: {name} (level {own}) imports {target} (level {below})")
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others():
    """At any depth, and by imports within functions too."""
    targets = {name: {target for target, _ in imports(tree)
                      if target.startswith("flux_ray.") and target != name and not name.startswith(f"{target}.")}
               for name, _, tree in modules()}
    ended: set[str] = set()
    cycles: list[list[str]] = []

    def follow(name: str, way: list[str]) -> None:
        if name in way:
            cycles.append([*way[way.index(name):], name])
        elif name not in ended:
            for target in sorted(targets.get(name, ())):
                follow(target, [*way, name])
            ended.add(name)

    for name in targets:
        follow(name, [])
    assert cycles == []


def test_the_package_needs_nothing_beside_it():
    """The wheel holds it alone."""
    wrong = [f"{path.relative_to(REPO)}:{line}: {target}" for _, path, tree in modules()
             for target, line in imports(tree) if target.split(".")[0] in BESIDE]
    assert wrong == []


def test_libraries_stay_in_their_rooms():
    wrong = []
    for name, path, tree in modules():
        for target, line in imports(tree):
            homes = HOMES.get(target.split(".")[0])
            if homes is not None and part(name) not in homes:
                wrong.append(f"{path.relative_to(REPO)}:{line}: {target} belongs to {', '.join(sorted(homes))}")
    assert wrong == []


def test_the_lower_levels_import_without_ray_vllm_deepspeed():
    """On a laptop that has none of them; in a process of its own, for this one may have them loaded."""
    low = [name for name, _, _ in modules() if level(name) in (0, 1)]
    code = (
        "import sys, importlib\n"
        "for library in ('ray', 'vllm', 'deepspeed', 'hydra'): sys.modules[library] = None\n"
        f"for name in {low!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_is_light():
    heavy = "('torch', 'ray', 'vllm', 'deepspeed', 'omegaconf')"
    code = f"import sys, flux_ray; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_public_name_is_where_the_package_says():
    import flux_ray

    for name in flux_ray.__all__:
        assert getattr(flux_ray, name).__name__ == name
