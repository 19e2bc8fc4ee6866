"""The files that deploy the server say what the server, its image and its container need."""

import configparser
import json
import re
import shlex
import tomllib

import pytest
import yaml

from jvlm.cli.serve import Serve
from jvlm.server.arguments import settings_of
from jvlm.server.guard import OPEN_ROUTES
from jvlm.server.listen import SHUTDOWN_SECONDS
from jvlm.swift import words
from tests.support import ROOT

FOLDER = ROOT / "launch" / "serve"


def served(arguments):
    """The arguments of `jvlm serve` as the command reads them."""
    parsed = words.parse(Serve, ["--model", *arguments], "jvlm serve")
    assert not parsed.notes
    return parsed.arguments


@pytest.fixture(scope="module")
def objects():
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "gke.yaml").read_text())}


@pytest.fixture(scope="module")
def steps():
    """The instructions of the Dockerfile, (name, rest) each."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_pod_starts_the_server_with_keys_and_as_no_root(objects):
    spec = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    options = served(container["args"])
    assert options.server.api_key_file is not None
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert options.server.api_key_file.startswith("/keys/")
    assert options.model.startswith("/model/")
    assert {"/keys", "/model", "/cache", "/tmp"} == set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in spec["volumes"]}
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert spec["terminationGracePeriodSeconds"] > SHUTDOWN_SECONDS
    chips = {name: container["resources"][name]["google.com/tpu"] for name in ("requests", "limits")}
    assert chips == {"requests": 1, "limits": 1}


def test_probes_ask_a_route_that_needs_no_key_at_the_server_s_port(objects):
    spec = objects["Deployment"]["spec"]["template"]
    (container,) = spec["spec"]["containers"]
    (port,) = container["ports"]
    assert port["containerPort"] == served(container["args"]).server.port
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] in OPEN_ROUTES
        assert container[name]["httpGet"]["port"] == port["name"]
    labels = spec["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_image_has_what_is_packed_and_runs_the_server_as_no_root(steps):
    names = [name for name, _ in steps]
    copied = {source for name, rest in steps if name == "COPY" for source in rest.split()[:-1] if "--from" not in rest}
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "setup.py", "constraints.txt", "jvlm", "kernels", "configs"} <= copied
    allowed = {
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert allowed == copied
    entry = [json.loads(rest) for name, rest in steps if name == "ENTRYPOINT"]
    assert entry == [["jvlm", "serve"]]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    (extras,) = (rest.partition("=")[2] for name, rest in steps if name == "ARG")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    (check,) = (rest for name, rest in steps if name == "HEALTHCHECK")
    assert re.search(r"127\.0\.0\.1:(\d+)(/\w+)'", check).groups() == ("8000", "/health")


def test_the_unit_starts_the_server_with_keys_and_gives_answers_time_to_end():
    unit = configparser.ConfigParser(delimiters="=", interpolation=None, strict=True)
    unit.optionxform = str
    unit.read_string((FOLDER / "jvlm-serve.service").read_text())
    service = unit["Service"]
    program, command, *arguments = shlex.split(service["ExecStart"])
    assert (program, command) == ("/opt/jvlm/bin/jvlm", "serve")
    options = served(arguments)
    assert options.server.api_key_file == "/etc/jvlm/keys.txt"
    assert int(service["TimeoutStopSec"]) > SHUTDOWN_SECONDS
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == service["ProtectHome"] == "yes"
    cache = f"/var/cache/{service['CacheDirectory']}/"
    assert all(pair.split("=")[1].startswith(cache) for pair in service["Environment"].split()[1:])


def test_an_address_that_others_reach_needs_the_keys_of_these_files(objects, tmp_path):
    from dataclasses import replace

    from jvlm.errors import UserError

    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    server = served(container["args"]).server
    told = {"name": "m", "adapters": (), "max_model_len": 8}
    with pytest.raises(UserError, match="no keys"):
        settings_of(replace(server, api_key_file=None), **told)
    keys = tmp_path / "keys.txt"
    keys.write_text("k" * 32 + "\n")
    keys.chmod(0o600)
    assert len(settings_of(replace(server, api_key_file=str(keys)), **told).keys) == 1
