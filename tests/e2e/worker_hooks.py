"""What tests do to an engine's workers: the real WeightReceiver with switches for damage."""

import torch

from alphamed.weights import receiver
from alphamed.weights.receiver import WeightReceiver

REFRESH = receiver.refresh_tied_head


class HookedReceiver(WeightReceiver):
    def alphamed_hook_damage(self, bucket_index: int, tensor_rank: int) -> None:
        """From now on flip one bit of this bucket as it arrives at this tensor rank; -1: no more."""

        def arrived(bucket, flat):
            if bucket.index == bucket_index and self.rank == tensor_rank:
                flat.view(torch.uint8)[5] ^= 0x10
            return flat

        receiver.arrived = arrived

    def alphamed_hook_stale_head(self, stale: bool) -> None:
        """Leave a tied output layer packed as it was, as vLLM does by itself."""
        receiver.refresh_tied_head = (lambda model: None) if stale else REFRESH

    def alphamed_hook_misload(self, name: str | None) -> None:
        """Load zeros in place of this tensor, after its digest was taken."""

        def unpack(bucket, flat):
            for piece, tensor in UNPACK(bucket, flat):
                yield piece, torch.zeros_like(tensor) if piece.name == name else tensor

        receiver.unpack = unpack


UNPACK = receiver.unpack
