"""Asks over and over on eight connections, half of them kept, until SIGTERM; prints the answers,
counted.
"""

import collections
import http.client
import signal
import sys
import threading

HOST, PORT, SERVER_NAME = sys.argv[1:]
counts, stop = collections.Counter(), threading.Event()


def ask(keep):
    connection = http.client.HTTPConnection(HOST, int(PORT), timeout=10)
    while not stop.is_set():
        try:
            connection.request("GET", "/", headers={"Host": SERVER_NAME})
            answer = connection.getresponse()
            text = answer.read().decode().strip()
            counts[text if answer.status == 200 else "FAILED: %d" % answer.status] += 1
        except (OSError, http.client.HTTPException) as e:
            counts["FAILED: %s" % type(e).__name__] += 1
            connection.close()
        if not keep:
            connection.close()


threads = [threading.Thread(target=ask, args=(n % 2,)) for n in range(8)]
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda *args: stop.set())
for thread in threads:
    thread.start()
stop.wait()
for thread in threads:
    thread.join()
for text, count in sorted(counts.items()):
    print("%8d  %s" % (count, text))
failed = sum(count for text, count in counts.items() if text.startswith("FAILED"))
print("%8d  of %d requests failed" % (failed, sum(counts.values())))
