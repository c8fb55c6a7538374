"""MLServer: a custom runtime in a pool of two workers, asked over the V2 protocol."""

import asyncio

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from loadtest.peers.classifier import decode, load, ports, setting

# Stock: no batches and debug mode on, which are its defaults.
SERVER = {"stock": {}, "tuned": {"debug": False}}
BATCHING = {"stock": {}, "tuned": {"max_batch_size": 32, "max_batch_time": 0.001}}


class Classifier(MLModel):
    """The classifier."""

    async def load(self) -> bool:
        """Load the model, once per worker."""
        self.classify = load()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Probabilities of a batch of images in base64."""
        images = [decode(png) for png in Base64Codec.decode_input(payload.inputs[0])]
        probs = self.classify(np.stack(images))
        outputs = [NumpyCodec.encode_output("probabilities", probs)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main() -> None:
    """Serve until a signal."""
    http, grpc, metrics = ports()
    settings = Settings(
        host="127.0.0.1",
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        parallel_workers=2,
        load_models_at_startup=False,
        **SERVER[setting()],
    )
    model = ModelSettings(name="cifar10", implementation="serve.Classifier", **BATCHING[setting()])
    await MLServer(settings).start([model])  # made in the loop that it needs


if __name__ == "__main__":
    asyncio.run(main())
