"""What a webhook may be told: read from a file, a mapping or a list, with secrets that come from the environment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sd3tune.errors import ConfigError

LEVELS = ("debug", "info", "warning", "error", "critical")
"""From the least to the most important."""

ADDRESS = {"raw": "callback_url", "discord": "webhook_url"}
"""Kind of webhook -> the key of its address."""

KEYS = {"webhook_type", "callback_url", "webhook_url", "auth_token", "message_prefix", "log_level", "ssl_no_verify"}
NAME = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


@dataclass(frozen=True)
class Hook:
    """One webhook. Address and token are not shown."""

    kind: str
    url: str = field(repr=False)
    token: str = field(default="", repr=False)
    prefix: str = ""
    level: str = "info"
    verify: bool = True

    @property
    def name(self) -> str:
        """What it is called in a notice: kind and host, without the rest of the address."""
        return f"webhook {self.kind} ({urlsplit(self.url).hostname})"


def as_given(value: Any) -> Any:
    """A text that is JSON as what it says; a list as a tuple."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return tuple(value) if isinstance(value, list) else value


def hook_problems(value: Any) -> list[str]:
    """What is wrong with a ``webhook_config`` wherever it runs; a file is looked at when the run starts."""
    if value is None or isinstance(value, str):
        if value is not None and value.lstrip().startswith(("{", "[")):
            return ["webhook_config is not valid JSON; write a mapping, or name a file"]
        return []
    rows = value if isinstance(value, tuple) else (value,)
    return [f"webhook_config: {problem}" for row in rows for problem in (*_row_problems(row), *_secrets_in(row))]


def _row_problems(row: Mapping[str, Any]) -> Iterator[str]:
    kind = row.get("webhook_type", "raw" if "callback_url" in row else "discord")
    if kind not in ADDRESS:
        yield f"webhook_type {kind!r} is not known; use raw or discord"
        return
    if unknown := sorted(map(str, set(row) - KEYS)):
        yield f"{', '.join(unknown)} is not known; a webhook has {', '.join(sorted(KEYS))}"
    address = row.get(ADDRESS[kind])
    if not isinstance(address, str) or not (NAME.fullmatch(address) or re.match(r"https?://[^/\s]+", address)):
        yield f"a {kind} webhook needs {ADDRESS[kind]}, an address that begins with http:// or https://, or $NAME of the environment"
    if row.get("log_level", "info") not in LEVELS:
        yield f"log_level {row['log_level']!r} is not known; use {', '.join(LEVELS)}"
    if not isinstance(row.get("ssl_no_verify", False), bool):
        yield "ssl_no_verify is true or false"
    for key in ("auth_token", "message_prefix"):
        if not isinstance(row.get(key, ""), str):
            yield f"{key} is a text"


def _secrets_in(row: Mapping[str, Any]) -> Iterator[str]:
    """A configuration is copied into the run folder, so a secret may not stand in it."""
    for key in ("auth_token", "webhook_url"):
        if isinstance(row.get(key), str) and not NAME.fullmatch(row[key]):
            yield f"{key} is a secret, and this configuration is copied into the run folder; write $NAME (an environment variable)" + (
                ", or put the webhook into a JSON file of its own and name that"
            )
    address = row.get("callback_url")
    if isinstance(address, str) and "://" in address and (urlsplit(address).password or urlsplit(address).query):
        yield "callback_url holds a password or a query; write $NAME (an environment variable), or a JSON file of its own"


def hooks_of(value: Any) -> tuple[Hook, ...]:
    """The webhooks of a ``webhook_config``. Raises: ConfigError for a file that cannot be read, an unset variable, a bad value."""
    where = "webhook_config"
    if value is None:
        return ()
    if isinstance(value, str):
        where = value
        try:
            value = json.loads(Path(value).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError([f"webhook_config: {where} cannot be read ({type(error).__name__})"]) from None
    rows = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(["webhook_config is a mapping or a list of them"], where)
    if problems := [problem for row in rows for problem in _row_problems(row)]:
        raise ConfigError(problems, where)
    return tuple(_hook(row) for row in rows)


def _hook(row: Mapping[str, Any]) -> Hook:
    kind = row.get("webhook_type", "raw" if "callback_url" in row else "discord")
    url, token = (_resolved(row.get(key, ""), key) for key in (ADDRESS[kind], "auth_token"))
    if not re.match(r"https?://[^/\s]+", url):
        raise ConfigError([f"webhook_config: what {row[ADDRESS[kind]]} holds is not an address that begins with http:// or https://"])
    return Hook(kind, url, token, row.get("message_prefix", ""), row.get("log_level", "info"), not row.get("ssl_no_verify", False))


def _resolved(text: str, key: str) -> str:
    named = NAME.fullmatch(text)
    if named and not os.environ.get(named[1]):
        raise ConfigError([f"webhook_config: {key} is ${named[1]}, and the environment has no such variable; set it"])
    return os.environ[named[1]] if named else text
