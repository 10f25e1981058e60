import torch

from ffdist.ff.labels import append, neutral, one_hot, overwrite


def test_overwrite_replaces_the_first_pixels_in_a_copy():
    images = torch.rand(4, 20)
    before = images.clone()
    result = overwrite(images, one_hot(torch.tensor([0, 1, 2, 2]), 3))
    assert torch.equal(images, before)
    assert result[2, :3].tolist() == [0, 0, 1]
    assert torch.equal(result[:, 3:], images[:, 3:])


def test_append_keeps_every_pixel():
    images = torch.rand(4, 20)
    result = append(images, neutral(images, 5))
    assert torch.equal(result[:, :20], images)
    assert torch.equal(result[:, 20:], torch.full((4, 5), 0.2))


def test_images_broadcast_over_labels():
    labels = one_hot(torch.arange(3).expand(2, -1), 3)
    assert overwrite(torch.rand(2, 1, 20), labels).shape == (2, 3, 20)
    assert append(torch.rand(2, 1, 20), labels).shape == (2, 3, 23)
