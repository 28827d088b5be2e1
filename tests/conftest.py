"""What every test stands on: no network, one thread, no settings of the developer's, and no silent skips in CI."""

import os
import socket
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny inputs: a second thread costs more than it gives, and with one the sums come out the same everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("SMELT_") and name != "SMELT_SHARED"]:
    del os.environ[name]

SHARED = Path(os.environ.get("SMELT_SHARED", Path(__file__).resolve().parents[2] / "shared"))

# In CI a skip is a failure, unless its reason begins with one of these: what CI cannot be expected to have.
ALLOWED_SKIPS = ("no GPU", "needs the network", "../shared is absent", "not on this platform", "optional package")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout ($SMELT_SHARED/data); skips where there is none."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"../shared is absent: no folder {folder}; set SMELT_SHARED")
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder that `load_settings` and the commands use."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SMELT_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Take back what a test may have set; torch is not imported for tests that do without it."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be reached; anything else fails at once, as it would offline."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(address[0]):
            raise ConnectionRefusedError(f"tests may not reach {address}")
        connect(self, address)

    def look_up_here(host: Any, *arguments: Any, **keywords: Any) -> Any:
        if not is_loopback(host):
            raise socket.gaierror(socket.EAI_AGAIN, f"tests may not look up {host!r}")
        return getaddrinfo(host, *arguments, **keywords)

    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)


def is_loopback(host: Any) -> bool:
    """Whether a host is this machine; None and "" mean every address of it when a server binds."""
    return host in (None, "", "localhost", "::1", "0.0.0.0") or str(host).startswith("127.")


def forbid_silent_skip(report: Any) -> None:
    """Turn a skip for an unexpected reason into a failure when CI is set; expected failures stay as they are."""
    if not (os.environ.get("CI") and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where it should run: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    forbid_silent_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    forbid_silent_skip(report)
    return report


@pytest.fixture(scope="module", params=["torch", "kernels"])
def computed_by(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests twice: with what there is where there is no compiler, and with kernels."""
    # Not before the environment says how many threads there are.
    from kernels_built import built_kernels
    from smelt.models import kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels._BUILD, "future", None)
        patch.setattr(kernels._BUILD, "built", built_kernels() if request.param == "kernels" else None)
        yield
