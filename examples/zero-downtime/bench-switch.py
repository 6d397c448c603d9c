#!/usr/bin/env python3
"""What a switch loses under load, c2's beside the same one by hand: bench-switch.py [--switches N]

Each switch starts a new deploy of app.py, points the proxy at it and stops the old one at once. By
hand that is: write nginx.conf with the new port in its proxy_pass, docker compose up -d, SIGHUP,
stop the old deploy. load.py sends mixed traffic meanwhile: with apps on the host, then behind ports
that docker publishes. Last comes the throughput through c2's proxy beside a fixed proxy_pass, by
wrk if it is on PATH. It needs Docker, uses loopback addresses and free ports only, removes what it
made, and begins no switch after --limit seconds. Exit code 1 if c2 lost anything. Images:
$NGINX_IMAGE (nginx), $NGINX_VERSION (latest), $APP_IMAGE, which must have Python 3
(python:3-alpine).
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
C2 = os.path.join(HERE, "..", "..", "c2.py")
NGINX_IMAGE, NGINX_VERSION = (
    os.environ.get("NGINX_IMAGE", "nginx"),
    os.environ.get("NGINX_VERSION", "latest"),
)
NGINX = "%s:%s" % (NGINX_IMAGE, NGINX_VERSION)
APP = os.environ.get("APP_IMAGE", "python:3-alpine")
NAME = "c2-bench-%d" % os.getpid()  # of containers and compose projects
HOST_NAME = "bench.example.com"
FIXED = """worker_processes auto;
events { worker_connections 8192; }
http {
  access_log /dev/stdout;
  client_max_body_size 0;
  map $http_upgrade $connection_upgrade { default upgrade; "" close; }
  server {
    listen 127.0.0.1:%d;
    location / {
      proxy_pass http://127.0.0.1:%d;
      proxy_http_version 1.1;
      proxy_set_header Host $host;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
    }
  }
}
"""
ON_HOST = {
    "startCommand": "python3 app.py $C2_PORT $C2_DEPLOY >/dev/null 2>&1 & echo $! > app.pid",
    "stopCommand": "kill $(cat app.pid)",
}
IN_DOCKER = {"startCommand": "docker compose up -d", "stopCommand": "docker compose down -t 2"}
PUBLISHED = {
    "services": {
        "app": {
            "image": APP,
            "command": ["python3", "/app/app.py", "8000", "${C2_DEPLOY}"],
            "ports": ["127.0.0.1:${C2_PORT}:8000"],
            "volumes": ["./app.py:/app/app.py:ro"],
        }
    }
}
# What answers the throughput's requests is nginx itself: it must not be what is measured.
ANSWER = """events { worker_connections 8192; }
http {
  access_log off;
  keepalive_requests 1000000;
  server { listen 127.0.0.1:$C2_PORT; location / { return 200 "$C2_DEPLOY\n"; } }
}
"""
ANSWER_START = (
    "echo '%s' > /tmp/nginx.conf; exec nginx -c /tmp/nginx.conf -g 'daemon off;'" % ANSWER
)
BACKEND = {
    "services": {
        "app": {"image": NGINX, "network_mode": "host", "command": ["sh", "-c", ANSWER_START]}
    }
}


def run(*args, **options):
    done = subprocess.run(
        args,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        **options,
    )
    said = done.stdout.decode()
    if done.returncode:
        raise SystemExit(
            "bench-switch: exit %d of %s\n%s" % (done.returncode, " ".join(args), said[-3000:])
        )
    return said


def free_ports(count):
    """The first of some ports in a row that are free now, below those that the system gives to
    clients.
    """
    for first in random.sample(range(20000, 32000 - count), 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return first
        except OSError:
            pass
    raise SystemExit("bench-switch: no free ports")


def ask(port):
    """Who answers at a port: the first word of the answer to GET /, None without a good one."""
    try:
        with socket.create_connection(("127.0.0.1", port), 2) as s:
            s.sendall(
                ("GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % HOST_NAME).encode()
            )
            answer = b"".join(iter(lambda: s.recv(4096), b""))
    except OSError:
        return None
    found = re.match(rb"HTTP/1.1 200 .*?\r\n\r\n(\S+)", answer, re.S)
    return found and found.group(1).decode()


def await_answer(port, name, seconds=30):
    """Wait until this deploy answers at a port; returns when that was."""
    deadline = time.monotonic() + seconds
    while ask(port) != name:
        if time.monotonic() > deadline:
            raise SystemExit("bench-switch: %s does not answer on port %d" % (name, port))
        time.sleep(0.005)
    return time.monotonic()


class WithC2:
    """The switch as c2 does it; each step is a whole process."""

    def __init__(self, work, commands, services, limit):
        ports = free_ports(limit + 1)
        self.port = ports + limit
        self.config = os.path.join(work, "c2.json")
        with open(self.config, "w") as f:
            json.dump(
                {
                    "releases": {"localdir": "."},
                    "deploysDir": "deploys",
                    "logFile": "log",
                    "contextCache": "context",
                    "nginxDockerImage": NGINX_IMAGE,
                    "nginxDockerVersion": NGINX_VERSION,
                    "deployMode": {
                        "proxy": {
                            "endPoints": {
                                "main": {"serverNames": [HOST_NAME], "etype": "httpOnly"}
                            },
                            "dynamicPortRange": [ports, ports + limit],
                            "httpPort": self.port,
                            "containerName": NAME,
                        }
                    },
                },
                f,
            )
        with zipfile.ZipFile(os.path.join(work, "app.zip"), "w") as z:
            z.write(os.path.join(HERE, "app.py"), "app.py")
            z.writestr("release.json", json.dumps(dict(commands, prestartCommand="", templates=[])))
            z.writestr("docker-compose.yml", json.dumps(services))

    def c2(self, *args):
        return run(sys.executable, C2, args[0], "--config", self.config, *args[1:])

    def start(self, name):
        self.c2("start", "app.zip", name)

    def connect(self, name):
        self.c2("connect", "main", name)

    def stop(self, name):
        self.c2("stop", name)

    def close(self):
        state = json.loads(self.c2("status", "--json"))["master"]
        if state["connections"]:
            self.c2("disconnect", "main")
        for name in state["deploys"]:
            self.c2("stop", "--force", name)
        self.c2("shutdown-frontend-proxy")


class ByHand:
    """The same with nothing but docker compose."""

    def __init__(self, work, commands, services, limit):
        self.work, self.commands, self.services, self.ports = work, commands, services, {}
        self.first = free_ports(limit + 1)
        self.port = self.first + limit
        os.mkdir(os.path.join(work, "conf"))
        with open(os.path.join(work, "docker-compose.yml"), "w") as f:
            json.dump(
                {
                    "services": {
                        "nginx": {
                            "image": NGINX,
                            "container_name": NAME + "-hand",
                            "network_mode": "host",
                            "command": ["nginx", "-c", "/conf/nginx.conf", "-g", "daemon off;"],
                            "volumes": ["./conf:/conf:ro"],
                        }
                    }
                },
                f,
            )

    def shell(self, name, kind):
        run(
            "sh",
            "-c",
            self.commands[kind],
            cwd=os.path.join(self.work, name),
            env=dict(os.environ, C2_DEPLOY=name, C2_PORT=str(self.ports[name])),
        )

    def start(self, name):
        self.ports[name] = self.first + int(name.rpartition("-")[2])
        os.mkdir(os.path.join(self.work, name))
        shutil.copy(os.path.join(HERE, "app.py"), os.path.join(self.work, name))
        with open(os.path.join(self.work, name, "docker-compose.yml"), "w") as f:
            json.dump(self.services, f)
        self.shell(name, "startCommand")
        await_answer(self.ports[name], name)

    def connect(self, name):
        with open(os.path.join(self.work, "conf", "nginx.conf"), "w") as f:
            f.write(FIXED % (self.port, self.ports[name]))
        run("docker", "compose", "-p", NAME + "-hand", "up", "-d", cwd=self.work)
        run("docker", "kill", "-s", "HUP", NAME + "-hand")

    def stop(self, name):
        self.shell(name, "stopCommand")
        del self.ports[name]

    def close(self):
        for name in list(self.ports):
            self.stop(name)
        run("docker", "compose", "-p", NAME + "-hand", "down", "-t", "1", cwd=self.work)


def switches(side, count, rate, until):
    """Switch `count` times under load; returns what load.py saw, and the seconds that each step
    took.
    """
    steps = {"start": [], "connect": [], "answers": [], "stop": []}

    def timed(step, name):
        began = time.monotonic()
        getattr(side, step)(name)
        steps[step].append(time.monotonic() - began)

    def watch(name, began):
        steps["answers"].append(await_answer(side.port, name) - began)

    old = NAME + "-0"
    side.start(old)
    side.connect(old)
    await_answer(side.port, old)
    load = subprocess.Popen(
        [
            sys.executable,
            os.path.join(HERE, "load.py"),
            "--host",
            HOST_NAME,
            "--rate",
            str(rate),
            str(side.port),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        time.sleep(4)
        for n in range(1, count + 1):
            if time.monotonic() > until:
                break
            name = "%s-%d" % (NAME, n)
            timed("start", name)
            watcher = threading.Thread(target=watch, args=(name, time.monotonic()))
            watcher.start()
            timed("connect", name)
            timed("stop", old)
            watcher.join()
            old = name
            if sys.stderr.isatty():
                print(
                    "\r%s %d of %d " % (type(side).__name__, n, count),
                    end="",
                    file=sys.stderr,
                    flush=True,
                )
        load.send_signal(signal.SIGTERM)
        seen = json.loads(load.communicate(timeout=120)[0].decode())
    finally:
        load.kill()
    return dict(seen, steps=steps)


def compare(title, commands, services, count, rate, until):
    """Run both sides and print them side by side; returns how many requests c2 lost."""
    seen = []
    for kind in (WithC2, ByHand):
        with tempfile.TemporaryDirectory(prefix="c2-bench-") as work:
            side = kind(work, commands, services, count + 20)
            try:
                seen.append(switches(side, count, rate, until))
            finally:
                side.close()

    def line(what, *values):
        print("%-42s %18s %18s" % ((what,) + values))

    def seconds(values):
        return "%.3f (%.3f)" % (statistics.median(values), max(values)) if values else "-"

    print("\r%s" % title)
    line("", "c2", "by hand")
    line("switches", *(len(s["steps"]["stop"]) for s in seen))
    line("requests", *("{:,}".format(s["requests"]) for s in seen))
    line("failed", *("{:,}".format(s["failed"]) for s in seen))
    for what in sorted(set(seen[0]["failures"]) | set(seen[1]["failures"])):
        line("  " + what, *(s["failures"].get(what, 0) for s in seen))
    for what in sorted(seen[0]["kinds"]):
        line("  of: " + what, *("{:,}".format(s["kinds"].get(what, 0)) for s in seen))
    for step, what in (
        ("start", "start"),
        ("connect", "switch"),
        ("answers", "until the new deploy answers"),
        ("stop", "stop of the old deploy, with its drain"),
    ):
        line(what + ", s", *(seconds(s["steps"][step]) for s in seen))
    print(flush=True)
    return seen[0]["failed"]


def by_wrk(port, seconds):
    said = run(
        "wrk",
        "-t",
        "2",
        "-c",
        "32",
        "-d",
        "%ds" % seconds,
        "-H",
        "Host: " + HOST_NAME,
        "http://127.0.0.1:%d/" % port,
    )
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit("bench-switch: wrk saw errors\n" + said)
    return float(re.search(r"Requests/sec:\s*([\d.]+)", said).group(1))


def by_loop(port, seconds):
    """Answers a second to 16 connections; each sends 20 requests at once, which costs this process
    little.
    """
    request = ("GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % HOST_NAME).encode()
    answers, rounds, end = 0, 45, time.monotonic() + seconds  # nginx closes after 1000 requests
    while time.monotonic() < end:
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(16)]
        for s in connections:
            s.sendall(request)
        size = len(connections[0].recv(4096))
        for s in connections[1:]:
            s.recv(4096)
        for _ in range(rounds):
            for s in connections:
                s.sendall(request * 20)
            for s in connections:
                left = size * 20
                while left:
                    left -= len(s.recv(left))
            answers += 20 * len(connections)
        for s in connections:
            s.close()
    return answers / (time.monotonic() - end + seconds)


def throughput(rounds, seconds):
    """Print what each proxy passes on in a second; the sides take turns."""
    measure = by_wrk if shutil.which("wrk") else by_loop
    seen = []
    with tempfile.TemporaryDirectory(prefix="c2-bench-") as work:
        for name in ("c2", "hand"):
            os.mkdir(os.path.join(work, name))
        side = WithC2(os.path.join(work, "c2"), IN_DOCKER, BACKEND, 40)
        fixed = ByHand(os.path.join(work, "hand"), IN_DOCKER, BACKEND, 1)
        name = NAME + "-answer"
        try:
            side.start(name)
            side.connect(name)
            state = json.loads(side.c2("status", "--json"))["master"]
            fixed.ports[name] = state["deploys"][name]["port"]
            fixed.connect(name)
            for proxy in (side, fixed):
                await_answer(proxy.port, name)
            for _ in range(rounds):
                seen.append((measure(side.port, seconds), measure(fixed.port, seconds)))
        finally:
            fixed.ports.clear()
            fixed.close()
            side.close()
    ours, theirs = (statistics.median(values) for values in zip(*seen))
    ratio = statistics.median(a / b for a, b in seen)
    print(
        "throughput, requests a second, medians of %d by %s"
        % (
            rounds,
            "wrk" if measure is by_wrk else "16 connections of this program (no wrk on PATH)",
        )
    )
    print("%42s %18s %18s" % ("", "c2", "fixed proxy_pass"))
    print(
        "%42s %18s %18s   ratio %.2f"
        % ("", "{:,.0f}".format(ours), "{:,.0f}".format(theirs), ratio)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--switches", type=int, default=100, help="with apps on the host (default: 100)"
    )
    parser.add_argument(
        "--published", type=int, help="with apps behind published ports (default: a third)"
    )
    parser.add_argument(
        "--rate", type=float, default=500, help="requests a second, about (default: 500)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="of the throughput (default: 9)")
    parser.add_argument("--limit", type=float, default=1800, help="in seconds (default: 1800)")
    args = parser.parse_args()
    published = args.switches // 3 if args.published is None else args.published
    until = time.monotonic() + args.limit
    lost = 0
    for title, commands, services, count in (
        ("apps on the host", ON_HOST, {}, args.switches),
        ("apps behind docker-published ports", IN_DOCKER, PUBLISHED, published),
    ):
        if count:
            lost += compare(title, commands, services, count, args.rate, until)
    if args.rounds:
        throughput(args.rounds, 2)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
