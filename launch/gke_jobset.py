"""A JobSet that runs one command on TPU slices of a GKE cluster, and again after preemptions.

    python launch/gke_jobset.py run --name NAME --image IMAGE --topology v5p:4x4x4 -- CMD ...
    python launch/gke_jobset.py logs|status|delete --name NAME

`run` creates the JobSet, `render` prints its manifest, `logs` follows the first process, and
`--dry-run` prints every command instead of running it.  A pod's exit code decides what comes next:
0 done; 2 a mistake in the command, the JobSet fails; 75, or a pod taken away, everything is
started again without limit; any other, of an error or a lost process, everything is started again
`--retries` times.  Needs JobSet 0.10 in the cluster (the first with onJobFailureMessagePatterns).
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import yaml

MISTAKE, RESUME = 2, 75
# The label cloud.google.com/gke-tpu-accelerator of a node, by generation.
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
GROUP, CONTAINER = "slice", "befm"
FIRST_POD = (
    "jobset.sigs.k8s.io/jobset-name={name},jobset.sigs.k8s.io/job-index=0,"
    "batch.kubernetes.io/job-completion-index=0"
)


def manifest(
    *,
    name: str,
    image: str,
    command: Sequence[str],
    generation: str,
    shape: str,
    slices: int = 1,
    chips_per_host: int = 4,
    spot: bool = False,
    retries: int = 10,
    grace_seconds: int = 300,
    service_account: str | None = None,
    secret: str | None = None,
    volume: tuple[str, str] | None = None,
    privileged: bool = False,
) -> dict[str, Any]:
    """The JobSet as a tree: a Job for each slice, a pod for each host, the command unchanged.

    `shape` is a slice's topology as GKE writes it, `4x4x4`.  `secret` names a Secret whose
    entries become environment variables, `volume` a PersistentVolumeClaim and where it
    is mounted.  Source of the layout: the CRD jobset.x-k8s.io/v1alpha2.
    """
    hosts = max(1, math.prod(map(int, shape.split("x"))) // chips_per_host)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": image,
        # Kubernetes expands $(NAME) and writes $$ as $; doubled, every dollar arrives as it is.
        "command": [word.replace("$", "$$") for word in command],
        "resources": {"limits": {"google.com/tpu": chips_per_host}},
    }
    if secret:
        container["envFrom"] = [{"secretRef": {"name": secret}}]
    if privileged:
        container["securityContext"] = {"privileged": True}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_seconds,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[generation],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "containers": [container],
    }
    if spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if slices > 1:
        # Slices talk over the data centre network: past the cluster's own network is faster.
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if service_account:
        pod["serviceAccountName"] = service_account
    if volume:
        claim, path = volume
        pod["volumes"] = [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}]
        container["volumeMounts"] = [{"name": "shared", "mountPath": path}]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # One slice, one node pool: pods of two slices never share the chips of one.
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": retries,
                "rules": [
                    rule("mistake", "FailJobSet", 0),
                    rule("resume", "RestartJobSetAndIgnoreMaxRestarts", 1),
                    rule("disrupted", "RestartJobSetAndIgnoreMaxRestarts", 2),
                ],
            },
            "replicatedJobs": [
                {
                    "name": GROUP,
                    "replicas": slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                # The rules of failurePolicy above name these by their index.
                                "rules": [
                                    exit_code(MISTAKE),
                                    exit_code(RESUME),
                                    {
                                        "action": "FailJob",
                                        "onPodConditions": [
                                            {"type": "DisruptionTarget", "status": "True"}
                                        ],
                                    },
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


class Dumper(yaml.SafeDumper):
    """Writes strings so that every YAML reader takes them for strings.

    kubectl reads a bare 1e-4 as a number and, in old versions, a bare y as true; PyYAML does not,
    and would leave both bare.  Bare is only what begins with two letters and is no such word.
    """

    def string(self, text: str) -> yaml.ScalarNode:
        """A string, in double quotes unless it is a plain word."""
        plain = re.fullmatch(r"[A-Za-z]{2}[A-Za-z0-9./-]*", text)
        bare = plain and text.lower() not in ("true", "false", "yes", "no", "on", "off", "null")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if bare else '"')


Dumper.add_representer(str, Dumper.string)


def render(tree: dict[str, Any]) -> str:
    """A manifest as YAML."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=10**9)


def rule(name: str, action: str, index: int) -> dict[str, Any]:
    """What the JobSet does when a Job failed by rule `index` of its podFailurePolicy."""
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"matching FailJob rule at index {index}$"],
    }


def exit_code(code: int) -> dict[str, Any]:
    """A rule of podFailurePolicy: one pod that ends with `code` fails its Job at once."""
    return {
        "action": "FailJob",
        "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [code]},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders, or runs kubectl; returns its exit code."""
    options, command = parse(sys.argv[1:] if arguments is None else arguments)
    kubectl = ["kubectl"]
    if options.context:
        kubectl.append(f"--context={options.context}")
    if options.namespace:
        kubectl.append(f"--namespace={options.namespace}")
    text = None
    if options.verb in ("run", "render"):
        text = render(manifest_of(options, command))
    if options.verb == "render":
        print(text, end="")
        return 0
    arguments_of = {
        "run": ["create", "--filename=-"],
        "logs": [
            *("logs", "--follow", "--tail=-1", f"--container={CONTAINER}"),
            f"--selector={FIRST_POD.format(name=options.name)}",
        ],
        "status": ["get", "jobset", options.name, "--output=wide"],
        "delete": ["delete", "jobset", options.name],
    }
    return step([*kubectl, *arguments_of[options.verb]], text, options.dry_run)


def step(command: list[str], text: str | None, dry_run: bool) -> int:
    """Runs a command with `text` as its input, or prints both as a shell would take them."""
    if dry_run:
        print(shlex.join(command) + (f" <<'MANIFEST'\n{text}MANIFEST" if text else ""))
        return 0
    try:
        return subprocess.run(command, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        print(f"gke_jobset.py: {command[0]}: there is no such program", file=sys.stderr)
        return 2


def manifest_of(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """The manifest for the options of the command line."""
    generation, shape = options.topology
    return manifest(
        name=options.name,
        image=options.image,
        command=command,
        generation=generation,
        shape=shape,
        slices=options.slices,
        chips_per_host=options.chips_per_host,
        spot=options.spot,
        retries=options.retries,
        grace_seconds=options.grace,
        service_account=options.service_account,
        secret=options.secret,
        volume=options.volume,
        privileged=options.privileged,
    )


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command after `--`; ends with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s run|render|logs|status|delete --name NAME [options] [-- CMD ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=["run", "render", "logs", "status", "delete"])
    parser.add_argument("--name", type=label, required=True)
    parser.add_argument("--image", help="a container image with befm_jax[tpu] and the configs")
    parser.add_argument("--topology", type=topology, help="of a slice, such as v5p:4x4x4")
    parser.add_argument("--slices", type=count, default=1, help="default: %(default)s")
    parser.add_argument("--chips-per-host", type=count, default=4, help="default: %(default)s")
    parser.add_argument("--spot", action="store_true", help="nodes that may be taken away")
    parser.add_argument(
        "--retries",
        type=natural,
        default=10,
        help="after errors and lost processes; default: %(default)s",
    )
    parser.add_argument(
        "--grace", type=count, default=300, help="seconds to save in; default: %(default)s"
    )
    parser.add_argument("--service-account", help="the Kubernetes account that the pods run as")
    parser.add_argument("--secret", help="a Secret that becomes environment variables: HF_TOKEN")
    parser.add_argument(
        "--volume",
        type=volume,
        metavar="CLAIM:/PATH",
        help="a PersistentVolumeClaim that all pods mount, for --workdir",
    )
    parser.add_argument("--privileged", action="store_true", help="for nodes before GKE 1.28")
    parser.add_argument("--context", help="kubectl's")
    parser.add_argument("--namespace", help="kubectl's")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command = list(arguments[split + 1 :])
    if options.verb in ("run", "render"):
        for flag in ("image", "topology"):
            if not getattr(options, flag):
                parser.error(f"--{flag} is missing")
        if not command:
            parser.error("give the command to run after --")
        chips = math.prod(map(int, options.topology[1].split("x")))
        if chips % options.chips_per_host:
            parser.error(
                f"--chips-per-host {options.chips_per_host} does not divide the {chips} chips of "
                f"{options.topology[1]}"
            )
    elif command:
        parser.error(f"{options.verb} takes no command")
    return options, command


def label(text: str) -> str:
    """A name that is also a part of pods' host names: short, lower case."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", text):
        raise argparse.ArgumentTypeError(
            f"{text!r}: lower-case letters, digits and -, a letter first, at most 40 in all"
        )
    return text


def topology(text: str) -> tuple[str, str]:
    """`v5p:4x4x4` as ("v5p", "4x4x4")."""
    match = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", text)
    if match is None or match[1] not in ACCELERATORS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not GENERATION:SHAPE such as v5p:4x4x4; generations: "
            + ", ".join(ACCELERATORS)
        )
    return match[1], match[2]


def volume(text: str) -> tuple[str, str]:
    """`runs:/runs` as ("runs", "/runs")."""
    match = re.fullmatch(r"([a-z0-9][-a-z0-9.]*):((?:/[^/:]+)+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not CLAIM:/PATH, such as runs:/runs")
    return match[1], match[2]


def natural(text: str) -> int:
    """A whole number, not negative."""
    if not re.fullmatch(r"[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least one."""
    if not natural(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
