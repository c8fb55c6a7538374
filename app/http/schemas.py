"""Schemas of bodies for the OpenAPI document; predictions are written without these models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from app.system.file_watcher import FileName


class Instance(BaseModel):
    """One image in JSON."""

    b64: str = Field(
        description="an image file of one of the formats that `/v1/model` lists, in base64",
        json_schema_extra={"format": "byte"},
    )


class PredictRequest(BaseModel):
    """`application/json` body of `/v1/predict`."""

    instances: list[Instance] = Field(min_length=1)


class PredictForm(BaseModel):
    """`multipart/form-data` body of `/v1/predict`."""

    image: list[bytes] = Field(min_length=1, description="image files, one part each")


class Ranked(BaseModel):
    """One class of an answer."""

    label: str
    index: int
    probability: float


class Prediction(Ranked):
    """The most probable class of an image, and the others."""

    probabilities: list[float] | None = Field(
        None, description="one per label of /v1/model, in its order; they sum to 1. Without top_k."
    )
    top: list[Ranked] | None = Field(None, description="the most probable classes. With top_k.")
    abstained: bool | None = Field(
        None,
        description="true: the service does not answer this image, all classes are equally "
        "probable. Else absent.",
    )


class PredictAnswer(BaseModel):
    """Answer of `/v1/predict`: one prediction per image, in the order sent."""

    model: str
    version: str
    id: str = Field(description="the request's X-Request-ID, or one made for it")
    predictions: list[Prediction]


class InputInfo(BaseModel):
    """The size to which images are scaled."""

    height: int
    width: int
    channels: int


class LimitsInfo(BaseModel):
    """Limits of a request."""

    max_body_bytes: int
    max_images: int
    max_pixels: int
    max_jpeg_pixels: int
    max_request_pixels: int
    max_tensor_images: int
    max_float_images: int
    deadline_ms: float


class ModelInfo(BaseModel):
    """Answer of `/v1/model`."""

    name: str
    version: str
    labels: list[str]
    input: InputInfo
    formats: list[str]
    limits: LimitsInfo


class Health(BaseModel):
    """Answer of `/livez` and `/readyz`; `stale` names files that can no longer be read."""

    status: str
    stale: list[FileName] | None = None


class Problem(BaseModel):
    """RFC 9457 problem details; `error` repeats `detail` for protocol V2 clients."""

    type: str
    title: str
    status: int
    detail: str
    error: str


class About(BaseModel):
    """Answer of `/v2`."""

    name: str
    version: str
    extensions: list[str]


class V2Health(BaseModel):
    """Answer of `/v2/health/live` and `/v2/health/ready`."""

    live: bool
    ready: bool


class TensorInfo(BaseModel):
    """An input or output of the model; -1 is the number of images."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Answer of `/v2/models/{model}`; a request has one of the inputs."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class ModelReady(BaseModel):
    """Answer of `/v2/models/{model}/ready`."""

    name: str
    ready: bool


class InputTensor(BaseModel):
    """The images of an infer request; without `data` its bytes follow the JSON."""

    name: Literal["image", "pixels"]
    datatype: Literal["BYTES", "UINT8", "FP32", "FP16", "BF16"] = Field(
        description="image: BYTES [N]; pixels: UINT8 [N, H, W, C], or FP32, FP16 or BF16 "
        "[N, C, H, W] in [0, 1], the last two as bytes only"
    )
    shape: list[int] = Field(min_length=1, max_length=4)
    parameters: dict[str, int | str | bool] | None = Field(None, description="binary_data_size")
    data: list[Any] | None = Field(
        None, description="image: files in base64; pixels: numbers, nested or flat"
    )


class RequestedOutput(BaseModel):
    """A requested output."""

    name: Literal["probabilities"]
    parameters: dict[str, int | str | bool] | None = Field(
        None, description="binary_data; classification, the number of classes"
    )


class InferRequest(BaseModel):
    """JSON part of an infer request."""

    id: str | int | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[RequestedOutput] | None = Field(None, max_length=1)
    parameters: dict[str, int | str | bool] | None = Field(None, description="binary_data_output")


class OutputTensor(BaseModel):
    """FP32 [N, K], or with `classification` BYTES [N, k] of `probability:index:label`.

    Without `data` its bytes follow the JSON.
    """

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float] | list[str] | None = None


class InferAnswer(BaseModel):
    """JSON part of an infer answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
