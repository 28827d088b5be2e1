"""A run that is stopped after a step, as Ctrl-C stops it."""

import os
import signal
from collections.abc import Callable

from smelt.training.metrics import Event, StepMetrics


def stop_at(step: int) -> Callable[[Event], None]:
    """A sink that presses Ctrl-C when a step is done."""

    def sink(event: Event) -> None:
        if isinstance(event, StepMetrics) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return sink
