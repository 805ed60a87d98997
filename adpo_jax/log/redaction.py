"""Keeps keys, tokens and passwords that a config may hold from being written to disk."""

import re
from typing import Any

REDACTED = "<redacted>"

# The last word of a secret's name: "key", "openai_key", "X-Api-Key", "judgeToken" are such names;
# "max_tokens" and "eos_token_id" are not.
_WORDS = (
    "key|keys|apikey|token|secrets?|passwords?|passwd|passphrase|credentials?|authorization|cookie"
)
_SECRET_NAME = re.compile(
    rf"(?i:(?:^|[_\-. ])(?:{_WORDS})$)|(?<=[a-z])(?:Key|Token|Secret|Password|Authorization)$"
)
# The names of the config itself with such a last word; they are columns of the data.
NO_SECRETS = ("prompt_key", "answer_key", "completion_key", "category_key")
# A token of a tokenizer, such as "</s>", "[MASK]" or "####".
_SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]|\W*", re.DOTALL)
# Hugging Face, OpenAI, GitHub, AWS and Google keys. A W&B key is 40 hexadecimal digits and nothing
# else; inside of a longer text such digits are a commit in the path of a snapshot.
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{30,}|(?<=\bBearer )\S+|\A[0-9a-f]{40}\Z"
    r"|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
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
    return _SECRET_VALUE.sub(REDACTED, value)


def _is_secret(name: str) -> bool:
    return name not in NO_SECRETS and _SECRET_NAME.search(name) is not None
