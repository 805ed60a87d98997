"""A sampler of test_elsewhere in a process of its own: python sampler_process.py ADDRESS."""

import sys

import tiny

from adpo_jax.engine.engine import Engine
from adpo_jax.engine.sampling import SamplingParams
from adpo_jax.run.roles import SamplerRole

KEY = "the key of this run"
LENGTHS = {"max_prompt_length": 4, "max_response_length": 12, "num_slots": 4}
SAMPLING = SamplingParams(
    n=2, max_tokens=12, stop_token_ids=(0, 1, 2, 3), top_k=20, full_log_probs=True
)


def main(address: str) -> None:
    policy, _ = tiny.policy_and_params()
    engine = Engine(policy, steps_per_dispatch=2, **LENGTHS)
    SamplerRole(policy, engine, SAMPLING, address=address, key=KEY).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
