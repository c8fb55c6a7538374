"""KServe's inference client asks a server: `python kserve_asks.py URL MODEL PNG PIXELS.json`.

Prints what it got as JSON. Runs in an environment with kserve, whose pins are not ours.
"""

import asyncio
import base64
import json
import sys
from pathlib import Path

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def tensor(name: str, datatype: str, array: np.ndarray, *, binary: bool) -> InferInput:
    found = InferInput(name=name, shape=list(array.shape), datatype=datatype)
    found.set_data_from_numpy(array, binary_data=binary)
    return found


def requests(model: str, png: bytes, pixels: np.ndarray) -> dict[str, InferRequest]:
    file = np.array([png], np.object_)
    text = np.array([base64.b64encode(png)], np.object_)
    planar = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    bytes_out = RequestedOutput("probabilities", {"binary_data": True})
    ranked = RequestedOutput("probabilities", {"classification": 2})
    inputs = {
        "pixels JSON": (tensor("pixels", "UINT8", pixels, binary=False), None),
        "pixels bytes": (tensor("pixels", "UINT8", pixels, binary=True), [bytes_out]),
        "planar JSON": (tensor("pixels", "FP32", planar, binary=False), None),
        "planar bytes": (tensor("pixels", "FP32", planar, binary=True), [bytes_out]),
        "image JSON": (tensor("image", "BYTES", text, binary=False), None),
        "image bytes": (tensor("image", "BYTES", file, binary=True), [bytes_out]),
        "classes": (tensor("image", "BYTES", file, binary=True), [ranked]),
    }
    return {
        name: InferRequest(model, [given], request_id=name, request_outputs=outputs)
        for name, (given, outputs) in inputs.items()
    }


async def ask(url: str, model: str, png: bytes, pixels: np.ndarray) -> dict:
    found = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        found["live"] = await client.is_server_live(url)
        found["ready"] = await client.is_server_ready(url)
        found["model ready"] = await client.is_model_ready(url, model)
        found["other ready"] = await client.is_model_ready(url, "other")
        for name, request in requests(model, png, pixels).items():
            answer = await client.infer(url, request, model_name=model)
            (output,) = answer.outputs
            found[name] = {
                "id": answer.id,
                "model": answer.model_name,
                "datatype": output.datatype,
                "data": output.as_numpy().tolist(),
            }
    return found


if __name__ == "__main__":
    url, model, png, pixels = sys.argv[1:]
    array = np.array(json.loads(Path(pixels).read_text()), np.uint8)
    found = asyncio.run(ask(url, model, Path(png).read_bytes(), array))
    sys.stdout.write(json.dumps(found, default=bytes.decode))
