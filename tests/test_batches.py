"""Batches that a DataLoader draws from images in memory: whole, unchanged, or augmented by seed, epoch and index."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cvlab.data.augment import erased, mixing
from cvlab.data.sets import AugmentedImages, AugmentedPairs, EvaluationSet, channels_last, normalization


def noise(seed: int, height: int = 4, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_mean_and_deviation_are_numpys() -> None:
    pixels = [noise(i, 5 + i, 9 - i) for i in range(4)]
    mean, std = normalization("data", [torch.from_numpy(each).permute(2, 0, 1) for each in pixels])
    together = np.concatenate([each.reshape(-1, 3) for each in pixels]) / 255
    np.testing.assert_allclose(mean, together.mean(0), rtol=0, atol=1e-4)
    np.testing.assert_allclose(std, together.std(0), rtol=0, atol=1e-4)
    _, flat = normalization("data", [torch.zeros(3, 4, 4, dtype=torch.uint8)])
    assert min(flat) > 0  # it is divided by


def tensors(n: int, height: int = 16, width: int = 16) -> list[Tensor]:
    return [torch.from_numpy(noise(i, height, width)).permute(2, 0, 1).contiguous() for i in range(n)]


def test_evaluation_batches_are_whole_and_unchanged() -> None:
    views, labels = tensors(10), torch.arange(10) % 3
    batches = list(DataLoader(EvaluationSet(views, labels), batch_size=4, collate_fn=channels_last))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.stack(views) / 255)


def loaded(data_set: AugmentedImages | AugmentedPairs, epoch: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    data_set.epoch = epoch
    return list(DataLoader(data_set, batch_size=batch_size, collate_fn=channels_last))


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in batches]), torch.cat([second for _, second in batches])


def test_augmented_images_depend_on_seed_epoch_and_index_alone() -> None:
    images = [image for i, image in enumerate(tensors(10, 20, 30)) if i < 5] + tensors(5, 24, 18)
    labels = torch.arange(10)
    train_set = AugmentedImages(images, labels, image_size=16, seed=7)
    assert len(train_set) == 10
    first = loaded(train_set, epoch=3, batch_size=4)
    assert [views.shape for views, _ in first] == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]
    other_epoch = loaded(train_set, epoch=4, batch_size=4)
    again = loaded(train_set, epoch=3, batch_size=4)
    for (views, batch_labels), (same, same_labels) in zip(first, again, strict=True):
        assert torch.equal(views, same)
        assert torch.equal(batch_labels, same_labels)
    views, batch_labels = joined(first)
    assert torch.equal(batch_labels, labels)
    assert views.min() >= 0
    assert views.max() <= 1
    torch.testing.assert_close(joined(loaded(train_set, epoch=3, batch_size=1))[0], views)
    other_seed = loaded(AugmentedImages(images, labels, image_size=16, seed=8), epoch=3, batch_size=4)
    for others in (joined(other_epoch)[0], joined(other_seed)[0]):
        assert ((views - others).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_augmented_pairs_depend_on_seed_epoch_and_index_alone() -> None:
    images = torch.stack(tensors(10))
    masks = torch.rand(10, 2, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    train_set = AugmentedPairs(images, masks, seed=7)
    first = loaded(train_set, epoch=3, batch_size=4)
    assert [moved.shape for _, moved in first] == [(4, 2, 16, 16), (4, 2, 16, 16), (2, 2, 16, 16)]
    for (views, moved), (same_views, same_moved) in zip(first, loaded(train_set, 3, 4), strict=True):
        assert torch.equal(views, same_views)
        assert torch.equal(moved, same_moved)
        assert moved.dtype == torch.bool
    views, moved = joined(first)
    one_by_one, moved_one_by_one = joined(loaded(train_set, epoch=3, batch_size=1))
    torch.testing.assert_close(one_by_one, views)
    assert torch.equal(moved_one_by_one, moved)
    others, moved_otherwise = joined(loaded(train_set, epoch=4, batch_size=4))
    assert ((views - others).abs().amax(dim=(1, 2, 3)) > 0.01).all()
    assert (moved != moved_otherwise).flatten(1).any(1).all()


def test_minimal_augmentation_mirrors_some_and_changes_nothing_else() -> None:
    """Image and mask alike; the others, and without augmentation all, are as they were."""
    images, masks = tensors(12), [torch.rand(1, 16, 16) > 0.5 for _ in range(12)]
    views = torch.stack(images) / 255
    plain, plain_masks = joined(loaded(AugmentedPairs(images, masks, seed=0, augment="none"), 1, 4))
    assert torch.equal(plain, views)
    assert torch.equal(plain_masks, torch.stack(masks))
    seen, moved = joined(loaded(AugmentedPairs(images, masks, seed=0, augment="minimal"), 1, 4))
    alone, _ = joined(loaded(AugmentedImages(images, torch.arange(12), 16, seed=0, augment="minimal"), 1, 4))
    turned = (seen != views).flatten(1).any(1)
    assert 0 < turned.sum() < 12
    assert torch.equal(seen, torch.where(turned.view(-1, 1, 1, 1), views.flip(3), views))
    assert torch.equal(moved, torch.where(turned.view(-1, 1, 1, 1), plain_masks.flip(3), plain_masks))
    assert torch.equal(alone, seen)


def test_without_jitter_an_augmented_photo_keeps_its_colour() -> None:
    images = [torch.full((3, 20, 24), 60 * i + 20, dtype=torch.uint8) for i in range(4)]
    for jitter, kept in ((0.0, True), (0.3, False)):
        views, _ = AugmentedImages(images, torch.arange(4), 16, seed=0, jitter=jitter).__getitems__([0, 1, 2, 3])
        same = (views * 255 - torch.stack(images)[..., :1, :1]).abs().amax(dim=(1, 2, 3)) < 0.01
        assert same.all() if kept else not same.any()


def test_a_shuffled_loader_keeps_labels_with_their_images() -> None:
    """Images of one grey value each: the label is told by the view, whatever was done to it."""
    labels = torch.arange(8)
    images = [torch.full((3, 12, 15), 30 * int(label) + 20, dtype=torch.uint8) for label in labels]
    loader = DataLoader(EvaluationSet(images, labels), batch_size=3, shuffle=True, collate_fn=channels_last)
    seen = joined(list(loader))
    assert sorted(seen[1].tolist()) == labels.tolist()
    assert torch.equal(((seen[0][:, 0, 0, 0] * 255 - 20) / 30).round().long(), seen[1])
    train_set = AugmentedImages(images, labels, image_size=8, seed=0)
    views, shuffled = train_set.__getitems__([5, 0, 3])
    assert shuffled.tolist() == [5, 0, 3]
    assert (views.std(dim=(1, 2, 3)) < 1e-3).all()  # nothing of another image in it


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0), (0.0, 0.0)])
def test_targets_say_what_a_mixed_image_is_made_of(alphas: tuple[float, float]) -> None:
    """Images of the grey value of their class, 0 or 1: the share of class 1 is the mean of a mixed image."""
    np.random.seed(0)  # timm draws from NumPy
    labels = torch.tensor([0, 1, 0, 1])  # mixed with their reverse
    images = labels.float().view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()
    shares = []
    for _ in range(20):
        mixed, targets = mixing(*alphas, num_classes=2)(images.clone(), labels)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets[:, 1])
        shares.append(targets[:, 1])
    mixed_at_all = any(((share > 0) & (share < 1)).any() for share in shares)
    assert mixed_at_all == any(alphas)


def test_erasing_greys_one_cell_of_a_share_of_the_pictures() -> None:
    images, u = torch.rand(400, 3, 16, 16), torch.arange(400) / 400
    found = erased(images, u, 0.25)
    cells = (found != images).any(1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).any(4).any(2)  # (400, 4, 4)
    assert torch.equal(cells.sum((1, 2)), (u < 0.25).long())
    assert (found[found != images] == 0.5).all()
    assert (cells[:100].sum(0) >= 6).all()  # every cell about equally often
    assert erased(images, u, 0.0) is images
