"""A classifier behind FastAPI as tutorials write it, without a model server or batches.

Stock takes an uploaded file, tuned the bare body. The handlers are coroutines that compute in the
event loop: on one thread per worker nothing is gained by handing the work to another.
"""

import uvicorn
from fastapi import FastAPI, Request, UploadFile

from loadtest.peers.classifier import decode, load, ports

app = FastAPI()
classify = load()


def answer(png: bytes) -> dict[str, list[float]]:
    """The probabilities of one image."""
    return {"probabilities": classify(decode(png)[None])[0].tolist()}


@app.post("/predict")
async def predict(file: UploadFile) -> dict[str, list[float]]:
    """An image in a form."""
    return answer(await file.read())


@app.post("/raw")
async def raw(request: Request) -> dict[str, list[float]]:
    """An image as the body."""
    return answer(await request.body())


if __name__ == "__main__":
    uvicorn.run("serve:app", port=ports()[0], workers=2, access_log=False)
