"""The JobSets are what their schemas know, and their pods make one job of apt-jax."""

import copy
import os
import subprocess
from pathlib import Path

import pytest

from apt_jax.config import load_config, validate
from apt_jax.train.distributed import Job, find_job

yaml = pytest.importorskip("yaml")
LAUNCH = Path(__file__).parents[2] / "launch"
KUBERNETES = "1.31"  # older than what GKE offers


@pytest.fixture(params=["gpu", "tpu"])
def jobset(request):
    return yaml.safe_load((LAUNCH / f"jobset_{request.param}.yaml").read_text())


def job_template(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]


def pod_spec(jobset):
    return job_template(jobset)["spec"]["template"]["spec"]


def container(jobset):
    (only,) = pod_spec(jobset)["containers"]
    return only


def round_trips(jobset):
    """Whether the published model keeps every field; it drops those it does not know."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    try:
        return models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(jobset)).to_dict() == jobset
    except ValueError:  # a field is missing or of another type
        return False


def check_kubernetes(jobset):
    """Raises where Kubernetes' own schemas do not know a field of the Job or of the pod."""
    validate = pytest.importorskip("kubernetes_validate").validate
    name = {"name": "x"}
    validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": name,
              "spec": job_template(jobset)["spec"]}, KUBERNETES, strict=True)
    validate({"apiVersion": "v1", "kind": "Pod", "metadata": name, "spec": pod_spec(jobset)},
             KUBERNETES, strict=True)


def test_the_schemas_know_every_field(jobset):
    assert round_trips(jobset)
    check_kubernetes(jobset)


def rename(mapping, old, new):
    mapping[new] = mapping.pop(old)


@pytest.mark.parametrize("typo", [
    lambda j: rename(j["spec"], "replicatedJobs", "replicatedJob"),
    lambda j: rename(j["spec"]["failurePolicy"], "maxRestarts", "maxRestart"),
    lambda j: rename(j["spec"]["failurePolicy"]["rules"][0], "action", "acton"),
    lambda j: rename(job_template(j)["spec"], "parallelism", "paralelism"),
    lambda j: rename(container(j)["resources"], "limits", "limit"),
    lambda j: pod_spec(j).update(terminationGracePeriodSeconds="600"),
], ids=["replicatedJob", "maxRestart", "acton", "paralelism", "limit", "text for a number"])
def test_a_typo_does_not_round_trip(jobset, typo):
    typo(jobset)
    assert not round_trips(jobset)


@pytest.mark.parametrize("typo", [
    lambda j: rename(job_template(j)["spec"], "backoffLimit", "backOffLimit"),
    lambda j: rename(job_template(j)["spec"]["podFailurePolicy"]["rules"][0], "action", "acton"),
    lambda j: rename(pod_spec(j), "restartPolicy", "restartpolicy"),
    lambda j: rename(container(j)["volumeMounts"][0], "mountPath", "path"),
    lambda j: pod_spec(j).update(terminationGracePeriodSeconds="600"),
], ids=["backOffLimit", "acton", "restartpolicy", "path", "text for a number"])
def test_kubernetes_refuses_a_typo(jobset, typo):
    validate = pytest.importorskip("kubernetes_validate")
    typo(jobset)
    with pytest.raises(validate.ValidationError):
        check_kubernetes(jobset)


def test_every_pod_finds_its_place_in_one_job(jobset):
    """As JobSet and the indexed Job fill in the environment, for one and for two replicas."""
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]["parallelism"]
    assert job["template"]["spec"]["completions"] == pods
    assert job["template"]["spec"]["completionMode"] == "Indexed"
    written = {e["name"]: e.get("value") for e in container(jobset)["env"]}
    fields = {e["name"]: e["valueFrom"]["fieldRef"]["fieldPath"]
              for e in container(jobset)["env"] if "valueFrom" in e}
    keys = ("jobset-name", "replicatedjob-name", "job-index")
    assert list(fields.values()) == [
        f"metadata.annotations['jobset.sigs.k8s.io/{key}']" for key in keys]
    assert int(written["APT_JAX_PROCESSES"]) == job["replicas"] * pods

    def place(replica, pod, processes):
        values = (jobset["metadata"]["name"], job["name"], str(replica))
        return find_job({**{k: v for k, v in written.items() if v}, **dict(zip(fields, values)),
                         "APT_JAX_PROCESSES": str(processes), "JOB_COMPLETION_INDEX": str(pod)})

    address = f"apt-jax-{job['name']}-0-0.apt-jax:8476"
    assert [place(0, i, pods) for i in range(pods)] == [
        Job(address, pods, i, None, "JobSet") for i in range(pods)]
    if job["name"] == "slice":
        assert [place(1, i, 2 * pods).process for i in range(pods)] == list(range(pods, 2 * pods))
    assert 8476 in [port["containerPort"] for port in container(jobset)["ports"]]


def test_the_rules_fit_what_train_ends_with(jobset):
    """2 is final, 75 and a lost node do not count; only Jobs that never restart pods may say so."""
    spec, first = job_template(jobset)["spec"], container(jobset)
    assert pod_spec(jobset)["restartPolicy"] == "Never" and spec["backoffLimit"] == 0
    statuses, disrupted = spec["podFailurePolicy"]["rules"]
    assert statuses["onExitCodes"] == {"containerName": first["name"], "operator": "In",
                                       "values": [2, 75]}
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    wrong, saved = jobset["spec"]["failurePolicy"]["rules"]
    assert wrong["action"] == "FailJobSet"
    assert "exit code 2 " in wrong["onJobFailureMessagePatterns"][0]
    assert saved["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert "onJobFailureMessagePatterns" not in saved


def test_chips_hosts_and_topology_agree():
    jobset = yaml.safe_load((LAUNCH / "jobset_tpu.yaml").read_text())
    chips = 1
    for size in pod_spec(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    each = int(container(jobset)["resources"]["limits"]["google.com/tpu"])
    assert chips == each * job_template(jobset)["spec"]["parallelism"]


def test_the_container_becomes_apt_jax_with_the_flags(jobset, tmp_path):
    """Its command, run with stand-ins for python and apt-jax; a signal must reach the latter."""
    for name, code in {"python": 'echo "--flags=of_$3${5:+_on_$5}"', "apt-jax": (
            'echo "$$|$XLA_FLAGS|$LIBTPU_INIT_ARGS|$*"')}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    first = container(jobset)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "XLA_FLAGS": "--mine",
           "APT_JAX_PROCESSES": "8"}
    process = subprocess.Popen([*first["command"], *first["args"]], env=env, text=True,
                               stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    pid, xla, tpu, arguments = out.strip().split("|")
    assert int(pid) == process.pid  # exec: no shell between
    gpu = "nvidia.com/gpu" in first["resources"]["limits"]
    assert (xla, tpu) == (("--flags=of_gpu_on_8 --mine", "") if gpu
                          else ("--mine", "--flags=of_tpu "))
    assert arguments.startswith("train --preempted-status 75 --config configs/")
    words = arguments.split()
    config = load_config(LAUNCH.parent / words[words.index("--config") + 1],
                         [word for word in words if word.startswith("--config.")])
    validate(config)
    for path in (words[words.index("--workdir") + 1], config.data.path, config.init.diffusion,
                 config.init.generator):
        assert path == "" or path.startswith("/data/")  # the claim that all pods mount
