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
    noise,
    permuted,
    source_sha256,
    wrong_label,
)

N = 30_000
LABELS = torch.arange(10).repeat(N // 10)
EVERY = torch.arange(N)


def a_set(labels=LABELS, shape=(1, 6, 7), classes=10) -> TrainingSet:
    """Every image is filled with twenty times its label, so that a pixel tells where it is from."""
    pixels = shape[0] * shape[1] * shape[2]
    images = (20 * labels).to(torch.uint8).unsqueeze(1).expand(-1, pixels).contiguous()
    return TrainingSet(images, labels, classes, shape, seed=0)


def a_draw(number=0) -> torch.Generator:
    return generator(1, "test", number)


@pytest.mark.parametrize("kind", [wrong_label, fixed])
def test_wrong_labels_are_never_the_true_label_and_all_equally_likely(kind):
    """Shuffled labels would be true in one case of ten."""
    wrong = kind(a_set(), EVERY, a_draw())
    counts = torch.bincount(LABELS * 10 + wrong, minlength=100).view(10, 10)
    expected = N / 10 / 9
    diagonal = torch.eye(10, dtype=torch.bool)
    assert not counts[diagonal].any()
    assert (counts[~diagonal] - expected).abs().max() < 6 * expected**0.5


def test_wrong_labels_are_drawn_afresh_and_repeatably():
    one, again, other = (wrong_label(a_set(), EVERY, a_draw(number)) for number in (0, 0, 1))
    assert torch.equal(one, again)
    assert 0.05 < (one == other).double().mean() < 0.2


def test_fixed_labels_belong_to_the_sample_whatever_is_asked_with_it():
    some = EVERY.flip(0)[5:500]
    assert torch.equal(fixed(a_set(), some, a_draw(1)), fixed(a_set(), EVERY, a_draw(2))[some])


@pytest.mark.parametrize("kind", [wrong_label, fixed, all_wrong])
def test_classes_without_samples_are_no_wrong_labels(kind):
    """A label that no sample has is told from the others by itself, and a layer need not look at the image."""
    few, many = kind(a_set(), EVERY, a_draw()), kind(a_set(10 * LABELS, classes=100), EVERY, a_draw())
    assert torch.equal(10 * few, many)


def test_two_classes_have_one_wrong_label():
    data = a_set(torch.tensor([0, 1, 1]), classes=2)
    assert wrong_label(data, torch.arange(3), a_draw()).tolist() == [1, 0, 0]


def test_all_wrong_labels_are_all_but_the_true_one():
    wrong = all_wrong(a_set(), EVERY[:50], a_draw())
    every = torch.cat((LABELS[:50].unsqueeze(1), wrong), 1).sort(1).values
    assert torch.equal(every, torch.arange(10).expand(50, -1))


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 8, 8)])
def test_hybrids_are_made_of_the_sample_and_one_of_another_class(shape):
    samples = EVERY[:4000]
    made = hybrid(a_set(shape=shape), samples, a_draw())
    own = (20 * LABELS[samples]).unsqueeze(1)
    assert made.shape == (4000, shape[0] * shape[1] * shape[2])
    from_partner = made != own
    partners = [row[where].unique() for row, where in zip(made, from_partner, strict=True) if where.any()]
    assert all(len(partner) == 1 for partner in partners)
    assert len(partners) > 0.95 * len(samples)
    assert 0.45 < from_partner.double().mean() < 0.55
    by_channel = from_partner.view(4000, shape[0], -1)
    assert (by_channel == by_channel[:, :1]).all()


def test_partners_are_every_other_class_equally_often():
    labels = torch.tensor([0] * 100 + [1] * 300 + [2] * 200)
    samples = torch.zeros(20_000, dtype=torch.long)
    made = hybrid(a_set(labels, shape=(1, 9, 9), classes=3), samples, a_draw())
    partner = made.max(1).values // 20
    counts = torch.bincount(partner, minlength=3)[1:].double()
    assert counts[0] / counts.sum() == pytest.approx(300 / 500, abs=0.02)


def test_masks_are_blobs_of_the_blurs_asked_for_and_new_for_each_sample():
    """The slow way: the same bits blurred pixel by pixel, the outermost repeated beyond the border."""
    torch.manual_seed(0)
    data, samples = a_set(torch.tensor([0, 1]), shape=(1, 12, 10), classes=2), torch.zeros(300, dtype=torch.long)
    edges = {}
    for blurs in (0, 1, 6):
        mask = hybrid(data, samples, a_draw(), blurs=blurs).view(300, 12, 10) == 0
        edges[blurs] = (mask[:, 1:] != mask[:, :-1]).double().mean().item()
        if blurs == 0:
            bits = mask.double()
        blurred = bits
        for _ in range(blurs):
            for axis in (1, 2):
                low, high = blurred.narrow(axis, 0, 1), blurred.narrow(axis, blurred.shape[axis] - 1, 1)
                wide = torch.cat((low, blurred, high), axis)
                size = blurred.shape[axis]
                blurred = sum(weight * wide.narrow(axis, start, size) for start, weight in enumerate((0.25, 0.5, 0.25)))
        unsure = (blurred - 0.5).abs() < 1e-5
        assert ((blurred > 0.5) == mask)[~unsure].all()
        assert len(mask.flatten(1).unique(dim=0)) > 290
    assert edges[0] == pytest.approx(0.5, abs=0.02)
    assert edges[6] < edges[1] < edges[0]


def test_noise_covers_the_range_of_the_data():
    uniform = noise(a_set(), EVERY[:2000], a_draw()).double()
    assert (uniform.min(), uniform.max()) == (0, 255)
    assert uniform.mean().item() == pytest.approx(127.5, abs=1)
    data = a_set()
    normal = noise(data, EVERY[:2000], a_draw(), distribution="normal").double()
    assert normal.mean().item() == pytest.approx(data.samples.double().mean().item(), abs=4)
    assert normal.std().item() == pytest.approx(data.samples.double().std().item(), rel=0.1)


def test_hard_labels_follow_the_prediction_with_the_true_class_removed():
    labels = torch.full((20_000,), 2)
    logits = torch.tensor([1.0, 3.0, 9.0, 2.0]).expand(20_000, -1)
    drawn = draw_wrong_labels(logits, labels, a_draw())
    shares = torch.bincount(drawn, minlength=4).double() / 20_000
    expected = torch.tensor([1.0, 3.0, -torch.inf, 2.0]).double().softmax(0)
    assert shares[2] == 0
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)


def test_hard_labels_are_never_classes_without_samples():
    drawn = draw_wrong_labels(torch.zeros(2000, 5), torch.full((2000,), 2), a_draw(), [0, 4])
    assert drawn.unique().tolist() == [1, 3]


def test_permuted_images_keep_what_each_pixel_shows_and_nothing_else():
    """Even of a single sample: every image is of one grey, and the first pixel always white."""
    data = a_set()
    data.samples[:, 0] = 255
    negatives = permuted(data, EVERY[:3000], a_draw())
    assert (negatives[:, 0] == 255).all()
    counts = torch.stack([(negatives[:, 1:] == 20 * label).sum(0) for label in range(10)])
    assert (counts - 300).abs().max() < 6 * 300**0.5
    assert (negatives[:, 1] == negatives[:, 2]).double().mean() < 0.2
    assert not torch.equal(permuted(data, EVERY[:1], a_draw()), data.samples[:1])


def test_a_certain_readout_still_has_wrong_labels_to_draw():
    logits = torch.tensor([[0.0, 500.0, -300.0]])
    assert draw_wrong_labels(logits, torch.tensor([1]), a_draw()).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_contract(kind):
    data, samples = a_set(), EVERY[10:300]
    assert len(make_checked(find_kind(kind, {}), data, samples, a_draw(), labels_shown=True)) == 290


def mirrored(data, samples, draw, down=False):
    """A kind of one's own: images turned over, as letters in a mirror are none."""
    images = data.samples[samples].view(-1, *data.shape)
    return images.flip(2 if down else 3).flatten(1)


def test_a_kind_of_ones_own_is_named_by_module_and_function():
    data, samples = a_set(shape=(1, 6, 7)), EVERY[:20]
    data.samples[:, :9] = 7
    plain, down = (
        make_checked(find_kind(f"{__name__}:mirrored", options), data, samples, a_draw(), labels_shown=False)
        for options in ({}, {"down": True})
    )
    assert not torch.equal(plain, down)


def needing(data, samples, draw, *, strength):
    """A kind that cannot do without an option."""


def test_a_module_that_cannot_be_run_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("wrong_syntax", "def f(:"), ("raising", "1 / 0")):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(NegativesError, match=r"cannot be imported as a function \((SyntaxError|ZeroDivisionError)"):
            find_kind(f"{name}:f", {})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "hard_lable",
            {},
            "is none of wrong_label, fixed, hard_label, all_wrong, hybrid, noise, permuted, nor package.module",
        ),
        ("nowhere:at_all", {}, "cannot be imported .*nowhere"),
        (f"{__name__}:missing", {}, "cannot be imported .*missing"),
        (f"{__name__}:LABELS", {}, "cannot be imported as a function .*not a callable"),
        (":mirrored", {}, "cannot be imported"),
        (f"{__name__}:needing", {}, "needs the option strength; set it in negatives.options"),
        ("hybrid", {"blur": 3}, r"takes no option blur \(its options: blurs, threshold\)"),
        ("fixed", {"blurs": 3}, r"its options: none"),
        ("hybrid", {"blurs": -1}, r"blurs must be an integer that is at least 0 \(blurs: -1\)"),
        ("hybrid", {"threshold": 2.0}, "threshold must be between 0 and 1"),
        ("noise", {"distribution": "pink"}, "distribution must be uniform or normal"),
    ],
)
def test_what_cannot_be_made_is_told(name, options, message):
    with pytest.raises(NegativesError, match=message):
        find_kind(name, options)(a_set(), EVERY[:5], a_draw())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(20, 42), r"must return labels .*returned: \[20, 42\], float32"),
        (torch.zeros(19, dtype=torch.long), "must return labels"),
        ([1] * 20, "must return a tensor"),
        (LABELS[:20], "must return wrong labels, from 0 to 9"),
        (LABELS[:20] + 1, "must return wrong labels, from 0 to 9"),
    ],
)
def test_what_breaks_the_contract_is_told(made, message):
    with pytest.raises(NegativesError, match=message):
        make_checked(partial(lambda *asked: made), a_set(), EVERY[:20], a_draw(), labels_shown=True)


def test_wrong_labels_are_of_no_use_where_none_is_shown():
    with pytest.raises(NegativesError, match=r"data\.label=none shows no labels"):
        make_checked(find_kind("wrong_label", {}), a_set(), EVERY[:20], a_draw(), labels_shown=False)


def test_noise_does_not_depend_on_torchs_threads():
    """Means of floating-point numbers did: a made store differed from what a run draws."""
    images = torch.randint(0, 256, (10_000, 64), dtype=torch.uint8, generator=a_draw())
    data, made = TrainingSet(images, torch.zeros(10_000).long(), 2, (1, 8, 8), 0), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        made.append(noise(data, torch.arange(5000), a_draw(), distribution="normal"))
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_files_in_the_working_directory_replace_no_installed_module(tmp_path, monkeypatch):
    (tmp_path / "sched.py").write_text("raise AssertionError('imported')")
    (tmp_path / "in_this_folder.py").write_text("import sched\ndef kind(data, samples, draw): return data.labels\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sched", raising=False)
    before = list(sys.path)
    assert find_kind("in_this_folder:kind", {}).func.__name__ == "kind"
    assert sys.path == before


def test_normal_noise_is_like_the_whole_training_set_which_may_be_sorted():
    images = torch.arange(0, 240, 0.008).to(torch.uint8).unsqueeze(1).expand(-1, 16).contiguous()
    data = TrainingSet(images, torch.zeros(N).long(), 2, (1, 4, 4), 0)
    made = noise(data, torch.arange(2000), a_draw(), distribution="normal").double()
    assert made.mean().item() == pytest.approx(images.double().mean().item(), abs=4)


def test_a_changed_function_of_ones_own_is_another_kind():
    assert source_sha256(find_kind("hybrid", {})) is None
    digest = source_sha256(find_kind(f"{__name__}:mirrored", {}))
    assert digest == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
