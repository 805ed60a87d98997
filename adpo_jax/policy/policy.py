"""Policy: the public face of a language model whose parameters are a plain tree.

A `Policy` holds what never changes (architecture, dtypes, mesh) and is hashable; parameters are an
argument of every method, so new weights need no new object.

Letters: B batch, T tokens, D model width, V vocabulary.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adpo_jax.devices import host_memory, sharding
from adpo_jax.hf import folders
from adpo_jax.hf.config import language_config, model_config
from adpo_jax.model import (
    attention_choice,
    attention_kernels,
    linear_attention_chunks,
    parameters,
    random_weights,
)
from adpo_jax.model.attention import Attend
from adpo_jax.model.attention_choice import Use
from adpo_jax.model.attention_kernels import ROWS, STREAMS, Settings
from adpo_jax.model.attention_kernels.per_device import EXCHANGES
from adpo_jax.model.decoder import REMAT_POLICIES, Ffn, decoder, head_logits
from adpo_jax.model.head import token_log_probs
from adpo_jax.model.linear_attention import Hybrid
from adpo_jax.model.lora import Lora, join, split
from adpo_jax.model.mixture import MixtureFfn
from adpo_jax.model.model_config import ModelConfig
from adpo_jax.model.tile_attention import Stream

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A decoder language model.

    Attributes:
      config: the architecture.
      dtype: dtype of the computation, one of `DTYPES` (norms, softmax and log-probs are float32
        whatever it is).
      param_dtype: dtype of the parameters; adapters are float32 whatever it is.
      mesh: the devices that the parameters are spread over; None for the default device.
      gradient_checkpointing: what a backward pass recomputes, one of `decoder.REMAT_POLICIES`:
        "none", "full", "save_dots" or "offload".
      scan_layers: whether the layers of whole sequences are the turns of a loop; see `decoder`.
      attention: attention of whole sequences, one of `attention_choice.NAMES`; refused where it
        cannot run.
      sequence_exchange: how devices that share a packed stream see each other's keys and values:
        "gather", "ring", or "auto" for the ring where a layer's are large; see `per_device`.
      lora: the adapters beside the weights, which are frozen then; None for none.
      hf_config: the Hugging Face `config.json` that it came from; `save_pretrained` writes it back.
      generation_config: likewise its `generation_config.json`; empty for none.
    """

    config: ModelConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    gradient_checkpointing: str = "none"
    scan_layers: bool = True
    attention: str = "auto"
    sequence_exchange: str = "auto"
    lora: Lora | None = None
    hf_config: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)
    generation_config: dict = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        self._check_choices()
        self._check_mesh()
        if self.lora:
            object.__setattr__(self, "lora", self.lora.of_model(self.config))
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _float_dtype(name, getattr(self, name)))
        if self.attention != "auto":
            for use in (ROWS, STREAMS):
                self._attention_of(use)

    def _check_choices(self) -> None:
        """Refuses names that are none of their lists."""
        if self.gradient_checkpointing not in REMAT_POLICIES:
            raise ValueError(
                f"gradient_checkpointing is one of {sorted(REMAT_POLICIES)}, "
                f"given {self.gradient_checkpointing!r}"
            )
        if self.sequence_exchange not in EXCHANGES:
            raise ValueError(
                f"sequence_exchange is one of {', '.join(EXCHANGES)}, "
                f"given {self.sequence_exchange!r}"
            )

    def _check_mesh(self) -> None:
        """Refuses axes of the mesh over which the model cannot be computed."""
        shares = sharding.BatchSharding(self.mesh).num_shares
        if shares > 1 and self.config.linear_attention:
            raise ValueError(
                f"mesh.sequence is {shares}, but this model's linear attention runs through a "
                "sequence in order, on one device; give the devices to mesh.fsdp"
            )

    # --- from and to Hugging Face

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        dtype: Any = "float32",
        param_dtype: Any = None,
        mesh: Mesh | None = None,
        gradient_checkpointing: str = "none",
        override_config: Mapping[str, Any] | None = None,
        scan_layers: bool = True,
    ) -> tuple["Policy", Any]:
        """Loads a model from a Hugging Face folder or hub name; safetensors only.

        Every tensor is read once, straight into its place on the mesh.

        Args:
          name: a local folder, or a name on the hub, which is downloaded.
          dtype: dtype of the computation.
          param_dtype: dtype of the parameters; None for `dtype`.
          mesh, gradient_checkpointing, scan_layers: as for `Policy`.
          override_config: keys of config.json with other values; None leaves the key out.

        Returns:
          (policy, params).

        Raises:
          ValueError: for a folder or architecture that is not supported, or weights which do not
            fit it.
        """
        folder, config_json, generation_config = folders.load_folder_config(
            name, override=override_config
        )
        policy = cls.abstract_from_config(
            config_json,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            gradient_checkpointing=gradient_checkpointing,
            scan_layers=scan_layers,
            generation_config=generation_config,
        )
        policy.check_room()
        params = folders.load_params(
            policy.config, policy.abstract_params(), folder, config_json["model_type"]
        )
        return policy, params

    @classmethod
    def from_config(
        cls,
        hf_config: Mapping[str, Any],
        key: jax.Array,
        dtype: Any = "float32",
        param_dtype: Any = None,
        mesh: Mesh | None = None,
        gradient_checkpointing: str = "none",
        scan_layers: bool = True,
    ) -> tuple["Policy", Any]:
        """A model with random weights.

        Args:
          hf_config: the content of a Hugging Face `config.json`, with its `model_type`.
          key: a JAX random key.

        Returns:
          (policy, params); the other arguments and errors as of `from_pretrained`.
        """
        policy = cls.abstract_from_config(
            hf_config,
            dtype=dtype,
            param_dtype=param_dtype,
            mesh=mesh,
            gradient_checkpointing=gradient_checkpointing,
            scan_layers=scan_layers,
        )
        policy.check_room()
        return policy, policy.init(key)

    @classmethod
    def abstract_from_config(
        cls,
        hf_config: Mapping[str, Any],
        *,
        dtype: Any = "float32",
        param_dtype: Any = None,
        **settings: Any,
    ) -> "Policy":
        """The policy alone, without weights: for shapes, compilation and dry runs.

        Args:
          settings: other fields of `Policy`.

        The other arguments and errors are those of `from_config`.
        """
        hf_config = language_config(hf_config)
        return cls(
            config=model_config(hf_config),
            dtype=dtype,
            param_dtype=dtype if param_dtype is None else param_dtype,
            hf_config=hf_config,
            **settings,
        )

    def for_length(self, max_length: int) -> "Policy":
        """This policy for sequences of at most so many tokens.

        It is another one for models with LongRoPE alone, which have one set of frequencies for
        sequences within their original length and one for longer ones. transformers chooses anew in
        every call; here one set serves all sequences of a run, whose keys lie in caches. Without
        this call it is the one of `max_position_embeddings`.
        """
        if not self.hf_config:
            return self
        return dataclasses.replace(self, config=model_config(self.hf_config, max_length))

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that the model is made for; None where nothing says so.

        That is `max_position_embeddings`, or the length that a rope is stretched to where a file
        leaves that number as it was before.
        """
        given = self.hf_config.get("max_position_embeddings")
        if not given:
            return None
        stretched = [rope.factor * rope.original_length for rope in self.config.ropes]
        return int(max([given, *stretched]))

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        params,
        tokenizer=None,
        *,
        dtype: Any = None,
        max_shard_size: int = 5 * 10**9,
        overwrite: bool = False,
    ) -> None:
        """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` reads.

        The folder appears whole or not at all. On several processes all of them must call this,
        and process 0 writes. Adapters are merged into their weights.

        Args:
          params: parameters of this policy, in any sharding.
          tokenizer: a tokenizer to write too; None for none. The files that it was read from are
            copied where nothing about it has changed, since older readers know their form.
          dtype: dtype of the weights on disk; None for `dtype_on_disk`.
          max_shard_size: bytes of one safetensors file.
          overwrite: replace a folder that is not empty.

        Raises:
          ValueError: for a folder that is not empty, parameters that are not of this policy, or a
            policy that came from no Hugging Face config.
        """
        if not self.hf_config:
            raise ValueError("this policy has no hf_config; make it by Policy.from_config")
        wanted = jax.tree.map(jnp.shape, self.abstract_params())
        if jax.tree.map(jnp.shape, params) != wanted:
            raise ValueError("the parameters have other names or shapes than this policy's")
        folders.save_folder(
            folder,
            params,
            config=self.config,
            config_json=self.hf_config,
            generation_config=self.generation_config,
            tokenizer=tokenizer,
            dtype=self.dtype_on_disk if dtype is None else dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            lora_scale=self._lora_scale,
        )

    @property
    def dtype_on_disk(self) -> Any:
        """The dtype in which weights are written if none is asked for.

        It is float32 where there are adapters, since a narrower one would round away most of what
        they learned. Of weights that were read from MXFP4 it is bfloat16, and else `param_dtype`.
        """
        if self.lora:
            return jnp.dtype(jnp.float32)
        quantized = self.hf_config.get("quantization_config")
        return jnp.dtype(jnp.bfloat16) if quantized else self.param_dtype

    # --- parameters

    @property
    def _lora_scale(self) -> float:
        return self.lora.scale if self.lora else 1.0

    def _init(self, key: jax.Array):
        params = random_weights.init(self.config, key, self.param_dtype)
        return join(self._init_adapters(key, params), params) if self.lora else params

    def _init_adapters(self, key: jax.Array, params):
        return {"layers": self.lora.init(jax.random.fold_in(key, 1), params["layers"])}

    def abstract_params(self):
        """The parameter tree as `jax.ShapeDtypeStruct`s, with shardings where there is a mesh."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        if self.mesh is None:
            return shapes
        return jax.tree.map(
            lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout),
            shapes,
            self.shardings(shapes),
        )

    def check_room(self) -> None:
        """Raises ValueError for parameters that the memory of the devices cannot hold."""
        devices = [jax.local_devices()[0]] if self.mesh is None else self.mesh.devices.flatten()
        room = host_memory.room(devices)
        # Each of them has a copy of what is not split over it.
        needed = sharding.device_bytes(self.abstract_params()) * len(devices)
        if room is not None and needed > room:
            raise ValueError(
                f"the parameters take {needed / 1e9:,.1f} GB, and the memory of "
                f"{len(devices)} {devices[0].platform} device(s) is {room / 1e9:,.1f} GB"
            )

    def shardings(self, params):
        """How a parameter tree (arrays or their shapes) lies on the policy's mesh."""
        return jax.tree.map(
            lambda x, axes: sharding.named_sharding(self.mesh, axes, x.shape),
            params,
            parameters.logical_axes(params),
        )

    def constrained(self, params):
        """Pins the layout of a parameter tree (gradients too) inside jit."""
        if self.mesh is None or self.mesh.size == 1:
            return params
        return jax.lax.with_sharding_constraint(params, self.shardings(params))

    def init(self, key: jax.Array):
        """Random parameters, created in their sharded layout."""
        if self.mesh is None:
            return jax.jit(self._init)(key)
        shardings = jax.tree.map(lambda s: s.sharding, self.abstract_params())
        return jax.jit(self._init, out_shardings=shardings)(key)

    def with_adapters(self, params, lora: Lora, key: jax.Array) -> tuple["Policy", Any]:
        """This policy with new adapters, which change nothing until they are trained.

        Args:
          params: parameters of this policy; they become the frozen part of the result, without a
            copy.

        Returns:
          (policy, params).

        Raises:
          ValueError: for parameters with adapters, which would be lost.
        """
        if any(map(parameters.is_adapter, params["layers"])):
            raise ValueError(
                "these parameters have adapters already: give the base without them, or merge them "
                "into the weights (save_pretrained, then Policy.from_pretrained)"
            )
        policy = dataclasses.replace(self, lora=lora)
        wanted, _ = split(policy.abstract_params())
        layout = None if self.mesh is None else jax.tree.map(lambda s: s.sharding, wanted)
        init = jax.jit(policy._init_adapters, out_shardings=layout)
        return policy, join(init(key, params), params)

    # --- pure building blocks, for use inside jit

    def __call__(
        self,
        params,
        tokens,
        positions,
        kv_cache=None,
        attend: Attend | None = None,
        ffn: Ffn | None = None,
    ):
        """Runs the decoder.

        Args:
          params: the parameter tree; layers that are unstacked into a tuple run one by one.
          tokens, positions: [B, T] int32.
          kv_cache: the cache that is carried through `attend`.
          attend: an attention of `model.attention`; by default a causal one over the T tokens of
            each row, without a cache.
          ffn: the part of each layer after attention; by default the model's own, an MLP or a
            mixture of experts.

        Returns:
          (hidden [B, T, D] in `dtype`, kv_cache, the extras of `ffn` stacked over the layers).
        """
        if attend is None:
            attend = self.self_attention(positions, jnp.ones_like(tokens))
        return decoder(
            self.config,
            params,
            tokens,
            positions,
            kv_cache,
            attend=attend,
            ffn=ffn,
            dtype=self.dtype,
            mesh=self.mesh,
            remat=self.gradient_checkpointing,
            scan_layers=self.scan_layers or kv_cache is not None,
            lora_scale=self._lora_scale,
        )

    def ffn(self, present: jax.Array, forced: jax.Array | None = None) -> Ffn | None:
        """The part of each layer after attention, for `__call__`.

        Args:
          present: [B, T], above 0 at places that hold a token.
          forced: [B, T, L, k] int32, the experts that tokens take in each layer with a mixture; -1
            where the router chooses. None for nowhere.
        """
        return MixtureFfn(present > 0, forced) if self.config.mixture else None

    def self_attention(self, positions: jax.Array, segments: jax.Array) -> Attend:
        """Causal attention within segments; [B, T] int32 each, segment 0 is padding."""
        name, settings = self._attention_of(ROWS), self.attention_settings
        attend = attention_kernels.self_attention(name, settings, positions, segments)
        return self.with_linear_attention(attend, segments)

    def with_linear_attention(self, attend: Attend, segments: jax.Array) -> Attend:
        """An attention of rows without a cache, with linear attention if the model has it."""
        if not self.config.linear_attention:
            return attend
        return Hybrid(attend, linear_attention_chunks.rows(segments, self.mesh))

    def stream_attention(self, stream: Stream, num_prompt: int) -> Attend:
        """Attention of a packed stream to itself, for the training forward.

        Args:
          num_prompt: places of prompts in a stream. If the model has linear attention, prompts and
            completions must start at multiples of `linear_attention.chunk_of(tile)`.
        """
        name = self._attention_of(STREAMS)
        attend = attention_kernels.stream_attention(name, self.attention_settings, stream)
        if not self.config.linear_attention:
            return attend
        return Hybrid(attend, linear_attention_chunks.stream(stream, num_prompt, self.mesh))

    def _attention_of(self, use: Use) -> str:
        settings = self.attention_settings
        return attention_choice.resolve(self.attention, use, settings, settings.platform)

    @property
    def attention_settings(self) -> Settings:
        c = self.config
        return Settings(
            windows=c.windows,
            num_kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            scale=c.attention_scale,
            soft_cap=c.attention_soft_cap,
            dtype=self.dtype,
            mesh=self.mesh,
            chunked=bool(c.chunks),
            global_head_dim=c.global_layers.head_dim if c.global_layers else None,
            sinks=c.attention_sinks,
            exchange=self.sequence_exchange,
        )

    def head(self, params, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        return head_logits(self.config, params, hidden, self.mesh)

    def hidden(self, params, tokens, attention_mask) -> jax.Array:
        """Hidden states [B, T, D] of rows padded on either side; meaningless at padding."""
        return self.hidden_and_extras(params, tokens, attention_mask)[0]

    def hidden_and_extras(self, params, tokens, attention_mask):
        """(`hidden`, the extras of the layers)."""
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0).astype(jnp.int32)
        attend = self.self_attention(positions, attention_mask.astype(jnp.int32))
        hidden, _, extras = self(
            params, tokens, positions, attend=attend, ffn=self.ffn(attention_mask)
        )
        return hidden, extras

    def completion_log_probs(
        self, params, tokens, attention_mask, *, num_completion: int, temperature: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probs and entropies of the last `num_completion` tokens of each row.

        The head runs over those columns alone.

        Args:
          tokens, attention_mask: [B, T] int32.

        Returns:
          (log_probs, entropy), each [B, num_completion] float32 in nats; finite but meaningless at
          padding.

        Raises:
          ValueError: num_completion is below 1, or leaves no token before the completion.
        """
        if not 1 <= num_completion < tokens.shape[1]:
            raise ValueError(
                f"num_completion is at least 1 and below the {tokens.shape[1]} columns of tokens, "
                f"whose first has no log-prob; given {num_completion}"
            )
        hidden = self.hidden(params, tokens, attention_mask)[:, -num_completion - 1 : -1]
        targets = tokens[:, -num_completion:]
        return token_log_probs(
            self.config, params, hidden, targets, temperature=temperature, mesh=self.mesh
        )

    # --- public, jitted

    @functools.partial(jax.jit, static_argnums=0)
    def _logits(self, params, tokens, attention_mask):
        return self.head(params, self.hidden(params, tokens, attention_mask))

    @functools.partial(jax.jit, static_argnums=0)
    def _log_probs(self, params, tokens, attention_mask):
        scored, _ = self.completion_log_probs(
            params, tokens, attention_mask, num_completion=tokens.shape[1] - 1
        )
        both_real = (attention_mask[:, 1:] * attention_mask[:, :-1]) > 0
        return jnp.pad(jnp.where(both_real, scored, 0.0), ((0, 0), (1, 0)))

    def logits(self, params, tokens, attention_mask=None) -> jax.Array:
        """Next-token logits.

        Args:
          tokens: [B, T] int32.
          attention_mask: [B, T], 1 at real tokens, padding on either side; None for no padding.

        Returns:
          [B, T, V] float32, meaningless at padding.

        Raises:
          ValueError: for shapes that do not fit, or token ids outside the vocabulary.
        """
        return self._logits(params, *self._checked(tokens, attention_mask))

    def log_probs(self, params, tokens, attention_mask=None) -> jax.Array:
        """log p(tokens[t] | tokens[<t]).

        Args:
          tokens, attention_mask: as for `logits`.

        Returns:
          [B, T] float32 in nats; 0 at the first real token of a row and at padding.

        Raises:
          ValueError: as `logits`.
        """
        tokens, attention_mask = self._checked(tokens, attention_mask)
        if tokens.shape[1] == 1:
            return jnp.zeros(tokens.shape, jnp.float32)
        return self._log_probs(params, tokens, attention_mask)

    def _checked(self, tokens, attention_mask):
        if attention_mask is None:
            attention_mask = np.ones(np.shape(tokens), np.int32)
        if np.ndim(tokens) != 2 or np.shape(tokens) != np.shape(attention_mask):
            raise ValueError(
                "tokens and attention_mask are both [B, T]; given shapes "
                f"{np.shape(tokens)} and {np.shape(attention_mask)}"
            )
        if 0 in np.shape(tokens):
            raise ValueError(
                "tokens are [B, T] with at least one row and one column; given shape "
                f"{np.shape(tokens)}"
            )
        is_traced = isinstance(tokens, jax.core.Tracer)
        kind = tokens.dtype if isinstance(tokens, jax.Array) else np.asarray(tokens).dtype
        if not np.issubdtype(kind, np.integer):
            raise ValueError(f"token ids are whole numbers, int32; given {kind}")
        if not is_traced and getattr(tokens, "is_fully_addressable", True):
            tokens = np.asarray(tokens)
            low, high = np.min(tokens, initial=0), np.max(tokens, initial=0)
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token ids are in [0, {self.config.vocab_size}); given {low} to {high}"
                )
        return jnp.asarray(tokens, jnp.int32), jnp.asarray(attention_mask, jnp.int32)


def _float_dtype(name: str, given: Any) -> jnp.dtype:
    """A dtype of `DTYPES`, by its name or as NumPy and JAX give it."""
    try:
        dtype = jnp.dtype(given)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        near = difflib.get_close_matches(str(given), DTYPES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} is one of {', '.join(DTYPES)}; given {given!r}{hint}")
    return dtype
