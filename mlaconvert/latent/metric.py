"""A dense layer in the metric of its moments: what counts as an error, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mlaconvert.config.mla import RopeMode
from mlaconvert.latent.matrices import add_gram, mirror, product, row_gram
from mlaconvert.latent.moments import LayerMoments, whitened
from mlaconvert.latent.roots import Root, TriangularRoot, cholesky, symmetric_root
from mlaconvert.latent.weights import AttentionWeights, float64_rows


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """A dense layer in the metric of its moments, float64; its large matrices are made when they are asked for.

    Inputs are x = root z + mean, with z white. Rows act on z, or on [z; 1], where the last column is what the mean
    gives: in these coordinates, lengths are root mean squares over the inputs.
    """

    weights: AttentionWeights
    moments: LayerMoments
    num_heads: int
    root: Root
    weighted: bool

    @classmethod
    def of(
        cls, weights: AttentionWeights, moments: LayerMoments, num_heads: int, *, weighted: bool = True
    ) -> DenseLayer:
        """A layer in the metric of `moments`; `weighted` False counts all heads alike."""
        root = moments.root or TriangularRoot(cholesky(moments.covariance))
        return cls(weights=weights, moments=moments, num_heads=num_heads, root=root, weighted=weighted)

    @cached_property
    def key(self) -> Tensor:
        """[H, d, D + 1], keys before their norm s."""
        made = whitened(self.weights.k_weight, self.weights.k_bias, self.moments.mean, self.root)
        return made.mul_(self.weights.gains[1].to(made)[:, None]).unflatten(0, (self.num_heads, -1))

    @cached_property
    def value(self) -> Tensor:
        """[H, d, D + 1]."""
        made = whitened(self.weights.v_weight, self.weights.v_bias, self.moments.mean, self.root)
        return made.unflatten(0, (self.num_heads, -1))

    @cached_property
    def value_covariance(self) -> Tensor:
        """[H, d, d]."""
        return row_gram(self.value[..., :-1])

    @cached_property
    def out_gram(self) -> Tensor:
        """[H, d, d], W_O,h^T W_O,h, of all outputs."""
        total = self.moments.query.new_zeros(self.moments.query.shape)
        for output in self.weights.outputs:
            for _, block in float64_rows(output, total.device):
                total += row_gram(block.unflatten(1, (self.num_heads, -1)).permute(1, 2, 0))
        return total

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.moments.query.shape[1]

    @cached_property
    def score_weight(self) -> Tensor:
        """[H]: squared output error of a unit squared score error.

        A head's output moves with its scores as far as its values spread: E|W_O,h (v_h - E v_h)|^2.
        """
        spread = (self.value_covariance * self.out_gram).sum((1, 2))
        norms = self.moments.head_inverse_norms
        return spread * (self.moments.inverse_norm**2 if norms is None else norms.square()) / self.head_dim

    @cached_property
    def importance(self) -> Tensor:
        """[H, pairs]: squared output error of a unit error of a complex key; half, for a score is a real part."""
        power = self.moments.query.diagonal(dim1=1, dim2=2).unflatten(1, (-1, 2)).sum(-1)
        if not self.weighted:
            return torch.ones_like(power)
        power = power * self.score_weight[:, None] / 2
        return power.clamp_min(1e-12 * float(power.max()) or 1e-300)

    def key_weight(self, query_map: Tensor) -> Tensor:
        """Root [H, n, n] of the output error of content keys that meet queries mapped by `query_map` [H, n, d]."""
        if not self.weighted:
            return torch.diag_embed(torch.ones_like(query_map[..., 0]))
        second = query_map @ self.moments.query @ query_map.mT
        return symmetric_root(second * self.score_weight[:, None, None])

    def turning_weight(self) -> Tensor:
        """The same [H, d, d] of whole keys that turn: as good as uncorrelated, pairs count with their power alone."""
        return torch.diag_embed(self.importance.sqrt().repeat_interleave(2, 1))

    def narrow_values(self, width: int) -> tuple[Tensor, Tensor]:
        """`narrow` for the products W_O,h v_h."""
        if width == self.head_dim:
            return identity(self.out_gram), identity(self.out_gram)
        return narrow(self.out_gram, self.value_covariance, width)

    def metric(
        self, content: ContentKeys, shared: SharedKeys, out_map: Tensor, value_map: Tensor, rope: RopeMode
    ) -> Tensor:
        """[D, D]: squared output error of errors in z, of all that the latent has to hold."""
        if self.moments.sensitivity is not None and rope != "cached":
            half = self.root.apply(self.moments.sensitivity)
            return self.root.apply(half.mT)
        total = self.moments.query.new_zeros(len(self.moments.mean), len(self.moments.mean))
        weight = self.turning_weight() if rope == "head" else self.key_weight(content.queries)
        rows = self.key if content.rows is None else content.rows
        add_gram(total, product(weight, rows[..., :-1]).flatten(0, 1))
        heads = symmetric_root(out_map @ self.out_gram @ out_map.mT) @ value_map if self.weighted else value_map
        add_gram(total, product(heads, self.value[..., :-1]).flatten(0, 1))
        if rope == "latent":
            add_gram(total, shared.weight[:, None] * shared.rows[:, :-1])
        return mirror(total)


@dataclass(frozen=True, kw_only=True)
class ContentKeys:
    """Keys of each head that a latent has to hold, and the maps of the queries that meet them."""

    rows: Tensor | None  # [H, nope, D + 1] on [z; 1]; None: the head's own keys
    queries: Tensor  # [H, nope, d]


@dataclass(frozen=True, kw_only=True)
class SharedKeys:
    """Rotary keys that all heads share."""

    rows: Tensor  # [rope, D + 1] on [z; 1]
    queries: Tensor  # [H, rope, d]
    weight: Tensor  # [rope], root of the squared output error of their errors


def identity(like: Tensor) -> Tensor:
    """[H, d, d] ones on the diagonal, for the heads of `like` [H, d, d]."""
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device).expand(like.shape)


def narrow(left: Tensor, right: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Maps [H, width, d] for which (left_map a)^T (right_map b) is the best narrow a^T b.

    `left` and `right` [H, d, d] are the second moments of a and b; the error is the mean square over independent a
    and b. The identity where `width` is the full d.
    """
    if width == left.shape[1]:
        return identity(left), identity(left)
    root_left, root_right = symmetric_root(left), symmetric_root(right)
    u, sigma, vh = torch.linalg.svd(root_left @ root_right)
    scale = sigma[:, :width].sqrt().unsqueeze(-1)
    left_map = scale * torch.linalg.solve(root_left, u[:, :, :width]).mT
    right_map = scale * torch.linalg.solve(root_right, vh[:, :width].mT).mT
    return left_map, right_map
