"""POST /predict and /predict/batch: what a text is, as the fourth of the replaced systems had it; computes nothing."""

from typing import Annotated

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from smelt.api import telemetry
from smelt.api.services import Services
from smelt.api.streaming import ClientLeft, NoAnswer, Presence
from smelt.control.bans import NO_KEY, Subject
from smelt.control.classification import Classification, Prediction

MAX_CHARS = 10_000
MAX_TEXTS = 100


def _has_words(text: str) -> str:
    if not text.strip():
        raise ValueError("text has only white space")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text has a lone surrogate, which is not Unicode text")
    return text


Text = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_CHARS), AfterValidator(_has_words)]
ModelName = Annotated[
    str | None, Field(max_length=200, description="name of a classifier; may be left out where there is only one")
]


class PredictBody(BaseModel):
    """A text."""

    model_config = ConfigDict(extra="forbid")

    text: Text
    model: ModelName = None


class PredictBatchBody(BaseModel):
    """Several texts."""

    model_config = ConfigDict(extra="forbid")

    texts: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS)]
    model: ModelName = None


def router(services: Services) -> APIRouter:
    """The two routes."""
    routes = APIRouter(prefix="/predict", tags=["classification"])
    classification = Classification(services.catalogue, services.model_server)

    async def predicted(request: Request, texts: list[str], model: str | None) -> list[Prediction]:
        caller = request.state.caller
        await services.abuse_checker.check_subject(Subject(caller.owner, caller.key_id or NO_KEY, ""))
        async with Presence(request.receive):
            name, found = await classification.predict(texts, model, caller.owner)
        telemetry.count_answer(name, "classified", 0)
        return found

    @routes.post("", response_model=Prediction)
    async def predict(request: Request, body: PredictBody) -> Prediction | Response:
        """The label of a text, and how probable each is."""
        try:
            return (await predicted(request, [body.text], body.model))[0]
        except ClientLeft:
            return NoAnswer()

    @routes.post("/batch", response_model=list[Prediction])
    async def predict_batch(request: Request, body: PredictBatchBody) -> list[Prediction] | Response:
        """The same of several texts, in their order."""
        try:
            return await predicted(request, body.texts, body.model)
        except ClientLeft:
            return NoAnswer()

    return routes
