#!/bin/bash
# User data of the launch template: makes a fresh Amazon Linux 2023 or Debian machine a slave of the fleet.
set -euo pipefail
C2=https://example-fleet.s3.amazonaws.com/web/c2/c2.py      # where you keep c2.py,
CONFIG=s3://example-fleet/web/c2/camus2.yaml                # and the configuration and unit of this directory
UNIT=s3://example-fleet/web/c2/c2-slave.service
COMPOSE=https://github.com/docker/compose/releases/latest/download/docker-compose-linux-$(uname -m)

if command -v dnf >/dev/null; then
  dnf install -y docker python3 awscli-2
else
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    docker.io python3 awscli curl ca-certificates
fi
plugins=/usr/local/lib/docker/cli-plugins
mkdir -p $plugins /opt/bin /opt/etc
curl -fsSL --retry 5 -o $plugins/docker-compose "$COMPOSE"
curl -fsSL --retry 5 -o /opt/bin/c2 "$C2"
chmod 755 $plugins/docker-compose /opt/bin/c2
aws s3 cp "$CONFIG" /opt/etc/camus2.yaml
aws s3 cp "$UNIT" /etc/systemd/system/c2-slave.service
systemctl enable --now docker
systemctl enable --now c2-slave
