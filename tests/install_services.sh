#!/usr/bin/env bash
# Installs what some tests start for themselves: a SLURM and a PostgreSQL server. As root on Debian or Ubuntu only;
# elsewhere, or where the packages cannot be had, those tests are skipped, each with the line that installs them.
set -euo pipefail
if [[ $(id -u) != 0 || ! -e /etc/debian_version ]] || ! command -v apt-get >/dev/null; then
  exit 0
fi
export PATH="$PATH:/usr/sbin:/sbin"
packages=()
for program in munged slurmctld slurmd sbatch srun; do
  if ! command -v "$program" >/dev/null; then
    packages=(munge slurmctld slurmd slurm-client)
  fi
done
if ! compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
  packages+=(postgresql)
  # The tests' own server is all that shall run.
  mkdir -p /etc/postgresql-common
  [[ -e /etc/postgresql-common/createcluster.conf ]] ||
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
fi
if ((${#packages[@]} == 0)); then
  exit 0
fi
echo "Installing for the tests: ${packages[*]}"
export DEBIAN_FRONTEND=noninteractive
options=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20)
if ! output=$({ timeout 300 apt-get "${options[@]}" update &&
  timeout 300 apt-get "${options[@]}" install -y --no-install-recommends -o Dpkg::Options::=--force-confold "${packages[@]}"; } 2>&1); then
  echo "not installed (${output##*$'\n'}): their tests are skipped"
fi
