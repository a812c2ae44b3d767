#!/usr/bin/env bash
# Installs the servers that some tests start for themselves, where that is ours to do: as root on Debian or
# Ubuntu. Elsewhere those tests are skipped, with the line that installs what they need.
set -euo pipefail

[[ $EUID -eq 0 ]] && command -v apt-get >/dev/null || exit 0

if ! compgen -G "/usr/lib/postgresql/*/bin/postgres" >/dev/null && ! command -v postgres >/dev/null; then
  echo "Installing postgresql for the tests that start one"
  # The tests' own server is all that shall run.
  mkdir -p /etc/postgresql-common
  [[ -e /etc/postgresql-common/createcluster.conf ]] ||
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends \
    -o Dpkg::Options::=--force-confold postgresql; } >/dev/null ||
    echo "postgresql could not be installed: its tests are skipped"
fi
