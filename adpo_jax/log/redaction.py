"""Keeps keys, tokens and passwords that a config may hold from being written to disk.

A secret is known by its name (`judge_token`, `PGPASSWORD`), by a name before it in the same text
(`Authorization: ...`, `?token=...`), or by its own form (`hf_...`, a private key). A password that
stands in the middle of a sentence is not found.
"""

import re
from typing import Any

REDACTED = "<redacted>"

# The last word of a secret's name: "key", "openai_key", "X-Api-Key", "judgeToken" are such names;
# "max_tokens", "eos_token_id" and "author" are not.
_WORDS = (
    "keys?|tokens?_secret|token|auth|bearer|jwt|sig|signature|authorization|cookies?|dsn|secrets?"
    "|pass|pw|pat|creds?|otp|pin|sas|session_?id|webhook|webhook_url|connection_string|conn_str"
)
# These end a secret's name whatever stands before them, as in "PGPASSWORD".
_ENDINGS = "passwords?|passwd|passphrase|pwd|apikeys?|apisecret|authtoken|credentials?"
_SECRET_NAME = re.compile(
    rf"(?i:(?:^|[_\-. ])(?:{_WORDS})$|(?:{_ENDINGS})$)"
    r"|(?<=[a-z0-9])(?:Keys?|Token|Secrets?|Auth|Authorization|Signature|Cookies?)$"
)
# A tokenizer's tokens: "pad_token" names no secret.
_TOKEN_OF_TEXT = re.compile(
    r"(?i:(?:^|_)(?:pad|bos|eos|unk|sep|cls|mask|stop|start|end|image|audio|video|think|eot)_?token$)"
)
# The names of the config itself with such a last word; they are columns of the data.
NO_SECRETS = ("prompt_key", "answer_key", "completion_key", "category_key")
# A token of a tokenizer, such as "</s>", "[MASK]" or "####".
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]|\W*", re.DOTALL)
# Secrets that are known by their own form: private keys, JSON web tokens, the keys of Hugging Face,
# OpenAI and those who write theirs alike, GitHub, GitLab, Slack, AWS, Google, Stripe, npm, PyPI,
# SendGrid, NVIDIA, Groq, Replicate, Databricks, Linear, DigitalOcean, xAI, Twilio; the addresses
# of Slack's and Discord's webhooks. A W&B key is 40 hexadecimal digits and nothing else; inside of
# a longer text such digits are a commit in the path of a snapshot.
_SECRET_VALUE = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|.*)"
    r"|\beyJ[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]{5,}\.[A-Za-z0-9_-]*"
    r"|(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{10,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|gl[a-z]{2,5}-[A-Za-z0-9_-]{20,}|xox[a-z]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|A[KS]IA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[A-Za-z0-9_-]{30,}|SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}|nvapi-[A-Za-z0-9_-]{20,}"
    r"|gsk_[A-Za-z0-9]{20,}|r8_[A-Za-z0-9]{20,}|dapi[0-9a-f]{32}|lin_api_[A-Za-z0-9]{20,}"
    r"|do[opr]_v1_[0-9a-f]{32,}|xai-[A-Za-z0-9]{20,}|SK[0-9a-f]{32})"
    r"|(?<=hooks\.slack\.com/)[^\s\"']+|(?<=/api/webhooks/)[^\s\"']+"
    r"|(?<=\bBearer )[^\s\"'{$<][^\s\"']*|\A[0-9a-f]{40}\Z"
    r"|(?<=://)[^/\s:?#@]*:[^/\s?#@]*(?=@)|(?<=://)[^/\s:?#@]{12,}(?=@)",
    re.DOTALL,
)
# Secrets that are known by a name before them in the same text: headers, the fields of an address
# or of a command, flags. A placeholder ("{prompt}", "$TOKEN", "<redacted>") is none.
_NAMED = re.compile(
    r"(?P<header>(?i:\b(?:proxy-)?authorization|\bx-[a-z-]{0,40}(?:key|token|secret)|\bapi-?key"
    r"|\b(?:set-)?cookie)[\"']?\s{0,9}[:=]\s{0,9}[\"']?(?:(?i:bearer|basic|token|digest)\s+)?+)"
    r"(?P<header_value>[^\s\"'{$<][^\"'\n]*)"
    r"|(?P<before>(?:[?&]|--?|\b)(?P<name>[A-Za-z][\w.-]{0,60})(?:[\"']\s{0,9}:\s{0,9}[\"']|=[\"']?))"
    r"(?P<value>[^\s\"'&;,{$<][^\s\"'&;,]*)"
    r"|(?P<flag>(?<!\S)--?[\w-]{0,60}(?i:password|passwd|token|api-?key|secret)\s+[\"']?)"
    r"(?P<flag_value>[^\s\"'{$<-][^\s\"']*)"
    rf"|(?P<told>(?i:\b[\w-]{{0,40}}(?:{_ENDINGS})\s{{0,9}}:\s{{0,9}})[\"']?)"
    r"(?P<told_value>[^\s\"'{$<][^\s\"']*)"
    r"|(?P<user>(?<!\S)(?:-u|--user)[ =][\"']?[^\s:\"']{1,100}:)(?P<user_value>[^\s\"'{$<]+)"
)


def redacted(value: Any, name: str = "") -> Any:
    """A copy of a config in which everything that looks like a secret is replaced.

    Args:
      value: dicts, lists and plain values.
      name: the name of `value`; all text below the name of a secret is a secret.
    """
    return _redacted(value, _is_secret(name))


def is_redaction_of(old: Any, new: Any) -> bool:
    """Whether `old` is `new` with the commit in a path left out.

    Configs of earlier runs lack such commits, since 40 hexadecimal digits were left out anywhere.
    """
    if not isinstance(old, str) or not isinstance(new, str) or REDACTED not in old:
        return False
    parts = map(re.escape, old.split(REDACTED))
    return re.fullmatch("[0-9a-f]{40}".join(parts), new) is not None


def _redacted(value: Any, secret: bool) -> Any:
    if isinstance(value, dict):
        return {
            name: _redacted(item, secret or _is_secret(str(name))) for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, secret) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if secret and not _SPECIAL_TOKEN.fullmatch(value):
        return REDACTED
    return _NAMED.sub(_without_value, _SECRET_VALUE.sub(REDACTED, value))


def _without_value(match: re.Match) -> str:
    """What `_NAMED` found, without the secret in it."""
    before = match["header"] or match["flag"] or match["told"] or match["user"]
    if before is None:
        in_address = match["before"][0] in "?&"
        # "key" alone is a word of many texts.
        words = re.split(r"[_\-.]", match["name"])
        is_word = len(words) == 1 and words[0].lower() in (
            "key",
            "keys",
            "auth",
            "sig",
            "signature",
        )
        if not _is_secret(match["name"]) or (is_word and not in_address):
            return match[0]
        before = match["before"]
    return before + REDACTED


def _is_secret(name: str) -> bool:
    return (
        name not in NO_SECRETS
        and _SECRET_NAME.search(name) is not None
        and _TOKEN_OF_TEXT.search(name) is None
    )
