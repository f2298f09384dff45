"""The deployment files render, parse, and say what the threat model relies on. None was run on hardware."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from fides_plugins.cli import app
from fides_plugins.settings import tomllib
from tests.support.paths import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
CLIENTS = ("11" * 32, "22" * 32)


class Gramine:
    """What gramine-manifest hands to templates."""

    libos = "/usr/lib/gramine/libsysdb.so"

    @staticmethod
    def runtimedir(libc: str = "glibc") -> str:
        return f"/usr/lib/gramine/runtime/{libc}"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((DEPLOY / "gramine" / "fides-verifier.manifest.template").read_text())
    text = template.render(
        gramine=Gramine(),
        python="/opt/fides/venv/bin/python",
        prefix="/opt/fides/venv",
        stdlib="/usr/lib/python3.11",
        arch_libdir="/lib/x86_64-linux-gnu",
        bundle="/srv/bundle",
        clients=",".join(CLIENTS),
        isvsvn="3",
    )
    return tomllib.loads(text)


def options_of(command: list[str]) -> dict[str, list[str]]:
    """Options after `serve-verifier` that the command really has, by the command's own parser."""
    import typer.main

    arguments = command[command.index("serve-verifier") + 1 :]
    parser = typer.main.get_command(app).commands["serve-verifier"]  # type: ignore[attr-defined]
    context = parser.make_context("serve-verifier", list(arguments))
    return dict(context.params)


def test_the_enclave_is_closed(manifest: dict[str, Any]) -> None:
    sgx = manifest["sgx"]
    assert sgx["debug"] is False
    assert sgx["remote_attestation"] == "dcap"
    assert sgx["file_check_policy"] == "strict"
    assert "allowed_files" not in sgx
    assert sgx["max_threads"] >= 8
    assert sgx["enclave_size"] == "512M"
    assert manifest["sys"]["disallow_subprocesses"] is True
    assert "insecure" not in re.sub(r"#.*", "", (DEPLOY / "gramine" / "fides-verifier.manifest.template").read_text())
    # Everything mounted from the host is measured.
    trusted = " ".join(sgx["trusted_files"])
    for mount in manifest["fs"]["mounts"]:
        assert mount.get("type") == "tmpfs" or mount["uri"] in trusted, mount
    assert "file:/srv/bundle/" in sgx["trusted_files"]


def test_the_enclaves_arguments_are_fixed_and_real(manifest: dict[str, Any]) -> None:
    assert "insecure__use_cmdline_argv" not in manifest["loader"]
    found = options_of(manifest["loader"]["argv"])
    assert found["evidence"].value == "gramine-sgx"  # type: ignore[attr-defined]
    assert tuple(found["client"]) == CLIENTS


@pytest.mark.parametrize("script", sorted(DEPLOY.rglob("*.sh")), ids=lambda p: p.name)
def test_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    usage = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert "BUNDLE" in usage.stderr


@pytest.fixture(scope="module")
def unit() -> str:
    return (DEPLOY / "systemd" / "fides-verifier.service").read_text()


def test_the_unit_is_valid(unit: str, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    # The program of the unit is not here: any executable stands for it.
    copy = tmp_path / "fides-verifier.service"
    copy.write_text(unit.replace("/opt/fides/venv/bin/fides", sys.executable))
    result = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    complaints = [line for line in result.stderr.splitlines() if "fides-verifier" in line]
    assert complaints == []


def test_the_units_command_and_protection(unit: str) -> None:
    lines = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    command = lines["ExecStart"].replace("${FIDES_EVIDENCE}", "tdx").replace("$FIDES_CLIENTS", f"--client {CLIENTS[0]}")
    assert options_of(command.split())["evidence"].value == "tdx"  # type: ignore[attr-defined]
    for name, value in {
        "LimitCORE": "0",
        "MemorySwapMax": "0",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
    }.items():
        assert lines[name] == value
    assert int(lines["MemoryMax"].rstrip("M")) >= 150


def test_cloud_init_is_valid() -> None:
    text = (DEPLOY / "cloud-init" / "fides-verifier.yaml").read_text()
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    assert config["ssh_pwauth"] is False
    assert config["users"] == []
    paths = {f["path"]: f for f in config["write_files"]}
    assert {"/etc/fides/verifier.env", "/etc/systemd/system/fides-verifier.service"} <= set(paths)
    assert paths["/etc/fides/verifier.env"]["permissions"] == "0600"
    for command in (*config["bootcmd"], *config["runcmd"]):
        assert all(isinstance(word, str) for word in command)
    assert ["systemctl", "enable", "--now", "fides-verifier.service"] in config["runcmd"]
    if shutil.which("cloud-init"):
        file = DEPLOY / "cloud-init" / "fides-verifier.yaml"
        subprocess.run(["cloud-init", "schema", "--config-file", str(file)], check=True)


@pytest.fixture(scope="module")
def resources() -> dict[str, dict[str, Any]]:
    folder = DEPLOY / "kubernetes"
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == sorted(p.name for p in folder.glob("*.yaml") if p.name != "kustomization.yaml")
    loaded = [yaml.safe_load((folder / name).read_text()) for name in listed]
    return {resource["kind"]: resource for resource in loaded}


def test_kubernetes_manifests_fit_together(resources: dict[str, dict[str, Any]]) -> None:
    template = resources["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert resources["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    containers = {c["name"]: c for c in template["spec"]["containers"]}
    ports = {p["name"]: p["containerPort"] for c in containers.values() for p in c["ports"]}
    assert {p["targetPort"] for p in resources["Service"]["spec"]["ports"]} <= set(ports)
    assert {p["port"] for p in resources["NetworkPolicy"]["spec"]["ingress"][0]["ports"]} == set(ports.values())
    volumes = {v["name"] for v in template["spec"]["volumes"]}
    mounted = {m["name"] for c in containers.values() for m in c["volumeMounts"]}
    assert mounted == volumes
    verifier = containers["verifier"]
    assert verifier["resources"]["limits"]["sgx.intel.com/epc"] == "512Mi"
    assert verifier["securityContext"]["readOnlyRootFilesystem"] is True
    assert verifier["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert verifier["ports"][0]["containerPort"] == 8443
    assert template["spec"]["automountServiceAccountToken"] is False


def test_kustomize_renders_the_manifests() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    result = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes")], capture_output=True, text=True, check=True
    )
    kinds = [document["kind"] for document in yaml.safe_load_all(result.stdout)]
    assert sorted(kinds) == ["Deployment", "NetworkPolicy", "Service"]
    assert "image: fides-verifier:0.1.0" in result.stdout
