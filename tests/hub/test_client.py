"""Where token and endpoint come from: environment, .env, a login (users.md 4c, rows 42 and 43). No network."""

import os
import subprocess

import pytest

from flux_core.commands import doctor
from flux_core.errors import AccessError, UsageError
from flux_core.hub import client as hub

CANARY = "hf_Canary0123456789Canary0123456789"


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """No settings, an empty folder and home; what a test sets is gone after it."""
    monkeypatch.chdir(tmp_path)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    monkeypatch.setattr(os, "environ", {**kept, "HF_HOME": str(tmp_path / "hf")})
    monkeypatch.setattr(hub, "_from_env_file", set())
    hub._once.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        f"HF_TOKEN={CANARY}\n",
        f"HUGGINGFACE_TOKEN={CANARY}",
        f"HUGGING_FACE_HUB_TOKEN={CANARY}",
        f"\ufeffHF_TOKEN={CANARY}\n",
        f'HF_TOKEN = "{CANARY}"\r\nFLUX_X=1\r\n',
        f"# mine\r\n\r\nexport HF_TOKEN='{CANARY}'  # a comment\r\n",
        f"  HUGGINGFACE_TOKEN  =  {CANARY}   \n",
    ],
)
def test_a_token_in_env(bare, text, capsys):
    (bare / ".env").write_bytes(text.encode())
    access = hub.access()
    assert access == {"token": CANARY, "endpoint": hub.HUB}
    token = hub.find_token()
    assert token.origin in {f"{name} in .env" for name in hub.TOKENS} and CANARY not in repr(token)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", hub.TOKENS)
@pytest.mark.parametrize("other", hub.TOKENS)
def test_the_environment_beats_env(bare, name, other):
    (bare / ".env").write_text(f"{other}=hf_of_the_file\nHF_HUB_OFFLINE=1\nPATH=/nowhere\n")
    os.environ[name] = CANARY
    assert hub.access()["token"] == CANARY and hub.find_token().origin == f"{name} in the environment"
    assert hub.offline() and os.environ["PATH"] != "/nowhere"


def test_a_login_and_nothing(bare):
    assert hub.access()["token"] is False  # not None, with which the client would look for one by itself
    (bare / "hf").mkdir()
    (bare / "hf" / "token").write_text(CANARY + "\n")
    assert hub.access()["token"] is True and hub.find_token().origin == f"the login's file {bare / 'hf' / 'token'}"


def test_env_in_another_encoding_is_one_line(bare, capsys):
    (bare / ".env").write_bytes(f"HF_TOKEN={CANARY}\xff".encode("latin-1"))
    hub.access()
    err = capsys.readouterr().err
    assert err.startswith("warning: .env could not be read") and err.count("\n") == 1 and CANARY not in err


def test_a_tracked_env_is_a_warning_once(bare, capsys):
    (bare / ".env").write_text(f"HF_TOKEN={CANARY}")
    subprocess.run(["git", "init", "-q"], check=True)
    hub.access()
    assert capsys.readouterr().err == ""
    subprocess.run(["git", "add", "-f", ".env"], check=True)
    hub.access()
    hub.access()
    err = capsys.readouterr().err
    assert err.startswith("warning: .env is tracked by git") and err.count("\n") == 1 and CANARY not in err


@pytest.mark.parametrize(
    ("given", "seen"), [("  ", hub.HUB), ("", hub.HUB), (" https://hub.example// ", "https://hub.example")]
)
def test_an_endpoint_is_normalised(given, seen, capsys):
    os.environ["HF_ENDPOINT"] = given
    assert hub.access()["endpoint"] == seen and os.environ.get("HF_ENDPOINT", hub.HUB) == seen
    assert capsys.readouterr().err == ""  # no token, no warning


@pytest.mark.parametrize("given", ["hub.example", "ftp://x", "https://", "https://[::", "https://me:pass@hub.example"])
def test_what_is_no_address(given):
    os.environ["HF_ENDPOINT"] = given
    with pytest.raises(UsageError, match="is no address") as caught:
        hub.access()
    assert "pass" not in str(caught.value)


def test_a_mirror_with_a_token(capsys):
    os.environ.update(HF_ENDPOINT="https://hub.example", HF_TOKEN=CANARY)
    hub.access()
    hub.access()
    told = "warning: https://hub.example is not huggingface.co, and it receives the token from HF_TOKEN"
    assert capsys.readouterr().err == f"{told} in the environment\n"
    os.environ["HF_ENDPOINT"] = "http://hub.example"
    with pytest.raises(AccessError, match="not encrypted"):
        hub.access()
    os.environ["HF_ENDPOINT"] = "http://localhost:80"
    assert hub.access()["token"] == CANARY


@pytest.mark.parametrize("token", [f"{CANARY}\nX: y", f"Bearer {CANARY}", f"{CANARY}…"])
def test_a_token_that_the_transport_would_quote(token):
    os.environ["HF_TOKEN"] = token
    with pytest.raises(AccessError, match="from HF_TOKEN in the environment holds") as caught:
        hub.access()
    assert CANARY not in str(caught.value)


def test_of_several_tokens_the_first_name_counts(bare):
    for name, value in zip(reversed(hub.TOKENS), ("hf_c", "hf_b", "hf_a"), strict=True):
        os.environ[name] = value
        assert (hub.find_token().value, hub.find_token().origin) == (value, f"{name} in the environment")


@pytest.mark.parametrize("origin", [*hub.TOKENS, "HF_TOKEN_PATH", "login"])
def test_an_endpoint_of_env_gets_no_token_from_elsewhere(bare, origin):
    """Else a .env in a strange folder could lead the user's token to anybody."""
    (bare / ".env").write_text("HF_ENDPOINT=https://hub.example\n")
    (bare / "hf").mkdir()
    if origin in hub.TOKENS:
        os.environ[origin] = CANARY
    else:
        (bare / "hf" / "token").write_text(CANARY)
    if origin == "HF_TOKEN_PATH":  # the same file, named by the .env
        with (bare / ".env").open("a") as file:
            file.write(f"HF_TOKEN_PATH={bare / 'hf' / 'token'}\n")
    with pytest.raises(
        AccessError, match=r"HF_ENDPOINT=https://hub\.example comes from \.env, and the token"
    ) as caught:
        hub.access()
    told = str(caught.value)
    assert "Next: set HF_ENDPOINT in the environment" in told and CANARY not in told
    assert (origin if origin in hub.TOKENS else "the login's file") in told


def test_where_the_user_has_named_it_too_it_is_no_endpoint_of_env(bare, capsys):
    (bare / ".env").write_text("HF_ENDPOINT=https://hub.example\n")
    os.environ["HF_TOKEN"] = CANARY
    with hub.settings(HF_ENDPOINT="https://mine.example"):
        assert hub.access() == {"token": CANARY, "endpoint": "https://mine.example"}
    with pytest.raises(AccessError, match="comes from"):
        hub.access()
    with hub.settings(HF_ENDPOINT="https://hub.example"):
        assert hub.access()["token"] == CANARY
    with hub.settings(HF_ENDPOINT=None), pytest.raises(AccessError, match="comes from"):
        hub.access()


@pytest.mark.parametrize(
    ("lines", "token"),
    [
        (f"HF_ENDPOINT=https://hub.example\nHF_TOKEN={CANARY}\n", CANARY),  # both of one file
        ("HF_ENDPOINT=https://hub.example\n", False),  # no token
    ],
)
def test_an_endpoint_of_env_may_have_its_own_token_or_none(bare, lines, token):
    (bare / ".env").write_text(lines)
    assert hub.access() == {"token": token, "endpoint": "https://hub.example"}
    assert doctor._endpoint() == ["https://hub.example, from .env"]


def test_the_hub_itself_may_be_named_in_env(bare):
    (bare / ".env").write_text(f"HF_ENDPOINT={hub.HUB}/\n")
    os.environ["HF_TOKEN"] = CANARY
    assert hub.access() == {"token": CANARY, "endpoint": hub.HUB}
