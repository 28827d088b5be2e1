"""OpenAI's client, asking for what sessions have saved."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from live import serving
from scripted import Scripted, scripted
from smelt.api.app import create_app
from smelt.storage import records
from smelt.storage.records import Record, SavedWeights, Session, TrainingModel

pytestmark = pytest.mark.timeout(60)

PATH = "tinker://s:train:0/sampler_weights/w"
MODEL = TrainingModel(
    owner="local", id="s:train:0", session_id="s", number=0, base_model="org/tiny", served_model="tiny", rank=4
)
WEIGHTS = SavedWeights(
    owner="local", model_id=MODEL.id, type="sampler_weights", name="w", folder="sessions/w", future_id=None
)
KEPT: list[Record] = [
    Session(owner="local", id="s"),
    MODEL,
    WEIGHTS,
    SavedWeights(owner="local", model_id=MODEL.id, type="weights", name="t", folder="sessions/t", future_id=None),
    SavedWeights(owner="eve", model_id=MODEL.id, type="sampler_weights", name="e", folder="e", future_id=None),
]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[openai.OpenAI, Scripted]]:
    with scripted(tmp_path / "home") as (services, model_server), serving(create_app(services)) as address:
        for record in KEPT:
            services.writer.write(lambda connection, record=record: records.add(connection, record)).result(5)
        base_url = f"{address}/oai/api/v1"
        with openai.OpenAI(base_url=base_url, api_key="tml-test", max_retries=0) as client:
            yield client, model_server


@pytest.mark.parametrize(("model", "adapter"), [("tiny", None), (PATH, "sessions/w"), (f"tiny;{PATH}", "sessions/w")])
def test_a_model_is_a_name_or_a_path(started: tuple[openai.OpenAI, Scripted], model: str, adapter: str | None) -> None:
    client, model_server = started
    text = client.completions.create(model=model, prompt="a", max_tokens=2)
    chat = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "b"}])
    assert (text.choices[0].text, chat.choices[0].message.content) == ("<a> two", "<b> two three")
    assert [(asked.model, asked.adapter) for asked in model_server.asked] == [("tiny", adapter)] * 2


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (PATH.replace("/w", "/x"), openai.NotFoundError),
        ("tinker://s:train:0/sampler_weights/e", openai.NotFoundError),
        ("tinker://s:train:0/weights/t", openai.BadRequestError),
        ("tinker://s", openai.BadRequestError),
        (f"other;{PATH}", openai.NotFoundError),
        ("other", openai.NotFoundError),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    started: tuple[openai.OpenAI, Scripted], model: str, error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error):
        started[0].completions.create(model=model, prompt="a")
