"""A task of one's own, from nothing: coloured letters of odd sizes in Parquet files, and a short configuration."""

import io
import random
from pathlib import Path

import matplotlib
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")
CONFIG = """
data: {name: parquet, path: letters, label: append, image_size: [20, 20]}
model: {layers: [300, 300]}
negatives: {kind: hard_label}
training: {epochs: 12}
"""


def letter(draw: random.Random, label: int) -> bytes:
    """One letter, light on dark, in no two sizes and colours."""
    size = draw.randint(23, 61), draw.randint(23, 57)
    image = Image.new("RGB", size, tuple(draw.randint(40, 110) for _ in range(3)))
    font = ImageFont.truetype(str(FONT), int(0.9 * min(size)))
    ink = tuple(draw.randint(160, 255) for _ in range(3))
    middle = size[0] / 2 + draw.uniform(-2, 2), size[1] / 2 + draw.uniform(-2, 2)
    ImageDraw.Draw(image).text(middle, chr(ord("A") + label), ink, font, anchor="mm")
    data = io.BytesIO()
    image.save(data, draw.choice(["PNG", "JPEG"]))
    return data.getvalue()


def test_coloured_letters_are_learned_by_defaults(tmp_path, ffdist):
    """Bright images of one mean drown what they show, unless it is taken off: then all is guessed."""
    (tmp_path / "letters").mkdir()
    draw, labels = random.Random(0), [index % 26 for index in range(5200)]
    draw.shuffle(labels)
    images = [{"bytes": letter(draw, label), "path": f"{index}"} for index, label in enumerate(labels)]
    for split, rows in (("train", slice(0, 4680)), ("test", slice(4680, None))):
        pq.write_table(pa.table({"image": images[rows], "label": labels[rows]}), tmp_path / f"letters/{split}.parquet")
    (tmp_path / "letters.yaml").write_text(CONFIG)
    ffdist("train", "letters.yaml", "--runner", "serial")
    (folder,) = tmp_path.glob("runs/letters-*")
    said = ffdist("evaluate", str(folder), "--data", "letters/test.parquet")
    (tmp_path / "images").mkdir()
    for index in range(4680, 5200):
        (tmp_path / "images" / f"{index}.png").write_bytes(images[index]["bytes"])
    ffdist("predict", str(folder), "--input", "images", "--to", "found.parquet")
    found = pq.read_table(tmp_path / "found.parquet")["label"].to_pylist()
    wrong = sum(one != other for one, other in zip(found, labels[4680:], strict=True)) / 520
    assert f"test error {wrong:.2%} by goodness" in said
    assert wrong < 0.4  # in place of 0.97
