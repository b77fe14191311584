"""Secrets are told to nobody: passwords and tokens leave every text before it is shown, logged or recorded.

Two things are hidden: what the environment says is secret, wherever it turns up, and whatever stands where a URL has
its password or a token. A library quotes addresses in messages of its own, in parts too, so both are needed.
"""

import logging
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"

_SHORTEST = 4  # characters: hiding every "a" would hide the message too
_SECRETS = "token|passw(?:or)?d|pwd|secret|api_?key|access_?key|private_?key|auth_?string|credential|signature|sig"
_SECRET_VARIABLE = re.compile(rf"({_SECRETS})s?(_id)?$", re.IGNORECASE)
_QUERY = re.compile(rf"([?&;][\w.-]*?(?:{_SECRETS})[\w.-]*=)([^&;\s'\"<>)]+)", re.IGNORECASE)
_IN_TEXT = re.compile(
    r"(?<=://)"
    r"(?:[^\s/'\"<>]*|"  # as it should be: no slash before the last @
    r"[^\s/:@'\"<>]+:(?!\d{1,5}[/?#])[^\s'\"<>]*)@"  # a password with a slash; but HOST:PORT/PATH@THING is no password
)
_ADDRESS = re.compile(r"^[A-Za-z][\w+.-]*://(?P<user>[^:@/]*)(?::(?P<password>.*))?@")


def redact(text: str) -> str:
    """Return a text without secrets, `***` in their place."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    if "://" in text:
        text = _IN_TEXT.sub(f"{HIDDEN}@", text)
    return _QUERY.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def redact_logs() -> None:
    """Redact every log record of this process when it is made, whoever logs and wherever it goes."""
    make: Any = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record: logging.LogRecord = make(*arguments, **keywords)
        _redact_record(record)
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)


def _redact_record(record: logging.LogRecord) -> None:
    try:
        message = record.getMessage()
    except Exception:  # arguments that do not fit: logging says so itself
        return
    if (clean := redact(message)) != message:
        record.msg, record.args = clean, ()
    if record.exc_info and record.exc_info[0] is not None:
        text = "".join(traceback.format_exception(*record.exc_info))
        if (clean := redact(text)) != text:
            record.exc_text = clean.rstrip("\n")


def _secrets() -> list[str]:
    """Return what the environment holds of secrets, as a whole and in the parts and spellings that libraries quote."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _SECRET_VARIABLE.search(name):
            found |= {value, value.partition(":")[2]}  # USER:PASSWORD
        if "://" in value:
            found.update(_of_address(value))
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def _of_address(address: str) -> Iterator[str]:
    for _, value in _QUERY.findall(address):
        yield from (value, unquote(value))
    match = _ADDRESS.match(address)
    if not match:
        return
    user, password = match["user"], match["password"]
    if not password:
        yield user  # a token alone
        return
    spellings = {password, unquote(password), quote(unquote(password), safe="")}
    first, *_ = re.split(r"[/?#@]", password)
    yield f"{user}:{first}"  # what a parser takes for host and port, which it then complains about
    for spelling in spellings:
        yield spelling
        yield f"{user}:{spelling}"
        for separator in re.finditer(r"[/?#@:]", spelling):  # heads and tails, as a parser cuts it
            yield from (spelling[: separator.start()], spelling[separator.end() :])
        yield from re.split(r"[/?#@:]", spelling)


def with_quoted_password(address: str) -> str:
    """Return an address whose password may hold `/`, `@` and the like in the spelling that libraries can read."""
    match = _ADDRESS.match(address)
    if not match or not match["password"] or re.match(r"\d{1,5}[/?#]", match["password"]):
        return address
    start, end = match.span("password")
    return (
        address[:start]
        + re.sub(r"[/?#@\[\]\s]", lambda each: quote(each[0], safe=""), match["password"])
        + address[end:]
    )
