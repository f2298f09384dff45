"""The deployment files render, parse, and say what the threat model relies on. None was run on hardware."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    for container in containers.values():
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["runAsNonRoot"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
    assert verifier["ports"][0]["containerPort"] == 8443
    assert template["spec"]["automountServiceAccountToken"] is False


def test_only_labelled_pods_may_connect(resources: dict[str, dict[str, Any]]) -> None:
    policy = resources["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    for rule in policy["ingress"]:
        # An empty selector is everybody, as is a rule without `from`.
        assert all(peer["podSelector"]["matchLabels"] for peer in rule["from"])


def test_foreign_images_are_named_by_their_digest(resources: dict[str, dict[str, Any]]) -> None:
    listed = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["images"]
    images = {image["name"]: image for image in listed}
    used = {c["image"] for c in resources["Deployment"]["spec"]["template"]["spec"]["containers"]}
    assert used == set(images)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", images["tritonserver"]["digest"])
    text = (DEPLOY / "container" / "Containerfile").read_text()
    # No default: a build without the argument fails.
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == ["${GRAMINE_IMAGE}"]
    assert "\nARG GRAMINE_IMAGE\n" in text


LOCK = (DEPLOY / "gramine" / "requirements.lock").read_text()
BUILD = (DEPLOY / "gramine" / "build.sh").read_text()


def test_everything_that_the_enclave_installs_has_a_hash() -> None:
    text = re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE).replace("\\\n", " ")
    pinned = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)", line)
        assert match, line
        pinned[match[1]] = match[2]
    (install,) = (line for line in BUILD.splitlines() if "pip install" in line)
    assert "--require-hashes" in install
    assert "--no-deps" in install
    assert "--only-binary :all:" in install
    # The closure: what the package asks for, and what that asks for, on the image's Python.
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["enclave"]]
    met = set()
    while wanted:
        need = Requirement(wanted.pop())
        name = canonicalize_name(need.name)
        if name in met or (need.marker and not need.marker.evaluate({"python_version": "3.10", "extra": ""})):
            continue
        met.add(name)
        assert name in pinned, f"{name} is not in requirements.lock"
        assert need.specifier.contains(pinned[name]), f"{need}, and requirements.lock has {pinned[name]}"
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed = metadata.distribution(name)
            # What another version needs may differ.
            wanted += (installed.requires or []) if installed.version == pinned[name] else []
    assert set(pinned) >= met >= {"numpy", "onnxruntime", "cryptography", "starlette"}


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file, as Gramine measures trusted files."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_byte_code_is_the_same_in_every_build(tmp_path: Path) -> None:
    """The command of build.sh, on the package, at another time and with files of other times."""
    (line,) = (line for line in BUILD.splitlines() if "-m compileall" in line)
    found = []
    for hours in (1, 1000):
        site = tmp_path / "site"
        shutil.copytree(REPOSITORY / "fides_plugins", site, ignore=shutil.ignore_patterns("__pycache__"))
        for path in site.rglob("*.py"):
            os.utime(path, (3600 * hours, 3600 * hours))
        environment = {"PATH": os.environ["PATH"], "python": sys.executable, "site": str(site)}
        subprocess.run(["bash", "-euc", line], env=environment, check=True)
        found.append(tree(site))
        shutil.rmtree(site)
    assert found[0] == found[1]
    assert sum(name.endswith(".pyc") for name in found[0]) > 100


@pytest.mark.skipif(shutil.which("gramine-sgx-sigstruct-view") is None, reason="Gramine is not installed")
def test_the_enclave_built_twice_has_one_measurement(tmp_path: Path, bundle_folder: Path) -> None:
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genrsa", "-3", "-out", str(key), "3072"], check=True)
    found = []
    for _ in range(2):
        command = ["bash", str(DEPLOY / "gramine" / "build.sh"), str(bundle_folder), str(key), ",".join(CLIENTS)]
        done = subprocess.run([*command, str(tmp_path / "enclave")], capture_output=True, text=True, check=True)
        (measured,) = re.findall(r"mr_enclave:\s*([0-9a-f]{64})", done.stdout)
        found.append((measured, tree(tmp_path / "enclave" / "venv")))
    assert found[0] == found[1]


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
    assert "image: nvcr.io/nvidia/tritonserver@sha256:" in result.stdout
