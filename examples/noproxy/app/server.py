"""A web server in the background: server.py start, server.py stop."""

import http.server
import os
import signal
import sys
import time


def start():
    """Return when the port is taken: a start command that fails must say so before it returns."""
    with open("port") as f:
        port = int(f.read())
    os.chdir("public")
    server = http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler)
    pid = os.fork()
    if not pid:
        server.serve_forever()
    with open("../server.pid", "w") as f:
        f.write(str(pid))


def stop():
    """Return when the port is free again."""
    try:
        with open("server.pid") as f:
            pid = int(f.read())
        os.remove("server.pid")
        os.kill(pid, signal.SIGTERM)
        while True:
            time.sleep(0.02)
            os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        pass  # it does not run


{"start": start, "stop": stop}[sys.argv[1]]()
