"""How an iteration's prompts are cut into optimizer steps and micro-batches."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How an iteration's prompts are cut into optimizer steps and micro-batches.

    Attributes:
      num_prompts: prompts of an iteration.
      mini_prompts: prompts of an optimizer step.
      micro_prompts: under the layout "rows", prompts whose completions run through the model at
        once.
      epochs: passes over the prompts of the iteration.
      layout: "packed" for streams in which groups share their prompt (`packing`), "rows" for padded
        rows.
      micro_completions: under the layout "packed", completions of full length that fit in a
        micro-batch of a device; 0 for all.
      prompt_length, completion_length: tokens of the longest prompt and completion there may be; 0
        for those of the batch at hand.
    """

    num_prompts: int
    mini_prompts: int
    micro_prompts: int
    epochs: int
    layout: str = "packed"
    micro_completions: int = 0
    prompt_length: int = 0
    completion_length: int = 0

    @property
    def updates_per_iteration(self) -> int:
        return self.epochs * self.num_prompts // self.mini_prompts

    @property
    def num_micro(self) -> int:
        """Micro-batches of an optimizer step in rows; packed ones are cut by their tokens."""
        return self.mini_prompts // self.micro_prompts
