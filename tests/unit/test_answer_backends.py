"""Responses by transformers and by a server of vLLM's protocol, which also misbehaves."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from nemo_kd.config import ConfigError, UserInputError
from nemo_kd.evaluation.backends import (
    ServerError,
    TransformersModel,
    VllmModel,
    VllmServer,
)
from nemo_kd.mcore.generation import Sampling
from tests.tiny_models import build_hf_model

VOCABULARY = 157
PROMPTS = [[5, 9, 77], [8], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [150, 2, 150], [31, 30]]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build_hf_model("llama3.1")


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: Any) -> str:
    """The model with a generation_config.json whose settings must not count."""
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path)
    misleading = {"repetition_penalty": 9.0, "min_new_tokens": 5, "max_length": 3}
    (path / "generation_config.json").write_text(json.dumps(misleading))
    return str(path)


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel) -> list[list[int]]:
    """Twelve tokens after each prompt, by transformers, one prompt at a time."""
    return [continue_greedily(model, prompt, 12) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def sampling(greedy: list[list[int]]) -> Sampling:
    """Settings whose stop token ends some of the responses."""
    return Sampling(max_new_tokens=12, stop_ids=frozenset({greedy[0][4], 156}))


@pytest.fixture(scope="module")
def expected(greedy: list[list[int]], sampling: Sampling) -> list[list[int]]:
    found = []
    for tokens in greedy:
        stops = [tokens.index(stop) for stop in sampling.stop_ids if stop in tokens]
        found.append(tokens[: min(stops, default=len(tokens))])
    assert {len(tokens) for tokens in found} > {12}
    return found


def continue_greedily(
    model: PreTrainedModel, prompt: list[int], num_tokens: int
) -> list[int]:
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=[], pad_token_id=0
    )
    tokens = torch.tensor([prompt])
    generated = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=settings,
    )
    return generated[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def opened(folder: str) -> TransformersModel:
    return TransformersModel(folder, torch.float32, torch.device("cpu"))


NUMBERS = range(len(PROMPTS))


def test_greedy_responses_are_those_of_transformers_alone(
    opened, model, sampling, expected
):
    responses = opened.respond(PROMPTS, sampling, NUMBERS)
    assert [response.token_ids for response in responses] == expected
    for prompt, response in zip(PROMPTS, responses, strict=True):
        assert response.stopped == (len(response.token_ids) < 12)
        assert len(response.entropy_nats) == len(response.token_ids) + response.stopped
        whole = torch.tensor([prompt + response.token_ids])
        logits_SV = model(whole).logits[0, len(prompt) - 1 :].double()
        entropy_S = torch.distributions.Categorical(logits=logits_SV).entropy()
        entropy_S = entropy_S[: len(response.entropy_nats)]
        torch.testing.assert_close(
            torch.tensor(response.entropy_nats).double(), entropy_S, atol=1e-4, rtol=0
        )


def test_without_a_stop_token_responses_run_to_the_limit(opened, greedy):
    responses = opened.respond(PROMPTS, Sampling(12, frozenset()), NUMBERS)
    assert [response.token_ids for response in responses] == greedy


def test_responses_end_at_the_last_position(opened, greedy, monkeypatch):
    monkeypatch.setattr(opened._model.config, "max_position_embeddings", 14)
    responses = opened.respond(PROMPTS, Sampling(12, frozenset()), NUMBERS)
    for prompt, response, tokens in zip(PROMPTS, responses, greedy, strict=True):
        assert response.token_ids == tokens[: 14 - len(prompt)]
        assert len(response.entropy_nats) == len(response.token_ids)
        assert not response.stopped


def test_samples_depend_on_seed_and_number_and_not_on_the_batch(opened, sampling):
    def sample(places: list[int], **settings: Any) -> list[list[int]]:
        sampled = replace(sampling, **{"temperature": 1.5, "top_p": 0.9, **settings})
        prompts = [PROMPTS[place] for place in places]
        return [one.token_ids for one in opened.respond(prompts, sampled, places)]

    places = list(NUMBERS)
    assert sample(places) == [sample([place])[0] for place in places]
    assert sample(places, seed=1) != sample(places)
    greedy = opened.respond(PROMPTS, sampling, NUMBERS)
    assert sample(places, top_p=1e-9) == [one.token_ids for one in greedy]


def test_logits_that_are_not_finite_are_refused(opened, sampling):
    embedding = opened._model.get_input_embeddings().weight.data
    before = embedding[31].clone()
    embedding[31] = torch.nan
    try:
        with pytest.raises(UserInputError, match="logits are not finite"):
            opened.respond(PROMPTS, replace(sampling, temperature=1.0), NUMBERS)
    finally:
        embedding[31] = before


def test_samples_follow_the_distribution(opened, model):
    """First tokens after one prompt against transformers' own probabilities."""
    count = 4000
    sampling = Sampling(1, frozenset({156}), temperature=0.7, seed=1)
    responses = opened.respond([PROMPTS[0]] * count, sampling, range(count))
    first = [(one.token_ids or [156])[0] for one in responses]
    found_V = torch.bincount(torch.tensor(first), minlength=VOCABULARY) / count
    logits_V = model(torch.tensor(PROMPTS[:1])).logits[0, -1]
    expected_V = (logits_V / 0.7).softmax(-1)
    bound_V = 5 * (expected_V * (1 - expected_V) / count).sqrt() + 5 / count
    assert ((found_V - expected_V).abs() <= bound_V).all()
    assert expected_V.max() > 0.05


class Server(ThreadingHTTPServer):
    """A server of vLLM's protocol; the first part of a path says how it misbehaves."""

    daemon_threads = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model = model
        self.requests: list[dict[str, Any]] = []

    def url(self, mode: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{mode}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        mode, route = self.path.strip("/").split("/", 1)
        models = [{"id": "teacher", "max_model_len": 100}]
        if mode == "two":
            models.append({"id": "adapter", "max_model_len": 100})
        if mode == "other":
            models = [{"name": "teacher"}]
        assert route == "v1/models"
        if mode == "unauthorized":
            self.answer(401, '{"error":"Unauthorized"}')
        else:
            self.answer(200, json.dumps({"data": models}))

    def do_POST(self) -> None:
        mode, route = self.path.strip("/").split("/", 1)
        assert route == "v1/completions"
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        tokens = continue_greedily(
            self.server.model, request["prompt"], request["max_tokens"]
        )
        ends = [
            tokens.index(stop) + 1
            for stop in request["stop_token_ids"]
            if stop in tokens
        ]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "token_ids": tokens[: min(ends, default=12)],
        }
        if mode == "old":
            del choice["token_ids"]
        if mode == "text":
            choice["token_ids"] = ["a", "b"]
        body = json.dumps({"choices": [choice] * {"twice": 2, "none": 0}.get(mode, 1)})
        is_broken = mode == "500" and len(request["prompt"]) == 1
        if mode == "garbage":
            self.answer(200, "<html>not vLLM</html>")
        elif mode == "cut":
            self.answer(200, body, sent=len(body) // 2)
        elif is_broken:
            self.answer(500, "EngineCore encountered an issue.")
        else:
            self.answer(200, body)

    def answer(self, status: int, body: str, sent: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode()[:sent])


@contextlib.contextmanager
def serving(model: PreTrainedModel) -> Iterator[Server]:
    with Server(model) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def server(model: PreTrainedModel) -> Iterator[Server]:
    with serving(model) as server:
        yield server


def test_a_server_answers_in_the_order_of_the_prompts(server, sampling, expected):
    server.requests.clear()
    responses = VllmServer(server.url("good") + "/").respond(
        PROMPTS, sampling, NUMBERS
    )
    assert [response.token_ids for response in responses] == expected
    assert [response.stopped for response in responses] == [
        len(tokens) < 12 for tokens in expected
    ]
    assert all(response.entropy_nats == [] for response in responses)
    assert len({request["seed"] for request in server.requests}) == len(PROMPTS)
    assert {request["model"] for request in server.requests} == {"teacher"}


def test_a_request_leaves_nothing_to_the_servers_defaults(server, sampling):
    server.requests.clear()
    sampled = Sampling(12, sampling.stop_ids, temperature=0.6, top_p=0.95, seed=7)
    VllmServer(server.url("good")).respond(PROMPTS[:1], sampled, [0])
    (request,) = server.requests
    del request["seed"]
    assert request == {
        "model": "teacher",
        "prompt": PROMPTS[0],
        "return_token_ids": True,
        "max_tokens": 12,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(sampling.stop_ids),
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("500", "/completions answered 500 'EngineCore encountered an issue.'; see the server's log"),
        ("garbage", "answered '<html>not vLLM</html>', not as vLLM does; give the address of vLLM"),
        ("twice", "not as vLLM does"),
        ("none", r"answered \"{'choices': \[\]}\", not as vLLM does"),
        ("old", "give the address of vLLM 0.10.2 or later"),
        ("text", r"'token_ids': \['a', 'b'\].*not as vLLM does"),
        ("cut", "/completions: peer closed connection .*; check that the server runs"),
        ("other", "'name': 'teacher'.*not as vLLM does"),
        ("two", r"serves 2 models \(teacher, adapter\); give a server of one"),
        ("unauthorized", "/models answered 401 .*Unauthorized.*; set VLLM_API_KEY to the server's"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_is_named(server, sampling, mode, message):
    with pytest.raises(ServerError, match=message) as caught:
        VllmServer(server.url(mode)).respond(PROMPTS, sampling, NUMBERS)
    assert str(caught.value).startswith(f"evaluate.url: {server.url(mode)}")


def test_a_server_without_room_is_named(server):
    message = (
        "has room for 100 tokens, but the longest prompt with evaluate.max_new_tokens has 101; "
        "start the server with --max-model-len 101, or lower evaluate.max_new_tokens"
    )
    VllmServer(server.url("good")).check_room(100)
    with pytest.raises(ServerError, match=message):
        VllmServer(server.url("good")).check_room(101)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(
        ServerError, match=r"evaluate.url: http://127.0.0.1:9/v1/models: .*refused"
    ):
        VllmServer("http://127.0.0.1:9/v1")


def test_the_key_of_a_server_is_sent(server, sampling, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Handler,
        "log_message",
        lambda self, *_: seen.append(self.headers["Authorization"]),
    )
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    VllmServer(server.url("good")).respond(PROMPTS[:1], sampling, [0])
    assert seen == ["Bearer secret"] * 2


def test_vllm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ConfigError,
        match=r"evaluate.backend=vllm: the package vllm cannot be imported .*; install it, or serve",
    ):
        VllmModel("folder", torch.float32)
