# shellcheck shell=bash
# What the templates share. Sourced after env.sh, in the root of the repository.

# The command line that runs Python, in ${python[@]}.
set_up_python() {
  if [[ -n $MODULES ]]; then
    set +u # module files of sites read what is not set
    module purge
    # shellcheck disable=SC2086 # a list of words
    module load $MODULES
    set -u
  fi
  if [[ -n $CONTAINER ]]; then
    # shellcheck disable=SC2206 # options are words
    python=(apptainer exec $CONTAINER_OPTIONS --bind "$PWD" --bind "$LOCAL_SCRATCH" --pwd "$PWD" "$CONTAINER" python -u)
  else
    python=("$VENV/bin/python" -u)
    [[ -x ${python[0]} ]] || die "VENV=$VENV: no Python there: make setup, or edit slurm/env.sh"
  fi
}

# The environment of every task of the job.
export_environment() {
  export TRITON_CACHE_DIR="$LOCAL_SCRATCH/longstate-$UID/triton"
  export HF_HOME HF_HUB_OFFLINE
  export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
  export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not inherit it
}

# What every command is told besides its own arguments, in ${settings[@]}.
set_settings() {
  settings=()
  if [[ -n $TRACKING_URI ]]; then
    settings+=("tracking.uri=$TRACKING_URI")
  fi
}

# MASTER_ADDR and MASTER_PORT of the job. This shell runs on its first node, as rank 0 does, so the port is tried
# here. It lies below those that the kernel hands out. Jobs begin to look in different places, and hold a lock on
# what they have chosen, so that two that start at once on one node never agree on a port that neither uses yet.
choose_rendezvous() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  local lowest_ephemeral first=20000 count=8192 folder="/tmp/longstate-$UID/ports" try port
  read -r lowest_ephemeral _ </proc/sys/net/ipv4/ip_local_port_range
  if ((lowest_ephemeral >= first)); then
    first=$((lowest_ephemeral - count))
  fi
  mkdir -p "$folder"
  for ((try = 0; try < count; try++)); do
    port=$((first + (SLURM_JOB_ID * 61 + ${SLURM_RESTART_COUNT:-0} * 7 + try) % count))
    exec {port_lock}>"$folder/$port" # open as long as this shell is
    if flock --nonblock "$port_lock" && ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      MASTER_PORT=$port
      export MASTER_ADDR MASTER_PORT
      return
    fi
    exec {port_lock}>&-
  done
  die "no free port from $first on $(hostname)"
}

# Puts this job, or this element of its array, back into the queue. SLURM does that itself when a node fails; a
# preempted job whose script ends within its grace time would merely be complete. One that somebody has cancelled,
# who also sends SIGTERM, is no longer running: it must not come back.
requeue() {
  local job=$SLURM_JOB_ID state
  if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the bare number may mean the whole array
  fi
  state=$(squeue --noheader --jobs="$job" --format=%T)
  if [[ $state != RUNNING ]]; then
    die "job $job is $state: not requeued"
  elif ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
    die "job $job has been restarted MAX_RESTARTS=$MAX_RESTARTS times: not requeued"
  fi
  say "requeued"
  scontrol requeue "$job"
}

say() {
  echo "$(date +%FT%T) ${SLURM_JOB_ID:-}${SLURM_RESTART_COUNT:+ (restart $SLURM_RESTART_COUNT)} $*"
}

die() {
  echo "error: $*" >&2
  exit 1
}
