"""The child side of `VllmEngine`: vLLM's engine core in this process, stepped by our own loop.

Only this module imports vllm. Invariants: weights change only between two steps, and scheduling is
synchronous, so the version that computed a token is exact; requests share cached prefixes only with
requests of the same version.
"""

from __future__ import annotations

import gc
import itertools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from palaestra.agents.engines._process import WorkerSetup
from palaestra.agents.engines._service import EngineService, Running, one_line
from palaestra.agents.engines._weights import read_weights, stored_shapes
from palaestra.errors import ConfigError, PalaestraError
from palaestra.processes import Reply

_CPU_BLOCK_TOKENS = 32  # 128 is the CPU's default: short conversations would share no prefix
_CPU_BATCHED_TOKENS = 2048


def build(setup: WorkerSetup) -> VllmService:
    """The service; raises `ConfigError` when vLLM cannot be imported or cannot serve the model."""
    gc.disable()  # collections during vLLM's imports cost a second and free nothing; vLLM freezes the heap afterwards
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"vLLM is installed but cannot be imported: {one_line(error)}") from error
    try:
        service = VllmService(setup, _start_core(setup))
        service.warm_up()
        return service
    except PalaestraError:
        raise
    except Exception as error:  # vLLM refuses models with exceptions of every kind
        raise ConfigError(f"vLLM cannot serve {setup.model_path}: {one_line(error)}") from error
    finally:
        gc.enable()


@dataclass(slots=True)
class _Scoring:
    """One score call; `num_missing` counts the sequences still being computed."""

    reply: Reply
    results: list[NDArray[np.float32]]
    num_missing: int


class VllmService(EngineService):
    """One `work` is one vLLM step."""

    def __init__(self, setup: WorkerSetup, core: Any) -> None:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest, FinishReason

        model_config = core.vllm_config.model_config
        super().__init__(setup, model_config.get_vocab_size())
        self._core = core
        self._sampling_class, self._request_class = SamplingParams, EngineCoreRequest
        self._stopped = FinishReason.STOP
        self._is_tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self._shapes = stored_shapes(setup.model_path, is_tied=self._is_tied)
        self._scoring: dict[str, tuple[_Scoring, int]] = {}
        self._score_numbers = itertools.count()

    def warm_up(self) -> None:
        """Compute two tokens: what the kernels refuse (such as a head size) shows now, not in the first episode."""
        self._add("-1", [0], self._sampling_class(max_tokens=2, seed=0, logprobs=0, detokenize=False))
        while self.work():
            pass
        self._busy_s = 0.0

    def work(self) -> bool:
        """One vLLM step, while it has requests."""
        if not self._core.scheduler.has_requests():
            return False
        started = time.perf_counter()
        outputs, has_executed = self._core.step_fn()
        self._core.post_step(has_executed)
        for client in (outputs or {}).values():
            for output in client.outputs:
                self._take(output)
        self._busy_s += time.perf_counter() - started
        return True

    def close(self) -> None:
        """Release the device."""
        self._core.shutdown()

    def _begin(self, running: Running) -> None:
        call = running.call
        sampling = self._sampling_class(
            temperature=call.temperature,
            top_p=call.top_p,
            max_tokens=call.max_tokens,
            stop_token_ids=list(call.stop_ids),
            seed=self._seed_of(call),
            logprobs=0,
            detokenize=False,
        )
        self._add(str(call.number), call.prompt, sampling)

    def _abort(self, number: int) -> None:
        self._core.abort_requests([str(number)])

    def _score(self, sequences: list[list[int]], reply: Reply) -> None:
        scoring = _Scoring(reply, [np.empty(0, np.float32)] * len(sequences), len(sequences))
        if not sequences:
            reply.send([])
        for index, sequence in enumerate(sequences):
            sampling = self._sampling_class(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            request_id = f"score-{next(self._score_numbers)}"
            self._add(request_id, sequence, sampling, is_first=True)
            self._scoring[request_id] = (scoring, index)

    def _load_weights(self, folder: str, checksum: str | None) -> None:
        tensors = read_weights(folder, self._shapes, is_tied=self._is_tied, checksum=checksum)
        self._core.model_executor.collective_rpc(_load_into, args=(tensors,))

    def _add(self, request_id: str, prompt: list[int], sampling: Any, *, is_first: bool = False) -> None:
        request = self._request_class(
            request_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=str(self._version),  # vLLM keeps cached prefixes over a weight load; the salt hides them
            data_parallel_rank=None,
            priority=-1 if is_first else 0,  # a score is short, and weights wait for it: it takes the next free slot
        )
        self._core.add_request(*self._core.preprocess_add_request(request))

    def _take(self, output: Any) -> None:
        if output.request_id in self._scoring:
            self._take_score(output)
            return
        number = int(output.request_id)
        running = self._running.get(number)
        if running is None:
            return  # aborted
        for token, logprobs in zip(output.new_token_ids, output.new_logprobs.logprobs, strict=True):
            running.add(token, float(logprobs[0]), self._version)
        self._num_tokens += len(output.new_token_ids)
        if output.finish_reason is not None:
            self._finish(number, "stop" if output.finish_reason == self._stopped else "length")

    def _take_score(self, output: Any) -> None:
        scoring, index = self._scoring[output.request_id]
        if output.new_prompt_logprobs_tensors is not None:
            scoring.results[index] = output.new_prompt_logprobs_tensors.logprobs[:, 0].float().numpy().copy()
        if output.finish_reason is None:
            return
        del self._scoring[output.request_id]
        scoring.num_missing -= 1
        if scoring.num_missing == 0:
            scoring.reply.send(scoring.results)


def _load_into(worker: Any, tensors: dict[str, Tensor]) -> None:
    worker.model_runner.model.load_weights(tensors.items())


def _start_core(setup: WorkerSetup) -> Any:
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    has_gpu = torch.cuda.is_available()
    if setup.config.device == "gpu" and not has_gpu:
        raise ConfigError("device 'gpu' asked for, but torch sees none; set device = 'cpu' or install a CUDA build")
    arguments = EngineArgs(
        model=setup.model_path,
        skip_tokenizer_init=True,
        max_model_len=setup.config.max_model_len,
        max_num_seqs=setup.config.max_num_seqs,
        seed=setup.config.seed,
        distributed_executor_backend="uni",
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        async_scheduling=False,
        scheduling_policy="priority",
        enable_prefix_caching=True,
        disable_log_stats=True,
        **(_gpu_arguments(setup) if has_gpu and setup.config.device != "cpu" else _cpu_arguments(setup)),
    )
    vllm_config = arguments.create_engine_config()
    # room for the one token that vLLM must sample after a prompt that `score` sends at full length
    vllm_config.model_config.max_model_len += 1
    return EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=False)


def _gpu_arguments(setup: WorkerSetup) -> dict[str, Any]:
    dtype = "bfloat16" if setup.config.dtype == "auto" else setup.config.dtype
    return {"dtype": dtype, "gpu_memory_utilization": setup.config.gpu_memory_utilization}


def _cpu_arguments(setup: WorkerSetup) -> dict[str, Any]:
    import torch._dynamo

    torch._dynamo.config.disable = True  # else the first request waits seconds for a C++ compiler, or fails without
    _keep_plain_weights()
    return {
        "dtype": "float32" if setup.config.dtype == "auto" else setup.config.dtype,
        "kv_cache_memory_bytes": setup.config.kv_cache_mb << 20,
        "block_size": _CPU_BLOCK_TOKENS,
        # graph capture and warm-up cost minutes and gain nothing at these sizes
        "enforce_eager": True,
        # vLLM rewinds the generator of a seeded request between chunks of its prompt, which CPU generators refuse
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(_CPU_BATCHED_TOKENS, setup.config.max_model_len + 1),
    }


def _keep_plain_weights() -> None:
    """Keep vLLM from packing Linear weights for the CPU and freeing the originals, which no load could replace."""
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils

    def use_plain_linear(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    utils.dispatch_cpu_unquantized_gemm = use_plain_linear
