"""Generate responses with transformers, with vLLM, or with a server of vLLM.

Each class has `respond`, with the prompts' numbers in the dataset, on which samples depend.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import httpx
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
)

from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.config.shared import PRECISIONS
from nemo_kd.evaluation.inputs import Inputs
from nemo_kd.mcore.generation import (
    Response,
    Sampling,
    check_finite,
    choose_tokens,
)
from nemo_kd.run.collective import on_rank_zero

CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 3600
MESSAGE_CHARACTERS = 300
API_KEY = "VLLM_API_KEY"
"""Environment variable; the server reads the same one."""


class ServerError(UserInputError):
    """A server that cannot be reached or answers with something else than responses."""


class RankZeroBackend:
    """The backend that `evaluate` asks for, opened on rank 0.

    Raises:
        ConfigError, ServerError: on every rank, it cannot be opened.
    """

    def __init__(self, inputs: Inputs, device: torch.device) -> None:
        self._inputs = inputs
        self._device = device
        self._backend: Any = None  # on other ranks
        on_rank_zero(self._open)

    def respond(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int]
    ) -> list[Response]:
        """Return a response per prompt on every rank; every rank calls it."""
        sampling = self._inputs.sampling
        return on_rank_zero(lambda: self._backend.respond(prompts, sampling, numbers))

    def _open(self) -> None:
        config = self._inputs.config
        settings = config.evaluate
        if settings.url is not None:
            server = VllmServer(settings.url)
            longest = max(len(one.prompt_ids) for one in self._inputs.questions)
            server.check_room(longest + settings.max_new_tokens)
            self._backend = server
            return
        folder = config.pretrained_checkpoint.restore_from_path
        dtype = getattr(torch, PRECISIONS[config.trainer.precision])
        if settings.backend == "vllm":
            self._backend = VllmModel(folder, dtype)
        else:
            self._backend = TransformersModel(folder, dtype, self._device)


class TransformersModel:
    """The model in a Hugging Face folder; it chooses tokens as `mcore.generation` does."""

    def __init__(self, folder: str, dtype: torch.dtype, device: torch.device) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
        self._model = model.to(device).eval()
        # Else `generate` takes what is not given from the folder's generation_config.json.
        self._model.generation_config = GenerationConfig()

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
    ) -> list[Response]:
        """Return a response per prompt, cut at the model's last position; all are one batch.

        Raises:
            UserInputError: the model's logits are not finite.
        """
        choice = _Choice(sampling, numbers)
        positions = self._model.config.max_position_embeddings
        generated = _generate(self._model, prompts, sampling, choice)
        entropies_BS = zip(*choice.entropies, strict=True)
        responses = [
            _response(token_ids[: positions - len(prompt)], sampling, entropies)
            for prompt, token_ids, entropies in zip(
                prompts, generated, entropies_BS, strict=True
            )
        ]
        check_finite(responses, numbers)
        return responses


class _Choice(LogitsProcessor):
    """Leaves one token per row, chosen as `mcore.generation` does; records entropies."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.entropies: list[list[float]] = []
        self._randoms = [sampling.random(number) for number in numbers]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniforms_B = torch.tensor(
            [random.random() for random in self._randoms],
            dtype=torch.float64,
            device=scores.device,
        )
        ids_B, entropy_B = choose_tokens(scores, self.sampling, uniforms_B)
        self.entropies.append(entropy_B.tolist())
        only_chosen = torch.full_like(scores, -torch.inf)
        return only_chosen.scatter(1, ids_B[:, None], 0.0)


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    choice: _Choice,
) -> list[list[int]]:
    """Return the tokens after each prompt, padded after a stop token."""
    length = max(map(len, prompts))
    stop_ids = sorted(sampling.stop_ids)
    padding = [[0] * (length - len(prompt)) for prompt in prompts]
    tokens = [[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]
    seen = [[0] * len(pad) + [1] * (length - len(pad)) for pad in padding]
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    generated = model.generate(
        torch.tensor(tokens, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        generation_config=settings,
        logits_processor=[choice],
    )
    return generated[:, length:].tolist()


class VllmModel:
    """The model in a Hugging Face folder, run by the library vLLM on the devices that it finds.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"evaluate.backend=vllm: the package vllm cannot be imported ({error}); install it, "
                "or serve the model elsewhere and give evaluate.url"
            ) from error
        self._vllm = vllm
        self._model = vllm.LLM(model=folder, dtype=dtype, generation_config="vllm")

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
    ) -> list[Response]:
        """Return a response per prompt, without entropies."""
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        settings = [
            self._vllm.SamplingParams(**_vllm_settings(sampling, number))
            for number in numbers
        ]
        outputs = self._model.generate(inputs, settings, use_tqdm=False)
        return [_response([*one.outputs[0].token_ids], sampling) for one in outputs]


class VllmServer:
    """The one model of a vLLM server.

    Raises:
        ServerError: names the URL, the server's message and the next step.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        key = os.environ.get(API_KEY)
        self._client = httpx.Client(
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        answer = self._ask("GET", "/models")
        try:
            models = {each["id"]: each["max_model_len"] for each in answer["data"]}
        except (KeyError, TypeError) as error:
            raise self._unexpected(answer) from error
        if len(models) != 1:
            raise ServerError(
                f"evaluate.url: {url} serves {len(models)} models ({', '.join(models)}); give a "
                "server of one"
            )
        ((self._model, self._max_length),) = models.items()

    def check_room(self, num_tokens: int) -> None:
        """Refuse prompts and responses that the server has no room for."""
        if num_tokens > self._max_length:
            raise ServerError(
                f"evaluate.url: {self._url} has room for {self._max_length} tokens, but the longest "
                f"prompt with evaluate.max_new_tokens has {num_tokens}; start the server with "
                f"--max-model-len {num_tokens}, or lower evaluate.max_new_tokens"
            )

    def respond(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        numbers: Sequence[int],
    ) -> list[Response]:
        """Return a response per prompt, all asked for at once, without entropies."""
        pool = ThreadPoolExecutor(len(prompts))
        try:
            return list(pool.map(self._respond, prompts, repeat(sampling), numbers))
        finally:
            pool.shutdown(cancel_futures=True)

    def _respond(
        self, prompt: Sequence[int], sampling: Sampling, number: int
    ) -> Response:
        request = {
            "model": self._model,
            "prompt": list(prompt),
            "return_token_ids": True,
            **_vllm_settings(sampling, number),
        }
        answer = self._ask("POST", "/completions", json=request)
        try:
            (choice,) = answer["choices"]
            token_ids = [operator.index(token) for token in choice["token_ids"]]
        except (KeyError, TypeError, ValueError) as error:
            raise self._unexpected(answer) from error
        return _response(token_ids, sampling)

    def _ask(self, method: str, path: str, **request: Any) -> Any:
        url = self._url + path
        try:
            answer = self._client.request(method, url, **request)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            problem = str(error).rstrip(".") or type(error).__name__
            raise ServerError(
                f"evaluate.url: {url}: {problem}; check that the server runs (`vllm serve FOLDER`), "
                "then run the same command again"
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise ServerError(
                f"evaluate.url: {url} answered {answer.status_code} "
                f"{answer.text[:MESSAGE_CHARACTERS]!r}; {_next_step(answer.status_code)}"
            )
        try:
            return answer.json()
        except ValueError as error:
            raise self._unexpected(answer.text) from error

    def _unexpected(self, answer: Any) -> ServerError:
        return ServerError(
            f"evaluate.url: {self._url} answered {str(answer)[:MESSAGE_CHARACTERS]!r}, not as vLLM "
            "does; give the address of vLLM 0.10.2 or later, with /v1 at its end"
        )


def _next_step(status: int) -> str:
    if status == httpx.codes.UNAUTHORIZED:
        return f"set {API_KEY} to the server's --api-key"
    if status == httpx.codes.NOT_FOUND:
        return "give the server's address with /v1 at its end"
    return "see the server's log, then run the same command again"


def _vllm_settings(sampling: Sampling, number: int) -> dict[str, Any]:
    """Return parameters of a request, with all that generation_config.json could change."""
    (seed,) = np.random.SeedSequence([sampling.seed, number]).generate_state(1)
    return {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": int(seed),
        "stop_token_ids": sorted(sampling.stop_ids),
        "ignore_eos": True,  # no others than these
    }


def _response(
    token_ids: list[int], sampling: Sampling, entropies: Sequence[float] = ()
) -> Response:
    """Cut generated tokens at the first stop token."""
    stops = [
        place for place, token in enumerate(token_ids) if token in sampling.stop_ids
    ]
    end = stops[0] if stops else len(token_ids)
    return Response(token_ids[:end], [*entropies[: end + len(stops[:1])]], bool(stops))
