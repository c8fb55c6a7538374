"""A load scenario: waves of honest clients, one attacker, and a client that sends bad inputs.

    scumble serve &
    locust -f loadtest/locustfile.py --headless --host http://localhost:8000

The scenario takes a little more than two minutes; `--shape-speed 10` runs it ten times as fast. Any
5xx answer, an answer that is not a distribution, or accepted bad input is a failure, and a failure
makes the exit code 1. Use it only with your own servers.
"""

from __future__ import annotations

import json
import random
from argparse import ArgumentParser
from typing import Any, ClassVar

import numpy as np
from locust import FastHttpUser, LoadTestShape, constant_throughput, events, task
from locust.env import Environment

from scumble.png import encode_png

BATCH = 64
# seconds until the end of the stage, honest clients
STAGES = [(20, 10), (60, 40), (90, 100), (110, 40), (130, 10)]
PROBLEM = "application/problem+json"


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add the option for the speed of the scenario."""
    parser.add_argument("--shape-speed", type=float, default=1.0, help="speed-up of the scenario")


class Client(FastHttpUser):
    """A user that knows the model's input."""

    abstract = True

    def on_start(self) -> None:
        """Get the model's description and make pictures of its size."""
        with self.client.get("/v1/model", catch_response=True) as answer:
            self.model: dict[str, Any] = answer.json()
        size = self.model["input"]
        shape = (BATCH, size["height"], size["width"], size["channels"])
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def png(self) -> bytes:
        """One of the pictures as a file."""
        pixels = self.pixels[random.randrange(BATCH)]  # noqa: S311  # a picture, no secret
        return encode_png(pixels)


class Honest(Client):
    """Sends one picture now and then."""

    wait_time = constant_throughput(5)

    @task
    def predict(self) -> None:
        """Send a picture and check that the answer is a distribution."""
        with self.client.post(
            "/v1/predict", self.png(), headers={"Content-Type": "image/png"}, catch_response=True
        ) as answer:
            if answer.status_code == 200:
                (row,) = (p["probabilities"] for p in answer.json()["predictions"])
                if abs(sum(row) - 1) > 1e-3 or min(row) < 0:
                    answer.failure(f"not a distribution: {row}")


class Attacker(Client):
    """Sends queries as fast as they are answered."""

    fixed_count = 1

    @task
    def query(self) -> None:
        """Send a tensor of pictures; 429 and 503 are allowed answers."""
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": "pixels",
                        "datatype": "UINT8",
                        "shape": list(self.pixels.shape),
                        "parameters": {"binary_data_size": self.pixels.nbytes},
                    }
                ]
            }
        ).encode()
        with self.client.post(
            f"/v2/models/{self.model['name']}/infer",
            head + self.pixels.tobytes(),
            headers={"Inference-Header-Content-Length": str(len(head))},
            name="/v2/models/{model}/infer",
            catch_response=True,
        ) as answer:
            if answer.status_code in (429, 503):
                answer.success()


class Careless(Client):
    """Sends invalid requests, one per kind of error."""

    fixed_count = 1
    wait_time = constant_throughput(5)
    bad: ClassVar[list[tuple[bytes, str]]] = [
        (b"", "image/png"),
        (b"no image at all", "image/png"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "image/png"),
        (b"{", "application/json"),
        (b'{"instances": [{"b64": "%%"}]}', "application/json"),
        (b"--x--", "multipart/form-data; boundary=y"),
        (b"<svg/>", "image/svg+xml"),
    ]

    @task
    def mistake(self) -> None:
        """Send an invalid request, which must be refused with a problem document."""
        body, kind = random.choice(self.bad)  # noqa: S311  # same
        with self.client.post(
            "/v1/predict",
            body,
            headers={"Content-Type": kind},
            name="/v1/predict (bad input)",
            catch_response=True,
        ) as answer:
            refused = 400 <= answer.status_code < 500
            if refused and answer.headers.get("content-type") == PROBLEM:
                answer.success()
            else:
                answer.failure(f"{answer.status_code} for {body[:20]!r} as {kind}")


class Waves(LoadTestShape):
    """Honest clients come in waves; the attacker and the careless client are always there."""

    def tick(self) -> tuple[int, float] | None:
        """Users now, and how many may start in a second."""
        environment: Environment = self.runner.environment
        now = self.get_run_time() * environment.parsed_options.shape_speed
        for end, clients in STAGES:
            if now < end:
                return clients + 2, 50.0
        return None
