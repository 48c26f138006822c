# shellcheck shell=bash
# Georgia Tech's instructional cluster ICE, run by PACE: an example of a site file. Written from memory of its
# documentation and not run there: look at `sinfo` and `module avail` first, and change what differs.
#
#   source cluster/sites/pace-ice.sh
#   sbatch cluster/slurm.sbatch search_spaces/reference.yaml storage.results=$SER_RAY_SHARED/results storage.cache=$SER_RAY_SHARED/cache

partition=ice-gpu
gpus=1                                         # of every node
cpus=8
modules="python"
environment=$HOME/ser_ray/.venv                # where this package is installed; home is seen by every node
shared=$HOME/scratch/ser_ray                   # data, cache, results: home is too small for them

for module in $modules; do module load "$module"; done
export SBATCH_PARTITION=$partition SBATCH_GPUS_PER_NODE=$gpus SBATCH_CPUS_PER_TASK=$cpus
export SER_RAY_PYTHON=$environment/bin/python SER_RAY_SHARED=$shared
export HF_HUB_CACHE=$shared/hub HF_HUB_OFFLINE=1   # filled on the login node by ser-ray fetch --to $shared/hub
