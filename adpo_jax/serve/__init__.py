"""An OpenAI-compatible server on the engine: `python -m adpo_jax.serve --model ...`.

`app` is the HTTP. `protocol` and `fields` read requests, and `service` makes prompts and samples of
them. `decoding` is the thread that decodes. `answers` makes choices, chunks and bodies. `tokens` is
all of that for an endpoint without text, and `weights` reads new weights.
"""
