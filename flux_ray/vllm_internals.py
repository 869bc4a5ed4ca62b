"""What is used of vLLM beyond what its documentation promises: where it stands, what for, the version it was read in.

Takes:  nothing.
Gives:  VLLM_INTERNALS. A test (tests/rollout/test_vllm_internals.py) names the first that is gone.
Never:  imports vLLM.
"""

from __future__ import annotations

from typing import NamedTuple

READ_IN = "0.32.0"


class Internal(NamedTuple):
    """`name` in `module`; a name with a dot is an attribute of a class there. An empty name: the module is imported."""

    module: str
    name: str
    why: str
    read_in: str = READ_IN


_RELOAD = "vllm.model_executor.model_loader.reload"
_TRANSFER = "vllm.distributed.weight_transfer"
_LLM, _CLIENT = "vllm.v1.engine.async_llm", "vllm.v1.engine.core_client"

VLLM_INTERNALS = (
    # The engine and its updates.
    Internal("vllm.config", "WeightTransferConfig", "which end of the weight channel a worker has"),
    Internal("vllm.engine.arg_utils", "AsyncEngineArgs", "arguments by name; its fields are read from the source"),
    Internal("vllm.inputs", "TokensPrompt", "tokens in, and the salt of the prefix cache"),
    Internal("vllm.outputs", "CompletionOutput", "tokens out, with their log-probs and versions"),
    Internal("vllm.sampling_params", "RequestOutputKind", "one output a request"),
    Internal(_LLM, "AsyncLLM", "the engine"),
    Internal(_LLM, "AsyncLLM.init_weight_transfer_engine", "the weight channel is opened"),
    Internal(_LLM, "AsyncLLM.start_weight_update", "an update"),
    Internal(_LLM, "AsyncLLM.update_weights", "an update"),
    Internal(_LLM, "AsyncLLM.collective_rpc", "an update's end, and what the workers then find"),
    Internal(_LLM, "AsyncLLM.get_weight_version", "the engine attests what it serves"),
    Internal(_LLM, "AsyncLLM.update_weight_version", "the first version's number"),
    Internal(_LLM, "AsyncLLM.resume_generation", "requests go on after an update"),
    Internal(_LLM, "AsyncLLM.errored", "vLLM's own process died while another call than a request waited"),
    Internal(_LLM, "AsyncLLM.dead_error", "the same"),
    Internal(_CLIENT, "AsyncMPClient.pause_scheduler_async", "a pause without 20 ms of sleep"),
    Internal("vllm.v1.engine.exceptions", "EngineDeadError", "told in a few words"),
    # The weight channel.
    Internal(f"{_TRANSFER}.base", "WeightTransferEngine", "gloo's end in the engine"),
    Internal(f"{_TRANSFER}.base", "WeightTransferInitInfo", "the same"),
    Internal(f"{_TRANSFER}.base", "WeightTransferInitRequest", "the same"),
    Internal(f"{_TRANSFER}.base", "WeightTransferUpdateInfo", "the same"),
    Internal(f"{_TRANSFER}.base", "WeightTransferUpdateRequest", "the same"),
    Internal(f"{_TRANSFER}.factory", "", "its backends are registered when it is imported"),
    Internal(f"{_TRANSFER}.factory", "WeightTransferEngineFactory", "gloo and what is staged stand beside vLLM's"),
    Internal(f"{_TRANSFER}.factory", "WeightTransferEngineFactory._registry", "whether ours are there already"),
    Internal(f"{_TRANSFER}.factory", "WeightTransferTrainerFactory", "the trainer's end of nccl and ipc"),
    Internal(f"{_TRANSFER}.ipc_engine", "IPCTrainerInitInfo", "the trainer's end"),
    Internal(f"{_TRANSFER}.ipc_engine", "IPCWeightTransferEngine", "ipc without a pickle"),
    Internal(f"{_TRANSFER}.ipc_engine", "IPCWeightTransferUpdateInfo", "the same"),
    Internal(f"{_TRANSFER}.nccl_engine", "NCCLTrainerInitInfo", "the trainer's end"),
    Internal(f"{_TRANSFER}.nccl_engine", "NCCLWeightTransferEngine", "a whole update kept on the GPU"),
    Internal(f"{_TRANSFER}.nccl_engine", "NCCLWeightTransferUpdateInfo", "the same"),
    Internal(f"{_TRANSFER}.nccl_engine", "packed_nccl_broadcast_consumer", "the same"),
    Internal("vllm.v1.worker.gpu_worker", "Worker.finish_weight_update", "the end of an update, in a worker"),
    # Weights that are loaded into a running model.
    Internal(_RELOAD, "initialize_layerwise_reload", "a load in buckets"),
    Internal(_RELOAD, "finalize_layerwise_reload", "the same"),
    Internal("vllm.model_executor.model_loader.mtp_validation", "disable_mtp_completeness_check",
             "a bucket is never the whole model"),
    # The second set of weights on CPU.
    Internal(f"{_RELOAD}.layerwise", "LAYERWISE_INFO", "what vLLM knows of a shadow is forgotten with it"),
    Internal(f"{_RELOAD}.layerwise", "_get_original_loader", "a shadow's tensors have loaders of their own"),
    Internal(f"{_RELOAD}.layerwise", "_layerwise_process", "layers that wait for tensors that no checkpoint has"),
    Internal(f"{_RELOAD}.layerwise", "get_layerwise_info", "how a layer's tensors looked before they were packed"),
    Internal(f"{_RELOAD}.meta", "to_meta_tensor", "the same"),
    Internal("vllm.model_executor.layers.attention", "is_deferred_attention_layer",
             "some layers derive from others what they compute with"),
    Internal("vllm.model_executor.layers.linear", "UnquantizedLinearMethod", "which models can have a shadow"),
    Internal("vllm.model_executor.layers.vocab_parallel_embedding", "ParallelLMHead", "tied heads are packed again"),
    Internal("vllm.model_executor.layers.vocab_parallel_embedding", "UnquantizedEmbeddingMethod",
             "which models can have a shadow"),
    # Mixtures of experts on CPU.
    Internal("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod",
             "experts are packed again after an update"),
    Internal("vllm.distributed.aux_output_connector.worker", "get_aux_output_connector",
             "which experts were chosen: vLLM's own record of it, joined to the first model runner"),
    Internal("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.execute_model", "the same: a step begins"),
    Internal("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", "the same: its outputs"),
    Internal("vllm.config", "VllmConfig", "the same: the option is allowed on CPU"),
    Internal("vllm.config", "VllmConfig._verify_aux_output_compatibility", "the same: which refuses it there"),
    Internal("vllm.platforms", "current_platform", "the same: whether this is one"),
    Internal("vllm._custom_ops", "cpu_prepack_moe_weight", "whether they hold what was sent, as they are packed"),
    # The start of an engine on CPU.
    Internal("vllm.engine.arg_utils", "", "imported beforehand"),
    Internal("vllm.v1.engine.async_llm", "", "imported beforehand"),
    Internal("vllm.v1.engine.core", "", "imported beforehand"),
    Internal("vllm.v1.worker.cpu_worker", "", "imported beforehand"),
    Internal("vllm.v1.engine.utils", "get_mp_context", "the engine core is forked from a process that imported vLLM"),
)
