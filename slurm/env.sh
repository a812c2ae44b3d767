# shellcheck shell=bash disable=SC2034
# The one file that a site edits. A variable that is set in the environment of sbatch wins over its line here.
# README.md has a table of them all.

# Where jobs go. sbatch and submit_sweep.sh read these from the environment: `source slurm/env.sh` before sbatch.
# export SBATCH_ACCOUNT=my-account
# export SBATCH_PARTITION=gpu
# export SBATCH_QOS=normal
# export SBATCH_CONSTRAINT=h100

# What Python runs in: modules to load first, then a virtual environment, or an Apptainer image instead of it.
: "${MODULES=}"
: "${VENV=.venv}"
: "${CONTAINER=}"
: "${CONTAINER_OPTIONS=--nv}"

# A disk of the node's own, for compiled kernels: caches on a network file system race.
: "${LOCAL_SCRATCH=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"

# Where runs are recorded; empty: where the config says. Several nodes need an MLflow server, http://host:5000.
: "${TRACKING_URI=}"

# Compute nodes often see no network: models and data sets come from the cache that a login node has filled.
: "${HF_HOME=$HOME/.cache/huggingface}"
: "${HF_HUB_OFFLINE=1}"

# The fabric. Name the interface if the all-reduce of the preflight hangs: `ip -brief address` lists them.
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export GLOO_SOCKET_IFNAME=ib0

# Check stores, ports, devices and the fabric before a job's first start: seconds, against hours in a queue.
: "${PREFLIGHT=1}"

# A job that ends at its time limit or is preempted is requeued, at most this often.
: "${MAX_RESTARTS=100}"

# Sweeps: elements of the array, how many of them run at a time, and how long one waits where no trial is to take.
: "${WORKERS=8}"
: "${WORKERS_AT_A_TIME=$WORKERS}"
: "${WAIT_MINUTES=15}"

# Options of sbatch for the two small jobs around the workers, which need no GPU, and for the workers.
: "${CONDUCT_OPTIONS=}" # --partition=cpu
: "${WORKER_OPTIONS=}"  # --time=4:00:00
