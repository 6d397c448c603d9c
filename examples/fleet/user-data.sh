#!/bin/bash
# User data of the launch template: makes a fresh Amazon Linux 2023 or Debian 12 or 13 machine a slave of the fleet.
# Its instance profile has the policy of iam-slave.json. What it says is in /var/log/cloud-init-output.log.
set -euo pipefail
C2=https://YOUR-HOST/c2.py                      # where you keep c2.py,
CONFIG=s3://example-fleet/web/c2/camus2.yaml    # and the configuration and unit of this directory
UNIT=s3://example-fleet/web/c2/c2-slave.service
COMPOSE=https://github.com/docker/compose/releases/download/v2.40.3/docker-compose-linux-$(uname -m)

fetch() { curl -fsSL --retry 8 --retry-connrefused -o "$2" "$1"; }
patiently() { for _ in {1..20}; do "$@" && return; sleep 15; done; return 1; } # a first boot holds apt's locks

if command -v dnf >/dev/null; then
  patiently dnf install -y docker python3 awscli-2
else
  export DEBIAN_FRONTEND=noninteractive
  patiently apt-get update
  packages='docker.io apparmor python3 awscli curl ca-certificates'
  apt-cache show docker-cli >/dev/null 2>&1 && packages+=' docker-cli' # of its own since Debian 13
  patiently apt-get install -y --no-install-recommends $packages
fi
plugins=/usr/local/lib/docker/cli-plugins # neither distribution has a package of compose 2 everywhere
mkdir -p $plugins /opt/bin /opt/etc
fetch "$COMPOSE" $plugins/docker-compose
fetch "$C2" /opt/bin/c2
chmod 755 $plugins/docker-compose /opt/bin/c2
patiently aws s3 cp "$CONFIG" /opt/etc/camus2.yaml
patiently aws s3 cp "$UNIT" /etc/systemd/system/c2-slave.service
systemctl enable --now docker
docker compose version
systemctl daemon-reload
systemctl enable --now c2-slave
