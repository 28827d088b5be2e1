"""`smelt train` as torchrun starts it, on two ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path


def train_on_two_ranks(flags: list[str], home: Path, **variables: str) -> None:
    """Run it to its end; where it fails, say what the ranks said."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "SMELT_HOME": str(home), **variables}
    done = subprocess.run(
        [*ranks, "-m", "smelt", "train", *flags], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
