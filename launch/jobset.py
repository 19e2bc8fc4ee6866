"""A run on Google Kubernetes Engine: the JobSet manifest of it, and the xpk command for clusters made by xpk.

JobSet API: https://jobset.sigs.k8s.io. TPU selectors: https://cloud.google.com/kubernetes-engine/docs/how-to/tpus. GKE
sets TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and, for several slices, MEGASCALE_*; JAX finds its coordinator from them.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from typing import Any

# generation in --topology -> value of cloud.google.com/gke-tpu-accelerator, and chips a machine of a larger slice has
ACCELERATORS = {
    "v4": ("tpu-v4-podslice", 4),
    "v5e": ("tpu-v5-lite-podslice", 4),
    "v5p": ("tpu-v5p-slice", 4),
    "v6e": ("tpu-v6e-slice", 4),
    "tpu7x": ("tpu7x", 4),
}
# generation -> the name that xpk gives its accelerator types, which it reads with a topology too (v5p-4x4x4)
XPK_NAMES = {"v5e": "v5litepod"}
NOT_RETRIABLE = [2, 3]  # exit statuses of `jvlm` (jvlm.cli.main): a user error, an aim missed
IMAGE = "python:3.11"
FETCHER = "gcr.io/google.com/cloudsdktool/google-cloud-cli:slim"


@dataclasses.dataclass(frozen=True)
class GkeSpec:
    """A run on GKE.

    Attributes:
      topology: generation and shape of a slice, "v5p:4x4x4", as jvlm plan writes it.
      output: gs:// folder of runs; the code goes to its sub-folder `code`.
      restarts: how often all is started again after a failure or a preemption.
      service_account: Kubernetes account that may use the bucket (workload identity).
      queue: Kueue's LocalQueue, where the cluster has one.
    """

    name: str
    topology: str
    output: str
    revision: str
    train: tuple[str, ...]
    slices: int = 1
    spot: bool = False
    reservation: str | None = None
    restarts: int = 100
    namespace: str = "default"
    service_account: str = "default"
    queue: str | None = None
    image: str = IMAGE

    def __post_init__(self):
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(f"--name {self.name!r}: small letters, digits and -, from a letter on, 40 at most")
        generation, _, shape = self.topology.partition(":")
        if generation not in ACCELERATORS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
            known = ", ".join(ACCELERATORS)
            raise ValueError(f"--topology {self.topology!r}: a generation of {known}, a colon, a shape: v5p:4x4x4")
        if not self.output.startswith("gs://"):
            raise ValueError(f"--output {self.output!r}: the pod's own disk goes with the pod; give a folder on gs://")

    @property
    def machines(self) -> int:
        """Of one slice, one process each."""
        generation, _, shape = self.topology.partition(":")
        chips = math.prod(map(int, shape.split("x")))
        return max(1, chips // ACCELERATORS[generation][1])

    @property
    def code(self) -> str:
        return f"{self.output.rstrip('/')}/code/jvlm-{self.revision[:12]}.tar.gz"

    def manifest(self) -> dict[str, Any]:
        """Return the JobSet: one Job a slice, one pod a machine; the code is fetched before the training starts."""
        generation, _, shape = self.topology.partition(":")
        accelerator, per_machine = ACCELERATORS[generation]
        chips = min(per_machine, math.prod(map(int, shape.split("x"))))
        selector = {"cloud.google.com/gke-tpu-accelerator": accelerator, "cloud.google.com/gke-tpu-topology": shape}
        if self.spot:
            selector["cloud.google.com/gke-spot"] = "true"
        if self.reservation:
            selector["cloud.google.com/reservation-name"] = self.reservation
        mount = [{"name": "code", "mountPath": "/code"}]
        fetch = f"set -o pipefail; gcloud storage cat {shlex.quote(self.code)} | tar -xz -C /code"
        # exec: the training is the process that gets SIGTERM, and saves before it goes
        train = f"cd /code && pip install -q -c constraints.txt -e '.[tpu,gcs]' && exec {shlex.join(self.train)}"
        pod = {
            "restartPolicy": "Never",
            "serviceAccountName": self.service_account,
            "hostNetwork": True,
            "dnsPolicy": "ClusterFirstWithHostNet",
            "terminationGracePeriodSeconds": 120,
            "nodeSelector": selector,
            "volumes": [{"name": "code", "emptyDir": {}}],
            "initContainers": [
                {"name": "fetch", "image": FETCHER, "command": ["bash", "-c", fetch], "volumeMounts": mount}
            ],
            "containers": [
                {
                    "name": "jvlm",
                    "image": self.image,
                    "command": ["bash", "-c", train],
                    "volumeMounts": mount,
                    "securityContext": {"privileged": True},
                    "resources": {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}},
                }
            ],
        }
        # what stays the same however often it is tried; the JobSet knows it by the reason of the Job
        final = {"containerName": "jvlm", "operator": "In", "values": NOT_RETRIABLE}
        job = {
            "parallelism": self.machines,
            "completions": self.machines,
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": final}]},
        }
        labels = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": self.name,
                "namespace": self.namespace,
                "labels": labels,
                # all machines of a Job in one node pool, which is one slice
                "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
            },
            "spec": {
                "failurePolicy": {
                    "maxRestarts": self.restarts,
                    "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
                },
                "replicatedJobs": [
                    {
                        "name": "slice",
                        "replicas": self.slices,
                        "template": {"spec": {**job, "template": {"spec": pod}}},
                    }
                ],
            },
        }

    def _kubectl(self, *argv: str) -> list[str]:
        return ["kubectl", *argv, f"--namespace={self.namespace}"]

    def upload(self, archive: str) -> list[str]:
        return ["gcloud", "storage", "cp", archive, self.code]

    def apply(self, manifest: str) -> list[str]:
        return self._kubectl("apply", f"--filename={manifest}")

    def get(self) -> list[str]:
        return self._kubectl("get", "jobset", self.name, "--output=json")

    def pods(self) -> list[str]:
        return self._kubectl("get", "pods", f"--selector=jobset.sigs.k8s.io/jobset-name={self.name}", "--output=json")

    def logs(self) -> list[str]:
        """Return the log of worker 0 of slice 0, as far as it has got."""
        return self._kubectl("logs", f"--selector={self._first()}", "--container=jvlm", "--tail=-1")

    def tail(self, pod: str, container: str) -> list[str]:
        """Return the end of the log of one container."""
        return self._kubectl("logs", pod, f"--container={container}", "--tail=200")

    def _first(self) -> str:
        slice_0 = f"jobset.sigs.k8s.io/jobset-name={self.name},jobset.sigs.k8s.io/job-index=0"
        return f"{slice_0},batch.kubernetes.io/job-completion-index=0"

    def delete(self) -> list[str]:
        return self._kubectl("delete", "jobset", self.name, "--ignore-not-found")

    def xpk(self, cluster: str, zone: str, project: str | None, folder: str) -> list[str]:
        """`xpk workload create`: builds an image from the folder of the code, and submits it to the cluster's queue."""
        generation, _, shape = self.topology.partition(":")
        train = f"pip install -q -c constraints.txt -e '.[tpu,gcs]' && {shlex.join(self.train)}"
        tier = ["--spot"] if self.spot else [f"--reservation={self.reservation}"] if self.reservation else []
        return [
            *["xpk", "workload", "create", f"--workload={self.name}", f"--cluster={cluster}", f"--zone={zone}"],
            *([f"--project={project}"] if project else []),
            *[f"--tpu-type={XPK_NAMES.get(generation, generation)}-{shape}", f"--num-slices={self.slices}"],
            *[f"--max-restarts={self.restarts}", f"--base-docker-image={self.image}", f"--script-dir={folder}", *tier],
            f"--command={train}",
        ]

    def xpk_delete(self, cluster: str, zone: str, project: str | None) -> list[str]:
        project = [f"--project={project}"] if project else []
        where = [f"--workload={self.name}", f"--cluster={cluster}", f"--zone={zone}"]
        return ["xpk", "workload", "delete", *where, *project]
