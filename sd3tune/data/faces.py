"""Where the largest face of a picture is, for ``crop_style: face``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd3tune.data.images import read_rgb
from sd3tune.errors import DataError

SIDE = 640
"""Pictures are looked at with their longer side at most so many pixels."""

NOWHERE = (0.5, 0.5)
"""What is said of a picture without a face: its middle."""


def finder() -> Callable[[Path], tuple[float, float]]:
    """A function from a picture to the middle of its largest face, in shares of width and height. Raises: DataError without OpenCV."""
    try:
        import cv2
        import numpy as np
    except ImportError:
        raise DataError("crop_style face needs OpenCV; pip install 'sd3tune[face]', or write crop_style: center") from None
    cascade = cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_default.xml"))

    def find(path: Path) -> tuple[float, float]:
        with path.open("rb") as opened:
            picture = read_rgb(opened, wanted=(SIDE // 3, SIDE // 3))
        picture.thumbnail((SIDE, SIDE))
        boxes = cascade.detectMultiScale(np.asarray(picture.convert("L")), scaleFactor=1.1, minNeighbors=5)
        if not len(boxes):
            return NOWHERE
        x, y, width, height = max(boxes, key=lambda box: (box[2] * box[3], *box))
        return round(float(x + width / 2) / picture.width, 4), round(float(y + height / 2) / picture.height, 4)

    return find
