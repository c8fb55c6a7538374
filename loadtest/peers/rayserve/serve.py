"""Ray Serve: two replicas behind its HTTP proxy, with its dynamic batches."""

import os
import signal

from loadtest.peers.classifier import decode, load, ports, setting

# Else loopback becomes the interface's address. A port of each replica listens on all interfaces
# all the same; nothing is sent to it here.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Its bundle of settings for throughput, less the part that adds an HTTP port per replica.
os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1" if setting() == "tuned" else "0"
os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "0"

import numpy as np
import ray
from ray import serve
from starlette.requests import Request

TUNED = setting() == "tuned"
# Stock: its defaults, a batch of 10 and a window of 10 ms.
BATCHING = {"max_batch_size": 32, "batch_wait_timeout_s": 0.001} if TUNED else {}
DEPLOYMENT = {"max_ongoing_requests": 64} if TUNED else {}
LOGGING = {"enable_access_log": not TUNED}


@serve.deployment(num_replicas=2, logging_config=LOGGING, **DEPLOYMENT)
class Classifier:
    """The classifier."""

    def __init__(self) -> None:
        self.classify = load()

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        """One image as the body."""
        return {"probabilities": await self.predict(await request.body())}

    @serve.batch(**BATCHING)
    async def predict(self, images: list[bytes]) -> list[list[float]]:
        """Probabilities of a batch."""
        return self.classify(np.stack([decode(png) for png in images])).tolist()


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": ports()[0]})
    serve.run(Classifier.bind(), route_prefix="/predict")
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    ray.shutdown()
