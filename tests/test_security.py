"""A run writes no secrets down, runs no code from data, stays in its folder and does not listen."""

import ast
import json
import re
import socket
from pathlib import Path

import pytest
from test_bad_input import (  # noqa: F401  (fixtures)
    ARITHMETIC,
    SHORT,
    model,
    outcome,
    save_nothing,
    tree_of,
    with_reward,
    workplace,
)

from adpo_jax.config import default_config
from adpo_jax.log.redaction import REDACTED, is_redaction_of, redacted
from adpo_jax.policy import Policy

PACKAGE = Path(__file__).resolve().parents[1] / "adpo_jax"
HF_TOKEN = "hf_" + "aB3" * 10
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"
SNAPSHOT = f"~/.cache/huggingface/hub/models--me--big/snapshots/{WANDB_KEY}"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"api_key": "x"}, {"api_key": REDACTED}),
        ({"openai_api_key": "x"}, {"openai_api_key": REDACTED}),
        ({"HF_TOKEN": "y"}, {"HF_TOKEN": REDACTED}),
        ({"judge": {"password": "x"}}, {"judge": {"password": REDACTED}}),
        ({"header": f"Bearer {HF_TOKEN}"}, {"header": f"Bearer {REDACTED}"}),
        ({"run": WANDB_KEY}, {"run": REDACTED}),
        ({"url": "https://me:hunter2@host/x"}, {"url": f"https://{REDACTED}@host/x"}),
        ([{"secret": "x"}], [{"secret": REDACTED}]),
        ({"max_tokens": 7, "eos_token": "</s>"}, {"max_tokens": 7, "eos_token": "</s>"}),
        ({"prompt_key": "question", "seed": 3}, {"prompt_key": "question", "seed": 3}),
        ({"api_key": ""}, {"api_key": ""}),
        ({"openai_key": "x"}, {"openai_key": REDACTED}),
        ({"judge_token": "x"}, {"judge_token": REDACTED}),
        ({"judgeToken": "x", "x-api-key": "y"}, {"judgeToken": REDACTED, "x-api-key": REDACTED}),
        ({"Authorization": "Bearer abc"}, {"Authorization": REDACTED}),
        ({"headers": ["a: x", "Bearer abc"]}, {"headers": ["a: x", f"Bearer {REDACTED}"]}),
        ({"credentials": {"user": "me", "n": 1}}, {"credentials": {"user": REDACTED, "n": 1}}),
        ({"stop_token": "<|end|>", "token_id": 3}, {"stop_token": "<|end|>", "token_id": 3}),
        ({"path": SNAPSHOT}, {"path": SNAPSHOT}),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_is_not_written(given, written):
    assert redacted(given) == written


JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow/abc+\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    ["pwd", "auth", "PGPASSWORD", "MYSQL_PWD", "apiKeys", "api_keys", "basic_auth", "clientSecret",
     "dbPassword", "apikey", "x-auth-token", "jwt", "cookie", "access_credentials", "proxyAuth",
     "sessionToken", "openaiApiKey", "db_pass", "user_pw", "GITHUB_PAT", "cred", "otp", "pin",
     "session_id", "sas", "connection_string", "webhook_url"],
)  # fmt: skip
def test_a_name_of_a_secret_is_known_however_it_is_written(name):
    assert redacted({name: "hunter2"}) == {name: REDACTED}
    assert redacted({name: ["hunter2", {"of": "hunter3"}]}) == {name: [REDACTED, {"of": REDACTED}]}


@pytest.mark.parametrize(
    ("secret", "text"),
    [
        ("abc123", "Authorization: Bearer abc123"),
        ("dXNlcjpw", "curl -H 'authorization: Basic dXNlcjpw' https://host/v1"),
        ("abc123", "X-Api-Key: abc123"),
        ("sid=abc123", "Cookie: sid=abc123"),
        ("abc123", "https://host/v1?model=big&token=abc123&n=1"),
        ("abc123", "https://host/v1?key=abc123"),
        ("abc123", "https://host/v1?X-Amz-Signature=abc123"),
        ("hunter2", "PGPASSWORD=hunter2 psql -h host"),
        ("hunter2", "judge.py --api-key hunter2 --n 3"),
        ("hunter2", "judge.py --password=hunter2"),
        ("hunter2", '{"password": "hunter2", "n": 1}'),
        ("hunter2", "postgres://me:hunter2@host:5432/x"),
        ("hunter2", "redis://:hunter2@host"),
        ("p:w@rd", "https://me:p:w@rd@host/x"),
        ("a1B2c3D4e5F6", "git clone https://a1B2c3D4e5F6@github.com/me/x"),
        ("hunter2", "log in with Password: hunter2 first"),
        ("hunter2", "curl -u me:hunter2 https://host"),
        ("T0AB/B0CD/xyz", "tell https://hooks.slack.com/T0AB/B0CD/xyz"),
        ("12/abc-DEF", "tell https://discord.com/api/webhooks/12/abc-DEF"),
        (JWT, f"the judge takes {JWT} alone"),
        (PEM, f"key:\n{PEM}\nend"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEow", "-----BEGIN PRIVATE KEY-----\nMIIEow"),
        *[
            (token, f"with {token}.")
            for token in (
                HF_TOKEN,
                "sk-" + "a1B2" * 8,
                "sk-ant-api03-" + "a1B2" * 8,
                "ghp_" + "a1B2" * 9,
                "github_pat_" + "a1B2_" * 8,
                "xoxb-" + "123456789012-abcDEF",
                "AKIA" + "ABCD1234" * 2,
                "AIza" + "a1B2-" * 7,
                "glpat-" + "a1B2" * 5,
                "sk_live_" + "a1B2" * 6,
                "npm_" + "a1B2" * 9,
                "dapi" + "a1b2" * 8,
                "lin_api_" + "a1B2" * 8,
                "dop_v1_" + "a1b2" * 16,
                "xai-" + "a1B2" * 8,
                "SK" + "a1b2" * 8,
            )
        ],
    ],
)
def test_a_secret_inside_a_text_is_known_by_its_form_or_the_name_before_it(secret, text):
    written = redacted({"note": text})["note"]
    assert secret not in written
    assert REDACTED in written
    assert redacted(written) == written
    rest = [part for part in re.split(r"\W+", text.replace(secret, " ")) if len(part) > 3]
    lost = [part for part in rest if part not in written]
    assert set(lost) <= {"postgres"}, written


@pytest.mark.parametrize(
    "innocent",
    [
        {"max_tokens": "7", "tokenizer": "Qwen/Qwen3", "author": "me", "pad_token": "PAD"},
        {"tokens": "a b", "tokenizer_path": "/t", "authors": ["me"], "eos_token": "END"},
        {"keyboard": "qwerty", "monkey": "x", "turkey": "y", "oauthor": "z", "design": "sig"},
        {"prompt_template": "The key: {prompt}\nEnd with token={answer} or password={answer}."},
        {"prompt_template": 'Answer as {"key": "value", "auth": "none"}; key=5 is wrong.'},
        {"system_prompt": "Each token counts. The author is a risk-taker: sk-1."},
        {"url": "https://host:8000/v1?model=a&max_tokens=5&n=1#author=me"},
        {"path": "/data/hf_models/ghp/eyJ/AKIA", "name": "desk-" + "lamp-" * 6},
        {"url": "ssh://git@github.com/me/x", "note": "The password: {answer}", "bypass": "x"},
        {"prompt_template": "Send the header Authorization: Bearer {prompt}, not Bearer $TOKEN."},
        {"command": "judge.py --max-tokens 5 --tokenizer x --author=me TOKEN=$TOKEN"},
    ],
)
def test_what_only_sounds_like_a_secret_is_written(innocent):
    assert redacted(innocent) == innocent


def test_no_key_of_the_config_itself_is_taken_for_a_secret():
    def filled(config, name=""):
        if isinstance(config, dict) and config:
            return {key: filled(value, key) for key, value in config.items()}
        return f"value of {name}"

    config = filled(default_config().to_dict())
    assert redacted(config) == config


def test_a_path_whose_commit_an_earlier_version_left_out_is_the_same_path():
    old = SNAPSHOT.replace(WANDB_KEY, REDACTED)
    assert is_redaction_of(old, SNAPSHOT)
    assert not is_redaction_of(old, SNAPSHOT.replace("big", "small"))
    assert not is_redaction_of(old, SNAPSHOT[:-1])
    assert not is_redaction_of(REDACTED, "something else")


def test_secrets_reach_the_reward_function_and_no_file_or_line(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    text = (
        "def f(completions, judge, **columns):\n"
        "    assert judge['api_key'] == 'hunter2'\n"
        "    return [0.5] * len(completions)\n"
    )
    kwargs = {"judge": {"api_key": "hunter2", "header": f"Bearer {HF_TOKEN}"}}
    argv = [*with_reward(text), f"--config.reward_model.reward_kwargs={kwargs}", "--workdir=run"]
    for _ in range(2):  # the second time as a resume, which compares with what was saved
        code, err = outcome(argv, monkeypatch, capsys)
        assert code == 0, err
    for name, content in tree_of(Path("run")).items():
        for secret in ("hunter2", HF_TOKEN, WANDB_KEY):
            assert secret.encode() not in content, name
    assert json.loads(Path("run/config.json").read_text())["reward_model"]["reward_kwargs"] == {
        "judge": {"api_key": REDACTED, "header": f"Bearer {REDACTED}"}
    }


def test_a_run_opens_no_port(monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("a port")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
    monkeypatch.setattr(Policy, "save_pretrained", save_nothing)
    assert outcome([ARITHMETIC, *SHORT, "--workdir=run"], monkeypatch, capsys)[0] == 0


def calls_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            yield ast.unparse(function), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_nothing_unpickles_evaluates_or_trusts_remote_code():
    for path in PACKAGE.rglob("*.py"):
        for function, keywords in calls_of(path):
            # From the process that started this one, or from another process of the same run.
            trusted = path.name in ("wire.py", "distributed.py")
            assert function not in ("pickle.load", "pickle.loads") or trusted, path
            assert function not in ("eval", "exec", "torch.load"), path
            assert keywords.get("allow_pickle", "False") == "False", path
            # The name of an argument: what the user asked for.
            asked = keywords.get("trust_remote_code", "False")
            assert asked == "False" or asked.endswith("trust_remote_code"), path
