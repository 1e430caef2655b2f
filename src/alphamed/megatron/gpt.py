"""Megatron's GPTModel over packed rows, whose last stage returns log-probs and entropy in place of logits or a loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from alphamed.megatron.attention import PackedRow, packed_sequences, rotary_frequencies
from alphamed.megatron.context import gather_tokens, own_part
from alphamed.megatron.logprobs import VocabShard, label_logprobs
from alphamed.megatron.transfer import response_rows
from alphamed.model.shape import ModelShape
from alphamed.records import MicroBatch


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How log-probs are computed from the last hidden states."""

    temperature: float
    chunk_tokens: int
    vocab: int  # real tokens, without padding columns
    fused_attention: bool  # Transformer Engine's attention: rows of whole sequences, no shared prompts


class PolicyModel(GPTModel):
    """`model(micro)` gives, on the last stage, log-probs and entropies of the micro-batch's response tokens, [n] each
    where n = micro.mask.sum(); hidden states [T / (context x sequence-parallel ranks), 1, H] on the others.

    With context parallelism a rank works on its own part of the row, and the last stage brings the log-probs of all parts
    together on every context rank: losses need whole responses."""

    def __init__(self, *args, shape: ModelShape, head: HeadOptions, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.head, self.frequencies = head, rotary_frequencies(shape)
        if head.fused_attention:
            self.rotary_pos_emb.inv_freq = self.frequencies.to(self.rotary_pos_emb.inv_freq.device)

    # The callers are ours (step.py), and a module around GPTModel in place of a subclass would rename every parameter.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, micro: MicroBatch
    ) -> Tensor | tuple[Tensor, Tensor]:
        part = self._part(micro)
        output = self._run(micro, part, labels=micro.labels[part], loss_mask=micro.mask[part])
        if not self.post_process or self.config.context_parallel_size == 1:
            return output
        logprobs, entropy = output
        return self._of_all_parts(logprobs, entropy, micro)

    def logits(self, micro: MicroBatch) -> Tensor:
        """[T, V] logits of this rank's vocabulary columns at every position that it holds (the last stage; for tests and
        probes)."""
        return self._run(micro, self._part(micro))[0]

    def _run(self, micro: MicroBatch, part: slice, labels: Any = None, loss_mask: Any = None) -> Tensor:
        """GPTModel's pass over this rank's part. Its positions and attention mask are in the packed row."""
        none: Any = None
        return super().forward(
            micro.tokens[None, part],
            none,
            none,
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=self._packed(micro, part),
        )

    def _part(self, micro: MicroBatch) -> slice:
        return own_part(len(micro.tokens), self.pg_collection.cp) if self.config.context_parallel_size > 1 else slice(None)

    def _packed(self, micro: MicroBatch, part: slice) -> PackedSeqParams:
        if self.head.fused_attention:
            return packed_sequences(micro)
        self.frequencies = self.frequencies.to(micro.positions.device)
        return PackedRow.of(micro, part, self.frequencies, self.config.params_dtype)

    def _of_all_parts(self, logprobs: Tensor, entropy: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        group = self.pg_collection.cp
        counts = micro.mask.view(group.size(), -1).sum(1).tolist()
        both = gather_tokens(torch.stack([logprobs, entropy], 1), counts, group)
        return both[:, 0], both[:, 1].detach()

    def _postprocess(self, hidden_states, input_ids, position_ids, labels, *args, loss_mask=None, **kwargs):
        if not self.post_process:
            return hidden_states
        if labels is None or loss_mask is None:
            return super()._postprocess(hidden_states, input_ids, position_ids, None, *args, **kwargs)
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            # The gradient that label_logprobs returns is complete on every rank: take this rank's slice, sum nothing.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=group
            )
        rows = response_rows(loss_mask, hidden_states.device)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        assert weight is not None, "the last stage has no output layer"
        shard = VocabShard.of(group, len(weight), self.head.vocab)
        return label_logprobs(
            hidden_states[:, 0].index_select(0, rows),
            weight,
            labels.index_select(0, rows),
            shard,
            self.head.temperature,
            self.head.chunk_tokens,
        )
