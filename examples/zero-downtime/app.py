#!/usr/bin/env python3
"""A small app that says which deploy it is: app.py PORT NAME

GET /            at once           POST /upload    how many bytes it was sent
GET /slow/SECS   after a while     GET /stream/SECS  in 20 pieces, chunked
GET /ws          a websocket that echoes
"""

import asyncio
import base64
import hashlib
import os
import signal
import struct
import sys

WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


async def serve(name, reader, writer):
    """Answer the requests of one connection."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            method, path, _ = lines[0].split(" ")
            fields = (line.partition(":") for line in lines[1:])
            headers = {key.lower(): value.strip() for key, _, value in fields}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            kind, _, seconds = path.strip("/").partition("/")
            if kind == "ws":
                return await echo(headers, reader, writer)
            if kind == "stream":
                await stream(name, float(seconds), writer)
            else:
                if kind == "slow":
                    await asyncio.sleep(float(seconds))
                answer = ("%s %s %d\n" % (name, method, len(body))).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer)
                )
                await writer.drain()
            if headers.get("connection", "").lower() == "close":
                return
    except (asyncio.IncompleteReadError, OSError):
        pass
    finally:
        writer.close()


async def stream(name, seconds, writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for n in range(20):
        piece = ("%s %d\n" % (name, n)).encode() + b"." * 2000
        writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(seconds / 20)
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def echo(headers, reader, writer):
    """A websocket (RFC 6455) of small frames: what comes is sent back, a close frame too."""
    digest = hashlib.sha1(headers["sec-websocket-key"].encode() + WEBSOCKET).digest()
    writer.write(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %s\r\n\r\n" % base64.b64encode(digest)
    )
    while True:
        first, size = await reader.readexactly(2)
        mask = await reader.readexactly(4)
        masked = await reader.readexactly(size & 127)
        payload = bytes(b ^ mask[n % 4] for n, b in enumerate(masked))
        writer.write(struct.pack("BB", first, len(payload)) + payload)
        await writer.drain()
        if first & 15 == 8:
            return


def main(port, name):
    signal.signal(
        signal.SIGTERM, lambda *_: os._exit(0)
    )  # at once, whatever is under way: the harder case
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    server = asyncio.start_server(
        lambda r, w: serve(name, r, w), "0.0.0.0", int(port), backlog=1000
    )
    loop.run_until_complete(server)
    loop.run_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
