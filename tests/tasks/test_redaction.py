"""No secret in what is shown or logged, in whichever spelling or part a library quotes it."""

import logging
from io import StringIO
from pathlib import Path

import pytest

from tasks.tracking.redaction import redact, redact_logs, with_quoted_password

PASSWORD = "s3cr/et@99?x"
ADDRESSES = [
    f"http://ann:{PASSWORD}@host:5000/x",
    "https://host/x?token=s3cret99xyz",
    "postgresql+psycopg2://ann:s3cret99xyz@host/db?password=t0ken99xyz",
    "https://s3cret99xyz@host/api",
    "s3://bucket/x?AWSAccessKeyId=AKIAX99&Signature=s3cret99xyz",
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL", "HTTPS_PROXY"])
def test_an_address_of_the_environment_hides_its_secrets_in_any_part(
    address: str, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, address)
    secrets = ["s3cr", "et@99", "s3cret99xyz", "t0ken99xyz"]
    texts = [address, with_quoted_password(address), f"cannot reach {address!r}: (code 4)", address.partition("://")[2]]
    if "?x@" in address:  # what urllib takes for host and port
        texts += ["Failed to parse: ann:s3cr", f"user 'ann', password '{PASSWORD}'", "no host in 'et@99?x@host'"]
    for text in texts:
        clean = redact(text)
        assert not any(secret in clean for secret in secrets), clean
    assert "host" in redact(address) or "bucket" in redact(address)


@pytest.mark.parametrize("name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_KEY", "AWS_SECRET_ACCESS_KEY"])
def test_a_secret_variable_is_hidden_wherever_it_turns_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "hf_AbCdEf123")
    assert redact("401 for bearer hf_AbCdEf123, try again") == "401 for bearer ***, try again"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("ssh://ann:pw@host/dir: refused", "ssh://***@host/dir: refused"),
        ("url: /api/2.0/x?token=abc&n=1 (Caused by", "url: /api/2.0/x?token=***&n=1 (Caused by"),
        ("webdav://ann:p/w@host/d", "webdav://***@host/d"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
        ("hf:org/name@0123abc, a.b@c", "hf:org/name@0123abc, a.b@c"),
        ("https://host:5000/path@v1", "https://host:5000/path@v1"),
        ("lower calibration.sequences=3 or max_tokens=5", "lower calibration.sequences=3 or max_tokens=5"),
    ],
)
def test_addresses_of_other_origin_are_cut_and_the_rest_stays(text: str, clean: str) -> None:
    assert redact(text) == clean


def test_a_password_is_spelt_as_libraries_can_read_it() -> None:
    assert with_quoted_password("http://ann:p/w@x@host:5/y") == "http://ann:p%2Fw%40x@host:5/y"
    for same in ("http://host:5000/x", "sqlite:////tmp/a@b.db", "http://ann:p%2Fw@host/y", "http://host:80/a@b", "x"):
        assert with_quoted_password(same) == same


def test_logs_are_redacted_whoever_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:{PASSWORD}@host:5000/x")
    before = logging.getLogRecordFactory()
    stream = StringIO()
    logger = logging.getLogger("tests.redaction")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        redact_logs()
        redact_logs()
        logger.error("cannot reach %s", f"http://ann:{PASSWORD}@host:5000/x")
        logger.error("wrong arguments %d", 1)
        try:
            raise ValueError(f"no such host 'ann:{PASSWORD}'")
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(before)
    said = stream.getvalue()
    assert "s3cr" not in said and "et@99" not in said
    assert "wrong arguments 1" in said and "Traceback" in said and "ValueError: no such host" in said
