"""What other libraries say is shown without secrets, and of more lines the first."""

import pytest

from sftcli.errors import first_line, redact


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a1B2" * 8,
        "https://me:CANARY@hub.local/x",
        "https://CANARY@hub.local/x",
        "Authorization: Bearer CANARY123456",
    ],
)
def test_secrets_are_blotted_out(secret):
    assert "CANARY" not in redact(secret)
    assert "a1B2a1B2" not in redact(secret)


def test_only_the_secret_is_hidden():
    assert redact("hf_abcDEF at https://me:pw@host/x") == "*** at https://***@host/x"
    assert redact("hf_models/hf_qwen2 at https://host/x@y") == "hf_models/hf_qwen2 at https://host/x@y"


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\none\ntwo"), "one"), (ValueError(" \n"), "ValueError"), (KeyError(), "KeyError")],
)
def test_an_error_in_one_line_is_its_first_line_or_its_kind(error, line):
    assert first_line(error) == line
