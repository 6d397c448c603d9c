#!/usr/bin/env python3
"""Mixed traffic to app.py behind a proxy, and what was lost of it: load.py [--host NAME] [--seconds
S] PORT

Fast answers on kept and on fresh connections, slow ones, streamed ones, fast and slow uploads,
websockets. It ends after --seconds, or at SIGTERM, lets what is under way finish, and prints JSON:
requests, by kind of traffic, and failures, by what was seen. Whatever a client would notice is a
failure; only a kept connection that is found closed before a request is sent on it is opened again,
as every client does.
"""

import argparse
import asyncio
import base64
import collections
import json
import os
import random
import signal
import struct
import time

TIMEOUT = 60  # for one request; more is a failure


class Lost(Exception):
    """What a client saw instead of its answer."""


class Client:
    """One connection after the other to the proxy."""

    def __init__(self, port, host):
        self.port, self.host, self.writer = port, host, None

    async def open(self):
        try:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as e:
            raise Lost("refused: %s" % (e.strerror or e)) from None

    def close(self):
        if self.writer:
            self.writer.close()
        self.writer = None

    async def send(self, method, path, body=b"", headers="", seconds=0):
        """Send a request, its body over some seconds; returns the answer's status and body."""
        if not self.writer or self.reader.at_eof():
            self.close()
            await self.open()
        head = "%s %s HTTP/1.1\r\nHost: %s\r\n%s" % (method, path, self.host, headers)
        head += "Content-Length: %d\r\n\r\n" % len(body) if body else "\r\n"
        try:
            pieces = 20 if seconds else 1
            self.writer.write(head.encode() + (b"" if seconds else body))
            for n in range(pieces if seconds else 0):
                self.writer.write(body[len(body) * n // pieces : len(body) * (n + 1) // pieces])
                await self.writer.drain()
                await asyncio.sleep(seconds / pieces)
            return await self.answer()
        except (asyncio.IncompleteReadError, OSError):
            raise Lost("closed without an answer") from None

    async def answer(self):
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        status = int(lines[0].split()[1])
        size = [line for line in lines if line.startswith("content-length:")]
        if status == 101:
            return status, b""
        try:
            if size:
                body = await self.reader.readexactly(int(size[0].split(":")[1]))
            else:
                body = await self.chunks()
        except (asyncio.IncompleteReadError, OSError, ValueError):
            raise Lost("the answer was cut") from None
        if "connection: close" in lines:
            self.close()
        return status, body

    async def chunks(self):
        body = []
        while True:
            size = int(await self.reader.readline(), 16)
            body.append((await self.reader.readexactly(size + 2))[:-2])
            if not size:
                return b"".join(body)

    async def websocket(self, seconds):
        """Open a websocket, have some messages echoed, close it."""
        self.close()
        key = base64.b64encode(os.urandom(16)).decode()
        status, _ = await self.send(
            "GET",
            "/ws",
            headers="Connection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n" % key,
        )
        expect(status, 101)
        end = time.monotonic() + seconds
        while True:
            last = time.monotonic() >= end
            payload = struct.pack("!H", 1000) if last else os.urandom(20)
            mask = os.urandom(4)
            masked = bytes(b ^ mask[n % 4] for n, b in enumerate(payload))
            try:
                head = struct.pack("BB", 0x88 if last else 0x82, 0x80 | len(payload))
                self.writer.write(head + mask + masked)
                head = await self.reader.readexactly(2)
                echoed = await self.reader.readexactly(head[1])
            except (asyncio.IncompleteReadError, OSError):
                raise Lost("the websocket was cut") from None
            if echoed != payload:
                raise Lost("the websocket echoed something else")
            if last:
                return self.close()
            await asyncio.sleep(0.1)


def expect(status, wanted=200):
    if status != wanted:
        raise Lost("status %d" % status)


class Load:
    """The traffic, and what became of it."""

    def __init__(self, port, host, rate, slow):
        self.port, self.host, self.rate, self.slow, self.going = port, host, rate, slow, True
        self.requests, self.failures, self.deploys = (collections.Counter() for _ in range(3))
        self.examples = []

    async def one(self, kind, request):
        """Do one request, and count it."""
        self.requests[kind] += 1
        try:
            await asyncio.wait_for(request, TIMEOUT)
            return True
        except Lost as e:
            seen = str(e)
        except asyncio.TimeoutError:
            seen = "no answer within %d s" % TIMEOUT
        self.failures["%s: %s" % (kind, seen)] += 1
        if len(self.examples) < 50:
            self.examples.append({"time": time.time(), "kind": kind, "seen": seen})
        await asyncio.sleep(0.01)  # a loop of refusals would count nothing but itself
        return False

    async def plain(self, client, method, path, body=b"", headers="", seconds=0):
        status, text = await client.send(method, path, body, headers, seconds)
        expect(status)
        lines = text.decode("latin-1").splitlines()
        name = lines[0].split()[0]
        if method == "POST" and lines[0].split()[-1] != str(len(body)):
            raise Lost("the upload arrived in part")
        if path.startswith("/stream") and (
            len(lines) != 21 or not all(name in line for line in lines[:-1])
        ):
            raise Lost("the stream was not whole")
        self.deploys[name] += 1

    async def worker(self, kind, make, pause=0.0, keep=True):
        """Requests of one kind, one after the other."""
        client = Client(self.port, self.host)
        await asyncio.sleep(random.random() * max(pause, 0.1))
        while self.going:
            if not await self.one(kind, make(client)) or not keep:
                client.close()
            if pause:
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        client.close()

    async def run(self, seconds):
        def times(count, *args, **options):
            return [self.worker(*args, **options) for _ in range(count)]

        def some(least, most):
            return random.uniform(least, most) * self.slow

        small, large = b"x" * 1000, os.urandom(30000) * 2
        crew = times(8, "kept", lambda c: self.plain(c, "GET", "/"), 8 * 1.25 / self.rate)
        crew += times(
            4,
            "fresh",
            lambda c: self.plain(c, "GET", "/", headers="Connection: close\r\n"),
            4 / (self.rate / 10),
            keep=False,
        )
        crew += times(
            4, "upload", lambda c: self.plain(c, "POST", "/upload", small), 4 / (self.rate / 10)
        )
        crew += times(8, "slow", lambda c: self.plain(c, "GET", "/slow/%.2f" % some(1, 3)))
        crew += times(4, "streamed", lambda c: self.plain(c, "GET", "/stream/%.2f" % some(1, 2)))
        crew += times(
            12,
            "slow upload",
            lambda c: self.plain(c, "POST", "/upload", large, seconds=some(0.5, 5)),
        )
        crew += times(4, "websocket", lambda c: c.websocket(some(1, 3)))
        tasks = [asyncio.ensure_future(work) for work in crew]
        if seconds:
            asyncio.get_event_loop().call_later(seconds, self.stop)
        await asyncio.gather(*tasks)

    def stop(self):
        self.going = False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--seconds", type=float)
    parser.add_argument(
        "--rate", type=float, default=500, help="requests a second, about (default: 500)"
    )
    parser.add_argument(
        "--slow",
        type=float,
        default=1,
        metavar="FACTOR",
        help="of the seconds that slow requests take: answers 1 to 3, uploads 0.5 to 5",
    )
    args = parser.parse_args()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    load, began = Load(args.port, args.host, args.rate, args.slow), time.monotonic()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, load.stop)
    loop.run_until_complete(load.run(args.seconds))
    print(
        json.dumps(
            {
                "requests": sum(load.requests.values()),
                "seconds": round(time.monotonic() - began, 1),
                "failed": sum(load.failures.values()),
                "failures": load.failures,
                "kinds": load.requests,
                "deploys": len(load.deploys),
                "examples": load.examples,
            }
        )
    )


if __name__ == "__main__":
    main()
