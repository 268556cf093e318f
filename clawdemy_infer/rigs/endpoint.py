"""A trace served by any server that speaks OpenAI's completions, as a user sees it from outside.
Each request is sent when its time has come, whether or not those before are answered."""

import asyncio
import json
import os
import time
from collections.abc import Iterable
from random import Random

import httpx

from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.request import Request, Sequence, State

WORDS = "time year people way day man thing world life hand part child eye place work week".split()
"""A token each in most vocabularies: a prompt of which only the length is known is made of them."""
TIMEOUTS = httpx.Timeout(600.0, connect=10.0, pool=None)
"""Seconds of silence after which a request is given up."""


class Endpoint:
    """The server at `url` (`http://localhost:8000/v1`), which knows the model as `model` and gets
    the key in OPENAI_API_KEY if it is set. Raises ValueError for another address."""

    def __init__(self, url: str, model: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r}: http://… or https://… is accepted")
        self.url, self.model = url.rstrip("/"), model
        self.sequences: list[Sequence] = []

    def run(self, requests: Iterable[Request], slo: SLO | None = None) -> Report:
        """Send `requests`, wait for all, and report. What fails is counted and not raised."""
        self.sequences = [Sequence(request, _prompt_tokens(request.prompt),
                                   arrival_s=request.arrival_s or 0.0) for request in requests]
        asyncio.run(self._serve_all())
        return self.report(slo)

    def cancel_all(self) -> None:
        """Nothing is left to do: an interrupt of `run` has hung up on all that were unfinished."""

    def report(self, slo: SLO | None = None) -> Report:
        return Report(self.sequences, [], max_batch=0, blocks=0, slo=slo)

    async def _serve_all(self) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(headers=headers, timeout=TIMEOUTS,
                                     limits=httpx.Limits(max_connections=None)) as client:
            self.start = time.perf_counter()
            await asyncio.gather(*[self._serve(client, sequence) for sequence in self.sequences])

    def _now(self) -> float:
        return time.perf_counter() - self.start

    async def _serve(self, client: httpx.AsyncClient, sequence: Sequence) -> None:
        try:
            await asyncio.sleep(sequence.arrival_s - self._now())
            sequence.enter(State.WAITING, sequence.arrival_s)
            async with client.stream("POST", f"{self.url}/completions",
                                     json=self._body(sequence.request)) as response:
                if response.is_error:
                    said = " ".join((await response.aread()).decode(errors="replace").split())
                    reason = f"HTTP {response.status_code}: {said[:200]}"
                    return sequence.enter(State.FAILED, self._now(), reason)
                ended = await self._receive(response, sequence)
            if ended and sequence.generated:
                return sequence.enter(State.FINISHED, self._now(), ended)
            reason = "no token came" if ended else "the answer broke off"
            sequence.enter(State.FAILED, self._now(), reason)
        except asyncio.CancelledError:
            sequence.enter(State.CANCELLED, self._now(), "cancelled")
            raise
        except (httpx.HTTPError, ValueError) as error:      # a dropped connection; not JSON
            sequence.enter(State.FAILED, self._now(), f"{type(error).__name__}: {error}")

    async def _receive(self, response: httpx.Response, sequence: Sequence) -> str:
        """Take the pieces as they come. Returns why the answer ended, or "" if it broke off."""
        times: list[float] = []                             # when each piece of text came
        reason, tokens = "", 0
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"the server says {event['error']}")
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
                if text := choice.get("text"):
                    times.append(self._now())
                    sequence.text += text
                    if sequence.state is State.WAITING:
                        sequence.enter(State.RUNNING, times[0])
            if usage := event.get("usage"):
                tokens, sequence.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
        sequence.extend(_token_times(times, tokens or len(times)))
        return reason

    def _body(self, request: Request) -> dict:
        """What is asked: greedily, as many tokens as the trace says."""
        body = {"model": self.model, "prompt": _prompt(request), "temperature": 0,
                "max_tokens": request.output_tokens or request.max_tokens,
                "stream": True, "stream_options": {"include_usage": True}}
        if request.output_tokens:       # not OpenAI's own; vLLM, SGLang and llama.cpp know it
            return body | {"ignore_eos": True}
        return body | ({"stop": list(request.stop)} if request.stop else {})


def _prompt_tokens(prompt: int | str | list[int]) -> int:
    """Its length; 0 of a text, until the server says."""
    return prompt if isinstance(prompt, int) else 0 if isinstance(prompt, str) else len(prompt)


def _prompt(request: Request) -> str | list[int]:
    """A text, or ids. Of a bare number that many words, always the same for the same id."""
    if isinstance(request.prompt, int):
        random = Random(str(request.id))
        return " ".join(random.choice(WORDS) for _ in range(request.prompt))
    return request.prompt if isinstance(request.prompt, str) else list(request.prompt)


def _token_times(pieces: list[float], tokens: int) -> list[float]:
    """When each of `tokens` came, spread evenly: of 4 tokens in 2 pieces, 2 came with each."""
    return [pieces[max(0, ((i + 1) * len(pieces) - 1) // tokens)]
            for i in range(tokens if pieces else 0)]
