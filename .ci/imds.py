"""A stand-in for the metadata service of an EC2 instance: imds.py PORT [--v1]

As IMDSv2 it answers 401 to a GET without the session token that a PUT hands out; --v1 answers
without one.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

ROLE = "c2-role"
CREDENTIALS = {
    "Code": "Success",
    "Type": "AWS-HMAC",
    "AccessKeyId": "imds",
    "SecretAccessKey": "x",
    "Token": "t",
    "LastUpdated": "2026-01-01T00:00:00Z",
    "Expiration": "2099-01-01T00:00:00Z",
}
INSTANCE = "i-0123456789abcdef0"
ANSWERS = {
    "/latest/meta-data/instance-id": INSTANCE,
    "/latest/meta-data/placement/region": "us-east-1",
    "/latest/meta-data/placement/availability-zone": "us-east-1a",
    "/latest/meta-data/iam/security-credentials/": ROLE,
    "/latest/meta-data/iam/security-credentials/" + ROLE: json.dumps(CREDENTIALS),
    "/latest/dynamic/instance-identity/document": json.dumps(
        {"instanceId": INSTANCE, "region": "us-east-1"}
    ),
}
TOKEN = "TOKEN"


class Metadata(BaseHTTPRequestHandler):
    needs_token = True

    def answer(self, status, text=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self):
        if self.path == "/latest/api/token" and self.headers.get(
            "X-aws-ec2-metadata-token-ttl-seconds"
        ):
            self.answer(200, TOKEN)
        else:
            self.answer(400)

    def do_GET(self):
        if self.needs_token and self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self.answer(401)
        elif self.path in ANSWERS:
            self.answer(200, ANSWERS[self.path])
        else:
            self.answer(404)


if __name__ == "__main__":
    Metadata.needs_token = "--v1" not in sys.argv
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Metadata).serve_forever()
