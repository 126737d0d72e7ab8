"""The container recipe and the systemd unit of docs/deploy: what can be checked without running them."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from mixencoder.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
LOOPBACK = "127.0.0.1"


def options_of_serve() -> set[str]:
    parameters = get_command(app).commands["serve"].params
    return {option for parameter in parameters for option in parameter.opts}


def check_serve(command: list[str]) -> None:
    assert Path(command[0]).name == "mixencoder"
    assert command[1] == "serve"
    assert {word for word in command[2:] if word.startswith("-")} <= options_of_serve()


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.M))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def values(instructions, name: str) -> list[str]:
    return [value for found, value in instructions if found == name]


def test_images_have_a_tag_that_names_a_version(instructions):
    for value in values(instructions, "FROM"):
        image = value.split()[0]
        assert re.fullmatch(r"python:3\.\d+-slim-\w+", image), image


def test_what_is_copied_exists_and_is_not_ignored(instructions):
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for value in values(instructions, "COPY"):
        if not value.startswith("--from"):
            for source in value.split()[:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_the_container_runs_as_an_ordinary_user(instructions):
    last = [index for index, (name, _) in enumerate(instructions) if name == "FROM"][-1]
    users = values(instructions[last:], "USER")
    assert users
    assert users[-1] not in ("0", "root")
    assert not {"ADD"} & {name for name, _ in instructions}
    assert "sudo" not in str(instructions)


def test_the_container_starts_the_server_in_exec_form_and_asks_for_its_health(instructions):
    (entry,) = values(instructions, "ENTRYPOINT")
    command = re.findall(r'"([^"]*)"', entry)
    check_serve(command)
    port = command[command.index("--port") + 1]
    assert values(instructions, "EXPOSE") == [port]
    (health,) = values(instructions, "HEALTHCHECK")
    assert f"{LOOPBACK}:{port}/health" in health


def test_torch_has_the_tested_version(instructions):
    (install,) = [value for value in values(instructions, "RUN") if "pip install" in value]
    assert re.search(r"^torch==[\d.]+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    assert "-c constraints.txt" in install
    assert install.index("torch==") < install.index("[serve]")


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read(DEPLOY / "mixencoder.service", encoding="utf-8")
    assert set(parser.sections()) == {"Unit", "Service", "Install"}
    return parser["Service"]


def test_the_unit_starts_the_server_as_an_ordinary_user(service):
    command = shlex.split(service["ExecStart"])
    check_serve(command)
    assert Path(command[0]).is_absolute()
    assert service["DynamicUser"] == "yes"
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"


def test_systemd_understands_the_unit(service, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "mixencoder.service").read_text(encoding="utf-8")
    # the command must exist
    copy = tmp_path / "mixencoder.service"
    copy.write_text(text.replace(service["ExecStart"].split()[0], "/bin/true"), encoding="utf-8")
    found = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")


def test_the_unit_waits_for_requests_in_work_and_keeps_keys_and_index_where_it_may_read_them(service):
    from mixencoder.serving.settings import ServeConfig

    assert int(service["TimeoutStopSec"]) > ServeConfig().shutdown_seconds
    command = shlex.split(service["ExecStart"])
    assert command[command.index("--api-keys") + 1] == f"%d/{service['LoadCredential'].split(':')[0]}"
    index = command[command.index("--index") + 1]
    assert index.startswith(f"/var/lib/{service['StateDirectory']}/")
    assert command[command.index("--host") + 1] == LOOPBACK
