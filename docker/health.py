"""The image's HEALTHCHECK: exit with 0 while every worker is ready."""

import os
import sys
from http.client import HTTPConnection

host = os.environ.get("SCUMBLE_ADMIN_HOST", "127.0.0.1")
port = int(os.environ.get("SCUMBLE_ADMIN_PORT", "9000"))
connection = HTTPConnection(host, port, timeout=4)
connection.request("GET", "/readyz")
sys.exit(connection.getresponse().status != 200)
