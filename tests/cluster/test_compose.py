"""docker-compose.yml and docs/kuberay.yaml: valid, without secrets, and every command in them is one that exists."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import ray.scripts.scripts
import typer.main
import yaml
from compose import ComposeError, Service, interpolated, load_compose

from archfront.cli.main import app

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
KUBERAY = ROOT / "docs" / "kuberay.yaml"
SERVICES = load_compose(COMPOSE).services
OURS = sorted(set(SERVICES) - {"postgres"})


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return loaded


def check_schema(compose: Mapping[str, Any]) -> None:
    """Against the Compose specification's schema, in the copy that check-jsonschema brings."""
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = json.loads(vendored.read_text(encoding="utf-8"))
    jsonschema.validators.validator_for(schema)(schema).validate(compose)


def check_command(argv: Sequence[str]) -> None:
    """Parse a command as its program would, without running it.

    Raises:
        Exception: an option or an argument that is not known, or whose value is of a wrong type.
    """
    program, *words = argv
    if program == "ray":
        commands = ray.scripts.scripts.cli.commands
        commands[words[0]].make_context(words[0], words[1:])
    elif program == "archfront":
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            name, *words = words
            command = command.commands[name]
        context = command.make_context(command.name, words)
        if command.name == "supervise":
            check_command(context.params["command"])
    elif program == "python":
        assert words[0] == "-c"
        compile(words[1], "health check", "exec")
    else:
        assert program == "pg_isready", program


# The file.


def test_it_is_a_valid_compose_file() -> None:
    check_schema(document())
    check_schema(interpolated(document(), {}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("services", "ray-worker", "comand"), ["archfront"]),
        (("services", "controller", "healthcheck", "retries"), [3]),
        (("services", "controller", "depends_on", "postgres", "condition"), "service_well"),
        (("services", "ray-head", "secrets"), "ray-token"),
        (("volume",), {"files": {}}),
    ],
)
def test_the_schema_finds_a_mistake(path: tuple[str, ...], value: Any) -> None:
    # Not the one object that several services share by an anchor.
    broken = json.loads(json.dumps(document()))
    place = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check_schema(broken)


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_every_service_is_watched_and_started_again(service: Service) -> None:
    assert service.restart == "unless-stopped"
    check = service.healthcheck
    assert check is not None
    assert 0 < check.timeout_s <= check.interval_s * 2
    assert check.retries >= 1


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_as_a_plain_user(name: str) -> None:
    user = SERVICES[name].user
    assert user is not None
    assert not {"0", "root", ""} & set(user.split(":"))
    entry = document()["services"][name]
    assert entry["cap_drop"] == ["ALL"]
    assert not entry.get("privileged")


def test_services_can_be_scaled_and_only_the_database_is_reached_from_outside() -> None:
    for name, entry in document()["services"].items():
        assert "container_name" not in entry
        ports = interpolated(entry.get("ports", []), {})
        assert ports == (["127.0.0.1:5432:5432"] if name == "postgres" else [])


def test_what_services_use_is_declared() -> None:
    compose = load_compose(COMPOSE)
    for name, service in compose.services.items():
        used = {mount.source for mount in service.volumes if mount.is_named}
        assert used <= compose.volumes
        assert set(service.secrets) <= set(compose.secrets)
        entry = document()["services"][name]
        assert set(entry["networks"]) <= compose.networks
        assert set(entry.get("depends_on", {})) <= set(compose.services)
    assert {mount.source for s in compose.services.values() for mount in s.volumes} == compose.volumes
    assert {name for s in compose.services.values() for name in s.secrets} == set(compose.secrets)


def test_every_host_has_the_token_and_only_controllers_have_the_password() -> None:
    for name in OURS:
        assert SERVICES[name].environment["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name].environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray-token"
        assert SERVICES[name].environment["RAY_USAGE_STATS_ENABLED"] == "0"
        assert "ray-token" in SERVICES[name].secrets
    assert [name for name, service in SERVICES.items() if "db-password" in service.secrets] == [
        "postgres",
        "controller",
    ]


SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|_KEY")
SECRET_VALUE = re.compile(r"://[^/@\s:]*:[^/@\s]+@|\b[0-9a-fA-F]{24,}\b")


@pytest.mark.parametrize("path", [COMPOSE, KUBERAY, ROOT / "Dockerfile"], ids=lambda path: path.name)
def test_no_file_holds_a_secret(path: Path) -> None:
    assert not SECRET_VALUE.search(path.read_text(encoding="utf-8"))


def test_secrets_are_named_by_files_only() -> None:
    for service in SERVICES.values():
        for name, value in service.environment.items():
            if SECRET_NAME.search(name):
                assert name.endswith(("_FILE", "_PATH"))
                assert value.removeprefix("/run/secrets/") in service.secrets


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
def test_its_commands_are_known(service: Service) -> None:
    if service.command:
        check_command(service.argv())
    check_command(service.health_argv())


@pytest.mark.parametrize(
    "line",
    [
        "archfront controller --rays=head:6379",
        "archfront controller --jobs=many",
        "archfront controllers --check extra",
        "archfront supervise -- ray start --blocks",
        "ray start --num-cpus=two",
        "ray health-check --adress=127.0.0.1:6379",
        "rayy start",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|not a valid|valid integer|unexpected|rayy"):
        check_command(shlex.split(line))


def test_the_device_is_a_resource_of_ray() -> None:
    argv = load_compose(COMPOSE, {"ARCHFRONT_DEVICE": "board"}).services["ray-worker-device"].argv()
    [resources] = [word.partition("=")[2] for word in argv if word.startswith("--resources=")]
    assert json.loads(resources) == {"device:board": 1}


def test_the_gpu_worker_has_gpus_and_the_image_for_them() -> None:
    entry = document()["services"]["ray-worker-gpu"]
    assert (entry["image"], entry["build"]["target"]) == ("archfront:cuda", "cuda")
    [device] = entry["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", ["cluster.md", "ledger.md"])
def test_the_commands_of_the_documents_are_known(name: str) -> None:
    """Those that begin a line of an indented block."""
    lines = re.findall(r"^    (archfront .+)$", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        check_command(shlex.split(line.removesuffix(" &"), comments=True))


# The reader of it.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$SET and ${SET}", "yes and yes"),
        ("${UNSET}|${UNSET:-a b}|${UNSET-c}", "|a b|c"),
        ("${EMPTY:-d}|${EMPTY-e}", "d|"),
        ("${SET:+f}|${UNSET:+g}|${EMPTY+h}", "f||h"),
        ("$$SET", "$SET"),
    ],
)
def test_variables(text: str, expected: str) -> None:
    assert interpolated({"a": [text]}, {"SET": "yes", "EMPTY": ""}) == {"a": [expected]}


@pytest.mark.parametrize(
    ("text", "words"), [("${UNSET?is needed}", "UNSET: is needed"), ("${EMPTY:?}", "EMPTY"), ("costs $", "no variable")]
)
def test_a_variable_that_must_be_set(text: str, words: str) -> None:
    with pytest.raises(ComposeError, match=re.escape(words)):
        interpolated(text, {"EMPTY": ""})


def test_settings_reach_the_services() -> None:
    settings = {"ARCHFRONT_SECRETS": "/safe", "ARCHFRONT_UID": "1234", "ARCHFRONT_FILES": "s3://bucket"}
    controller = load_compose(COMPOSE, settings).services["controller"]
    assert controller.secrets == {"ray-token": Path("/safe/ray-token"), "db-password": Path("/safe/db-password")}
    assert controller.user == "1234:1000"
    assert "--files=s3://bucket" in controller.command
    assert SERVICES["controller"].secrets["ray-token"] == ROOT / "secrets" / "ray-token"


def test_substitutions_replace_paths_and_nothing_inside_longer_ones() -> None:
    here = {"/files": "/tmp/x/files", "/tmp": "/elsewhere", "/run/secrets/ray-token": "/tmp/token"}
    assert "--files=/tmp/x/files" in SERVICES["controller"].argv(here)
    assert SERVICES["controller"].env(here)["RAY_AUTH_TOKEN_PATH"] == "/tmp/token"
    assert SERVICES["controller"].argv({"/file": "/x", "files": "y"})[-1] == "--files=/files"


def test_health_checks_and_commands_in_words(tmp_path: Path) -> None:
    service = {
        "image": "x",
        "command": "run 'a b' c",
        "environment": ["A=1=2"],
        "healthcheck": {"test": "true && true", "interval": "1m30s", "timeout": "500ms"},
        "volumes": [{"type": "bind", "source": "./here", "target": "/there", "read_only": True}],
    }
    (tmp_path / "c.yml").write_text(json.dumps({"services": {"s": service}}))
    read = load_compose(tmp_path / "c.yml").services["s"]
    assert read.argv() == ["run", "a b", "c"]
    assert read.env() == {"A": "1=2"}
    assert read.healthcheck is not None
    assert (read.healthcheck.interval_s, read.healthcheck.timeout_s) == (90, 0.5)
    assert read.health_argv() == ["/bin/sh", "-c", "true && true"]
    assert not read.volumes[0].is_named
    assert read.volumes[0].read_only


# Kubernetes.


def kuberay() -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, controller = yaml.safe_load_all(KUBERAY.read_text(encoding="utf-8"))
    return cluster, controller


def groups(cluster: Mapping[str, Any]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The `ray start` that KubeRay makes of each group's parameters, and its pod."""
    head = cluster["spec"]["headGroupSpec"]
    workers = cluster["spec"]["workerGroupSpecs"]
    for first, group in [("--head", head), *(("--address=archfront-head-svc:6379", group) for group in workers)]:
        line = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
        yield ["ray", "start", first, *shlex.split(line), "--block"], group["template"]["spec"]


def test_the_manifest_has_a_ray_cluster_and_a_controller() -> None:
    cluster, controller = kuberay()
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert (controller["apiVersion"], controller["kind"]) == ("apps/v1", "Deployment")
    pod = controller["spec"]["template"]
    assert controller["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    [container] = pod["spec"]["containers"]
    check_command(container["command"])
    assert f"--ray={cluster['metadata']['name']}-head-svc:6379" in container["command"]
    for probe in ("readinessProbe", "livenessProbe"):
        check_command(container[probe]["exec"]["command"])
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert pinned == [f"ray=={cluster['spec']['rayVersion']}"]


def test_the_manifests_pods() -> None:
    cluster, controller = kuberay()
    pods = [pod for _, pod in groups(cluster)] + [controller["spec"]["template"]["spec"]]
    assert len(pods) == 4
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        [container] = pod["containers"]
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert set(env["RAY_AUTH_TOKEN"]["valueFrom"]) == {"secretKeyRef"}
        for entry in env.values():
            assert "value" not in entry or not SECRET_NAME.search(entry["name"]) or entry["name"].endswith("_FILE")


def test_the_manifests_ray_nodes_start_and_are_probed() -> None:
    for argv, pod in groups(kuberay()[0]):
        check_command(argv)
        [container] = pod["containers"]
        for probe in (container["readinessProbe"], container["livenessProbe"]):
            if "tcpSocket" in probe:
                assert f"--node-manager-port={probe['tcpSocket']['port']}" in argv
            else:
                check_command(probe["exec"]["command"])
