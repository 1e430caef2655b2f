"""Config and model shape -> Megatron's TransformerConfig, model chunks, gradient buffers and optimizer.

Megatron's own configuration objects are built here and nowhere else.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from alphamed.cluster import transformer_engine
from alphamed.config.choices import Dtype, Recompute
from alphamed.config.schema import Config
from alphamed.megatron.gpt import HeadOptions, PolicyModel
from alphamed.megatron.layers import layers_spec
from alphamed.megatron.runtime import Runtime, pick_device
from alphamed.model.shape import ModelShape
from alphamed.records import Layout

RECOMPUTE = {
    Recompute.NONE: {},
    Recompute.SELECTIVE: {"recompute_granularity": "selective"},
    Recompute.FULL: {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
FUSES = "fuse_wgrad_accumulation"
"""The field of Transformer Engine's modules, which they read in every pass."""


def transformer_engine_active(config: Config) -> bool:
    """Whether layers are Transformer Engine's: it must be installed and CUDA in use. Raises ConfigError where it is installed
    and does not work."""
    return pick_device(config) == "cuda" and transformer_engine.usable()


def fused_attention_active(config: Config, layout: Layout) -> bool:
    """Whether attention and rotary positions are Transformer Engine's, over whole sequences. Its own context parallelism needs
    another split of the rows than ours."""
    return transformer_engine_active(config) and not config.parallel.share_prompts and layout.context == 1


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor ranks, and of nothing else."""
    return -(-vocab // tensor) * tensor


def transformer_config(config: Config, shape: ModelShape, layout: Layout) -> TransformerConfig:
    """Megatron's description of the model and of how it is spread."""
    dtype = torch.bfloat16 if config.model.dtype == Dtype.BF16 else torch.float32
    fused = transformer_engine_active(config)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        qk_layernorm=shape.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context,
        # Packed rows differ in length, so stages announce shapes to one another. Megatron couples this to a dispatcher of
        # mixture-of-experts tokens even in dense models.
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",
        # The interleaved schedule with batched point-to-point is silently wrong over gloo (loss off by 0.13).
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        batch_p2p_comm=layout.virtual_pipeline is None,
        # Megatron frees a stage's output while its overlapped send may be under way. On CUDA the allocator keeps the memory
        # until the stream is through; gloo's thread, held up on busy cores, sends whatever is in that memory by then.
        deallocate_pipeline_outputs=layout.pipeline > 1 and not (layout.virtual_pipeline and pick_device(config) == "cpu"),
        # Megatron must divide by neither micro-batches nor data ranks: step.py divides, once.
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=_adds_weight_gradients(config),
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=fused_attention_active(config, layout),  # elsewhere SegmentAttention rotates
        bias_dropout_fusion=fused,
        bias_activation_fusion=fused,
        use_te_activation_func=not fused,  # has nothing to do with TE: MLPs take the activation named in layers.py
        # scales of the values at hand: delayed ones follow earlier batches, are 1 at the start, where gradients divided by a
        # million tokens would vanish, and would have to be kept with checkpoints
        fp8="hybrid" if config.model.fp8 else None,
        fp8_recipe="tensorwise",
        **RECOMPUTE[config.parallel.recompute],
    )


def build_model(config: Config, shape: ModelShape, runtime: Runtime) -> list[PolicyModel]:
    """This rank's model chunks (one, or one per virtual stage), randomly initialised, in the trainer's dtype, on its
    device. Data ranks get equal weights; other layouts get others."""
    layout = runtime.layout
    megatron = transformer_config(config, shape, layout)
    fused, fused_attention = transformer_engine_active(config), fused_attention_active(config, layout)
    head = HeadOptions(config.training_temperature, config.parallel.logprob_chunk(shape.vocab), shape.vocab, fused_attention)
    chunks = []
    for stage in range(layout.virtual_pipeline or 1):
        virtual = stage if layout.virtual_pipeline else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual)
        chunks.append(
            PolicyModel(
                megatron,
                layers_spec(megatron, fused, fused_attention, virtual),
                padded_vocab(shape.vocab, layout.tensor),
                shape.max_positions,
                pre_process=first,
                post_process=last,
                parallel_output=True,
                share_embeddings_and_output_weights=shape.tied,
                vp_stage=virtual,
                shape=shape,
                head=head,
                position_embedding_type="rope" if fused_attention else "none",
            ).to(runtime.device)
        )
    return chunks


def wrap_precision(chunks: list[PolicyModel]) -> list[torch.nn.Module]:
    """Chunks that convert activations at the stage borders where parameters are bf16."""
    return [Float16Module(c.config, c) if c.config.bf16 else c for c in chunks]


def wrap_gradients(config: Config, chunks: list[PolicyModel]) -> list[DistributedDataParallel]:
    """Chunks with FP32 gradient buffers that are summed over data ranks."""
    p = config.parallel
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        use_distributed_optimizer=p.distributed_optimizer,
    )
    # Later chunks of a rank reduce their gradients in one bucket: they are never on the critical path.
    wrapped = [
        DistributedDataParallel(chunks[0].config, settings, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(wrap_precision(chunks))
    ]
    add_weight_gradients(wrapped)
    megatron = chunks[0].config
    if p.overlap_grad_reduce:
        functions = [w.no_sync for w in wrapped]
        megatron.no_sync_func = (  # pyright: ignore[reportAttributeAccessIssue] - the schedules take a list as well
            functions if len(functions) > 1 else functions[0]
        )
    megatron.finalize_model_grads_func = _finalize
    return wrapped


def build_optimizer(config: Config, wrapped: list[DistributedDataParallel]) -> ChainedOptimizer:
    """AdamW with FP32 state; norms and biases are not decayed. Its FP32 copies are taken from the parameters as they are
    now: after loading other weights call `reload_model_params`."""
    o = config.optimizer
    bf16 = config.model.dtype == Dtype.BF16
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=o.lr,
            min_lr=o.min_lr,
            weight_decay=o.weight_decay,
            adam_beta1=o.betas[0],
            adam_beta2=o.betas[1],
            adam_eps=o.eps,
            clip_grad=o.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
        ),
        [*wrapped],
    )
    assert isinstance(optimizer, ChainedOptimizer), f"another version of Megatron-Core: it made a {type(optimizer)}"
    for group in optimizer.param_groups:
        group["weight_decay"] = o.weight_decay * group["wd_mult"]  # which Megatron leaves to its scheduler
        if "fused" in group:  # torch's AdamW: one pass over memory in place of ten
            group["fused"] = True
    return optimizer


def add_weight_gradients(chunks: Sequence[torch.nn.Module]) -> None:
    """Have Transformer Engine's linear layers add weight gradients to Megatron's buffers in the matrix product itself.

    Megatron's setting for it (`_adds_weight_gradients`) cannot be on for them alone: the output layer of GPTModel, whose
    backward pass is ours (logprobs.py), refuses it without apex."""
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, FUSES):
                setattr(module, FUSES, True)


def _adds_weight_gradients(config: Config) -> bool:
    """Whether Megatron's own linear layers can add weight gradients to the buffer: apex's extension on CUDA, our patch on the
    CPU."""
    return pick_device(config) == "cpu" or importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Reduce gradients over all ranks without Megatron's division by its token count: the loss is already divided."""
    finalize_model_grads(model, None, **kwargs)
