"""What an engine's worker does beyond vLLM's own: it ends an update, and says whether the model holds what was sent.

Takes:  the sender's checksums; on CPU, before the first request, the wish to be told which experts are chosen.
Gives:  AttestingWorker, a worker extension: vLLM finds it by its name.
Knows:  an end of the weight channel that is ours keeps Receipts (attest.py); vLLM's own NCCL end has none.
"""

from __future__ import annotations

from typing import Any

from flux_ray.weights.cpu.routed_experts import return_routed_experts


class AttestingWorker:
    weight_transfer_engine: Any

    def finish_and_attest(self, sent: dict[str, int]) -> list[str]:
        """vLLM's finish_weight_update. Gives the parameters that are wrong."""
        self.finish_weight_update()  # type: ignore[attr-defined]
        receipts = getattr(self.weight_transfer_engine, "receipts", None)
        return receipts.wrong(sent) if receipts is not None else []

    def return_routed_experts(self) -> None:
        """On CPU: requests are answered with the experts that the model chose. vLLM's config must have it so too."""
        return_routed_experts(self)
