#!/usr/bin/env python3
"""c2 deploys versioned releases on plain hosts: one file, with Python's own modules alone.

`c2 start RELEASE` fetches a zip archive from a store, expands its mustache templates and runs its
prestart, stop and start commands. In proxy mode several deploys run side by side behind an nginx
that c2 manages, and `c2 connect ENDPOINT DEPLOY` switches traffic between them without a reload.
`c2 help` is the manual.

What happens at `c2 connect main web-1.4`:
  main -> cmd_connect -> change_state: take the lock, recover what was killed, read state.json
  -> [Connect] -> apply_actions -> perform: the journal names each step before its effect
  -> STEPS["switch"] -> route: rename live/main, ask nginx -> next_state -> state.json
  -> the journal goes; a failure or a signal rolls the steps back instead
On a machine of a fleet the same actions come from decide: plan(own state, master state), less what
has failed and is not due again.

The sections, in order; none uses one below it, and `grep -A1 '^# ---' c2.py` lists them:
  pure:   Constants | Configuration | YAML | Templates | State, rules and planner | Derived text
  edges:  Files, log, lock, journal | Running programs | Stores | Releases | Release commands
          | Ports | Certificates | The proxy | Certbot | Compose projects | The executor
  fleet:  The master state | Slave records | Masters | Polling | Decisions (pure) | A machine
  top:    Commands | The command line
Where to look: what is allowed (State, rules), what is written (Derived text), what is done (The
executor), what is asked of docker (The proxy), what a machine of a fleet does next (Decisions).
YAML, Templates and Releases need not be read to change anything else.

Words:
  release     a zip archive in a store, with release.json at its root
  deploy      a release that runs under a label, in DEPLOYS/LABEL; with the proxy on its own port
  endpoint    host names that the proxy serves; connected to one deploy, or to none
  state       what runs and what is connected (state.json); a fleet has a master state in S3
  action      one change of the state: Create, Replace, Restart, Destroy, Connect, Disconnect; a
              Rollout is a start and the connections to it as one
  step        a part of an action, with its undo; the journal names the one that is under way
  live links  live/ENDPOINT -> ../ports/PORT, which nginx follows at each request: the switch
  ready       answers HTTP (2xx or 3xx on readyPath); drain: wait until no request is in flight
  staging     where a release is unpacked; .old: what gave way to it, until it is started
  blocked     a label whose recovery failed: only `stop --force` or a retry of it goes on
  slave       a machine of a fleet; its record in S3 says what it runs and what went wrong
  task        what a machine of a fleet does next: an action, or a chore; a failed one backs off
  context     what templates are expanded with: the config sources, and the ports
"""

import sys

# Python's own modules only, none that lies beside c2: -I and -P leave its directory out already.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import contextlib
import enum
import functools
import json
import os
import re
import signal
import time
from itertools import starmap
from types import MappingProxyType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Match,
    NamedTuple,
    Optional,
    Pattern,
    Sequence,
    Set,
    Tuple,
    Union,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from subprocess import Popen
    from typing import NoReturn  # which 3.6.0 and 3.6.1 have not
    from zipfile import ZipFile, ZipInfo

VERSION = "0.1.0"
JsonObject = Dict[str, Any]

# --------------------------------------------------------------------------------------------------
# Constants and errors
# --------------------------------------------------------------------------------------------------

LABEL = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
CURRENT = "current"  # the link to the release that runs without the proxy
RESERVED_LABELS = (CURRENT, "frontend-proxy")
COMPOSE_FILES = ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml")
HINT_AFTER_SECS = 10  # a start command that runs longer than this is probably not meant to
END_GRACE_SECS = 12  # between SIGTERM and SIGKILL; docker compose itself gives its containers 10
UNDO_STOP_SECS = 120  # for a stop command in an undo, which nobody can interrupt
RELOAD_TIMEOUT_SECS = 10
ASK_TIMEOUT_SECS = 3
DOCKER_TIMEOUT_SECS = 600  # `docker compose up` may have to pull an image
HTTP_TIMEOUT_SECS = 30
COMPLETION_SECS = 0.5  # a TAB waits so long for names; those that come later are for the next one
DRAINED_SECS = 0.2  # without a connection; a busy nginx has read the link, but not connected yet
OUTPUT_LINES = 20  # of a failed command, kept in the log and the message
RECORD_BYTES = 16 << 20  # of a slave; the one of 3000 deploys has 1 MB
UPSTREAMS_MAX = 2000  # a wider port range goes without kept connections to the apps
PEM_BYTES = 1 << 20
RENEWAL_DAYS = 21  # certbot renews one of 90 days with 30 left; with fewer something is wrong
# Of a fleet. A slave writes its record every HEARTBEAT_SECS; one that has not for LIVE_SECS counts
# as gone.
HEARTBEAT_SECS = 60
LIVE_SECS = 150
FLUSH_SECS = 300
MASTER_TRIES = 30  # each is lost to another master's success
WAIT_POLL_SECS = 2
PRESIGN_SECS = 1800  # a presigned address is used for so long, and valid for twice that
RETRY_SECS = 5  # before a failed action is tried again: it doubles each time
RETRY_MAX_SECS = 600
STOP_TRIES = 3  # then a slave removes a deploy whose stop command fails all the same
SLAVE_TIMEOUT_SECS = 900  # commandTimeoutSecs where nobody watches
PORT_GRACE_SECS = 5


class C2Error(Exception):
    """What went wrong, where, and what to do next, in one sentence; `code` is c2's exit code.

    Of a program that failed, `exit` is the exit code and `output` what it said last.
    """

    code = 1
    exit: Optional[int] = None
    output = ""


class ConfigError(C2Error):
    """The configuration, or the way c2 was called, is not valid."""

    code = 2


class Refused(C2Error):
    """A rule forbids it: connected, not running, not ready, locked."""

    code = 3


class TemplateError(C2Error):
    """A mustache template is malformed."""


class CommandFailed(C2Error):
    """A program that c2 ran gave a non-zero exit code, or did not end."""

    def __init__(self, message: str, exit: Optional[int], output: str = "") -> None:
        super().__init__(message)
        self.exit, self.output = exit, output


class Missing(C2Error):
    """What a store was asked for is not there."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived; no Exception, so that only undoing and `main` catch it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def problem_of(error: Exception) -> Tuple[str, int]:
    """Return what is said of an error that ends c2, and its exit code."""
    if isinstance(error, C2Error):
        return str(error), error.code
    if isinstance(error, OSError):
        return f"{error.filename2 or error.filename or 'the system'}: {error.strerror or error}", 1
    what = f"{type(error).__name__}: {error}"
    return f"internal error, please report it: {what}; --debug shows where", 1


def nearest(name: str, known: Iterable[str]) -> str:
    """End a sentence with the known name that `name` may have been meant to be, if there is one."""
    import difflib

    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lowered, 1, 0.6)
    return f"; did you mean {lowered[close[0]]}?" if close else ""


# --------------------------------------------------------------------------------------------------
# Configuration: a decoder takes a value and where it stands, and returns what it means or raises
# ConfigError
# --------------------------------------------------------------------------------------------------


def without_credentials(text: str) -> str:
    """Take user, password and query from the web addresses in a text: each may be secret.

    A password may hold what should stand there as %2F, %3F or %40.
    """
    text = re.sub(r"(\w://)([^\s/]*|[^\s/:]*:(?!\d+/)\S*)@", r"\1", text)
    return re.sub(r"(?i)(https?://[^\s?\"]*)\?[^\s\"]*", r"\1", text)


class Location(NamedTuple):
    """Where a value stands in its document."""

    path: str  # for messages
    base: str = ""  # what relative paths start from; without it they are refused
    warn: Callable[[str], None] = lambda message: None
    strict: bool = True  # an unknown key is an error, not only a warning

    def child(self, name: object) -> "Location":
        key = str(name) if str(name).isprintable() else json.dumps(name)
        return self._replace(path=f"{self.path}.{key}" if self.path else key)

    def expected(self, value: object, allowed: str) -> ConfigError:
        printed = without_credentials(json.dumps(value, ensure_ascii=False, default=str))
        if len(printed) > 60:
            printed = printed[:57] + "..."
        return ConfigError(f"{self.path or 'the document'}: found {printed}, expected {allowed}")


class Variant(NamedTuple):
    """One of several kinds, as {s3: URL}; `value` is "" of a kind that takes none."""

    name: str
    value: str = ""


# Spellings that older configurations use.
ALIASES = {"releasesDir": "deploysDir", "S3": "s3"}
EMPTY: Mapping[str, Any] = MappingProxyType({})
Decoder = Callable[[Any, Location], Any]
DECODERS: Dict[Any, Decoder] = {}  # of types that are written in ways of their own


def decode(kind: Any, value: Any, at: Location) -> Any:
    """Decode by an annotation: a record, an Optional, Sequence or Mapping of such, or a decoder."""
    if kind in DECODERS:
        return DECODERS[kind](value, at)
    if hasattr(kind, "_fields"):
        return decode_object(kind, value, at)
    inner: Tuple[Any, ...] = getattr(kind, "__args__", ())
    if type(None) in inner:
        return decode_optional(inner[0], value, at)
    if len(inner) == 1:
        if not isinstance(value, list):
            raise at.expected(value, "a list")
        return [decode(inner[0], item, at.child(i)) for i, item in enumerate(value)]
    if len(inner) == 2:
        if not isinstance(value, dict):
            raise at.expected(value, "an object")
        return {
            decode(inner[0], key, at.child(key)): decode(inner[1], item, at.child(key))
            for key, item in value.items()
        }
    return kind(value, at)


def decode_optional(kind: Any, value: Any, at: Location) -> Any:
    if value in (None, "nothing", {"nothing": None}):
        return None
    if isinstance(value, dict) and list(value) == ["just"]:
        return decode(kind, value["just"], at.child("just"))
    return decode(kind, value, at)


def camel(field: str) -> str:
    return re.sub("_(.)", lambda m: m.group(1).upper(), field)


def decode_object(cls: Any, value: Any, at: Location) -> Any:
    """Decode an object into the NamedTuple `cls`, a key into the field of its name."""
    if not isinstance(value, dict):
        raise at.expected(value, "an object")
    fields = {camel(field): field for field in cls._fields}
    decoded: JsonObject = {}
    for key, inner in value.items():
        name: str = ALIASES.get(key) or key
        field = fields.get(name)
        if field:
            if field in decoded:
                raise at.child(key).expected(inner, f"this key once, not also as {camel(field)}")
            decoded[field] = decode(cls.__annotations__[field], inner, at.child(key))
        elif cls is EndPoint and key == "label":  # as old configurations have it
            at.warn(f"{at.child(key).path} has no effect any more; remove it")
        else:
            hint = nearest(key, fields) or f"; known here: {', '.join(fields)}"
            problem = f"{at.child(key).path}: unknown key{hint}"
            if at.strict:
                raise ConfigError(problem)
            at.warn(problem)
    for key, field in fields.items():
        if field not in decoded and field not in cls._field_defaults:
            raise ConfigError(f"{at.child(key).path}: required, but not there")
    return cls(**decoded)


def decode_union(value: Any, at: Location, cases: JsonObject) -> Tuple[str, Any]:
    """Return the case and its value: of NAME, {NAME: null} or {NAME: VALUE}.

    A case without a decoder takes no value.
    """
    allowed = "one of " + ", ".join(cases)
    case = {value: None} if isinstance(value, str) else value
    if not isinstance(case, dict) or len(case) != 1:
        raise at.expected(value, allowed)
    ((key, inner),) = case.items()
    name: str = ALIASES.get(key) or key
    if name not in cases:
        raise at.expected(value, allowed + nearest(name, cases))
    if cases[name]:
        return name, decode(cases[name], inner, at.child(name))
    if inner not in (None, {}):
        raise at.expected(value, f'"{name}", which takes no value')
    return name, None


def decode_text(value: Any, at: Location) -> str:
    if not isinstance(value, str):
        quotes = " (put it in quotes)" if isinstance(value, (int, float)) else ""
        raise at.expected(value, f"a string{quotes}")
    if re.search(r"[\x00-\x1f\x7f]", value):
        raise at.expected(value, "a string without control characters")
    return value


def decode_script(value: Any, at: Location) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise at.expected(value, "a string with shell commands")
    return value


def decode_path(value: Any, at: Location) -> str:
    if not decode_text(value, at):
        raise at.expected(value, "a path")
    if not os.path.isabs(value) and not at.base:
        raise at.expected(value, "an absolute path")
    return os.path.normpath(os.path.join(at.base, value))


def decode_served_path(value: Any, at: Location) -> str:
    """Decode a path in nginx's configuration, where these end a word or begin a variable."""
    path = decode_path(value, at)
    if re.search(r"[\s;{}\"'#$\\]", path):
        raise at.expected(path, "a path without spaces or any of ; { } \" ' # $ \\")
    return path


def matching(pattern: str, allowed: str) -> Decoder:
    def decode_matching(value: Any, at: Location) -> str:
        if not re.fullmatch(pattern, decode_text(value, at)):
            raise at.expected(value, allowed)
        return value

    return decode_matching


def number(low: float, high: float, kind: Any = int) -> Decoder:
    def decode_number(value: Any, at: Location) -> float:
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise at.expected(value, f"a number from {low} to {high}")
        return value

    return decode_number


def variant(**cases: Any) -> Decoder:
    def decode_variant(value: Any, at: Location) -> Variant:
        name, inner = decode_union(value, at, cases)
        return Variant(name, inner or "")

    return decode_variant


if TYPE_CHECKING:  # for checkers and editors a plain type, at run time the decoder
    Text = str
    Script = str
    FilePath = str
    ServedPath = str
    Label = str
    ReleaseName = str
    SourceName = str
    ServerName = str
    DockerName = str
    DockerImage = str
    S3Url = str
    SecretId = str
    AwsAccount = str
    HttpUrl = str
    UrlPath = str
    Port = int
    DeployPort = int
    RangeEnd = int
    Seconds = float
    ReleaseSource = Variant
    ConfigSource = Variant
    SlaveLabel = Variant
else:
    Text = decode_text
    Script = decode_script
    FilePath = decode_path
    ServedPath = decode_served_path
    Label = matching(
        LABEL, "a label: letters, digits and . _ + -, beginning with a letter or digit"
    )
    ReleaseName = matching(
        r"[^/.\s-][^/\s]*", "a file name without / and spaces, not beginning with . or -"
    )
    SourceName = matching(r"[A-Za-z0-9_][A-Za-z0-9_-]*", "a name of letters, digits, _ and -")
    ServerName = matching(
        r"_|(\*\.|\.)?[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?(\.\*)?", "a host name"
    )
    DockerName = matching(
        r"[A-Za-z0-9][A-Za-z0-9_.-]*", "a container name: letters, digits and _ . -"
    )
    DockerImage = matching(r"[A-Za-z0-9][A-Za-z0-9_./:@-]*", "a docker image")
    # The aws CLI reads an argument file://PATH from that file, and others as options.
    S3Url = matching(
        r"s3://[A-Za-z0-9][A-Za-z0-9._-]+(/(?!-|\w+://).*)?",
        "s3://BUCKET/PREFIX, and no PREFIX such as file:// or -x",
    )
    SecretId = matching(
        r"arn:[A-Za-z0-9:/_+=.@-]+(?<!:)|[A-Za-z0-9/_+=.@][A-Za-z0-9/_+=.@-]*",
        "an ARN, or a secret's name",
    )
    AwsAccount = matching(r"[0-9]{12}", "an AWS account, of 12 digits")
    HttpUrl = matching(r"https?://[^\s/?#]+\S*", "an http:// or https:// address")
    UrlPath = matching(r"/[A-Za-z0-9._~!*+,=:@%/?&-]*", "a path such as /health-check")
    Port = number(1, 65535)
    DeployPort = number(0, 65535)
    RangeEnd = number(2, 65536)
    Seconds = number(0, 86400, (int, float))
    ReleaseSource = variant(localdir=FilePath, s3=S3Url, http=HttpUrl)
    ConfigSource = variant(file=FilePath, s3=S3Url, awsSecretArn=SecretId, http=HttpUrl)
    SlaveLabel = variant(ec2InstanceId=None, label=Label)


class PortRange(NamedTuple):
    v1: Port
    v2: RangeEnd


def decode_ports(value: Any, at: Location) -> PortRange:
    if isinstance(value, list) and len(value) == 2:
        value = {"v1": value[0], "v2": value[1]}
    ports = decode_object(PortRange, value, at)
    if ports.v1 >= ports.v2:
        raise at.expected(value, "v1 below v2: the ports are v1 <= port < v2")
    return ports


DECODERS[PortRange] = decode_ports


class SslCert(NamedTuple):
    ssl_certificate: FilePath
    ssl_certificate_key: FilePath


class CertificateSource(NamedTuple):
    """Where the certificate of an https endpoint comes from: these files, or else certbot."""

    files: Optional[SslCert] = None

    @property
    def generated(self) -> bool:
        return not self.files


def decode_certificate_source(value: Any, at: Location) -> CertificateSource:
    cases = {"generated": None, "explicit": SslCert}
    if value is None:
        return CertificateSource()
    return CertificateSource(decode_union(value, at, cases)[1])


def decode_etype(value: Any, at: Location) -> Optional[CertificateSource]:
    cases = {"httpOnly": None, "httpsWithRedirect": decode_certificate_source}
    return decode_union(value, at, cases)[1]


DECODERS[Optional[CertificateSource]] = decode_etype


class EndPoint(NamedTuple):
    server_names: Sequence[ServerName]
    etype: Optional[CertificateSource]

    @property
    def certificate(self) -> Optional[CertificateSource]:
        """None of a plain http endpoint."""
        return self.etype


class HealthCheck(NamedTuple):
    incoming_path: UrlPath = "/health-check"
    outgoing_path: UrlPath = "/"
    endpoint: Optional[Label] = None


class ProxyMode(NamedTuple):
    """`deployMode.proxy`."""

    end_points: Mapping[Label, EndPoint]
    remote_state_s3: Optional[S3Url] = None
    dynamic_port_range: PortRange = PortRange(8000, 8100)
    slave_label: SlaveLabel = Variant("ec2InstanceId")
    slave_interface_name: Optional[Text] = None
    nginx_conf_template_path: Optional[FilePath] = None
    http_port: Port = 80
    https_port: Port = 443
    ready_path: Optional[UrlPath] = None
    ready_timeout_secs: Seconds = 10
    drain_timeout_secs: Seconds = 30
    container_name: DockerName = "frontendproxy"


def decode_mode(value: Any, at: Location) -> Optional[ProxyMode]:
    return decode_union(value, at, {"noproxy": None, "proxy": ProxyMode})[1]


DECODERS[Optional[ProxyMode]] = decode_mode


class Config(NamedTuple):
    """The configuration, with the defaults of the manual."""

    releases: ReleaseSource
    deploys_dir: FilePath = "/opt/deploys"
    context_cache: FilePath = "/opt/config"
    log_file: FilePath = "/opt/var/log/camus2.log"
    config_sources: Mapping[SourceName, ConfigSource] = EMPTY
    deploy_mode: Optional[ProxyMode] = None
    health_check: Optional[HealthCheck] = HealthCheck()
    nginx_docker_image: DockerImage = "nginx"
    nginx_docker_version: DockerImage = "1.28"
    letsencrypt_prefix_dir: FilePath = "/opt"
    letsencrypt_www_dir: ServedPath = "/opt/var/www"
    auto_cert_name: Label = "camus2cert"
    auto_cert_contact_email: Text = ""
    certbot_docker_image: DockerImage = "certbot/certbot"
    certbot_docker_version: DockerImage = "latest"
    acme_server: Optional[HttpUrl] = None
    command_timeout_secs: Optional[Seconds] = None

    @property
    def has_proxy(self) -> bool:
        return self.deploy_mode is not None

    @property
    def proxy(self) -> ProxyMode:
        """Return the proxy's settings; ConfigError where there is none: ask `has_proxy` before."""
        if not self.deploy_mode:
            raise ConfigError("this needs the proxy, but deployMode is noproxy; see c2 help")
        return self.deploy_mode

    @property
    def end_points(self) -> Mapping[str, EndPoint]:
        return self.deploy_mode.end_points if self.deploy_mode else {}

    @property
    def remote(self) -> Optional[str]:
        return self.deploy_mode.remote_state_s3 if self.deploy_mode else None

    def path(self, *parts: str) -> str:
        return os.path.join(self.deploys_dir, *parts)

    def proxy_path(self, *parts: str) -> str:
        return self.path("frontend-proxy", *parts)


class Release(NamedTuple):
    """release.json: what a release says of itself."""

    prestart_command: Script = ""
    start_command: Script = ""
    stop_command: Script = ""
    templates: Sequence[Text] = ()
    config_sources: Mapping[SourceName, Text] = EMPTY


def parse_json(source: str, what: str) -> Any:
    """Parse a JSON document; C2Error for what JSON has not, as NaN, and for a duplicate key."""

    def unique(pairs: List[Tuple[str, Any]]) -> JsonObject:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise C2Error(f"{what}: the key {twice} stands there twice")
        return entries

    def constant(name: str) -> None:
        raise C2Error(f"{what}: {name} is not JSON")

    try:
        value = json.loads(source, object_pairs_hook=unique, parse_constant=constant)
        json.dumps(value, ensure_ascii=False).encode()  # fails where a file could not hold it
        return value
    except RecursionError:
        raise C2Error(f"{what}: nested too deeply") from None
    except UnicodeEncodeError as e:
        raise C2Error(f"{what}: unpaired surrogate {ascii(e.object[e.start])}") from None
    except ValueError as e:
        raise C2Error(f"{what}: not valid JSON: {e}") from None


def check_end_points(mode: ProxyMode) -> None:
    """Raise ConfigError for endpoints that their decoders alone can't refuse."""
    owners: Dict[str, str] = {}
    for name, end_point in mode.end_points.items():
        path = f"deployMode.proxy.endPoints.{name}"
        if not end_point.server_names:
            raise ConfigError(f"{path}.serverNames: found [], expected at least 1 host name")
        certificate = end_point.certificate
        if certificate and certificate.generated and mode.remote_state_s3:
            raise ConfigError(
                f"{path}.etype: a generated certificate needs local state, "
                "but remoteStateS3 is set; end TLS at the load balancer, or give one"
            )
        for server_name in end_point.server_names:
            owner = owners.setdefault(server_name.lower(), name)
            if owner != name:
                raise ConfigError(f"{path}.serverNames: {server_name} is already one of {owner}")


def check_ports(mode: ProxyMode) -> None:
    """Raise ConfigError for ports of nginx that are also for something else."""
    ports = mode.dynamic_port_range
    for key, port in (("httpPort", mode.http_port), ("httpsPort", mode.https_port)):
        if ports.v1 <= port < ports.v2:
            raise ConfigError(
                f"deployMode.proxy.{key}: {port} lies in dynamicPortRange, which is for deploys"
            )
    if mode.http_port == mode.https_port:
        raise ConfigError(f"deployMode.proxy.httpsPort: {mode.https_port} is the httpPort already")


def decode_config(value: Any, base: str, warn: Callable[[str], None]) -> Config:
    """Decode the configuration, a parsed document.

    base: directory that relative paths start from; warn: called with a sentence about what is only
    doubtful. Raises ConfigError with the path of what is wrong.
    """
    config: Config = decode(Config, value, Location("", base, warn))
    mode = config.deploy_mode
    if mode:
        check_end_points(mode)
        check_ports(mode)
    health = config.health_check
    if mode and health and health.endpoint and health.endpoint not in mode.end_points:
        raise ConfigError(
            f"healthCheck.endpoint: {health.endpoint} is not an endpoint; those of "
            f"deployMode.proxy.endPoints are {', '.join(sorted(mode.end_points))}"
        )
    return config


# --------------------------------------------------------------------------------------------------
# YAML: the subset that configurations use, read exactly or refused
# --------------------------------------------------------------------------------------------------

_YAML_DEPTH = 100
_YAML_SIZE = 256 << 10  # characters; the densest document of this size takes well under a second
_YAML_WORDS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    "null": None,
    "Null": None,
    "NULL": None,
    "~": None,
}
# Plain scalars that are no text: numbers to YAML 1.1 and 1.2 alike, then those that differ. Digits
# are counted, since newer Pythons refuse to convert very long integers, and floats lose them.
_YAML_SCALAR = re.compile(
    r"""
    (?P<int> [-+]?(?:0|[1-9][0-9]{0,300}) | 0x[0-9a-fA-F]{1,300} )
    | (?P<float> (?:[-+]?[0-9]{1,300}\.[0-9]{0,300} | \.[0-9]{1,300}) (?:[eE][-+][0-9]{1,9})? )
    | (?P<special> [-+]?\.(?:inf|Inf|INF) | \.(?:nan|NaN|NAN) )
    | (?P<differs> y|Y|yes|Yes|YES|n|N|no|No|NO|on|On|ON|off|Off|OFF | = | <<
        | [-+]?0[box][0-9a-fA-F_]+
        | [-+]? (?:[0-9][0-9_]*(?:\.[0-9_]*)? | \.[0-9_]+) (?:[eE][-+]?[0-9]+)?   # 010, 1_000, 1e3
        | [-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?                 # 12:30 is 750 in base 60
        | [0-9]{4}-[0-9]{1,2}-[0-9]{1,2} (?:(?:[Tt]|[ ]+)[0-9]{1,2}:.*)? )  # dates and times
    """,
    re.VERBOSE | re.DOTALL,
)
_YAML_ESCAPES = dict(
    zip(
        '0abt\tnvfre "/\\N_LP',
        '\0\a\b\t\t\n\v\f\r\x1b "/\\\x85\xa0\u2028\u2029',
    )
)
_YAML_UNSUPPORTED = {
    "&": "anchors",
    "*": "aliases",
    "!": "tags",
    ">": "`>` blocks",
    "?": "`? ` keys",
}

# Control characters, a second byte order mark, and the line breaks that only YAML 1.1 knows.
_YAML_FORBIDDEN = re.compile(
    "[^\t\n -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_YAML_MARKER = re.compile(r"^(?:---|\.\.\.)(?=[ \t\n\0])", re.MULTILINE)
_YAML_SPACE = re.compile(r"(?:[ \n]+|(?<=[ \n])#[^\n\0]*)*")
_YAML_GAP = re.compile(r"\n[ \n]*")
_YAML_LINE = re.compile(r"[^\n\0]*")
_YAML_DASH = re.compile(r"-(?=[ \t\n\0])")
_YAML_LITERAL = re.compile(r"\|(?:([-+])?([1-9])?|([1-9])([-+]))(?: +#[^\n\0]*| *)(?:\n|(?=\0))")
# By quote: a whole quoted scalar, and what inside it does not stand for itself.
_YAML_QUOTED = {
    '"': (
        re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL),
        re.compile(
            r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\n[ \t\n]*|.)|[ \t\n]+",
            re.DOTALL,
        ),
    ),
    "'": (re.compile(r"'([^']*(?:''[^']*)*)'(?!')"), re.compile(r"''|[ \t\n]+")),
}
# How a plain scalar may start, and what ends a line of it: in block collections, between brackets.
_Style = Tuple[Pattern[str], Pattern[str]]
_YAML_BLOCK = (
    re.compile(r"""[^,\[\]{}#&*!|>'"%@`?:-]|[?:-](?=[^ \t\n\0])"""),
    re.compile(r"[\n\t\0]| #|:(?=[ \t\n\0])"),
)
_YAML_FLOW = (
    re.compile(r"""[^,\[\]{}#&*!|>'"%@`?:-]|-(?=[^ \t\n\0,\[\]{}])"""),
    re.compile(r"[\n\t\0,?\[\]{}]| #|:(?=[ \t\n\0,\]}])"),
)


def _fold(gap: str) -> str:
    """Fold white space in a scalar: one line break is a space, n of them are n - 1 line breaks."""
    breaks = gap.count("\n")
    return "\n" * (breaks - 1) or " " if breaks else gap


class _Yaml:
    """A cursor over one document; `n` is the column of the enclosing block collection, or -1."""

    def __init__(self, text: str) -> None:
        # The line break in front makes all lines start alike, counted from 1; the \0 ends every
        # search, so that none fails.
        self.text = "\n" + text[text.startswith("\ufeff") :].replace("\r\n", "\n") + "\0"
        self.pos = 0
        self.depth = 0
        self.line = 0  # where the current line starts
        self.first = 0  # and the first thing on it

    def fail(self, what: str, pos: Optional[int] = None) -> "NoReturn":
        if pos is None:
            pos = self.pos
        line = self.text.count("\n", 0, pos)
        column = pos - self.text.rfind("\n", 0, pos)
        raise ConfigError(f"line {line}, column {column}: {what}")

    def find(self, pattern: Pattern[str]) -> Match[str]:
        return next(pattern.finditer(self.text, self.pos))

    def document(self) -> Any:
        if len(self.text) > _YAML_SIZE:
            self.fail(f"the document has more than {_YAML_SIZE >> 10} KB; make it smaller", 1)
        forbidden = _YAML_FORBIDDEN.search(self.text, 0, len(self.text) - 1)
        if forbidden:
            self.fail(
                f"character {forbidden.group()!a} is refused; use an escape in double quotes",
                forbidden.start(),
            )
        self.skip()
        if self.text[self.pos] == "%":
            self.fail("directives are not supported; remove the line")
        if self.text[self.pos] == "-" and _YAML_MARKER.match(self.text, self.pos):
            self.pos += 3
        marker = _YAML_MARKER.search(self.text, self.pos)
        if marker:
            self.fail(
                f"`{marker.group()}` ends the document; keep one, without this line", marker.start()
            )
        value = self.child(-1, False)
        self.has_next(-1)  # fails unless this is the end
        return value

    def skip(self) -> None:
        """Move over spaces, comments and line breaks."""
        start = self.pos
        if self.text[start] in " \n#":
            self.pos = self.find(_YAML_SPACE).end()
            line_break = self.text.rfind("\n", start, self.pos)
            if line_break >= 0:
                self.line, self.first = line_break + 1, self.pos
        if self.text[self.pos] == "\t":
            self.fail("a tab cannot stand here; use spaces, or quote the text")

    def has_next(self, n: int) -> bool:
        """Tell, after a value, whether the collection at column n has another entry."""
        self.skip()
        if self.text[self.pos] == "\0":
            return False
        if self.pos != self.first:
            self.fail(
                "text after a value; quote the whole value, or give a nested `key: ` its own line"
            )
        if self.pos - self.line > n:
            self.fail(
                "the indentation fits nothing above; align the line, or quote the text it continues"
            )
        return self.pos - self.line == n

    def nested(self, read: Callable[[int], Any], n: int) -> Any:
        self.depth += 1
        if self.depth > _YAML_DEPTH:
            self.fail(f"more than {_YAML_DEPTH} levels; make the document flatter")
        value = read(n)
        self.depth -= 1
        return value

    def child(self, n: int, compact: bool) -> Any:
        """Read what follows `- ` (compact: a collection may start on its line) or `key: `."""
        self.skip()
        column = self.pos - self.line
        fresh = self.pos == self.first
        dash = _YAML_DASH.match(self.text, self.pos)
        if fresh and dash and column == n and not compact:
            return self.nested(self.sequence, n)  # it may be indented like its key
        if self.text[self.pos] == "\0" or fresh and column <= n:
            return None
        if fresh or compact:
            if dash:
                return self.nested(self.sequence, column)
            if self.colon():
                return self.nested(self.mapping, column)
        return self.node(n, _YAML_BLOCK)

    def sequence(self, n: int) -> List[Any]:
        result = []
        while True:
            self.pos += 1
            result.append(self.child(n, True))
            if not self.has_next(n) or not _YAML_DASH.match(self.text, self.pos):
                return result

    def colon(self) -> Optional[int]:
        """Return where the `: ` is, if a key of a block mapping starts here."""
        char = self.text[self.pos]
        end = self.pos
        if char in "\"'":
            quoted = _YAML_QUOTED[char][0].match(self.text, self.pos)
            if quoted and "\n" not in quoted.group():
                end = quoted.end()
            while self.text[end] == " ":
                end += 1
        elif char not in "[{":
            end = self.find(_YAML_BLOCK[1]).start()
        return end if self.text[end] == ":" and self.text[end + 1] in " \t\n\0" else None

    def mapping(self, n: int) -> JsonObject:
        result: JsonObject = {}
        while True:
            start = self.pos
            colon = self.colon()
            if not colon:
                self.fail(
                    "`key: value` expected; add the colon, or quote the text that this line "
                    "continues"
                )
            key = self.node(n, _YAML_BLOCK)
            self.pos = colon
            self.check_key(result, key, start)
            result[key] = self.child(n, False)
            if not self.has_next(n):
                return result

    def check_key(self, mapping: JsonObject, key: Any, start: int) -> None:
        """Check the key between `start` and the cursor, and move over the colon."""
        if not isinstance(key, str):
            self.fail("this key is not a text; quote it", start)
        if key in mapping:
            self.fail(f"the key {key[:40]!r} stands here twice; remove one", start)
        if self.pos - start > 1024 or "\n" in self.text[start : self.pos]:
            self.fail("a key has at most 1024 characters, on one line; shorten it", start)
        self.pos += 1

    def node(self, n: int, style: _Style) -> Any:
        char = self.text[self.pos]
        if char in "[{":
            return self.nested(self.flow, n)
        if char in "\"'":
            return self.quoted(n)
        if char == "|" and n >= 0 and style is _YAML_BLOCK:
            return self.literal(n)
        return self.plain(n, style)

    def flow(self, n: int) -> Any:
        opening = self.pos
        closing = "]" if self.text[opening] == "[" else "}"
        items: List[Any] = []
        entries: JsonObject = {}
        self.pos += 1
        while self.flow_char(n, opening) != closing:
            start = self.pos
            item = self.node(n, _YAML_FLOW)
            char = self.flow_char(n, opening)
            if closing == "]":
                items.append(item)
            elif char == ":":
                self.check_key(entries, item, start)
                empty = self.flow_char(n, opening) in ",}"
                entries[item] = None if empty else self.node(n, _YAML_FLOW)
                char = self.flow_char(n, opening)
            else:
                self.fail(
                    "`key: value` expected between { and }; write it so, or quote the whole text"
                )
            if char == ",":
                self.pos += 1
            elif char != closing:
                self.fail(f"`,` or `{closing}` expected; add it, or quote the text")
        self.pos += 1
        return items if closing == "]" else entries

    def flow_char(self, n: int, opening: int) -> str:
        """Return the next character between brackets; all lines but theirs are indented over n."""
        self.skip()
        char = self.text[self.pos]
        if char == "\0":
            self.fail(
                f"`{self.text[opening]}` is never closed; close it, or quote the text", opening
            )
        if self.pos == self.first and self.pos - self.line <= n and char not in "]}":
            self.fail("too little indentation between brackets; indent the line more than the key")
        return char

    def plain(self, n: int, style: _Style) -> Any:
        start = self.pos
        text = gap = ""
        if not style[0].match(self.text, start):
            char = self.text[start]
            if char in _YAML_UNSUPPORTED:
                self.fail(
                    f"{_YAML_UNSUPPORTED[char]} are not supported; write the value out, or quote it"
                )
            self.fail(
                f"`{char}` cannot start a value here; quote the value, or move it to a line of "
                "its own"
            )
        while True:
            end = self.find(style[1]).start()
            if end == self.pos:
                break
            text += gap + self.text[self.pos : end].rstrip(" ")
            self.pos = end
            if self.text[end] != "\n":
                break
            gap = self.find(_YAML_GAP).group()
            end += len(gap)
            if len(gap) - gap.rindex("\n") - 1 <= n or self.text[end] == "#":
                break
            self.pos = end
            gap = _fold(gap)
        return self.resolve(text, start)

    def resolve(self, text: str, start: int) -> Any:
        """Return the value of a plain scalar."""
        if text in _YAML_WORDS:
            return _YAML_WORDS[text]
        match = _YAML_SCALAR.fullmatch(text)
        kind = match and match.lastgroup
        if kind == "differs":
            self.fail(
                f"YAML 1.1 and 1.2 differ on `{text[:40]}`; quote it, or write it another way",
                start,
            )
        if kind == "int":
            return int(text, 0)
        if kind == "float":
            return float(text)
        return float(text.replace(".", "")) if kind == "special" else text

    def quoted(self, n: int) -> str:
        start = self.pos
        quote = self.text[start]
        whole, special = _YAML_QUOTED[quote]
        match = whole.match(self.text, start)
        if not match:
            self.fail(f"the closing {quote} is missing; add it")
        shallow = re.search(r"\n {0,%d}[^ \n]" % n, match.group()) if n >= 0 else None
        if shallow:
            self.fail(
                "too little indentation in quotes; indent the line more than the key",
                start + shallow.end() - 1,
            )
        self.pos = match.end()
        return special.sub(
            lambda part: self.unescape(part.group(), start + 1 + part.start()), match.group(1)
        )

    def unescape(self, part: str, pos: int) -> str:
        if part == "''":
            return "'"
        if part[0] != "\\":
            return _fold(part)
        if part[1] == "\n":
            return "\n" * (part.count("\n") - 1)
        if len(part) == 2 and part[1] in _YAML_ESCAPES:
            return _YAML_ESCAPES[part[1]]
        code = int(part[2:] or "-1", 16)
        if not 0 <= code <= 0x10FFFF or 0xD800 <= code <= 0xDFFF:
            self.fail(
                f"unknown escape `{part}`; a backslash is `\\\\`, a character `\\U0001F600`", pos
            )
        return chr(code)

    def literal(self, n: int) -> str:
        """Read a `|` block: its text as it stands, less the indentation of the first line."""
        header = _YAML_LITERAL.match(self.text, self.pos)
        if not header:
            self.fail("this `|` line is malformed; write only `|`, `|-` or `|+`, or quote the text")
        chomp = header.group(1) or header.group(4)
        digit = header.group(2) or header.group(3)
        indent = n + int(digit) if digit else 0  # 0: not known yet
        widest = 0
        lines = []
        self.pos = header.end()
        while self.text[self.pos] != "\0":
            line = self.find(_YAML_LINE).group()
            width = len(line) - len(line.lstrip(" "))
            if width < len(line):
                indent = indent or max(width, n + 1)
                if width < indent:
                    break
                if widest > indent:
                    self.fail(
                        "a blank line above has more spaces than this first line; remove them"
                    )
            elif not indent:
                widest = max(widest, width)
            lines.append(line[indent or width :] + "\n")
            self.pos += len(line)
            self.pos += self.text[self.pos] == "\n"
        if self.text[self.pos - 1] == "\n":
            self.pos -= 1  # so that the next line is seen to be a new one
        elif chomp != "-":
            self.fail(
                "parsers differ on a `|` block at the end of a file; end the file with a line break"
            )
        text = "".join(lines)
        if chomp == "+":
            return text
        text = text.rstrip("\n")
        return text if chomp or not text else text + "\n"


def parse_yaml(text: str) -> Any:
    """Parse a YAML document to a dict, list, str, int, float, bool, or None for an empty one.

    What it reads, PyYAML's safe_load and YAML 1.2 parsers (core schema) read the same. What they
    read unlike each other, and what configurations do without (anchors, tags, `>` blocks, `? `
    keys, keys that are no texts, several documents), raises ConfigError with line, column and
    remedy. Source: yaml.org/spec/1.2.2.
    """
    return _Yaml(text).document()


# --------------------------------------------------------------------------------------------------
# Templates: mustache
# --------------------------------------------------------------------------------------------------

# Only a mistake exceeds these, as a partial that includes itself. A step counts as 16 characters.
_TEMPLATE_MAX_DEPTH = 200
_TEMPLATE_MAX_SIZE = 64 << 20

_SIGIL = re.compile(r"\s*([#^/>!&{=<$]?)")
_REST_OF_LINE = re.compile(r"[ \t]*(?:\r?\n|\Z)")


class _Node(NamedTuple):
    kind: str  # "text", or a tag's sigil: # ^ > & { or "" for an escaped value
    text: str  # literal text, or the tag's name
    where: str  # FILE:LINE
    indent: str = ""  # of >
    body: Any = None  # of # and ^, the nodes inside

    def __str__(self) -> str:
        return "{{%s%s%s" % (self.kind, self.text, "}}}" if self.kind == "{" else "}}")


_Scope = Tuple[Any, Any]  # an item, and the scope around it or None
_Parsed = Dict[Tuple[str, str], List[_Node]]  # by the name of a partial and its indentation


def _read_tag(text: str, start: int, left: str, right: str, where: str) -> Tuple[str, str, int]:
    """Return the sigil, the content and the end of the tag at start."""
    sigil = next(_SIGIL.finditer(text, start + len(left)))
    kind = sigil.group(1)
    closing = {"{": "}", "=": "="}.get(kind, "") + right
    stop = text.find(closing, sigil.end())
    name = text[sigil.end() : stop].strip()
    if stop < 0 or (kind not in ("!", "=") and (left in name or "\n" in name)):
        beginning = text[start : start + 40].split("\n")[0].rstrip()
        raise TemplateError(
            f"{where}: the tag that begins with {beginning} is not closed; end it with {closing}"
        )
    if kind == "=" and (len(name.split()) != 2 or "=" in name):
        raise TemplateError(
            f"{where}: to set delimiters takes two of them, as in {left}=<% %>={right}"
        )
    if not name and kind != "!":
        raise TemplateError(
            f"{where}: the tag {left}{kind}{closing} is empty; write a name into it"
        )
    if kind in ("<", "$") or kind == ">" and name[0] == "*":
        raise TemplateError(
            f"{where}: {left}{kind}{name}{right} is not supported; "
            "inherited templates and dynamic names are not part of the core"
        )
    return kind, name, stop + len(closing)


def _parse_template(text: str, file: str) -> List[_Node]:
    """Parse a template to a list of nodes; file is its name in messages."""
    nodes: List[_Node] = []
    opened: List[Tuple[_Node, List[_Node]]] = []  # an open section, and the list that goes on after
    left, right = "{{", "}}"
    pos = 0
    line = 1
    start = text.find(left)
    while start >= 0:
        before = text[pos:start]
        line += before.count("\n")
        where = f"{file}:{line}"
        kind, name, end = _read_tag(text, start, left, right, where)
        indent = before[before.rfind("\n") + 1 :]
        rest = _REST_OF_LINE.match(text, end)
        # Alone on its line? To look back no further than the tag before keeps this linear.
        begins = indent != before or pos == 0 or text[pos - 1] == "\n"
        if kind in tuple("#^/>!=") and begins and rest and not indent.strip(" \t"):
            before = before[: len(before) - len(indent)]
            end = rest.end()
        else:
            indent = ""
        node = _Node(kind, name, where, indent, [])
        if before:
            nodes.append(_Node("text", before, where))
        if kind in ("#", "^"):
            nodes.append(node)
            opened.append((node, nodes))
            nodes = node.body
        elif kind == "/":
            if not opened:
                raise TemplateError(f"{where}: {node} closes a section, but none is open here")
            section, nodes = opened.pop()
            if section.text != name:
                raise TemplateError(
                    f"{where}: {node} comes while {section} of {section.where} is open; "
                    "close that one first"
                )
        elif kind == "=":
            left, right = name.split()
        elif kind != "!":
            nodes.append(node)
        line += text.count("\n", start, end)
        pos = end
        start = text.find(left, end)
    if opened:
        section = opened[-1][0]
        raise TemplateError(
            f"{section.where}: {section} is never closed; add {section._replace(kind='/')}"
        )
    return nodes + [_Node("text", text[pos:], f"{file}:{line}")]


def _parse_partial(
    node: _Node, partials: Optional[Mapping[str, str]], parsed: _Parsed
) -> List[_Node]:
    """Return the nodes of the partial that node includes; parsed keeps those of one rendering."""
    key = (node.text, node.indent)
    if key not in parsed:
        try:
            text = (EMPTY if partials is None else partials)[node.text]
        except KeyError:
            raise TemplateError(
                f"{node.where}: {node} names a partial that does not exist; add it"
            ) from None
        # Indented before it is parsed, so that the later lines of a value are not.
        parsed[key] = _parse_template(re.sub(r"(?m)^(?!\Z)", node.indent, text), node.text)
    return parsed[key]


def _lookup(name: str, scope: _Scope) -> Any:
    """Return the value that a name has in a scope; KeyError if it names nothing."""
    if name == ".":
        return scope[0]
    keys = name.split(".")
    outer: Optional[_Scope] = scope
    while outer and not (isinstance(outer[0], dict) and keys[0] in outer[0]):
        outer = outer[1]
    value = outer[0] if outer else {}
    for key in keys:  # only the first is sought in outer scopes
        if not isinstance(value, dict):
            raise KeyError(key)
        value = value[key]
    return value


def _section_items(name: str, scope: _Scope) -> List[Any]:
    """Return what a section is rendered for: a list's items, or the value unless it is false."""
    try:
        value = _lookup(name, scope)
    except KeyError:
        return []
    # Whether 0, "" and {} are false the specification leaves open; camus2 takes them for true.
    if value is None or value is False:
        return []
    return value if isinstance(value, list) else [value]


def _interpolate(node: _Node, scope: _Scope) -> Tuple[str, str]:
    """Return the text of {{name}}, {{{name}}} or {{&name}}, and a warning or ""."""
    try:
        value = _lookup(node.text, scope)
        value = "" if value is None else value
        raw = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except KeyError:
        return "", f"{node.where}: {node} names nothing"
    except (TypeError, ValueError, RecursionError):
        raise TemplateError(
            f"{node.where}: {node} has a value that can't be written as JSON"
        ) from None
    text = (
        raw.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    )
    if node.kind or text == raw:
        return raw, ""
    unescaped = node._replace(kind="{")
    return text, f"{node.where}: HTML escaping changed {node}; use {unescaped} to keep it"


def _each(
    nodes: List[_Node], items: Sequence[Any], parent: Optional[_Scope]
) -> Iterator[Tuple[_Node, _Scope]]:
    """Yield the nodes, once for each item, with their scope: (item, parent)."""
    for item in items if nodes else ():  # an empty section must not take the time of its list
        scope = (item, parent)
        for node in nodes:
            yield node, scope


def render_template(
    template: str,
    context: Any,
    partials: Optional[Mapping[str, str]] = None,
    name: str = "template",
    warn: Callable[[str], None] = lambda message: None,
) -> str:
    """Render a mustache template, by the core modules of https://github.com/mustache/spec.

    partials is asked as partials[name] for text; unlike in the specification a missing one is an
    error. name is what messages call the template. warn(message) is called once for each tag that
    names nothing, or whose value HTML escaping changed. No message contains a value, which may be a
    secret. Raises TemplateError.
    """
    output = []
    parsed: _Parsed = {}
    warned: Set[str] = set()
    room = _TEMPLATE_MAX_SIZE
    work = [_each(_parse_template(template, name), [context], None)]  # recursion would overflow
    while work:
        step = next(work[-1], None)
        if not step:
            work.pop()
            continue
        node, scope = step
        text = ""
        if node.kind == "text":
            text = node.text
        elif node.kind == "#":
            work.append(_each(node.body, _section_items(node.text, scope), scope))
        elif node.kind == "^":
            if not _section_items(node.text, scope):
                work.append(_each(node.body, scope[:1], scope[1]))  # the same scope again
        elif node.kind == ">":
            work.append(_each(_parse_partial(node, partials, parsed), scope[:1], scope[1]))
        else:
            text, warning = _interpolate(node, scope)
            if warning and warning not in warned:
                warned.add(warning)
                warn(warning)
        output.append(text)
        room -= len(text) + 16
        if len(work) > _TEMPLATE_MAX_DEPTH:
            raise TemplateError(
                f"{node.where}: {node} is nested more than {_TEMPLATE_MAX_DEPTH} deep; "
                "look for a partial that includes itself without an end"
            )
        if room < 0:
            raise TemplateError(
                f"{node.where}: the output grows beyond {_TEMPLATE_MAX_SIZE >> 20} MB; "
                "look for partials or lists that multiply each other"
            )
    return "".join(output)


def check_template(template: str, partials: Mapping[str, str], name: str) -> None:
    """Raise TemplateError unless the template and all partials that it names can be parsed."""
    names = set()
    nodes = _parse_template(template, name)
    while nodes:
        node = nodes.pop()
        nodes += node.body or ()
        if node.kind == ">" and node.text not in names:
            names.add(node.text)
            nodes += _parse_partial(node, partials, {})


# --------------------------------------------------------------------------------------------------
# State, rules and planner: what runs, what may be done, and the actions that lead from one state to
# another
# --------------------------------------------------------------------------------------------------


class Deploy(NamedTuple):
    label: Label
    release: ReleaseName
    port: DeployPort  # 0 without the proxy

    @property
    def has_port(self) -> bool:
        return self.port > 0


class Change(NamedTuple):
    """Who changed the state of a fleet last, when, and how."""

    by: Text = ""
    at: Text = ""
    what: Text = ""


class State(NamedTuple):
    """What runs and what is connected (camus2), and keys of c2's own, which camus2 ignores."""

    deploys: Mapping[Label, Deploy] = EMPTY
    connections: Mapping[Label, Label] = EMPTY  # ENDPOINT -> LABEL
    previous: Mapping[Label, Deploy] = EMPTY  # ENDPOINT, or CURRENT -> the deploy before
    last_port: DeployPort = 0  # allocated last
    since: Mapping[Label, Text] = EMPTY  # LABEL -> when it was started
    changed: Optional[Change] = None  # by a master


def decode_state(value: Any, what: str) -> State:
    """Decode a parsed state.json, which messages call `what`."""
    try:
        state: State = decode(State, value, Location("", strict=False))
    except ConfigError as e:
        raise C2Error(f"{what}: {e}") from None
    for name, deploy in state.deploys.items():
        if name != deploy.label:
            raise C2Error(f"{what}: deploys.{name} has the label {deploy.label}")
    for end_point, name in state.connections.items():
        if name not in state.deploys:
            raise C2Error(f"{what}: connections.{end_point}: there is no deploy {name}")
    return state


def encode(value: Any) -> Any:
    """Encode records as `decode` reads them; a field that is None is left out."""
    if hasattr(value, "_asdict"):
        return {camel(k): encode(v) for k, v in value._asdict().items() if v is not None}
    if isinstance(value, Mapping):
        return {k: encode(v) for k, v in value.items()}
    return value


class Asked(NamedTuple):
    """How a state is to be in some places; None: not there."""

    deploys: Dict[str, Optional[Deploy]]
    connections: Dict[str, Optional[str]]  # ENDPOINT -> LABEL


def asked_by(state: State, labels: Iterable[str], end_points: Iterable[str]) -> Asked:
    """Return these deploys and endpoints as they are in `state`."""
    return Asked(
        {name: state.deploys.get(name) for name in labels},
        {e: state.connections.get(e) for e in end_points},
    )


def difference(asked: Asked, state: State) -> str:
    """Say what of the asked-for a state does not have; "" for nothing."""
    unlike = {n: d for n, d in sorted(asked.deploys.items()) if state.deploys.get(n) != d}
    parts = [f"lacks {name}" for name, deploy in unlike.items() if deploy]
    parts += [f"still has {name}" for name, deploy in unlike.items() if not deploy]
    parts += [
        f"{e} is on {state.connections.get(e, 'nothing')}"
        for e, name in sorted(asked.connections.items())
        if state.connections.get(e) != name
    ]
    return ", ".join(parts)


class Create(NamedTuple):
    deploy: Deploy


class Replace(NamedTuple):
    """Prepare `deploy`, then stop `old` and start `deploy`, or `old` again if that fails."""

    old: Deploy
    deploy: Deploy


class Restart(NamedTuple):
    """Stop and start a deploy in its place; after a crash or a reboot."""

    deploy: Deploy


class Destroy(NamedTuple):
    deploy: Deploy
    force: bool = False


class Connect(NamedTuple):
    end_point: str
    label: str


class Disconnect(NamedTuple):
    end_point: str


class Rollout(NamedTuple):
    """Start `deploy`, unless it runs, and when it is ready connect endpoints; all or nothing."""

    deploy: Deploy
    start: Optional[Union[Create, Replace, Restart]]
    end_points: Tuple[str, ...] = ()


Part = Union[Create, Replace, Restart, Destroy, Connect, Disconnect]
Action = Union[Part, Rollout]
ACTIONS: Dict[str, Callable[..., Action]] = {
    kind.__name__: kind
    for kind in (Create, Replace, Restart, Destroy, Connect, Disconnect, Rollout)
}


def parts_of(action: Action) -> List[Part]:
    """Return the actions that an action is made of."""
    if not isinstance(action, Rollout):
        return [action]
    starts: List[Part] = [action.start] if action.start else []
    return [*starts, *(Connect(e, action.deploy.label) for e in action.end_points)]


def without(items: Mapping[str, Any], key: str) -> JsonObject:
    return {k: v for k, v in items.items() if k != key}


def next_state(action: Action, state: State, now: str = "") -> State:
    """Return the state after a successful `action` that ended at `now` (a UTC time, as text)."""
    if isinstance(action, Rollout):
        for part in parts_of(action):
            state = next_state(part, state, now)
        return state
    if isinstance(action, (Connect, Disconnect)):
        end_point = action.end_point
        before = state.connections.get(end_point)
        connections = without(state.connections, end_point)
        if isinstance(action, Connect):
            connections[end_point] = action.label
        if before and before != connections.get(end_point):
            previous = {**state.previous, end_point: state.deploys[before]}
            state = state._replace(previous=previous)
        return state._replace(connections=connections)
    deploy = action.deploy
    if isinstance(action, (Replace, Destroy)):
        old = action.old if isinstance(action, Replace) else deploy
        state = state._replace(
            deploys=without(state.deploys, old.label), since=without(state.since, old.label)
        )
        if not deploy.has_port and (old != deploy or isinstance(action, Destroy)):
            state = state._replace(previous={CURRENT: old})
    if isinstance(action, Destroy):
        return state
    if not isinstance(action, Restart):
        state = state._replace(
            deploys={**state.deploys, deploy.label: deploy}, last_port=deploy.port
        )
    return state._replace(since={**state.since, deploy.label: now})


def conflicts(state: State, deploy: Deploy) -> List[Deploy]:
    """Return the deploys of a state that have the label or the port of this one."""
    return [d for d in state.deploys.values() if d.label == deploy.label or d.port == deploy.port]


def connected_to(state: State, name: str) -> List[str]:
    return sorted(e for e, deploy in state.connections.items() if deploy == name)


def next_action(end_points: Collection[str], state: State, new: State) -> Optional[Action]:
    """Return the first action of the plan from `state` to `new`; None at its end."""
    missing = [d for _, d in sorted(new.deploys.items()) if state.deploys.get(d.label) != d]
    for deploy in missing:
        if not conflicts(state, deploy):
            return Create(deploy)
    for end_point in sorted({*state.connections, *new.connections}):
        before = state.connections.get(end_point)
        label = new.connections.get(end_point) if end_point in end_points else None
        if before and not label:
            return Disconnect(end_point)
        if label and before != label and state.deploys.get(label) == new.deploys[label]:
            return Connect(end_point, label)
    for _, old in sorted(state.deploys.items()):
        if new.deploys.get(old.label) != old and not connected_to(state, old.label):
            for deploy in missing:
                if conflicts(state, deploy) == [old]:
                    return Replace(old, deploy)
            return Destroy(old)
    if not missing:
        return None
    in_the_way = [d.label for d in conflicts(state, missing[0])]
    for end_point, label in sorted(state.connections.items()):
        if label in in_the_way:
            return Disconnect(end_point)
    raise C2Error(f"{missing[0].label} and {in_the_way} have one port, {missing[0].port}")


def plan(end_points: Collection[str], old: State, new: State) -> List[Action]:
    """Return the actions from `old` to `new`, in an order that keeps connected endpoints served.

    Create what has a free label and port, switch endpoints, replace or destroy what is not
    connected, and again. Only where that is stuck, since a label or a port stays connected and
    changes, an endpoint is disconnected first. end_points: the configured ones; a connection of
    another is left out. The laws are tested: folding `next_state` over the plan gives `new`, and
    nothing is planned between equal states.
    """
    actions = []
    state = old
    action = next_action(end_points, state, new)
    while action:
        actions.append(action)
        state = next_state(action, state)
        action = next_action(end_points, state, new)
    return actions


def is_outage(end_points: Collection[str], action: Action, new: State) -> bool:
    """Tell whether a planned action takes an endpoint off that is to be served all the same."""
    return (
        isinstance(action, Disconnect)
        and action.end_point in end_points
        and action.end_point in new.connections
    )


def is_feasible(action: Action, state: State, new: State) -> bool:
    """Tell whether an action of the plan to `new` can be done in `state`, whatever went before."""
    if isinstance(action, Connect):
        return state.deploys.get(action.label) == new.deploys[action.label]
    if isinstance(action, Disconnect):
        return action.end_point in state.connections
    if isinstance(action, Create):
        return not conflicts(state, action.deploy)
    old = action.old if isinstance(action, Replace) else action.deploy
    if old not in state.deploys.values() or connected_to(state, old.label):
        return False
    return isinstance(action, Destroy) or conflicts(state, action.deploy) == [old]


def feasible(
    end_points: Collection[str], old: State, new: State, backing_off: Callable[[Action], bool]
) -> List[Action]:
    """Return what of the plan from `old` to `new` can be done now, even if all else fails.

    backing_off: tells whether an action has failed and is not due again. What does not build on
    such a one goes on, and no endpoint is cut off for a deploy that can't be had.
    """
    planned = plan(end_points, old, new)
    while True:
        actions = []
        state = old
        for action in planned:
            choices = [action]
            if isinstance(action, Replace):
                choices.append(Destroy(action.old))  # others may wait for its label or port
            for choice in choices:
                if not backing_off(choice) and is_feasible(choice, state, new):
                    actions.append(choice)
                    state = next_state(choice, state)
                    break
        needless = [
            a
            for a in actions
            if isinstance(a, Disconnect)
            and is_outage(end_points, a, new)
            and state.connections.get(a.end_point) != new.connections[a.end_point]
        ]
        if not needless:
            return actions
        planned = [a for a in planned if a not in needless]


def stem(release: str) -> str:
    return os.path.splitext(release)[0]


def find_deploy(state: State, name: str) -> Deploy:
    """Return the deploy called `name`: its label, or its release, with or without extension."""
    if name in state.deploys:
        return state.deploys[name]
    matches = [d for d in state.deploys.values() if name in (d.release, stem(d.release))]
    if not matches:
        running = ", ".join(sorted(state.deploys)) or "none"
        raise Refused(
            f"there is no deploy {name}{nearest(name, state.deploys)}; there are: {running}"
        )
    if len(matches) > 1:
        raise Refused(
            f"{name} runs as {' and '.join(sorted(d.label for d in matches))}; say which is meant"
        )
    return matches[0]


def find_end_point(config: Config, name: Optional[str]) -> str:
    """Return the configured endpoint called `name`; without a name the only one there is."""
    if name is None:
        problem = "say which endpoint"
        if len(config.end_points) == 1:
            return next(iter(config.end_points))
    else:
        problem = f"there is no endpoint {name}{nearest(name, config.end_points)}"
        if name in config.end_points:
            return name
    known = ", ".join(sorted(config.end_points)) or "none"
    raise ConfigError(f"{problem}; the endpoints are: {known}")


def compose_project(name: str) -> str:
    """Name a project as docker compose does by its directory; the same one shares containers."""
    return re.sub("[^a-z0-9_-]", "", name.lower()).lstrip("_-")


def check_label(name: str, state: State) -> None:
    """Raise unless a deploy may be called `name` beside those of `state`."""
    if not re.fullmatch(LABEL, name) or name in RESERVED_LABELS:
        raise ConfigError(
            f"{name!r} can't be a deploy's label: letters, digits and . _ + -, beginning with "
            f"a letter or digit, and not {' or '.join(RESERVED_LABELS)}; add another: c2 start "
            "RELEASE DEPLOY"
        )
    for other in [*RESERVED_LABELS, *state.deploys]:
        if other != name and compose_project(other) == compose_project(name):
            raise Refused(
                f"{name} and {other} would be the same docker compose project, "
                f"{compose_project(name)}, and take each other's containers; choose another label: "
                "c2 start RELEASE DEPLOY"
            )


PublishedPort = Tuple[str, int, str]  # address, "" for all; number; protocol


class Project(NamedTuple):
    """What a deploy has of the Docker engine."""

    names: Set[str]
    containers: Set[str]
    ports: Set[PublishedPort]


def same_port(one: PublishedPort, other: PublishedPort) -> bool:
    return one[1:] == other[1:] and (one[0] == other[0] or "" in (one[0], other[0]))


def project_conflict(label: str, own: Project, others: Dict[str, Project]) -> Optional[str]:
    """Say why a deploy can't run beside the `others`, by label; None if it can."""
    for other, theirs in sorted(others.items()):
        names = sorted(own.names & theirs.names)
        containers = sorted(own.containers & theirs.containers)
        ports = sorted({p[1] for p in own.ports for q in theirs.ports if same_port(p, q)})
        shared = [f"the docker compose project {name}" for name in names]
        shared += [f"the container name {name}" for name in containers]
        shared += [f"the port {port}" for port in ports]
        ways = [
            f"name: {name}-${{C2_DEPLOY}} in its compose file and no COMPOSE_PROJECT_NAME"
            for name in names
        ]
        ways += ["no container_name"] if containers else []
        ways += ["the port ${C2_PORT}"] if ports else []
        if shared:
            return (
                f"{label} can't run beside {other}, which has {', '.join(shared)} already; give "
                f"{label} its own ({'; '.join(ways)}), or stop {other} first"
            )
    return None


def published(address: str, port: Any, protocol: str) -> PublishedPort:
    address = address.strip("[]")
    return "" if address in ("0.0.0.0", "::") else address, int(port), protocol


def configured_project(document: JsonObject) -> Project:
    """Return what a deploy will have, by the document of `docker compose config`."""
    services = list((document.get("services") or {}).values())
    ports = [p for s in services if s.get("network_mode") != "host" for p in s.get("ports") or []]
    return Project(
        {document["name"]},
        {s["container_name"] for s in services if s.get("container_name")},
        {
            published(p.get("host_ip", ""), p["published"], p.get("protocol", "tcp"))
            for p in ports
            if re.fullmatch("[1-9][0-9]*", str(p.get("published")))  # else any, or one of a range
        },
    )


def listed_project(project: str, names: str, ports: str) -> Project:
    """Return what a container has, by these columns of `docker ps`."""
    ranges = re.findall(r"(\S*):(\d+)(?:-(\d+))?->[^/]+/(\w+)", ports)
    return Project(
        {project},
        set(names.split(",")),
        {
            published(address, port, protocol)
            for address, first, last, protocol in ranges
            for port in range(int(first), int(last or first) + 1)
        },
    )


def next_port(ports: PortRange, last: int, in_use: Callable[[int], bool]) -> int:
    """Allocate the lowest free port above the last one, wrapping: others may remember a port."""
    first = last + 1 if ports.v1 <= last + 1 < ports.v2 else ports.v1
    for port in [*range(first, ports.v2), *range(ports.v1, first)]:
        if not in_use(port):
            return port
    raise C2Error(
        f"all ports from {ports.v1} to {ports.v2 - 1} are in use; stop a deploy, or widen "
        "dynamicPortRange"
    )


def prunable(unpacked: Dict[str, float], needed: Collection[str], keep: int) -> List[str]:
    """Choose the labels to remove: all but those that are needed and the newest.

    unpacked: LABEL -> when it was.
    """
    newest = sorted(unpacked, key=lambda name: (-unpacked[name], name))[:keep]
    return sorted({*unpacked} - {*needed} - {*newest})


def start_actions(state: State, deploy: Deploy, runs: Callable[[Deploy], bool]) -> List[Action]:
    """Return what `start` does; deploy.port is the one it gets if it needs a new one.

    runs: tells whether a deploy answers, asked only where it matters.
    """
    check_label(deploy.label, state if deploy.has_port else State())
    if not deploy.has_port:
        behind = sorted(d.label for d in state.deploys.values() if d.has_port)
        if behind:
            raise Refused(
                f"{', '.join(behind)} still runs for the proxy, but deployMode is noproxy now; "
                "disconnect and stop it with the former configuration"
            )
        return [Replace(old, deploy) for old in state.deploys.values()] or [Create(deploy)]
    old = state.deploys.get(deploy.label)
    if not old:
        return [Create(deploy)]
    if old == deploy:
        return [] if runs(old) else [Restart(old)]
    end_points = ", ".join(connected_to(state, old.label))
    if end_points:
        raise Refused(
            f"{old.label} runs {old.release} and is connected to {end_points}; start "
            f"{deploy.release} under another label and connect that"
        )
    return [Replace(old, deploy)]


def superfluous(state: State, deploy: Deploy, keep: int) -> List[Deploy]:
    """Return what is older than `deploy` and not connected, but for the newest `keep` of these.

    Those that endpoints were connected to before count as the newest, so that a rollback of any
    endpoint stays a switch.
    """
    before = {(d.label, d.release) for d in state.previous.values()} if keep else set()
    idle = [d for d in state.deploys.values() if d != deploy and not connected_to(state, d.label)]
    ranked = sorted(
        ((d.label, d.release) in before, state.since.get(d.label, ""), d) for d in idle
    )[::-1]
    kept = max(keep, sum(is_before for is_before, _, _ in ranked))
    own = state.since.get(deploy.label, "")
    return [d for _, since, d in ranked[kept:] if since <= own]


def deploy_actions(
    state: State,
    deploy: Deploy,
    end_points: Sequence[str],
    keep: int,
    now: str,
    runs: Callable[[Deploy], bool],
) -> List[Action]:
    """Return what `deploy` does at `now`; `runs` as for start_actions."""
    start: Any = next(iter(start_actions(state, deploy, runs)), None)
    rollout = Rollout(deploy, start, tuple(end_points))
    old = superfluous(next_state(rollout, state, now), deploy, keep)
    return [rollout, *map(Destroy, old)]


def stop_actions(state: State, name: str, force: bool = False) -> List[Destroy]:
    deploy = find_deploy(state, name)
    end_points = connected_to(state, deploy.label)
    if end_points:
        raise Refused(
            f"{deploy.label} is connected to {', '.join(end_points)}; connect another deploy "
            f"there, or take it off with c2 disconnect {end_points[0]}, before you stop it"
        )
    return [Destroy(deploy, force)]


VERBS: Dict[type, Tuple[str, str, str]] = {  # what an action does, is doing, and has done
    Create: ("start", "starting", "started"),
    Replace: ("start", "starting", "started"),
    Restart: ("restart", "starting again", "restarted"),
    Destroy: ("stop", "stopping", "stopped"),
    Connect: ("connect", "connecting", "connected"),
    Disconnect: ("disconnect", "disconnecting", "disconnected"),
    Rollout: ("deploy", "deploying", "deployed"),
}


def phrase(action: Part, verb: str, with_release: bool = False) -> str:
    if isinstance(action, Connect):
        return f"{verb} {action.end_point} to {action.label}"
    if isinstance(action, Disconnect):
        return f"{verb} {action.end_point}"
    deploy = action.deploy
    words = [verb, deploy.label]
    if with_release:
        words.append(f"({deploy.release})")
    if deploy.has_port and not isinstance(action, Destroy):
        words.append(f"on port {deploy.port}")
    return " ".join(words)


def describe(action: Action) -> str:
    """Return an action in words, as in: start web-1.1 on port 8001."""
    return ", ".join(phrase(part, VERBS[type(part)][0]) for part in parts_of(action))


def announce(action: Action) -> str:
    """Return what is said when an action begins."""
    beginnings = []
    for part in parts_of(action):
        beginning = phrase(part, VERBS[type(part)][1], with_release=True)
        if isinstance(part, Replace):
            beginning += f" in place of {part.old.label} ({part.old.release})"
        beginnings.append(beginning)
    return ", then ".join(beginnings)


def outcome(action: Part, state: State, ready_after: Optional[float] = None) -> str:
    """Return what an action has done that began in `state`."""
    before = now = None
    if isinstance(action, (Connect, Disconnect)):
        before = state.connections.get(action.end_point)
        now = action.label if isinstance(action, Connect) else None
        result = f"{action.end_point} " + (f"serves {now} now" if now else "answers 503 now")
    else:
        result = phrase(action, VERBS[type(action)][2])
        if ready_after is not None:
            result += f", ready after {ready_after:.1f} s"
        if isinstance(action, Replace):
            before, now = action.old.label, action.deploy.label
    return result + (f" (before: {before})" if before not in (None, now) else "")


def log_fields(action: Action) -> JsonObject:
    fields: JsonObject = {"action": VERBS[type(action)][0]}
    if isinstance(action, (Connect, Disconnect)):
        fields["endpoint"] = action.end_point
    if isinstance(action, Connect):
        fields["deploy"] = action.label
    if isinstance(action, Rollout):
        fields["endpoint"] = ", ".join(action.end_points) or None
    if not isinstance(action, (Connect, Disconnect)):
        deploy = action.deploy
        fields.update(deploy=deploy.label, release=deploy.release, port=deploy.port or None)
    return fields


def rollback_target(state: State, end_point: str) -> Deploy:
    """Return the deploy that `end_point` was connected to before; Refused when it is gone."""
    before = state.previous.get(end_point)
    if not before:
        raise Refused(
            f"{end_point} has not been connected to another deploy before; there is no way back"
        )
    now = state.deploys.get(before.label)
    if not now or now.release != before.release:
        raise Refused(
            f"{end_point} was connected to {before.label} ({before.release}) before, which has "
            f"been stopped; c2 start {before.release}, then c2 connect {end_point} {before.label}"
        )
    return now


# --------------------------------------------------------------------------------------------------
# Derived text: the nginx configuration, the compose file, argument lists
# --------------------------------------------------------------------------------------------------

# How the built-in configuration switches without a reload: the root of an endpoint's server is a
# symbolic link, which nginx resolves at each request; `map $realpath_root` gives the port. `root`
# stands at server level, since an earlier use of the variable would cache "". `mirror` reads the
# request's body before the link is asked for $c2_port: an upload that began before a switch goes to
# the new deploy, not to one that was stopped meanwhile. Where the connection to an app could not be
# made, the link is asked again; what has been sent is never repeated. What is said of TLS stands
# outside of the servers: until a client has told a name, its connection is the default server's,
# which decides on the version.
NGINX_TEMPLATE = r"""user nginx;
worker_processes auto;
worker_rlimit_nofile 65536;
error_log /dev/stderr;
pid /var/run/nginx.pid;

events { worker_connections 8192; }

http {
  include /etc/nginx/mime.types;
  default_type application/octet-stream;
  charset utf-8;
  access_log /dev/stdout;
  sendfile on;
  server_tokens off;
  server_names_hash_bucket_size 128;
  keepalive_timeout 65;
  client_max_body_size 0;
{{#c2.http2}}
  http2 on;
{{/c2.http2}}

  # live/ENDPOINT is a link to ports/PORT, or to ports/none.
  map $realpath_root $c2_port {
    default "";
    "~^/etc/nginx/c2/ports/(?<c2_p>[1-9][0-9]{0,4})$" $c2_p;
  }
  map $realpath_root $c2_now {
    volatile;
    default "";
    "~^/etc/nginx/c2/ports/(?<c2_q>[1-9][0-9]{0,4})$" $c2_q;
  }
  map $http_upgrade $c2_connection { default upgrade; "" ""; }
  map $http_host $c2_host { default $http_host; "" localhost; }
  map $http_x_forwarded_proto $c2_proto { default $http_x_forwarded_proto; "" $scheme; }

  proxy_http_version 1.1;
  proxy_connect_timeout 10;
  proxy_send_timeout 300;
  proxy_read_timeout 300;
  proxy_set_header Host $c2_host;
  proxy_set_header X-Real-IP $remote_addr;
  proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
  proxy_set_header X-Forwarded-Host $c2_host;
  proxy_set_header X-Forwarded-Proto $c2_proto;
  proxy_set_header Upgrade $http_upgrade;
  proxy_set_header Connection $c2_connection;
  proxy_redirect http://127.0.0.1:$c2_port/ /;
  proxy_redirect http://localhost:$c2_port/ /;

{{#c2.upstreams}}
  upstream c2_{{.}} { server 127.0.0.1:{{.}}; keepalive 32; keepalive_timeout 1s; }
{{/c2.upstreams}}

{{#c2.unknownTls}}
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
  ssl_prefer_server_ciphers off;
  ssl_session_cache shared:c2:10m;
  ssl_session_tickets off;
{{/c2.unknownTls}}

  # Whoever asks for no endpoint, and the load balancer's probe.
  server {
    listen {{c2.httpPort}} default_server;
{{#c2.unknownTls}}
    listen {{c2.httpsPort}} ssl{{c2.listenHttp2}} default_server;
    ssl_certificate {{{sslCertPath}}};
    ssl_certificate_key {{{sslCertKeyPath}}};
{{/c2.unknownTls}}
    root /etc/nginx/c2/live/.health-check;
{{#c2.healthCheck}}
    location = {{{incomingPath}}} {
      if ($c2_port = "") { return 503; }
      proxy_pass http://{{c2.upstream}}$c2_port{{{outgoingPath}}}$is_args$args;
    }
    location = {{{incomingPath}}}/ { rewrite ^ {{{incomingPath}}} last; }
{{/c2.healthCheck}}
    location / { return 404; }
  }

{{#endPoints}}
{{#http}}
  server {
    listen {{c2.httpPort}};
    server_name {{serverNames}};
    # the app
  }
{{/http}}
{{#https}}
  server {
    listen {{c2.httpPort}};
    server_name {{serverNames}};
    root /etc/nginx/c2/live/{{label}};
    location ^~ /.well-known/acme-challenge/ {
      root {{{letsencryptWwwDir}}};
      default_type text/plain;
    }
    # where it points
{{#sslCertPath}}
    location / { return 301 https://$host{{c2.httpsSuffix}}$request_uri; }
{{/sslCertPath}}
{{^sslCertPath}}
    location / { return 503; }
{{/sslCertPath}}
  }
{{#sslCertPath}}
  server {
    listen {{c2.httpsPort}} ssl{{c2.listenHttp2}};
    server_name {{serverNames}};
    ssl_certificate {{{sslCertPath}}};
    ssl_certificate_key {{{sslCertKeyPath}}};
    # the app
  }
{{/sslCertPath}}
{{/https}}
{{/endPoints}}
}
""".replace(
    "    # the app\n",
    r"""    root /etc/nginx/c2/live/{{label}};
    # where it points
    location / {
      if ($c2_now = "") { return 503; }
      mirror /.c2/body;
      error_page 502 = @c2_again;
      proxy_pass http://{{c2.upstream}}$c2_port;
    }
    location = /.c2/body {
      internal;
      return 204;
    }
    location @c2_again {
      if ($c2_now = "") { return 503; }
      if ($upstream_connect_time !~ "-$") { return 502; }
      proxy_pass http://{{c2.upstream}}$c2_now;
    }
""",
).replace(
    "    # where it points\n",
    r"""    location = /.c2/port {
      if ($remote_addr !~ "^(127\.|::1$)") { return 404; }
      default_type text/plain;
      return 200 "port=$c2_port";
    }
""",
)

# The configuration appears as /etc/nginx/nginx.conf, so that its relative includes and a plain
# `nginx -t` work; by a link into a mounted directory, since a mounted file would keep showing its
# old inode after an atomic replace.
NGINX_LINKS = "cd /etc/nginx; ln -sf c2/conf/nginx.conf c2/conf/candidate.conf ."
NGINX_START = NGINX_LINKS + "; exec nginx -g 'daemon off;'"
PROXY_DIRS = ("conf", "live", "ports", "certs")  # mounted into the container, below /etc/nginx/c2
CERTS_IN_PROXY = "/etc/nginx/c2/certs/"
# How nginx is told to speak HTTP/2: by `http2 on` since 1.25.1, which warns of the older parameter
# of `listen`; not at all where it was built without. The first that it takes is used.
HTTP2_FORMS = ("on", "listen", "")
CERTBOT_FILES = ("cert", "chain", "fullchain", "privkey")


def port_of(state: State, end_point: str) -> Optional[int]:
    name = state.connections.get(end_point)
    return state.deploys[name].port if name else None


def health_end_point(config: Config, state: State) -> Optional[str]:
    """Choose the endpoint for the health check: the configured, else the first connected."""
    named = config.health_check and config.health_check.endpoint
    connected = sorted(e for e in state.connections if e in config.end_points)
    if named:
        return named if named in connected else None
    return connected[0] if connected else None


def routes(config: Config, state: State) -> Dict[str, str]:
    """List the links that `live/` holds for this state: name -> target."""
    table = {e: port_of(state, e) for e in config.end_points}
    health = health_end_point(config, state)
    table[".health-check"] = table.get(health) if health else None
    return {name: f"../ports/{port or 'none'}" for name, port in table.items()}


def nginx_context(
    config: Config, state: State, certificates: Dict[str, List[str]], http2: str = ""
) -> JsonObject:
    """Give what the nginx template is expanded with: camus2's context, and c2's own as `c2`.

    A null of camus2's is an absent key. certificates: ENDPOINT -> (certificate, key), paths in the
    container, for the https endpoints that have one; http2: one of HTTP2_FORMS.
    """
    mode, health = config.proxy, config.health_check
    ports = mode.dynamic_port_range
    upstreams: List[int] = []
    if ports.v2 - ports.v1 <= UPSTREAMS_MAX:
        used = (deploy.port for deploy in state.deploys.values())
        upstreams = sorted({*range(ports.v1, ports.v2), *used})
    own = {
        "httpPort": mode.http_port,
        "httpsPort": mode.https_port,
        "http2": bool(certificates) and http2 == "on",
        "listenHttp2": " http2" if http2 == "listen" else "",
        "httpsSuffix": "" if mode.https_port == 443 else f":{mode.https_port}",
        "upstream": "c2_" if upstreams else "127.0.0.1:",
        "upstreams": upstreams,
    }  # type: JsonObject
    context: JsonObject = {"endPoints": [], "c2": own}
    if health:
        paths = {"incomingPath": health.incoming_path, "outgoingPath": health.outgoing_path}
        own["healthCheck"] = paths
        port = port_of(state, health_end_point(config, state) or "")
        if port:
            context["healthCheck"] = dict(paths, outgoingPort=port)
    pairs = {
        name: {"sslCertPath": pair[0], "sslCertKeyPath": pair[1]}
        for name, pair in sorted(certificates.items())
    }
    if pairs:
        probed = health.endpoint if health else None
        own["unknownTls"] = pairs.get(probed or "") or next(iter(pairs.values()))
    for name, end_point in sorted(mode.end_points.items()):
        entry: JsonObject = {"label": name, "serverNames": " ".join(end_point.server_names)}
        if port_of(state, name):
            entry["port"] = port_of(state, name)
        if end_point.certificate:
            entry.update(pairs.get(name, {}), letsencryptWwwDir=config.letsencrypt_www_dir)
        context["endPoints"].append({"https" if end_point.certificate else "http": entry})
    return context


def proxy_project(container: str) -> str:
    """Name the compose project of the proxy's container."""
    if container == ProxyMode._field_defaults["container_name"]:
        return "frontend-proxy"
    return compose_project(container)


def letsencrypt_dirs(config: Config) -> List[str]:
    """List certbot's directories on this host: of its configuration, and of its work."""
    return [
        os.path.join(config.letsencrypt_prefix_dir, path)
        for path in ("etc/letsencrypt", "var/lib/letsencrypt")
    ]


def generated_names(config: Config) -> List[str]:
    """List the host names of the generated certificate, each once."""
    return list(
        dict.fromkeys(
            host.lower()
            for _, e in sorted(config.end_points.items())
            if e.certificate and e.certificate.generated
            for host in e.server_names
        )
    )


def certificate_mounts(config: Config) -> List[str]:
    """List what the proxy's container sees of certbot's: its directory, and the challenge's."""
    return (
        [letsencrypt_dirs(config)[0], config.letsencrypt_www_dir] if generated_names(config) else []
    )


def container_settings(config: Config) -> Dict[str, List[Any]]:
    """List what of the configuration the proxy's container is created from: KEY -> value, default.

    Only a change of these is a reason for an outage; what another c2 writes besides is not.
    """
    defaults = Config._field_defaults
    return {
        "nginxDockerImage": [config.nginx_docker_image, defaults["nginx_docker_image"]],
        "nginxDockerVersion": [config.nginx_docker_version, defaults["nginx_docker_version"]],
        "containerName": [
            config.proxy.container_name,
            ProxyMode._field_defaults["container_name"],
        ],
        "certificates": [certificate_mounts(config), []],
    }


def compose_file(config: Config) -> str:
    """Write the proxy's docker-compose.yml, as JSON, which compose reads: no quoting to get wrong.

    It depends on nothing that changes in daily work: recreating the container is an outage.
    """

    def mount(source: str, target: str, read_only: bool = True) -> JsonObject:
        return {"type": "bind", "source": source, "target": target, "read_only": read_only}

    services: Dict[str, JsonObject] = {}
    mounts = [mount(f"./{name}", f"/etc/nginx/c2/{name}") for name in PROXY_DIRS]
    for path in certificate_mounts(config):
        mounts.append(mount(path, path))
    if generated_names(config):
        www, (letsencrypt, work) = config.letsencrypt_www_dir, letsencrypt_dirs(config)
        services["certbot"] = {
            "image": f"{config.certbot_docker_image}:{config.certbot_docker_version}",
            "network_mode": "host",
            "profiles": ["certbot"],
            "volumes": [
                mount(letsencrypt, "/etc/letsencrypt", False),
                mount(www, www, False),
                mount(work, "/var/lib/letsencrypt", False),
            ],
        }
    services["nginx"] = {
        "container_name": config.proxy.container_name,
        "image": f"{config.nginx_docker_image}:{config.nginx_docker_version}",
        "network_mode": "host",
        "restart": "always",
        "command": ["sh", "-c", NGINX_START],
        "volumes": mounts,
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
    }
    document = {
        "name": proxy_project(config.proxy.container_name),
        "services": services,
        "x-c2": container_settings(config),
    }
    return json.dumps(document, indent=2).replace("$", "$$") + "\n"


def nginx_service(file: Optional[str]) -> Any:
    """Find what the proxy's container is created from in a compose file; None if it is not c2's."""
    try:
        service = json.loads(file or "")["services"]["nginx"]
        return service if service["container_name"] else None
    except (ValueError, KeyError, TypeError):
        return None


def keep_container(created_from: str, file: str) -> str:
    """Give the compose file but with the proxy's container as it was created."""
    old = json.loads(created_from)
    services = dict(json.loads(file)["services"], nginx=old["services"]["nginx"])
    return json.dumps(dict(old, services=services), indent=2) + "\n"


def is_reconfigured(created_from: Optional[str], file: str) -> bool:
    """Tell whether the configuration itself asks for another container than the one created.

    Where a default was used, and is used, its change does not.
    """
    service = nginx_service(created_from)
    if not service:
        return True
    image, _, version = service["image"].rpartition(":")
    settings = {  # as of the first c2, which did not record them
        "nginxDockerImage": [image, "nginx"],
        "nginxDockerVersion": [version, "latest"],
        "containerName": [service["container_name"], "frontendproxy"],
        "certificates": [[m["source"] for m in service["volumes"] if m["source"][0] == "/"], []],
    }
    before = json.loads(created_from or "").get("x-c2", settings)
    for key, (value, default) in json.loads(file)["x-c2"].items():
        old, old_default = before.get(key, (value, default))
        if old != value and (old, value) != (old_default, default):
            return True
    return False


def due_changes(created_from: Optional[str], file: str) -> List[str]:
    """Tell how a container that is created now differs from the one that was; [] for not at all."""
    old, new = nginx_service(created_from) or {}, nginx_service(file)
    return [
        f"{key} {old[key]} -> {new[key]}" if key in ("image", "container_name") and old else key
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def ports_context(port: int, ports: PortRange) -> Dict[str, int]:
    """Give `ports` of a template's context; camus2's extra ones where they are ports at all."""
    extra = {f"extra{n}": port + n * (ports.v2 - ports.v1) for n in range(1, 5)}
    return dict({"http": port}, **{name: p for name, p in extra.items() if p <= 65535})


def check_generated(config: Config) -> None:
    """Refuse, with the reason, unless this configuration has a certificate to generate."""
    names = generated_names(config)
    odd = [n for n in names if not re.fullmatch(r"([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z0-9-]+", n)]
    for wrong, reason in (
        (not config.has_proxy, "deployMode is noproxy; end TLS where the proxy is"),
        (
            config.remote,
            "the state is remote (remoteStateS3), and the challenge could reach any of the "
            "machines; end TLS at the load balancer, or give them an explicit certificate",
        ),
        (not names, "no endpoint has the etype httpsWithRedirect: generated"),
        (
            odd,
            f"HTTP-01 can't prove {', '.join(odd)}; give such an endpoint an explicit certificate",
        ),
        (
            not config.auto_cert_contact_email,
            "autoCertContactEmail is not set; it is the contact of "
            "the account at the certificate authority",
        ),
    ):
        if wrong:
            raise Refused(f"there is no certificate to generate: {reason}")


def certbot_args(config: Config, renew: bool = False) -> List[str]:
    """Give certbot's arguments; it renews when due or the names differ. renew: in any case."""
    server = ["--server", config.acme_server] if config.acme_server else []
    domains = [arg for name in generated_names(config) for arg in ("--domain", name)]
    return [
        "certonly",
        "--non-interactive",
        "--agree-tos",
        f"--email={config.auto_cert_contact_email}",
        "--webroot",
        "--webroot-path",
        config.letsencrypt_www_dir,
        "--cert-name",
        config.auto_cert_name,
        "--force-renewal" if renew else "--keep-until-expiring",
        "--renew-with-new-domains",
        *server,
        *domains,
    ]


def certbot_reason(output: str) -> str:
    """Find why certbot failed, in its own words on one line; "" for nothing.

    That is what it says of the challenges, else its error.
    """
    refused = re.findall(
        r"^ *(?:Domain|Identifier): *(.+)\n *Type: *(.+)\n *Detail: *(.+)", output, re.M
    )
    if refused:
        return "; ".join(f"{name}: {kind}: {detail.strip()}" for name, kind, detail in refused)
    chatter = r" (Container|Image) |Saving debug log|Ask for help|- - -"
    error = output.rpartition("An unexpected error occurred:\n")[2].splitlines()
    lines = [line.strip() for line in error if line.strip() and not re.match(chatter, line)]
    reason = " ".join(dict.fromkeys(lines[-4:]))
    return reason if len(reason) <= 500 else reason[:250] + " ... " + reason[-250:]


def status_text(
    config: Config,
    state: State,
    runs: Dict[str, bool],
    certificates: Sequence[str] = (),
    due: Sequence[str] = (),
) -> str:
    """Write `status` for a person.

    runs: LABEL -> whether its port answers; certificates: their lines; due: see due_changes.
    """
    lines = []
    if config.has_proxy:
        lines.append("Endpoints:")
        for name, end_point in sorted(config.end_points.items()):
            https = f",{config.proxy.https_port}" if end_point.certificate else ""
            hosts = ", ".join(
                f"{host}:{config.proxy.http_port}{https}" for host in end_point.server_names
            )
            lines.append(f"  {name}: ({hosts}) -> {state.connections.get(name, '(not connected)')}")
        lines += [
            f"  {name}: (not configured) -> {deploy}"
            for name, deploy in sorted(state.connections.items())
            if name not in config.end_points
        ]
        lines.append("")
    if due:
        lines += ["Proxy:", f"  due with c2 restart-frontend-proxy: {'; '.join(due)}", ""]
    if certificates:
        lines += ["Certificates:", *certificates, ""]
    lines.append("Deploys:")
    for name, deploy in sorted(state.deploys.items()):
        shown = "" if name == deploy.release else f" ({deploy.release})"
        facts = [f"(localhost:{deploy.port})"] if deploy.has_port else []
        if name in runs:
            facts.append("answers" if runs[name] else "DOES NOT ANSWER")
        if state.since.get(name):
            facts.append(f"since {state.since[name][:16].replace('T', ' ')} UTC")
        lines.append(f"  {name}{shown}" + (": " + " ".join(facts) if facts else ""))
    if not state.deploys:
        lines.append("  (none)")
    return "\n".join(lines)


def size_text(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.{int(unit != 'B')}f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def tail(output: str, lines: int = OUTPUT_LINES) -> str:
    return "\n".join(output.strip().splitlines()[-lines:])


def secret_values(value: Any, secret: bool = False) -> List[str]:
    """List the texts of a config source that no log may show.

    All are of one that is secret; else those that their keys call so.
    """
    if isinstance(value, dict):
        pattern = "pass|secret|token|credential|private|api_?key"
        return [
            s
            for k, v in value.items()
            for s in secret_values(v, secret or bool(re.search(pattern, k, re.I)))
        ]
    if isinstance(value, list):
        return [s for item in value for s in secret_values(item, secret)]
    if not secret or value is None or isinstance(value, bool):
        return []
    return [line.strip() for line in str(value).splitlines() if len(line.strip()) >= 4]


def masked(value: Any, secrets: List[str]) -> Any:
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "***")
    return value


# --------------------------------------------------------------------------------------------------
# Files, log, processes, lock and journal
# --------------------------------------------------------------------------------------------------


def make_dir(path: str, mode: int = 0o755) -> None:
    """Make a directory and those above it, whatever the umask: other users read them."""
    if os.path.isdir(path):
        return
    make_dir(os.path.dirname(path) or ".")
    umask = os.umask(0)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
    finally:
        os.umask(umask)


def require_private(*paths: str) -> None:
    """Refused when another user than root and c2's own can write one of these, if it is there."""
    import shlex

    remedies: Dict[str, List[str]] = {f"chown {os.geteuid() or 'root'}": [], "chmod go-w": []}
    foreign, writable = remedies.values()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            info = os.stat(path)
            if info.st_uid not in (0, os.geteuid()):
                foreign.append(path)
            if info.st_mode & 0o022:
                writable.append(path)
    if foreign or writable:
        mend = [" ".join([c, *map(shlex.quote, found)]) for c, found in remedies.items() if found]
        raise Refused(
            f"other users can write {', '.join(sorted({*foreign, *writable}))}, and so choose what "
            f"c2 runs; mend that: {'; '.join(mend)}"
        )


def read_file(path: str) -> Optional[str]:
    """Read the text of a UTF-8 file; None when there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise C2Error(f"{path} is not UTF-8 text") from None


def list_dir(path: str) -> List[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def load_json(path: str, what: str) -> Any:
    source = read_file(path)
    if source is None:
        raise C2Error(f"{what}: there is no file {path}")
    return parse_json(source, what)


@contextlib.contextmanager
def with_path(path: str) -> Any:
    """Let an OSError tell its file: that of a failed write has no name."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or path
        raise


def sync_dir(path: str) -> None:
    fd = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_dir(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def remove(path: str) -> None:
    """Remove a file, a link, or a directory with all in it; nothing there is no error."""
    import shutil

    if is_dir(path):
        return shutil.rmtree(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def temp_name(path: str) -> str:
    """Name a file until it is whole, as nobody can foresee.

    No label contains ~, and the pid tells what a kill has left.
    """
    return f"{path}.{os.getpid()}-{os.urandom(8).hex()}~"


def replace_file(path: str, content: Any, mode: int = 0o644) -> None:
    """Write a file whole or not at all: to a temporary name, to the disk, then rename it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temp = temp_name(path)
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with with_path(path), open(fd, "wb") as f:
            os.fchmod(f.fileno(), mode)
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    sync_dir(os.path.dirname(path))


def write_output(path: str, content: str, mode: int) -> None:
    """Replace a file, but write through a link or a device, which stays what it is."""
    if not os.path.lexists(path) or os.path.isfile(path) and not os.path.islink(path):
        return replace_file(path, content, mode)
    if os.path.islink(path) and os.lstat(path).st_uid not in (0, os.geteuid()):
        raise C2Error(f"{path} is a link that another user has made; remove it, or write elsewhere")
    fd = -1
    for own in (1, 2):  # /dev/stdout: opened anew, a file would be truncated, and a socket can't be
        with contextlib.suppress(OSError):
            if os.path.samefile(path, f"/dev/fd/{own}"):
                fd = os.dup(own)
                break
    if fd < 0:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with with_path(path), open(fd, "wb") as f:
        f.write(content.encode("utf-8"))


def sync_file_system(path: str) -> None:
    """Let all that was written to the file system of `path` outlive a power cut, at once."""
    try:
        import ctypes

        syncfs = ctypes.CDLL(None).syncfs
    except (ImportError, AttributeError):  # a Python without ctypes; not Linux
        return os.sync()
    fd = os.open(path, os.O_RDONLY)
    try:
        if syncfs(fd):
            raise C2Error(f"{path}: what was written did not reach the disk; see the system's log")
    finally:
        os.close(fd)


def disk_usage(path: str) -> int:
    """Return how many bytes a file takes on the disk, or a directory with all in it."""
    paths = [path]
    for root, directories, files in os.walk(path):
        paths += [os.path.join(root, name) for name in directories + files]
    blocks = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(path)
            blocks[status.st_dev, status.st_ino] = status.st_blocks
    return 512 * sum(blocks.values())


def replace_link(path: str, target: Optional[str]) -> None:
    """Point a symbolic link at `target` by one atomic rename; None removes it."""
    if target is None:
        return remove(path)
    temp = temp_name(path)
    os.symlink(target, temp)
    os.replace(temp, path)
    sync_dir(os.path.dirname(path))


def read_link(path: str) -> Optional[str]:
    try:
        return os.readlink(path)
    except OSError:
        return None


def restore_file(path: str, content: Optional[str]) -> None:
    """Make a file what it was: of this content, or not there."""
    if content is None:
        remove(path)
    else:
        replace_file(path, content)


def attempts(seconds: float, pause: float = 0.05) -> Iterator[float]:
    """Yield the seconds that are left: at once, after every `pause`, and a last time at the end."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        yield left
        if left <= 0:
            return
        time.sleep(min(pause, max(0, deadline - time.monotonic())))


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """Give a private directory that is gone afterwards, for what goes to and from the aws CLI."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="c2-") as directory:
        yield directory


def compare_trees(new: str, place: str) -> Tuple[List[str], List[str], List[str]]:
    """List what only `new` has, what only `place` has, and what both have.

    Paths begin with /, and "" are the trees themselves. A directory in both stands for nothing but
    what is in it.
    """
    fresh: List[str] = []
    kept: List[str] = []
    common: List[str] = []
    pending = [""]
    while pending:
        at = pending.pop()
        if is_dir(new + at) and is_dir(place + at):
            names = {*os.listdir(new + at), *os.listdir(place + at)}
            pending += [f"{at}/{name}" for name in sorted(names, reverse=True)]
        elif not os.path.lexists(place + at):
            fresh.append(at)
        elif not os.path.lexists(new + at):
            kept.append(at)
        elif is_dir(new + at) == is_dir(place + at):
            common.append(at)
        else:
            raise C2Error(
                f"{place}{at} is {'a' if is_dir(place + at) else 'no'} directory, unlike in the "
                "release; move it away, or start the release under another label"
            )
    return fresh, kept, common


def utc_now(moment: Optional[float] = None) -> str:
    moment = time.time() if moment is None else moment
    return (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
        + f".{int(moment * 1000) % 1000:03d}Z"
    )


# What a terminal obeys, but for tabs and line ends; then what turns the direction of writing, and
# what only some readers take for a line end.
CONTROLS = r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"


def printable(message: str) -> str:
    """Spell out the control characters of a text, but for tabs and line ends."""
    return re.sub(CONTROLS, lambda m: ascii(m.group())[1:-1], message)


def one_line(name: str) -> str:
    return printable(name).replace("\n", "\\n")


def printable_output(output: str) -> str:
    """Spell out what a program has written: of its control sequences only colours are left."""
    parts = re.split("(\x1b\\[[0-9;]*m)", re.sub("\r\n?", "\n", output))
    return "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))


def readable_json(value: Any, **options: Any) -> str:
    """Write JSON with letters as they are, which steers no terminal."""
    source = json.dumps(value, ensure_ascii=False, **options)
    return re.sub(CONTROLS, lambda m: f"\\u{ord(m.group()):04x}", source)


def say(message: str) -> None:
    """Tell the person at the terminal; that may not fail the work, or steer the terminal."""
    message = printable(message)
    with contextlib.suppress(OSError, ValueError):
        print(f"c2: {message}", file=sys.stderr, flush=True)


def emit(data: str) -> None:
    """Write data to stdout, as UTF-8 whatever the locale."""
    if sys.stdout is None:
        raise BrokenPipeError  # closed from the start
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:
        sys.stdout.write(data)
    else:
        sys.stdout.flush()
        raw.write(data.encode("utf-8", "surrogateescape"))
    sys.stdout.flush()


def login_name() -> str:
    try:
        import pwd

        return os.environ.get("SUDO_USER") or pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def who() -> str:
    """Name who makes a change, for others to read: $C2_WHO, else the user at this host."""
    import socket

    name = os.environ.get("C2_WHO") or f"{login_name()}@{socket.gethostname()}"
    return " ".join(printable(name).split())


def check_log_file(path: str) -> None:
    """Refuse a log that is another's to read, or that a write could wait for."""
    import stat

    with contextlib.suppress(OSError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            kind = {stat.S_IFLNK: "link", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
            raise ConfigError(
                f"logFile: {path} is a {kind.get(stat.S_IFMT(mode), 'device')}; give the path of a "
                "file, or of one that is not there yet"
            )


class Log:
    """The JSON log, and what is said of it to the person: one event, one line, in both."""

    def __init__(self, path: str, command: str) -> None:
        self.path = path
        self.command = command
        self.works = True
        self.failed = False
        self.secrets: List[str] = []
        self.warned: Optional[List[Set[str]]] = None

    def begin_round(self) -> None:
        """Repeat no warning from now on that this round or the last one has given."""
        self.warned = [self.warned[1] if self.warned else set(), set()]

    def add_secrets(self, values: List[str]) -> None:
        self.secrets = sorted({*self.secrets, *values}, key=len, reverse=True)

    def event(self, level: str, event: str, message: str, **fields: Any) -> None:
        """Write an event to the log alone; `info` and `warn` say it too, `main` says an error."""
        message = masked(message, self.secrets)
        self.failed = self.failed or level == "error"
        entry = {
            "time": utc_now(),
            "level": level,
            "pid": os.getpid(),
            "user": login_name(),
            "command": self.command,
            "event": event,
            "message": message,
        }
        entry.update((k, masked(v, self.secrets)) for k, v in fields.items() if v not in (None, ""))
        line = readable_json(entry) + "\n"
        try:
            make_dir(os.path.dirname(self.path))
            with open(
                os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644),
                "rb+",
                0,
            ) as f:
                size = os.fstat(f.fileno()).st_size
                torn = (
                    size and os.pread(f.fileno(), 1, size - 1) != b"\n"
                )  # by a full disk, or power lost
                f.write(("\n" * torn + line).encode("utf-8", "backslashreplace"))
        except OSError as e:
            if self.works:
                say(f"warning: can't write the log {self.path}: {e.strerror}; going on without it")
            self.works = False

    def info(self, event: str, message: str, **fields: Any) -> None:
        say(masked(message, self.secrets))
        self.event("info", event, message, **fields)

    def warn(self, event: str, message: str, **fields: Any) -> None:
        if self.warned:
            known = any(message in of_round for of_round in self.warned)
            self.warned[1].add(message)
            if known:
                return
        say("warning: " + masked(message, self.secrets))
        self.event("warning", event, message, **fields)


class Host(NamedTuple):
    """This machine: what the effectful functions need to know."""

    config: Config
    log: Log
    command_timeout: Optional[float] = None


def boot_id() -> str:
    return (read_file("/proc/sys/kernel/random/boot_id") or "").strip()


def process_fields(pid: Any) -> List[str]:
    """Read /proc/PID/stat of a process from its state on (proc(5)); [] when there is none."""
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            return f.read().rpartition(")")[2].split()
    return []


def start_time(pid: int) -> str:
    """Tell when a process began, "" for none; with its pid and boot it names one for good."""
    return "".join(process_fields(pid)[19:20])


def identity(pid: int) -> JsonObject:
    return {"pid": pid, "start": start_time(pid), "boot": boot_id()}


def is_alive(process: JsonObject) -> bool:
    """Tell whether the process of this identity, which a file may have wrong, still runs."""
    pid = process["pid"]
    ours = isinstance(pid, int) and pid > 1 and process["boot"] == boot_id()
    return ours and process["start"] == start_time(pid) != ""


def group_alive(group: int) -> bool:
    """Tell whether a process of this process group still runs; zombies don't count."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    if not os.path.isdir("/proc/self"):
        return True
    processes = map(process_fields, filter(str.isdigit, os.listdir("/proc")))
    return any(fields[2] == str(group) and fields[0] not in "ZX" for fields in processes if fields)


def end_group(group: int) -> None:
    """End every process of a group: SIGTERM, and SIGKILL to what is left after END_GRACE_SECS."""
    for signum, patience in ((signal.SIGTERM, END_GRACE_SECS), (signal.SIGKILL, 3)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signum)
        if not all(group_alive(group) for _ in attempts(patience)):
            return


def end_orphan(group: Optional[JsonObject]) -> bool:
    """End the process group of a killed c2, if its leader is still the one that c2 recorded."""
    with contextlib.suppress(ProcessLookupError):
        if group and is_alive(group) and os.getsid(group["pid"]) == group["pid"]:
            end_group(group["pid"])
            return True
    return False


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def uninterruptible() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back: an undo must not be undone half-way."""
    pending = []

    def hold(signum: int, frame: object) -> None:
        say("finishing what must not be cut short; a moment")
        pending.append(signum)

    before = {s: signal.signal(s, hold) for s in SIGNALS}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    for signum in pending[:1]:
        os.kill(os.getpid(), signum)


Undos = List[Callable[[], Any]]


@contextlib.contextmanager
def undo_on_failure() -> Iterator[Undos]:
    """Collect what takes back what was done; when the body fails all are called, last first."""
    undos: Undos = []
    try:
        yield undos
    except BaseException:
        with uninterruptible():
            for take_back in reversed(undos):
                try:
                    take_back()
                except (C2Error, OSError) as e:
                    say(f"warning: while rolling back: {e}")
        raise


def encode_action(action: Any) -> JsonObject:
    def encode_value(value: Any) -> Any:
        if isinstance(value, Deploy):
            return dict(value._asdict())
        return encode_action(value) if hasattr(value, "_asdict") else value

    plain = {k: encode_value(v) for k, v in action._asdict().items()}
    return dict(plain, kind=type(action).__name__)


def decode_action(plain: JsonObject) -> Any:
    def decode_value(value: Any) -> Any:
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, list):
            return tuple(map(decode_value, value))
        if isinstance(value, dict) and "kind" in value:
            return decode_action(value)
        return decode(Deploy if isinstance(value, dict) else Label, value, Location("action"))

    return ACTIONS[plain["kind"]](**{k: decode_value(v) for k, v in plain.items() if k != "kind"})


class Journal:
    """What is being done to the host, and how far it is, in a file: it makes a kill recoverable."""

    def __init__(self, path: str, record: JsonObject) -> None:
        self.path, self.record, self.ignore_disk_full = path, record, False

    def step(self, step: str) -> None:
        self.note(step=step, group=None)

    def runs(self, pid: int) -> None:
        self.note(group=identity(pid))

    def save(self, record: JsonObject) -> None:
        """Have the new record only when the file has it; an undo goes on where the disk is full."""
        try:
            replace_file(self.path, json.dumps(record), 0o600)
        except OSError:
            if not self.ignore_disk_full:
                raise
        self.record = record

    def note(self, **facts: Any) -> None:
        self.save(dict(self.record, **facts))

    def clear(self) -> None:
        remove(self.path)

    @property
    def action(self) -> Any:
        return decode_action(self.record["action"])

    @property
    def doing(self) -> str:
        return f"{describe(self.action)} (step {self.record['step']}, c2 {self.record['command']})"


def read_journal(path: str) -> Optional[Journal]:
    """Read the journal that a killed command left; None without one, C2Error for another file."""
    source = read_file(path)
    if source is None:
        return None
    try:
        journal = Journal(path, json.loads(source))  # names of files may not be Unicode
        group = journal.record["group"]
        paths = [*journal.record.get("fresh", []), *journal.record.get("common", [])]
        inside_place = all(re.fullmatch(r"(/(?!\.\.?(/|\Z))[^/]+)*", at) for at in paths)
        steps = [journal.record["step"], *journal.record.get("steps", [])]
        named = all(isinstance(name, str) for name in steps)
        identified = group is None or {*group} == {*identity(0)}
        if journal.doing and inside_place and named and identified:
            return journal
    except (C2Error, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise C2Error(f"{path} is not a journal of c2; look at what it was about and remove it")


def lock_holder(config: Config) -> JsonObject:
    """Read who holds the lock and what it does; {} for nobody, and for who may not ask."""
    try:
        holder = json.loads(read_file(config.proxy_path("lock")) or "{}")
        return holder if is_alive(holder) else {}
    except (ValueError, KeyError, TypeError, PermissionError):
        return {}


def describe_holder(config: Config, holder: JsonObject) -> str:
    try:
        journal = read_journal(config.proxy_path("journal.json"))
    except C2Error:
        journal = None
    step = f", in step {journal.record['step']}" if journal else ""
    return f"c2 {holder.get('command', '')} (pid {holder.get('pid', 'unknown')}{step})"


def acquire(
    lock: IO[str], config: Config, wait: float, cancels: Optional[Callable[[JsonObject], bool]]
) -> bool:
    """Take the lock, and tell whether its holder was ended for it; Refused after `wait` seconds."""
    import fcntl

    for attempt, left in enumerate(attempts(wait, 0.1)):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        holder = lock_holder(config)
        name = describe_holder(config, holder)
        if holder and cancels and cancels(holder):
            say(f"ending {name}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder["pid"], signal.SIGTERM)
            acquire(lock, config, max(left, 60), None)
            return True
        if not attempt:
            say(f"waiting for {name}, at most {wait:g} s")
    raise Refused(
        f"{name} still works on this host after {wait:g} s; try again later, or wait longer with "
        "--lock-wait SECS"
    )


@contextlib.contextmanager
def locked(
    host: Host,
    wait: float,
    cancels: Optional[Callable[[JsonObject], bool]] = None,
    **about: Any,
) -> Iterator[bool]:
    """Hold the host's lock, which dies with its process; Refused after `wait` seconds.

    about: what the holder says of itself to those who wait; cancels: whether the holder is to be
    ended instead, since this command takes back what that one does. Yields whether one was.
    """
    config = host.config
    require_private(
        config.deploys_dir,
        *map(config.path, (".staging", ".old", "frontend-proxy")),
        *map(config.proxy_path, list_dir(config.proxy_path())),
    )
    make_dir(config.proxy_path())
    fd = os.open(config.proxy_path("lock"), os.O_RDWR | os.O_CREAT, 0o600)
    with open(fd, "r+", encoding="utf-8") as lock:
        os.fchmod(fd, 0o600)  # who can open it can hold it
        cancelled = acquire(lock, config, wait, cancels)
        lock.truncate(0)
        lock.write(json.dumps(dict(identity(os.getpid()), command=host.log.command, **about)))
        lock.flush()
        yield cancelled


def load_state(config: Config) -> State:
    """Load this host's state.json; an empty State when there is none yet."""
    path = config.proxy_path("state.json")
    return decode_state(load_json(path, path), path) if os.path.exists(path) else State()


def host_state(config: Config) -> State:
    """Load the state; where only camus2 has been, without the proxy, that of its link `current`."""
    known = any(os.path.exists(config.proxy_path(name)) for name in ("state.json", "journal.json"))
    name = os.path.basename(read_link(config.path(CURRENT)) or "")
    if config.has_proxy or known or not re.fullmatch(LABEL, name):
        return load_state(config)
    return State(deploys={name: Deploy(name, f"{name}.zip", 0)})


def save_state(config: Config, state: State) -> None:
    make_dir(config.proxy_path())
    replace_file(config.proxy_path("state.json"), json.dumps(encode(state), indent=2) + "\n")


def report_unfinished(config: Config) -> None:
    """Say what is under way, or was killed and waits for the next command that changes the host."""
    journal = read_journal(config.proxy_path("journal.json"))
    holder = lock_holder(config)
    if journal and holder:
        say(f"under way: {journal.doing}, pid {holder['pid']}, since {journal.record['since']}")
    elif journal:
        say(f"warning: killed: {journal.doing}; the next command that changes something recovers")
    for name in list_dir(config.proxy_path("blocked")):
        say(f"warning: {name[: -len('.json')]} is blocked: a recovery failed; see c2 show-log")


# --------------------------------------------------------------------------------------------------
# Running programs
# --------------------------------------------------------------------------------------------------


def show_args(args: List[str]) -> str:
    import shlex

    return " ".join(shlex.quote(arg) for arg in args)


def run(
    args: List[str],
    timeout: Optional[float] = 60,
    cwd: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    stdout: Any = None,
    stderr_to_stdout: bool = False,
) -> str:
    """Run a program, never through a shell, and return what it wrote to stdout.

    timeout: seconds; cwd: directory; env: added to the environment; stdout: where it goes instead;
    stderr_to_stdout: take it as well. Raises CommandFailed with the program, its exit code and its
    last lines.
    """
    import subprocess

    command = show_args(args[:6]) + (" ..." if len(args) > 6 else "")
    if os.environ.get("C2_DEBUG"):
        say("+ " + show_args(args))
    try:
        process = subprocess.Popen(
            args,
            cwd=cwd,
            env=dict(os.environ, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=stdout or subprocess.PIPE,
            stderr=subprocess.STDOUT if stderr_to_stdout else subprocess.PIPE,
            start_new_session=True,
        )  # Ctrl-C is for c2, which may be putting back
    except FileNotFoundError:
        raise C2Error(f"{args[0]} is not on PATH; install it, since {command} needs it") from None
    except OSError as e:
        raise C2Error(f"{args[0]} can't be run: {e.strerror}") from None
    with process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end_group(process.pid)
            raise CommandFailed(f"{command} has not ended after {timeout:g} s", 124) from None
        except BaseException:
            end_group(process.pid)
            raise
    answer = (out or b"").decode("utf-8", "replace")
    if process.returncode:
        output = (err or b"").decode("utf-8", "replace") + answer
        raise CommandFailed(
            f"{command}: exit {process.returncode}: {tail(output, 8) or 'no output'}",
            process.returncode,
            output,
        )
    return answer


def aws(*args: str, timeout: float = 120, **options: Any) -> str:
    """Run the aws CLI, with bounds: by default an endpoint that never answers takes it 312 s."""
    endpoint = os.environ.get("S3_ENDPOINT") if args[0].startswith("s3") else None
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")  # not known to an aws CLI before 2.13
    env = {"AWS_PAGER": "", "AWS_MAX_ATTEMPTS": os.environ.get("AWS_MAX_ATTEMPTS", "3")}
    bounds = ["--cli-connect-timeout", "10", "--cli-read-timeout", "60"]
    try:
        return run(
            ["aws", *args, *bounds, *(["--endpoint-url", endpoint] if endpoint else [])],
            timeout=timeout,
            env=env,
            **options,
        )
    except CommandFailed as e:
        if re.search(r"\((404|NoSuchKey|NoSuchBucket|ResourceNotFoundException)\)", e.output):
            raise Missing(str(e)) from None
        raise


def docker_compose(args: List[str], timeout: float, directory: str, **options: Any) -> str:
    try:
        return run(["docker", "compose", *args], timeout, directory, **options)
    except CommandFailed as e:
        if re.search(r"is not a docker command|docker \[OPTIONS\] COMMAND", e.output):
            raise C2Error(
                "docker has no compose; install its compose plugin, version 2 or later"
            ) from None
        raise


# --------------------------------------------------------------------------------------------------
# Stores: where releases, config sources and the configuration itself come from
# --------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A release in the store."""

    name: str
    time: str  # as in 2026-11-24T12:30:00Z
    size: int  # bytes


class Store(NamedTuple):
    """Where releases come from, whatever is behind it."""

    label: str  # for messages
    releases: Callable[[], List[Stored]]  # newest first
    exists: Callable[[str], bool]
    fetch: Callable[[str, str], None]  # a name to a path, or Missing


def fetch_file(source: str, to: str) -> None:
    import shutil

    try:
        shutil.copyfile(source, to)
    except (FileNotFoundError, IsADirectoryError):
        raise Missing(f"there is no file {source}") from None


def fetch_s3(url: str, to: str) -> None:
    if sys.stderr.isatty():
        aws("s3", "cp", url, to, timeout=3600, stdout=sys.stderr)  # which shows the progress
    else:
        aws("s3", "cp", url, to, "--only-show-errors", timeout=3600)


def http_opener() -> Any:
    """Return what opens addresses; it is led neither from https to http nor to other schemes."""
    import urllib.parse
    import urllib.request

    class Redirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request: Any, *answer: Any) -> Any:
            scheme = urllib.parse.urlsplit(answer[-1]).scheme
            if scheme != "https" and (scheme, request.type) != ("http", "http"):
                raise C2Error(
                    f"{without_credentials(request.full_url)}: it redirects from {request.type} to "
                    f"{scheme}, which is not followed; give the address that it redirects to, if "
                    "it can be trusted"
                )
            return super().redirect_request(request, *answer)

    return urllib.request.build_opener(Redirects)


@contextlib.contextmanager
def open_http(url: str, method: str = "GET") -> Iterator[Any]:
    """Give the answer to a request; Missing or C2Error when it fails, also while it is read.

    A user and password in the address go along by Basic, and not where it redirects to.
    """
    import base64
    import http.client
    import urllib.error
    import urllib.request
    from urllib.parse import unquote, urlsplit

    printed = without_credentials(url)
    try:
        parts = urlsplit(url)
        user, at, netloc = parts.netloc.rpartition("@")
        request = urllib.request.Request(
            parts._replace(netloc=netloc).geturl(), None, {"User-Agent": f"c2/{VERSION}"}
        )
        request.method = method
        if at:
            pair = unquote(user if ":" in user else user + ":").encode()
            basic = base64.b64encode(pair).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        with http_opener().open(request, timeout=HTTP_TIMEOUT_SECS) as answer:
            yield answer
    except urllib.error.HTTPError as e:
        kind = Missing if e.code in (404, 410) else C2Error
        raise kind(f"{printed}: the server says {e.code} {e.reason}") from None
    except http.client.InvalidURL:
        raise C2Error(
            f"{printed} is not an address; what is odd in a user or password is written as %XX"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise C2Error(f"{printed}: {getattr(e, 'reason', e)}") from None


def fetch_http(url: str, to: str) -> None:
    """Download over http(s); a short or refused answer is an error."""
    with open_http(url) as answer, open(to, "wb") as f:
        size = int(answer.headers.get("Content-Length") or 0)
        watched = sys.stderr.isatty()
        for chunk in iter(lambda: answer.read(1 << 20), b""):
            f.write(chunk)
            if watched:
                of = f" of {size >> 20}" if size else ""
                print(f"\rc2: {f.tell() >> 20}{of} MB", end="", file=sys.stderr, flush=True)
        if watched:
            print(file=sys.stderr)
        if size and f.tell() != size:
            raise C2Error(
                f"{without_credentials(url)}: the connection ended after {f.tell()} of {size} "
                "bytes; try again"
            )


def fetch_secret(arn: str, to: str) -> None:
    output = aws("secretsmanager", "get-secret-value", "--secret-id", arn, "--output", "json")
    answer = parse_json(output, arn)
    if "SecretString" not in answer:
        raise C2Error(f"the secret {arn} is binary; it must be a JSON document as text")
    replace_file(to, answer["SecretString"], 0o600)


FETCH = {
    "file": fetch_file,
    "localdir": fetch_file,
    "s3": fetch_s3,
    "http": fetch_http,
    "awsSecretArn": fetch_secret,
}


def fetch(source: Variant, to: str, json_name: str = "") -> None:
    """Fetch a document to the path `to`, 0600, whole or not at all.

    json_name: what messages call one that must be JSON.
    """
    part = temp_name(to)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with with_path(to):
            FETCH[source.name](source.value, part)
        if json_name:
            load_json(part, json_name)
        os.chmod(part, 0o600)
        os.replace(part, to)
    finally:
        remove(part)


def s3_parts(url: str) -> List[str]:
    """Return bucket and key of s3://BUCKET/KEY."""
    bucket, _, key = url[len("s3://") :].partition("/")
    return [bucket, key]


def s3_object(url: str) -> List[str]:
    """Return the arguments that name an object to `aws s3api`."""
    bucket, key = s3_parts(url)
    return ["--bucket", bucket, "--key", key]


def local_releases(base: str) -> List[Stored]:
    try:
        with os.scandir(base) as entries:
            files = [(e.name, e.stat()) for e in entries if e.is_file() and e.name[0] != "."]
    except FileNotFoundError:
        raise C2Error(
            f"the release store {base} is not there; make it, or correct releases"
        ) from None
    files.sort(key=lambda file: (-file[1].st_mtime, file[0]))
    return [Stored(name, utc_now(stat.st_mtime), stat.st_size) for name, stat in files]


def s3_releases(base: str) -> List[Stored]:
    """List the objects right below an s3:// prefix, newest first."""
    bucket, prefix = s3_parts(base.rstrip("/") + "/")
    answer = aws(
        "s3api",
        "list-objects-v2",
        "--bucket",
        bucket,
        "--prefix",
        prefix,
        "--delimiter",
        "/",
        "--output",
        "json",
        timeout=600,
    )
    items = json.loads(answer or "{}").get("Contents", [])
    items.sort(key=lambda item: item["Key"])
    items.sort(key=lambda item: item["LastModified"], reverse=True)
    objects = [Stored(i["Key"][len(prefix) :], i["LastModified"], i["Size"]) for i in items]
    return [stored for stored in objects if stored.name]


def s3_exists(url: str) -> bool:
    try:
        aws("s3api", "head-object", *s3_object(url))
    except Missing:
        return False
    return True


def http_releases(base: str) -> List[Stored]:
    raise C2Error(
        f"{without_credentials(base)} is an http store, which can't be listed; look where the "
        "releases are published"
    )


def http_exists(url: str) -> bool:
    try:
        with open_http(url, "HEAD"):
            return True
    except Missing:
        return False


def release_store(config: Config) -> Store:
    """Return the store that the configuration names."""
    kind, base = config.releases
    list_objects, exists = {
        "localdir": (local_releases, os.path.isfile),
        "s3": (s3_releases, s3_exists),
        "http": (http_releases, http_exists),
    }[kind]

    def source(name: str) -> Variant:
        if kind == "http":
            from urllib.parse import quote

            name = quote(name)
        return Variant(kind, base.rstrip("/") + "/" + name)

    def releases() -> List[Stored]:
        objects = list_objects(base)
        beside = {stored.name + end for stored in objects for end in (".sha256", ".sig")}
        return [stored for stored in objects if stored.name not in beside]

    return Store(
        without_credentials(base),
        releases,
        lambda name: exists(source(name).value),
        lambda name, to: fetch(source(name), to),
    )


def releases_text(releases: Sequence[Stored], state: State) -> str:
    """Write `list-releases` for a person, the names first."""
    rows = []
    for release in releases:
        uses = []
        for name, deploy in sorted(state.deploys.items()):
            if deploy.release == release.name:
                end_points = connected_to(state, name)
                serves = f", serves {' and '.join(end_points)}" if end_points else ""
                uses.append(f"runs as {name}{serves}")
        date = f"{release.time[:16].replace('T', ' ')} UTC"
        rows.append((one_line(release.name), date, size_text(release.size), "; ".join(uses)))
    width = max((len(row[0]) for row in rows), default=0)
    return "".join(
        f"{name:{width}}  {date}  {size:>8}  {uses}".rstrip() + "\n"
        for name, date, size, uses in rows
    )


def require_release(config: Config, name: str) -> None:
    """Raise unless the store has the release; with a suggestion where the store can be listed."""
    store = release_store(config)
    if store.exists(name):
        return
    try:
        hint = (
            nearest(name, [one_line(release.name) for release in store.releases()])
            or "; c2 list-releases shows what is there"
        )
    except (C2Error, OSError) as e:
        hint = f"; {e}"
    raise C2Error(f"there is no release {name} in {store.label}{hint}")


def find_release(config: Config, name: str) -> str:
    """Return the name that a release has in the store: `name`, or NAME.zip where only that is."""
    decode(ReleaseName, name, Location("RELEASE"))
    store = release_store(config)
    with contextlib.suppress(C2Error):  # fetching it says what is wrong
        if not name.endswith(".zip") and not store.exists(name) and store.exists(name + ".zip"):
            return name + ".zip"
    return name


def find_config(option: Optional[str]) -> str:
    """Return --config, else $CAMUS2_CONFIG, else what there is beside c2 in ../etc."""
    if option is not None:  # an empty one, too: better none than another
        return option
    if os.environ.get("CAMUS2_CONFIG"):
        return os.environ["CAMUS2_CONFIG"]
    etc = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "etc")
    paths = [os.path.join(etc, name) for name in ("camus2.json", "camus2.yaml", "camus2.yml")]
    for path in paths:
        if os.path.exists(path):
            return path
    raise ConfigError(
        "there is no configuration: neither --config nor $CAMUS2_CONFIG is given, and there is "
        f"no {' or '.join(paths[:2])}; c2 help shows one to start from"
    )


def load_config(option: Optional[str], warn: Callable[[str], None] = say) -> Config:
    """Find, fetch, parse and check the configuration; its file's directory begins its paths."""
    path = find_config(option)
    printed = without_credentials(path)
    web = path.startswith(("http://", "https://"))
    extension = os.path.splitext(path.partition("?")[0] if web else path)[1]
    if extension not in (".json", ".yaml", ".yml"):
        raise ConfigError(
            f"{printed or '--config'}: a configuration is a .json, .yaml or .yml file"
        )
    base = ""
    try:
        if path.startswith("s3://"):
            source = aws("s3", "cp", path, "-")
        elif web:
            with open_http(path) as answer:
                content = answer.read()
            source = content.decode("utf-8")
        else:
            base = os.path.dirname(os.path.abspath(path))
            with open(path, encoding="utf-8") as f:
                source = f.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{printed} is not UTF-8 text") from None
    except OSError as e:
        raise ConfigError(f"the configuration {printed} can't be read: {e.strerror}") from None
    except Missing as e:
        raise ConfigError(f"the configuration {printed} is not there: {e}") from None
    try:
        value = parse_json(source, "the document") if extension == ".json" else parse_yaml(source)
        return decode_config(value, base, lambda message: warn(f"warning: {printed}: {message}"))
    except C2Error as e:
        raise ConfigError(f"{printed}: {e}") from None


def cache_path(config: Config, name: str) -> str:
    return os.path.join(config.context_cache, f"{name}.json")


def fetch_context(host: Host, retry: bool = False) -> None:
    """Download every config source into the context cache; retry: wait for missing ones."""
    config = host.config
    if config.config_sources:
        make_dir(config.context_cache, 0o700)
        require_private(config.context_cache)
    for name, source in sorted(config.config_sources.items()):
        address = without_credentials(source.value)
        what = f"the config source {name} ({address})"
        waiting = False
        while True:
            try:
                fetch(source, cache_path(config, name), what)
                break
            except Missing as e:
                if not retry:
                    raise C2Error(
                        f"the config source {name} is not there ({e}); c2 fetch-context --retry "
                        "waits for it"
                    ) from None
                if not waiting:
                    host.log.info("wait", f"waiting for {what}")
                waiting = True
                time.sleep(10)
        host.log.info("fetch-context", f"fetched the config source {name} from {address}")


def load_context(host: Host) -> JsonObject:
    """Load the template context from the cache."""
    context = {}
    for name in host.config.config_sources:
        path = cache_path(host.config, name)
        if not os.path.exists(path):
            raise C2Error(
                f"the config source {name} has not been fetched yet; run c2 fetch-context"
            )
        context[name] = load_json(path, f"the config source {name}")
    return context


def learn_secrets(host: Host, inner: List[str]) -> None:
    """Mask, in the log from here on, the secrets of config sources and of the files `inner`.

    `inner` are the release's own; what can't be read has none.
    """
    files = [(path, False) for path in inner]
    for name, source in host.config.config_sources.items():
        files.append((cache_path(host.config, name), source.name == "awsSecretArn"))
    for path, secret in files:
        with contextlib.suppress(C2Error, OSError):
            host.log.add_secrets(secret_values(load_json(path, path), secret))


# --------------------------------------------------------------------------------------------------
# Releases: unpacked safely, expanded with the context
# --------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A member of an archive that may be unpacked."""

    name: str
    kind: str  # "file", "dir" or "link"
    mode: int  # for chmod
    info: "ZipInfo"


def archive_members(infos: "List[ZipInfo]", what: str) -> List[Member]:
    """Check the members of a zip archive: none leads out of the directory it is unpacked in.

    Raises C2Error for an absolute path, "..", a device, an encrypted or duplicate member, and a
    file that is another's directory. `what` names the archive.
    """
    import stat

    by_mode = {stat.S_IFDIR: "dir", stat.S_IFLNK: "link", stat.S_IFREG: "file", 0: "file"}
    members: Dict[str, Member] = {}
    kinds: Dict[str, str] = {}  # of the directories above, too
    for info in infos:
        name = info.filename.rstrip("/")
        bits = info.external_attr >> 16
        kind = by_mode.get(stat.S_IFMT(bits))
        if kind and info.filename.endswith("/"):
            kind = "dir"
        parts = name.split("/")
        if "\\" in name or "\0" in info.orig_filename or {"", ".", ".."} & set(parts):
            raise C2Error(
                f"{what}: {info.orig_filename!r} is not a path inside the release; pack it again"
            )
        if kind is None:
            raise C2Error(f"{what}: {name} is a device or the like, which a release can't hold")
        if info.flag_bits & 1:
            raise C2Error(f"{what}: {name} is encrypted; pack the release without a password")
        if info.compress_type not in (0, 8, 12):  # stored, deflated, bzip2
            raise C2Error(
                f"{what}: {name} is compressed by method {info.compress_type}; pack it with zip"
            )
        if name in members or kinds.setdefault(name, kind) != kind:
            raise C2Error(f"{what}: {name} is in the archive twice")
        for above in ("/".join(parts[:i]) for i in range(1, len(parts))):
            if kinds.setdefault(above, "dir") != "dir":
                raise C2Error(f"{what}: {above} is a {kinds[above]} and a directory too")
        members[name] = Member(name, kind, bits & 0o755, info)
    return list(members.values())


def check_link(name: str, target: str, what: str) -> None:
    """Raise unless a symbolic link stays inside.

    Its target is relative, and goes up no further than the root, and only at its beginning: after
    another link ".." would not lead where it seems to.
    """
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = parts.count("..")
    goes_up = ups > name.count("/") or ".." in parts[ups:]
    if not parts or target.startswith("/") or "\0" in target or goes_up:
        raise C2Error(f"{what}: the link {name} -> {target} leads out of the release")


def write_members(archive: "ZipFile", members: List[Member], directory: str, what: str) -> None:
    """Write checked members into a directory: files, then links, and modes of directories last."""
    import shutil

    for member in members:
        to = os.path.join(directory, member.name)
        make_dir(to if member.kind == "dir" else os.path.dirname(to))
        if member.kind == "file":
            with archive.open(member.info) as source, open(to, "xb") as f:
                shutil.copyfileobj(source, f, 1 << 20)
                os.fchmod(f.fileno(), member.mode or 0o644)
    for member in members:  # links last, so that nothing is written through one
        if member.kind == "link":
            if member.info.file_size > 4096:
                raise C2Error(
                    f"{what}: the link {member.name} has a target of {member.info.file_size} bytes"
                )
            target = archive.read(member.info).decode("utf-8", "surrogateescape")
            check_link(member.name, target, what)
            os.symlink(target, os.path.join(directory, member.name))
    for member in reversed(members):
        if member.kind == "dir":
            os.chmod(os.path.join(directory, member.name), (member.mode or 0o755) | 0o700)


def unpack_archive(path: str, directory: str, what: str) -> None:
    """Unpack a zip archive into a new directory, with its modes, less what lets others write."""
    import errno
    import struct
    import zipfile
    import zlib

    try:
        with zipfile.ZipFile(path) as archive:
            members = archive_members(archive.infolist(), what)
            size = sum(m.info.file_size for m in members)
            parent = os.path.dirname(directory)
            disk = os.statvfs(parent)
            free = disk.f_bavail * disk.f_frsize
            if size + 4096 * len(members) > free:
                raise C2Error(
                    f"{what}: unpacked it takes {size >> 20} MB, but {parent} has only "
                    f"{free >> 20} MB free; remove old deploys"
                )
            make_dir(directory)
            with with_path(directory):
                write_members(archive, members, directory, what)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        ValueError,
        RuntimeError,
        OSError,
    ) as e:
        # bz2, and a jump before the start, raise an OSError too
        if isinstance(e, OSError) and e.errno not in (None, errno.EINVAL):
            raise
        raise C2Error(f"{what} is not a sound zip archive: {e}; pack or upload it again") from None


def read_release(directory: str, warn: Callable[[str], None] = lambda message: None) -> Release:
    """Read release.json of an unpacked release; an unknown key in it is only warned of."""
    path = os.path.join(directory, "release.json")
    at = Location("", warn=lambda message: warn(f"release.json: {message}"), strict=False)
    try:
        release: Release = decode(Release, load_json(path, path), at)
        return release
    except ConfigError as e:
        raise C2Error(f"{path}: {e}") from None


def inside(path: str, directory: str) -> bool:
    root = os.path.realpath(directory)
    return os.path.realpath(path).startswith(root.rstrip("/") + "/")


class Partials(Dict[str, str]):
    """The partials beside a template: NAME is the file NAME or NAME.mustache."""

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def __missing__(self, name: str) -> str:
        for file in (name, name + ".mustache"):
            path = os.path.join(self.directory, file)
            if inside(path, self.directory) and os.path.isfile(path):
                return read_file(path) or ""
        raise KeyError(name)


def inner_path(directory: str, path: str, what: str) -> str:
    """Return the path of a file in an unpacked release; C2Error when it is not there or outside."""
    full = os.path.normpath(os.path.join(directory, path))
    if not inside(full, directory):
        raise C2Error(f"{what}: {path} in release.json is not inside the release")
    if not os.path.isfile(full):
        raise C2Error(f"{what}: release.json names {path}, which is not in the release")
    return full


def expand_file(
    template: str,
    to: str,
    context: JsonObject,
    warn: Callable[[str], None],
    name: str,
    write: Callable[[str, str, int], None] = replace_file,
) -> None:
    """Expand a template file, which messages call `name`, to the file `to`.

    That takes its mode, less what lets others write.
    """
    source = read_file(template)
    if source is None:
        raise C2Error(f"there is no template {name}")
    text = render_template(source, context, Partials(os.path.dirname(template)), name, warn)
    write(to, text, os.stat(template).st_mode & 0o755)


def read_contents(
    directory: str, what: str, warn: Callable[[str], None]
) -> Tuple[Release, JsonObject, Dict[str, str]]:
    """Return the release of a directory, the values of its config sources, where its templates are.

    Raises C2Error for what is missing, leads out or can't be read; `what` names the release.
    """
    if not os.path.exists(os.path.join(directory, "release.json")):
        hint = "; it says which commands start and stop the release"
        for top in os.listdir(directory):
            if os.path.exists(os.path.join(directory, top, "release.json")):
                hint = f", but one in the folder {top}; pack what is in that folder, not the folder"
        raise C2Error(f"{what} has no release.json at its root{hint}")
    release = read_release(directory, warn)
    sources = {}
    for key, path in release.config_sources.items():
        sources[key] = load_json(inner_path(directory, path, what), f"{what}: configSources.{key}")
    templates = {path: inner_path(directory, path, what) for path in release.templates}
    for path in templates:
        if not os.path.splitext(path)[1]:
            raise C2Error(
                f"{what}: the template {path} has no extension to take off; call it {path}.tpl"
            )
    keys = {*load_json(os.path.join(directory, "release.json"), what)}
    if "startCommand" not in keys:
        near = [k for k in keys - {*map(camel, Release._fields)} if nearest(k, ["startCommand"])]
        but = f", but {near[0]}" if near else ""
        raise C2Error(
            f"{what}: release.json has no startCommand{but}; one that starts nothing has "
            '"startCommand": ""'
        )
    return release, sources, templates


def prepare_release(host: Host, name: str, directory: str, context: JsonObject) -> Release:
    """Download a release, unpack it into the new `directory`, expand its templates, run nothing."""
    store = release_store(host.config)
    what = f"the release {name}"
    archive = directory + ".zip"
    host.log.info("fetch", f"fetching {name} from {store.label}", release=name)

    def warn(message: str) -> None:
        host.log.warn("template", f"{name}: {message}", release=name)

    try:
        store.fetch(name, archive)
        unpack_archive(archive, directory, what)
    except Missing:
        require_release(host.config, name)  # which says what is there instead
        raise
    finally:
        remove(archive)
    release, sources, templates = read_contents(directory, what, warn)
    for path, template in templates.items():
        expand_file(template, os.path.splitext(template)[0], {**sources, **context}, warn, path)
    sync_file_system(directory)
    return release


def files_to_pack(directory: str) -> List[Any]:
    """List what an archive has of a directory, all but .git: in order, of one time, by mode."""
    import stat
    import zipfile

    infos = []
    pending = [""]
    while pending:
        above = pending.pop()
        for name in os.listdir(os.path.join(directory, above)):
            path = os.path.join(above, name)
            found = os.lstat(os.path.join(directory, path))
            folder = stat.S_ISDIR(found.st_mode)
            if name == ".git":
                continue
            if folder:
                pending.append(path)
            try:
                path.encode()
            except UnicodeEncodeError:
                raise C2Error(
                    f"{directory}: the name of {path!r} is not UTF-8; rename it"
                ) from None
            info = zipfile.ZipInfo(path + "/" * folder)
            mode = 0o755 if folder or found.st_mode & 0o100 else 0o644
            info.create_system = 3  # Unix
            info.external_attr = (stat.S_IFMT(found.st_mode) | mode) << 16
            info.file_size = found.st_size
            infos.append(info)
    return sorted(infos, key=lambda info: info.filename)


def check_packable(directory: str, warn: Callable[[str], None]) -> List[Member]:
    """Check the release in a directory as `start` would; return what an archive of it has."""
    members = archive_members(files_to_pack(directory), directory)
    for member in members:
        if member.kind == "link":
            check_link(member.name, os.readlink(os.path.join(directory, member.name)), directory)
    _, _, templates = read_contents(directory, directory, warn)
    for path, template in templates.items():
        check_template(read_file(template) or "", Partials(os.path.dirname(template)), path)
    return members


def write_archive(directory: str, members: List[Member], path: str) -> None:
    """Write members, from a directory, into a new zip archive."""
    import shutil
    import zipfile

    with with_path(path), zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            source = os.path.join(directory, member.name)
            if member.kind == "dir":
                archive.writestr(member.info, b"")
            elif member.kind == "link":
                archive.writestr(member.info, os.fsencode(os.readlink(source)))
            else:
                member.info.compress_type = zipfile.ZIP_DEFLATED
                with open(source, "rb") as f, archive.open(member.info, "w") as to:
                    shutil.copyfileobj(f, to, 1 << 20)


def pack_release(directory: str, members: List[Member], archive: str) -> str:
    """Write a release archive whole or not at all, and ARCHIVE.sha256; return the checksum."""
    import hashlib

    part = temp_name(archive)
    digest = hashlib.sha256()
    try:
        write_archive(directory, members, part)
        with open(part, "rb") as f:
            for chunk in iter(lambda: f.read(1 << 20), b""):
                digest.update(chunk)
            os.fsync(f.fileno())
        remove(archive + ".sha256")  # first: it must not stand beside another archive
        os.replace(part, archive)
    finally:
        remove(part)
    line = f"{digest.hexdigest()}  {os.path.basename(archive)}\n"
    replace_file(archive + ".sha256", line)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Release commands: run in a group of their own, their output followed
# --------------------------------------------------------------------------------------------------


class OutputTail:
    """Shows what is added to a file: no pipe ties c2 to what a command leaves running."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "rb")
        self.rest = b""
        self.file.seek(0, os.SEEK_END)
        self.begin = self.file.tell()

    # At the end of what has come: the half of a line end, of a colour or of a character.
    HALF = re.compile(
        rb"(\r|\x1b(\[[0-9;]{0,20})?|[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?"
        rb"|[\xf0-\xf4][\x80-\xbf]{0,2})\Z"
    )

    def show(self, last: bool = False) -> None:
        """Show what has come; a half waits for the rest, unless it is the last."""
        for chunk in iter(lambda: self.file.read(65536), b""):
            self.write(self.rest + chunk, False)
        if last:
            self.write(self.rest, True)

    def write(self, output: bytes, last: bool) -> None:
        half = None if last else self.HALF.search(output)
        end = half.start() if half else len(output)
        self.rest = output[end:]
        text = printable_output(output[:end].decode("utf-8", "backslashreplace"))
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.buffer.write(text.encode("utf-8"))
            sys.stderr.flush()

    def last(self) -> str:
        self.file.seek(max(self.begin, self.file.seek(0, os.SEEK_END) - 65536))
        return tail(self.file.read().decode("utf-8", "replace"))


def output_path(config: Config, name: str) -> str:
    return config.proxy_path("output", f"{name}.log")


def command_files(directory: str) -> List[str]:
    """List what decides, in a deploy's directory, which commands are run."""
    return [directory, os.path.join(directory, "release.json")]


def command_env(deploy: Deploy, directory: str) -> Dict[str, str]:
    """Return what the commands of a deploy have in their environment beside c2's own."""
    port = {"C2_PORT": str(deploy.port)} if deploy.has_port else {}
    return dict(port, C2_RELEASE=deploy.release, C2_DEPLOY=deploy.label, PWD=directory)


def spawn_held(
    script: str, directory: str, env: Dict[str, str], output: IO[bytes]
) -> "Popen[bytes]":
    """Start a shell script in a process group of its own; it begins when it is sent a line.

    So the journal knows its leader first: a kill of c2 leaves no process that the next command
    can't find.
    """
    import subprocess

    return subprocess.Popen(
        ["sh", "-c", 'read -r _ || exit 125; exec sh -c "$0" </dev/null', script],
        cwd=directory,
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def await_command(
    host: Host, process: "Popen[bytes]", output: OutputTail, label: str, kind: str
) -> int:
    """Wait for a release's command and show its output; return its exit code."""
    import subprocess

    began = time.monotonic()
    hint_due = kind == "start"
    pause = 0.005
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(pause)
        output.show()
        pause = min(pause * 1.5, 0.1)
        passed = time.monotonic() - began
        if host.command_timeout and passed > host.command_timeout:
            raise CommandFailed(
                f"{label}: the {kind} command has not ended after {host.command_timeout:g} s "
                "(commandTimeoutSecs) and was ended",
                124,
                output.last(),
            )
        if hint_due and passed > HINT_AFTER_SECS:
            hint_due = False
            say(
                f"{label}: the start command still runs; c2 waits until it returns (docker compose "
                f"up -d, or a server in the background); c2 stop {label} elsewhere ends it"
            )


def run_command(host: Host, journal: Journal, deploy: Deploy, kind: str, directory: str) -> None:
    """Run a release's prestart, start or stop command by `sh -c` in `directory`.

    Raises CommandFailed with the last lines of its output.
    """
    require_private(*command_files(directory))
    release = read_release(directory)
    script = getattr(release, f"{kind}_command")
    if not script.strip():
        return
    learn_secrets(host, [os.path.join(directory, path) for path in release.config_sources.values()])
    label = deploy.label
    host.log.info(kind, f"{label}: {kind}: {script}", release=deploy.release, deploy=label)
    began = time.monotonic()
    path = output_path(host.config, label)
    make_dir(os.path.dirname(path), 0o700)
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as f:
        output = OutputTail(path)
        process = spawn_held(script, directory, command_env(deploy, directory), f)
    try:
        journal.runs(process.pid)
        assert process.stdin
        with process.stdin as stdin:
            stdin.write(b"go\n")
        code = await_command(host, process, output, label, kind)
    except BaseException:
        end_group(process.pid)
        process.wait()
        raise
    finally:
        with contextlib.suppress(OSError):
            output.show(last=True)
    if code:
        end_group(process.pid)
        lines = masked(output.last(), host.log.secrets).splitlines()
        reason = f"was ended by signal {-code}" if code < 0 else f"exited {code}"
        reason += f": {lines[-1].strip()}" if lines else ", no output"
        message = f"{label}: the {kind} command ({script.strip()}) {reason}"
        raise CommandFailed(message, code, output.last())
    seconds = round(time.monotonic() - began, 3)
    message = f"{label}: the {kind} command has taken {seconds:g} s"
    host.log.event("info", f"{kind}-done", message, deploy=label, seconds=seconds)


# --------------------------------------------------------------------------------------------------
# Ports: who listens, who answers, who is connected
# --------------------------------------------------------------------------------------------------


def listening(port: int) -> bool:
    import socket

    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex(("127.0.0.1", port)) == 0


def port_taken(port: int) -> bool:
    """Tell whether a program holds the port, on whatever address; False where c2 may not ask."""
    import errno
    import socket

    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError as e:
            return e.errno == errno.EADDRINUSE
    return False


def http_get(
    port: int, path: str, host: str = "localhost", timeout: float = 3
) -> Optional[Tuple[int, str]]:
    """GET from 127.0.0.1: the status, and what comes first of the body; None without an answer."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    headers = {"Host": host, "User-Agent": f"c2/{VERSION}", "Connection": "close"}
    body = b""
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        with contextlib.suppress(OSError, http.client.HTTPException):
            body = answer.read1(65536)
        return answer.status, body.decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def ready(mode: ProxyMode, port: int, timeout: float = 3) -> bool:
    """Tell whether a deploy is ready: by any HTTP answer, or 2xx/3xx on readyPath.

    An accepted connection proves nothing: docker's port proxy accepts before the app does.
    """
    answer = http_get(port, mode.ready_path or "/", timeout=timeout)
    return answer is not None and (not mode.ready_path or 200 <= answer[0] < 400)


def await_ready(mode: ProxyMode, port: int) -> bool:
    tries = attempts(mode.ready_timeout_secs, 0.1)
    return any(ready(mode, port, max(0.5, min(3.0, left))) for left in tries)


def readiness_problem(config: Config, deploy: Deploy) -> str:
    """Wait until a deploy is ready, and return why it is not; "" when it is."""
    mode = config.proxy
    if await_ready(mode, deploy.port):
        return ""
    answer = f"2xx or 3xx to GET {mode.ready_path}" if mode.ready_path else "answer to GET /"
    return (
        f"{deploy.label} is not ready: no {answer} on port {deploy.port} within "
        f"{mode.ready_timeout_secs:g} s (readyTimeoutSecs); its output is in "
        f"{output_path(config, deploy.label)}"
    )


def connections_to(port: int) -> int:
    """Count this machine's TCP connections to the port, begun or there (proc(5), tcp_states.h)."""
    remote_port_and_state = re.compile(b":%04X 0[12] " % port)
    count = 0
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            with open(table, "rb") as f:
                count += len(remote_port_and_state.findall(f.read()))
    return count


# --------------------------------------------------------------------------------------------------
# Certificates: checked, and copied to where nginx reads them
# --------------------------------------------------------------------------------------------------


class Certificate(NamedTuple):
    """A certificate: its host names, and from when until when it is valid (Unix times)."""

    names: List[str]
    begins: float
    ends: float

    @property
    def until(self) -> str:
        return utc_now(self.ends)[:10]

    def days_left(self, now: float) -> int:
        return int((self.ends - now) // 86400)

    def covers(self, host: str) -> bool:
        """Tell whether it is for `host`; a wildcard stands for one label.

        What no certificate can name counts as covered.
        """
        host = host.lower()
        if host[0] == ".":  # nginx's word for both
            return self.covers(host[1:]) and self.covers("*" + host)
        return (
            host == "_"
            or host.endswith(".*")
            or host in self.names
            or "*." + host.partition(".")[2] in self.names
        )

    def problem(self, hosts: Sequence[str], now: float) -> str:
        """Tell why it can't serve these hosts, as the end of a sentence; "" when it can."""
        others = [host for host in hosts if not self.covers(host)]
        if others:
            none = "no host (the first one in the file has no subjectAltName)"
            return f"is for {', '.join(self.names) or none}, not for {', '.join(others)}"
        if now < self.begins:
            return f"is not valid before {utc_now(self.begins)}"
        return "" if now < self.ends else f"expired on {self.until}"


def generated_files(config: Config) -> List[str]:
    """List certbot's files: of the generated certificate with its chain, and of its key."""
    live = os.path.join(letsencrypt_dirs(config)[0], "live", config.auto_cert_name)
    return [os.path.join(live, "fullchain.pem"), os.path.join(live, "privkey.pem")]


def read_pem(path: str) -> bytes:
    """Read a certificate's or a key's file; a FIFO is not waited for, and a device has an end."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as f:
            content = f.read(PEM_BYTES) or b""
    except OSError as e:
        raise C2Error(f"{path} can't be read: {e.strerror}") from None
    if len(content) == PEM_BYTES:
        raise C2Error(f"{path} is too large for a certificate or a key")
    return content


def read_certificate(path: str, source: str = "") -> Certificate:
    """Read the first certificate in a PEM file; C2Error, which names its `source`, for none."""
    import ssl

    try:
        open(path, "rb").close()
        # The only parser that the standard library has.
        plain = ssl._ssl._test_decode_cert(path)  # type: ignore[attr-defined]
        begins, ends = (ssl.cert_time_to_seconds(plain[key]) for key in ("notBefore", "notAfter"))
    except (ssl.SSLError, ValueError):
        raise C2Error(f"{source or path} is not a certificate in PEM form") from None
    except OSError as e:
        raise C2Error(f"{path} can't be read: {e.strerror}") from None
    names = [value.lower() for kind, value in plain.get("subjectAltName", ()) if kind == "DNS"]
    return Certificate(names, begins, ends)


def key_problem(pair: List[str], key: str) -> str:
    """Tell why a certificate can't be used with its key; "" when it can.

    It is the end of a sentence, which names the `key`.
    """
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            pair[0], pair[1], password=lambda: b""
        )
    except ssl.SSLError as e:
        reason = e.reason or ""
        if re.search("SMALL|WEAK", reason):
            return "is too weak"
        if re.search("MISMATCH|NO_CERTIFICATE_ASSIGNED", reason):  # the second: of another kind
            return f"does not belong to {key}"
        return f"can't be used with {key}: one of them is damaged, encrypted or not in PEM form"
    return ""


def copy_certificate(
    config: Config, name: str, sources: List[str], generated: bool
) -> Optional[List[str]]:
    """Copy an endpoint's certificate and key to `certs/`, and check them there.

    C2Error for what can't serve; None for a generated one that is for other hosts. Nobody changes
    the copies, whose names change with the content. So does the configuration, and nginx takes a
    certificate as it takes anything else; until then it has what it had.
    """
    import hashlib

    hosts = config.end_points[name].server_names
    content = [read_pem(path) for path in sources]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:16]
    files = [f"{name}-{digest}.crt", f"{name}-{digest}.key"]
    copies = [config.proxy_path("certs", file) for file in files]
    with undo_on_failure() as undos:
        for path, pem in zip(copies, content):
            if not os.path.exists(path):
                undos.append(functools.partial(remove, path))
                replace_file(path, pem, 0o600)
        certificate = read_certificate(copies[0], sources[0])
        if generated:  # hosts added since wait for the next one
            hosts = [host for host in hosts if certificate.covers(host)]
        problem = certificate.problem(hosts, time.time()) or key_problem(copies, sources[1])
        if problem:
            raise C2Error(f"{sources[0]} {problem}")
    return [CERTS_IN_PROXY + file for file in files] if hosts else None


def last_context(config: Config) -> JsonObject:
    """Read the context of nginx's configuration; {} for none, or one of camus2."""
    try:
        context = json.loads(read_file(config.proxy_path("nginx.ctx.json")) or "{}")
    except ValueError:
        return {}
    return context if "c2" in context else {}


def served_certificates(context: JsonObject) -> Dict[str, List[str]]:
    """List certificate and key, as the container sees them, of the endpoints in a context."""
    entries = [entry for kinds in context.get("endPoints", []) for entry in kinds.values()]
    return {
        e["label"]: [e["sslCertPath"], e["sslCertKeyPath"]] for e in entries if "sslCertPath" in e
    }


def install_certificates(host: Host, strict: bool = False) -> Dict[str, List[str]]:
    """Give certificate and key, as the container sees them, of each https endpoint that has one.

    Where one can't serve, the one in use stays, and it is only warned of: it must not stand in the
    way of a deploy. strict: an error all the same, as where there is none in use.
    """
    config = host.config
    served = served_certificates(last_context(config))
    pairs = {}
    for name, end_point in sorted(config.end_points.items()):
        if not end_point.certificate:
            continue
        given = end_point.certificate.files
        sources = list(given or generated_files(config))
        pair = served.get(name)
        try:
            if given or os.path.exists(sources[0]):
                pair = copy_certificate(config, name, sources, generated=not given)
        except C2Error as e:
            problem = f"the certificate of {name}: {e}; what the proxy serves stays as it is"
            if strict or given and not pair:
                raise C2Error(problem) from None
            host.log.warn("certificate", problem, endpoint=name)
        if pair:
            pairs[name] = pair
    return pairs


def remove_old_certificates(config: Config) -> None:
    """Remove the copies that nothing names any more."""
    used = [
        read_file(config.proxy_path(path)) or "" for path in ("conf/nginx.conf", "nginx.ctx.json")
    ]
    for file in list_dir(config.proxy_path("certs")):
        if not any(CERTS_IN_PROXY + file in text for text in used):
            os.unlink(config.proxy_path("certs", file))


def status_certificates(config: Config) -> Dict[str, Union[Certificate, str]]:
    """Read the Certificate that nginx uses for each https endpoint, or tell why there is none."""
    certificates: Dict[str, Union[Certificate, str]] = {}
    served = served_certificates(last_context(config))
    for name, end_point in config.end_points.items():
        if name in served:
            path = config.proxy_path("certs", os.path.basename(served[name][0]))
            try:
                certificates[name] = read_certificate(path)
            except C2Error as e:
                certificates[name] = str(e)
        elif end_point.certificate and not config.remote:
            generated = end_point.certificate.generated
            command = "generate-ssl-certificate" if generated else "restart-frontend-proxy"
            certificates[name] = f"no certificate yet, so that it answers 503; c2 {command} gets it"
    return certificates


def certificate_lines(
    certificates: Dict[str, Union[Certificate, str]], now: float, colour: bool
) -> List[str]:
    """Write the certificates as `status` shows them to a person, or why there is none."""
    lines = []
    for name, certificate in sorted(certificates.items()):
        line, days = str(certificate), -1
        if isinstance(certificate, Certificate):
            days = certificate.days_left(now)
            left = f"{days} day{'s' if days != 1 else ''} left, until"
            when = left if now < certificate.ends else "EXPIRED on"
            line = f"{', '.join(certificate.names)}: {when} {certificate.until}"
        if colour and days < RENEWAL_DAYS:
            line = f"\x1b[33m{line}\x1b[0m"
        lines.append(f"  {name}: {line}")
    return lines


# --------------------------------------------------------------------------------------------------
# The proxy: nginx in its container
# --------------------------------------------------------------------------------------------------


class Container(NamedTuple):
    """What the engine says of the proxy's container; `directory` is where its compose file lies.

    restarts: how often the engine has started it again by itself; restarting: it is about to.
    """

    name: str
    running: bool = False
    restarting: bool = False
    restarts: int = 0
    directory: str = ""


class ProxyFacts(NamedTuple):
    """What decides on a change of the proxy."""

    container: Container
    created_from: Optional[str]  # the compose file that the container was created from
    compose_file: str  # the one of this configuration
    conf: Optional[str]  # nginx's configuration, in its place
    rendered: str  # the one of the state that is to be served
    context: JsonObject  # what that was rendered with
    untaken: bool  # nobody knows whether nginx has taken the one in its place


class ProxyChange(NamedTuple):
    """What makes the proxy serve a state; done in this order."""

    claim_ports: bool  # refuse when another program holds them
    recreate: bool  # the container, which runs, is made anew: an outage of seconds
    compose_file: str  # is written
    container: str  # the name of the one that serves then
    test: bool  # have nginx test the rendered configuration, and put it in its place
    bring_up: bool
    reload: bool
    verify: bool  # ask nginx what it serves then


def proxy_change(facts: ProxyFacts, start: bool, renew: bool = False) -> ProxyChange:
    """Decide what makes the proxy serve the rendered configuration.

    start: also where it does not run; renew: make the container that runs anew also for what only
    another c2, or a default of it, would have otherwise.
    """
    container = facts.container
    wanted = nginx_service(facts.compose_file)
    outdated = container.running and nginx_service(facts.created_from) != wanted
    recreate = outdated and (renew or is_reconfigured(facts.created_from, facts.compose_file))
    stays = container.running and not recreate
    file = facts.compose_file
    if outdated and stays:
        file = keep_container(facts.created_from or "", file)
    changed = facts.untaken or facts.conf != facts.rendered
    bring_up = recreate or start and not container.running
    return ProxyChange(
        claim_ports=bring_up and not container.running and not container.restarting,
        recreate=recreate,
        compose_file=file,
        container=container.name if stays else wanted["container_name"],
        test=bring_up or stays and changed,
        bring_up=bring_up,
        # A kill may have come between a container's being created and its being recorded.
        reload=recreate or stays and changed,
        verify=bring_up or stays,
    )


def http2_form(context: JsonObject) -> str:
    """Tell which of HTTP2_FORMS a context has; the first where there is no TLS yet."""
    own = context.get("c2", {})
    if own.get("listenHttp2"):
        return "listen"
    return "" if served_certificates(context) and not own.get("http2") else "on"


def compose(config: Config, container: str, *args: str, **options: Any) -> str:
    """Run docker compose on the project of the proxy's container and return its stdout."""
    directory = config.proxy_path()
    file = os.path.join(directory, "docker-compose.yml")
    command = ["docker", "compose", "-p", proxy_project(container), "-f", file, *args]
    try:
        return run(command, DOCKER_TIMEOUT_SECS, directory, **options)
    except CommandFailed as e:
        if re.search("unknown shorthand flag|is not a docker command", e.output):
            raise C2Error(
                "docker has no compose; install its compose plugin, version 2 or later"
            ) from None
        raise


def active_compose_file(config: Config) -> Optional[str]:
    """Read the compose file that the proxy's container was created from.

    While it is made anew, that is the one before.
    """
    before = read_file(config.proxy_path("docker-compose.before.yml"))
    return read_file(config.proxy_path("docker-compose.yml")) if before is None else before


def container_name(config: Config) -> str:
    """Name the proxy's container as it was created, which the configuration may call otherwise."""
    service = nginx_service(active_compose_file(config))
    return service["container_name"] if service else config.proxy.container_name


def inspect_proxy(config: Config, name: str) -> Container:
    """Ask the engine for the proxy's container; Refused when it belongs to something else."""
    fields = "{{.State.Running}} {{.State.Restarting}} {{.RestartCount}} "
    label = '{{index .Config.Labels "com.docker.compose.project.working_dir"}}'
    try:
        answer = run(["docker", "inspect", "--type", "container", "-f", fields + label, name])
    except CommandFailed as e:
        if "no such" in e.output.lower():
            return Container(name)
        raise
    running, restarting, restarts, directory = (answer.strip() + "  ").split(" ", 3)
    directory = directory.strip()
    if os.path.realpath(directory) != os.path.realpath(config.proxy_path()):
        raise Refused(
            f"the container {name} belongs to {directory or 'no compose project'}, not to "
            f"{config.proxy_path()}; remove it, or set deployMode.proxy.containerName"
        )
    return Container(
        name,
        running == "true" and restarting != "true",
        restarting == "true",
        int(restarts) if restarts.isdigit() else 0,
        directory,
    )


def proxy_death(restarts: Optional[int], found: Container) -> str:
    """Tell how the proxy has died since it ran with so many `restarts`; "" if it has not.

    None: it has not been seen.
    """
    if restarts is None or found.running and found.restarts <= restarts:
        return ""
    if not found.directory:
        return "the proxy's container was gone"
    if found.restarts > restarts:
        return f"the proxy has died, and the engine restarted it (restart count {found.restarts})"
    return "the proxy did not run"


def due_for_proxy(config: Config) -> List[str]:
    """Tell what restart-frontend-proxy would change of the container that was created."""
    created_from = active_compose_file(config)
    return due_changes(created_from, compose_file(config)) if created_from else []


def proxy_workers(container: str) -> Dict[str, bool]:
    """List nginx's worker processes: pid -> whether it is shutting down."""
    lines = run(["docker", "top", container, "-eo", "pid,args"]).splitlines()
    return {
        line.split()[0]: "is shutting down" in line
        for line in lines
        if "nginx: worker process" in line
    }


def nginx_errors(output: str) -> str:
    """Find why nginx does not take a configuration, or can't run, in its words on one line."""
    errors = re.findall(r"\[emerg\] (?:\d+#\d+: )?(.+)", output)
    return "; ".join(list(dict.fromkeys(errors))[-3:])


def recent_nginx_errors(container: str) -> str:
    """Read the last errors of nginx in its log."""
    try:
        log = run(["docker", "logs", "--since", "20s", container], stderr_to_stdout=True)
    except C2Error as e:
        return str(e)
    return nginx_errors(log) or f"it logged no error; look at docker logs {container}"


def await_workers(container: str, before: Set[str], problem: str) -> None:
    """Wait until workers serve that are not of `before`, and they alone.

    C2Error with `problem` and nginx's words. The exit codes of `docker compose up`, `docker kill`
    and `nginx -s reload` say nothing of that: nginx may have kept its old configuration, still try
    to get a port, or begin and die again and again.
    """
    for _ in attempts(RELOAD_TIMEOUT_SECS):
        with contextlib.suppress(CommandFailed):
            active = {pid for pid, leaving in proxy_workers(container).items() if not leaving}
            if active and not active & before:
                return
    raise C2Error(f"{problem}: {recent_nginx_errors(container)}")


def reload_proxy(container: str) -> None:
    """Make nginx read its configuration; C2Error when it has not taken it."""
    before = set(proxy_workers(container))
    run(["docker", "kill", "-s", "HUP", container])
    await_workers(container, before, "nginx has not taken its new configuration")


def render_nginx(config: Config, context: JsonObject) -> str:
    path = config.proxy.nginx_conf_template_path
    if not path:
        return render_template(NGINX_TEMPLATE, context, None, "the built-in nginx template")
    source = read_file(path)
    if source is None:
        raise ConfigError(f"deployMode.proxy.nginxConfTemplatePath: there is no file {path}")
    return render_template(source, context, Partials(os.path.dirname(path)), path)


def make_proxy_dirs(config: Config, state: State) -> None:
    """Make what the container mounts, readable by nginx's user whatever the umask."""
    for name in PROXY_DIRS:
        make_dir(config.proxy_path(name), 0o711 if name == "certs" else 0o755)
    if generated_names(config):
        for path in [*letsencrypt_dirs(config), config.letsencrypt_www_dir]:
            make_dir(path)
    for target in ["../ports/none", *routes(config, state).values()]:
        path = config.proxy_path("live", target)
        if not os.path.exists(path):
            replace_file(os.path.normpath(path), "")


def read_links(config: Config) -> Dict[str, Optional[str]]:
    """Read the links in live/: name -> target."""
    live = config.proxy_path("live")
    return {name: read_link(os.path.join(live, name)) for name in list_dir(live) if name[-1] != "~"}


def set_links(config: Config, table: Mapping[str, Optional[str]]) -> None:
    """Point the links in live/ where `table` says, and remove others.

    This is the switch: each rename takes effect at nginx's next request.
    """
    before = read_links(config)
    for name in sorted({*before, *table}):
        if before.get(name) != table.get(name):
            replace_link(config.proxy_path("live", name), table.get(name))


def restore_links(config: Config) -> None:
    """Point the links in live/, if there are any yet, where the recorded state has them."""
    if read_links(config):
        set_links(config, routes(config, load_state(config)))


def require_free_ports(config: Config, https: bool) -> None:
    """Raise if another program holds a port of the proxy, which nginx would try for ever."""
    needed = {"httpPort": config.proxy.http_port}
    if https:
        needed["httpsPort"] = config.proxy.https_port
    for key, port in needed.items():
        if port_taken(port):
            raise C2Error(
                f"another program holds port {port}, which the proxy needs; `ss -ltnp` shows "
                f"which; end it, or set deployMode.proxy.{key}"
            )


def verify_routes(host: Host, state: State, container: str, conf: str) -> None:
    """Ask nginx which port each endpoint has.

    C2Error when it is wrong, or nginx does not run any more.
    """
    config = host.config
    port = config.proxy.http_port
    if "/.c2/port" not in conf:
        return  # an own template: the reload has been verified by the workers

    def answer_for(end_point: str) -> str:
        name = config.end_points[end_point].server_names[0]
        name = re.sub(r"^\*?\.", "c2.", name).replace(".*", ".c2")
        status, body = http_get(port, "/.c2/port", name, timeout=1) or (0, "")
        return body if status == 200 else ""

    wanted = {name: f"port={port_of(state, name) or ''}" for name in sorted(config.end_points)}
    for _ in attempts(ASK_TIMEOUT_SECS):
        answers = {name: answer_for(name) for name in wanted}
        wanted = {name: want for name, want in wanted.items() if answers[name] != want}
        if not wanted:
            return
    for name, want in wanted.items():
        if answers[name].startswith("port="):
            raise C2Error(
                f"nginx has {answers[name]} for {name}, not {want}; it looks at another directory; "
                "c2 shutdown-frontend-proxy, then c2 connect again"
            )
    if not inspect_proxy(config, container).running:
        raise C2Error(f"the proxy does not run: {recent_nginx_errors(container)}")
    for name in wanted:
        host.log.warn(
            "verify",
            f"nginx does not say on port {port} where {name} points; c2 can't tell whether the "
            "switch has happened",
            endpoint=name,
        )


def write_compose_file(
    config: Config, created_from: Optional[str], file: str, undos: Undos
) -> None:
    """Write the compose file.

    The one that the container was created from is kept beside it until it has been made anew.
    """
    path = config.proxy_path("docker-compose.yml")
    before = config.proxy_path("docker-compose.before.yml")
    if file == created_from == read_file(path):
        return
    undos.append(lambda: remove(before))
    undos.append(lambda: restore_file(path, created_from))
    if created_from is not None:
        replace_file(before, created_from)
    replace_file(path, file)


def test_nginx_conf(config: Config, container: str, running: bool, conf: str) -> None:
    """Have nginx test a configuration; C2Error with its own words when it fails.

    What has passed stays as candidate.conf until nginx is known to serve it.
    """
    candidate = config.proxy_path("conf", "candidate.conf")
    before = read_file(candidate)
    replace_file(candidate, conf)
    how = ["exec", "-T"] if running else ["run", "--rm", "-T", "--no-deps"]
    command = NGINX_LINKS + "; nginx -t -c /etc/nginx/candidate.conf"
    try:
        compose(config, container, *how, "nginx", "sh", "-c", command)
    except BaseException as e:
        restore_file(candidate, before)
        errors = nginx_errors(getattr(e, "output", ""))
        if not errors:
            raise
        source = config.proxy.nginx_conf_template_path or "the built-in template"
        raise C2Error(
            f"nginx refuses the configuration made from {source}, and what it had stays in use: "
            f"{errors}"
        ) from None


def find_nginx_conf(
    config: Config, state: State, certificates: Dict[str, List[str]], decided: ProxyChange
) -> Tuple[JsonObject, str]:
    """Render nginx's configuration in the first form of HTTP/2 that it takes; with context."""
    running = not decided.bring_up
    known = http2_form(last_context(config)) if running else HTTP2_FORMS[0]
    for form in HTTP2_FORMS[HTTP2_FORMS.index(known) :]:
        context = nginx_context(config, state, certificates, form)
        conf = render_nginx(config, context)
        try:
            test_nginx_conf(config, decided.container, running, conf)
            break
        except C2Error as e:
            if '"http2"' not in str(e) or form == HTTP2_FORMS[-1]:
                raise
    return context, conf


def install_nginx_conf(config: Config, decided: ProxyChange, conf: str, undos: Undos) -> None:
    """Put a configuration that has passed the test into its place."""
    path = config.proxy_path("conf", "nginx.conf")
    before = read_file(path)

    def take_back() -> None:
        restore_file(path, before)
        if not decided.bring_up:
            run(["docker", "kill", "-s", "HUP", decided.container])
        remove(config.proxy_path("conf", "candidate.conf"))

    undos.append(take_back)
    replace_file(path, conf)


def start_container(host: Host, former: Container, name: str, undos: Undos) -> None:
    """Create or start the proxy's container, in place of a `former` one of another name."""
    config = host.config
    host.log.info("proxy", "bringing the proxy up")
    exists = bool(former.directory)
    if exists and former.name != name:
        # First of all, so that it is last: when the files are those of before again.
        undos.insert(0, lambda: compose(config, former.name, "up", "-d", "nginx"))
        compose(config, former.name, "down")
        exists = False
    if not exists:
        undos.append(lambda: compose(config, name, "down"))
    compose(config, name, "up", "-d", "nginx")
    await_workers(name, set(), "the proxy does not run")


def proxy_facts(host: Host, state: State) -> ProxyFacts:
    """Gather what decides on a change; Refused when a container belongs to something else."""
    config = host.config
    container = inspect_proxy(config, container_name(config))
    if container.name != config.proxy.container_name:
        inspect_proxy(config, config.proxy.container_name)
    make_proxy_dirs(config, state)
    certificates = install_certificates(host)
    context = nginx_context(config, state, certificates, http2_form(last_context(config)))
    return ProxyFacts(
        container,
        active_compose_file(config),
        compose_file(config),
        read_file(config.proxy_path("conf", "nginx.conf")),
        render_nginx(config, context),
        context,
        os.path.exists(config.proxy_path("conf", "candidate.conf")),
    )


def apply_proxy_change(
    host: Host, state: State, facts: ProxyFacts, decided: ProxyChange, check: Callable[[], None]
) -> JsonObject:
    """Do what was decided; C2Error, and all as before, when it can't be done.

    Gives the context of the configuration that nginx has then.
    """
    config = host.config
    context, conf = facts.context, facts.rendered
    certificates = served_certificates(context)
    if decided.claim_ports:
        require_free_ports(config, bool(certificates))
    if decided.recreate:
        changes = due_changes(facts.created_from, decided.compose_file)
        host.log.warn(
            "proxy",
            "the proxy's container is made anew, which refuses connections for a few seconds: "
            + "; ".join(changes),
        )
    with undo_on_failure() as undos:
        write_compose_file(config, facts.created_from, decided.compose_file, undos)
        if decided.test:
            context, conf = find_nginx_conf(config, state, certificates, decided)
            install_nginx_conf(config, decided, conf, undos)
        links = read_links(config)
        undos.append(lambda: set_links(config, links))
        set_links(config, routes(config, state))
        if decided.bring_up:
            start_container(host, facts.container, decided.container, undos)
        if decided.reload:
            reload_proxy(decided.container)
            host.log.info("reload", "nginx serves its new configuration")
        if decided.verify:
            verify_routes(host, state, decided.container, conf)
            check()
    return context


def route(
    host: Host,
    state: State,
    start: bool = True,
    renew: bool = False,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Make the proxy serve the connections of `state`; C2Error, and all as before, when it can't.

    start, renew: see proxy_change; check: raises when what it serves then is not right. The switch
    itself is the rename of links; nginx reloads only when its rendered configuration has changed.
    """
    config = host.config
    facts = proxy_facts(host, state)
    decided = proxy_change(facts, start, renew)
    context = apply_proxy_change(host, state, facts, decided, check)
    remove(config.proxy_path("conf", "candidate.conf"))
    remove(config.proxy_path("docker-compose.before.yml"))
    replace_file(config.proxy_path("nginx.ctx.json"), json.dumps(context, indent=2) + "\n")
    remove_old_certificates(config)


def in_flight(config: Config, port: int) -> str:
    """Name what may still send requests to a deploy's port; "" for nothing."""
    count = connections_to(port)
    if count:
        return f"{count} connection{'s' if count > 1 else ''} to port {port}"
    if config.proxy.nginx_conf_template_path:  # which may name the port, until it is reloaded
        with contextlib.suppress(C2Error):
            if any(proxy_workers(container_name(config)).values()):
                return "an nginx worker of before the last reload"
    return ""


def drain(host: Host, deploy: Deploy) -> None:
    """Wait, at most drainTimeoutSecs, until no request can be on its way to the deploy any more."""
    bound = host.config.proxy.drain_timeout_secs
    idle_since: Optional[float] = None
    announced = False
    for left in attempts(bound):
        asked = time.monotonic()
        busy = in_flight(host.config, deploy.port)
        if busy:
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif asked - idle_since >= DRAINED_SECS:
            return
        if busy and not announced and left < bound - 1:
            announced = True
            say(f"{deploy.label}: waiting for {busy}, at most {bound:g} s (drainTimeoutSecs)")
    if busy:
        host.log.warn(
            "drain",
            f"{deploy.label}: there is still {busy} after {bound:g} s (drainTimeoutSecs); "
            "what is in flight is cut",
            deploy=deploy.label,
        )


# --------------------------------------------------------------------------------------------------
# Certbot: it obtains the generated certificate
# --------------------------------------------------------------------------------------------------


def certbot_paths(config: Config) -> List[str]:
    """List what certbot has of the generated certificate: its record, the files in use, and all."""
    base, name = letsencrypt_dirs(config)[0], config.auto_cert_name
    parts = (f"renewal/{name}.conf", f"live/{name}", f"archive/{name}")
    return [os.path.join(base, part) for part in parts]


def is_whole(config: Config) -> bool:
    """Tell whether certbot can go on from there; a kill, or power lost, leaves it half made."""
    record, live, _ = certbot_paths(config)
    pair = generated_files(config)
    return bool(
        re.search("(?m)^fullchain = ", read_file(record) or "")
        and not any(name.startswith("previous_") for name in list_dir(live))
        and all(os.path.exists(os.path.join(live, f"{kind}.pem")) for kind in CERTBOT_FILES)
        and key_problem(pair, pair[1]) in ("", "is too weak")
    )


def move_torn_away(host: Host) -> None:
    """Move a half made certificate away: certbot would make another beside it, each time anew."""
    config = host.config
    paths = [path for path in certbot_paths(config) if os.path.lexists(path)]
    if not paths or is_whole(config):
        return
    base = letsencrypt_dirs(config)[0]
    torn = os.path.join(base, "torn", utc_now())
    make_dir(torn, 0o700)
    for path in paths:
        os.rename(path, os.path.join(torn, os.path.relpath(path, base).replace("/", "-")))
    host.log.warn(
        "certbot",
        f"certbot's certificate {config.auto_cert_name} is half made; it is in {torn} now, and "
        "another is made",
    )


def close_keys(config: Config) -> None:
    """Make certbot's keys private: it gives a new one the mode of the one before."""
    archive = certbot_paths(config)[2]
    for file in list_dir(archive):
        if file.startswith("privkey"):
            os.chmod(os.path.join(archive, file), 0o600)


def is_of_another_authority(record: str, wanted: Optional[str]) -> bool:
    """Tell by certbot's record whether the certificate is of another authority than the wanted one.

    Then it is not kept until it is due, least of all one that was for trying out.
    """
    server = "".join(re.findall(r"^server = (.+)$", record, re.M))
    if not wanted:
        return "staging" in server
    return server not in ("", wanted)


def run_certbot(host: Host) -> None:
    """Run certbot in its container; CommandFailed with its own reason."""
    config = host.config
    name = f"{config.proxy.container_name}-certbot"

    def end() -> None:
        with contextlib.suppress(CommandFailed):
            run(["docker", "rm", "-f", name])

    end()  # one that a killed c2 left
    move_torn_away(host)
    close_keys(config)
    record = read_file(certbot_paths(config)[0]) or ""
    args = certbot_args(config, renew=is_of_another_authority(record, config.acme_server))
    command = ["run", "--rm", "-T", "--name", name, "certbot", *args]
    try:
        compose(config, container_name(config), *command, stderr_to_stdout=True)
    except CommandFailed as e:
        source = f" from {without_credentials(config.acme_server)}" if config.acme_server else ""
        raise CommandFailed(
            f"certbot got no certificate{source}, and what is served stays as it is: "
            f"{certbot_reason(e.output) or e}",
            e.exit,
            tail(e.output),
        ) from None
    finally:
        end()


def presented(port: int, name: str) -> Optional[bytes]:
    """Ask which certificate (DER) 127.0.0.1 presents for `name`; None without a handshake."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with socket.create_connection(
            ("127.0.0.1", port), ASK_TIMEOUT_SECS
        ) as plain, context.wrap_socket(plain, server_hostname=name) as s:
            return s.getpeercert(True)
    except (OSError, ValueError):
        return None


def check_presented(config: Config, chain: str, names: List[str]) -> None:
    """Raise unless the proxy presents the first certificate of `chain` (PEM) for each name."""
    import ssl

    leaf = re.search("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", chain, re.S)
    wanted = ssl.PEM_cert_to_DER_cert(leaf.group() if leaf else "")
    mode = config.proxy
    for name in names:
        tries = attempts(RELOAD_TIMEOUT_SECS)
        if not any(presented(mode.https_port, name) == wanted for _ in tries):
            source = mode.nginx_conf_template_path or f"docker logs {mode.container_name}"
            raise C2Error(
                f"port {mode.https_port} does not present that certificate to who asks for {name}; "
                f"look at {source}"
            )


def generate_certificate(host: Host, state: State) -> None:
    """Have certbot obtain or renew the certificate, and the proxy serve it.

    What it serves stays when a step fails.
    """
    config, names = host.config, generated_names(host.config)
    chain = generated_files(config)[0]
    host.log.add_secrets([config.auto_cert_contact_email])
    before = read_file(chain)
    route(host, state)  # which answers the challenge
    host.log.info(
        "certbot",
        f"certbot looks after the certificate {config.auto_cert_name} for {', '.join(names)}",
    )
    run_certbot(host)
    certificate = read_certificate(chain)
    after = read_file(chain) or ""
    route(host, state, check=lambda: check_presented(config, after, names))
    done = "is not due" if after == before else "is new, and served"
    host.log.info(
        "certificate",
        f"the certificate for {', '.join(certificate.names)} {done}; it is valid "
        f"until {certificate.until}, for {certificate.days_left(time.time())} days",
    )


# --------------------------------------------------------------------------------------------------
# Compose projects: what deploys that run side by side may not share
# --------------------------------------------------------------------------------------------------


def read_project(deploy: Deploy, directory: str) -> Optional[Project]:
    """Ask docker compose what it makes of a deploy in `directory`; None without a compose file."""
    if not any(os.path.exists(os.path.join(directory, name)) for name in COMPOSE_FILES):
        return None
    args = ["config", "--format", "json"]
    answer = docker_compose(args, 60, directory, env=command_env(deploy, directory))
    try:
        return configured_project(json.loads(answer))
    except (ValueError, LookupError):
        raise C2Error("docker compose config names no project; install a newer compose") from None


def list_projects(config: Config) -> Dict[str, Project]:
    """List what the containers of deploys have, running or not, by label."""
    label = '{{.Label "com.docker.compose.project%s"}}'
    columns = [label % ".working_dir", label % "", "{{.Names}}", "{{.Ports}}"]
    answer = run(["docker", "ps", "-a", "--format", "\t".join(columns)])
    root = re.escape(os.path.realpath(config.deploys_dir))
    projects: Dict[str, Project] = {}
    for line in answer.splitlines():
        directory, *rest = line.split("\t")
        place = re.match(root + r"/(?:\.(?:staging|old)/)?([^/]+)", os.path.realpath(directory))
        if directory and place:
            known = projects.setdefault(place.group(1), Project(set(), set(), set()))
            listed = listed_project(*rest)
            known.names.update(listed.names)
            known.containers.update(listed.containers)
            known.ports.update(listed.ports)
    return projects


def check_project(host: Host, deploy: Deploy, directory: str, quiet: bool = False) -> None:
    """Refuse what docker compose would take from a deploy that stays beside this one.

    That are containers of the same project, or what is fixed in the compose file in `directory`.

    What docker can't tell is warned of, unless quiet: the commands may use something else.
    """
    config, state = host.config, host_state(host.config)
    # Without the proxy all have port 0: the one before is stopped first.
    beside = [d for d in state.deploys.values() if d not in conflicts(state, deploy)]

    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except C2Error as e:
            if not quiet:
                what = f"can't tell what {deploy.label} would share with other deploys"
                host.log.warn("compose", f"{what}: {e}", deploy=deploy.label)
            return None

    own = ask(read_project, deploy, directory) if beside else None
    if not own:
        return
    listed, others = ask(list_projects, config) or {}, {}
    has_it = deploy.label in listed and own.names <= listed[deploy.label].names
    for other in beside:
        theirs = listed.get(other.label)
        if not theirs and not has_it:  # a name without containers is the other's all the same
            theirs = ask(read_project, other, config.path(other.label))
        others[other.label] = theirs or Project(set(), set(), set())
        others[other.label].ports.add(("", other.port, "tcp"))
    problem = project_conflict(deploy.label, own, others)
    if problem:
        raise Refused(problem)


# --------------------------------------------------------------------------------------------------
# The executor: one action at a time, step by step, each recoverable from a kill at any instant
# --------------------------------------------------------------------------------------------------

# Three means of recovery, each for one thing. The journal is for a kill of c2: it names the step
# before its first effect, and the next command that changes something takes it up there. A step's
# undo is for a failure or a signal: called while c2 lives, last step first; the proxy's change has
# undos of its own inside of its one step (undo_on_failure). Marker files are for what nginx and the
# next start have to know whoever died: candidate.conf means that a reload is due,
# docker-compose.before.yml that the container is not made yet, boot which boot has been seen to,
# blocked/LABEL.json that a recovery failed. What holds always:
# - state.json is saved before the journal goes, and the journal goes last.
# - An undo can be called again, and where its step has done nothing; so can a step that has none.
# - What a step's undo has to know, the journal has before the step's first effect.
# - A link in live/, and `current`, is only ever changed by a rename.
# - .staging and .old hold nothing that serves; a name with the pid of a dead process and ~ is
#   garbage.
# - blocked/LABEL.json stops that label alone.


class Work(NamedTuple):
    """An action under way, which its steps work on; `state` is the one before it."""

    host: Host
    journal: Journal
    action: Action
    state: State

    @property
    def deploy(self) -> Deploy:
        """What is started or stopped; a switch has no such thing."""
        if isinstance(self.action, (Connect, Disconnect)):
            raise TypeError(describe(self.action))
        return self.action.deploy

    @property
    def start(self) -> Optional[Part]:
        """The action less what a Rollout does beside it."""
        return self.action.start if isinstance(self.action, Rollout) else self.action

    @property
    def old(self) -> Optional[Deploy]:
        return self.start.old if isinstance(self.start, Replace) else None

    @property
    def in_place(self) -> bool:
        """Tell whether `old` runs from where the new release will."""
        return bool(self.old and self.old.label == self.deploy.label)

    @property
    def replaces_all(self) -> bool:
        """Tell whether the new directory takes the place of the old one as a whole."""
        return self.in_place and self.host.config.has_proxy

    def path(self, *above: str) -> str:
        return self.host.config.path(*above, self.deploy.label)

    def run(self, deploy: Deploy, kind: str) -> None:
        directory = self.host.config.path(deploy.label)
        run_command(self.host, self.journal, deploy, kind, directory)

    def in_haste(self) -> "Work":
        """Return it with a bound on commands, as nobody can interrupt an undo."""
        limit = min(self.host.command_timeout or UNDO_STOP_SECS, UNDO_STOP_SECS)
        return self._replace(host=self.host._replace(command_timeout=limit))


def deploy_context(host: Host, deploy: Deploy) -> JsonObject:
    """Return a deploy's template context: the config sources, and its ports in proxy mode."""
    context = load_context(host)
    if not host.config.has_proxy:
        return context
    ports = ports_context(deploy.port, host.config.proxy.dynamic_port_range)
    if len(ports) < 5:
        host.log.warn(
            "ports",
            f"{deploy.label}: there are no ports.extra{len(ports)} to extra4, since they "
            "would lie above 65535; lower dynamicPortRange if a template needs them",
        )
    return dict(context, ports=ports)


def prepare(work: Work) -> None:
    """Unpack the new release into staging, and see that it can be started."""
    host, deploy, staging = work.host, work.deploy, work.path(".staging")
    if work.old:
        require_private(*command_files(host.config.path(work.old.label)))
    make_dir(host.config.path(".staging"), 0o711)
    remove(work.path(".old"))
    if not work.in_place:
        remove(output_path(host.config, deploy.label))
    fetch_context(host)
    release = prepare_release(host, deploy.release, staging, deploy_context(host, deploy))
    if release.prestart_command.strip():
        check_project(host, deploy, staging, quiet=True)


def nothing(work: Work) -> str:
    return ""


def discard(work: Work) -> str:
    remove(work.path(".staging"))
    return ""


def run_prestart(work: Work, directory: str) -> None:
    run_command(work.host, work.journal, work.deploy, "prestart", directory)
    check_project(work.host, work.deploy, directory)  # prestart may have written its compose file


def prestart(work: Work) -> None:
    """Run prestart where the release will run: paths that it writes down stay true."""
    run_prestart(work, work.path())


def prestart_aside(work: Work) -> None:
    """Run prestart in staging, as `old` runs from the place; raise if they can't be merged."""
    run_prestart(work, work.path(".staging"))
    if not work.replaces_all:
        compare_trees(work.path(".staging"), work.path())


def stop_or_warn(work: Work, deploy: Deploy, going_on: str) -> bool:
    try:
        work.run(deploy, "stop")
        return True
    except C2Error as e:
        message = f"{e}; {going_on}"
        work.host.log.warn("stop-failed", message, deploy=deploy.label, output=e.output)
        return False


def stop_old(work: Work) -> None:
    if work.old and stop_or_warn(work, work.old, f"going on with the start of {work.deploy.label}"):
        work.journal.note(stopped=True)


def start_old(work: Work) -> str:
    old, stopped = work.old, work.journal.record.get("stopped")
    if not old or work.state.deploys.get(old.label) != old:
        return ""  # a later command has stopped it, while this label was blocked
    work.journal.note(stopped=False)
    if not stopped:  # or nobody knows
        with contextlib.suppress(C2Error, OSError):
            work.in_haste().run(old, "stop")
    work.run(old, "start")
    return f"started {old.label} ({old.release}) again"


def merge(work: Work) -> None:
    """Move what staging holds into the deploy's place.

    What is there already, data say, stays where it is, unless the place is replaced as a whole;
    what has to give way lies in .old until the end.
    """
    deploy = work.deploy
    staging, place, aside = work.path(".staging"), work.path(), work.path(".old")
    fresh, kept, common = ([], [], [""]) if work.replaces_all else compare_trees(staging, place)
    if kept:
        shown = ", ".join(at[1:] for at in kept[:5]) + ", …" * (len(kept) > 5)
        message = f"{deploy.label}: kept what {deploy.release} does not contain: {shown}"
        work.host.log.info("kept", message, deploy=deploy.label)
    work.journal.note(fresh=fresh, common=common)
    make_dir(os.path.dirname(aside), 0o700)
    for at in common:
        make_dir(os.path.dirname(aside + at))
        os.rename(place + at, aside + at)
    for at in common + fresh:
        os.rename(staging + at, place + at)


def unmerge(work: Work) -> str:
    """Take the release's files out of its place, and put back what gave way."""
    place, aside, facts = work.path(), work.path(".old"), work.journal.record
    fresh, common = facts.get("fresh", []), facts.get("common", [])
    for at in fresh:
        remove(place + at)
    for at in common:
        if os.path.lexists(aside + at):
            remove(place + at)
            make_dir(os.path.dirname(place + at))
            os.rename(aside + at, place + at)
    if not fresh + common:
        return ""
    return "put back the files before" if common else "removed its files"


def start_new(work: Work) -> None:
    config = work.host.config
    if not config.has_proxy:
        replace_link(config.path(CURRENT), work.deploy.label)
    work.run(work.deploy, "start")


def stop_new(work: Work) -> str:
    deploy, current = work.deploy, work.host.config.path(CURRENT)
    result = f"stopped {deploy.label} again"
    try:
        work.in_haste().run(deploy, "stop")
    except (C2Error, OSError) as e:
        work.host.log.warn("undo", f"{e}; something may be left running", deploy=deploy.label)
        result = ""
    if read_link(current) == deploy.label:
        replace_link(current, work.old.label if work.old else None)
    return result


def ready_problem(work: Work) -> str:
    began = time.monotonic()
    problem = readiness_problem(work.host.config, work.deploy)
    if not problem:
        work.journal.note(ready=round(time.monotonic() - began, 1))
    return problem


def require_ready(work: Work) -> None:
    problem = ready_problem(work)
    if problem:
        raise C2Error(problem)


def ready_or_warn(work: Work) -> None:
    problem = ready_problem(work)
    if problem:
        work.host.log.warn("not-ready", problem, deploy=work.deploy.label)


def check_place(work: Work) -> None:
    check_project(work.host, work.deploy, work.path())


def stop_first(work: Work) -> None:
    stop_or_warn(work, work.deploy, "starting it all the same")


def is_forced(work: Work) -> bool:
    return isinstance(work.action, Destroy) and work.action.force


def drain_deploy(work: Work) -> None:
    if not is_forced(work):
        require_private(*command_files(work.path()))
    if work.host.config.has_proxy:
        drain(work.host, work.deploy)


def stop_deploy(work: Work) -> None:
    """Run the stop command; one that was killed may fail the second time."""
    deploy, force = work.deploy, is_forced(work)
    again = work.journal.record.get("resumed") == "stop"
    try:
        if os.path.isdir(work.path()) or not force:
            work.run(deploy, "stop")
    except C2Error as e:
        if not (force or again and not listening(deploy.port)):
            stays = f"{e}; {deploy.label} stays"
            if not work.host.config.remote:
                stays += (
                    ": mend it and stop it again, or remove it all the same with "
                    f"c2 stop --force {deploy.label}"
                )
            raise CommandFailed(stays, e.exit, e.output) from None
        message = f"{e}; removing it all the same"
        work.host.log.warn("stop-failed", message, deploy=deploy.label, output=e.output)


def remove_deploy(work: Work) -> None:
    """Remove a deploy; without the proxy its directory stays."""
    config = work.host.config
    if not config.has_proxy:
        return replace_link(config.path(CURRENT), None)
    remove(work.path())
    remove(output_path(config, work.deploy.label))


def switch(work: Work) -> None:
    after = next_state(work.action, work.state)
    route(work.host, after, start=not isinstance(work.action, Disconnect))


def switch_back(work: Work) -> str:
    restore_links(work.host.config)
    if isinstance(work.action, Rollout) and work.action.start:
        drain(work.host, work.deploy)  # which is stopped next
    return ""


class Step(NamedTuple):
    """What does it, and what undoes it, which says what it has done ("": nothing that one sees).

    Each raises when it fails, perhaps half done. Without an undo there is no way but on.
    """

    do: Callable[[Work], None]
    undo: Optional[Callable[[Work], str]]


STEPS = {
    "prepare": Step(prepare, discard),
    "merge": Step(merge, unmerge),
    "prestart": Step(prestart, nothing),
    "prestart-aside": Step(prestart_aside, nothing),
    "stop-old": Step(stop_old, start_old),
    "start": Step(start_new, stop_new),
    "wait": Step(ready_or_warn, nothing),
    "ready": Step(require_ready, nothing),
    "check": Step(check_place, nothing),
    "stop-first": Step(stop_first, nothing),  # it did not run
    "drain": Step(drain_deploy, nothing),
    "stop": Step(stop_deploy, nothing),  # it can be stopped again
    "remove": Step(remove_deploy, None),
    "switch": Step(switch, switch_back),
}
STEPS_OF: Dict[type, List[str]] = {
    Create: ["prepare", "merge", "prestart", "start"],
    Replace: ["prepare", "merge", "prestart", "stop-old", "start"],
    Restart: ["check", "stop-first", "start"],
    Destroy: ["drain", "stop", "remove"],
    Connect: ["switch"],
    Disconnect: ["switch"],
    type(None): [],
}
STEPS_IN_PLACE = ["prepare", "prestart-aside", "stop-old", "merge", "start"]
COMPLETE = ("wait", "done")  # what is in these steps is not rolled back, but recorded
STARTS = (Create, Replace, Restart)


def steps_of(work: Work) -> List[str]:
    start, config = work.start, work.host.config
    anew = isinstance(start, Restart) and not os.path.isdir(work.path())
    steps = STEPS_IN_PLACE if work.in_place else STEPS_OF[Create if anew else type(start)]
    if isinstance(work.action, Rollout):
        return [*steps, "ready", *["switch"][: len(work.action.end_points)]]
    waits = isinstance(start, STARTS) and config.has_proxy and not config.remote
    return [*steps, "wait"] if waits else steps


def begin(host: Host, action: Action, state: State) -> Work:
    entry = {"action": encode_action(action), "command": host.log.command, "since": utc_now()}
    work = Work(host, Journal(host.config.proxy_path("journal.json"), entry), action, state)
    entry["steps"] = steps_of(work)
    if state.deploys and not os.path.exists(host.config.proxy_path("state.json")):
        save_state(host.config, state)  # from camus2's link `current`: a recovery has to know it
    return work


def begun(journal: Journal) -> List[str]:
    """Return the steps up to the one that the journal names."""
    steps: List[str] = journal.record["steps"]
    last = journal.record.get("step")
    return steps[: steps.index(last) + 1] if last else []


def perform(work: Work) -> None:
    """Do the steps of an action, from the one that the journal names on.

    A signal that comes in one without an undo waits until all is done.
    """
    journal = work.journal
    with contextlib.ExitStack() as stack:
        for name in journal.record["steps"][len(begun(journal)[:-1]) :]:
            if not STEPS[name].undo:
                stack.enter_context(uninterruptible())
            journal.step(name)
            STEPS[name].do(work)
        journal.step("done")


def roll_back(work: Work) -> str:
    """Undo the steps that were begun, the last first, and forget the action; return what was done.

    Where the last one has no undo, the journal stays, and the next command goes on with it.
    """
    journal = work.journal
    results = []
    journal.ignore_disk_full = True
    for name in reversed(begun(journal)):
        undo = STEPS[name].undo
        if not undo:
            return ""
        journal.step(name)
        results.append(undo(work))
    journal.clear()
    return ", ".join(filter(None, results))


def labels_under_way(config: Config) -> Set[str]:
    """Return the labels that a journal is about: of an action under way, and of those blocked."""
    labels = {name[: -len(".json")] for name in list_dir(config.proxy_path("blocked"))}
    journal = read_journal(config.proxy_path("journal.json"))
    if journal:
        fields = journal.action._asdict()
        labels |= {d.label for d in fields.values() if isinstance(d, Deploy)}
    return labels


def list_garbage(config: Config) -> List[str]:
    """List what staging, replaced deploys and kills have left, but what a recovery needs."""
    needed = labels_under_way(config)
    garbage = [
        config.path(place, name)
        for place in (".staging", ".old")
        for name in list_dir(config.path(place))
        if name not in needed
    ]
    for directory in (
        config.deploys_dir,
        config.context_cache,
        config.proxy_path(),
        *map(config.proxy_path, PROXY_DIRS),
    ):
        temps = [re.search(r"\.(\d+)(-[0-9a-f]+)?~", name) for name in list_dir(directory)]
        garbage += [
            os.path.join(directory, t.string)
            for t in temps
            if t and not start_time(int(t.group(1)))
        ]
    return garbage


def clean_up(host: Host) -> None:
    """Remove what earlier commands have left."""
    for path in list_garbage(host.config):
        try:
            remove(path)
        except OSError as e:
            message = f"can't remove {path}, which an earlier command left: {e.strerror}"
            host.log.warn("clean-up", message)


def commit(work: Work, seconds: Optional[float] = None) -> State:
    """Record a finished action, then remove what is not needed any more; the journal goes last."""
    host, action, config = work.host, work.action, work.host.config
    state = next_state(action, work.state, utc_now())
    save_state(config, state)
    ready_after = work.journal.record.get("ready")
    for part in parts_of(action):
        result = outcome(part, work.state, ready_after)
        host.log.info("done", result, seconds=seconds, **log_fields(part))
    if work.old and config.has_proxy and not work.in_place:
        remove(config.path(work.old.label))
        remove(output_path(config, work.old.label))
    work.journal.clear()
    clean_up(host)
    return state


def give_up(work: Work, error: BaseException) -> None:
    """Log the failure of an action, and roll it back."""
    log, fields = work.host.log, log_fields(work.action)
    reason = str(error) if isinstance(error, (C2Error, OSError)) else "interrupted"
    message = f"{describe(work.action)} failed: {reason}"
    details = {"exit": getattr(error, "exit", None), "output": getattr(error, "output", "")}
    log.event("error", "failed", message, **details, **fields)
    try:
        result = roll_back(work)
    except (C2Error, OSError) as e:
        raise C2Error(
            f"{reason}; and it could not be rolled back: {e}; the next c2 command that changes "
            "something tries again"
        ) from None
    if result:
        log.info("rolled-back", f"rolled back: {result}", **fields)


def apply_actions(host: Host, actions: Sequence[Action], state: State) -> State:
    """Perform actions, save the state after each; roll back and raise for the first that fails."""
    for action in actions:
        work = begin(host, action, state)
        host.log.info("begin", announce(action), **log_fields(action))
        began = time.monotonic()
        try:
            perform(work)
        except BaseException as e:
            with uninterruptible():
                step = work.journal.record.get("step")
                if isinstance(e, Interrupted) and step in COMPLETE:
                    commit(work)  # it came too late
                    if step == "wait":
                        say(f"{work.deploy.label} stays started; it may not be ready yet")
                else:
                    give_up(work, e)
            raise
        with uninterruptible():
            try:
                state = commit(work, round(time.monotonic() - began, 3))
            except OSError as e:
                raise C2Error(
                    f"{describe(action)} is done, but that can't be recorded ({e.filename}: "
                    f"{e.strerror}); the next c2 command records it"
                ) from None
    return state


def require_known_steps(work: Work) -> None:
    """Raise unless this version of c2 has the steps of a journal.

    An earlier one did not tell them: of its starts the last step is not what it is here.
    """
    journal = work.journal
    former = [name for name in steps_of(work) if name != "start"]
    steps = journal.record.setdefault("steps", former)
    if not {*steps} <= {*STEPS} or journal.record["step"] not in [*steps, "done"]:
        raise C2Error(
            f"{journal.path} was written by another version of c2, which was killed in "
            f"{journal.doing}; run a command of that version once, which recovers it, or see to it "
            "by hand and remove the file"
        )


def goes_on(work: Work) -> bool:
    """Tell whether a killed action is gone on with, not rolled back: a stop, a begun switch."""
    rolled_back = isinstance(work.action, (*STARTS, Rollout))
    return not rolled_back or work.journal.record["step"] == "switch"


def finish_or_roll_back(work: Work) -> str:
    """Recover what the journal tells of, and return what was undone.

    Where that fails, an endpoint is left as the state has it, and a label is blocked; others are
    free at the next command.
    """
    journal, config, finish = work.journal, work.host.config, goes_on(work)
    journal.ignore_disk_full = True
    try:
        if not finish:
            return roll_back(work)
        journal.note(resumed=journal.record["step"])
        perform(work)
        return ""
    except (C2Error, OSError) as e:
        if finish and not isinstance(work.action, Destroy):
            killed = journal.doing
            roll_back(work)
            raise C2Error(
                f"could not finish what was killed ({killed}): {e}; all is as it was before; mend "
                "the cause and try again"
            ) from None
        subject = work.deploy.label
        make_dir(config.proxy_path("blocked"))
        os.replace(journal.path, config.proxy_path("blocked", f"{subject}.json"))
        raise C2Error(
            f"could not recover what was killed ({journal.doing}): {e}; {subject} is blocked: mend "
            f"the cause and try again, or clear it with c2 stop --force {subject}"
        ) from None


def recover(host: Host) -> None:
    """Roll back the start that a killed command left, or finish the stop or switch.

    Raises C2Error when that fails.
    """
    journal = read_journal(host.config.proxy_path("journal.json"))
    if journal:
        work = Work(host, journal, journal.action, load_state(host.config))
        require_known_steps(work)
        host.log.warn("recover", f"the last command was killed: {journal.doing}; recovering first")
        if end_orphan(journal.record["group"]):
            host.log.warn("recover", "ended the command that it left running")
        with uninterruptible():
            is_complete = journal.record["step"] in COMPLETE
            finish = is_complete or goes_on(work)
            result = "" if is_complete else finish_or_roll_back(work)
            if finish:
                commit(work)
                result = ", ".join(outcome(part, work.state) for part in parts_of(work.action))
            else:
                result = f"rolled back {describe(work.action)}" + (result and f": {result}")
        host.log.info("recovered", f"recovered: {result}")
    clean_up(host)


def retry_blocked(host: Host, subject: str) -> None:
    """Try the recovery again that blocks this label, if one does."""
    path = host.config.proxy_path("blocked", f"{subject}.json")
    if os.path.exists(path):
        os.replace(path, host.config.proxy_path("journal.json"))
        recover(host)


def list_unneeded(config: Config, keep: int) -> List[str]:
    """List the directories of releases that nothing needs, and the outputs of labels without one.

    What has no release.json is none of c2's. Without the proxy the newest releases stay, and the
    one before the running one.
    """
    state = host_state(config)
    needed = {*state.deploys, *labels_under_way(config), read_link(config.path(CURRENT)) or ""}
    if not config.has_proxy and CURRENT in state.previous:
        needed.add(state.previous[CURRENT].label)
    unpacked = {}
    for name in list_dir(config.deploys_dir):
        path = config.path(name, "release.json")
        if re.fullmatch(LABEL, name) and is_dir(config.path(name)) and os.path.lexists(path):
            unpacked[name] = os.lstat(path).st_mtime
    labels = prunable(unpacked, needed, 0 if config.has_proxy else keep)
    outputs = [stem(name) for name in list_dir(config.proxy_path("output"))]
    gone = {*outputs} - needed - ({*unpacked} - {*labels})
    return [
        *map(config.path, labels),
        *(output_path(config, name) for name in sorted(gone)),
    ]


def remove_unneeded(config: Config, path: str) -> None:
    """Remove what `list_unneeded` lists; of a directory a kill leaves garbage, no half deploy."""
    if is_dir(path):
        aside = config.path(".old", os.path.basename(path))
        make_dir(config.path(".old"), 0o700)
        os.rename(path, aside)
        path = aside
    remove(path)


@contextlib.contextmanager
def changing(host: Host, wait: float, **about: Any) -> Any:
    """Hold the lock, and recover first; for commands that change the host."""
    with locked(host, wait, **about) as cancelled:
        recover(host)
        yield cancelled


# --------------------------------------------------------------------------------------------------
# The master state: a State in S3, which masters change and the machines of a fleet follow
# --------------------------------------------------------------------------------------------------


def require_remote(config: Config, what: str) -> None:
    if not config.remote:
        raise ConfigError(
            f"{what} is for a fleet, but deployMode.proxy.remoteStateS3 is not configured"
        )


def remote_url(config: Config, *parts: str) -> str:
    return "/".join([(config.remote or "").rstrip("/"), *parts])


def master_url(config: Config) -> str:
    return remote_url(config, "master", "state.json")


def decode_master(source: str, url: str) -> State:
    """Decode a master state that a machine can follow.

    Stricter than a host's own: what a half-written document leaves out, every machine would take
    down.
    """
    value = parse_json(source, url)
    for key in ("deploys", "connections"):
        if not isinstance(value, dict) or key not in value:
            raise C2Error(f"{url} has no {key}, so it is no state")
    state = decode_state(value, url)
    owners: Dict[Tuple[str, Any], str] = {}
    for name, deploy in state.deploys.items():
        try:
            check_label(name, State())
        except C2Error as e:
            raise C2Error(f"{url}: {e}") from None
        for what, own in (("port", deploy.port), ("docker compose project", compose_project(name))):
            if not own or owners.setdefault((what, own), name) != name:
                raise C2Error(f"{url}: {name} has no {what} of its own, but {own}")
    return state


def read_master(config: Config) -> Tuple[State, str]:
    """Return the master state and its ETag; an empty one and "" while there is none."""
    url = master_url(config)
    with scratch() as directory:
        path = os.path.join(directory, "state.json")
        to_path = [*s3_object(url), path]
        try:
            etag = aws("s3api", "get-object", *to_path, "--query", "ETag", "--output", "text")
        except Missing as e:
            if "NoSuchBucket" in str(e):
                raise
            return State(), ""
        return decode_master(read_file(path) or "", url), etag.strip()


def put_object(url: str, value: Any, *conditions: str) -> None:
    with scratch() as directory:
        path = os.path.join(directory, "object.json")
        replace_file(path, json.dumps(value, indent=2) + "\n")
        body = ["--body", path, "--content-type", "application/json"]
        aws("s3api", "put-object", *s3_object(url), *body, *conditions)


def write_master(host: Host, state: State, etag: str) -> bool:
    """Write the master state, unless another master was quicker; tell whether it is written."""
    url = master_url(host.config)
    value = encode(state)
    try:
        put_object(url, value, *(["--if-match", etag] if etag else ["--if-none-match", "*"]))
    except Missing:
        return False
    except CommandFailed as e:
        conflict = r"\((PreconditionFailed|ConditionalRequestConflict|OperationAborted)\)"
        if re.search(conflict, e.output):
            return False
        if not re.search("unknown option|NotImplemented", e.output, re.I):
            raise
        host.log.warn(
            "aws",
            "this aws CLI or store has no conditional writes: a change that another master "
            "makes at this moment may be lost; update the aws CLI",
        )
        put_object(url, value)
    return True


# --------------------------------------------------------------------------------------------------
# Slave records: what the machines report, and what `status` shows of a fleet
# --------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """What a slave has reported: as it is stored, and decoded."""

    label: str
    moment: float  # Unix time; 0 of what no slave has written
    raw: Any
    state: Optional[State]
    error: str  # of the problems
    problems: List[JsonObject]

    @property
    def age(self) -> float:
        return time.time() - self.moment


def foreign_record(key: str) -> Record:
    """Stand for an object below slaves/ that no slave has written."""
    return Record(key, 0.0, None, None, "passed over, since its name is no slave's", [])


def decode_record(label: str, moment: float, source: str) -> Record:
    """Decode what a slave has written; what can't be read is an error of the record."""
    raw = state = None
    problems: List[JsonObject] = []
    try:
        raw = parse_json(source, "the record")
        status = raw["status"]
        ok = status == "ok" or isinstance(status, dict) and "ok" in status
        error = "" if ok else str(status["error"])
        state = decode_state(raw["state"], "the record")
        problems = [p for p in raw.get("problems", []) if error and isinstance(p, dict)]
    except (C2Error, KeyError, TypeError) as e:
        state = None
        error = f"the record can't be read: {e}"
    if error and not problems:  # a slave of camus2 does not tell them apart
        problems = [{"message": error}]
    return Record(label, moment, raw, state, error, problems)


def read_record(label: str, path: str) -> Record:
    status = os.stat(path)
    if not re.fullmatch(LABEL, label):
        return foreign_record(one_line(f"{label}/state.json"))
    moment = status.st_mtime  # sync sets it to the object's
    if status.st_size > RECORD_BYTES:
        error = f"the record has {status.st_size >> 20} MB and is not read"
        return Record(label, moment, None, None, error, [{"message": error}])
    with open(path, encoding="utf-8", errors="replace") as f:
        return decode_record(label, moment, f.read())


def read_records(config: Config, directory: str) -> List[Record]:
    """Read the records of all slaves by one call of the aws CLI.

    directory: keeps them, so that the next call only fetches what has changed.
    """
    # No file can have the name of a directory: what lies below a state.json is excluded again.
    patterns = ["--exclude", "*", "--include", "*/state.json", "--exclude", "*/state.json/*"]
    options = ["--delete", "--exact-timestamps", *patterns, "--only-show-errors"]
    skipped: List[str] = []
    try:
        aws("s3", "sync", remote_url(config, "slaves") + "/", directory, *options, timeout=600)
    except Missing as e:
        if "NoSuchBucket" in str(e):
            raise  # else a record has vanished since it was listed
    except CommandFailed as e:
        skipped = re.findall(r"(?m)^warning: Skipping file (.+)\. File references a", e.output)
        if e.exit != 2 or not skipped:
            raise
    records = [foreign_record(key) for key in skipped]
    for label in list_dir(directory):
        with contextlib.suppress(OSError):
            records.append(read_record(label, os.path.join(directory, label, "state.json")))
    return sorted(records, key=lambda record: record.label)


def concerns(problem: JsonObject, asked: Asked) -> bool:
    """Tell whether a problem of a slave is one of the asked-for, or of the whole machine."""
    name = problem.get("deploy")
    end_point = problem.get("endpoint")
    return not (name or end_point) or name in [*asked.deploys] or end_point in [*asked.connections]


def slave_problem(
    config: Config, master: Optional[State], record: Record, asked: Optional[Asked] = None
) -> str:
    """Say what is wrong with a slave, "" for nothing.

    master: None when it can't be read; asked: what alone matters of it.
    """
    behind = ""
    error = record.error
    if master and record.state:
        labels = {*master.deploys, *record.state.deploys}
        behind = difference(asked or asked_by(master, labels, config.end_points), record.state)
    if asked and not behind:
        error = "; ".join(str(p.get("message")) for p in record.problems if concerns(p, asked))
    problems = []
    if record.age > LIVE_SECS and record.moment:
        in_minutes = record.age >= 3 * LIVE_SECS
        age = f"{record.age / 60:.0f} min" if in_minutes else f"{record.age:.0f} s"
        problems.append(f"STALE: not heard of for {age}")
    if error:
        problems.append(f"FAILING: {error}")
    if behind:
        problems.append(f"BEHIND: {behind}")
    return " ".join("; ".join(problems).split())


def fleet_text(config: Config, master: Optional[State], records: List[Record]) -> str:
    lines = [f"Slaves ({len(records)}):"]
    bad = 0
    for record in records:
        raw = record.raw if isinstance(record.raw, dict) else {}
        names = ", ".join(str(raw[key]) for key in ("ipAddress", "hostName") if raw.get(key))
        problem = slave_problem(config, master, record)
        bad += bool(problem)
        where = f" ({names})" if names else ""
        lines.append(f"  {record.label}{where}: {problem or f'ok, {record.age:.0f} s ago'}")
    if bad:
        lines.append(f"{bad} of {len(records)} slaves need a look")
    return "\n".join(lines) + "\n"


def fleet_status(
    config: Config, args: "Namespace", directory: str
) -> Tuple[str, Optional[C2Error]]:
    """Return what `status` prints of a fleet, and why the master state can't be read."""
    state = problem = None
    try:
        state, _ = read_master(config)
    except C2Error as e:
        problem = e
    records = read_records(config, directory) if args.show_slaves else []
    if args.json:
        plain: JsonObject = {"master": encode(state) if state else None}
        if args.show_slaves:
            plain["slaves"] = [
                {
                    "label": record.label,
                    "lastModified": utc_now(record.moment),
                    "state": record.raw,
                    "problem": slave_problem(config, state, record),
                }
                for record in records
            ]
        return json.dumps(plain, indent=2) + "\n", problem
    text = status_text(config, state, {}) if state else f"No master state: {problem}"
    text += "\n\n" + fleet_text(config, state, records) if args.show_slaves else "\n"
    return printable(text), problem


def show_fleet(host: Host, args: "Namespace") -> None:
    """Show the master state, and on request the slaves: two calls of the aws CLI, however many."""
    with scratch() as directory:
        while True:
            problem = None
            try:
                text, problem = fleet_status(host.config, args, directory)
            except C2Error as e:
                text = f"{e}\n"
                if not args.watch:
                    raise
            emit("\x1b[H\x1b[J" + text if args.watch and sys.stdout.isatty() else text)
            if not args.watch:
                break
            time.sleep(args.watch)
    report_unfinished(host.config)
    due = due_for_proxy(host.config)
    if due:
        say(f"this machine's proxy: due with c2 restart-frontend-proxy: {'; '.join(due)}")
    if problem:
        raise problem


# --------------------------------------------------------------------------------------------------
# Masters: changes of the master state, and waiting until the machines have followed
# --------------------------------------------------------------------------------------------------


def check_forgotten(config: Config) -> None:
    """Raise when machines run deploys without a master state: a new one would take these down."""
    with scratch() as directory:
        running = [
            record.label
            for record in read_records(config, directory)
            if record.age < LIVE_SECS and record.state and record.state.deploys
        ]
    if running:
        raise Refused(
            f"{master_url(config)} is gone, though {', '.join(running[:3])} run deploys, which a "
            "new one would take down; put its last version back, or the `state` of a record in "
            f"{remote_url(config, 'slaves')}/"
        )


def change_master(
    host: Host, choose: Callable[[State], Sequence[Action]]
) -> Tuple[State, Sequence[Action]]:
    """Change the master state by the actions that are chosen for it; return it, and them.

    They are chosen anew for the fresh one when another master was quicker.
    """
    import random

    new = None
    for attempt in range(MASTER_TRIES):
        state, etag = read_master(host.config)
        if state == new:
            break  # the last write has arrived, though its answer did not
        if not etag:
            check_forgotten(host.config)
        actions = choose(state)
        if not actions:
            return state, []
        new = state
        for action in actions:
            new = next_state(action, new, utc_now())
        what = ", ".join(describe(action) for action in actions)
        new = new._replace(changed=Change(who(), utc_now(), what))
        if write_master(host, new, etag):
            break
        time.sleep(random.uniform(0, min(0.25 * 2**attempt, 4)))
    else:
        raise C2Error(
            f"other masters have changed {master_url(host.config)} {MASTER_TRIES} times meanwhile; "
            "try again"
        )
    for action in actions:
        message = f"recorded in the master state: {describe(action)}; the machines follow"
        host.log.info("master", message, **log_fields(action))
    return new, actions


def require_asked(asked: Asked, master: State) -> None:
    """Raise when the master state is no longer what was asked for here."""
    problem = difference(asked, master)
    if problem:
        changed = master.changed
        last_change = "it does not tell who changed it"
        if changed:
            last_change = f"its last change: {changed.what}, by {changed.by}, at {changed.at}"
        raise C2Error(
            "the master state has been changed meanwhile, to what was not asked for here "
            f"({problem}); {last_change}"
        )


def await_fleet(host: Host, wait: float, asked: Optional[Asked] = None) -> None:
    """Wait until all live slaves report the master state, or of it what was asked for.

    C2Error with those that don't, or when that does not stand there any more.
    """
    config = host.config
    shown = ""
    with scratch() as directory:
        for seconds_left in attempts(wait, WAIT_POLL_SECS):
            late: List[str] = []
            progress = (
                f"no slave has reported to {remote_url(config, 'slaves')}/ within {LIVE_SECS} s"
            )
            try:
                master, _ = read_master(config)
                if asked:
                    require_asked(asked, master)
                live = [r for r in read_records(config, directory) if r.age <= LIVE_SECS]
                problems = {r.label: slave_problem(config, master, r, asked) for r in live}
                late = [f"{label}: {problem}" for label, problem in problems.items() if problem]
                if live and not late:
                    what = "it" if asked else "the master's state"
                    return host.log.info("fleet", f"all {len(live)} slaves report {what}")
                if live:
                    progress = f"{len(late)} of {len(live)} slaves are not there yet"
            except CommandFailed as e:  # S3 may be there again in time
                progress = f"the fleet's state can't be read: {e}"
            if progress != shown and seconds_left > 0:
                say(f"{progress}; waiting at most {seconds_left:.0f} s more")
            shown = progress
    raise C2Error("; ".join([f"after {wait:g} s {shown}", *late]))


# --------------------------------------------------------------------------------------------------
# Polling: the master's document read cheaply, and what a machine is called in its fleet
# --------------------------------------------------------------------------------------------------


class Poll:
    """The master's document, read cheaply: by conditional GETs of a presigned address.

    Where S3 refuses those, `aws s3 cp` is used for a while: with old-style signatures or KMS it
    says 400, and 403 for a missing object to those who may not list the bucket, which only the aws
    CLI tells apart.
    """

    def __init__(self, log: Log, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler

        self.log = log
        self.url = url
        self.clock = clock
        self.opener = OpenerDirector()  # follows no redirect; its TLS context costs 25 ms
        for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
            self.opener.add_handler(handler)
        self.presigned = ""
        self.presign_due = clock()
        self.retry_due = clock()  # until then the aws CLI is used
        self.warned = False
        self.document = ""
        self.etag: Optional[str] = None

    def read(self) -> str:
        """Return the document as it is now; Missing without one, C2Error when it can't be read."""
        problem = ""
        pause = HEARTBEAT_SECS
        for _ in range(2 if self.clock() >= self.retry_due else 0):
            if self.clock() >= self.presign_due:
                expiry = ["--expires-in", str(2 * PRESIGN_SECS)]
                self.presigned = aws("s3", "presign", self.url, *expiry).strip()
                self.presign_due = self.clock() + PRESIGN_SECS
            try:
                status = self.get()
            except OSError as e:
                problem = str(e)
                continue
            if status in (200, 304):
                return self.document
            if status == 404:
                raise Missing(f"{self.url} is not there")
            problem = f"it says {status}"
            if status < 500:
                self.presign_due = self.clock()  # the signature may have had its day
                pause = PRESIGN_SECS
        content = aws("s3", "cp", self.url, "-")
        if problem:
            self.retry_due = self.clock() + pause
            if not self.warned:
                self.log.warn(
                    "poll",
                    f"{self.url} can't be read by a presigned address ({problem}); polls "
                    "start the aws CLI for a while",
                )
            self.warned = True
        return content

    def get(self) -> int:
        """Make one conditional GET and return the status."""
        from http.client import HTTPException
        from urllib.request import Request

        headers = {"User-Agent": f"c2/{VERSION}"}
        if self.etag:
            headers["If-None-Match"] = self.etag
        request = Request(self.presigned, headers=headers)
        try:
            with self.opener.open(request, timeout=HTTP_TIMEOUT_SECS) as answer:
                content = answer.read().decode("utf-8", "replace")
                if answer.status == 200:
                    self.document = content
                    self.etag = answer.headers.get("ETag")
                return int(answer.status)
        except HTTPException as e:
            raise OSError(str(e) or type(e).__name__) from None


def slave_label(mode: ProxyMode) -> str:
    """Return the configured label of this machine, or its EC2 instance id, by IMDSv2."""
    if mode.slave_label.name == "label":
        return mode.slave_label.value
    import urllib.request

    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(method: str, path: str, header: str, value: str) -> str:
        headers = {f"X-aws-ec2-metadata-{header}": value}
        request = urllib.request.Request(base.rstrip("/") + path, headers=headers, method=method)
        with opener.open(request, timeout=3) as answer:
            return str(answer.read().decode("utf-8", "replace"))

    try:
        token = ask("PUT", "/latest/api/token", "token-ttl-seconds", "60")
        name = ask("GET", "/latest/meta-data/instance-id", "token", token)
        return str(decode(Label, name, Location("instance-id")))
    except (OSError, ValueError) as e:
        raise C2Error(
            f"this seems to be no EC2 instance, since {base} does not tell its id ({e}); set "
            'deployMode.proxy.slaveLabel to {"label": NAME}'
        ) from None


def interface_address(name: str) -> str:
    """Return the IPv4 address of a network interface (netdevice(7)); OSError without one."""
    import fcntl
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        return socket.inet_ntoa(fcntl.ioctl(s, 0x8915, name.encode()[:15].ljust(40, b"\0"))[20:24])


def machine_address(name: Optional[str]) -> str:
    """Return the IPv4 address of the interface `name`, else of eth0, else of the default route's.

    Text that says so when there is none: a machine serves without it.
    """
    table = [line.split() for line in (read_file("/proc/net/route") or "").splitlines()]
    default = [fields[0] for fields in table if fields[1:2] == ["00000000"]]
    for interface in [name] if name else ["eth0", *default]:
        with contextlib.suppress(OSError):
            return interface_address(interface)
    return f"{name or 'the default route'} has no IPv4 address"


# --------------------------------------------------------------------------------------------------
# Decisions: what a machine of a fleet does next, and when again what has failed
# --------------------------------------------------------------------------------------------------


class Chore(enum.Enum):
    """A task for the machine as a whole."""

    RECOVER = "finish or roll back what was killed"
    CONFIGURE = "take over a changed configuration"
    FINISH_BOOT = "record that all that the last boot ended has been started again"
    KEEP_PROXY = "make the proxy serve this machine's state, and run if it does not"


class Unblock(NamedTuple):
    """Try the recovery again that blocks a label."""

    label: str


class TryRelease(NamedTuple):
    """See whether a release can be had, before an endpoint is disconnected for it."""

    deploy: Deploy


Task = Union[Action, Chore, Unblock, TryRelease]
Key = Tuple[type, Task]  # a task's type belongs to it: tuples of two types may be equal


def failure_key(task: Task) -> Key:
    """Return what the failure of a task is kept under.

    A deploy that does not start is one, beside or in place of another, and a stop, forced or not.
    """
    if isinstance(task, Replace):
        task = Create(task.deploy)
    elif isinstance(task, Destroy):
        task = Destroy(task.deploy)
    return type(task), task


def task_subject(task: Task) -> Dict[str, str]:
    """Return the deploy and the endpoint that a task is about; {}: the whole machine."""
    if isinstance(task, Chore):
        return {}
    if isinstance(task, Unblock):
        return {"deploy": task.label}
    if isinstance(task, TryRelease):
        task = Create(task.deploy)
    return {n: v for n, v in log_fields(task).items() if n in ("deploy", "endpoint")}


class Failure(NamedTuple):
    times: int
    due: float  # by the clock of Retries
    reason: str


def retry_pause(task: Task, times: int) -> float:
    import random

    longest = RETRY_MAX_SECS
    if task is Chore.KEEP_PROXY:  # without it nothing is served
        longest = HEARTBEAT_SECS
    return min(RETRY_SECS * 2 ** (times - 1), longest) * random.uniform(0.8, 1.2)


class Retries:
    """What has failed and not succeeded since; each is due again after a pause that doubles."""

    def __init__(self, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        self.log = log
        self.clock = clock
        self.failures: Dict[Key, Failure] = {}
        self.begin_round()

    def begin_round(self) -> None:
        self.began = self.clock()
        self.done: Set[Key] = set()

    def attempt(self, task: Task, function: Callable[..., None], *args: Any) -> bool:
        """Call the function that does a task; tell whether it succeeded."""
        key = failure_key(task)
        try:
            function(*args)
        except (C2Error, OSError) as e:
            times = self.failures[key].times + 1 if key in self.failures else 1
            self.failures[key] = Failure(times, self.clock() + retry_pause(task, times), str(e))
            self.log.warn("slave", str(e))
            return False
        self.forget(task)
        self.done.add(key)
        return True

    def forget(self, task: Task) -> None:
        self.failures.pop(failure_key(task), None)

    def keep(self, keys: Set[Key]) -> None:
        """Forget the failures of what is not to be done any more."""
        self.failures = {key: f for key, f in self.failures.items() if key in keys}


class Observed(NamedTuple):
    """What a machine's next task is decided from."""

    end_points: Collection[str]
    master: Optional[State]  # None while it can't be read
    state: State
    done: Set[Key]  # in this round
    blocked: Sequence[str] = ()  # labels whose recovery has failed
    rebooted: bool = False  # and not all is started again
    down: Sequence[Deploy] = ()  # which do not listen; asked only after a reboot
    proxy: bool = True  # whether there is to be one
    disconnected: Mapping[str, str] = EMPTY  # for a replacement: ENDPOINT -> the label that it had


def next_actions(
    observed: Observed, master: State, backing_off: Callable[[Action], bool]
) -> Sequence[Task]:
    """Return what is feasible now of the plan from this machine's state to the master's.

    An endpoint that was disconnected for a replacement which can't be had is connected again first;
    what it was connected to stays until that is done. None is disconnected before all releases
    have been tried that endpoints are disconnected for.
    """
    end_points = observed.end_points
    state = observed.state
    actions = feasible(end_points, state, master, backing_off)
    after = state
    for action in actions:
        after = next_state(action, after)
    cut_off = {e: n for e, n in observed.disconnected.items() if e not in after.connections}
    reconnections = [Connect(e, n) for e, n in cut_off.items() if not backing_off(Connect(e, n))]
    if reconnections:
        return reconnections

    def is_held(action: Action) -> bool:
        if isinstance(action, (Destroy, Replace)):
            old = action.old if isinstance(action, Replace) else action.deploy
            return old.label in cut_off.values() or backing_off(action)
        return backing_off(action)

    if cut_off:
        actions = feasible(end_points, state, master, is_held)
    targets = {
        master.deploys[master.connections[action.end_point]]
        for action in actions
        if isinstance(action, Disconnect) and is_outage(end_points, action, master)
    }
    trials = [t for t in map(TryRelease, sorted(targets)) if failure_key(t) not in observed.done]
    return trials or actions


def with_force(action: Task, failures: Dict[Key, Failure]) -> Task:
    """Force a stop that has failed STOP_TRIES times."""
    failure = failures.get(failure_key(action))
    if isinstance(action, Destroy) and failure and failure.times >= STOP_TRIES:
        return action._replace(force=True)
    return action


def chores(observed: Observed) -> List[Task]:
    """Return what is to be done whatever the master state says, in order."""
    restarts = [Restart(deploy) for deploy in observed.down]
    tasks: List[Task] = [Chore.CONFIGURE]
    tasks += [Unblock(name) for name in observed.blocked]
    tasks += [restart for restart in restarts if restart.deploy.label not in observed.blocked]
    if observed.rebooted and all(failure_key(restart) in observed.done for restart in restarts):
        tasks.append(Chore.FINISH_BOOT)
    if observed.proxy:
        tasks.append(Chore.KEEP_PROXY)
    return tasks


def decide(observed: Observed, failures: Dict[Key, Failure], now: float) -> List[Task]:
    """Return what a machine does next, up to the first that fails; [] until something is due.

    now: when the round began, so that what fails in it is not tried twice.
    """

    def waits(task: Task) -> bool:
        key = failure_key(task)
        return key in failures and failures[key].due > now

    def backing_off(action: Action) -> bool:
        labels = {field.label for field in action if isinstance(field, Deploy)}
        if isinstance(action, (Create, Replace)) and waits(TryRelease(action.deploy)):
            return True
        return waits(action) or not labels.isdisjoint(observed.blocked)

    for task in chores(observed):
        if failure_key(task) not in observed.done and not waits(task):
            return [task]
    if observed.master:
        actions = next_actions(observed, observed.master, backing_off)
        if actions:
            return [with_force(action, failures) for action in actions]
    connected = starmap(Connect, observed.state.connections.items())
    return [task for task in connected if failure_key(task) in failures and not waits(task)]


def still_disconnected(
    disconnected: Mapping[str, str], state: State, master: Optional[State]
) -> Dict[str, str]:
    """Return which of the endpoints disconnected for a replacement could be connected again."""
    return {
        end_point: name
        for end_point, name in disconnected.items()
        if end_point not in state.connections
        and name in state.deploys
        and (not master or end_point in master.connections)
    }


def do_tasks(
    retries: Retries, observe: Callable[[], Observed], do: Callable[[Task, Observed], None]
) -> None:
    """Do what is decided, and decide anew, until nothing can be done in this round."""
    while True:
        observed = observe()
        tasks = decide(observed, retries.failures, retries.began)
        if not tasks:
            return
        for task in tasks:
            if not retries.attempt(task, do, task, observed):
                break


def unfinished(observed: Observed) -> Set[Key]:
    """Return the keys of all that is still to be done, also of what waits for others."""
    state = observed.state
    master = observed.master
    tasks = [Chore.RECOVER, *chores(observed)]
    tasks += starmap(Connect, state.connections.items())  # to what is not ready, it may be
    tasks += starmap(Connect, observed.disconnected.items())
    if master:
        actions = plan(observed.end_points, state, master)
        tasks += actions
        tasks += [TryRelease(a.deploy) for a in actions if isinstance(a, (Create, Replace))]
        tasks += [Destroy(d) for d in state.deploys.values() if master.deploys.get(d.label) != d]
    return {failure_key(task) for task in tasks}


# --------------------------------------------------------------------------------------------------
# A machine of a fleet: it polls, observes, decides, acts and reports
# --------------------------------------------------------------------------------------------------


class Reporter:
    """Writes this machine's record: when it has changed, and every minute all the same."""

    def __init__(self, host: Host, label: str) -> None:
        import threading

        self.host = host
        self.label = label
        self.written: Optional[JsonObject] = None
        self.lock = threading.Lock()  # the heartbeat has a thread of its own

    def report(self, problems: List[Dict[str, str]], anyway: bool = False) -> None:
        """Write the record, if it has changed or anyway."""
        import socket

        config = self.host.config
        log = self.host.log
        state = State()
        with contextlib.suppress(C2Error):
            state = load_state(config)
        problems = [dict(p, message=masked(p["message"], log.secrets)) for p in problems]
        error = "; ".join(p["message"] for p in problems)
        record = {
            "status": {"error": error} if error else "ok",
            "ipAddress": machine_address(config.proxy.slave_interface_name),
            "hostName": socket.gethostname(),
            "state": encode(state),
            "problems": problems,
        }
        with self.lock:
            if record == self.written and not anyway:
                return
            try:
                put_object(remote_url(config, "slaves", self.label, "state.json"), record)
                self.written = record
            except (C2Error, OSError) as e:
                log.warn("record", f"this machine's record can't be written: {e}")


def survive(log: Log, function: Callable[[], Any]) -> None:
    """Call a function; whatever goes wrong, a machine that nobody looks after goes on."""
    try:
        function()
    except Exception as e:
        log.warn("slave", problem_of(e)[0])


def heartbeat(
    log: Log, beat: Callable[[], None], sleep: Callable[[float], None] = time.sleep
) -> None:
    """Call `beat` every minute, for ever; also while an action takes its time."""
    while True:
        sleep(HEARTBEAT_SECS)
        survive(log, beat)


def require_port(action: Action) -> None:
    """Raise when something else holds a new deploy's port; what was just stopped gets a moment."""
    if not isinstance(action, (Create, Replace)):
        return
    deploy = action.deploy
    if isinstance(action, Replace) and action.old.port == deploy.port:
        return
    if all(port_taken(deploy.port) for _ in attempts(PORT_GRACE_SECS, 0.1)):
        raise C2Error(
            f"{deploy.label}: another program on this machine holds port {deploy.port}, which "
            "the master gave to it; end that program, or start the release under another label"
        )


def apply_connect(host: Host, action: Connect, state: State) -> None:
    """Connect also what is not ready, and raise then; but not in place of what is ready."""
    deploy = state.deploys[action.label]
    before = state.deploys.get(state.connections.get(action.end_point, ""))
    problem = readiness_problem(host.config, deploy)
    if problem and before and before != deploy and ready(host.config.proxy, before.port):
        raise Refused(f"{problem}; {action.end_point} stays on {before.label}")
    if not problem or before != deploy:
        apply_actions(host, [action], state)
    if problem:
        raise C2Error(f"{problem}, though {action.end_point} is connected to it")


def try_release(host: Host, deploy: Deploy) -> None:
    """Raise when a release can't be had or is not in order; run nothing of it."""
    staging = host.config.path(".staging", deploy.label)
    make_dir(os.path.dirname(staging), 0o711)
    try:
        fetch_context(host)
        prepare_release(host, deploy.release, staging, deploy_context(host, deploy))
        check_project(host, deploy, staging, quiet=True)
    finally:
        remove(staging)


class Slave:
    """A machine of a fleet, and what its `slave-update` remembers from round to round."""

    def __init__(
        self, host: Host, config_path: Optional[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config_path = config_path
        self.retries = Retries(host.log, clock)
        self.document: Optional[str] = None  # the master's
        self.master: Optional[State] = None  # what it says
        self.missed_polls = 0
        self.started = False  # the first full round is over
        self.next_full_round = 0.0
        self.disconnected: Dict[str, str] = {}
        self.problems: List[Dict[str, str]] = []
        self.serving = False  # the proxy's port was open after the last full round
        self.restarts: Optional[int] = None  # of the proxy's container when it ran last
        self.configure(host)

    def configure(self, host: Host) -> None:
        """Work with this configuration; raise, and change nothing, when it tells no label."""
        limit = host.config.command_timeout_secs
        host = host._replace(command_timeout=SLAVE_TIMEOUT_SECS if limit is None else limit)
        self.reporter = Reporter(host, slave_label(host.config.proxy))
        self.host = host
        self.poll = Poll(host.log, master_url(host.config))

    def round(self) -> List[Dict[str, str]]:
        """Make this machine what the master state says, as far as possible, report, and return it.

        What is returned is what is wrong, each with its deploy and endpoint.
        """
        self.retries.begin_round()
        reasons: List[str] = []
        if not self.started:  # a reboot's work waits for no S3
            self.retries.done.add(failure_key(Chore.CONFIGURE))
            reasons = self.reconcile(None)
        master = None
        news = False
        try:
            news = self.poll_master()
            master = self.master
            self.missed_polls = 0
        except (C2Error, OSError) as e:
            self.missed_polls += 1
            reasons.append(f"{e}; nothing is changed here")
        times = [self.next_full_round, *(f.due for f in self.retries.failures.values())]
        proxy_died = self.serving and not listening(self.host.config.proxy.http_port)
        if news or proxy_died or min(times) <= self.retries.began:
            refusals = self.reconcile(master)
            self.started = not refusals
            self.next_full_round = self.retries.began + HEARTBEAT_SECS if self.started else 0.0
            reasons += refusals
        for reason in reasons:
            self.host.log.warn("slave", reason)
        self.problems = [{"message": reason} for reason in reasons] + [
            dict(task_subject(task), message=failure.reason)
            for (_, task), failure in self.retries.failures.items()
        ]
        self.reporter.report(self.problems)
        return self.problems

    def poll_master(self) -> bool:
        """Read the master state; tell whether it is another one than before."""
        url = master_url(self.host.config)
        try:
            document: Optional[str] = self.poll.read()
        except Missing:
            if load_state(self.host.config).deploys:
                raise C2Error(f"{url} is not there, though this machine runs deploys") from None
            document = None  # a fleet that has nothing to run yet
        if document == self.document and self.master:
            return False
        self.master = State() if document is None else decode_master(document, url)
        self.document = document
        return True

    def reconcile(self, master: Optional[State]) -> List[str]:
        """Do what is to be done, with the host's lock; return why that was not possible."""
        try:
            with locked(self.host, 60, verb="slave-update"):
                self.host.log.begin_round()
                try:
                    do_tasks(self.retries, lambda: self.observe(master), self.perform)
                except Interrupted:
                    observed = self.observe(master)
                    for task in starmap(Connect, observed.disconnected.items()):
                        self.retries.attempt(task, self.perform, task, observed)
                    raise
                observed = self.observe(master)._replace(master=self.master)
                self.retries.keep(unfinished(observed))
                self.serving = listening(self.host.config.proxy.http_port)
            return []
        except (C2Error, OSError) as e:
            return [str(e)]

    def observe(self, master: Optional[State]) -> Observed:
        """See what there is, with what was killed finished or rolled back."""
        self.retries.attempt(Chore.RECOVER, recover, self.host)
        config = self.host.config
        state = load_state(config)
        rebooted = read_file(config.proxy_path("boot")) != boot_id()
        deploys = sorted(state.deploys.values()) if rebooted else []
        self.disconnected = still_disconnected(self.disconnected, state, master)
        return Observed(
            config.end_points,
            master,
            state,
            self.retries.done,
            blocked=[name[: -len(".json")] for name in list_dir(config.proxy_path("blocked"))],
            rebooted=rebooted,
            down=[deploy for deploy in deploys if not listening(deploy.port)],
            proxy=bool(state.connections)
            or os.path.exists(config.proxy_path("docker-compose.yml")),
            disconnected=self.disconnected,
        )

    def perform(self, task: Task, observed: Observed) -> None:
        """Do a task; raise when it fails."""
        host = self.host
        state = load_state(host.config)
        if task is Chore.CONFIGURE:
            config = load_config(self.config_path, lambda message: None)
            require_remote(config, "slave-update")
            if config != host.config:
                host.log.info("config", "the configuration has changed")
                self.configure(host._replace(config=config))
        elif isinstance(task, Unblock):
            retry_blocked(host, task.label)
        elif task is Chore.FINISH_BOOT:
            replace_file(host.config.proxy_path("boot"), boot_id())
        elif task is Chore.KEEP_PROXY:
            self.keep_proxy(state)
        elif isinstance(task, TryRelease):
            try_release(host, task.deploy)
        elif isinstance(task, Connect):
            apply_connect(host, task, state)
        elif not isinstance(task, Chore):
            master = observed.master or state
            if isinstance(task, Disconnect) and is_outage(observed.end_points, task, master):
                label = state.connections[task.end_point]
                self.disconnected[task.end_point] = label
                self.retries.forget(Connect(task.end_point, label))  # if it was not ready before
                host.log.warn(
                    "outage",
                    f"{task.end_point} answers 503 until {master.connections[task.end_point]} "
                    "runs, whose label or port is still held by what is connected",
                    endpoint=task.end_point,
                )
            require_port(task)
            apply_actions(host, [task], state)

    def keep_proxy(self, state: State) -> None:
        """Make the proxy serve `state`, and run if it does not.

        That it had died is a failure also where it runs again: so the record tells of it, and of
        one that dies again and again for as long as it does, with growing pauses.
        """
        config = self.host.config
        found = inspect_proxy(config, container_name(config))
        death = proxy_death(self.restarts, found)
        if death:
            death += f": {recent_nginx_errors(found.name)}" if found.directory else ""
            # The heartbeat may come before it runs again.
            self.problems = [*self.problems, {"message": death}]
        route(self.host, state)
        if not found.running:
            found = inspect_proxy(config, container_name(config))
        self.restarts = found.restarts
        if death:
            raise C2Error(f"{death}; it runs again")


# --------------------------------------------------------------------------------------------------
# Commands: each takes the parsed arguments, and before them the host where it needs one
# --------------------------------------------------------------------------------------------------


Argument = Tuple[Tuple[str, ...], JsonObject]  # of argparse's add_argument


class Command(NamedTuple):
    function: Callable[..., None]
    summary: str  # what it does in one line
    example: str
    arguments: Tuple[Argument, ...]
    host: bool  # whether it needs one, and so a configuration


COMMANDS: Dict[str, Command] = {}


def subcommand(
    summary: str, example: str, *arguments: Argument, host: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of the function cmd_NAME."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__[len("cmd_") :].replace("_", "-")
        COMMANDS[name] = Command(function, summary, example, arguments, host)
        return function

    return register


def argument(*names: str, **settings: Any) -> Argument:
    return names, settings


def amount(
    kind: Callable[[str], float], least: float = 0, most: int = 10**9
) -> Callable[[str], float]:
    """Make an argparse type: a number in these bounds, which no clock or memory overflows."""

    def parse_amount(text: str) -> float:
        import argparse

        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most}")

    return parse_amount


RELEASE = argument("release", metavar="RELEASE", help="its name in the store; .zip may be left out")
DEPLOY = argument("deploy", metavar="DEPLOY", help="its label, or its release")
ONLY_END_POINT = argument(
    "end_point", metavar="ENDPOINT", nargs="?", help="may be left out when there is only one"
)
FORCE = argument("--force", action="store_true", help="connect even a deploy that is not ready")
LOCK_WAIT = argument(
    "--lock-wait",
    type=amount(float),
    default=60,
    metavar="SECS",
    help="how long to wait for another c2 on this host (default: 60)",
)
WAIT = argument(
    "--wait",
    type=amount(float),
    metavar="SECS",
    help="wait until the machines of the fleet have followed, at most so long; 1 with those that "
    "have not",
)
JSON = argument("--json", "--json-output", action="store_true", dest="json", help="print JSON")


def wanted_state(config: Config) -> State:
    """Return the state that commands are about: the fleet's, else this host's."""
    return read_master(config)[0] if config.remote else host_state(config)


def require_proxy(config: Config, what: str) -> None:
    if not config.has_proxy:
        raise ConfigError(f"{what} needs the proxy, but deployMode is noproxy; see c2 help")


def change_state(
    host: Host,
    args: "Namespace",
    choose: Callable[[State], Sequence[Action]],
    subject: Callable[[State], str] = lambda state: "",
    **about: Any,
) -> None:
    """Decide on the state and act on it: on this host, or in a fleet on the master state.

    subject: tells the label whose failed recovery is tried again first; about: for the lock's
    holder, and with the actions what `--wait` waits for.
    """
    if host.config.remote:
        state, actions = change_master(host, choose)
        if args.wait is not None:
            subjects = [about, *(log_fields(part) for a in actions for part in parts_of(a))]
            labels = {a["deploy"] for a in subjects if "deploy" in a}
            end_points = {a["endpoint"] for a in subjects if "endpoint" in a}
            await_fleet(host, args.wait, asked_by(state, labels, end_points))
        return
    with changing(host, args.lock_wait, **dict({"verb": args.command}, **about)):
        retry_blocked(host, subject(host_state(host.config)))
        state = host_state(host.config)
        apply_actions(host, choose(state), state)


def warn_of_certificate(host: Host, end_point: str) -> None:
    problem = status_certificates(host.config).get(end_point)
    if isinstance(problem, str):
        host.log.warn("certificate", f"{end_point}: {problem}", endpoint=end_point)


StartRule = Callable[[State, Deploy, Callable[[Deploy], bool]], Sequence[Action]]


def start_release(
    host: Host, args: "Namespace", release: str, name: str, rule: StartRule = start_actions
) -> None:
    """Do what `rule` says of the start of a release under the label `name`."""
    config = host.config
    remote = config.remote is not None
    check_label(name, State())
    if remote:
        require_release(config, release)

    def allocate_port(state: State) -> int:
        ports = {d.port for d in state.deploys.values()}
        return next_port(
            config.proxy.dynamic_port_range,
            state.last_port,
            lambda port: port in ports or not remote and port_taken(port),
        )

    def choose(state: State) -> Sequence[Action]:
        deploy = state.deploys.get(name)
        if not deploy or deploy.release != release or deploy.has_port != config.has_proxy:
            deploy = Deploy(name, release, allocate_port(state) if config.has_proxy else 0)
        actions = rule(state, deploy, lambda d: remote or listening(d.port))
        if not any(isinstance(part, STARTS) for action in actions for part in parts_of(action)):
            say(f"{name} ({release}) runs already, on port {deploy.port}")
        return actions

    change_state(host, args, choose, lambda state: name, verb="start", deploy=name, release=release)


@subcommand(
    "start a release",
    "c2 start web-1.4.zip",
    RELEASE,
    argument(
        "deploy",
        metavar="DEPLOY",
        nargs="?",
        help="label of the deploy (default: RELEASE less its extension)",
    ),
    argument(
        "--ready",
        action="store_true",
        help="fail, and roll back, when it is not ready within readyTimeoutSecs",
    ),
    LOCK_WAIT,
    WAIT,
)
def cmd_start(host: Host, args: "Namespace") -> None:
    config = host.config
    release = find_release(config, args.release)
    name = stem(release) if args.deploy is None else args.deploy

    def ready_or_none(state: State, deploy: Deploy, runs: Callable[[Deploy], bool]) -> List[Action]:
        actions: Any = start_actions(state, deploy, runs)
        problem = "" if actions else readiness_problem(config, deploy)
        if problem:
            raise Refused(problem)
        return [Rollout(deploy, start) for start in actions]

    if args.ready:
        require_proxy(config, "start --ready")
        if config.remote:
            raise ConfigError("each machine of a fleet asks for itself; say c2 start --wait SECS")
    start_release(host, args, release, name, ready_or_none if args.ready else start_actions)


@subcommand(
    "start a release, connect it when it is ready, and stop what is older",
    "c2 deploy web-1.4",
    RELEASE,
    argument(
        "end_points",
        metavar="ENDPOINT",
        nargs="*",
        help="may be left out when there is only one, and without the proxy",
    ),
    argument("--all", action="store_true", help="connect every endpoint"),
    argument(
        "--keep",
        type=amount(int),
        default=1,
        metavar="N",
        help="do not stop the newest N deploys that no endpoint is connected to, nor, unless N is "
        "0, those to which c2 rollback leads (default: 1)",
    ),
    LOCK_WAIT,
    WAIT,
)
def cmd_deploy(host: Host, args: "Namespace") -> None:
    config = host.config
    release = find_release(config, args.release)
    name = stem(release)
    if not config.has_proxy:
        if args.end_points or args.all:
            raise Refused("without the proxy there are no endpoints; say c2 deploy RELEASE")
        return start_release(host, args, release, name)
    if args.all and args.end_points:
        raise ConfigError("say which endpoints, or --all, but not both")
    names = sorted(config.end_points) if args.all else args.end_points or [None]
    end_points = sorted({find_end_point(config, end_point) for end_point in names})

    def rule(state: State, deploy: Deploy, runs: Callable[[Deploy], bool]) -> List[Action]:
        actions = deploy_actions(state, deploy, end_points, args.keep, utc_now(), runs)
        blocked = [stem(file) for file in list_dir(config.proxy_path("blocked"))]
        return [a for a in actions if not (isinstance(a, Destroy) and a.deploy.label in blocked)]

    start_release(host, args, release, name, rule)
    for end_point in end_points:
        warn_of_certificate(host, end_point)


@subcommand(
    "stop and remove a deploy; refused while an endpoint is connected to it",
    "c2 stop web-1.3",
    DEPLOY,
    argument("--force", action="store_true", help="even if its stop command fails"),
    LOCK_WAIT,
    WAIT,
)
def cmd_stop(host: Host, args: "Namespace") -> None:
    config = host.config
    start: JsonObject = {}  # that is under way, and is cancelled instead
    if config.remote:
        return change_state(host, args, lambda state: stop_actions(state, args.deploy, args.force))

    def cancels(holder: JsonObject) -> bool:
        names = (holder.get("deploy"), holder.get("release"), stem(str(holder.get("release"))))
        start.update(holder)
        return holder.get("verb") == "start" and args.deploy in names

    with changing(
        host, args.lock_wait, cancels=cancels, verb="stop", deploy=args.deploy
    ) as cancelled:
        state = host_state(config)
        if cancelled:
            label = start["deploy"]
            release = start["release"]
            if label not in state.deploys or state.deploys[label].release != release:
                message = f"the start of {label} ({release}) was cancelled"
                host.log.info("cancelled", message, deploy=label, release=release)
                return
        blocked = config.proxy_path("blocked", f"{args.deploy}.json")
        if args.force and re.fullmatch(LABEL, args.deploy) and os.path.exists(blocked):
            os.unlink(blocked)
            host.log.warn("unblock", f"{args.deploy} is not blocked any more", deploy=args.deploy)
            if args.deploy not in state.deploys:
                if config.has_proxy:
                    remove(config.path(args.deploy))
                return clean_up(host)
        actions = stop_actions(state, args.deploy, args.force)
        retry_blocked(host, actions[0].deploy.label)
        apply_actions(host, actions, state)


def connect(
    host: Host, args: "Namespace", end_point: str, target: Callable[[State], Deploy]
) -> None:
    """Point an endpoint at the deploy that `target` finds in the state."""
    config = host.config

    def choose(state: State) -> List[Action]:
        deploy = target(state)
        if not deploy.has_port:
            raise Refused(
                f"{deploy.label} was started without the proxy and has no port; "
                f"c2 start {deploy.release} {deploy.label} gives it one"
            )
        problem = "" if config.remote else readiness_problem(config, deploy)
        if problem and not args.force:
            before = state.connections.get(end_point)
            stays = f"; {end_point} stays on {before}" if before else ""
            raise Refused(f"{problem}{stays}; --force connects it all the same")
        if problem:
            message = f"{problem}; connecting it all the same"
            host.log.warn("not-ready", message, endpoint=end_point, deploy=deploy.label)
        return [Connect(end_point, deploy.label)]

    change_state(host, args, choose, lambda state: target(state).label, endpoint=end_point)
    warn_of_certificate(host, end_point)


@subcommand(
    "point an endpoint at a running deploy",
    "c2 connect main web-1.4",
    ONLY_END_POINT,
    DEPLOY,
    FORCE,
    LOCK_WAIT,
    WAIT,
)
def cmd_connect(host: Host, args: "Namespace") -> None:
    require_proxy(host.config, "connect")
    end_point = find_end_point(host.config, args.end_point)
    connect(host, args, end_point, lambda state: find_deploy(state, args.deploy))


@subcommand(
    "take an endpoint off: it answers 503",
    "c2 disconnect main",
    argument("end_point", metavar="ENDPOINT"),
    LOCK_WAIT,
    WAIT,
)
def cmd_disconnect(host: Host, args: "Namespace") -> None:
    require_proxy(host.config, "disconnect")
    end_point = args.end_point

    def choose(state: State) -> List[Action]:
        if end_point not in state.connections:  # one may be connected that is configured no more
            find_end_point(host.config, end_point)
        return [Disconnect(end_point)]

    change_state(host, args, choose, endpoint=end_point)


@subcommand(
    "connect the endpoint to the deploy before; without the proxy: start the release before",
    "c2 rollback main",
    ONLY_END_POINT,
    FORCE,
    LOCK_WAIT,
    WAIT,
)
def cmd_rollback(host: Host, args: "Namespace") -> None:
    config = host.config
    if not config.has_proxy:
        before = host_state(config).previous.get(CURRENT)
        if args.end_point:
            raise Refused("without the proxy there are no endpoints; say c2 rollback")
        if not before:
            raise Refused("no other release has run before; there is nothing to go back to")
        return start_release(host, args, before.release, before.label)
    end_point = find_end_point(config, args.end_point)
    connect(host, args, end_point, lambda state: rollback_target(state, end_point))


@subcommand(
    "show endpoints and deploys",
    "c2 status",
    argument(
        "--show-slaves", action="store_true", help="and what each machine of the fleet reports"
    ),
    argument(
        "--watch",
        type=amount(float, 0.1),
        metavar="SECS",
        help="show it again and again (a fleet's)",
    ),
    JSON,
)
def cmd_status(host: Host, args: "Namespace") -> None:
    config = host.config
    if args.show_slaves or args.watch or config.remote:
        require_remote(config, "status --show-slaves")
        return show_fleet(host, args)
    state = host_state(config)
    certificates = status_certificates(config)
    now = time.time()
    due = due_for_proxy(config) if config.has_proxy else []
    if args.json:
        plain = {
            name: {"names": c.names, "notAfter": utc_now(c.ends), "daysLeft": c.days_left(now)}
            if isinstance(c, Certificate)
            else {"error": c}
            for name, c in certificates.items()
        }
        report = {"master": encode(state), "certificates": plain, "proxy": {"due": due}}
        emit(json.dumps(report, indent=2) + "\n")
        return
    runs = {
        name: listening(deploy.port) for name, deploy in state.deploys.items() if deploy.has_port
    }
    lines = certificate_lines(
        certificates, now, sys.stdout.isatty() and "NO_COLOR" not in os.environ
    )
    emit(printable_output(status_text(config, state, runs, lines, due)) + "\n")
    report_unfinished(config)


@subcommand(
    "wait until every machine of the fleet reports the master's state",
    "c2 wait 300",
    argument(
        "secs",
        metavar="SECS",
        type=amount(float),
        nargs="?",
        default=300,
        help="at most (default: 300)",
    ),
)
def cmd_wait(host: Host, args: "Namespace") -> None:
    require_remote(host.config, "wait")
    await_fleet(host, args.secs)


@subcommand(
    "make this machine match the master state",
    "c2 slave-update --repeat 10",
    argument(
        "--repeat",
        type=amount(float, 0.1),
        metavar="SECS",
        help="for ever, looking every SECS seconds",
    ),
)
def cmd_slave_update(host: Host, args: "Namespace") -> None:
    import random
    import threading

    require_remote(host.config, "slave-update")
    slave = Slave(host, getattr(args, "config", None))

    def beat() -> None:
        slave.reporter.report(slave.problems, anyway=True)

    threading.Thread(target=heartbeat, args=(host.log, beat), daemon=True).start()
    while args.repeat:
        survive(host.log, slave.round)
        missed = min(slave.missed_polls, 10)  # then the master's state is asked for less often
        pause = min(args.repeat * 2**missed, max(args.repeat, HEARTBEAT_SECS))
        time.sleep(pause * random.uniform(0.8, 1.2))
    problems = slave.round()
    if problems:
        raise C2Error("; ".join(p["message"] for p in problems))
    host.log.info("slave", f"{slave.reporter.label} is what {master_url(host.config)} says")


@subcommand("remove the records of slaves that are gone for 5 minutes", "c2 slave-flush")
def cmd_slave_flush(host: Host, args: "Namespace") -> None:
    config = host.config
    require_remote(config, "slave-flush")
    with scratch() as directory:
        records = read_records(config, directory)
    stale = [r.label for r in records if r.moment and r.age > FLUSH_SECS]
    foreign = [r.label for r in records if not r.moment]
    if foreign:
        host.log.warn("flush", f"passed over what is no slave's: {', '.join(foreign)}")
    for i in range(0, len(stale), 1000):  # as many as one request takes
        urls = [remote_url(config, "slaves", name, "state.json") for name in stale[i : i + 1000]]
        keys = [{"Key": s3_object(url)[-1]} for url in urls]
        bucket = s3_object(urls[0])[:2]
        with scratch() as directory:
            path = os.path.join(directory, "keys.json")
            replace_file(path, json.dumps({"Objects": keys, "Quiet": True}))
            delete = ["--delete", f"file://{path}", "--output", "json"]
            answer = aws("s3api", "delete-objects", *bucket, *delete)
        errors = json.loads(answer or "{}").get("Errors")
        if errors:
            raise C2Error(f"{errors[0].get('Key')} can't be removed: {errors[0].get('Message')}")
    names = "".join(f"\n  {name}" for name in stale)
    host.log.info("flush", f"removed {len(stale)} slave records older than {FLUSH_SECS} s{names}")


@subcommand(
    "remove what no deploy needs: old releases' directories, and what kills have left",
    "c2 prune --keep 5",
    argument(
        "--keep",
        type=amount(int),
        default=3,
        metavar="N",
        help="without the proxy: the newest N stay, and what runs and what ran before (default: 3)",
    ),
    argument("--dry-run", action="store_true", help="only print what would be removed"),
    LOCK_WAIT,
)
def cmd_prune(host: Host, args: "Namespace") -> None:
    config = host.config
    if args.dry_run:
        paths = [*list_garbage(config), *list_unneeded(config, args.keep)]
        sizes = {path: disk_usage(path) for path in paths}
        emit("".join(f"remove {path}: {size_text(size)}\n" for path, size in sizes.items()))
        say(f"this would free {size_text(sum(sizes.values()))}")
        return report_unfinished(config)
    freed = 0
    with locked(host, args.lock_wait, verb="prune"):
        sizes = {path: disk_usage(path) for path in list_garbage(config)}
        recover(host)  # which removes these
        sizes.update((path, disk_usage(path)) for path in list_unneeded(config, args.keep))
        for path, size in sizes.items():
            remove_unneeded(config, path)
            freed += size
            host.log.info("prune", f"removed {path}: {size_text(size)}")
    host.log.info("pruned", f"freed {size_text(freed)}")


@subcommand(
    "list the releases in the store, newest first, and what runs",
    "c2 list-releases",
    argument("--json", "--json-output", action="store_true", dest="json", help="print their names"),
)
def cmd_list_releases(host: Host, args: "Namespace") -> None:
    config = host.config
    releases = release_store(config).releases()
    if args.json:
        names = [release.name for release in releases]
        return emit(readable_json(names, indent=2) + "\n")
    state = State()
    try:
        state = wanted_state(config)
    except (C2Error, OSError) as e:
        say(f"warning: what runs is not known: {e}")
    emit(releases_text(releases, state))


@subcommand(
    "show what c2 has done",
    "c2 show-log -n 20 --follow",
    argument("-n", type=amount(int), dest="number", metavar="N", help="only the last N entries"),
    argument("--follow", action="store_true", help="go on with new entries"),
    argument("--json", action="store_true", help="print the entries as they are stored"),
)
def cmd_show_log(host: Host, args: "Namespace") -> None:
    from collections import deque

    path = host.config.log_file

    def readable(line: str) -> str:
        """Give a line for an event, with the output of a failed command below."""
        if args.json:
            return printable(line)
        try:
            entry = json.loads(line)
            where = f"{entry['time']} {entry['level']:7} {entry['command']}: {entry['message']}"
            output = "".join(f"\n    | {o}" for o in entry.get("output", "").splitlines())
            return printable(where.replace("\n", "\n    ") + output) + "\n"
        except (ValueError, KeyError, TypeError, AttributeError):
            return printable(line)

    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as f:
            for line in deque(f, args.number):
                emit(readable(line))
            while args.follow:
                line = f.readline()
                if line:
                    emit(readable(line))
                else:
                    time.sleep(0.2)
    except FileNotFoundError:
        say(f"there is no log yet at {path}")


@subcommand(
    "download the config sources into the context cache",
    "c2 fetch-context --retry",
    argument("--retry", action="store_true", help="wait until they all exist"),
)
def cmd_fetch_context(host: Host, args: "Namespace") -> None:
    fetch_context(host, args.retry)


@subcommand(
    "download, unpack and expand a release, and run nothing",
    "c2 unpack web-1.4.zip /tmp/look",
    RELEASE,
    argument("dir", metavar="DIR", help="a new directory"),
)
def cmd_unpack(host: Host, args: "Namespace") -> None:
    import tempfile

    directory = os.path.abspath(args.dir)
    if list_dir(directory):
        raise C2Error(f"{directory} is not empty; give a new directory")
    release = find_release(host.config, args.release)
    fetch_context(host)
    parent, name = os.path.split(directory)
    make_dir(parent)
    with tempfile.TemporaryDirectory(prefix=f"{name}.", suffix="~", dir=parent) as private:
        prepare_release(host, release, os.path.join(private, name), load_context(host))
        os.replace(os.path.join(private, name), directory)
    host.log.info("unpack", f"unpacked {release} into {directory}", release=release)


@subcommand(
    "check a release in a directory, and make its archive and ARCHIVE.sha256",
    "c2 pack web-1.4",
    argument("dir", metavar="DIR", help="has release.json; all in it is packed, but .git"),
    argument(
        "archive",
        metavar="ARCHIVE",
        nargs="?",
        help="outside of DIR (default: DIR's name and .zip, in the current directory)",
    ),
    argument("--check", action="store_true", help="only check"),
    host=False,
)
def cmd_pack(args: "Namespace") -> None:
    """Make a release archive: the same content gives the same bytes."""
    directory = os.path.abspath(args.dir)
    archive = args.archive or os.path.basename(directory) + ".zip"
    decode(ReleaseName, os.path.basename(archive), Location("ARCHIVE"))
    if inside(archive, directory) and not args.check:
        raise C2Error(
            f"{archive} would lie in {args.dir}, and the next archive contain it; "
            f"give another place: c2 pack {args.dir} ARCHIVE"
        )

    def warn(message: str) -> None:
        say(f"warning: {args.dir}: {message}")

    members = check_packable(args.dir, warn)
    count = sum(member.kind != "dir" for member in members)
    files = f"{count} file" + "s" * (count != 1)
    if args.check:
        say(f"{args.dir} is a sound release: {files}")
    else:
        checksum = pack_release(args.dir, members, archive)
        size = os.path.getsize(archive)
        say(f"packed {files} into {archive}: {size:,} bytes, sha256 {checksum[:12]}…")


@subcommand(
    "expand one template with the context",
    "c2 expand-template app.conf.tpl app.conf",
    argument("template", metavar="TEMPLATE"),
    argument("out", metavar="OUT"),
)
def cmd_expand_template(host: Host, args: "Namespace") -> None:
    def warn(message: str) -> None:
        say(f"warning: {message}")

    context = load_context(host)
    expand_file(args.template, args.out, context, warn, args.template, write=write_output)


@subcommand(
    "print the built-in nginx template", "c2 show-default-nginx-config > nginx.conf.tpl", host=False
)
def cmd_show_default_nginx_config(args: "Namespace") -> None:
    emit(NGINX_TEMPLATE)


@subcommand("bring the proxy up with what the state says", "c2 restart-frontend-proxy", LOCK_WAIT)
def cmd_restart_frontend_proxy(host: Host, args: "Namespace") -> None:
    require_proxy(host.config, "restart-frontend-proxy")
    with changing(host, args.lock_wait, verb="restart-frontend-proxy"):
        route(host, load_state(host.config), renew=True)
        install_certificates(host, strict=True)
        host.log.info("proxy", "the proxy runs and serves the state")


@subcommand("take the proxy down", "c2 shutdown-frontend-proxy", LOCK_WAIT)
def cmd_shutdown_frontend_proxy(host: Host, args: "Namespace") -> None:
    require_proxy(host.config, "shutdown-frontend-proxy")
    with changing(host, args.lock_wait, verb="shutdown-frontend-proxy"):
        name = container_name(host.config)
        if inspect_proxy(host.config, name).directory:
            compose(host.config, name, "down")
        alone = "c2 connect or c2 restart-frontend-proxy bring"
        up = "slave-update brings" if host.config.remote else alone
        host.log.info("proxy", f"the proxy is down; {up} it up again")


@subcommand(
    "obtain the certificate of the https endpoints, or renew it when due, and serve it",
    "c2 generate-ssl-certificate",
    LOCK_WAIT,
)
def cmd_generate_ssl_certificate(host: Host, args: "Namespace") -> None:
    check_generated(host.config)
    with changing(host, args.lock_wait, verb="generate-ssl-certificate"):
        generate_certificate(host, load_state(host.config))


@subcommand(
    "print a docker login command line for ECR",
    'eval "$(c2 aws-docker-login-cmd)"',
    argument(
        "registry_id", metavar="REGISTRY_ID", nargs="?", help="an AWS account (default: your own)"
    ),
    host=False,
)
def cmd_aws_docker_login_cmd(args: "Namespace") -> None:
    import base64

    ids = []
    if args.registry_id:
        ids = ["--registry-ids", decode(AwsAccount, args.registry_id, Location("REGISTRY_ID"))]
    data = json.loads(aws("ecr", "get-authorization-token", *ids, "--output", "json"))[
        "authorizationData"
    ]
    user, _, password = base64.b64decode(data[0]["authorizationToken"]).decode().partition(":")
    registry = re.sub("^https?://", "", data[0]["proxyEndpoint"])
    login = show_args(["docker", "login", "-u", user, "--password-stdin", registry])
    # printf is the shell's own, so that no list of processes shows the password.
    emit(f"{show_args(['printf', '%s', password])} | {login}\n")


MANUAL = """

Each command has --help, with its options. All take --config PATH and --debug. Exit codes: 0 done;
1 failed, and what was changed was put back or is named; 2 wrong usage or configuration; 3 refused
by a rule (connected, not running, not ready, locked); 130 and 143 after Ctrl-C and SIGTERM.

A release is a zip archive, made by c2 pack, with release.json at its root:
  {"prestartCommand": "", "startCommand": "docker compose up -d",
   "stopCommand": "docker compose down", "templates": ["docker-compose.yml.tpl"]}
Each template x.tpl is expanded with mustache to x: {{ports.http}} is the deploy's port,
{{NAME.key}} comes from the config source NAME. The commands run in the deploy's directory with
C2_RELEASE, C2_DEPLOY and C2_PORT. A start command must return; a server that it leaves in the
background lives on.

The configuration is --config, else $CAMUS2_CONFIG, else ../etc/camus2.json or ../etc/camus2.yaml
beside c2.
Relative paths in it start from its own directory. On one host, without the proxy:
  releases:
    localdir: /srv/releases          # or s3: s3://bucket/prefix, or http: https://host/path
  deploysDir: /opt/deploys
  logFile: /opt/var/log/camus2.log
  configSources:
    app: {file: /etc/app.json}       # or s3:, awsSecretArn:, http:
and with it:
  deployMode:
    proxy:
      endPoints:
        main:
          serverNames: [www.example.com]
          etype: httpOnly            # or {httpsWithRedirect: generated}
      dynamicPortRange: [8000, 8100]
      remoteStateS3: s3://bucket/prefix   # for a fleet: commands change the state there, and each
                                          # machine follows with c2 slave-update --repeat 10

Blue/green:
  c2 deploy web-1.4 main             # start it beside the one that serves, switch when it is ready,
                                     # and stop what is older than the one that served before
  c2 rollback main                   # back to that one
or step by step:
  c2 start web-1.4                   # waits until it is ready
  c2 connect main web-1.4            # requests go there from now on; none is lost
  c2 stop web-1.3                    # waits for requests in flight
"""


def manual() -> str:
    """Return the page that one would print."""
    lines = ["c2 deploys versioned releases on plain hosts.", "", "Commands:"]
    for name, command in COMMANDS.items():
        words = [name]
        for names, settings in command.arguments:
            if names[0][0] != "-":
                metavar = settings["metavar"]
                words.append(f"[{metavar}]" if "nargs" in settings else metavar)
        lines += [f"  {' '.join(words)}", f"      {command.summary}"]
    return "\n".join(lines) + MANUAL


# A line of `c2 --complete WORD...` is a candidate, a tab, and what it means; / stands for files.
COMPLETION = {
    "bash": """\
FUNCTION() {
  mapfile -t COMPREPLY < <(PROGRAM --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
  COMPREPLY=("${COMPREPLY[@]%%$'\\t'*}")
  [ "${COMPREPLY[0]}" != / ] || { COMPREPLY=(); compopt -o default; }
}
complete -o nosort -F FUNCTION NAME 2>/dev/null || complete -F FUNCTION NAME
""",
    "zsh": """\
#compdef NAME
FUNCTION() {
  local -a lines
  lines=("${(@f)$(PROGRAM --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  [[ -n $lines[1] ]] || return 1
  [[ $lines[1] != / ]] || { _files; return }
  lines=("${(@)lines//:/\\\\:}")
  lines=("${(@)lines/$'\\t'/:}")
  _describe -V NAME lines
}
if [[ $funcstack[1] == FUNCTION ]]; then FUNCTION "$@"; else compdef FUNCTION NAME; fi
""",
    "fish": """\
function FUNCTION
  set -l words (commandline -opc)
  set -l lines (PROGRAM --complete $words[2..-1] (commandline -ct) 2>/dev/null)
  if test "$lines[1]" = /
    __fish_complete_path (commandline -ct)
  else
    string join \\n -- $lines
  end
end
complete -c NAME -k -f -a '(FUNCTION)'
""",
}


def completion_script(shell: str, name: str, program: str = "") -> str:
    """Return what makes a shell complete `name`, by asking `program`, else what is typed."""
    import shlex

    typed = '"$1"' if shell == "bash" else "$words[1]"
    words = {
        "FUNCTION": "_" + re.sub(r"\W", "_", name),
        "PROGRAM": shlex.quote(program) if program else typed,
        "NAME": shlex.quote(name),
    }
    return re.sub("|".join(words), lambda match: words[match.group()], COMPLETION[shell])


@subcommand(
    "print what makes a shell complete commands, options, releases, deploys and endpoints",
    "c2 completion bash > /etc/bash_completion.d/c2",
    argument("shell", metavar="SHELL", choices=[*COMPLETION], help=", ".join(COMPLETION)),
    host=False,
)
def cmd_completion(args: "Namespace") -> None:
    program = args.program or __file__
    emit(completion_script(args.shell, os.path.basename(program), args.program))


@subcommand("print the manual", "c2 help", host=False)
def cmd_help(args: "Namespace") -> None:
    emit(manual())


@subcommand("print the version", "c2 version", host=False)
def cmd_version(args: "Namespace") -> None:
    emit(VERSION + "\n")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


COMMON = (
    argument(
        "--config",
        metavar="PATH",
        help="the configuration: a file, s3://... or https://... (default: $CAMUS2_CONFIG, "
        "else ../etc/camus2.json or .yaml beside c2)",
    ),
    argument("--debug", action="store_true", help="show the programs that are run, and tracebacks"),
)
FILES = ("PATH", "DIR", "ARCHIVE", "TEMPLATE", "OUT")  # metavars


class Completion(NamedTuple):
    """What the word at the cursor may become."""

    start: str  # of the word
    words: Dict[str, str]  # with what they mean
    metavars: List[str]  # of files, and of what the machine knows
    config: Optional[str]  # the command line's


def completion(words: Sequence[str]) -> Completion:
    """Decide by COMMANDS what the last of the words after `c2` may become."""
    line: List[str] = []
    for word in words:  # bash has three words for --config=PATH
        line += word.split("=", 1) if word.startswith("--") else [word]
    if line[-1:] == ["="]:
        line.append("")
    *before, start = [word for word in line if word != "="] or [""]

    arguments = {name: settings for names, settings in COMMON for name in names}
    command = config = None
    option = ""  # whose value comes next
    position = 0
    for word in before:
        if option:
            config = word if option == "--config" else config
            option = ""
        elif word.startswith("-"):
            option = word if "action" not in arguments.get(word, {"action": ""}) else ""
        elif command:
            position += 1
        else:
            command = word
            known = COMMANDS[word].arguments if word in COMMANDS else ()
            arguments.update((name, settings) for names, settings in known for name in names)

    values: List[Dict[str, Any]] = []
    if option:
        values = [arguments[option]]
    elif start.startswith("-"):
        options = {k: v["help"] for k, v in arguments.items() if k.startswith("-")}
        return Completion(start, {**options, "--help": "show how it is used"}, [], config)
    elif not command:
        return Completion(start, {k: v.summary for k, v in COMMANDS.items()}, [], config)
    else:
        positional = [v for k, v in arguments.items() if not k.startswith("-")]
        again = [settings for settings in positional[-1:] if settings.get("nargs") == "*"]
        for settings in positional[position:] or again:
            values.append(settings)
            if "nargs" not in settings:  # one that may be left out leads to the next
                break
    choices = {choice: "" for settings in values for choice in settings.get("choices", ())}
    return Completion(start, choices, [settings["metavar"] for settings in values], config)


def names_for(option: Optional[str], metavars: Sequence[str]) -> List[str]:
    """List the names that this machine knows for arguments, with this --config."""
    config = load_config(option, warn=lambda message: None)
    names: List[str] = []
    if "ENDPOINT" in metavars:
        names += sorted(config.end_points)
    if "DEPLOY" in metavars:
        names += sorted(wanted_state(config).deploys)
    if "RELEASE" in metavars:
        names += [release.name for release in release_store(config).releases()]
    return names


def ask_in_background(ask: Callable[[], List[str]], cache: str) -> List[str]:
    """Return what `ask` gives within COMPLETION_SECS, else what it gave last; it goes on."""
    import select

    reader, writer = os.pipe()
    if not os.fork():
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2, reader):  # a shell waits for whoever has its pipe
                os.dup2(null, fd)
            signal.alarm(60)
            answer = json.dumps(ask())
            with contextlib.suppress(OSError):
                make_dir(os.path.dirname(cache), 0o700)
                replace_file(cache, answer, 0o600)
            with open(writer, "w") as f:
                f.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    output = b""
    with open(reader, "rb", 0) as f:
        for left in attempts(COMPLETION_SECS, 0):
            if not select.select([f], [], [], max(0, left))[0]:
                break
            chunk = f.read(1 << 16)
            output += chunk
            if not chunk:
                break
    with contextlib.suppress(ValueError):
        return list(json.loads(output))
    with contextlib.suppress(ValueError, OSError, C2Error):
        return list(json.loads(read_file(cache) or "[]"))
    return []


def complete(words: Sequence[str]) -> str:
    """Return what `c2 --complete WORD...` prints."""
    import hashlib

    start, found, metavars, option = completion(words)
    if {*metavars} & {*FILES}:
        return "/\n"
    if {*metavars} & {"ENDPOINT", "DEPLOY", "RELEASE"}:
        with contextlib.suppress(C2Error):
            path = find_config(option)
            about = [path if "://" in path else os.path.abspath(path), *metavars]
            home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            digest = hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape"))
            cache = os.path.join(home, "c2", digest.hexdigest())
            for name in ask_in_background(lambda: names_for(option, metavars), cache):
                if re.fullmatch(r"\w[\w.+@%,-]*", name):  # which no shell has to quote
                    found[name] = ""
    lines = [f"{k}\t{v}".rstrip() for k, v in found.items() if k.startswith(start)]
    return "".join(line + "\n" for line in lines)


def parser() -> "ArgumentParser":
    """Make the parser of the command line from COMMANDS."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> "NoReturn":
            choice = re.search(r"argument COMMAND: invalid choice: '([^']*)'", message)
            if choice:
                name = choice.group(1)
                message = f"there is no command {name}{nearest(name, COMMANDS)}"
            elif re.match("unrecognized arguments: [^-]", message):  # `connect main --force web`
                message += " (options stand before or after the names, not between them)"
            self.exit(2, f"c2: {printable(message)}; see {self.prog} --help\n")

    common = Parser(add_help=False)
    for names, settings in COMMON:
        common.add_argument(*names, default=argparse.SUPPRESS, **settings)
    top = Parser(
        prog="c2",
        parents=[common],
        description="Deploy versioned releases on plain hosts.",
        epilog="c2 COMMAND --help explains a command, c2 help prints the manual.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=VERSION)
    top.add_argument("--bash-completion-script", dest="program", help=argparse.SUPPRESS)  # camus2
    subs = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = subs.add_parser(
            name,
            parents=[common],
            help=command.summary,
            allow_abbrev=False,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=f"Example: {command.example}",
        )
        for names, settings in command.arguments:
            sub.add_argument(*names, **settings)
    return top


def interrupt(signum: int, frame: object) -> None:
    raise Interrupted(signum)


def run_parsed(args: "Namespace") -> None:
    """Run the parsed command with its host."""
    command = COMMANDS[args.command]
    if not command.host:
        return command.function(args)
    config = load_config(getattr(args, "config", None))
    if getattr(args, "wait", None) is not None and not config.remote:
        raise ConfigError(
            "--wait waits for the machines of a fleet, but remoteStateS3 is not configured"
        )
    check_log_file(config.log_file)
    names = [getattr(args, key, None) for key in ("deploy", "end_point", "release")]
    command_line = " ".join([args.command, *filter(None, names)])
    host = Host(config, Log(config.log_file, command_line), config.command_timeout_secs)
    try:
        command.function(host, args)
    except C2Error as e:
        if hasattr(args, "lock_wait") and not host.log.failed:  # refused before an action began
            host.log.event(
                "error",
                "refused" if isinstance(e, Refused) else "failed",
                str(e),
                exit=e.exit,
                output=e.output,
            )
        raise


def main(argv: Optional[List[str]] = None) -> int:
    """Run c2 with these arguments (default: the process's own) and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--complete"]:
        emit(complete(argv[1:]))
        return 0
    try:
        args = parser().parse_args(argv)
    except SystemExit as e:
        return int(e.code or 0)
    if args.program:
        args.command, args.shell = "completion", "bash"
    if not args.command:
        parser().print_help(sys.stderr)
        return 2
    debug = getattr(args, "debug", False) or bool(os.environ.get("C2_DEBUG"))
    if debug:
        os.environ["C2_DEBUG"] = "1"
    before = {s: signal.signal(s, interrupt) for s in SIGNALS}
    try:
        run_parsed(args)
        return 0
    except Interrupted as e:
        say(f"interrupted by {signal.Signals(e.signum).name}")
        return 128 + e.signum
    except BrokenPipeError:
        sys.stdout = None  # whoever read the output has gone; nothing is left to flush
        return 141
    except Exception as e:
        if debug:
            import traceback

            traceback.print_exc()
        problem, code = problem_of(e)
        say(f"error: {problem}")
        return code
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


if __name__ == "__main__":
    raise SystemExit(main())
