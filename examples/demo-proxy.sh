#!/bin/sh
# c2 with the proxy: an endpoint switches between two releases while it is being asked. Needs Docker with compose.
# Other images: NGINX_IMAGE=nginx NGINX_VERSION=latest APP_IMAGE=busybox:latest (one with busybox's httpd).
set -eu
exec 2>&1
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python3}
docker compose version >/dev/null && docker info >/dev/null || { echo 'This demo needs Docker with its compose plugin.'; exit 1; }
work=$(mktemp -d)
load=

c2() { "$PYTHON" "$work/bin/c2" "$@"; }
show() { printf '\n$ %s\n' "$*"; "$@"; }
clean_up() {
  [ -z "$load" ] || kill "$load" 2>/dev/null || true
  c2 shutdown-frontend-proxy >/dev/null 2>&1 || true
  for deploy in "$work"/deploys/web-*; do
    [ ! -d "$deploy" ] || (cd "$deploy" && docker compose down >/dev/null 2>&1) || true
  done
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

mkdir "$work/bin" "$work/releases"
cp "$here/../c2.py" "$work/bin/c2"
cp -r "$here/proxy" "$work/etc"
cd "$work"
sed -i.bak "s|nginxDockerImage:.*|nginxDockerImage: ${NGINX_IMAGE:-nginx}|
  s|nginxDockerVersion:.*|nginxDockerVersion: ${NGINX_VERSION:-latest}|" etc/camus2.yaml
printf '{"image": "%s"}\n' "${APP_IMAGE:-busybox:latest}" >etc/app.json
for version in 1.0 1.1; do
  echo "Hello from version $version" >etc/app/public/index.html
  show c2 pack etc/app "releases/web-$version.zip"
done
answer() {
  printf '\n$ curl http://%s:8880%s\n' "$1" "$2"
  "$PYTHON" -c "import urllib.request as u
print(u.urlopen(u.Request('http://127.0.0.1:8880$2', headers={'Host': '$1'})).read().decode(), end='')"
}

show c2 deploy web-1.0 main
answer www.localhost /

"$PYTHON" etc/load.py 127.0.0.1 8880 www.localhost >load.txt &
load=$!
printf '\n# From here on eight clients ask http://www.localhost:8880 without a pause.\n'
show c2 deploy web-1.1 test
answer test.localhost /
show c2 deploy web-1.1 main
show c2 rollback main
show c2 deploy web-1.1 main
show c2 disconnect test
show c2 stop web-1.0
show c2 status
answer localhost /health-check
kill "$load"
wait "$load" || true
load=
printf '\n# What the eight clients were answered:\n'
cat load.txt
show c2 shutdown-frontend-proxy
