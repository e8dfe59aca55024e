"""The JobSet manifest: valid, no word of the command changed, each end of a pod rightly met."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "gke_jobset.py"
SCHEMA = Path(__file__).with_name("jobset_v1alpha2.schema.json")

# Words that shells, YAML readers and Kubernetes each like to change.
AWKWARD = [
    *("two words", "it's", '"', "", "$(HOME)", "$$x", "`date`", "a;b|c&d", "*", "\\n", "new\nline"),
    *("1e-4", "0x10", "1_000", "12:30:00", "y", "No", "null", "~", "true", "- a", "#no", "a: b"),
    *("{x}", "[x]", "é", "MANIFEST", "%", "@", "!tag", "&a", "*a"),
]
COMMAND = ["python", "-m", "befm_jax.train", "--workdir", "/runs/70b"]
BASIC = ["--name", "behave", "--image", "registry/befm:1", "--topology", "v5p:4x4x4"]


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def rendered(*options: str, command: list[str] = COMMAND) -> dict[str, Any]:
    result = call("render", *BASIC, *options, "--", *command)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def job_of(tree: dict[str, Any]) -> dict[str, Any]:
    (group,) = tree["spec"]["replicatedJobs"]
    return group["template"]["spec"]


def pod_of(tree: dict[str, Any]) -> dict[str, Any]:
    return job_of(tree)["template"]["spec"]


def expanded(word: str) -> str:
    """A command's word as a container gets it: $(NAME) expanded, $$ a dollar (an empty $(NAME))."""
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: "$" if found[0] == "$$" else "", word)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--spot", "--slices", "2"],
        ["--secret", "hf", "--service-account", "trainer", "--privileged"],
        ["--volume", "runs:/runs"],
        ["--retries", "0", "--grace", "30", "--topology", "v6e:1x1", "--chips-per-host", "1"],
    ],
    ids=["plain", "spot slices", "with accounts", "with a volume", "one chip"],
)
def test_the_manifest_is_valid_by_the_schema_of_the_crd(options: list[str]) -> None:
    schema = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(rendered(*options, command=[*COMMAND, *AWKWARD]))


def test_the_schema_would_notice_a_misspelt_field() -> None:
    tree = rendered()
    job_of(tree)["podFailurePolicies"] = job_of(tree).pop("podFailurePolicy")
    with pytest.raises(jsonschema.ValidationError, match="podFailurePolicies"):
        jsonschema.validate(tree, json.loads(SCHEMA.read_text()))


def test_every_word_of_the_command_reaches_the_container_whole() -> None:
    (container,) = pod_of(rendered(command=[*COMMAND, *AWKWARD]))["containers"]
    assert [expanded(word) for word in container["command"]] == [*COMMAND, *AWKWARD]


def test_no_word_is_left_bare_that_some_yaml_reader_takes_for_something_else() -> None:
    text = call("render", *BASIC, "--", *COMMAND, *AWKWARD).stdout
    for word in ("1e-4", "0x10", "1_000", "12:30:00", "y", "No", "null", "~", "true"):
        assert f'- "{word}"\n' in text
    assert "maxRestarts: 10\n" in text  # and a number stays one


@pytest.mark.parametrize(
    ("topology", "chips_per_host", "hosts", "accelerator"),
    [
        ("v5p:4x4x4", 4, 16, "tpu-v5p-slice"),
        ("v5e:16x16", 4, 64, "tpu-v5-lite-podslice"),
        ("v5e:2x4", 8, 1, "tpu-v5-lite-podslice"),
        ("v6e:1x1", 1, 1, "tpu-v6e-slice"),
        ("v4:4x4x4", 4, 16, "tpu-v4-podslice"),
    ],
)
def test_a_pod_for_each_host_and_a_job_for_each_slice(
    topology: str, chips_per_host: int, hosts: int, accelerator: str
) -> None:
    tree = rendered(
        *("--topology", topology, "--chips-per-host", str(chips_per_host), "--slices", "3")
    )
    assert tree["spec"]["replicatedJobs"][0]["replicas"] == 3
    assert job_of(tree)["parallelism"] == job_of(tree)["completions"] == hosts
    pod = pod_of(tree)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.split(":")[1],
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips_per_host}


def test_all_pods_mount_the_claim_that_was_named() -> None:
    pod = pod_of(rendered("--volume", "my-runs:/runs/all"))
    (declared,) = pod["volumes"]
    assert declared["persistentVolumeClaim"] == {"claimName": "my-runs"}
    assert pod["containers"][0]["volumeMounts"] == [
        {"name": declared["name"], "mountPath": "/runs/all"}
    ]


EXIT = "Container {container} for pod default/behave-slice-0-0-x failed with exit code {code} "
MATCHING = "matching FailJob rule at index {index}"
DISRUPTED = "Pod default/behave-slice-0-0-x has condition DisruptionTarget "


def action_after(tree: dict[str, Any], code: int | None) -> str:
    """What the cluster does when one pod ends with `code`, or is taken away (None).

    The Job controller's rules and messages are those of Kubernetes' pkg/controller/job
    (pod_failure_policy.go); the JobSet controller takes the first rule whose reason and pattern
    both match, RestartJobSet if there is none.
    """
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job_of(tree)["podFailurePolicy"]["rules"]):
        exits = rule.get("onExitCodes")
        conditions = [each["type"] for each in rule.get("onPodConditions", [])]
        if exits and code in exits["values"]:
            assert exits["operator"] == "In"
            assert exits["containerName"] == pod_of(tree)["containers"][0]["name"]
            text = EXIT.format(container=exits["containerName"], code=code)
        elif code is None and "DisruptionTarget" in conditions:
            text = DISRUPTED
        else:
            continue
        assert rule["action"] == "FailJob"
        reason, message = "PodFailurePolicy", text + MATCHING.format(index=index)
        break
    for rule in tree["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "action"),
    [
        (2, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        (None, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "RestartJobSet"),
        (134, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_each_end_of_a_pod_is_met_as_the_exit_codes_promise(code: int | None, action: str) -> None:
    tree = rendered("--retries", "5")
    assert job_of(tree)["backoffLimit"] == 0  # one pod's end is its Job's
    assert tree["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert action_after(tree, code) == action


def test_a_dry_run_prints_a_command_that_a_shell_can_run(tmp_path: Path) -> None:
    result = call("run", "--dry-run", *BASIC, "--namespace", "a b", "--", *COMMAND, *AWKWARD)
    assert result.returncode == 0
    assert result.stdout.startswith(
        "kubectl '--namespace=a b' create --filename=- <<'MANIFEST'\napiVersion: "
    )
    standin = tmp_path / "kubectl"
    standin.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{tmp_path}/words"\ncat\n')
    standin.chmod(0o755)
    shell = subprocess.run(
        ["bash", "-c", result.stdout],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert (tmp_path / "words").read_text().splitlines() == [
        *("--namespace=a b", "create", "--filename=-"),
    ]
    assert yaml.safe_load(shell.stdout) == rendered(command=[*COMMAND, *AWKWARD])


def test_run_hands_the_manifest_to_kubectl_and_returns_its_exit_code(tmp_path: Path) -> None:
    standin = tmp_path / "kubectl"
    standin.write_text(f'#!/bin/sh\ncat >"{tmp_path}/manifest"\nexit 7\n')
    standin.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = call("run", *BASIC, "--", *COMMAND, PATH=path)
    assert result.returncode == 7
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == rendered()


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (
            "logs",
            "kubectl --context=c logs --follow --tail=-1 --container=befm "
            "--selector=jobset.sigs.k8s.io/jobset-name=behave,"
            "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0",
        ),
        ("status", "kubectl --context=c get jobset behave --output=wide"),
        ("delete", "kubectl --context=c delete jobset behave"),
    ],
)
def test_the_other_verbs_are_one_kubectl_command_each(verb: str, expected: str) -> None:
    result = call(verb, "--dry-run", "--name", "behave", "--context", "c")
    assert shlex.split(result.stdout) == shlex.split(expected)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["run", *BASIC], "the command to run after --"),
        (["run", "--name", "behave", "--image", "i", "--", "x"], "--topology is missing"),
        (["run", *BASIC, "--topology", "v9:4x4", "--", "x"], "'v9:4x4' is not GENERATION:SHAPE"),
        (["run", *BASIC, "--name", "Be Have", "--", "x"], "'Be Have': lower-case letters"),
        (["run", *BASIC, "--chips-per-host", "3", "--", "x"], "does not divide the 64 chips"),
        (["run", *BASIC, "--retries", "-1", "--", "x"], "'-1' is not a whole number"),
        (["run", *BASIC, "--volume", "gs://b", "--", "x"], "'gs://b' is not CLAIM:/PATH"),
        (["delete", "--name", "behave", "--", "x"], "delete takes no command"),
    ],
)
def test_mistakes_are_named_and_end_with_2(arguments: list[str], wrong: str) -> None:
    result = call(*arguments)
    assert result.returncode == 2
    assert wrong in result.stderr
    assert result.stdout == ""


def test_a_missing_kubectl_is_said(tmp_path: Path) -> None:
    result = call("status", "--name", "behave", PATH=str(tmp_path))
    assert result.returncode == 2
    assert "kubectl: there is no such program" in result.stderr
