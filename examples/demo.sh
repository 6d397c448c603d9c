#!/bin/sh
# c2 without the proxy and without Docker, in a temporary directory: deploy, change the version, fail, roll back.
set -eu
exec 2>&1
here=$(cd "$(dirname "$0")" && pwd)
PYTHON=${PYTHON:-python3}
export PYTHON
work=$(mktemp -d)

c2() { "$PYTHON" "$work/bin/c2" "$@"; }
show() { printf '\n$ %s\n' "$*"; "$@"; }
clean_up() {
  (cd "$work/deploys/current" 2>/dev/null && "$PYTHON" server.py stop) || true
  rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 1' HUP INT TERM

mkdir "$work/bin" "$work/releases"
cp "$here/../c2.py" "$work/bin/c2"
cp -r "$here/noproxy" "$work/etc"
cd "$work"
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
printf '{"greeting": "Hello from", "port": %s}\n' "$port" >etc/app.json

# VERSION: what a build would do.
build() {
  printf '{"version": "%s"}\n' "$1" >etc/app/build.json
  show c2 pack etc/app "releases/web-$1.zip"
}
answer() {
  printf '\n$ curl http://127.0.0.1:%s/\n' "$port"
  "$PYTHON" -c "import urllib.request as u; print(u.urlopen('http://127.0.0.1:$port/').read().decode(), end='')"
}

build 1.0
build 1.1
show c2 list-releases
show c2 start web-1.0.zip
answer
show c2 start web-1.1.zip
answer

printf '\n# web-1.2 has a mistake: it does not start, and the one before is started again\n'
echo 'import sys; sys.exit("I cannot find my database" if sys.argv[1] == "start" else 0)' >etc/app/server.py
build 1.2
show c2 start web-1.2.zip && exit 1
printf '\n$ echo $?\n%s\n' $?
answer

show c2 rollback
answer
show c2 status
show c2 stop web-1.0
