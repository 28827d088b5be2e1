"""OpenAI's fine-tuning: jobs asked for, followed, paused, resumed, cancelled; computes nothing and reads no file."""

import re
import time
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request

from smelt.api.openai import MAX_BODY_BYTES
from smelt.api.openai_desk import IDEMPOTENCY_KEY
from smelt.api.openai_fine_tuning_types import CheckpointObject, EventObject, JobBody, JobObject
from smelt.api.openai_lists import Listing, listing
from smelt.api.openai_parsing import parse, schema_of
from smelt.api.streaming import ClientLeft, NoAnswer, json_body
from smelt.control.fine_tuning import OVER, FineTuning, checkpoint_name, config_of_job
from smelt.control.fine_tuning_story import Event, Story
from smelt.control.runs import Checkpoint
from smelt.errors import InvalidInput, NotFound
from smelt.storage.records import FineTuningJob

DEFAULT_LISTED, MAX_LISTED = 20, 1000
METADATA = re.compile(r"metadata\[(.*)\]")
ALTERNATIVES = {
    "n_epochs": '"auto" or a number of epochs',
    "batch_size": '"auto" or a number of examples',
    "learning_rate_multiplier": '"auto" or a number above 0',
    "beta": '"auto" or a number above 0',
}

Limit = Annotated[int, Query(ge=1, le=MAX_LISTED)]


def router(jobs: FineTuning) -> APIRouter:
    """The routes of fine-tuning."""
    routes = APIRouter(prefix="/v1/fine_tuning", tags=["openai"])
    _add_jobs(routes, jobs)
    _add_steering(routes, jobs)
    _add_stories(routes, jobs)
    return routes


def _add_jobs(routes: APIRouter, jobs: FineTuning) -> None:
    takes = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema_of(JobBody)}}}}

    @routes.post("/jobs", response_model=JobObject, openapi_extra=takes)
    async def create_job(request: Request) -> JobObject | NoAnswer:
        """Fine-tune a model on a file of examples. It is on the disk when this answers, and goes on over restarts."""
        try:
            body = parse(JobBody, await json_body(request, MAX_BODY_BYTES), ALTERNATIVES)
        except ClientLeft:
            return NoAnswer()
        owner = request.state.caller.owner
        key = request.headers.get(IDEMPOTENCY_KEY)
        job = await jobs.create(owner, body.model, body.files(), body.values(), body.suffix, body.metadata, key)
        return await _shown(jobs, job)

    @routes.get("/jobs")
    async def list_jobs(
        request: Request, after: str | None = None, limit: Limit = DEFAULT_LISTED
    ) -> Listing[JobObject]:
        """Your jobs, newest first; with `metadata[NAME]=VALUE` those that have it."""
        named = METADATA.fullmatch
        metadata = {match[1]: value for name, value in request.query_params.items() if (match := named(name))}
        found = await jobs.page(request.state.caller.owner, limit + 1, after, metadata)
        shown = [await _shown(jobs, job) for job in found]
        return listing(shown, limit, lambda job: job, lambda job: job.id)

    @routes.get("/jobs/{job_id}")
    async def show_job(request: Request, job_id: str) -> JobObject:
        """One of them."""
        return await _shown(jobs, await jobs.read(request.state.caller.owner, job_id))


def _add_steering(routes: APIRouter, jobs: FineTuning) -> None:
    @routes.post("/jobs/{job_id}/cancel")
    async def cancel_job(request: Request, job_id: str) -> JobObject:
        """Give a job up. Its run keeps a checkpoint."""
        return await _shown(jobs, await jobs.cancel(request.state.caller.owner, job_id))

    @routes.post("/jobs/{job_id}/pause")
    async def pause_job(request: Request, job_id: str) -> JobObject:
        """Stop a job for now, with a checkpoint."""
        return await _shown(jobs, await jobs.pause(request.state.caller.owner, job_id))

    @routes.post("/jobs/{job_id}/resume")
    async def resume_job(request: Request, job_id: str) -> JobObject:
        """Let a paused job go on from its checkpoint."""
        return await _shown(jobs, await jobs.resume(request.state.caller.owner, job_id))


def _add_stories(routes: APIRouter, jobs: FineTuning) -> None:
    @routes.get("/jobs/{job_id}/events")
    async def list_events(
        request: Request, job_id: str, after: str | None = None, limit: Limit = DEFAULT_LISTED
    ) -> Listing[EventObject]:
        """What has happened to a job, newest first; a step's figures are in `data`."""
        job = await jobs.read(request.state.caller.owner, job_id)
        events = [_shown_event(job, number, event) for number, event in enumerate(await jobs.events(job))]
        return listing(_behind(events[::-1], after)[: limit + 1], limit, lambda event: event, lambda event: event.id)

    @routes.get("/jobs/{job_id}/checkpoints")
    async def list_checkpoints(
        request: Request, job_id: str, after: str | None = None, limit: Limit = 10
    ) -> Listing[CheckpointObject]:
        """What is kept of a job's run on the way, newest first, with the figures of that step."""
        job = await jobs.read(request.state.caller.owner, job_id)
        found = [_shown_checkpoint(job, *each) for each in await jobs.checkpoints(job)]
        return listing(_behind(found, after)[: limit + 1], limit, lambda each: each, lambda each: each.id)

    @routes.get("/checkpoints/{checkpoint:path}/permissions")
    @routes.post("/checkpoints/{checkpoint:path}/permissions")
    async def refuse_permissions(checkpoint: str) -> None:
        """There are none to give."""
        raise InvalidInput(f"{checkpoint[:200]!r} needs no permissions: whoever has a key here may ask every model")


T = TypeVar("T", EventObject, CheckpointObject)


def _behind(found: list[T], after: str | None) -> list[T]:
    """What comes behind the one of that id. NotFound."""
    if after is None:
        return found
    ids = [each.id for each in found]
    if after not in ids:
        raise NotFound(f"there is no {after[:80]!r} in this list")
    return found[ids.index(after) + 1 :]


async def _shown(jobs: FineTuning, job: FineTuningJob) -> JobObject:
    """A job in OpenAI's words, with how its run stands."""
    run = await jobs.run_of(job)
    status = job.state if job.state != "running" or run is None else run.state
    if job.state == "running" and status not in ("queued", "running"):
        status = "running"  # what comes of it is being kept
    config = config_of_job(job)
    tuned = {
        "n_epochs": config.epochs,
        "batch_size": config.batch_size,
        "learning_rate_multiplier": config.learning_rate_multiplier,
    }
    details = tuned | {"beta": config.beta} if config.method == "dpo" else tuned
    seconds_left = None if run is None or job.state in OVER else run.seconds_left
    return JobObject(
        id=job.id,
        created_at=int(job.created),
        finished_at=None if job.finished is None else int(job.finished),
        estimated_finish=None if seconds_left is None else int(time.time() + seconds_left),
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.owner,
        status=status,
        error=job.error,
        training_file=job.request["training_file"],
        validation_file=job.request.get("validation_file"),
        result_files=job.result_files,
        trained_tokens=job.trained_tokens,
        seed=config.seed,
        hyperparameters=tuned,
        method={"type": config.method, config.method: {"hyperparameters": details}},
        integrations=[],
        metadata=job.user_metadata,
        run_id=job.run_id,
    )


def _shown_event(job: FineTuningJob, number: int, event: Event) -> EventObject:
    return EventObject(
        id=f"ftevent-{job.id.removeprefix('ftjob-')}-{number}",
        created_at=int(event.created),
        level=event.level,
        message=event.message,
        type="message" if event.data is None else "metrics",
        data=event.data,
    )


def _shown_checkpoint(job: FineTuningJob, checkpoint: Checkpoint, story: Story) -> CheckpointObject:
    figures = story.steps.get(checkpoint.step)
    return CheckpointObject(
        id=f"ftckpt-{job.id.removeprefix('ftjob-')}-{checkpoint.step}",
        created_at=int(checkpoint.created),
        fine_tuned_model_checkpoint=checkpoint_name(job, checkpoint),
        fine_tuning_job_id=job.id,
        step_number=checkpoint.step,
        metrics={"step": float(checkpoint.step), **({} if figures is None else figures.values)},
    )
