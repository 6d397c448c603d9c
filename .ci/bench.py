#!/usr/bin/env python3
"""Measures c2 against the bare tools: bench.py [--quick] [PATH OF c2.py]

Every figure is a ratio: the two sides run in turn, each pair gives one ratio, and the table shows
the median, the smallest and the largest of the ratios, so that a busy machine moves both sides
alike.
"""

import argparse
import html
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile

HERE = os.path.dirname(os.path.abspath(__file__))
EXTRACT_ALL = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])"


def run(*argv, **options):
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode != 0:
        raise SystemExit(
            "bench: exit %d of %s\n%s" % (done.returncode, argv, done.stdout.decode()[-2000:])
        )


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def cpu(function, *args):
    """The CPU seconds of this process and of the children that it has waited for."""

    def spent():
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    start = spent()
    function(*args)
    return spent() - start


def compare(title, rounds, ours, theirs, after=lambda: None, measure=seconds):
    """Time the pairs and print their line. The first pair only warms up; `after` each side is not
    timed.
    """
    pairs = []
    for n in range(rounds + 1):
        pair = {}
        for side in (ours, theirs) if n % 2 else (theirs, ours):
            pair[side] = measure(side)
            after()
        pairs.append((pair[ours], pair[theirs]))
    ratios = [a / b for a, b in pairs[1:]]
    a, b = (statistics.median(side) * 1000 for side in zip(*pairs[1:]))
    shown = [
        "%.2f" % ratio if ratio > 0.05 else "%.4f" % ratio
        for ratio in (statistics.median(ratios), min(ratios), max(ratios))
    ]
    print("%-52s %6s  %6s-%-6s %9.1f %9.1f %6d" % (title, *shown, a, b, rounds), flush=True)


def start_up(rounds, c2):
    compare(
        "c2 --version / python3 -c pass",
        rounds,
        lambda: run(sys.executable, c2, "--version"),
        lambda: run(sys.executable, "-c", "pass"),
    )


def unpack(rounds, c2, work):
    """2,000 files, 50 MB, half of each compressible, as a whole process on both sides."""
    releases, target = os.path.join(work, "releases"), os.path.join(work, "target")
    os.mkdir(releases)
    archive = os.path.join(releases, "app.zip")
    rnd = random.Random(1)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(
            "release.json",
            json.dumps(
                {"prestartCommand": "", "startCommand": "", "stopCommand": "", "templates": []}
            ),
        )
        for n in range(2000):
            noise = rnd.getrandbits(8 * 12500).to_bytes(12500, "big")
            out.writestr("dir%d/file%d" % (n % 40, n), noise + b"a line of text\n" * 833)
    config = os.path.join(work, "c2.json")
    with open(config, "w") as out:
        json.dump(
            {
                "releases": {"localdir": releases},
                "deploysDir": os.path.join(work, "deploys"),
                "contextCache": os.path.join(work, "context"),
                "logFile": os.path.join(work, "log"),
            },
            out,
        )

    def ours():
        run(sys.executable, c2, "--config", config, "unpack", "app.zip", target)

    def clear():
        shutil.rmtree(target)

    compare(
        "c2 unpack, 50 MB / zipfile.extractall",
        rounds,
        ours,
        lambda: run(sys.executable, "-c", EXTRACT_ALL, archive, target),
        clear,
    )
    if shutil.which("unzip"):
        compare(
            "c2 unpack, 50 MB / unzip",
            rounds,
            ours,
            lambda: run("unzip", "-q", archive, "-d", target),
            clear,
        )


def yaml(rounds, module):
    """250 KB, the most that is read, as a configuration has it, and the same data as JSON."""
    lines, data = [], {}
    for n in range(1800):
        data["service%d" % n] = {
            "port": n,
            "names": ["a%d.example.com" % n, "b.example.com"],
            "text": "it's: %d # quoted" % n,
            "on": True,
        }
        lines += [
            "service%d:" % n,
            "  port: %d  # a comment" % n,
            "  names:",
            "    - a%d.example.com" % n,
            "    - b.example.com",
            '  text: "it\'s: %d # quoted"' % n,
            '  "on": true',
            "",
        ]
    text, as_json = "\n".join(lines), json.dumps(data)
    assert module.parse_yaml(text) == data, "parse_yaml read something else"
    title = "parse_yaml, %d KB / " % (len(text) // 1000)

    def ours():
        return module.parse_yaml(text)

    compare(title + "json.loads", rounds, ours, lambda: json.loads(as_json))
    try:
        from yaml import safe_load
    except ImportError:
        return
    compare(title + "PyYAML safe_load", rounds, ours, lambda: safe_load(text))


def mustache(rounds, module):
    """1 MB of output: a section over many items against % and html.escape; then many tags in a
    row.
    """
    items = [{"name": "server %d" % n, "port": n, "note": "<a & b>"} for n in range(20000)]
    template = "{{#items}}\nupstream {{name}} port {{port}} says {{note}};\n{{/items}}\n"

    def bare():
        return "".join(
            "upstream %s port %s says %s;\n"
            % (html.escape(i["name"]), html.escape(str(i["port"])), html.escape(i["note"]))
            for i in items
        )

    assert module.render_template(template, {"items": items}) == bare(), (
        "render_template gave something else"
    )
    compare(
        "render a section of 20,000, %.1f MB / %% by hand" % (len(bare()) / 1e6),
        rounds,
        lambda: module.render_template(template, {"items": items}),
        bare,
    )
    flat = "".join(
        "line %d of {{name}} and {{ports.http}}: some plain text of a configuration\n" % n
        for n in range(16000)
    )
    context = {"name": "x", "ports": {"http": 8000}}

    def replace():
        return flat.replace("{{name}}", "x").replace("{{ports.http}}", "8000")

    assert module.render_template(flat, context) == replace(), "render_template gave something else"
    compare(
        "render 32,000 tags, %.1f MB / str.replace" % (len(flat) / 1e6),
        rounds,
        lambda: module.render_template(flat, context),
        replace,
    )


def poll(rounds, module):
    """A slave's look at a master state that has not changed, in CPU time, against the aws CLI."""
    bucket = "s3://c2-bench-%d" % os.getpid()
    url = bucket + "/master/state.json"
    run("aws", "s3", "mb", bucket)
    with tempfile.NamedTemporaryFile("w") as f:
        f.write('{"deploys": {}, "connections": {}}')
        f.flush()
        run("aws", "s3", "cp", f.name, url)
        reader = module.Poll(None, url)
        compare(
            "an unchanged poll / aws s3 cp, CPU",
            rounds,
            reader.read,
            lambda: run("aws", "s3", "cp", "--only-show-errors", url, f.name),
            measure=cpu,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds only")
    parser.add_argument("c2", nargs="?", default=os.path.join(HERE, "..", "c2.py"))
    args = parser.parse_args()
    c2 = os.path.abspath(args.c2)
    spec = importlib.util.spec_from_file_location("c2", c2)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print("Python %s, %s" % (sys.version.split()[0], c2))
    print(
        "%-52s %6s  %13s %9s %9s %6s"
        % ("ours / theirs", "ratio", "min-max", "ours ms", "theirs ms", "pairs")
    )
    few = 5 if args.quick else 15
    start_up(10 if args.quick else 100, c2)
    memory = (
        "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    )  # a disk's own noise would hide the rest
    with tempfile.TemporaryDirectory(dir=memory) as work:
        unpack(few, c2, work)
    yaml(few, module)
    mustache(few, module)
    if os.environ.get("C2_TEST_ROOT"):  # in the test bed there is an S3
        poll(few, module)


if __name__ == "__main__":
    main()
