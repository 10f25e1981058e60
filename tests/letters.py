"""A task with 26 classes: letters in the fonts of matplotlib, turned, sheared, scaled, shifted, and with noise.

cd tests && ffdist train letters.yaml && ffdist baseline letters.yaml
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LETTERS, SIDE, CANVAS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", 28, 84
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "cmr10", "cmss10", "cmtt10", "cmb10")


@cache
def glyph(font: str, letter: str) -> Image.Image:
    """Returns a letter in the middle of a canvas."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    image = Image.new("L", (CANVAS, CANVAS))
    ImageDraw.Draw(image).text((CANVAS / 2,) * 2, letter, 255, ImageFont.truetype(str(path), 48), anchor="mm")
    return image


def draw(count: int, source: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Returns images `[N, 1, 28, 28]` and their letters."""
    names = sorted(path.stem for path in (Path(matplotlib.get_data_path()) / "fonts" / "ttf").iterdir())
    fonts = [name for name in names if name.startswith(FONTS) and "Display" not in name]
    images, labels = np.empty((count, 1, SIDE, SIDE), np.uint8), source.choice(list(LETTERS), count).tolist()
    for image, letter in zip(images, labels, strict=True):
        angle, shear = source.uniform(-0.35, 0.35, 2)
        scale = source.uniform(1.7, 2.8, 2)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
        matrix = turn * scale
        offset = CANVAS / 2 - matrix @ (np.array([SIDE / 2, SIDE / 2]) + source.uniform(-3, 3, 2))
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        drawn = glyph(str(source.choice(fonts)), letter)
        pixels = np.asarray(
            drawn.transform((SIDE, SIDE), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        )
        noisy = pixels * source.uniform(0.5, 1) + source.normal(0, source.uniform(0, 40), pixels.shape)
        image[0] = noisy.clip(0, 255)
    return images, labels


def letters(train: int = 26_000, test: int = 5_200) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Returns the training and the test set."""
    source = np.random.default_rng(0)
    return {"train": draw(train, source), "test": draw(test, source)}
