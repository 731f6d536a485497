"""Calls to somebody's server: JSON for ``raw`` webhooks, messages with pictures for Discord. TLS is checked, redirects are not followed."""

from __future__ import annotations

import json
import ssl
import time
import urllib.error
import urllib.request
import uuid
from typing import Any

from sd3tune.config.hooks import Hook
from sd3tune.records import PreviewRecord, Record, StepRecord, WaitRecord
from sd3tune.reporting.events import Event, Events, heard, loud
from sd3tune.reporting.tail import Patience, RefusedError

TIMEOUT = 30.0
"""Seconds that one call may take; what was accepted and not answered in time is sent again."""

PATIENCE = Patience(pauses=(0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, *(60.0,) * 9), limit=20.0, passing=20)
"""A server that is away for ten minutes loses no picture."""

AGAIN = (408, 425, 429)
"""Answers that ask for another try, as all from 500 on do."""

LONGEST = 2000
"""Characters of a message on Discord."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Webhook:
    """Calls one webhook about the records of one run."""

    def __init__(self, hook: Hook, events: Events, interval: int | None) -> None:
        self.name = hook.name
        self._hook, self._events, self._interval = hook, events, interval
        context = ssl.create_default_context()
        if not hook.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))

    def wants(self, record: Record) -> bool:
        """By the webhook's level; the loss every so many updates, and on Discord only if that is asked for."""
        if isinstance(record, StepRecord):
            asked = self._hook.kind == "raw" if self._interval is None else record.step % self._interval == 0
            return asked and heard(self._hook.level, record)
        if self._hook.kind == "discord" and isinstance(record, PreviewRecord):
            return False
        return not isinstance(record, WaitRecord) and heard(self._hook.level, record)

    def send(self, record: Record) -> None:
        """Call the webhook. Raises: RefusedError for an answer that will not change; OSError."""
        for event in self._events.of(record):
            if (self._hook.kind == "raw" or event.type != "lifecycle.stage") and loud(self._hook.level, event.severity):
                self._call(event)

    def finish(self) -> str:
        """Say that the run is complete, if it is."""
        if self._events.done and loud(self._hook.level, "info"):
            for event in self._events.complete():
                if self._hook.kind == "raw" or event.stage["key"] == "training_complete":
                    self._call(event)
        return ""

    def _call(self, event: Event) -> None:
        body, kind = self._encoded(event)
        headers = {"Content-Type": kind, "User-Agent": "sd3tune"}
        if self._hook.token:
            headers["X-API-Key"] = self._hook.token
        try:
            with self._opener.open(urllib.request.Request(self._hook.url, body, headers, method="POST"), timeout=TIMEOUT):
                return
        except urllib.error.HTTPError as error:
            if error.code in AGAIN or error.code >= 500:
                time.sleep(min(_seconds(error.headers.get("Retry-After")), 5.0))
                raise ConnectionError(f"it answers {error.code}") from None
            raise RefusedError(f"it answers {error.code}") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise RefusedError("its certificate is not valid; ssl_no_verify: true goes without") from None
            raise ConnectionError(f"it cannot be reached: {error.reason}") from None

    def _encoded(self, event: Event) -> tuple[bytes, str]:
        """A call's content and its kind."""
        payload = event.payload(self._events.job, self._hook.prefix)
        if self._hook.kind == "raw":
            return json.dumps(payload).encode(), "application/json"
        message = json.dumps({"content": payload["message"][:LONGEST]}).encode()
        if event.picture is None:
            return message, "application/json"
        return _multipart(message, event.picture.name, event.picture.read_bytes())


def _multipart(message: bytes, name: str, picture: bytes) -> tuple[bytes, str]:
    """A message with one picture, as Discord takes it."""
    border = uuid.uuid4().hex
    head = f'--{border}\r\nContent-Disposition: form-data; name="payload_json"\r\nContent-Type: application/json\r\n\r\n'
    part = f'\r\n--{border}\r\nContent-Disposition: form-data; name="files[0]"; filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
    return head.encode() + message + part.encode() + picture + f"\r\n--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}"


def _seconds(text: str | None) -> float:
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
