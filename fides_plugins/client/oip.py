"""A model behind the Open Inference Protocol (KServe v2) over HTTP, with JSON tensors only.

Every server of the protocol understands JSON tensors; the binary extension is not used, so that the
same call reaches Triton, MLServer, KServe and OpenVINO Model Server. Standard library and numpy only.
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from numpy.typing import NDArray

from fides_plugins.errors import InputError, ServerError
from fides_plugins.oip import read_answer, request_body

#: An answer larger than this is not a class output.
MAX_ANSWER_BYTES = 256 * 1024 * 1024


class OipModel:
    """One model at one endpoint. Safe to call from several threads.

    Parameters
    ----------
    url:
        Address of the model: `http://host:port/v2/models/NAME`, optionally with `/versions/V`.
    timeout_s:
        Of each network operation, seconds.

    Raises
    ------
    InputError
        If the address is not of that form.
    """

    def __init__(self, url: str, timeout_s: float = 5.0) -> None:
        parts = urlsplit(url.rstrip("/"))
        if parts.scheme not in ("http", "https") or not parts.hostname or "/v2/models/" not in parts.path:
            raise InputError(f"{url!r} is no model address.", "Give it as http://host:port/v2/models/NAME.")
        self.url = url
        self.timeout_s = timeout_s
        self._path = f"{parts.path.removesuffix('/infer')}/infer"
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port

    def infer(self, inputs: Mapping[str, NDArray[Any]], output: str = "") -> NDArray[Any]:
        """One output of one inference.

        Parameters
        ----------
        inputs:
            Name to tensor; numbers only.
        output:
            Name of the wanted output; by default the answer's only one.

        Raises
        ------
        ServerError
            If the endpoint cannot be reached, answers with an error, or with something else.
        InputError
            If an input cannot travel as JSON.
        """
        wanted = (output,) if output else ()
        answer = self._post(*request_body(inputs, outputs=wanted, binary=False))
        try:
            tensors = read_answer(answer, names=wanted)
        except ServerError as error:
            raise ServerError(f"{self.url} cannot be used: {error}") from None
        if len(tensors) != 1:
            raise ServerError(
                f"{self.url} answers with {f'no output {output!r}' if output else sorted(tensors)}.",
                "Name the class output.",
            )
        return next(iter(tensors.values()))

    def _post(self, body: bytes, headers: dict[str, str]) -> bytes:
        connection = self._kind(self._host, self._port, timeout=self.timeout_s)
        try:
            connection.request("POST", self._path, body=body, headers=headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(f"{self.url} cannot be reached: {type(error).__name__}.") from None
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"{self.url} answered with status {response.status}: {answer[:200]!r}.")
        return answer
