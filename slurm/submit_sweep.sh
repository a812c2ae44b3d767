#!/usr/bin/env bash
# Submits a whole sweep: a job that makes its stores and queues its trials, an array of workers, and a report in
# any case. Run again, it goes on where the sweep is.
#
#   slurm/submit_sweep.sh conf/sweep/NAME.yaml [key=value ...]
#
# WORKERS=16 slurm/submit_sweep.sh ... chooses the size of the array, WORKER_OPTIONS="--time=4:00:00" adds options of
# sbatch to it. env.sh has the defaults.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/env.sh
source slurm/functions.sh
(($# > 0)) || die "give a sweep: slurm/submit_sweep.sh conf/sweep/NAME.yaml [key=value ...]"
set_up_python
set_settings

# Refuses a config that does not hold, before anything waits in a queue.
study=$(
  "${python[@]}" - "$@" "${settings[@]}" <<'PYTHON'
import sys
from conf.load import from_command_line, user_errors
from conf.sweep_schema import SweepConfig, check

config = from_command_line(SweepConfig, "", sys.argv[1:])
with user_errors():
    check(config)
print(config.directory)
PYTHON
)

mkdir -p logs
# shellcheck disable=SC2206 # options are words
conduct=($CONDUCT_OPTIONS) worker=($WORKER_OPTIONS)
plan=$(sbatch --parsable --job-name=sweep-plan "${conduct[@]}" slurm/conduct.sbatch plan "study=$study" "$@")
plan=${plan%%;*} # a cluster's name may follow
workers=$(sbatch --parsable --dependency="afterok:$plan" --kill-on-invalid-dep=yes \
  --array="0-$((WORKERS - 1))%$WORKERS_AT_A_TIME" "${worker[@]}" slurm/sweep.sbatch "study=$study")
workers=${workers%%;*}
report=$(sbatch --parsable --job-name=sweep-report --dependency="afterany:$workers" \
  "${conduct[@]}" slurm/conduct.sbatch report "study=$study" "$@")
report=${report%%;*}

echo "$study: plan in job $plan, $WORKERS workers in $workers, report in $report"
echo "  squeue --me                              what waits and runs"
echo "  tail -F logs/sweep-${workers}_*.out      what the workers do"
echo "  logs/sweep-report-$report.out, $study/report.txt     how it ended"
echo "  scancel $workers                         ends it; running trials save, and this command goes on"
