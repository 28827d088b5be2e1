"""Dockerfile and compose.yaml against what they rely on, as far as that can be said without docker."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from smelt.cli import app
from smelt.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of each instruction; comments are left out, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


STEPS = instructions(DOCKERFILE)


def values(word: str) -> list[str]:
    return [rest for step, rest in STEPS if step == word]


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return found


def test_the_image_is_built_of_files_that_are_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for copied in values("COPY"):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in kept, f"{source} is left out by .dockerignore"


def test_the_image_has_a_python_and_extras_that_the_project_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (image,) = values("FROM")
    assert image.startswith(f"python:{project['requires-python'].removeprefix('>=')}-")
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for installed in re.findall(r"pip install[^&]*", " ".join(values("RUN"))):
        assert "--constraint constraints.txt" in installed
        assert "--no-cache-dir" in installed


def test_the_image_runs_a_command_of_smelt_without_rights() -> None:
    assert [json.loads(rest) for rest in values("ENTRYPOINT")] == [["smelt"]]
    (command,) = (json.loads(rest) for rest in values("CMD"))
    assert command[0] in app.VERBS
    words = [word for word, _ in STEPS]
    assert values("USER") == ["smelt"]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")


def test_the_image_sets_settings_that_exist() -> None:
    names = re.findall(r"SMELT_(\w+)=", " ".join(values("ENV")))
    assert names
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    assert f"SMELT_HOME={values('VOLUME')[0]} " in values("ENV")[0]


@pytest.mark.parametrize("name", ["server", "server-postgres"])
def test_a_server_of_compose_is_published_to_this_machine_alone(name: str) -> None:
    service = services()[name]
    (port,) = service["ports"]
    assert port.startswith("127.0.0.1:")
    assert port.endswith(f":{values('EXPOSE')[0]}")
    assert service["volumes"] == [f"data:{values('VOLUME')[0]}"]
    assert service["cap_drop"] == ["ALL"]


def test_the_server_with_postgres_waits_for_a_database_that_it_can_reach() -> None:
    found = services()
    server, database = found["server-postgres"], found["database"]
    assert server["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert "healthcheck" in database
    url = server["environment"]["SMELT_DATABASE"].replace("${POSTGRES_PASSWORD:-}", "secret")
    assert url.startswith("postgresql://"), "what SMELT_DATABASE takes"
    parsed = make_url(url)
    given = database["environment"]
    assert (parsed.host, parsed.username, parsed.database) == (
        "database",
        given["POSTGRES_USER"],
        given["POSTGRES_DB"],
    )
