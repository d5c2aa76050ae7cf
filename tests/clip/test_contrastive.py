"""The contrastive losses, in chunks and over processes, equal their definitions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipdense.clip.contrastive import contrastive_loss, sigmoid_loss
from tests.helpers.processes import run_processes

B, D = 12, 16
BIAS = torch.tensor(-8.0)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit embeddings of images and texts, the scale, and labels of which some are equal."""
    random = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(B, D, generator=random), dim=1) for _ in range(2))
    return image, text, torch.tensor(20.0), torch.randint(5, (B, 1), generator=random)


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b.T).float()


def plain(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor | None = None) -> Tensor:
    """The loss by its definition, with all logits in one matrix."""
    logits = scale * image @ text.T
    targets = torch.eye(len(image)) if labels is None else same(labels, labels)
    targets = targets / targets.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """The sigmoid loss by its definition: the signs of pairs are 1 or -1."""
    signs = 2 * same(labels, labels) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + BIAS)).sum() / len(image)


def patch_similarity(patches: Tensor, texts: Tensor) -> Tensor:
    """(n, P, D), (m, D) -> (n, m): the best patch."""
    return torch.einsum("npd,md->nmp", patches, texts).amax(2)


def with_gradients(loss: Any, image: Tensor, text: Tensor, scale: Tensor, *args: Any, **options: Any) -> Any:
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    value = loss(*leaves, *args, **options)
    value.backward()
    return [value.detach(), *(x.grad for x in leaves)]


def averaged(loss: Any, own: slice, *args: Any, **options: Any) -> list[Tensor]:
    """Loss and gradients of this process's share of the data, averaged as data parallelism does."""
    image, text, scale, _ = data()
    value, du, dv, ds = with_gradients(loss, image[own], text[own], scale, *args, **options)
    whole = [torch.zeros(B, D), torch.zeros(B, D)]
    whole[0][own], whole[1][own] = du, dv
    results = [value, *whole, ds]
    for result in results:
        dist.all_reduce(result)
    return [result / dist.get_world_size() for result in results]


def own_share() -> slice:
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * B // world, (rank + 1) * B // world)


def share(several: bool, chunk_size: int) -> list[Tensor]:
    own = own_share()
    options = {"labels": data()[3][own], "matches": same} if several else {}
    return averaged(contrastive_loss, own, chunk_size=chunk_size, **options)


def sigmoid_share() -> list[Tensor]:
    own = own_share()
    return averaged(sigmoid_loss, own, BIAS, labels=data()[3][own], matches=same)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 100])
def test_chunks_equal_the_plain_loss(several: bool, chunk_size: int) -> None:
    image, text, scale, labels = data()
    options = {"labels": labels, "matches": same} if several else {}
    expected = with_gradients(plain, image, text, scale, *([labels] if several else []))
    found = with_gradients(contrastive_loss, image, text, scale, chunk_size=chunk_size, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    if several:  # the labels matter
        assert abs(expected[0] - plain(image, text, scale)) > 0.1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("several", [False, True])
def test_processes_equal_the_plain_loss(tmp_path: Path, size: int, several: bool) -> None:
    image, text, scale, labels = data()
    expected = with_gradients(plain, image, text, scale, *([labels] if several else []))
    for rank in run_processes(share, size, tmp_path / "run", several, 5):
        for a, b in zip(rank, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_sigmoid_loss_over_processes_equals_its_definition(tmp_path: Path, size: int) -> None:
    image, text, scale, labels = data()
    expected = with_gradients(plain_sigmoid, image, text, scale, labels)
    for rank in run_processes(sigmoid_share, size, tmp_path / "run"):
        for a, b in zip(rank, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_any_similarity_can_be_used() -> None:
    patches = torch.randn(B, 3, D, generator=torch.Generator().manual_seed(1))
    _, text, scale, _ = data()
    logits = scale * patch_similarity(patches, text)
    target = torch.arange(B)
    expected = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    found = contrastive_loss(patches, text, scale, similarity=patch_similarity, chunk_size=5)
    torch.testing.assert_close(found, expected)


class LargestTensor(TorchDispatchMode):
    """Records the number of values of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


@pytest.mark.parametrize("chunk_size, largest", [(60, 300 * 60), (300, 300 * 300)])
def test_no_more_logits_than_a_chunk_are_in_memory(chunk_size: int, largest: int) -> None:
    image, text = (F.normalize(torch.randn(300, 4), dim=1) for _ in range(2))
    with LargestTensor() as mode:
        with_gradients(contrastive_loss, image, text, torch.tensor(20.0), chunk_size=chunk_size)
    assert mode.largest == largest


def test_wrong_arguments_are_named() -> None:
    image, text, scale, labels = data()
    with pytest.raises(ValueError, match="one text per image, got 12 and 11"):
        contrastive_loss(image, text[1:], scale)
    with pytest.raises(ValueError, match="give both"):
        contrastive_loss(image, text, scale, labels=labels)
