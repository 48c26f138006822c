#!/usr/bin/env bash
# End the cluster that up.sh started (SER_RAY_PORT where it was not 6379), and leave nothing of it on its hosts. Other
# Ray clusters on them go on: `ray stop` would end every one of yours.
set -euo pipefail

state=${XDG_STATE_HOME:-$HOME/.local/state}/ser_ray/cluster-${SER_RAY_PORT:-6379}
if [ ! -e "$state" ]; then
    echo "down.sh: no cluster is up (there is no $state)" >&2
    exit 2
fi
{ read -ra hosts; read -r temp; read -r job; } < "$state"
if [ -n "$job" ]; then
    run() { host=$1; shift; srun --overlap --quiet --jobid="$job" --nodes=1 --ntasks=1 --nodelist="$host" bash -c "$*"; }
else
    run() { host=$1; shift; ${SER_RAY_SSH:-ssh} "$host" "$*"; }
fi
for host in "${hosts[@]}"; do
    echo "$host ..."
    # Only processes with this cluster's directory on their command lines; the rest end when those are gone.
    run "$host" "pkill -KILL -f -- '[/]${temp#/}/'; for _ in 1 2 3; do rm -rf $temp; sleep 1; done" || true
done
rm "$state"
echo "down"
