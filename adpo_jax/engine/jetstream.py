"""The rollout engine as a `jetstream.engine.engine_api.Engine`, for JetStream's orchestrator.

    engine = JetStreamEngine(Engine(policy, ...), SamplingParams(...), tokenizer, params, key)
    Driver(prefill_engines=[engine], generate_engines=[engine], ...)

It needs google-jetstream 0.2.2, `pip install --no-deps google-jetstream tiktoken blobfile grpcio
shortuuid prometheus_client protobuf` and a module `seqio.vocabularies` (the whole of seqio brings
TensorFlow). The orchestrator samples one completion a prompt, knows no log-probs and keeps its
first parameters, so training uses `Engine.generate`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jetstream.engine import engine_api, tokenizer_api, tokenizer_pb2

from adpo_jax.engine.decode_state import DecodeState, Prefixes, Sizes, Slots
from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams, threefry
from adpo_jax.engine.sizes import column_buckets, length_bucket


class Prefix(NamedTuple):
    """A prefilled prompt."""

    prefixes: Prefixes  # of one row
    last_token: jax.Array  # int32 scalar, fed first
    position: jax.Array  # int32 scalar, of that token


class Tokenizer(tokenizer_api.Tokenizer):
    """A Hugging Face tokenizer behind JetStream's interface."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, s: str, **kwargs) -> tuple[np.ndarray, int]:
        tokens = np.array(self._tokenizer(s)["input_ids"], np.int32)
        padded = np.full(length_bucket(len(tokens), 1 << 30), self.pad_id, np.int32)
        padded[: len(tokens)] = tokens
        return padded, len(tokens)

    def decode(self, token_ids: list[int], **kwargs) -> str:
        return self._tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    @property
    def eos_id(self) -> int:
        return self._tokenizer.eos_token_id

    @property
    def bos_id(self) -> int:
        bos = self._tokenizer.bos_token_id
        return self.eos_id if bos is None else bos


class JetStreamEngine(engine_api.Engine):
    """Prefill, insert and generate of `adpo_jax.engine.verbs`, one step a call.

    Args:
      engine: its slots are the concurrent decodes. Its `max_prompt_length` must be a power of two,
        since the orchestrator pads prompts to powers of two.
      sampling: the settings of all requests; `n` is not read, `max_tokens` bounds that of a
        request.
      tokenizer: a Hugging Face tokenizer.
      params: the policy's parameters.
      key: a JAX random key; the n-th inserted request samples with its n-th child.
    """

    def __init__(self, engine: Engine, sampling: SamplingParams, tokenizer, params, key: jax.Array):
        length = engine.max_prompt_length
        if length < 16 or length & (length - 1):
            raise ValueError(
                f"JetStream pads prompts to powers of two from 16 up; max_prompt_length is {length}"
            )
        if engine.plan.paging is not None:
            raise ValueError(
                "JetStream's slots hold the longest completion: make the engine without "
                "expected_response_length"
            )
        self._engine, self._verbs = engine, engine.verbs
        self._sampling, self._tokenizer = sampling, Tokenizer(tokenizer)
        self._params, self._key = params, threefry(key)
        self._inserted = 0

    def load_params(self) -> Any:
        return self._verbs.load_params(self._params)

    def init_decode_state(self) -> DecodeState:
        slots = self._engine.num_slots
        columns = column_buckets(self._sampling.max_tokens, 1)[-1]
        # Every slot has a prefix row, since JetStream inserts one sample of a prompt.
        sizes = Sizes(slots, columns, slots, width=1, prefix=self._engine.max_prompt_length)
        return self._verbs.init_decode_state(sizes)

    def prefill(
        self, *, params, existing_prefix=None, padded_tokens: jax.Array, true_length: int
    ) -> Prefix:
        if existing_prefix is not None:
            raise ValueError("prefill continues no existing prefix; pass the whole prompt")
        tokens = jnp.asarray(padded_tokens, jnp.int32)
        last = jnp.asarray(true_length - 1, jnp.int32)
        prefixes = self._verbs.prefill(params, tokens[None], last[None])
        return Prefix(prefixes, tokens[last], last)

    def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
        B = self._engine.num_slots
        state = self._verbs.insert(decode_state, prefix.prefixes, np.array([slot], np.int32))
        key = jax.random.fold_in(self._key, self._inserted)
        self._inserted += 1
        zeros = np.zeros(B, np.int32)
        slots = Slots(
            token=jnp.broadcast_to(prefix.last_token, (B,)),
            position=jnp.broadcast_to(prefix.position, (B,)),
            generated=zeros,
            active=np.ones(B, bool),
            row=np.arange(B, dtype=np.int32),
            rank=zeros,
            key_data=jnp.broadcast_to(jax.random.key_data(key), (B, 2)),
        )
        members = np.arange(B, dtype=np.int32)[:, None]
        return self._verbs.assign(state, np.arange(B) == slot, slots, members)

    def generate(self, params, decode_state: DecodeState):
        state, results = self._verbs.generate(
            params,
            decode_state,
            self._sampling.knobs(),
            self._sampling.method,
            1,
            np.int32(-1),
            np.int32(1),
        )
        columns = (results.tokens[0], results.valid[0], state.slots.generated)
        return state, engine_api.ResultTokens(
            data=jnp.stack(columns, axis=1).astype(jnp.int32),
            tokens_idx=(0, 1),
            valid_idx=(1, 2),
            length_idx=(2, 3),
            samples_per_slot=1,
        )

    def get_prefix_destination_sharding(self) -> Any:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
        return tokenizer_pb2.TokenizerParameters()

    def build_tokenizer(self, metadata) -> Tokenizer:
        return self._tokenizer

    @property
    def max_concurrent_decodes(self) -> int:
        return self._engine.num_slots

    @property
    def samples_per_slot(self) -> int:
        return 1

    @property
    def max_prefill_length(self) -> int:
        return self._engine.max_prompt_length

    @property
    def mesh(self):
        return self._engine.policy.mesh

    @property
    def colocated_cpus(self) -> None:
        return None
