"""vLLM's own models, updated through a shadow or by a reload: `python -m tests.weights.shadow_models FOLDER MODEL ...`.

Takes:  a folder for the models, and some of those that `make` knows.
Gives:  a line of JSON a model: whether it can have a shadow, what it then says beside what it says after a reload, how
        many layers of shadows vLLM knows of at the end; what is attested of right updates and of planted faults.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

BIG = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
       "num_key_value_heads": 1, "initializer_range": 0.15, "max_position_embeddings": 128}
SAYS = 6  # tokens


def make(name: str, folder: Path) -> None:
    import transformers

    from tests.tiny import tiny_gpt2, write_model

    if name == "gpt2":
        tiny_gpt2(folder, context=128)
        return
    torch.manual_seed(0)
    config = {"qwen2": transformers.Qwen2Config(**BIG, tie_word_embeddings=False),  # biases
              "llama": transformers.LlamaConfig(**BIG, tie_word_embeddings=False),
              "gemma2": transformers.Gemma2Config(**BIG, head_dim=32),  # tied, norms of 1 + weight
              "mixtral": transformers.MixtralConfig(**BIG, num_local_experts=2, head_dim=32)}[name]
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which begin as zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_model(model, folder)


def compare(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

    from flux_ray.weights.cpu.experts import pack_anew
    from flux_ray.weights.cpu.shadow_model import ShadowModel, can_have_shadow, tied_heads

    llm = LLM(model=str(path), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=128,
              disable_log_stats=True, distributed_executor_backend="uni", enable_prefix_caching=False, max_num_seqs=4,
              max_num_batched_tokens=256)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, tied = worker.model_runner.model, tied_heads(worker.model_runner.model)
    weights = load_file(path / "model.safetensors")

    def says() -> list[Any]:
        asked = SamplingParams(max_tokens=SAYS, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": list(range(5, 40))}], asked, use_tqdm=False)[0].outputs
        return [(token, round(of[token].logprob, 5))
                for token, of in zip(output.token_ids, output.logprobs, strict=True)]

    def new_weights() -> None:
        for name, tensor in weights.items():
            weights[name] = tensor * 1.1

    def reload() -> None:
        with set_current_vllm_config(worker.vllm_config):
            pack_anew(model)
            initialize_layerwise_reload(model)
            model.load_weights(weights.items())
            finalize_layerwise_reload(model, worker.model_config)
            for head in tied:
                head.renew()

    known = set(LAYERWISE_INFO)
    given: dict[str, Any] = {"can": can_have_shadow(model), "rounds": []}
    for _ in range(2 if given["can"] else 0):
        before = says()
        new_weights()
        shadow = ShadowModel(model, tied)
        for name, tensor in weights.items():
            shadow.load([(name, tensor)])
        shadow.finish()
        beside = says()
        shadow.put_in_place(torch.float32)
        after = says()
        reload()
        given["rounds"].append({"before": before, "beside": beside, "shadow": after, "reload": says()})
    given["left"] = len(set(LAYERWISE_INFO) - known)
    given |= attested(model, weights, new_weights, reload)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return given


def attested(model: Any, weights: dict[str, Any], new_weights: Any, reload: Any) -> dict[str, Any]:
    """What is told of reloads that are right, and of one that leaves a packed copy; how many kinds are checked."""
    from flux_ray.weights.attest import Receipts
    from flux_ray.weights.buckets import Param
    from flux_ray.weights.checksum import checksum

    receipts = Receipts(model)

    def told(spoil: Any = lambda: None) -> list[str]:
        new_weights()
        receipts.begin()
        receipts.expect(Param(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items())
        receipts.take(weights.items())
        reload()
        spoil()
        return receipts.wrong({name: int(checksum(tensor)) for name, tensor in weights.items()})

    right = [told() for _ in range(2)]
    layers = {path: module for path, module in model.named_modules() if "cpu_linear" in module.__dict__}
    stale = {}
    for path, module in layers.items():
        old = module.cpu_linear
        stale[path] = told(lambda module=module, old=old: setattr(module, "cpu_linear", old))
        # A copy that is new and of the weights of before.
        stale[f"{path} anew"] = told(lambda module=module, old=module.cpu_linear: setattr(
            module, "cpu_linear", lambda *given: old(*given)))
    return {"right": [*right, told()], "stale": stale, "checks": sorted(" ".join(kind) for kind in receipts._right)}


def main() -> None:
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                       "TORCH_COMPILE_DISABLE": "1", "VLLM_PLUGINS": "none"})
    for name in sys.argv[2:]:
        path = Path(sys.argv[1], name)
        make(name, path)
        print(json.dumps({"name": name, **compare(path)}), flush=True)


if __name__ == "__main__":
    main()
