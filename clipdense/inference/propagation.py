"""Label propagation over graphs of patches and pixels (LPOSS, LPOSS+)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "PixelGraph",
    "conjugate_gradient",
    "lab_colors",
    "patch_graph",
    "patch_positions",
    "propagate_patches",
    "propagate_pixels",
]

ALPHA = 0.95
STEPS = 10
TOLERANCE = 1e-6


def patch_positions(corners: Sequence[tuple[int, int]], grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return the centres (n h w, 2) of the patches of windows, y and x in pixels of the image.

    Args:
        corners: y and x of the first pixel of each window.
        grid: (h, w) of the patches in a window.
        patch_size: side of a patch in pixels.
    """
    rows, columns = torch.meshgrid(*(torch.arange(n) * patch_size for n in grid), indexing="ij")
    inside = torch.stack([rows.flatten(), columns.flatten()], 1) + patch_size // 2
    return (torch.tensor(corners)[:, None] + inside[None]).flatten(0, 1)


def patch_graph(
    features: Tensor,
    positions: Tensor,
    *,
    neighbours: int = 400,
    gamma: float = 3.0,
    sigma: float = 0.01,
    power: float = 1.0,
    alpha: float = ALPHA,
) -> Tensor:
    """Compute L = I - alpha S of the graph of similar, close patches.

    Each patch has edges to its nearest ones by cosine, of weight max(cos, 0)^gamma exp(-sigma d^power) with
    the distance d in pixels; W is the sum of both directions without the diagonal, S = D^-1/2 W D^-1/2.

    Args:
        features: (N, C), L2-normalised.
        positions: (N, 2) in pixels.
        neighbours: number of edges of a patch, the one to itself included; at most N.
        gamma: see above.
        sigma: see above.
        power: see above.
        alpha: see above.

    Returns:
        (N, N), sparse in CSR layout.

    Source: LPOSS (Stojnic et al., CVPR 2025), section 3.2.
    """
    count = len(features)
    similarity, index = (features @ features.T).topk(min(neighbours, count), dim=1)
    places = positions.to(features)
    distance = (places[:, None] - places[index]).norm(dim=2)
    weights = similarity.clamp(min=0) ** gamma * (-sigma * distance**power).exp()
    rows = torch.arange(count, device=features.device)[:, None].expand_as(index)
    off = (rows != index) & (weights > 0)
    pair, values = torch.stack([rows[off], index[off]]), weights[off]
    both = torch.cat([pair, pair.flip(0)], 1), torch.cat([values, values])
    w = torch.sparse_coo_tensor(*both, (count, count)).coalesce()
    degree = torch.zeros(count, dtype=w.dtype, device=w.device).index_add_(0, w.indices()[0], w.values())
    scale = torch.where(degree > 0, degree, 1).rsqrt()
    i, j = w.indices()
    diagonal = torch.arange(count, device=i.device)
    edges = torch.cat([torch.stack([i, j]), torch.stack([diagonal, diagonal])], 1)
    entries = torch.cat([-alpha * w.values() * scale[i] * scale[j], torch.ones_like(degree)])
    return torch.sparse_coo_tensor(edges, entries, (count, count)).coalesce().to_sparse_csr()


def propagate_patches(laplacian: Tensor, scores: Tensor, steps: int = STEPS) -> Tensor:
    """Solve L X = scores (N, K) approximately, in float64; see `conjugate_gradient`."""
    matrix = laplacian.double()
    return conjugate_gradient(lambda x: matrix @ x, scores.double(), steps)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], y: Tensor, steps: int = STEPS, tolerance: float = TOLERANCE
) -> Tensor:
    """Run conjugate gradients on A x = y from 0, each column alone.

    Args:
        apply: from (N, K) to A x.
        y: (N, K).
        steps: at most so many. LPOSS stops after ten steps, and its published result is not the solution.
        tolerance: a column stops once its residual is at most this share of its norm.
    """
    x, r = torch.zeros_like(y), y.clone()
    p, rho = r.clone(), r.square().sum(0)
    limit = (tolerance**2) * rho
    for _ in range(steps):
        active = rho > limit
        if not bool(active.any()):
            break
        q = apply(p)
        step = torch.where(active, rho / (p * q).sum(0).where(active, 1), 0)
        x, r = x + step * p, r - step * q
        new = torch.where(active, r.square().sum(0), rho)
        p = torch.where(active, r + new / rho.where(active, 1) * p, p)
        rho = new
    return x


def lab_colors(image: Tensor) -> Tensor:
    """Convert an sRGB image (3, H, W) in 0..1 to CIE Lab under D65, divided by 100, 128 and 128."""
    linear = torch.where(image > 0.04045, ((image.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, image / 12.92)
    matrix = image.new_tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    )
    white = image.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    xyz = torch.einsum("ij,jhw->ihw", matrix, linear) / white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 4 / 29)
    return torch.stack([(116 * y - 16) / 100, 500 * (x - y) / 128, 200 * (y - z) / 128])


class PixelGraph:
    """Graph of the pixels of an image, whose edges join similar colours in a square neighbourhood.

    Edge weights are exp(-|Lab_i - Lab_j| / tau). The matrix is never built: each shift of the neighbourhood
    is one map of weights.

    Args:
        image: (3, H, W), sRGB in 0..1.
        size: r; the neighbourhood is 2 (r // 2) + 1 pixels wide.
        tau: see above.
        alpha: L = I - alpha S.

    Source: LPOSS+ (Stojnic et al., CVPR 2025), section 3.3.
    """

    def __init__(self, image: Tensor, *, size: int = 13, tau: float = 0.01, alpha: float = ALPHA) -> None:
        self.shape = (image.shape[1], image.shape[2])
        self.alpha, radius = alpha, size // 2
        colors = lab_colors(image)
        shifts = [(dy, dx) for dy in range(radius + 1) for dx in range(-radius, radius + 1)]
        self.shifts = [
            (dy, dx)
            for dy, dx in shifts
            if (dy, dx) > (0, 0) and dy < self.shape[0] and abs(dx) < self.shape[1]
        ]
        self.weights: list[Tensor] = []
        degree = torch.zeros(self.shape, dtype=torch.float64, device=image.device)
        for _, here, there in self._pairs():
            weight = (-(colors[here] - colors[there]).norm(dim=0) / tau).exp().double()
            degree[here] += weight
            degree[there] += weight
            self.weights.append(weight)
        scale = torch.where(degree > 0, degree, 1).rsqrt()
        for i, here, there in self._pairs():
            self.weights[i] = self.weights[i] * scale[here] * scale[there]

    def _pairs(self) -> Iterator[tuple[int, tuple[Any, ...], tuple[Any, ...]]]:
        """Yield the number of each shift, and the pixels at its start and at its end."""
        height, width = self.shape
        for i, (dy, dx) in enumerate(self.shifts):
            here = ..., slice(0, height - dy), slice(max(-dx, 0), width - max(dx, 0))
            there = ..., slice(dy, height), slice(max(dx, 0), width + min(dx, 0))
            yield i, here, there

    def apply(self, x: Tensor) -> Tensor:
        """Compute L x for x (H W, K)."""
        maps = x.T.reshape(-1, *self.shape)
        total = torch.zeros_like(maps)
        for i, here, there in self._pairs():
            total[here] += self.weights[i] * maps[there]
            total[there] += self.weights[i] * maps[here]
        return (maps - self.alpha * total).flatten(1).T


def propagate_pixels(image: Tensor, scores: Tensor, *, size: int = 13, tau: float = 0.01) -> Tensor:
    """Refine pixel scores (K, H, W) over the `PixelGraph` of an image (3, H, W), in float64."""
    graph = PixelGraph(image, size=size, tau=tau)
    solved = conjugate_gradient(graph.apply, scores.double().flatten(1).T)
    return solved.T.reshape(scores.shape)
