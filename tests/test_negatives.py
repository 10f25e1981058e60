import hashlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ffdist.ff.keyed import generator
from ffdist.ff.negatives import (
    KINDS,
    NegativesError,
    TrainingSet,
    all_wrong,
    draw_wrong_labels,
    find_kind,
    fixed,
    hybrid,
    make_checked,
    mixed,
    noise,
    permuted,
    source_sha256,
    wrong_label,
)

N = 30_000
LABELS = torch.arange(10).repeat(N // 10)
INDICES = torch.arange(N)


def make_training_set(labels=LABELS, shape=(1, 6, 7), classes=10) -> TrainingSet:
    """Makes a training set in which all pixels of an image are 20 times its label, to identify its class."""
    pixels = shape[0] * shape[1] * shape[2]
    images = (20 * labels).to(torch.uint8).unsqueeze(1).expand(-1, pixels).contiguous()
    return TrainingSet(images, labels, classes, shape, seed=0)


def make_generator(number=0) -> torch.Generator:
    return generator(1, "test", number)


@pytest.mark.parametrize("kind", [wrong_label, fixed])
def test_wrong_labels_exclude_the_true_label_and_are_uniform(kind):
    """A permutation of the labels would contain the true label in one of ten cases."""
    wrong = kind(make_training_set(), INDICES, make_generator())
    counts = torch.bincount(LABELS * 10 + wrong, minlength=100).view(10, 10)
    expected = N / 10 / 9
    diagonal = torch.eye(10, dtype=torch.bool)
    assert not counts[diagonal].any()
    assert (counts[~diagonal] - expected).abs().max() < 6 * expected**0.5


def test_wrong_labels_are_determined_by_the_generator():
    first, repeated, other = (wrong_label(make_training_set(), INDICES, make_generator(number)) for number in (0, 0, 1))
    assert torch.equal(first, repeated)
    assert 0.05 < (first == other).double().mean() < 0.2


def test_fixed_labels_do_not_depend_on_generator_and_other_samples():
    indices = INDICES.flip(0)[5:500]
    assert torch.equal(
        fixed(make_training_set(), indices, make_generator(1)),
        fixed(make_training_set(), INDICES, make_generator(2))[indices],
    )


@pytest.mark.parametrize("kind", [wrong_label, fixed, all_wrong])
def test_classes_without_samples_are_never_wrong_labels(kind):
    """A layer could recognize a label without training samples as wrong, without looking at the image."""
    few_classes, many_classes = (
        kind(make_training_set(), INDICES, make_generator()),
        kind(make_training_set(10 * LABELS, classes=100), INDICES, make_generator()),
    )
    assert torch.equal(10 * few_classes, many_classes)


def test_two_classes_have_one_wrong_label():
    data = make_training_set(torch.tensor([0, 1, 1]), classes=2)
    assert wrong_label(data, torch.arange(3), make_generator()).tolist() == [1, 0, 0]


def test_all_wrong_returns_all_labels_except_the_true_one():
    wrong = all_wrong(make_training_set(), INDICES[:50], make_generator())
    labels = torch.cat((LABELS[:50].unsqueeze(1), wrong), 1).sort(1).values
    assert torch.equal(labels, torch.arange(10).expand(50, -1))


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 8, 8)])
def test_hybrid_mixes_the_sample_with_one_of_another_class(shape):
    indices = INDICES[:4000]
    negatives = hybrid(make_training_set(shape=shape), indices, make_generator())
    original = (20 * LABELS[indices]).unsqueeze(1)
    assert negatives.shape == (4000, shape[0] * shape[1] * shape[2])
    from_partner = negatives != original
    partners = [row[mask].unique() for row, mask in zip(negatives, from_partner, strict=True) if mask.any()]
    assert all(len(partner) == 1 for partner in partners)
    assert len(partners) > 0.95 * len(indices)
    assert 0.45 < from_partner.double().mean() < 0.55
    by_channel = from_partner.view(4000, shape[0], -1)
    assert (by_channel == by_channel[:, :1]).all()


def test_hybrid_partners_are_uniform_over_samples_of_other_classes():
    labels = torch.tensor([0] * 100 + [1] * 300 + [2] * 200)
    indices = torch.zeros(20_000, dtype=torch.long)
    negatives = hybrid(make_training_set(labels, shape=(1, 9, 9), classes=3), indices, make_generator())
    partner = negatives.max(1).values // 20
    counts = torch.bincount(partner, minlength=3)[1:].double()
    assert counts[0] / counts.sum() == pytest.approx(300 / 500, abs=0.02)


def test_hybrid_masks_are_blurred_as_configured_and_differ_between_samples():
    """Compares with a slow reference that blurs the same bits pixel by pixel and repeats the border pixels."""
    torch.manual_seed(0)
    data, indices = (
        make_training_set(torch.tensor([0, 1]), shape=(1, 12, 10), classes=2),
        torch.zeros(300, dtype=torch.long),
    )
    edges = {}
    for blurs in (0, 1, 6):
        mask = hybrid(data, indices, make_generator(), blurs=blurs).view(300, 12, 10) == 0
        edges[blurs] = (mask[:, 1:] != mask[:, :-1]).double().mean().item()
        if blurs == 0:
            bits = mask.double()
        blurred = bits
        for _ in range(blurs):
            for axis in (1, 2):
                first, last = blurred.narrow(axis, 0, 1), blurred.narrow(axis, blurred.shape[axis] - 1, 1)
                padded = torch.cat((first, blurred, last), axis)
                size = blurred.shape[axis]
                blurred = sum(
                    weight * padded.narrow(axis, start, size) for start, weight in enumerate((0.25, 0.5, 0.25))
                )
        near_threshold = (blurred - 0.5).abs() < 1e-5
        assert ((blurred > 0.5) == mask)[~near_threshold].all()
        assert len(mask.flatten(1).unique(dim=0)) > 290
    assert edges[0] == pytest.approx(0.5, abs=0.02)
    assert edges[6] < edges[1] < edges[0]


def test_mixed_is_the_mean_of_the_image_and_any_other_one():
    images = torch.randint(256, (100, 42), dtype=torch.uint8)
    data, indices = TrainingSet(images, LABELS[:100], 10, (1, 6, 7), seed=0), INDICES[:100]
    negatives = mixed(data, indices, make_generator())
    pairs = (images[:, None].int() + images) // 2  # [100, 100, 42]
    is_pair = (pairs == negatives[:, None]).all(2)
    assert (is_pair.sum(1) == 1).all()
    others = is_pair.int().argmax(1)
    assert (others != indices).all()
    assert len(others.unique()) > 40
    assert (data.labels[others] == data.labels).any(), "it uses no labels"
    with pytest.raises(NegativesError, match="at least two samples"):
        mixed(data._replace(samples=images[:1]), indices[:1], make_generator())


def test_uniform_noise_covers_the_range_and_normal_noise_matches_the_moments():
    uniform = noise(make_training_set(), INDICES[:2000], make_generator()).double()
    assert (uniform.min(), uniform.max()) == (0, 255)
    assert uniform.mean().item() == pytest.approx(127.5, abs=1)
    data = make_training_set()
    normal = noise(data, INDICES[:2000], make_generator(), distribution="normal").double()
    assert normal.mean().item() == pytest.approx(data.samples.double().mean().item(), abs=4)
    assert normal.std().item() == pytest.approx(data.samples.double().std().item(), rel=0.1)


def test_hard_labels_follow_the_softmax_over_wrong_classes():
    labels = torch.full((20_000,), 2)
    logits = torch.tensor([1.0, 3.0, 9.0, 2.0]).expand(20_000, -1)
    wrong_labels = draw_wrong_labels(logits, labels, make_generator())
    frequencies = torch.bincount(wrong_labels, minlength=4).double() / 20_000
    expected = torch.tensor([1.0, 3.0, -torch.inf, 2.0]).double().softmax(0)
    assert frequencies[2] == 0
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.02)


def test_hard_labels_are_never_classes_without_samples():
    wrong_labels = draw_wrong_labels(torch.zeros(2000, 5), torch.full((2000,), 2), make_generator(), [0, 4])
    assert wrong_labels.unique().tolist() == [1, 3]


def test_permuted_keeps_the_distribution_of_each_pixel_and_no_dependence():
    """All pixels of an image have the same gray level, except for the first one, which is white."""
    data = make_training_set()
    data.samples[:, 0] = 255
    negatives = permuted(data, INDICES[:3000], make_generator())
    assert (negatives[:, 0] == 255).all()
    counts = torch.stack([(negatives[:, 1:] == 20 * label).sum(0) for label in range(10)])
    assert (counts - 300).abs().max() < 6 * 300**0.5
    assert (negatives[:, 1] == negatives[:, 2]).double().mean() < 0.2
    assert not torch.equal(permuted(data, INDICES[:1], make_generator()), data.samples[:1])


def test_hard_label_is_drawn_even_if_the_readout_is_certain():
    logits = torch.tensor([[0.0, 500.0, -300.0]])
    assert draw_wrong_labels(logits, torch.tensor([1]), make_generator()).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_fulfills_its_contract(kind):
    data, indices = make_training_set(), INDICES[10:300]
    assert len(make_checked(find_kind(kind, {}), data, indices, make_generator(), labels_shown=True)) == 290


def mirrored(data, indices, generator, down=False):
    """A custom kind that mirrors images."""
    images = data.samples[indices].view(-1, *data.shape)
    return images.flip(2 if down else 3).flatten(1)


def test_custom_kind_is_found_by_module_and_function():
    data, indices = make_training_set(shape=(1, 6, 7)), INDICES[:20]
    data.samples[:, :9] = 7
    horizontal, vertical = (
        make_checked(find_kind(f"{__name__}:mirrored", options), data, indices, make_generator(), labels_shown=False)
        for options in ({}, {"down": True})
    )
    assert not torch.equal(horizontal, vertical)


def kind_with_required_option(data, indices, generator, *, strength):
    """A custom kind with a required option."""


def test_kind_in_a_broken_module_is_rejected(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in (("wrong_syntax", "def f(:"), ("raising", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(source)
        with pytest.raises(NegativesError, match=r"cannot be imported as a function \((SyntaxError|ZeroDivisionError)"):
            find_kind(f"{name}:f", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hard_lable",
            {},
            "is none of wrong_label, fixed, hard_label, all_wrong, hybrid, mixed, noise, permuted, nor package.module",
        ),
        ("nowhere:at_all", {}, "cannot be imported .*nowhere"),
        (f"{__name__}:missing", {}, "cannot be imported .*missing"),
        (f"{__name__}:LABELS", {}, "cannot be imported as a function .*not a callable"),
        (":mirrored", {}, "cannot be imported"),
        (f"{__name__}:kind_with_required_option", {}, "needs the option strength; set it in negatives.options"),
        ("hybrid", {"blur": 3}, r"takes no option blur \(its options: blurs, threshold\)"),
        ("fixed", {"blurs": 3}, r"its options: none"),
        ("hybrid", {"blurs": -1}, r"blurs must be an integer that is at least 0 \(blurs: -1\)"),
        ("hybrid", {"threshold": 2.0}, "threshold must be between 0 and 1"),
        ("noise", {"distribution": "pink"}, "distribution must be uniform or normal"),
    ],
)
def test_invalid_kinds_and_options_are_rejected(name, options, message):
    with pytest.raises(NegativesError, match=message):
        find_kind(name, options)(make_training_set(), INDICES[:5], make_generator())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(20, 42), r"must return labels .*returned: \[20, 42\], float32"),
        (torch.zeros(19, dtype=torch.long), "must return labels"),
        ([1] * 20, "must return a tensor"),
        (LABELS[:20], "must return wrong labels, from 0 to 9"),
        (LABELS[:20] + 1, "must return wrong labels, from 0 to 9"),
    ],
)
def test_invalid_result_of_a_kind_is_rejected(result, message):
    with pytest.raises(NegativesError, match=message):
        make_checked(
            partial(lambda *args: result), make_training_set(), INDICES[:20], make_generator(), labels_shown=True
        )


def test_wrong_labels_are_rejected_if_no_labels_are_shown():
    with pytest.raises(NegativesError, match=r"data\.label=none shows no labels"):
        make_checked(
            find_kind("wrong_label", {}), make_training_set(), INDICES[:20], make_generator(), labels_shown=False
        )


def test_noise_does_not_depend_on_the_number_of_threads():
    """Sums of floating-point numbers depend on it: stored negatives would differ from newly drawn ones."""
    images = torch.randint(0, 256, (10_000, 64), dtype=torch.uint8, generator=make_generator())
    data, results = TrainingSet(images, torch.zeros(10_000).long(), 2, (1, 8, 8), 0), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(noise(data, torch.arange(5000), make_generator(), distribution="normal"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_working_directory_does_not_shadow_installed_modules(tmp_path, monkeypatch):
    (tmp_path / "sched.py").write_text("raise AssertionError('imported')")
    (tmp_path / "in_this_folder.py").write_text("import sched\ndef kind(data, samples, draw): return data.labels\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sched", raising=False)
    before = list(sys.path)
    assert find_kind("in_this_folder:kind", {}).func.__name__ == "kind"
    assert sys.path == before


def test_normal_noise_matches_the_mean_of_a_sorted_training_set():
    images = torch.arange(0, 240, 0.008).to(torch.uint8).unsqueeze(1).expand(-1, 16).contiguous()
    data = TrainingSet(images, torch.zeros(N).long(), 2, (1, 4, 4), 0)
    negatives = noise(data, torch.arange(2000), make_generator(), distribution="normal").double()
    assert negatives.mean().item() == pytest.approx(images.double().mean().item(), abs=4)


def test_source_digest_of_a_custom_kind_is_that_of_its_file():
    assert source_sha256(find_kind("hybrid", {})) is None
    digest = source_sha256(find_kind(f"{__name__}:mirrored", {}))
    assert digest == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
