"""How a picture is brought to a network's input size, as its card says.

Each rule is a box of the picture that becomes a part of the input, so that no picture much larger
than the input is ever made on the way. The same rules tell by how much a JPEG may be reduced while
it is decoded.
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from app.inference.bundle import InputShape, Preprocessing

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Reductions that libjpeg does by computing fewer pixels of each block of 8 x 8.
REDUCTIONS = (8, 4, 2)
# A reduced JPEG keeps this many pixels for each pixel of the input, in both directions. What then
# differs from full decoding is bounded by a test: 1.5 levels on average, 20 at most, in the worst
# of pictures.
MARGIN = 2.0
MOST_RESIZED = 4  # times the shorter side, up to which the longer side is resized before a crop
REDUCED_FROM = 1_000_000  # pixels; smaller JPEG files are decoded in full


Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""


class Plan(NamedTuple):
    """What part of a picture becomes what part of the input.

    Attributes:
        box: in the picture.
        size: width and height that the box is resized to.
        at: where that is put in the input, from the left and the top; negative for a part of it
            that is cropped.
    """

    box: Box
    size: tuple[int, int]
    at: tuple[int, int] = (0, 0)


def plan(width: float, height: float, shape: InputShape, preprocessing: Preprocessing) -> Plan:
    """The plan for a picture of `width` x `height`."""
    target = (shape.width, shape.height)
    if preprocessing.fit == "stretch":
        return Plan((0, 0, width, height), target)
    if preprocessing.fit == "letterbox":
        scale = min(shape.width / width, shape.height / height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        at = ((shape.width - size[0]) // 2, (shape.height - size[1]) // 2)
        return Plan((0, 0, width, height), size, at)
    if preprocessing.fit == "resize_crop":
        return _resize_crop(width, height, shape, preprocessing.shorter or min(target))
    # The largest centred box of the input's proportions, shrunk by the ratio, becomes the input.
    scale = min(width / shape.width, height / shape.height) * preprocessing.ratio
    box_w, box_h = shape.width * scale, shape.height * scale
    left, top = (width - box_w) / 2, (height - box_h) / 2
    return Plan((left, top, left + box_w, top + box_h), target)


def _resize_crop(width: float, height: float, shape: InputShape, shorter: int) -> Plan:
    """As torchvision's Resize and CenterCrop one after the other, with their rounding."""
    short, long = sorted((width, height))
    longer = int(shorter * long / short)
    resized = (shorter, longer) if width <= height else (longer, shorter)
    left = round((resized[0] - shape.width) / 2)
    top = round((resized[1] - shape.height) / 2)
    if longer <= MOST_RESIZED * shorter:
        return Plan((0, 0, width, height), resized, (-left, -top))
    # Of a narrow picture the crop alone; its box is rounded, which moves some pixels by one level.
    x, y = width / resized[0], height / resized[1]
    right, bottom = (left + shape.width) * x, (top + shape.height) * y
    return Plan((left * x, top * y, right, bottom), (shape.width, shape.height))


def reduction(width: int, height: int, shape: InputShape, preprocessing: Preprocessing) -> int:
    """By how much a JPEG of `width` x `height` is reduced while it is decoded: 1, 2, 4 or 8."""
    if width * height <= REDUCED_FROM:
        return 1
    (left, top, right, bottom), size, _ = plan(width, height, shape, preprocessing)
    spare = min((right - left) / size[0], (bottom - top) / size[1]) / MARGIN
    return next((by for by in REDUCTIONS if by <= spare), 1)


def fit(
    picture: Image.Image,
    shape: InputShape,
    preprocessing: Preprocessing,
    area: Box | None = None,
) -> Image.Image:
    """Bring a picture to the input's size; one that has it already is left as it is.

    Args:
        picture: in the input's mode.
        shape: of the input.
        preprocessing: says how.
        area: the part that counts; None for all of it.
    """
    target = (shape.width, shape.height)
    if picture.size == target:
        return picture
    x, y, x_end, y_end = area or (0, 0, *picture.size)
    (left, top, right, bottom), size, at = plan(x_end - x, y_end - y, shape, preprocessing)
    # Pillow refuses boxes that rounding has pushed over the edge.
    box = (max(x, x + left), max(y, y + top), min(x + right, x_end), min(y + bottom, y_end))
    resized = picture.resize(size, FILTERS[preprocessing.interpolation], box=box)
    if size == target:
        return resized
    if preprocessing.fit == "resize_crop":
        x0, y0 = -at[0], -at[1]
        return resized.crop((x0, y0, x0 + shape.width, y0 + shape.height))
    canvas = Image.new(picture.mode, target, (preprocessing.fill,) * len(picture.getbands()))
    canvas.paste(resized, at)
    return canvas
