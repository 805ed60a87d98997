"""The engine driven by JetStream's own orchestrator, in this process, without a gRPC server."""

import asyncio
import logging
import sys
import types

import jax
import numpy as np
import pytest
import tiny

from adpo_jax import Engine, Policy, SamplingParams


class WordTokenizer:
    """Token i is the word `t<i>`."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, 2

    def __call__(self, text):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, ids):
        return "".join(f"t{i} " for i in ids)


@pytest.fixture
def jetstream(monkeypatch):
    """The orchestrator, imported without seqio and TensorFlow, its logging undone."""
    vocabularies = types.ModuleType("seqio.vocabularies")
    vocabularies.Vocabulary = vocabularies.SentencePieceVocabulary = object
    monkeypatch.setitem(sys.modules, "seqio", types.ModuleType("seqio"))
    monkeypatch.setitem(sys.modules, "seqio.vocabularies", vocabularies)
    if not hasattr(jax, "tree_map"):
        monkeypatch.setattr(jax, "tree_map", jax.tree_util.tree_map, raising=False)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    orchestrator = pytest.importorskip(
        "jetstream.core.orchestrator", reason="needs the extra [jetstream]", exc_type=ImportError
    )
    root.setLevel(level)
    root.handlers = handlers
    return orchestrator


def test_the_orchestrator_gets_the_greedy_tokens_of_generate(jetstream):
    from adpo_jax.engine.jetstream import JetStreamEngine

    policy = Policy(tiny.model_config(vocab_size=40))
    params = policy.init(jax.random.key(0))
    engine = Engine(policy, max_prompt_length=16, max_response_length=32, num_slots=2)
    # The orchestrator takes pad tokens for the end of a text, so none may be sampled.
    sampling = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(0, 1))
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    with_bos = [[2, *prompt] for prompt in prompts]
    wanted = engine.generate(params, with_bos, sampling, jax.random.key(0))

    served = JetStreamEngine(engine, sampling, WordTokenizer(), params, jax.random.key(0))
    loaded = served.load_params()
    driver = jetstream.Driver(
        prefill_engines=[served],
        generate_engines=[served],
        prefill_params=[loaded],
        generate_params=[loaded],
    )
    # The driver's threads close their channels a little after the last token, on this event loop,
    # and an exception there kills the process. So the loop outlives them.
    with asyncio.Runner() as runner:
        try:
            texts = runner.run(serve(jetstream, driver, prompts))
        finally:
            driver.stop()
    for tokens, (completion,) in zip(texts, wanted.groups, strict=True):
        expected = [t for t in completion.tokens.tolist() if t not in (0, 1)]
        assert tokens == expected


async def serve(jetstream, driver, prompts) -> list[list[int]]:
    """The token ids of each request; all are under way at once."""
    from jetstream.core.utils import async_multifuture

    channels = []
    for prompt in prompts:
        channels.append(async_multifuture.AsyncMultifuture())
        request = jetstream.ActiveRequest(
            max_tokens=12,
            prefill_content=np.array(prompt),
            return_channel=channels[-1],
            is_client_side_tokenization=True,
        )
        driver.place_request_on_prefill_queue(request)
    return [[t async for samples in c for t in samples[0].token_ids] for c in channels]
