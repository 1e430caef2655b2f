"""The efficiencies of the time model: some assumed, others fitted once to two published steps (see published.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of a peak, and times that no peak explains."""

    matmul: float  # of the GPU's matrix-product peak, in the trainer and in an engine's prefill
    link: float  # of NVLink's and the network's bandwidth, in collectives
    memory: float  # of the memory's bandwidth, in decoding and in the optimizer
    decode_s: float  # a decoding step: scheduling, sampling, log-probs
    reduce_s: float  # an all-reduce of a decoding step, of a few hundred kilobytes: latency alone
    sync: float  # bytes per second that a stage's link delivers into loaded weights
    handover: float  # bytes per second that a GPU's optimizer state moves to host memory and back, colocated
    other_s: float  # of a step: gathering, logging


# Fitted by published.fit(): matmul, decode_s, handover, sync, other_s. Assumed: NCCL's usual 70% of a link, 75% of HBM in
# decoding kernels, 15 us for a small all-reduce over NVLink.
GPU = Efficiency(
    matmul=0.442, link=0.7, memory=0.75, decode_s=5.455e-3, reduce_s=15e-6, sync=2.595e9, handover=1.814e9, other_s=3.0
)
# Two cores, FP32, gloo over the loopback: orders of magnitude for small models, good to a factor of two.
CPU = Efficiency(matmul=0.6, link=0.5, memory=0.6, decode_s=15e-3, reduce_s=2e-4, sync=0.3e9, handover=1e9, other_s=0.3)
