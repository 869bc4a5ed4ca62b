"""Manifests, images and scripts: what can be told of them without a cluster."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from flux_ray import __main__ as cli
from flux_ray import algo
from flux_ray.cluster.plan import make_plan
from flux_ray.config import validate
from tests.launch.strict import SMALL_RAYJOB, strict

pytestmark = pytest.mark.unit

REPO = Path(__file__).parents[2]
DEFINITION = REPO.parent / "shared" / "crd" / "ray.io_rayjobs.yaml"
MANIFESTS = sorted((REPO / "launch" / "kuberay").glob("*.yaml"))
SCRIPTS = [*sorted((REPO / "launch").glob("*.sh")), REPO / ".ci" / "run"]
DOCKERFILES = {"docker/Dockerfile": "gpu,test", "docker/Dockerfile.cpu": "cpu,test"}


def load(path: Path) -> dict:
    # The whole definition is 1.4 MB: libyaml reads it in a tenth of the time.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.fixture(scope="module")
def whole_schema() -> dict:
    if not DEFINITION.is_file():
        pytest.skip(f"KubeRay's definition of a RayJob is not at {DEFINITION}")
    (version,) = [v for v in load(DEFINITION)["spec"]["versions"] if v["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def errors(manifest: dict, schema: dict) -> list[str]:
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def broken(manifest: dict) -> list[dict]:
    """The manifest with a misspelt field, a missing one and a wrong type."""
    misspelt, missing, wrong = (copy.deepcopy(manifest) for _ in range(3))
    misspelt["spec"]["entrypont"] = misspelt["spec"]["entrypoint"]
    del missing["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    wrong["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "two"
    return [misspelt, missing, wrong]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_against_kuberay_s_definition(path, whole_schema):
    assert errors(load(path), whole_schema) == []
    assert all(errors(manifest, whole_schema) for manifest in broken(load(path)))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_against_what_it_cannot_do_without(path):
    assert errors(load(path), strict(SMALL_RAYJOB)) == []
    assert all(errors(manifest, strict(SMALL_RAYJOB)) for manifest in broken(load(path)))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_s_values(path):
    manifest = load(path)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["spec"]["submissionMode"] == "K8sJobMode"
    cluster = manifest["spec"]["rayClusterSpec"]
    pinned = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[default]=={cluster['rayVersion']}" in pinned
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    for pod in pods:
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_s_command_is_one_that_we_take(path):
    program, verb, *overrides = shlex.split(load(path)["spec"]["entrypoint"])
    assert (program, verb) == ("flux-ray", "train")
    configs: list = []
    cli.compose(overrides, then=configs.append)
    config = validate(configs[0])
    assert config.run_dir.startswith("/data/")
    workers = load(path)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in workers
              for _ in range(group["replicas"])]
    gpus = sum(int(limit.get("nvidia.com/gpu", 0)) for limit in limits)
    wanted = make_plan(config, cluster_gpus=gpus, needs_reference=algo.needs_reference(config.algo)).total
    assert wanted.get("GPU", 0) == gpus and wanted["CPU"] <= sum(int(limit["cpu"]) for limit in limits)


def test_unknown_fields_are_refused_where_the_definition_allows_none():
    schema = strict({"type": "object", "properties": {
        "metadata": {"type": "object", "properties": {}},
        "port": {"x-kubernetes-int-or-string": True},
        "note": {"type": "string", "nullable": True},
        "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
    }})
    assert errors({"metadata": {"x": 1}, "port": 80, "note": None, "free": {"x": 1}}, schema) == []
    assert errors({"port": "http"}, schema) == []
    assert errors({"prot": 80}, schema) and errors({"port": 1.5}, schema) and errors({"note": 1}, schema)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)
    assert path.name == "setup.sh" or path.stat().st_mode & 0o111, f"{path} can't be run"


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "bench.sh", "docs.sh"])
def test_scripts_share_the_set_up(script):
    text = (REPO / "launch" / script).read_text()
    extras = "docs" if script == "docs.sh" else "cpu,test"
    assert "/setup.sh\"" in text and f"flux_setup {extras}" in text and "pip install" not in text


@pytest.mark.parametrize("dockerfile, extras", DOCKERFILES.items())
def test_images_are_made_by_the_same_set_up(dockerfile, extras):
    text = (REPO / dockerfile).read_text()
    assert f". launch/setup.sh && flux_setup {extras}" in text
    assert not re.search(r"\b(pip|uv) .*install", text), "what is installed is launch/setup.sh's to say"
    known = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)


def test_set_up_explains_a_missing_python(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_bytes((REPO / "launch" / "setup.sh").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(["bash", "-c", ". launch/setup.sh && flux_setup cpu"], cwd=tmp_path, timeout=60,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": "no-such-python"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No Python >= 3.11 with the venv module found (tried: no-such-python)" in done.stderr


def test_set_up_names_the_library_that_no_package_brings(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    check = lambda extras: subprocess.run(  # noqa: E731
        ["bash", "-c", f". launch/setup.sh && VENV={tmp_path} && _flux_check_system {extras}"], cwd=REPO, timeout=60,
        capture_output=True, text=True)
    missing = check("cpu,test")
    assert missing.returncode == 1 and "apt install libnuma1" in missing.stderr
    assert check("gpu,test").returncode == 0


def test_an_environment_with_the_gpu_builds_stays_one(tmp_path):
    """What a script asks for is what is installed already: nothing is, and the stamp stays."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").write_text("")
    stamp = "REPO=$PWD; . launch/setup.sh; VENV=" + str(tmp_path) + "; LOG=$VENV/log; "
    script = stamp + 'printf %s "$(_flux_stamp gpu,test)" > $VENV/.installed; flux_setup cpu,test; cat $VENV/.installed'
    done = subprocess.run(["bash", "-c", script], cwd=REPO, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("gpu,test "), (done.stdout, done.stderr)
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("wanted, have, installed", [
    ("cpu", "", "cpu"), ("docs", "", "docs"), ("cpu,test", "docs", "cpu,test"),
    ("cpu,test", "gpu", "gpu,test"), ("docs", "cpu,test", "cpu,test"), ("docs", "gpu,test", "gpu,test"),
    ("docs", "gpu", "gpu,docs"), ("docs", "cpu,docs", "cpu,docs"),
])
def test_docs_is_added_to_what_is_there(wanted, have, installed):
    """So that it takes nothing away, and an environment with the GPU builds is still known as one."""
    done = subprocess.run(["bash", "-c", f". launch/setup.sh && _flux_extras {wanted} '{have}'"], cwd=REPO, timeout=60,
                          capture_output=True, text=True)
    assert done.stdout.strip() == installed


def test_what_builds_the_docs_is_tested_too():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras["docs"]) <= set(extras["test"])


def test_set_up_shows_why_an_installation_failed(tmp_path):
    """A project that can't be built: the phase's name, the end of the log, a failing exit code, and no stamp."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "setup.sh").write_bytes((REPO / "launch" / "setup.sh").read_bytes())
    (tmp_path / "pyproject.toml").write_text("this is not toml")
    done = subprocess.run(["bash", "-c", ". launch/setup.sh && _flux_find_uv() { false; } && flux_setup test"],
                          cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert done.returncode == 1 and "install [test] ... failed" in done.stdout and "toml" in done.stderr.lower()
    assert not (tmp_path / ".venv" / ".installed").exists()


@pytest.mark.parametrize("given", [{}, {"no_proxy": "example.org", "NO_PROXY": "example.org"}])
def test_a_proxy_is_not_asked_for_this_machine_s_dashboard(tmp_path, given):
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text("#!/bin/sh\necho \"$no_proxy $NO_PROXY\" \"$@\"\n")
    ray.chmod(0o755)
    shutil.copytree(REPO / "launch", tmp_path / "launch")   # its environment is beside it: here there is none
    done = subprocess.run(
        ["bash", str(tmp_path / "launch" / "submit.sh"), "seed=1"], capture_output=True, text=True, timeout=60,
        check=True, env={"PATH": f"{ray.parent}:/usr/bin:/bin", "http_proxy": "http://proxy.invalid:3128", **given})
    lower, upper, *command = done.stdout.split()
    before = given.get("no_proxy", "").split()
    assert lower.split(",") == upper.split(",") == [*before, "127.0.0.1", "localhost", "::1"]
    assert command[:4] == ["job", "submit", "--address", "http://127.0.0.1:8265"] and command[-1] == "seed=1"
