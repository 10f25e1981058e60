"""Augmentation and standardization of images: compared with torch and torchvision, and in runs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import digests
from torchvision.transforms.v2 import functional as reference

from ffdist import ConfigError, ImageEncoder, load_config, load_network, train
from ffdist.ff.augmentation import Color, Crop, Cutout, Flip
from ffdist.ff.keyed import generator
from ffdist.runs.export import export_network
from ffdist.training.prepare import prepare

SHAPE = (3, 20, 24)
IMAGES = torch.randint(256, (200, *SHAPE), generator=generator(0, "images"), dtype=torch.uint8)
AUGMENTED = [
    *("data.crop=0.5", "data.jitter=1", "data.flip=true", "data.color=0.4", "data.cutout=3", "data.standardize=true"),
    *("data.label=append", "training.epochs=2", "tracking.artifacts=[]", "training.precision=float32"),
    "model.layers=[40, 30, 20]",
]


def draw(augmentation, count=200):
    return augmentation.draw(count, SHAPE, generator(1, "drawn"))


def test_crops_lie_in_the_image_and_have_the_sizes_of_torchvision():
    top, left, height, width = draw(Crop(0.2), 20_000)
    assert min(top.min(), left.min()) == 0
    assert ((top + height).max(), (left + width).max()) == (20, 24)
    area = height * width / (20 * 24)
    assert 0.17 < area.min() < 0.22
    assert area.max() > 0.97
    assert abs(area.mean() - 0.59) < 0.02  # torchvision's are as large on average, but for those that it rejects
    ratio = (height / 20) / (width / 24)
    assert 0.6 < ratio.min() < 0.9 < 1.1 < ratio.max() < 1.6


def test_a_crop_is_enlarged_like_by_torch():
    drawn = draw(Crop(0.1))
    cropped = Crop(0.1).apply(IMAGES, drawn)
    for image, result, (top, left, height, width) in zip(IMAGES, cropped, drawn.t().tolist(), strict=True):
        part = image[None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(part, SHAPE[1:], mode="bilinear", align_corners=False)[0]
        assert (result.float() - expected).abs().max() < 2.5  # of 255: fractions are multiples of 1 / 256
    whole = torch.tensor([[0], [0], [20], [24]]).expand(-1, len(IMAGES))
    assert torch.equal(Crop(0.1).apply(IMAGES, whole), IMAGES)


def test_colors_change_like_in_torchvision():
    drawn = draw(Color(0.4))
    assert (drawn.min(), drawn.max()) == (154, 358)
    changed = Color(0.4).apply(IMAGES, drawn)
    for image, result, factors in zip(IMAGES, changed, (drawn / 256).t().tolist(), strict=True):
        expected = reference.adjust_brightness(image, factors[0])
        expected = reference.adjust_contrast(expected, factors[1])
        expected = reference.adjust_saturation(expected, factors[2])
        assert (result.int() - expected.int()).abs().max() <= 6
    same = torch.full((3, len(IMAGES)), 256)
    assert torch.equal(Color(0.4).apply(IMAGES, same), IMAGES)
    gray = IMAGES[:, :1]
    assert Color(0.4).apply(gray, drawn).shape == gray.shape


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_fills_a_square_around_its_center(side):
    cutout = Cutout(side, (7, 8, 9))
    rows, columns = draw(cutout)
    result = cutout.apply(IMAGES, torch.stack((rows, columns)))
    for image, changed, row, column in zip(IMAGES, result, rows.tolist(), columns.tolist(), strict=True):
        expected = image.clone()
        top, left = row - side // 2, column - side // 2
        square = expected[:, max(0, top) : top + side, max(0, left) : left + side]
        square[:] = torch.tensor([7, 8, 9], dtype=torch.uint8)[:, None, None]
        assert torch.equal(changed, expected)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 19, 0, 23)


def test_images_are_mirrored_with_probability_one_half():
    drawn = draw(Flip())
    flipped = Flip().apply(IMAGES, drawn)
    assert 70 < drawn.sum() < 130
    for image, result, is_flipped in zip(IMAGES, flipped, drawn[0], strict=True):
        assert torch.equal(result, image.flip(2) if is_flipped else image)


def test_standardized_channels_have_a_mean_of_0_and_a_deviation_of_1():
    samples = IMAGES.flatten(1).clone()
    samples[:, 480:960] //= 3
    settings = ImageEncoder.fit(samples, SHAPE, {"standardize": True})
    encoder = ImageEncoder(SHAPE, 10, "none", standardize=True, cutout=4, **settings)
    values = encoder.values(samples).view(-1, *SHAPE).double()
    np.testing.assert_allclose(values.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(values.std((0, 2, 3), correction=0), 1, atol=1e-6)
    means = (samples.view(-1, *SHAPE).double().mean((0, 2, 3)) / 255).tolist()
    assert encoder.mean == pytest.approx(means)
    assert encoder.augmentations == [Cutout(4, tuple(round(255 * mean) for mean in means))]
    assert ImageEncoder.fit(samples, SHAPE, {"standardize": False}) == {}


def test_augmented_runs_are_equal_for_any_distribution(tmp_path):
    paces = [("serial", 1, 1), ("serial", 2, 5), ("ray", 3, 7)]
    (digest,) = digests("digits", AUGMENTED, paces, tmp_path)
    run = train(load_config("digits", AUGMENTED), runner="serial", runs=tmp_path)
    assert run.summary["weights_sha256"] == digest
    export_network(run, tmp_path / "network")
    images = run.dataset.samples["test"]
    assert torch.equal(
        load_network(tmp_path / "network").predict(images).goodness, run.network.predict(images).goodness
    )
    assert digests("digits", [*AUGMENTED, "data.crop=1"], paces[:1], tmp_path) != {digest}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.cutout=8"], r"data\.cutout must be smaller than the images \(cutout: 8, images: 8 x 8\)"),
        (
            ["data.standardize=true", "data.subtract_mean=true"],
            r"both subtract a mean; set data\.subtract_mean to false",
        ),
        (["data.crop=0"], r"data\.crop"),
        (["data.color=1"], r"data\.color"),
        (["training.learning_rate_steps=[3]"], r"learning_rate_steps are for .*steps, which needs them"),
        (["training.learning_rate_schedule=steps"], r"learning_rate_steps are for .*steps, which needs them"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        prepare(load_config("digits", changes))
