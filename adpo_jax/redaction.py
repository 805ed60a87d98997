"""What must not be written to disk: keys, tokens and passwords that a config may hold."""

import re
from typing import Any

REDACTED = "<redacted>"

# The last word of a key: "api_key", "openai_api_key", "hf_token"; not "max_tokens" or "eos_token".
_SECRET_KEY = re.compile(
    r"(^|_)(api_?key|access_?key|secret(_?key)?|private_?key|password|passwd|credentials?"
    r"|(hf|hub|wandb|auth|access|api|bearer)_?token)$|^(token|key)$",
    re.IGNORECASE,
)
# Hugging Face, OpenAI, GitHub, AWS and Google keys; W&B's are 40 hexadecimal digits.
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}"
    r"|AIza[A-Za-z0-9_-]{30,}|(?<![A-Za-z0-9])[0-9a-f]{40}(?![A-Za-z0-9])"
    r"|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)


def redacted(value: Any, key: str = "") -> Any:
    """A copy of a config in which everything that looks like a secret is replaced.

    Args:
      value: dicts, lists and plain values.
      key: the name that `value` stands under.
    """
    if isinstance(value, dict):
        return {name: redacted(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return REDACTED if _SECRET_KEY.search(key) else _SECRET_VALUE.sub(REDACTED, value)
