"""The launch files are what their schedulers take; a slip of the pen in them is found."""

import copy
import subprocess
from pathlib import Path

import pytest

from apt_jax.train.distributed import find_job

LAUNCH = Path(__file__).parents[2] / "launch"
JOBSETS = sorted((LAUNCH / "gke").glob("*.yaml"))


def read(path):
    return pytest.importorskip("yaml").safe_load(path.read_text())


def problems(jobset):
    """What JobSet's published model and Kubernetes' own schema do not take."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    validate = pytest.importorskip("kubernetes_validate")
    found = []
    try:
        again = models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
        if again != jobset:
            found.append("the model reads something else")
    except (ValueError, TypeError) as error:
        found.append(str(error))
    for job in jobset["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"},
                 "spec": job["template"]["spec"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
               "spec": job["template"]["spec"]["template"]["spec"]}
        for part in (whole, pod):
            try:
                validate.validate(part, "1.30", strict=True)
            except validate.ValidationError as error:
                found.append(error.message)
    return found


@pytest.mark.parametrize("path", JOBSETS, ids=lambda p: p.stem)
def test_a_jobset_is_what_kubernetes_takes(path):
    assert problems(read(path)) == []


def at(tree, *path):
    for key in path:
        tree = tree[key]
    return tree


POD = ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec")


@pytest.mark.parametrize("slip", [
    lambda j: at(j, "spec").update(replicatedjobs=[]),
    lambda j: at(j, "spec", "failurePolicy").update(maxRestart=3),
    lambda j: at(j, *POD[:5]).update(completionmode="Indexed"),
    lambda j: at(j, *POD).update(restartpolicy="Never"),
    lambda j: at(j, *POD, "containers", 0, "env", 0).update(vaule="x"),
    lambda j: at(j, *POD, "containers", 0).update(command="bash"),
])
def test_a_planted_slip_is_found(slip):
    jobset = copy.deepcopy(read(JOBSETS[0]))
    slip(jobset)
    assert problems(jobset)


def test_the_pods_of_the_gpu_jobset_find_each_other():
    jobset = read(LAUNCH / "gke" / "gpu_h100.yaml")
    job = jobset["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    container = spec["template"]["spec"]["containers"][0]
    fixed = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    named = {e["name"] for e in container["env"] if "valueFrom" in e}
    assert named == {"JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_INDEX"}
    pods, jobs = spec["parallelism"], job["replicas"]
    found = [find_job({**fixed, "JOBSET_NAME": jobset["metadata"]["name"],
                       "REPLICATED_JOB_NAME": job["name"], "JOB_INDEX": str(j),
                       "JOB_COMPLETION_INDEX": str(pod)})
             for j in range(jobs) for pod in range(pods)]
    assert [f.process for f in found] == list(range(pods * jobs))
    assert {f.processes for f in found} == {pods * jobs}
    assert {f.coordinator for f in found} == {"apt-worker-0-0.apt:8476"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_vm.sh", "one_machine_slurm.sh"])
def test_a_script_is_bash(name):
    done = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
