"""Families of routes: which scopes open a path, and in which shape it tells of errors; knows no handler.

A path that no family claims is refused, whoever asks: a new route has to be placed here on purpose.
"""

from dataclasses import dataclass
from typing import Literal

from smelt.control.keys import SCOPES

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Shape = Literal["openai", "detail", "success", "status_code"]


@dataclass(frozen=True, slots=True)
class Family:
    """Routes below one path. Any one of `scopes` opens them; `public` ones need no key.

    `changing`: what opens methods that change something, where that takes another scope than to look.
    """

    scopes: frozenset[str] = frozenset()
    shape: Shape = "detail"
    public: bool = False
    page: bool = False  # for people: a browser that is not logged in is sent to the login page
    always: bool = False  # answered however many requests there are
    changing: frozenset[str] | None = None
    uploads: bool = False  # bodies go to the disk as they come, so they may be as large as max_upload_mb

    def scopes_for(self, method: str) -> frozenset[str]:
        """The scopes of which one opens a route to a method."""
        return self.scopes if self.changing is None or method in SAFE_METHODS else self.changing


ANY = frozenset(SCOPES)
ADMIN = frozenset({"admin"})
TRAINING = Family(frozenset({"training"}))
INFERENCE = frozenset({"inference"})
OPENAI = Family(INFERENCE, "openai")
PAGE = Family(ANY, page=True)
PUBLIC = Family(public=True)

# By path; each claims what lies below it too.
FAMILIES: dict[str, Family] = {
    "/": PAGE,
    "/dashboard": PAGE,
    "/docs": PAGE,
    "/openapi.json": Family(ANY),
    "/health": Family(ANY),
    "/healthz": Family(public=True, always=True),
    "/metrics": Family(ADMIN),  # it tells of everybody's use
    "/login": Family(public=True, page=True),
    "/logout": Family(public=True, page=True),
    "/static": PUBLIC,
    "/v1/models": Family(ANY, "openai", changing=ADMIN),
    "/v1/aliases": Family(ANY, changing=ADMIN),
    "/v1/imports": Family(ADMIN),
    "/api/model": Family(ANY, "success", changing=ADMIN),
    "/v1/completions": OPENAI,
    "/v1/chat/completions": OPENAI,
    "/v1/embeddings": OPENAI,
    "/v1/files": Family(frozenset({"training", "inference"}), "openai", uploads=True),
    "/v1/uploads": Family(frozenset({"training", "inference"}), "openai", uploads=True),
    "/v1/batches": OPENAI,
    "/v1/fine_tuning": Family(frozenset({"training"}), "openai"),
    "/completions": Family(INFERENCE, "status_code"),
    "/predict": Family(INFERENCE),
    "/api/generate": Family(INFERENCE, "success"),
    "/api/training": Family(frozenset({"training"}), "success", uploads=True),
    **dict.fromkeys(("/sample", "/generate"), Family(INFERENCE)),
    "/merge_lora": Family(ADMIN),  # a model is everybody's
    **dict.fromkeys(("/loss_functions", "/get_server_capabilities"), Family(ANY)),
    **{
        f"/{name}": TRAINING
        for name in (
            "fwdbwd",
            "optim_step",
            "retrieve_future",
            "add_lora",
            "remove_lora",
            "adapters",
            "save_weights",
            "save_weights_for_sampler",
            "load_weights",
        )
    },
    "/v1/runs": TRAINING,
    "/v1/sessions": TRAINING,
    "/v1/recipes": TRAINING,
    "/v1/datasets": Family(frozenset({"training"}), uploads=True),
    "/api/v1": Family(frozenset({"training", "inference"})),
    **{
        f"/api/v1/{name}": TRAINING
        for name in (
            "forward_backward",
            "optim_step",
            "save_weights",
            "save_weights_for_sampler",
            "save_weights_external",
            "load_weights",
            "create_model",
            "unload_model",
            "copy_weights",
            "training_runs",
            "checkpoints",
        )
    },
    "/oai/api/v1": OPENAI,
    "/api/v1/healthz": Family(public=True, always=True),
    "/api/v1/downloads": PUBLIC,  # the address itself is signed
    "/v1/workers": Family(ANY),
    "/v1/bans": Family(ADMIN),
}


def family_of(path: str) -> Family | None:
    """The family that claims a path; None where none does."""
    if (family := FAMILIES.get(path)) is not None:
        return family
    # What lies below "/" would be everything, so "/" claims itself alone.
    while len(path := path.rpartition("/")[0]) > 1:
        if (family := FAMILIES.get(path)) is not None:
            return family
    return None


def shape_of(path: str) -> Shape:
    """How errors look there. Where nothing is, OpenAI's clients are the ones that ask below /v1."""
    family = family_of(path)
    if family is not None:
        return family.shape
    return "openai" if path.startswith("/v1/") else "detail"
