"""A trace served by any server that speaks OpenAI's completions, as a user sees it from outside.
Each request is sent when its time has come, on a connection of its own, whether or not those before
are answered; whatever comes back costs at most that request."""

import asyncio
import json
import os
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from random import Random
from urllib.parse import quote_plus, unquote_plus

import httpx

from clawdemy_infer.batching.metrics import SLO, Report
from clawdemy_infer.batching.request import Request, Sequence, State
from clawdemy_infer.paths import Refused
from clawdemy_infer.rigs.stream import FIELDS, MAX_ERROR_BYTES, Answer, BadAnswer, printable, words

WORDS = "time year people way day man thing world life hand part child eye place work week".split()
"""A token each in most vocabularies: a prompt of which only the length is known is made of them."""
TIMEOUT_S, CONNECT_S = 600.0, 10.0
"""Seconds after which a request is given up: in all (a default), and to connect."""
MAX_SHOWN = 200
"""Characters of what a server says."""


class Endpoint:
    """The server at `url` (`http://localhost:8000/v1`), which knows the model as `model` and gets
    the key in OPENAI_API_KEY, or `user:password@` and `?query` of the URL; `self.url` and reasons
    are free of these secrets. A request may take `timeout_s` seconds and lacks the fields of
    `leave_out`; `note` is told of a field that the server refuses, once. Raises ValueError for
    another address, and for a key that no header can carry."""

    def __init__(self, url: str, model: str, timeout_s: float = TIMEOUT_S,
                 leave_out: Iterable[str] = (), note: Callable[[str], None] = print) -> None:
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[ -~]*", key):
            raise ValueError("OPENAI_API_KEY: only printable ASCII characters are accepted")
        self.target, self.url, self.auth, secrets = _address(url)
        self.headers = {"Accept-Encoding": "identity"} | (
            {"Authorization": f"Bearer {key}"} if key else {})
        self.secrets = sorted({form(secret) for secret in {*secrets, key} if secret for form in (
            str, quote_plus, lambda text: json.dumps(text)[1:-1])}, key=len, reverse=True)
        self.model, self.timeout_s, self.left_out, self.note = model, timeout_s, {*leave_out}, note
        self.sequences: list[Sequence] = []

    def run(self, requests: Iterable[Request], slo: SLO | None = None) -> Report:
        """Send `requests`, wait for all, and report. What fails is counted and not raised."""
        self.sequences = [Sequence(request, _prompt_tokens(request.prompt),
                                   arrival_s=request.arrival_s or 0.0) for request in requests]
        self.start = time.perf_counter()
        try:
            asyncio.run(self._serve_all())
        finally:                                            # an interrupt hangs up on the others
            for sequence in self.sequences:
                if not sequence.over:
                    sequence.enter(State.CANCELLED, self._now(), "cancelled")
        return self.report(slo)

    def cancel_all(self) -> None:
        """Nothing is left to do: an interrupt of `run` has hung up on all that were unfinished."""

    def report(self, slo: SLO | None = None) -> Report:
        return Report(self.sequences, [], max_batch=0, blocks=0, slo=slo)

    async def _serve_all(self) -> None:
        # No connection and no cookie is kept: what one answer leaves behind reaches no other.
        async with httpx.AsyncClient(
                headers=self.headers, auth=self.auth,
                timeout=httpx.Timeout(None, connect=CONNECT_S),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=()))) as client:
            await asyncio.gather(*[self._serve(client, sequence) for sequence in self.sequences])

    def _now(self) -> float:
        return time.perf_counter() - self.start

    async def _serve(self, client: httpx.AsyncClient, sequence: Sequence) -> None:
        await asyncio.sleep(sequence.arrival_s - self._now())
        sequence.enter(State.WAITING, sequence.arrival_s)
        state = State.FAILED
        try:
            async with asyncio.timeout(self.timeout_s):
                state, reason = State.FINISHED, await self._ask(client, sequence)
        except TimeoutError:
            reason = f"no end within {self.timeout_s:g} s"
        except BadAnswer as error:
            reason = str(error)
        except (httpx.HTTPError, httpx.StreamError, OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
        for secret in self.secrets:
            reason = reason.replace(secret, "***")
        sequence.enter(state, self._now(), printable(reason)[:MAX_SHOWN])

    async def _ask(self, client: httpx.AsyncClient, sequence: Sequence) -> str:
        """Why the answer ended. It is asked for again without the fields that a refusal names."""
        while True:
            body = self._body(sequence)
            async with client.stream("POST", self.target, json=body) as response:
                status, headers = response.status_code, response.headers
                form = f"HTTP {status}, {headers.get('content-type', 'no content type')}"
                if (coding := headers.get("content-encoding", "identity").lower()) != "identity":
                    raise BadAnswer(f"{form}, compressed by {coding}: only identity is accepted")
                if response.is_success:
                    return await self._receive(response, sequence, form)
                if location := headers.get("location"):
                    raise BadAnswer(f"HTTP {status} to {location}: redirects are not followed")
                said = await _error(response)
            refused = [field for field in FIELDS if field in body and field in said]
            if status not in (400, 422) or not refused:
                raise BadAnswer(f"HTTP {status}: {words(said)}")
            for field in set(refused) - self.left_out:
                self.note(f"The server refuses {field}: requests go without it.")
            self.left_out |= {*refused}

    async def _receive(self, response: httpx.Response, sequence: Sequence, form: str) -> str:
        """Take the pieces as they come, and keep them whatever happens. Returns why it ended."""
        answer = Answer(sequence.limit, self._now)
        try:
            async for chunk in response.aiter_raw():
                answer.feed(chunk)
                if answer.done:
                    break
            return answer.end(form)
        finally:
            if answer.times:
                sequence.enter(State.RUNNING, answer.times[0])
            sequence.prompt_tokens = answer.prompt_tokens or sequence.prompt_tokens
            sequence.extend(answer.token_times(), text="".join(answer.pieces))

    def _body(self, sequence: Sequence) -> dict:
        """What is asked: greedily, as many tokens as the trace says."""
        request = sequence.request
        body = {"model": self.model, "prompt": _prompt(request), "temperature": 0,
                "max_tokens": sequence.limit, "stream": True,
                "stream_options": {"include_usage": True}}
        if request.output_tokens:       # not OpenAI's own; vLLM, SGLang and llama.cpp know it
            body |= {"ignore_eos": True}
        elif request.stop:
            body |= {"stop": list(request.stop)}
        return {key: value for key, value in body.items() if key not in self.left_out}


def _address(url: str) -> tuple[httpx.URL, str, tuple[str, str] | None, list[str]]:
    """Where requests are sent, what is shown of it, user and password, and all secrets in it."""
    try:
        found = httpx.URL(url)
        good = (found.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", found.host)
                and found.port != 0 and (found.port or 80) < 2**16)
    except (httpx.InvalidURL, ValueError):
        good = False
    if not good:
        shown = "…" if re.search("[@?#]", url) else url                 # it may hold a secret
        raise Refused("", "url", shown, "http://… or https://…")
    path, mark, query = found.raw_path.partition(b"?")
    shown = found.copy_with(raw_path=path.rstrip(b"/"), userinfo=b"", fragment=None)
    target = shown.copy_with(raw_path=path.rstrip(b"/") + b"/completions" + mark + query)
    user = (found.username, found.password) if found.userinfo else None
    quoted = [*found.userinfo.decode().split(":"),
              *(part.partition("=")[2] or part for part in query.decode().split("&"))]
    secrets = [*quoted, *map(unquote_plus, quoted), *(user or ()),
               b64encode(":".join(user or ()).encode()).decode()]
    return target, str(shown), user, secrets


async def _error(response: httpx.Response) -> str:
    """What a server says that does not answer, as far as that is short and comes soon."""
    said = b""
    with suppress(httpx.HTTPError, TimeoutError):
        async with asyncio.timeout(CONNECT_S):
            async for chunk in response.aiter_raw():
                said += chunk
                if len(said) >= MAX_ERROR_BYTES:
                    break
    return said.decode(errors="replace")


def _prompt_tokens(prompt: int | str | list[int]) -> int:
    """Its length; 0 of a text, until the server says."""
    return prompt if isinstance(prompt, int) else 0 if isinstance(prompt, str) else len(prompt)


def _prompt(request: Request) -> str | list[int]:
    """A text, or ids. Of a bare number that many words, always the same for the same id."""
    if isinstance(request.prompt, int):
        random = Random(str(request.id))
        return " ".join(random.choice(WORDS) for _ in range(request.prompt))
    return request.prompt if isinstance(request.prompt, str) else list(request.prompt)
