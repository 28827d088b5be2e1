#!/bin/sh
# One run on one to three hosts that may come and go: start this on each of them.
#   FIRST_HOST=node1 examples/elastic.sh --config run.yaml
# All hosts must see the same files: SMELT_HOME, the config and the run's --out-dir lie on a shared disk.
# When a host dies the others go on from the last checkpoint; when it is back, start this there again. The run ends
# with FIRST_HOST, where the others meet. Rows of a step (batch_size x gradient_accumulation_steps) must be a multiple
# of every number of ranks that there may be: for 1 to 3 hosts of 2 ranks, of 12.
# Traffic between the hosts is neither encrypted nor authenticated: use a network that you trust.
set -eu

: "${FIRST_HOST:?name or address of the first host, where the others meet}"
: "${RANKS_PER_HOST:=1}" # one for each GPU; on a CPU one
: "${PORT:=29400}"

this_host=$(hostname)
if [ "$this_host" = "$FIRST_HOST" ]; then is_host=1; else is_host=0; fi

exec torchrun \
    --nnodes 1:3 --nproc-per-node "$RANKS_PER_HOST" \
    --rdzv-backend c10d --rdzv-endpoint "$FIRST_HOST:$PORT" --rdzv-id "${RUN_ID:-smelt}" \
    --rdzv-conf "is_host=$is_host,last_call_timeout=10" --max-restarts 100 \
    --local-addr "$this_host" \
    -m smelt train --resume-if-begun "$@"
