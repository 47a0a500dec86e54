"""Webhooks: one POST a transition, signed, with an idempotency key, never following a redirect."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import hmac
import http.client
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from tsforge import __version__
from tsforge.app.watch.settings import WebhookSink, check_address
from tsforge.core.errors import ConfigError
from tsforge.data.watch_state import Outgoing

SIGNATURE, TIMESTAMP, KEY = "X-Tsforge-Signature", "X-Tsforge-Timestamp", "Idempotency-Key"
_LONGEST_WAIT = 86_400.0
_MOST_SIGNS = 200  # of the words of a receiver


class DeliveryError(Exception):
    """A delivery failed: why, and seconds that the receiver asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return the signature header of a body: ``sha256=`` and HMAC-SHA256 in hex over ``TIMESTAMP.BODY``."""
    digest = hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256)
    return f"sha256={digest.hexdigest()}"


class Webhook:
    """One receiver. A receiver that sees an idempotency key again has seen this delivery before.

    Args:
        settings: address, secret and patience.
        watch: name of the watch, part of the key.

    Raises:
        ConfigError: a named environment variable is not set, or holds no address.
    """

    batch = 1

    def __init__(self, settings: WebhookSink, watch: str) -> None:
        address = settings.url or _from_environment(settings.url_env or "", "the address of a webhook")
        try:
            check_address(address, f"the environment variable {settings.url_env}")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._parts = urlsplit(address)
        self._secret = (
            None
            if settings.secret_env is None
            else _from_environment(settings.secret_env, "the key that signs deliveries")
        )
        self._timeout = settings.timeout_seconds
        self._watch = watch

    def send(self, items: Sequence[Outgoing], mark: int) -> int:
        """POST the items, one after another.

        Raises:
            DeliveryError: no answer, or another one than 2xx.
        """
        for item in items:
            self._post(item)
        return mark

    def _post(self, item: Outgoing) -> None:
        body = item.record.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"tsforge/{__version__}",
            KEY: f"{self._watch}:{item.generation}:{item.event_id}:{item.transition}",
        }
        if self._secret is not None:
            headers[TIMESTAMP] = str(int(time.time()))
            headers[SIGNATURE] = sign(self._secret, headers[TIMESTAMP], body)
        parts = self._parts
        kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self._timeout)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            answer = _answer(connection, target, body, headers, self._timeout)
        except http.client.InvalidURL:  # its text holds the address
            raise DeliveryError(f"the address of {parts.hostname} cannot be asked (InvalidURL)") from None
        except (OSError, http.client.HTTPException) as error:  # a certificate that is not trusted is a ValueError too
            said = _one_line(str(error))  # may be what the other side sent
            raise DeliveryError(f"{parts.hostname} does not answer ({type(error).__name__}: {said})") from error
        except ValueError as error:
            raise DeliveryError(f"{parts.hostname} cannot be asked ({type(error).__name__})") from None
        answer.close()  # status and headers stay
        if 200 <= answer.status < 300:
            return
        wait = retry_after(answer.getheader("Retry-After"), time.time())
        if 300 <= answer.status < 400:
            where = _host(answer.getheader("Location") or "") or "another path"
            raise DeliveryError(
                f"{parts.hostname} redirects ({answer.status}) to {where}; redirects are not followed", wait
            )
        raise DeliveryError(f"{parts.hostname} answered {answer.status} {_one_line(answer.reason)}", wait)

    def close(self) -> None:
        """Hold nothing: every delivery has its own connection."""


def _answer(
    connection: http.client.HTTPConnection, target: str, body: bytes, headers: dict[str, str], seconds: float
) -> http.client.HTTPResponse:
    """Return status and headers of the answer to a POST; what it says further is not waited for.

    In a thread of its own, given up after ``seconds`` in all: the limit of a socket begins anew with every byte, and
    the lookup of a name has none.

    Raises:
        OSError, HTTPException: no answer, or none in time.
        ValueError: an address or a header that cannot be sent.
    """
    found: queue.Queue[http.client.HTTPResponse | OSError | http.client.HTTPException | ValueError] = queue.Queue(1)
    connection.auto_open = 0  # a connection that was given up stays closed
    is_over = threading.Event()

    def ask() -> None:
        try:
            connection.connect()
            if is_over.is_set():  # nothing is said any more that will be said again
                connection.close()
                return
            connection.request("POST", target, body=body, headers=headers)
            found.put(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError) as error:  # the last: an address that is none
            found.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        told = found.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"nothing within {seconds:g} s") from None
    finally:
        is_over.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):  # wakes a thread that still reads
                connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    if isinstance(told, Exception):
        raise told
    return told


def _one_line(text: str) -> str:
    """Return words of a receiver as one short line that a terminal shows as it is."""
    words = " ".join(text.split())[:_MOST_SIGNS]
    return "".join(sign if sign.isprintable() else "?" for sign in words)


def _host(address: str) -> str:
    """Return the host that a receiver names in an address, empty where there is none."""
    try:
        return _one_line(urlsplit(address).hostname or "")
    except ValueError:  # brackets that hold no address
        return ""


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; at most a day, 0 for none."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else 0.0


def _from_environment(name: str, what: str) -> str:
    value = os.environ.get(name, "").strip()  # a line end that came along from a file
    if not value:
        raise ConfigError(f"the environment variable {name} is not set; it should hold {what}")
    return value
