"""What is in cluster/ as text: scripts, recipes of images, the Kubernetes manifest, by tools that know each format."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from kubernetes.client import models
from spython.main.parse.parsers import SingularityParser

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
SCRIPTS = [*sorted(CLUSTER.rglob("*.sh")), CLUSTER / "slurm.sbatch", REPOSITORY / ".ci" / "run"]


def tool(name: str) -> str:
    """A linter that pip has installed beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    assert found, f"{name} comes with the [test] extra"
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_passes_shellcheck(script):
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_would_find_a_fault(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm -rf $1/*\n")
    assert subprocess.run([tool("shellcheck"), str(tmp_path / "bad.sh")], capture_output=True).returncode == 1


@pytest.mark.parametrize("recipe", ["Containerfile", "Containerfile.serve"])
def test_a_container_recipe_passes_hadolint(recipe):
    # DL3008: Debian keeps one version of a package only, so that a pinned one is gone with its next fix.
    command = [tool("hadolint"), "--ignore", "DL3008", str(CLUSTER / recipe)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def copied(text: str) -> set[str]:
    """What a container recipe copies out of this repository."""
    return {word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()}


def test_the_image_that_serves_is_made_like_the_other_and_starts_the_command():
    from ser_ray.__main__ import VERBS

    serving, container = ((CLUSTER / name).read_text() for name in ("Containerfile.serve", "Containerfile"))
    for part in (r"^FROM .*$", r"^WORKDIR .*$", r"^COPY .*$"):
        assert re.findall(part, serving, re.M) == re.findall(part, container, re.M)
    command = yaml.safe_load(re.search(r"^ENTRYPOINT (.*)$", serving, re.M)[1])
    assert (command[0], command[1] in VERBS) == ("ser-ray", True)


def test_both_recipes_install_the_same_with_the_pinned_versions():
    container = (CLUSTER / "Containerfile").read_text()
    recipe = SingularityParser(str(CLUSTER / "apptainer.def")).parse()["spython-base"]
    assert recipe.fromHeader == re.search(r"^FROM (\S+)", container, re.M)[1]
    assert {line.split()[0] for line in recipe.files} == copied(container)
    for name in copied(container):
        assert (REPOSITORY / name).exists()
    for steps in ("\n".join(recipe.install), container):
        assert "pip install --no-cache-dir -c constraints.txt" in steps


# -- the manifest

RAY_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
"""Of the fields in https://docs.ray.io/en/master/kuberay/references/api.html those that are used, by type."""
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_GROUP = {"rayStartParams", "template"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def check_model(value: dict[str, Any], kind: str) -> None:
    """Hold parsed YAML to a type of Kubernetes' API: known fields, of their types; none that it needs absent."""
    read = getattr(models, kind).model_validate(value, strict=True)
    assert read.model_dump(by_alias=True, exclude_unset=True) == value, f"not all of it is {kind}"


def read_manifest(name: str) -> dict[str, Any]:
    (one,) = yaml.safe_load_all((CLUSTER / name).read_text())
    return one


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return read_manifest("kuberay.yaml")


def check_cluster(cluster: dict[str, Any]) -> None:
    """Hold a RayCluster's spec to the documented fields, and its pods to Kubernetes' types."""
    assert set(cluster) <= RAY_CLUSTER
    assert set(cluster["headGroupSpec"]) <= HEAD_GROUP
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__ == pinned("ray")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay wants strings"
        check_model(group["template"], "V1PodTemplateSpec")
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_manifest_has_fields_that_kuberay_documents(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    check_model(manifest["metadata"], "V1ObjectMeta")
    assert set(manifest["spec"]) <= RAY_JOB
    check_cluster(manifest["spec"]["rayClusterSpec"])


def test_the_service_has_them_too_and_serves_what_the_command_writes():
    from ser_ray import serve
    from ser_ray.serving.settings import Settings

    service = read_manifest("kuberay-serve.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    check_model(service["metadata"], "V1ObjectMeta")
    assert set(service["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    cluster = service["spec"]["rayClusterConfig"]
    check_cluster(cluster)
    content = yaml.safe_load(service["spec"]["serveConfigV2"])
    settings = Settings.model_validate(content["applications"][0].pop("args"))
    written = yaml.safe_load(serve.configuration(settings, content["http_options"]["port"]))
    written["applications"][0].pop("args")
    assert written == content
    places = [*settings.checkpoints.values(), settings.key_file]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert all(any(place.startswith(f"{mount}/") for mount in mounts.values()) for place in places)
        (mode,) = (volume["secret"]["defaultMode"] for volume in pod["volumes"] if "secret" in volume)
        assert not mode & 0o007, "a key file that everybody can read is refused"


def test_every_pod_mounts_what_it_declares_and_what_the_entrypoint_uses(manifest):
    cluster = manifest["spec"]["rayClusterSpec"]
    places = re.findall(r"=(/shared\S*)", manifest["spec"]["entrypoint"])
    assert places
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert all(place.startswith(mounts["shared"] + "/") for place in places)


def test_the_entrypoint_is_a_search_that_reads(manifest):
    from ser_ray import config

    program, *arguments = manifest["spec"]["entrypoint"].split()
    assert (program, arguments[:2]) == ("python", ["-m", "ser_ray.tune"])
    inside = Path(arguments[2]).relative_to(
        re.search(r"^WORKDIR (\S+)", (CLUSTER / "Containerfile").read_text(), re.M)[1]
    )
    space = config.load(REPOSITORY / inside, arguments[3:])
    assert space.storage.results == "/shared/results"


@pytest.mark.parametrize(
    "broken",
    [
        {"containers": [{"name": "x", "imagee": "y"}]},
        {"containers": [{"name": "x", "image": 1}]},
        {"volumes": []},
        {"containers": [{"name": "x"}], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "size": "2Gi"}}]},
    ],
)
def test_a_fault_in_a_pod_would_be_found(broken):
    with pytest.raises((AssertionError, ValueError)):
        check_model({"spec": broken}, "V1PodTemplateSpec")


def pinned(package: str) -> str:
    """Its version in the constraints file."""
    return re.search(rf"^{package}==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M)[1]
