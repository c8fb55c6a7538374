"""Which engine runs a model.

Without numpy, since the supervisor selects the engine that its workers' parent process imports.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Literal

from app.errors import ConfigError
from app.inference.processor import adds_int8_exactly
from app.precision import Precision
from app.system.installation import install_command

EngineName = Literal["openvino", "onnxruntime", "torch", "upstream"]
UPSTREAM: Literal["upstream"] = "upstream"  # another server, which a bundle's card describes

# In order of preference: `auto` takes the first that is installed and exact.
ENGINES: dict[EngineName, str] = {
    "openvino": "app.inference.engines.openvino",
    "onnxruntime": "app.inference.engines.onnxruntime",
    "torch": "app.inference.engines.torch",
}


def resolve(
    name: str, precision: Precision = "float32", exact: Callable[[], bool] = adds_int8_exactly
) -> EngineName:
    """Return the engine that `name` stands for; `auto` is the first of the table that is installed.

    OpenVINO's int8 saturates on x86 processors without VNNI. ONNX Runtime can avoid that, so `auto`
    selects it there for int8.

    Args:
        name: an engine, or `auto`.
        precision: of the model.
        exact: whether int8 arithmetic does not saturate on this processor.

    Raises:
        ConfigError: unknown engine, or its library is not installed.
    """
    if name == UPSTREAM:
        if importlib.util.find_spec("aiohttp") is None:
            raise ConfigError(f"engine is 'upstream', which needs: {install_command(UPSTREAM)}")
        return UPSTREAM
    installed = [engine for engine in ENGINES if importlib.util.find_spec(engine)]
    if name == "auto" and installed:
        if precision == "int8" and "onnxruntime" in installed and not exact():
            return "onnxruntime"
        return installed[0]
    for engine in ENGINES:
        if engine == name and engine in installed:
            return engine
    raise ConfigError(
        f"engine is {name!r}; installed here: {', '.join(installed) or 'none'} (or auto). "
        f"The torch engine needs an extra: {install_command('torch')}"
    )
