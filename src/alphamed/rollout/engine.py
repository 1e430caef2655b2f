"""A vLLM engine as a Ray actor: answers tasks with the weights of one policy version, and takes new weights.

Runs in a process of its own; `pool.py` starts it. All that depends on vLLM's version is in the last section.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alphamed.answers.thinking import begin_of, end_of_thinking
from alphamed.cluster import processes
from alphamed.cluster.hardware import this_machine
from alphamed.cluster.processes import Process
from alphamed.cluster.variables import LAUNCHER
from alphamed.data.tokenizer import load_tokenizer
from alphamed.errors import RunFailed
from alphamed.imports import quick_imports
from alphamed.model.weight_files import SMALL_BYTES, require_finite, weight_bytes
from alphamed.records import FinishReason, GenerationTask, Rollout, RolloutGroup, Sampling
from alphamed.rollout import fork_server
from alphamed.rollout.failures import EngineDied, StaleEngine
from alphamed.rollout.spec import CUDA_BATCH_TOKENS, UNUSED_BY_VLLM, EngineSpec

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs

T = TypeVar("T")
WATCH_PERIOD_S = 0.1
FROM_FOLDER = 0
"""The version of the weights that an engine has read from its model folder. Pushed versions begin with 1."""


class RolloutEngine:
    """One engine. It serves requests of the version that it acknowledged last, and of no other; an asynchronous one serves
    requests of older versions too, with that one, and has those wait that come during a push."""

    def __init__(self, spec: EngineSpec):
        self._spec = spec
        self._version: int | None = None
        self._pushed: int | None = None  # received but not yet committed
        self._ids = itertools.count()
        self._running = 0
        self._processes: dict[str, Process] = {}

    async def start(self) -> tuple[str, dict[str, int]]:
        """Load the model. Returns the machine, and the ids of the engine's processes by name (`actor`, `VLLM::EngineCore`,
        ...)."""
        _leave_torchrun()
        if self._spec.cores:
            os.sched_setaffinity(0, {core for ids in self._spec.cores for core in ids})
        if not self._spec.cuda:
            fork_server.start()
        self._tokenizer = load_tokenizer(self._spec.folder)
        end = end_of_thinking(self._spec.answer_after, self._tokenizer)
        self._tokenizer.keep(end + begin_of(end))
        self._drained, self._death = asyncio.Event(), asyncio.get_running_loop().create_future()
        self._drained.set()
        self._serving = asyncio.Event()
        if not self._spec.cuda and weight_bytes(Path(self._spec.folder)) > SMALL_BYTES:
            require_finite(Path(self._spec.folder))  # vLLM packs weights on CPU; smaller folders were read before
        try:
            self._llm = _start_vllm(self._spec)
        except RuntimeError as error:  # vLLM's own says no more than "see above"
            raise RunFailed(self._component(), f"vLLM did not start: {_root_cause() or error}") from error
        self._processes = _engine_processes()
        self._watch = asyncio.create_task(self._watch_processes())
        await self._require_finite()
        self._version = FROM_FOLDER
        self._serving.set()
        return this_machine(), {"actor": os.getpid()} | {name: process.pid for name, process in self._processes.items()}

    async def _require_finite(self) -> None:
        """Raises ConfigError naming the folder's tensor where the weights that vLLM holds are not finite."""
        names = sorted({name for worker in await self.call_workers("alphamed_not_finite") for name in worker})
        if names:
            await self.stop()
            require_finite(Path(self._spec.folder))
            raise RunFailed(
                self._component(),
                f"{names[0]} holds values that are not finite in {self._spec.dtype}; those of "
                f"{self._spec.folder} are finite",
            )

    async def stop(self) -> None:
        """End vLLM's processes cleanly."""
        self._watch.cancel()
        self._version = None
        self._llm.shutdown()

    # ------------------------------------------------------------------------------------------------------- answering
    async def generate(self, task: GenerationTask, version: int) -> RolloutGroup:
        """Sample all responses to a task. They carry the version that they were begun with: with `on_push: keep` their later
        tokens may be of a newer one. Raises StaleEngine for a version that is not served, EngineDied when a process of the
        engine ends."""
        params = _sampling_params(task.sampling, self._spec.eos_ids)
        while True:
            if self._spec.asynchronous:
                await self._while_alive(self._serving.wait())
            begun = self._require(version)
            output = await self._run(task.prompt_token_ids, params)
            if all(completion.finish_reason != FinishReason.ABORT for completion in output.outputs):
                break  # else a push came: the whole group begins again, short answers not favoured
        rollouts = tuple(self._rollout(task, index, begun, completion) for index, completion in enumerate(output.outputs))
        return RolloutGroup(task.group_id, task.question, task.prompt_token_ids, rollouts)

    async def score(self, tokens: Sequence[int], version: int) -> list[float]:
        """Log-probs (temperature 1) of tokens[1:], each given the tokens before it."""
        self._require(version)
        output = await self._run(tokens, _scoring_params())
        places = [place for place in output.prompt_logprobs or () if place is not None]  # the first token has none
        return [place[token].logprob for token, place in zip(tokens[1:], places, strict=True)]

    async def _run(self, prompt: Sequence[int], params: SamplingParams) -> RequestOutput:
        self._running += 1
        self._drained.clear()
        try:
            return await self._while_alive(_final_output(self._llm, prompt, params, f"{next(self._ids)}"))
        finally:
            self._running -= 1
            if not self._running:
                self._drained.set()

    def _rollout(self, task: GenerationTask, index: int, version: int, completion: Any) -> Rollout:
        ids = tuple(completion.token_ids)
        logprobs = tuple(place[token].logprob for token, place in zip(ids, completion.logprobs, strict=True))
        return Rollout(
            group_id=task.group_id,
            question_id=task.question.id,
            sample_index=index,
            response_token_ids=ids,
            logprobs=logprobs,
            text=self._text(ids),
            finish_reason=FinishReason(completion.finish_reason),
            policy_version=version,
        )

    def _text(self, ids: Sequence[int]) -> str:
        """What is graded: up to the first end token. Decoding leaves out control tokens but no others that are named in
        rollout.stop."""
        ends = frozenset(self._spec.eos_ids)
        return self._tokenizer.decode(list(itertools.takewhile(lambda token: token not in ends, ids)))

    def _require(self, version: int) -> int:
        """The version of the weights that the engine holds. Raises EngineDied, or StaleEngine where they are older."""
        if self._death.done():
            raise EngineDied(self._component(), f"{self._death.result()} ended")
        current = self._version
        if current is None or current != version and not (self._spec.asynchronous and current > version):
            held = "no complete weights" if current is None else f"version {current}"
            raise StaleEngine(self._component(), f"was asked to answer with policy version {version} but holds {held}")
        return current

    # --------------------------------------------------------------------------------------------------------- weights
    async def join(self, **rendezvous: Any) -> None:
        """Have the workers join the links over which weights come (`WeightReceiver.alphamed_join`)."""
        await self.call_workers("alphamed_join", **rendezvous)

    async def pause(self) -> None:
        """Serve nothing from here to `commit`. Requests under way end first, are frozen, or aborted, by `on_push`."""
        self._version = self._pushed = None
        self._serving.clear()
        if self._spec.on_push == "wait":
            await self._while_alive(self._drained.wait())
        else:
            await self._while_alive(self._llm.pause_generation(mode=self._spec.on_push))

    async def receive(self, version: int, deadline_s: float) -> list[list[list[int]]]:
        """Take the weights of `version`, after a `pause`: its own where there was none.

        Returns each worker's digests, in the order of the plan's buckets.
        """
        if self._serving.is_set() or self._pushed is not None:
            await self.pause()
        digests = await self.call_workers("alphamed_receive", version=version, deadline_s=deadline_s)
        self._pushed = version
        return digests

    async def commit(self, version: int) -> None:
        """Acknowledge a received version, forget what was computed with older weights, serve again."""
        assert self._pushed == version, f"version {version} is committed, {self._pushed} was received"
        assert await self._while_alive(self._llm.reset_prefix_cache()), "the prefix cache is in use"
        if self._spec.on_push != "wait":  # frozen requests compute their keys and values again, with the new weights
            await self._while_alive(self._llm.resume_generation())
        self._version, self._pushed = version, None
        self._serving.set()

    async def call_workers(self, method: str, **arguments: Any) -> list[Any]:
        """Call a method of every tensor rank's worker; their answers in order."""
        return await self._while_alive(self._llm.collective_rpc(method, kwargs=arguments))

    # ------------------------------------------------------------------------------------------------------------ life
    async def _watch_processes(self) -> None:
        """Notice the end of a process at once: vLLM itself takes up to 6 s, and does not say which."""
        while True:
            dead = [name for name, process in self._processes.items() if not processes.is_alive(process)]
            if dead:
                self._death.set_result(", ".join(f"its process {name} (pid {self._processes[name].pid})" for name in dead))
                return
            await asyncio.sleep(WATCH_PERIOD_S)

    async def _while_alive(self, work: Awaitable[T]) -> T:
        """Await work of vLLM's, but no longer than its processes live."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if not self._death.done() and _says_dead(task.exception()):
                await asyncio.wait({self._death}, timeout=10 * WATCH_PERIOD_S)  # which process, the watch will know
        finally:
            task.cancel()  # nothing to a task that is done
        if self._death.done():
            raise EngineDied(self._component(), f"{self._death.result()} ended")
        if _says_dead(task.exception()):
            raise EngineDied(self._component(), f"vLLM stopped after an error: {_root_cause() or task.exception()}")
        return task.result()

    def _component(self) -> str:
        return f"{self._spec.name} (pid {os.getpid()})"


def _leave_torchrun() -> None:
    """A torchrun that started Ray leaves its variables here, by which torch would take this process for a trainer's rank."""
    for name in list(os.environ):
        if LAUNCHER.matches(name):
            del os.environ[name]


def _root_cause() -> str | None:
    """The first error that vLLM's processes have logged. They write where this process writes: to files, under Ray."""
    for descriptor in (1, 2):
        log = Path(f"/proc/self/fd/{descriptor}").resolve()
        if log.is_file() and (match := re.search(r"\b\w+(?:Error|Exception): .+", log.read_text(errors="replace"))):
            return match[0]
    return None


def _engine_processes() -> dict[str, Process]:
    """vLLM's processes below this one, by title."""
    below = processes.descendants([os.getpid()], processes.everything()).values()
    return {process.command.strip(): process for process in below if process.command.startswith("VLLM")}


# ------------------------------------------------------------------------------------------ vLLM 0.32 (CPU and CUDA builds)
def _start_vllm(spec: EngineSpec) -> Any:
    with quick_imports(*(() if spec.cuda else UNUSED_BY_VLLM)):
        from vllm.model_executor.models import registry
        from vllm.v1.engine import utils
        from vllm.v1.engine.async_llm import AsyncLLM

    if not spec.cuda:
        utils.get_mp_context = fork_server.Context  # pyright: ignore[reportPrivateImportUsage]  # replaced where it is used
        # vLLM looks at a model's class in a process of its own the first time, which imports vLLM once more, lest CUDA be
        # initialized in this one
        registry._run_in_subprocess = lambda look: look()
    return AsyncLLM.from_engine_args(_engine_args(spec))


def _engine_args(spec: EngineSpec) -> AsyncEngineArgs:
    """The only place that builds vLLM's arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    # left to themselves vLLM's formats are Mistral's where the folder holds a consolidated.safetensors besides its weights
    arguments: dict[str, Any] = dict(
        model=spec.folder,
        load_format="safetensors",
        config_format="hf",
        skip_tokenizer_init=True,
        generation_config="vllm",
        dtype=spec.dtype,
        seed=spec.seed,
        tensor_parallel_size=spec.tensor_parallel,
        distributed_executor_backend=_executor(spec),
        max_model_len=spec.max_model_tokens,
        max_num_seqs=spec.max_sequences,
        kv_cache_memory_bytes=spec.kv_cache_bytes,
        gpu_memory_utilization=spec.gpu_memory_utilization,
        enable_prefix_caching=not spec.deterministic,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=spec.worker_extension,
        disable_log_stats=True,
        enable_log_requests=False,
    )
    if spec.cuda:
        arguments |= dict(max_num_batched_tokens=max(CUDA_BATCH_TOKENS, spec.max_sequences))
    else:
        # eager: compiling costs 4 minutes; blocks of 32 (default 128): siblings share more of their prompt
        arguments |= dict(enforce_eager=True, block_size=32)
    if spec.deterministic and not spec.cuda:
        # vLLM's CPU runner rewinds the generator of a seeded request whose prompt comes in chunks, and dies of it:
        # a step must hold all prompts that can be admitted together
        arguments |= dict(
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(spec.max_model_tokens, spec.max_prompt_tokens * spec.max_sequences),
        )
    return AsyncEngineArgs(**arguments)


def _executor(spec: EngineSpec) -> Any:
    """How vLLM runs its workers. On CPU a single worker runs inside EngineCore: without the polling between the two a
    step took 7.7 s instead of 10.2 (SmolLM2, 32 x 64 tokens, 2 cores), and an engine starts 10 s sooner. vLLM itself would
    choose two processes to bind OpenMP threads, which the actor's environment and affinity do here."""
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    if spec.tensor_parallel > 1:
        return "mp"
    return "uni" if spec.cuda else UniProcExecutor


def _sampling_params(sampling: Sampling, eos_ids: Sequence[int]) -> SamplingParams:
    """Sample j of a seeded request uses seed + j (vLLM's own rule for n > 1). An end token is kept in the response."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.n,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        logprobs=0,
        stop_token_ids=list(eos_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _scoring_params() -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


async def _final_output(llm: Any, prompt: Sequence[int], params: SamplingParams, request_id: str) -> RequestOutput:
    output = None
    async for output in llm.generate({"prompt_token_ids": list(prompt)}, params, request_id=request_id):
        pass
    assert output is not None and output.finished, f"request {request_id} ended without an answer"
    return output


def _says_dead(error: BaseException | None) -> bool:
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)
