"""Remove what the service never loads from an environment; runs once, when the image is built.

    python3 docker/slim.py /opt/venv/lib/python3.11/site-packages

A file that a later release of a package names otherwise is left where it is, and the image gets
larger; `make compose-demo` says when it gets too large.
"""

import shutil
import subprocess
import sys
from pathlib import Path

UNUSED = (
    "onnx/backend/test",
    "onnxruntime/capi/libonnxruntime.so.*",  # for C programs; the Python module has its own copy
    "openvino/include",
    "openvino/libs/*_gpu_*",  # devices other than the processor
    "openvino/libs/*_npu_*",
    "openvino/libs/cache.json",  # of the GPU's kernels
    "openvino/libs/*_gguf_*",  # readers of formats other than ONNX
    "openvino/libs/*_jax_*",
    "openvino/libs/*_paddle_*",
    "openvino/libs/*_pytorch_*",
    "openvino/libs/*_tensorflow_*",
    "**/tests",
)
CODECS = ("_jpeg8", "_shared", "_spng")  # the others are for unsupported formats


def main(packages: Path) -> None:
    """Remove files from a `site-packages`."""
    for pattern in UNUSED:
        for path in list(packages.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    codecs = packages / "imagecodecs"
    for path in codecs.glob("_*.so"):
        if not path.name.startswith(CODECS):
            path.unlink()
    linked = subprocess.run(
        ["ldd", *codecs.glob("*.so")],  # files of the image, its own ldd
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for path in (packages / "imagecodecs.libs").iterdir():
        if path.name not in linked:
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
