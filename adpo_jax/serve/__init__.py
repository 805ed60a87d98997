"""An OpenAI-compatible server on the engine: `python -m adpo_jax.serve --model ...`.

requests in (`protocol`, `fields`) -> prompts, samples (`service`, in a thread `decoding`) ->
choices, chunks and bodies out (`answers`); `app` is the HTTP around it.
"""
