#!/usr/bin/env bash
# A standing Ray cluster on hosts that ssh reaches, or over the nodes of an interactive Slurm allocation:
#
#   cluster/up.sh head-host other-host ...        the first is the head
#   salloc --nodes=2 ... ; cluster/up.sh          inside the allocation: its nodes
#
# Then, from the head or through the tunnel that is printed, as often as you like:
#
#   ray job submit --working-dir . -- python -m ser_ray.tune SPACE.yaml storage.results=/shared/results ...
#
# and cluster/down.sh. Needs: this package in the same Python on every host, and a home directory that they share (the
# token that guards the cluster lies there; without a shared home copy ~/.ray/auth_token to every host first).
#
# Variables: SER_RAY_PYTHON (the Python with this package), SER_RAY_PORT (6379), SER_RAY_DASHBOARD (8265, on the head's
# loopback), SER_RAY_CPUS and SER_RAY_GPUS (of every host; empty: all that it has), SER_RAY_SSH (ssh).
set -euo pipefail

python=${SER_RAY_PYTHON:-$(command -v python3)}
port=${SER_RAY_PORT:-6379}
dashboard=${SER_RAY_DASHBOARD:-8265}
temp=/tmp/ray-up-$(id -u)-$port                         # short: Ray's sockets lie in it, and their paths have a limit
state=${XDG_STATE_HOME:-$HOME/.local/state}/ser_ray/cluster-$port

# -- where
if [ $# -gt 0 ]; then
    run() { host=$1; shift; ${SER_RAY_SSH:-ssh} "$host" "$*"; }
    hosts=("$@")
elif [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    run() { host=$1; shift; srun --overlap --quiet --nodes=1 --ntasks=1 --nodelist="$host" bash -c "$*"; }
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
else
    echo "up.sh: name the hosts, the head first; or run it inside a Slurm allocation" >&2
    exit 2
fi
if [ -e "$state" ]; then
    echo "up.sh: a cluster is up already ($(head -n1 "$state")); cluster/down.sh ends it, SER_RAY_PORT starts another" >&2
    exit 2
fi

# -- who may talk to it: whoever can read the token
export RAY_AUTH_TOKEN_PATH=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
if [ ! -s "$RAY_AUTH_TOKEN_PATH" ]; then
    mkdir -p "$(dirname "$RAY_AUTH_TOKEN_PATH")"
    (umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH")
fi
chmod 600 "$RAY_AUTH_TOKEN_PATH"
start="RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_worker_maximum_startup_concurrency=8 \
    RAY_prestart_worker_first_driver=0 \
    $python -m ray.scripts.scripts start --disable-usage-stats --min-worker-port=0 --max-worker-port=0 \
    --num-cpus=\$((${SER_RAY_CPUS:-\$(nproc)} + 1)) ${SER_RAY_GPUS:+--num-gpus=$SER_RAY_GPUS}"
# (one CPU more than there are, for data tasks, which mostly wait; on every host, or the head would look the emptiest)

# -- Ray on every host
source="ip route get"   # the address by which a host reaches the head is the one that the others reach it by
address=${SER_RAY_ADDRESS:-$(run "${hosts[0]}" hostname -I | awk '{print $1}')}
mkdir -p "$(dirname "$state")"
printf '%s\n' "${hosts[*]}" "$temp" "${SLURM_JOB_ID:-}" > "$state"
for host in "${hosts[@]}"; do
    own="--node-ip-address=\$($source $address | sed 's/.* src \([^ ]*\).*/\1/;q')"
    if [ "$host" = "${hosts[0]}" ]; then
        where="--head --port=$port --temp-dir=$temp --dashboard-host=127.0.0.1 --dashboard-port=$dashboard"
    else
        where="--address=$address:$port"
    fi
    echo "$host ..."
    if [ -n "${SLURM_JOB_ID:-}" ] && [ $# = 0 ]; then   # Slurm ends what a step has started when the step ends
        run "$host" "$start $where $own --block" > /dev/null &
        disown
    else
        run "$host" "$start $where $own" > /dev/null
    fi
done
export RAY_AUTH_MODE=token RAY_ADDRESS=$address:$port SER_RAY_NODES=${#hosts[@]} SER_RAY_WAIT=${SER_RAY_WAIT:-120}
run "${hosts[0]}" "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_ADDRESS=$RAY_ADDRESS \
    SER_RAY_NODES=$SER_RAY_NODES SER_RAY_WAIT=$SER_RAY_WAIT \
    $python -c 'from ser_ray.runtime import cluster; cluster.connect(); print(cluster.describe())'"
cat << TOLD
up: head ${hosts[0]} ($address). From here:
  ssh -N -L $dashboard:127.0.0.1:$dashboard ${hosts[0]} &
  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
  ray job submit --working-dir . -- $python -m ser_ray.tune SPACE.yaml storage.results=/shared/results storage.cache=/shared/cache
and cluster/down.sh
TOLD
