"""Self-attention as pretrained: keys and values per head."""

from __future__ import annotations

from torch import Tensor, nn

from mlaconvert.config.geometry import WanConfig
from mlaconvert.model.attention.kernel import AttentionPlan, RMSNorm, attend, attend_segments
from mlaconvert.model.cache import LayerCache
from mlaconvert.model.group_quantizer import GroupQuantizer
from mlaconvert.model.rope import Rope


class DenseAttention(nn.Module):
    """Wan's self-attention: full-width RMSNorm on queries and keys, then heads, then RoPE.

    With a `group_quantizer`, the past is seen as the cache gives it back, in a masked pass too.
    """

    group_quantizer: GroupQuantizer | None = None

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)
        self.rope = Rope()

    def forward(self, x: Tensor, plan: AttentionPlan, cache: LayerCache | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; with a cache, the queries see its window."""
        heads = (self.num_heads, -1)
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(x)).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        q = self.rope(q, plan.query_rotary)
        if self.group_quantizer is not None and plan.window is None and plan.segments:
            past_k, past_v = self.group_quantizer.round_trip(plan.frame_tokens, (k, v))
            past, own = ((self.rope(a, plan.key_rotary), b) for a, b in ((past_k, past_v), (k, v)))
            out = attend_segments(q, past, own, plan.segments)
        else:
            k, v = plan.remember(cache, k, v)
            out = attend(q, self.rope(k, plan.key_rotary), v, plan.mask)
        return self.o(out.flatten(-2))
