"""FLOPs of whatever runs, by torch's own formulas for each operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
# The fused kernels of a CPU, which torch's counter does not know, and their formulas by shapes of the first arguments.
_CPU = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}


class FlopCount(TorchDispatchMode):
    """Adds up `total` of all operations within it; on the way back too, unlike `FlopCounterMode` without hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out, packet = func(*args, **(kwargs or {})), func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in _CPU:
            formula, count = _CPU[packet]
            self.total += formula(*(tensor.shape for tensor in args[:count]))
        return out
